"""The int8 kernels on every instruction set, VNNI included: the same bits, whatever the threads and the alignment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsandbytes import _native
from bitsandbytes._formats.table import FLOAT_DTYPES

# (M, N, K): one, beside tiles of 4 columns and up to 6 rows, beside tasks of 16 to 64 columns, beside steps of 16 to 64;
# beside tiles of 16 rows, tasks of 256 columns, spans of 4096 and passes of 256 rows.
SHAPES = [
    (1, 1, 1),
    (1, 5, 63),
    (4, 64, 64),
    (5, 67, 65),
    (7, 130, 200),
    (13, 16, 1000),
    (3, 20, 30_000),
    (2, 3, 0),
    (9, 3, 5),
    (33, 290, 4200),
    (17, 34, 128),
    (270, 20, 70),
]
THRESHOLDS = [0.0, 1.5]


@pytest.fixture
def libraries(variants):
    """All instruction sets, and what runs when none is asked for: with VNNI it has kernels of its own."""
    return {**variants, "unforced": _native.lib}


def same_everywhere(libraries, run) -> Tensor:
    """Run on every instruction set, with one and with three threads; all results must be the scalar one's bits."""
    expected = run(libraries["scalar"], 1)
    for name, library in libraries.items():
        for threads in (1, 3):
            for one, other in zip(run(library, threads), expected, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(bits(one), bits(other)), (name, threads)
    return expected


def bits(values: Tensor) -> Tensor:
    """Every NaN as one: processors differ in the sign of those they make."""
    if values.is_floating_point():
        values = torch.where(values.isnan(), torch.nan, values)
    return values.contiguous().view(-1).view(torch.uint8)


def guarded(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A result to fill, and the memory behind it that must stay as it is."""
    held = torch.zeros(count + 64, dtype=dtype)
    return held[:count], held[count:]


def int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def activations(M: int, K: int, dtype: torch.dtype) -> Tensor:
    A = torch.randn(M, K)
    if K > 20 and M > 1:
        A[0, 3], A[M - 1, K - 1], A[M // 2] = torch.inf, torch.nan, 0.0
    return A.to(dtype)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(libraries, shape):
    M, N, K = shape
    A, B = int8(M, K), int8(N, K)

    def run(library, threads):
        out, behind = guarded(M * N, torch.int32)
        library.bnb_cpu_int8_linear_matmul(A.data_ptr(), B.data_ptr(), out.data_ptr(), M, N, K, threads)
        assert not behind.any()
        return [out.clone()]

    (sums,) = same_everywhere(libraries, run)

    assert torch.equal(sums.view(M, N).long(), A.long() @ B.long().t())


def test_sums_wrap_as_int32_does(libraries):
    K = 140_001
    A, B = torch.full((1, K), -128, dtype=torch.int8), torch.full((2, K), -128, dtype=torch.int8)
    B[1] = 127

    def run(library, threads):
        out = torch.zeros(2, dtype=torch.int32)
        library.bnb_cpu_int8_linear_matmul(A.data_ptr(), B.data_ptr(), out.data_ptr(), 1, 2, K, threads)
        return [out]

    (sums,) = same_everywhere(libraries, run)

    exact = [K * 128 * 128, -K * 128 * 127]
    assert sums.tolist() == [(x + 2**31) % 2**32 - 2**31 for x in exact]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOAT_DTYPES], ids=str)
def test_scaled_products(libraries, dtype, bias_dtype):
    for M, N, K in SHAPES:
        A, B = int8(M, K), int8(N, K)
        row_stats, col_stats = torch.rand(M), torch.rand(N)
        bias = None if bias_dtype is None else torch.randn(N).to(bias_dtype)
        ids = _native.DTYPE_ID[bias_dtype or dtype], _native.DTYPE_ID[dtype]
        scales = row_stats.data_ptr(), col_stats.data_ptr(), pointer(bias), ids[0]

        def run(library, threads):
            fused, behind = guarded(M * N, dtype)
            library.bnb_cpu_int8_scaled_mm(
                A.data_ptr(), B.data_ptr(), *scales, fused.data_ptr(), ids[1], M, N, K, threads
            )
            assert not behind.any()
            sums = (A.long() @ B.long().t()).int().contiguous()
            apart, behind = guarded(M * N, dtype)
            library.bnb_cpu_int8_mm_dequant(sums.data_ptr(), *scales, apart.data_ptr(), ids[1], M, N, threads)
            assert not behind.any()
            assert torch.equal(fused, apart)
            return [fused.clone()]

        same_everywhere(libraries, run)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_linear_is_quantization_and_product(libraries, threshold, dtype):
    for M, N, K in SHAPES:
        A, B, col_stats, bias = activations(M, K, dtype), int8(N, K), torch.rand(N), torch.randn(N)
        kind = _native.DTYPE_ID[dtype]

        def run(library, threads):
            flags = torch.zeros(K + 1, dtype=torch.uint8) if threshold else None
            out, behind = guarded(M * N, dtype)
            library.bnb_cpu_int8_linear(
                *(A.data_ptr(), kind, B.data_ptr(), col_stats.data_ptr()),
                *(bias.data_ptr(), _native.DTYPE_ID[torch.float32], out.data_ptr(), pointer(flags)),
                *(M, N, K, threshold, threads),
            )
            assert not behind.any()
            if threshold:
                assert not flags[K:].any()
                return [out.clone(), flags]
            return [out.clone()]

        results = same_everywhere(libraries, run)
        if threshold:
            assert torch.equal(results[1][:K].bool(), (A.abs() >= threshold).any(dim=0))
            continue

        q, row_stats = torch.zeros(M, K, dtype=torch.int8), torch.zeros(M)
        library, expected = libraries["scalar"], torch.zeros(M * N, dtype=dtype)
        library.bnb_cpu_int8_vectorwise_quant(
            A.data_ptr(), kind, q.data_ptr(), row_stats.data_ptr(), None, M, K, 0.0, 1
        )
        library.bnb_cpu_int8_scaled_mm(
            *(q.data_ptr(), B.data_ptr(), row_stats.data_ptr(), col_stats.data_ptr()),
            *(bias.data_ptr(), _native.DTYPE_ID[torch.float32], expected.data_ptr(), kind, M, N, K, 1),
        )
        assert torch.equal(bits(results[0]), bits(expected))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_rows_and_columns(libraries, threshold, dtype):
    for rows, cols in ((1, 1), (9, 40), (3, 700), (70, 17), (0, 5)):
        A, kind = activations(rows, cols, dtype), _native.DTYPE_ID[dtype]

        def run(library, threads):
            by_row, by_column = torch.zeros(2, rows, cols, dtype=torch.int8)
            row_stats, col_stats = torch.zeros(rows), torch.zeros(cols)
            flags = torch.zeros(cols, dtype=torch.uint8)
            library.bnb_cpu_int8_double_quant(
                *(A.data_ptr(), kind, by_row.data_ptr(), by_column.data_ptr(), row_stats.data_ptr()),
                *(col_stats.data_ptr(), flags.data_ptr(), rows, cols, threshold, threads),
            )
            values = torch.zeros(rows, cols)
            library.bnb_cpu_int8_vectorwise_dequant(
                by_row.data_ptr(), row_stats.data_ptr(), values.data_ptr(), rows, cols, threads
            )
            return [by_row, by_column, row_stats, col_stats, flags, values]

        same_everywhere(libraries, run)
