"""When a CPU decodes the weight for torch's product: a pure function, so it is held for processors that are not here."""

from __future__ import annotations

import pytest
import torch

from bitsandbytes import functional as F
from bitsandbytes._formats.table import FLOAT_DTYPES
from bitsandbytes._native import has_native
from bitsandbytes.backends.cpu import ops
from bitsandbytes.backends.cpu.plan import LEAST_DENSE_ROWS, Processor, dense_rows

XEON = Processor("avx512amx", avx512bf16=True, amx=True, fast_mkl=True)
CASCADE_LAKE = Processor("avx512", fast_mkl=True)
ZEN_5 = Processor("avx512bf16", avx512bf16=True)
ZEN_3 = Processor("avx2")
PROCESSORS = [XEON, CASCADE_LAKE, ZEN_5, ZEN_3]


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("cpu", PROCESSORS)
def test_float32_is_left_to_mkl_where_it_is_faster(cpu, tiled):
    forced = cpu._replace(isa="avx512")

    assert (dense_rows(torch.float32, tiled, cpu) <= 256) == (
        cpu is CASCADE_LAKE or (cpu is XEON and not tiled)
    )
    assert (dense_rows(torch.float32, tiled, forced) <= 256) == cpu.fast_mkl


@pytest.mark.parametrize("cpu", PROCESSORS)
def test_bfloat16_is_left_to_torch_where_it_alone_has_the_instructions(cpu):
    forced = cpu._replace(isa="avx2")

    assert (dense_rows(torch.bfloat16, True, cpu) <= 256) is False
    assert (dense_rows(torch.bfloat16, False, cpu) <= 256) == cpu.amx
    assert (dense_rows(torch.bfloat16, True, forced) <= 256) == cpu.avx512bf16


@pytest.mark.parametrize("cpu", PROCESSORS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_few_rows_never_are(dtype, cpu):
    assert all(dense_rows(dtype, tiled, cpu) >= LEAST_DENSE_ROWS for tiled in (True, False))


@pytest.mark.skipif(not has_native("bnb_cpu_gemm_4bit"), reason="needs the native library")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("N", "K", "blocksize"),
    [(48, 192, 64), (37, 96, 32), (20, 77, 64), (3, 40, 128), (0, 64, 64), (5, 0, 64)],
)
def test_both_ways_give_the_product_and_its_gradient(monkeypatch, N, K, blocksize, dtype, dense, nested):
    """Panels of few rows, so that there are several; with and without a bias."""
    asked = []
    monkeypatch.setattr(
        ops, "dense_rows_here", lambda *problem: asked.append(problem) or (0 if dense else 1e9)
    )
    monkeypatch.setattr(ops, "_PANEL_VALUES", 8 * max(K, 1))
    W = torch.randn(N, K)
    packed, state = F.quantize_4bit(W, blocksize=blocksize, quant_type="nf4", compress_statistics=nested)
    weight = F.dequantize_4bit(packed, state).double()
    A, G = torch.randn(2, 9, K).to(dtype), torch.randn(2, 9, N).to(dtype)
    bias = torch.randn(N).to(dtype)
    nested_statistics = [state.absmax, state.state2.code, state.offset] if state.nested else [None] * 3
    absmax = state.state2.absmax if state.nested else state.absmax

    product = torch.ops.bitsandbytes.gemm_4bit(
        A, packed, [N, K], absmax, blocksize, "nf4", bias, *nested_statistics
    )
    gradient = torch.ops.bitsandbytes.gemm_4bit_transposed(
        G, packed, [N, K], absmax, blocksize, "nf4", *nested_statistics
    )

    assert asked == [(dtype, (K | blocksize) % 64 == 0)] * 2
    # Weights and results are rounded once to the dtype; float32 sums over up to 192 terms.
    rounding = 2 * torch.finfo(dtype).eps + 192 * torch.finfo(torch.float32).eps
    for ours, left, right, start in (
        (product, A.double(), weight.t(), bias.double()),
        (gradient, G.double(), weight, torch.zeros(K)),
    ):
        bound = rounding * (left.abs() @ right.abs() + start.abs())
        assert ((ours.double() - (left @ right + start)).abs() <= bound).all()
