"""The CUDA kernels of LLM.int8(): sums exact, values as in plain torch, outliers at any number, nothing waited for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracles
from bitsandbytes import _ops, nn
from bitsandbytes._native import has_native

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_native("bnb_cuda_int8_linear"),
    reason="needs an NVIDIA GPU and the CUDA library",
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 5e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}  # of the relative norm
TOKENS = [1, 2, 7, 16, 17, 33, 64, 65, 128, 129, 256, 257, 300, 600]
# (N, K): whole tiles; short ones; less than a stage of k; no whole vectors; few rows and many k.
SIZES = [(4096, 4096), (100, 16), (130, 272), (257, 1040), (1000, 80), (33, 129), (7, 5), (640, 8192)]
OPS = torch.ops.bitsandbytes


def codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")


def with_outliers(M: int, K: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Values below 3, and in so many columns one of 6 to 46."""
    A = torch.randn(M, K, device="cuda").clamp(-2.9, 2.9)
    at = torch.randperm(K, device="cuda")[:columns]
    A[torch.randint(M, at.shape, device="cuda"), at] = 6 + 40 * torch.rand(at.shape, device="cuda")
    return A.to(dtype)


def exact_layer(A: Tensor, CB: Tensor, SCB: Tensor, threshold: float) -> Tensor:
    """In float64: rows quantized without their outliers, whose columns count in full."""
    codes, stats, columns = _ops.int8_vectorwise_quant.run_with("default", A, threshold)
    kept = codes.double() * stats.double().unsqueeze(1) / 127
    kept[:, columns] = A[:, columns].double()
    return kept @ (CB.double() * SCB.double().unsqueeze(1) / 127).t()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_exact_and_scaled_as_in_plain_torch(size):
    N, K = size
    B, col_stats = codes(N, K), torch.rand(N, device="cuda") + 0.1
    for index, M in enumerate(TOKENS):
        A, row_stats = codes(M, K), torch.rand(M, device="cuda")
        sums = (A.double() @ B.double().t()).int()
        dtype = DTYPES[index % 3]
        bias = [None, torch.randn(N, device="cuda"), torch.randn(N, device="cuda").to(dtype)][index // 3 % 3]
        expected = _ops.int8_mm_dequant.run_with("default", sums, row_stats, col_stats, dtype, bias)

        assert torch.equal(OPS.int8_linear_matmul(A, B), sums)
        oracles.assert_same_bytes(OPS.int8_mm_dequant(sums, row_stats, col_stats, dtype, bias), expected)
        oracles.assert_same_bytes(OPS.int8_scaled_mm(A, B, row_stats, col_stats, bias, dtype), expected)


def test_extreme_sums_fit():
    A, B = (torch.full((n, 131_000), -128, dtype=torch.int8, device="cuda") for n in (20, 70))
    assert (OPS.int8_linear_matmul(A, B) == 128 * 128 * 131_000).all()


def test_unaligned_and_strided_operands():
    held = codes(40 * 256 + 1)
    A, B = held[1:].view(40, 256), codes(256, 64).t()
    assert torch.equal(OPS.int8_linear_matmul(A, B), (A.double() @ B.double().t()).int())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 31, 64, 4096, 4104, 8192, 16384, 28672, 40000])
def test_rows_are_quantized_as_in_plain_torch(cols, dtype):
    for rows in (1, 3, 600):
        A = torch.randn(rows, cols, device="cuda").to(dtype)
        A[0, cols // 2] = 20.0
        if rows > 2:
            A[1], A[2, -1] = 0.0, float("nan")
        for threshold in (0.0, 3.0):
            actual = OPS.int8_vectorwise_quant(A, threshold)
            expected = _ops.int8_vectorwise_quant.run_with("default", A, threshold)
            for ours, theirs in zip(actual, expected, strict=True):
                assert (ours is None and theirs is None) or torch.allclose(
                    ours, theirs, rtol=0, atol=0, equal_nan=True
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outlier_columns_count_in_full(size, dtype):
    """None, those of one batch, of more, more than are gathered, all; for few tokens and for many."""
    N, K = size
    CB, SCB = codes(N, K), torch.rand(N, device="cuda") + 0.1
    for M in (1, 5, 40, 64, 65, 200, 520):
        for columns in (0, 1, 16, 17, 128, 140, K):
            A = with_outliers(M, K, min(columns, K), dtype)

            product, flags = OPS.int8_linear(A, CB, SCB, None, 6.0)

            assert torch.equal(flags != 0, (A.abs() >= 6).any(dim=0))
            error = oracles.relative_error(product, exact_layer(A, CB, SCB, 6.0))
            assert error < ROUNDING[dtype], (M, columns, error)


def test_many_outliers_in_one_row_only():
    A = with_outliers(300, 4096, 0, torch.bfloat16)
    A[7] = 10.0
    CB, SCB = codes(256, 4096), torch.rand(256, device="cuda") + 0.1

    product, flags = OPS.int8_linear(A, CB, SCB, None, 6.0)

    assert flags.all()
    assert oracles.relative_error(product, exact_layer(A, CB, SCB, 6.0)) < ROUNDING[torch.bfloat16]


def test_infinity_and_nan_stay_in_their_rows():
    A = with_outliers(90, 512, 20, torch.float16)
    CB, SCB = codes(200, 512), torch.rand(200, device="cuda") + 0.1
    clean, _ = OPS.int8_linear(A, CB, SCB, None, 6.0)
    A[3, 5], A[80, 7] = float("inf"), float("nan")

    product, _ = OPS.int8_linear(A, CB, SCB, None, 6.0)

    others = torch.ones(90, dtype=torch.bool, device="cuda")
    others[[3, 80]] = False
    assert not product[3].isfinite().any() and product[80].isnan().all()
    assert product[others].isfinite().all()
    # One more column counts in full: results move by what its quantization had cost.
    assert oracles.relative_error(product[others], clean[others]) < 0.02


@pytest.mark.parametrize("M", [1, 70])
def test_a_layer_with_outliers_waits_for_nothing_and_can_be_captured(M):
    layer = nn.Linear8bitLt(256, 128, has_fp16_weights=False, threshold=6.0).half().cuda()
    x = with_outliers(M, 256, 20, torch.float16)
    with torch.no_grad():
        layer(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        x.copy_(x.flip(1))
        graph.replay()

        assert torch.equal(captured, layer(x))
        assert not torch.equal(captured, expected)
    assert layer.state.idx.tolist() == (x.abs() >= 6).any(dim=0).nonzero().view(-1).tolist()


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    rows, K = 2**31 // 32768 + 5, 32768
    B = torch.randint(-127, 128, (rows, K), dtype=torch.int8, device="cuda")
    A = codes(20, K)
    last = (A.double() @ B[-70:].double().t()).int()
    assert torch.equal(OPS.int8_linear_matmul(A, B)[:, -70:], last)
    assert torch.equal(OPS.int8_linear_matmul(B, A)[-70:], last.t())
    del A
    values = B.to(torch.bfloat16)
    quantized, stats, _ = OPS.int8_vectorwise_quant(values)
    expected = _ops.int8_vectorwise_quant.run_with("default", values[-70:])
    assert torch.equal(quantized[-70:], expected[0]) and torch.equal(stats[-70:], expected[1])
