"""Every CPU kernel on every instruction set of this machine: the same bits, whatever the threads and the alignment."""

from __future__ import annotations

import ctypes
import os
import threading

import pytest
import torch
from torch import Tensor

from bitsandbytes import _native, functional as F
from bitsandbytes._formats.table import FLOAT_DTYPES, FORMATS

COUNTS = [1, 2, 15, 16, 17, 63, 64, 65, 129, 1000, 4097]
BLOCKSIZES = [32, 64, 4096]
MAPS = {
    "signed": F.create_dynamic_map(),
    "unsigned": F.create_dynamic_map(signed=False),
    "linear": F.create_linear_map(),
    "crowded": torch.linspace(0.5, 0.501, 256),  # more entries in one binade than a cell can hold
    "flat": torch.zeros(256),
}


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def unaligned(tensor: Tensor) -> Tensor:
    """The same values one byte past an aligned address; torch itself never reads them."""
    held = torch.empty(tensor.numel() * tensor.element_size() + 1, dtype=torch.uint8)[1:]
    held.copy_(bytes_of(tensor))
    return held


def awkward(count: int, dtype: torch.dtype) -> Tensor:
    """Random values over many magnitudes, with zeros, denormals, infinities and NaN among them."""
    values = torch.randn(count) * torch.exp2(torch.randint(-30, 8, (count,)).float())
    for position, special in (
        (200, 0.0),
        (300, 1e-40),
        (400, torch.inf),
        (500, torch.nan),
        (600, -torch.inf),
    ):
        if position < count:
            values[position : position + 40 : 7] = special
    return values.to(dtype)


