"""Codebooks: the 4-bit tables and the 256-entry maps are data formats, so their values are pinned."""

from __future__ import annotations

import hashlib
import sys

import pytest
import torch

from bitsandbytes import functional as F
from oracles import golden

MAPS = {
    "dynamic_signed": lambda: F.create_dynamic_map(True),
    "dynamic_unsigned": lambda: F.create_dynamic_map(False),
    "linear_signed": lambda: F.create_linear_map(True),
    "linear_unsigned": lambda: F.create_linear_map(False),
    "linear_signed_nozero": lambda: F.create_linear_map(True, 8, False),
    "fp8_e5m2": lambda: F.create_fp8_map(True, 5, 2, 8),
    "fp8_e4m3": lambda: F.create_fp8_map(True, 4, 3, 8),
    "fp8_unsigned_e5m3": lambda: F.create_fp8_map(False, 5, 3, 8),
    "fp8_4bit_e2m1": lambda: F.create_fp8_map(True, 2, 1, 4),
    **{f"dynamic_signed_bits{b}": lambda b=b: F.create_dynamic_map(True, b, b) for b in range(2, 8)},
    **{f"linear_signed_bits{b}": lambda b=b: F.create_linear_map(True, b) for b in range(2, 8)},
}


def assert_is_map(table: torch.Tensor, *, ascending: bool = True) -> None:
    assert table.dtype == torch.float32
    assert table.shape == (256,)
    if ascending:
        assert (table.diff() >= 0).all(), "not ascending"


def assert_within_one_ulp(actual: torch.Tensor, expected: torch.Tensor) -> None:
    up = torch.nextafter(expected, torch.full_like(expected, torch.inf))
    down = torch.nextafter(expected, torch.full_like(expected, -torch.inf))
    # The centre of a linear map is zero or what the rounding of its step leaves of it.
    fits = ((actual >= down) & (actual <= up)) | ((actual.abs() <= 1e-8) & (expected.abs() <= 1e-8))
    assert fits.all(), f"{int((~fits).sum())} entries differ"


# --- 4-bit tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_4bit_table_is_exact_and_in_code_order(device, name):
    table = F.get_4bit_type(name, device)

    assert table.dtype == torch.float32
    assert table.device.type == device
    assert torch.equal(table.cpu(), golden("codebooks")[name])


def test_af4_table_descends_and_exists_for_blocks_of_64_only():
    table = F.get_4bit_type("af4", "cpu", blocksize=64)

    assert torch.equal(table, golden("codebooks")["af4_bs64"])
    assert (table.diff() < 0).all()
    with pytest.raises(NotImplementedError, match=r"(?s)AbnormalFloats.*64"):
        F.get_4bit_type("af4", "cpu", blocksize=128)


def test_int4_table_has_two_zeros_and_sevenths():
    sevenths = [7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7]

    table = F.get_4bit_type("int4", "cpu")

    assert table.dtype == torch.float32
    assert torch.equal(table, torch.tensor(sevenths, dtype=torch.float32) / 7)


def test_unknown_4bit_type_is_named_in_the_error():
    with pytest.raises(NotImplementedError, match=r"(?s)nf5.*not supported"):
        F.get_4bit_type("nf5", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_4bit_table_is_on_cuda_unless_told_otherwise():
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)cuda"):
        F.get_4bit_type("nf4")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_4bit_table_goes_to_cuda_by_default():
    assert F.get_4bit_type("nf4").device.type == "cuda"


def test_fp4_is_not_the_normalised_e2m1_map():
    smallest = F.create_fp8_map(True, 2, 1, 4).unique().abs().sort().values[1]

    assert smallest.item() == pytest.approx(0.0208333, rel=1e-5)


# --- maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPS)
def test_map_matches_its_published_values(name):
    table = MAPS[name]()

    assert_is_map(table, ascending="linear" not in name)  # linear maps put their zeros at the middle index
    assert_within_one_ulp(table, golden("codebooks")[name])


