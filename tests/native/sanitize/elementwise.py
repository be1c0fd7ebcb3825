"""Quantizing, dequantizing and look-ups: block sizes, lengths around a block, and addresses of any alignment."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from gpu import Gpu
from values import (
    EPS,
    FLOATS,
    STORAGE,
    Rng,
    blocks_of,
    expect,
    expect_equal,
    make_scales,
    map_of_256,
    per_value,
    rounded,
    unpacked,
    widened,
)

FORMATS = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TINY = np.float32(1e-38)  # least divisor of a block


def lengths(blocksize: int) -> tuple[int, ...]:
    return 1, blocksize - 1, blocksize, blocksize + 1, 3 * blocksize + 7, 40 * blocksize + 1


def draw(rng: Rng, n: int) -> np.ndarray:
    """Normal values; sometimes with what no quantizer likes among them."""
    values = rng.standard_normal(n).astype(np.float32)
    if rng.random() < 0.3:
        strange = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3e38]
        values[rng.integers(0, n, len(strange))] = strange
    return values


def expect_quantized(
    decoded: np.ndarray, absmax: np.ndarray, values: np.ndarray, table: np.ndarray, block: int
) -> None:
    """Every value has the nearest of the table's, scaled by the largest magnitude of its block."""
    n, blocks = values.size, absmax.size
    largest = (
        np.abs(np.append(values, np.zeros(blocks * block - n, np.float32))).reshape(blocks, block).max(1)
    )
    if n % block:
        largest[-1] = np.maximum(largest[-1], TINY)
    expect_equal(absmax, largest, "absmax")
    scale = per_value(np.maximum(absmax, TINY), block, n)
    known = np.isfinite(scale) & (scale > 1e-30)
    ascending = np.sort(table)
    step = max(np.diff(ascending).max() / 2, 1 - ascending[-1], ascending[0] + 1) + 1e-6
    with np.errstate(invalid="ignore"):
        expect((np.abs(decoded * scale - values) <= step * scale) | ~known, "codes")


