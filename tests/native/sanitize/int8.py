"""LLM.int8(): quantized rows, products at the edges of their tiles, outlier columns from none to all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from gpu import Buffer, Gpu
from values import EPS, FLOATS, STORAGE, Rng, expect, expect_equal, rounded, widened

LIMIT = 6.0  # from which on an activation is an outlier
# (N, K): one value; odd and not in whole vectors; tiles that are short in rows, in a stage of k, in both; several parts.
SIZES = ((1, 1), (7, 33), (64, 16), (40, 144), (130, 272), (300, 1040), (64, 4096), (1100, 512))
TOKENS = (1, 2, 15, 16, 17, 33, 64, 65, 130, 257)


def codes(rng: Rng, *shape: int) -> np.ndarray:
    return rng.integers(-127, 128, shape, dtype=np.int8)


def activations(rng: Rng, M: int, K: int, outliers: int, dtype: str) -> np.ndarray:
    """Normal values below the limit, and so many columns of which one value at least is beyond."""
    values = np.clip(rng.standard_normal((M, K)), -3, 3).astype(np.float32)
    for column in rng.permutation(K)[:outliers]:
        values[rng.integers(0, M), column] = rng.choice([-1, 1]) * rng.uniform(LIMIT, 40)
    return rounded(values, dtype)


def quantized_rows(values: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(codes, row absmax, which columns hold an outlier)``; outliers are zero and do not count."""
    outliers = np.abs(values) >= limit if limit else np.zeros(values.shape, bool)
    kept = np.where(outliers, 0.0, values).astype(np.float32)
    absmax = np.abs(kept).max(axis=1, initial=0.0)
    factor = np.where(
        absmax > 0, (np.float32(1) / np.maximum(absmax, np.float32(1e-30))) * np.float32(127), 0
    )
    return np.rint(kept * factor[:, None]).astype(np.int8), absmax, outliers.any(axis=0)


def vectorwise_quant(
    gpu: Gpu, rng: Rng, dtype: str, shape: tuple[int, int], limit: float, shift: int
) -> None:
    rows, cols = shape
    A = activations(rng, rows, cols, min(cols, 3) if limit else 0, dtype)
    flags = gpu.room(cols, np.uint8, rng.integers(3))
    out, stats = gpu.room(shape, np.int8, shift), gpu.room(rows, np.float32, rng.integers(2))
    gpu.call(
        "bnb_cuda_int8_vectorwise_quant",
        A=gpu.put(A, shift),
        dtype=gpu.constant("dtype", dtype),
        quantized=out,
        row_stats=stats,
        outlier_cols=flags if limit else None,
        rows=rows,
        cols=cols,
        threshold=limit,
    )
    expected, absmax, columns = quantized_rows(widened(A, dtype), limit)
    expect_equal(out.get(), expected, "codes")
    expect_equal(stats.get(), absmax, "row statistics")
    if limit:
        expect_equal(flags.get() != 0, columns, "flags")


def scaling(gpu: Gpu, rng: Rng, M: int, N: int, bias_dtype: str | None) -> tuple[dict[str, Any], np.ndarray]:
    """Arguments that scale a product, and by element what it is multiplied with and what is added."""
    row_stats, col_stats = (rng.uniform(0.5, 2, n).astype(np.float32) for n in (M, N))
    arguments: dict[str, Any] = {
        "row_stats": gpu.put(row_stats, rng.integers(2)),
        "col_stats": gpu.put(col_stats, rng.integers(2)),
        "bias_dtype": gpu.constant("dtype", bias_dtype or "float32"),
    }
    added = np.zeros(N, np.float32)
    if bias_dtype:
        bias = rounded(rng.standard_normal(N), bias_dtype)
        arguments["bias"] = gpu.put(bias, rng.integers(2))
        added = widened(bias, bias_dtype)
    return arguments, np.stack(np.broadcast_arrays(row_stats[:, None] * col_stats / 127.0**2, added))


def expect_scaled(out: Buffer, sums: np.ndarray, factors: np.ndarray, dtype: str) -> None:
    exact = sums * factors[0] + factors[1]
    allowed = EPS[dtype] * np.abs(exact) + 1e-5 * (np.abs(sums * factors[0]) + np.abs(factors[1])) + 1e-7
    expect(np.abs(widened(out.get(), dtype) - exact) <= allowed, "scaled product")


def matmul(gpu: Gpu, rng: Rng, M: int, size: tuple[int, int], dtype: str, shift: int) -> None:
    """The sums themselves, scaled afterwards, and scaled on the way."""
    N, K = size
    A, B = codes(rng, M, K), codes(rng, N, K)
    sums = A.astype(np.int64) @ B.astype(np.int64).T
    operands = {"A": gpu.put(A, shift), "B": gpu.put(B, shift)}
    sizes = {"M": M, "N": N, "K": K}
    out = gpu.room((M, N), np.int32, rng.integers(2))
    gpu.call("bnb_cuda_int8_linear_matmul", **operands, out=out, **sizes)
    expect_equal(out.get(), sums, "sums")

    arguments, factors = scaling(gpu, rng, M, N, str(rng.choice(FLOATS)) if rng.random() < 0.7 else None)
    arguments["dtype"] = gpu.constant("dtype", dtype)
    scaled = gpu.room((M, N), STORAGE[dtype], shift)
    gpu.call("bnb_cuda_int8_scaled_mm", **operands, **arguments, out=scaled, **sizes)
    expect_scaled(scaled, sums, factors, dtype)
    afterwards = gpu.room((M, N), STORAGE[dtype], shift)
    gpu.call("bnb_cuda_int8_mm_dequant", A=out, **arguments, out=afterwards, M=M, N=N)
    expect_equal(afterwards.get(), scaled.get(), "scaled afterwards")


