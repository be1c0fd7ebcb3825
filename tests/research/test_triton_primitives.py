"""The int8 primitives against exact arithmetic, and the tuning helpers' order of estimates."""

from __future__ import annotations

import types

import pytest
import torch

from bitsandbytes.triton.dequantize_rowwise import dequantize_rowwise
from bitsandbytes.triton.int8_matmul_mixed_dequantize import int8_matmul_mixed_dequantize
from bitsandbytes.triton.int8_matmul_rowwise_dequantize import int8_matmul_rowwise_dequantize
from bitsandbytes.triton.matmul_perf_model import early_config_prune, estimate_matmul_time
from bitsandbytes.triton.quantize_columnwise_and_transpose import quantize_columnwise_and_transpose
from bitsandbytes.triton.quantize_global import quantize_global, quantize_global_transpose
from bitsandbytes.triton.quantize_rowwise import quantize_rowwise
from bitsandbytes.triton.triton_utils import is_triton_available

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(1, 1), (13, 83), (32, 64), (5, 1), (0, 7), (7, 0)]
QUANTIZERS = [
    quantize_rowwise,
    quantize_columnwise_and_transpose,
    quantize_global,
    quantize_global_transpose,
]


def quantized_oracle(quantize, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(127 * x / absmax before rounding, absmax)`` in float64, transposed as the function does."""
    exact = x.cpu().double()
    if exact.numel() == 0:
        columns = quantize is quantize_columnwise_and_transpose
        count = 1 if "global" in quantize.__name__ else exact.shape[1 if columns else 0]
        return (exact.t() if "transpose" in quantize.__name__ else exact), torch.zeros(count).double()
    if quantize is quantize_rowwise:
        absmax = exact.abs().amax(dim=1, keepdim=True)
    elif quantize is quantize_columnwise_and_transpose:
        absmax = exact.abs().amax(dim=0, keepdim=True)
    else:
        absmax = exact.abs().max().view(1, 1)
    scaled = 127 * exact / absmax.clamp(min=1e-300)
    return (scaled.t() if "transpose" in quantize.__name__ else scaled), absmax.view(-1)


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantizers_round_to_the_nearest(device, quantize, dtype, shape):
    x = (torch.randn(shape, device=device) * 3).to(dtype)

    q, absmax = quantize(x)

    scaled, expected = quantized_oracle(quantize, x)
    assert q.dtype == torch.int8 and q.shape == scaled.shape and q.is_contiguous()
    assert absmax.dtype == (dtype if "global" in quantize.__name__ else torch.float16)
    assert torch.equal(absmax.cpu(), expected.to(absmax.dtype))
    assert ((q.cpu().double() - scaled).abs() <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("quantize", [quantize_rowwise, quantize_columnwise_and_transpose])
def test_half_goes_to_even(device, quantize):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]], dtype=torch.float16, device=device)
    if quantize is quantize_columnwise_and_transpose:
        x = x.t()
    assert quantize(x)[0].view(-1).tolist() == [127, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_zeros_stay_zeros(device, quantize):
    x = torch.randn(4, 6, device=device)
    x[2], x[:, 3] = 0, 0
    q, _ = quantize(x)
    q = q.t() if "transpose" in quantize.__name__ else q
    assert not q[2].any() and not q[:, 3].any()
    q, absmax = quantize(torch.zeros(3, 5, device=device, dtype=torch.float16))
    assert not q.any() and not absmax.any()


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_strides_do_not_matter(device, quantize):
    x = torch.randn(24, 9, device=device).half().t()[:, ::2]
    for result, expected in zip(quantize(x), quantize(x.contiguous()), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.int32)])
def test_only_float_matrices_are_quantized(quantize, x):
    with pytest.raises(ValueError, match="2D float"):
        quantize(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rowwise_inverts_quantize_rowwise(device, dtype):
    x = torch.randn(13, 83, device=device).to(dtype)
    q, absmax = quantize_rowwise(x)

    restored = dequantize_rowwise(q, absmax)

    exact = absmax.cpu().double().view(-1, 1) * q.cpu().double() / 127
    assert restored.dtype == torch.float16
    torch.testing.assert_close(restored.cpu().double(), exact, atol=1e-6, rtol=2**-11)
    assert ((restored - x).abs().float() <= absmax.float().view(-1, 1) * (0.5 / 127 + 2**-9)).all()


@pytest.mark.parametrize("multiply", [int8_matmul_mixed_dequantize, int8_matmul_rowwise_dequantize])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (13, 332, 83), (32, 48, 4096), (0, 4, 5), (3, 0, 5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("column_major", [False, True])
def test_scaled_products_are_exact_up_to_one_rounding(device, multiply, M, N, K, bias, column_major):
    a = torch.randint(-127, 128, (M, K), dtype=torch.int8).to(device)
    b = torch.randint(-127, 128, (N, K) if column_major else (K, N), dtype=torch.int8).to(device)
    b = b.t() if column_major else b
    state_x = (torch.rand(M) / K).half().to(device)
    state_w = torch.rand(N if multiply is int8_matmul_rowwise_dequantize else 1).half().to(device)
    bias = torch.randn(N).half().to(device) if bias else None

    result = multiply(a, b, state_x, state_w, bias)

    exact = (a.cpu().long() @ b.cpu().long()).double() / 127**2
    exact = exact * state_x.cpu().double().view(-1, 1) * state_w.cpu().double()
    allowed = exact.abs() * 2**-10 + 1e-7
    if bias is not None:
        exact = exact + bias.cpu().double()
        allowed = allowed + exact.abs() * 2**-10
    assert result.dtype == torch.float16 and result.shape == (M, N)
    assert ((result.cpu().double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("multiply", [int8_matmul_mixed_dequantize, int8_matmul_rowwise_dequantize])
def test_products_name_the_mismatch(multiply):
    a, b = torch.zeros(2, 3, dtype=torch.int8), torch.zeros(4, 5, dtype=torch.int8)
    with pytest.raises(AssertionError, match="incompatible dimensions"):
        multiply(a, b, torch.ones(2), torch.ones(5), None)


def test_triton_is_available_only_with_a_gpu():
    assert is_triton_available() is is_triton_available()
    if not (torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())):
        assert is_triton_available() is False


# --- tuning helpers --------------------------------------------------------------------------------------------


def config(block_m: int, block_n: int, block_k: int, stages: int, warps: int = 4) -> types.SimpleNamespace:
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT_K": 1}
    return types.SimpleNamespace(kwargs=tile, num_stages=stages, num_warps=warps)


def estimate(M: int, N: int, K: int, **tile: int) -> float:
    A = torch.empty(0, dtype=torch.int8)
    tile = {
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "BLOCK_K": 64,
        "SPLIT_K": 1,
        "num_warps": 4,
        "num_stages": 3,
        **tile,
    }
    return estimate_matmul_time(A=A, B=A, C=torch.empty(0, dtype=torch.float16), M=M, N=N, K=K, **tile)


def test_configurations_that_do_not_fit_are_dropped():
    small = [config(64, 64, 32, stages) for stages in (2, 3, 4)]
    huge, crowded = config(256, 256, 512, 8), config(256, 256, 32, 2, warps=1)
    arguments = {"A": torch.empty(0, dtype=torch.int8)}

    kept = early_config_prune([*small, huge, crowded], arguments)

    assert kept == small[1:], "the deepest pipelines of a tile that fits"
    assert early_config_prune([huge], arguments) == [huge], "something must be left to run"
    assert early_config_prune([], arguments) == []


def test_estimates_grow_with_the_problem_and_prefer_full_machines():
    assert 0 < estimate(512, 512, 512) < estimate(8192, 8192, 8192)
    assert estimate(8192, 8192, 8192) < estimate(8192, 8192, 8192, BLOCK_M=16, BLOCK_N=16)
    assert estimate(128, 128, 8192, SPLIT_K=8) < estimate(128, 128, 8192)