def quantize_4bit(library, values, count, dtype, quant_type, blocksize, threads=1):
    packed = torch.zeros((count + 1) // 2 + 8, dtype=torch.uint8)
    absmax = torch.zeros(-(-count // blocksize))
    library.bnb_cpu_quantize_4bit(
        values.data_ptr(),
        _native.DTYPE_ID[dtype],
        _native.FORMAT_ID[quant_type],
        packed.data_ptr(),
        absmax.data_ptr(),
        count,
        blocksize,
        threads,
    )
    assert not packed[(count + 1) // 2 :].any(), "wrote past the end"
    return packed[: (count + 1) // 2], absmax


def dequantize_4bit(library, packed, absmax, count, dtype, quant_type, blocksize, threads=1):
    values = torch.zeros(count + 8, dtype=dtype)
    library.bnb_cpu_dequantize_4bit(
        packed.data_ptr(),
        absmax.data_ptr(),
        _native.FORMAT_ID[quant_type],
        values.data_ptr(),
        _native.DTYPE_ID[dtype],
        count,
        blocksize,
        threads,
    )
    assert not values[count:].any(), "wrote past the end"
    return values[:count]


def quantize_blockwise(library, code, values, count, dtype, blocksize, threads=1):
    codes = torch.zeros(count, dtype=torch.uint8)
    absmax = torch.zeros(-(-count // blocksize))
    library.bnb_cpu_quantize_blockwise(
        code.data_ptr(),
        values.data_ptr(),
        _native.DTYPE_ID[dtype],
        codes.data_ptr(),
        absmax.data_ptr(),
        count,
        blocksize,
        threads,
    )
    return codes, absmax


def same_everywhere(variants, run):
    """Run on every instruction set; all results must be the scalar one's bytes.

    ARM's NaN has another sign than that of x86, so there a NaN may be any NaN.
    """
    expected = run(variants["scalar"])
    for name, library in variants.items():
        for one, other in zip(run(library), expected, strict=True):
            if name == "neon" and one.is_floating_point():
                assert torch.equal(one.isnan(), other.isnan()), name
                one, other = (
                    one.nan_to_num(0.0, torch.inf, -torch.inf),
                    other.nan_to_num(0.0, torch.inf, -torch.inf),
                )
            assert torch.equal(bytes_of(one), bytes_of(other)), name
    return expected


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", FORMATS)
def test_4bit_codes_and_values(variants, quant_type, dtype):
    for count in COUNTS:
        for blocksize in BLOCKSIZES:
            values = unaligned(awkward(count, dtype))
            packed, absmax = same_everywhere(
                variants, lambda library: quantize_4bit(library, values, count, dtype, quant_type, blocksize)
            )
            same_everywhere(
                variants,
                lambda library: [
                    dequantize_4bit(library, packed, absmax, count, dtype, quant_type, blocksize)
                ],
            )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_8bit_codes_and_values(variants, name, dtype):
    code = MAPS[name]
    for count in [*COUNTS, 20001]:  # the last two are long enough for the look-up table
        for blocksize in (1, 100, 256):
            values = unaligned(awkward(count, dtype))
            codes, absmax = same_everywhere(
                variants, lambda library: quantize_blockwise(library, code, values, count, dtype, blocksize)
            )

            def dequantize(library):
                out = torch.zeros(count, dtype=dtype)
                library.bnb_cpu_dequantize_blockwise(
                    code.data_ptr(),
                    codes.data_ptr(),
                    absmax.data_ptr(),
                    out.data_ptr(),
                    _native.DTYPE_ID[dtype],
                    count,
                    blocksize,
                    1,
                )
                return [out]

            same_everywhere(variants, dequantize)


@pytest.mark.parametrize("entries", [(), (torch.inf, -torch.inf, torch.nan)], ids=["finite", "not finite"])
def test_8bit_products_that_are_not_finite(variants, entries):
    """Of a map or a scale that is not finite, or so large that both are and their product is not."""
    code = 2 * MAPS["signed"]
    code[1 : 1 + len(entries)] = torch.tensor(entries)
    absmax = torch.tensor([1.0, torch.inf, 3e38, torch.nan, 0.0, -torch.inf, 1e-45])
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(absmax))

    def dequantize(library):
        out = torch.zeros(len(codes), dtype=torch.bfloat16)
        library.bnb_cpu_dequantize_blockwise(
            code.data_ptr(), codes.data_ptr(), absmax.data_ptr(), out.data_ptr(), _native.DTYPE_ID[out.dtype],
            len(codes), 256, 1,
        )  # fmt: skip
        return [out]

    (values,) = same_everywhere(variants, dequantize)
    expected = (code[codes.int()].view(-1, 256) * absmax[:, None]).bfloat16()
    torch.testing.assert_close(values, expected.view(-1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_int8_rows(variants, dtype, threshold):
    for rows, cols in ((1, 1), (3, 17), (33, 100), (5, 4096)):
        values = unaligned(awkward(rows * cols, dtype))

        def quantize(library):
            quantized = torch.zeros(rows, cols, dtype=torch.int8)
            stats, flags = torch.zeros(rows), torch.zeros(cols, dtype=torch.uint8)
            library.bnb_cpu_int8_vectorwise_quant(
                values.data_ptr(),
                _native.DTYPE_ID[dtype],
                quantized.data_ptr(),
                stats.data_ptr(),
                flags.data_ptr(),
                rows,
                cols,
                threshold,
                2,
            )
            return quantized, stats, flags

        quantized, _, flags = same_everywhere(variants, quantize)
        assert not quantized[:, flags.bool()].any()


def test_results_do_not_depend_on_the_number_of_threads(variants):
    count = 300_001
    values = awkward(count, torch.float32)
    for name, library in variants.items():

        def run(threads):
            packed, absmax = quantize_4bit(library, values, count, torch.float32, "nf4", 64, threads)
            codes, scales = quantize_blockwise(
                library, MAPS["signed"], values, count, torch.float32, 256, threads
            )
            return packed, absmax, codes, scales

        for threads in (0, 2, 3, 64):
            for one, other in zip(run(threads), run(1), strict=True):
                assert torch.equal(bytes_of(one), bytes_of(other)), (name, threads)


def test_several_callers_at_once_get_their_own_results(library):
    count = 200_000
    inputs = [awkward(count, torch.float32) for _ in range(4)]
    expected = [quantize_4bit(library, x, count, torch.float32, "nf4", 64)[0] for x in inputs]
    wrong = []

    def call(index):
        for _ in range(10):
            packed, _ = quantize_4bit(library, inputs[index], count, torch.float32, "nf4", 64, 2)
            if not torch.equal(packed, expected[index]):
                wrong.append(index)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_work_in_a_forked_child(library):
    """The parent's pool has threads; the child has none of them and must not wait for them. The child calls nothing
    else, because torch's own pool does wait."""
    count = 200_000
    values = torch.randn(count)
    expected, absmax = quantize_4bit(library, values, count, torch.float32, "nf4", 64, 2)
    packed = torch.empty_like(expected)
    arguments = (
        values.data_ptr(),
        0,
        _native.FORMAT_ID["nf4"],
        packed.data_ptr(),
        absmax.data_ptr(),
        count,
        64,
        2,
    )
    size = packed.numel()
    child = os.fork()
    if child == 0:
        library.bnb_cpu_quantize_4bit(*arguments)
        same = ctypes.string_at(packed.data_ptr(), size) == ctypes.string_at(expected.data_ptr(), size)
        os._exit(0 if same else 1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_best_instruction_set_comes_first(library):
    available = library.bnb_cpu_isa_available().decode().split(",")
    order = ["avx512amx", "avx512bf16", "avx512", "avx2", "neon", "scalar"]
    assert available == [name for name in order if name in available]
    assert library.bnb_cpu_isa().decode() == os.environ.get("BNB_CPU_ISA", available[0])