@pytest.mark.parametrize(
    ("signed", "digest"),
    [
        (True, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
        (False, "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
    ],
)
def test_dynamic_map_is_the_same_on_every_machine(signed, digest):
    table = F.create_dynamic_map(signed)

    assert hashlib.sha256(bytes(table.view(torch.uint8).tolist())).hexdigest() == digest


def test_signed_dynamic_map_has_one_zero_and_no_minus_one():
    table = F.create_dynamic_map()

    assert table[127].item() == 0.0
    assert table[255].item() == 1.0
    assert table[0].item() == pytest.approx(-0.992968738)
    assert table.unique().numel() == 256


def test_unsigned_dynamic_map_starts_at_zero():
    table = F.create_dynamic_map(signed=False)

    assert table[0].item() == 0.0
    assert table[255].item() == 1.0
    assert table.unique().numel() == 256


@pytest.mark.parametrize("bits", range(2, 9))
def test_dynamic_map_of_few_bits_is_padded_with_zeros(bits):
    table = F.create_dynamic_map(True, bits, bits)

    assert_is_map(table)
    assert int((table != 0).sum()) == 2**bits - 1


def test_dynamic_map_rejects_bits_that_do_not_add_up():
    assert_is_map(F.create_dynamic_map(False, 3, 4))
    with pytest.raises(AssertionError):
        F.create_dynamic_map(False, 4, 8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_linear_map_spans_its_range_with_zeros_in_the_middle(signed, bits):
    table = F.create_linear_map(signed, bits)
    count = 2**bits - 1 if signed else 2**bits

    assert_is_map(table, ascending=False)
    assert table[0].item() == (-1.0 if signed else 0.0)
    assert table[-1].item() == 1.0
    assert int((table.abs() > 1e-7).sum()) == count - 1
    half = count // 2
    filler = table[half : half + 256 - count]
    assert (filler == 0).all()
    assert (torch.cat([table[:half], table[half + 256 - count :]]).diff() > 0).all()


def test_fp8_map_rejects_bits_that_do_not_add_up():
    with pytest.raises(AssertionError):
        F.create_fp8_map(True, 5, 3, 8)


def test_fp8_map_is_symmetric_and_normalised():
    table = F.create_fp8_map(True, 5, 2, 8)

    assert (table.min().item(), table.max().item()) == (-1.0, 1.0)
    assert table.unique().numel() == 255
    assert torch.equal(table, -table.flip(0))


@pytest.mark.parametrize("name", ["normal_map", "normal_map_symmetric"])
def test_normal_map_matches_its_published_values(name):
    pytest.importorskip("scipy", reason="create_normal_map needs scipy")

    table = F.create_normal_map() if name == "normal_map" else F.create_normal_map(use_extra_value=False)

    assert_is_map(table)
    assert_within_one_ulp(table, golden("codebooks")[name])


def test_normal_map_holds_nf4():
    pytest.importorskip("scipy", reason="create_normal_map needs scipy")

    table = F.create_normal_map()

    assert torch.equal(torch.cat([table[:8], table[-8:]]), golden("codebooks")["nf4"])


def test_normal_map_without_scipy_says_what_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)

    with pytest.raises(ImportError, match=r"(?i)scipy"):
        F.create_normal_map()


# --- independence from the process's settings ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_tables_do_not_depend_on_the_default_dtype(default_dtype, dtype):
    expected = {name: make() for name, make in MAPS.items()}
    expected_nf4 = F.get_4bit_type("nf4", "cpu")

    default_dtype(dtype)

    for name, make in MAPS.items():
        table = make()
        assert table.dtype == torch.float32, name
        assert torch.equal(table, expected[name]), name
    assert F.get_4bit_type("nf4", "cpu").dtype == torch.float32
    assert torch.equal(F.get_4bit_type("nf4", "cpu"), expected_nf4)


def test_maps_hold_values_under_a_meta_default_device():
    """Programs build models under ``torch.device("meta")``; a cached map must not become one without values."""
    with torch.device("meta"):
        table = F.create_dynamic_map()

    assert table.device.type == "cpu"
    assert table[255].item() == 1.0


def test_default_map_is_cached_under_its_name():
    F.quantize_blockwise(torch.ones(4))

    assert torch.equal(F.name2qmap["dynamic"].cpu(), golden("codebooks")["dynamic_signed"])