def linear(
    gpu: Gpu, rng: Rng, dtype: str, M: int, size: tuple[int, int], outliers: int, limit: float, shift: int
) -> None:
    """A whole layer; ``outliers`` columns count as if they had not been quantized."""
    N, K = size
    A, B = activations(rng, M, K, outliers, dtype), codes(rng, N, K)
    values = widened(A, dtype)
    arguments, factors = scaling(gpu, rng, M, N, str(rng.choice(FLOATS)) if rng.random() < 0.5 else None)
    del arguments["row_stats"]  # the layer finds it itself
    out, flags = gpu.room((M, N), STORAGE[dtype], shift), gpu.room(K, np.uint8, rng.integers(2))
    size_of_workspace = gpu.call("bnb_cuda_int8_linear_workspace", M=M, N=N, K=K, threshold=limit)
    operands = {"A": gpu.put(A, shift), "B": gpu.put(B, shift), "dtype": gpu.constant("dtype", dtype)}
    gpu.call(
        "bnb_cuda_int8_linear",
        **operands,
        **arguments,
        out=out,
        outlier_cols=flags if limit else None,
        M=M,
        N=N,
        K=K,
        threshold=limit,
        workspace=gpu.room(size_of_workspace, np.uint8),
    )
    rows, absmax, columns = quantized_rows(values, limit)
    if limit:
        expect_equal(flags.get() != 0, columns, "flags")
    kept = rows * (absmax[:, None] / 127.0)
    kept[:, columns] = values[:, columns]
    col_stats = arguments["col_stats"].get()
    weight = B.astype(np.float64) * (col_stats[:, None] / 127.0)
    exact = kept @ weight.T + factors[1]
    spread = np.sqrt(np.square(kept) @ np.square(weight).T)
    allowed = EPS[dtype] * np.abs(exact) + (2 * EPS[dtype] + 1e-5) * spread + 1e-6
    expect(np.abs(widened(out.get(), dtype) - exact) <= allowed, "layer")


def add_outliers(gpu: Gpu, rng: Rng, dtype: str, M: int, size: tuple[int, int], outliers: int) -> None:
    """By itself: what the whole layer does where its product cannot."""
    N, K = size
    values = widened(activations(rng, M, K, outliers, dtype), dtype)
    rows, absmax, columns = quantized_rows(values, LIMIT)
    B, col_stats = codes(rng, N, K), rng.uniform(0.5, 2, N).astype(np.float32)
    before = rounded(rng.standard_normal((M, N)), dtype)
    out = gpu.put(before, rng.integers(2))
    gpu.call(
        "bnb_cuda_int8_add_outliers",
        A=gpu.put(rounded(values, dtype), rng.integers(2)),
        dtype=gpu.constant("dtype", dtype),
        quantized=gpu.put(rows, rng.integers(2)),
        row_stats=gpu.put(absmax),
        B=gpu.put(B, rng.integers(2)),
        col_stats=gpu.put(col_stats),
        outlier_cols=gpu.put(columns.astype(np.uint8), rng.integers(3)),
        out=out,
        M=M,
        N=N,
        K=K,
    )
    left = np.where(columns, values - rows * (absmax[:, None] / 127.0), 0.0)
    weight = B.astype(np.float64) * (col_stats[:, None] / 127.0)
    exact = widened(before, dtype) + left @ weight.T
    spread = np.sqrt(np.square(left) @ np.square(weight).T)
    allowed = EPS[dtype] * np.abs(exact) + 3e-5 * spread + 1e-6
    expect(np.abs(widened(out.get(), dtype) - exact) <= allowed, "outliers")


def int8(gpu: Gpu) -> Iterator[tuple]:
    for dtype, limit, shift in product(FLOATS, (0.0, LIMIT), (0, 1)):
        for shape in ((1, 1), (3, 31), (1, 4096), (5, 4104), (2, 16400), (600, 64), (2, 40000)):
            yield vectorwise_quant, dtype, shape, limit, shift
    for index, (size, M) in enumerate(product(SIZES, TOKENS)):
        yield matmul, M, size, FLOATS[index % 3], 0
        yield matmul, M, size, FLOATS[(index + 1) % 3], 1
    for index, (size, M, outliers) in enumerate(product(SIZES, TOKENS, (0, 1, 16, 17, 140, 10**6))):
        yield linear, FLOATS[index % 3], M, size, outliers, LIMIT, int(index % 7 == 0)
    for index, (size, M) in enumerate(product(SIZES, TOKENS)):
        yield linear, FLOATS[index % 3], M, size, 0, 0.0, int(index % 7 == 0)
    for dtype, size, outliers in product(FLOATS, SIZES, (0, 3, 40)):
        yield add_outliers, dtype, 70, size, outliers
