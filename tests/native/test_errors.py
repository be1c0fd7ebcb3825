"""What a failing native call looks like from Python."""

from __future__ import annotations

import platform
import threading

import pytest
import torch

from bitsandbytes import _native
from processes import run_python


def quantize(library, **changes):
    values = torch.ones(64)
    packed, absmax = torch.empty(32, dtype=torch.uint8), torch.empty(1)
    arguments = {
        "values": values.data_ptr(),
        "dtype": _native.DTYPE_ID[torch.float32],
        "format": _native.FORMAT_ID["nf4"],
        "packed": packed.data_ptr(),
        "absmax": absmax.data_ptr(),
        "n": 64,
        "blocksize": 64,
        "threads": 1,
    }
    return library.bnb_cpu_quantize_4bit(*{**arguments, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": 99}, "unknown dtype 99"),
        ({"format": 7}, "unknown 4-bit format 7"),
        ({"n": -1}, "n must not be negative, got -1"),
        ({"blocksize": 0}, "blocksize must be positive, got 0"),
        ({"blocksize": 33}, "blocksize must be even, got 33"),
        ({"values": None}, "null pointer for 64 values"),
        ({"packed": None}, "null pointer"),
    ],
)
def test_a_bad_argument_is_a_value_error_with_the_native_text(library, changes, text):
    with pytest.raises(ValueError, match=f"bnb_cpu_quantize_4bit: .*{text}"):
        quantize(library, **changes)


def test_wrong_argument_types_never_reach_the_library(library):
    with pytest.raises(Exception, match="argument"):
        quantize(library, n="64")


def test_nothing_to_do_needs_no_pointers(library):
    assert quantize(library, values=None, packed=None, absmax=None, n=0) == 0


def test_the_last_error_belongs_to_its_thread(library):
    with pytest.raises(ValueError):
        quantize(library, n=-1)
    seen = []
    thread = threading.Thread(
        target=lambda: seen.append((library.bnb_last_status(), library.bnb_last_error()))
    )
    thread.start()
    thread.join()

    assert seen == [(0, b"")]
    assert library.bnb_last_status() == _native.ABI.enums["bnb_status"].INVALID_ARGUMENT
    assert library.bnb_last_error().startswith(b"bnb_cpu_quantize_4bit: ")


def test_success_clears_the_last_error(library):
    with pytest.raises(ValueError):
        quantize(library, n=-1)
    quantize(library)
    assert (library.bnb_last_status(), library.bnb_last_error()) == (0, b"")


def test_an_older_symbol_raises_too_although_it_returns_nothing(library):
    with pytest.raises(ValueError, match="null pointer"):
        library.cdequantize_blockwise_cpu_nf4_fp32(None, None, None, 64, 1, 64)


def test_an_instruction_set_that_cannot_run_is_not_implemented(library):
    foreign = "avx2" if platform.machine() in ("aarch64", "arm64") else "neon"
    run_python(
        """
        import torch, bitsandbytes.functional as F
        try:
            F.quantize_4bit(torch.ones(64))
        except NotImplementedError as error:
            assert "cannot run here; available: " in str(error), error
        else:
            raise SystemExit("no error")
        """,
        env={"BNB_CPU_ISA": foreign},
    )