def quantize_4bit(gpu: Gpu, rng: Rng, dtype: str, form: str, blocksize: int, n: int) -> None:
    stored = rounded(draw(rng, n), dtype)
    packed = gpu.room((n + 1) // 2, np.uint8, rng.integers(3))
    absmax = gpu.room(blocks_of(n, blocksize), np.float32, rng.integers(2))
    gpu.call(
        "bnb_cuda_quantize_4bit",
        values=gpu.put(stored, rng.integers(3)),
        dtype=gpu.constant("dtype", dtype),
        format=gpu.constant("format", form),
        packed=packed,
        absmax=absmax,
        n=n,
        blocksize=blocksize,
    )
    table = gpu.codebook(form)
    decoded = table[unpacked(packed.get(), n)]
    expect_quantized(decoded, absmax.get(), widened(stored, dtype), table, blocksize)


def quantize_blockwise(gpu: Gpu, rng: Rng, dtype: str, crowded: bool, blocksize: int, n: int) -> None:
    """A crowded map has more entries close to each other than the table of first entries tells apart."""
    code = np.sort(np.append(np.zeros(100), np.linspace(-1e-7, 1, 156))) if crowded else map_of_256()
    code = code.astype(np.float32)
    stored = rounded(draw(rng, n), dtype)
    codes = gpu.room(n, np.uint8, rng.integers(3))
    absmax = gpu.room(blocks_of(n, blocksize), np.float32, rng.integers(2))
    gpu.call(
        "bnb_cuda_quantize_blockwise",
        code=gpu.put(code, rng.integers(2)),
        values=gpu.put(stored, rng.integers(3)),
        dtype=gpu.constant("dtype", dtype),
        codes=codes,
        absmax=absmax,
        n=n,
        blocksize=blocksize,
    )
    expect_quantized(code[codes.get()], absmax.get(), widened(stored, dtype), code, blocksize)


def dequantize_4bit(gpu: Gpu, rng: Rng, dtype: str, form: str, nested: bool, blocksize: int, n: int) -> None:
    packed = rng.integers(0, 256, (n + 1) // 2, dtype=np.uint8)
    scales = make_scales(rng, blocks_of(n, blocksize), nested)
    values = gpu.room(n, STORAGE[dtype], rng.integers(2))
    gpu.call(
        "bnb_cuda_dequantize_4bit_nested" if nested else "bnb_cuda_dequantize_4bit",
        packed=gpu.put(packed, rng.integers(2)),
        **{name: gpu.put(array, rng.integers(2)) for name, array in scales.arguments.items()},
        format=gpu.constant("format", form),
        values=values,
        dtype=gpu.constant("dtype", dtype),
        n=n,
        blocksize=blocksize,
    )
    exact = gpu.codebook(form)[unpacked(packed, n)] * per_value(scales.expanded, blocksize, n)
    expect_close(values.get(), exact, dtype)


def dequantize_blockwise(gpu: Gpu, rng: Rng, dtype: str, blocksize: int, n: int) -> None:
    codes, code = rng.integers(0, 256, n, dtype=np.uint8), map_of_256()
    scales = make_scales(rng, blocks_of(n, blocksize), False)
    values = gpu.room(n, STORAGE[dtype], rng.integers(2))
    gpu.call(
        "bnb_cuda_dequantize_blockwise",
        code=gpu.put(code, rng.integers(2)),
        codes=gpu.put(codes, rng.integers(2)),
        absmax=gpu.put(scales.expanded, rng.integers(2)),
        values=values,
        dtype=gpu.constant("dtype", dtype),
        n=n,
        blocksize=blocksize,
    )
    expect_close(values.get(), code[codes] * per_value(scales.expanded, blocksize, n), dtype)


def expect_close(stored: np.ndarray, exact: np.ndarray, dtype: str, roundings: int = 1) -> None:
    """NaN where NaN belongs."""
    values = widened(stored, dtype)
    least = 1e-7 if dtype == "float16" else 0.0  # of its smallest numbers, which have fewer bits
    near = np.abs(values - exact) <= roundings * EPS[dtype] * np.abs(exact) + least
    expect(near | (np.isnan(values) & np.isnan(exact)), "values")


def draw_indices(rng: Rng, rows: int, count: int) -> np.ndarray:
    """Some of them name no row."""
    indices = rng.integers(0, rows, count, dtype=np.int64)
    indices[rng.integers(0, count, 3)] = [-1, rows, 2**40]
    indices[0] = rows - 1
    return indices


def looked_up(table: np.ndarray, indices: np.ndarray) -> np.ndarray:
    rows = len(table)
    known = (indices >= 0) & (indices < rows)
    return np.where(known[:, None], table[np.where(known, indices, 0)], np.nan)


def embedding_4bit(
    gpu: Gpu, rng: Rng, dtype: str, form: str, blocksize: int, columns: int, count: int
) -> None:
    rows = 19
    packed = rng.integers(0, 256, (rows * columns + 1) // 2, dtype=np.uint8)
    scales = make_scales(rng, blocks_of(rows * columns, blocksize), False)
    indices, out = draw_indices(rng, rows, count), gpu.room((count, columns), STORAGE[dtype], rng.integers(2))
    gpu.call(
        "bnb_cuda_embedding_4bit",
        indices=gpu.put(indices, rng.integers(2)),
        packed=gpu.put(packed, rng.integers(2)),
        absmax=gpu.put(scales.expanded, rng.integers(2)),
        format=gpu.constant("format", form),
        out=out,
        dtype=gpu.constant("dtype", dtype),
        count=count,
        rows=rows,
        columns=columns,
        blocksize=blocksize,
    )
    table = gpu.codebook(form)[unpacked(packed, rows * columns)]
    table = (table * per_value(scales.expanded, blocksize, table.size)).reshape(rows, columns)
    expect_close(out.get(), looked_up(table, indices), dtype)


def embedding_8bit(gpu: Gpu, rng: Rng, dtype: str, columns: int, count: int) -> None:
    rows = 19
    table = rng.integers(-127, 128, (rows, columns), dtype=np.int8)
    absmax = rng.uniform(0.5, 1.5, rows).astype(np.float32)
    indices, out = draw_indices(rng, rows, count), gpu.room((count, columns), STORAGE[dtype], rng.integers(2))
    gpu.call(
        "bnb_cuda_embedding_8bit",
        indices=gpu.put(indices, rng.integers(2)),
        table=gpu.put(table, rng.integers(2)),
        absmax=gpu.put(absmax, rng.integers(2)),
        out=out,
        dtype=gpu.constant("dtype", dtype),
        count=count,
        rows=rows,
        columns=columns,
    )
    expect_close(out.get(), looked_up(table * (absmax / 127)[:, None], indices), dtype, roundings=3)


def quantize(gpu: Gpu) -> Iterator[tuple]:
    for dtype, blocksize in product(FLOATS, BLOCKSIZES):
        for n in lengths(blocksize):
            yield from ((quantize_4bit, dtype, form, blocksize, n) for form in FORMATS)
            yield from ((quantize_blockwise, dtype, crowded, blocksize, n) for crowded in (False, True))


def dequantize(gpu: Gpu) -> Iterator[tuple]:
    for dtype, blocksize in product(FLOATS, (*BLOCKSIZES, 48)):
        for index, n in enumerate(lengths(blocksize)):
            yield dequantize_blockwise, dtype, blocksize, n
            yield dequantize_4bit, dtype, FORMATS[index % 2], False, blocksize, n
            yield dequantize_4bit, dtype, FORMATS[(index + 1) % 2], True, blocksize, n


def embedding(gpu: Gpu) -> Iterator[tuple]:
    for dtype, columns, count in product(FLOATS, (1, 7, 8, 33, 64, 385), (1, 13)):
        yield embedding_8bit, dtype, columns, count
        for form, blocksize in product(FORMATS, (48, 64)):
            yield embedding_4bit, dtype, form, blocksize, columns, count
