"""4-bit products: every tuning at the edges of its tile of tokens, the plain kernel, and the grouped ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, product
from typing import Any

import numpy as np

from gpu import Buffer, Gpu
from values import (
    FLOATS,
    GIVEN_CODE,
    STORAGE,
    Rng,
    Weight,
    expect,
    expect_product,
    make_weight,
    rounded,
    widened,
)

CODES = ("nf4", "fp4", "given")
HALVES = ("float16", "bfloat16")
# (N, K, blocksize): one tile or less, no whole number of tiles of 16, 64 or 256 rows; and K of one stage or less, of
# whole stages and not, of one block or more.
SIZES = (
    (5, 64, 64),
    (16, 320, 64),
    (40, 1088, 64),
    (250, 4096, 128),
    (272, 4096, 1024),
    (333, 576, 64),
    (2112, 1152, 128),  # every multiprocessor has a part
    (15010, 320, 64),  # and several
)
# For the kernel that takes anything: odd K, blocks that straddle rows, small ones.
PLAIN_SIZES = ((1, 2, 64), (5, 33, 32), (17, 65, 64), (40, 1088, 128), (250, 4096, 1024), (333, 320, 32))


def put_weight(gpu: Gpu, rng: Rng, weight: Weight, shift: int = 0) -> dict[str, Buffer]:
    """The weight's arguments; ``shift`` is of the codes, and scales are wherever a float may be."""
    scales = {name: gpu.put(array, rng.integers(2)) for name, array in weight.scales.arguments.items()}
    return {"packed": gpu.put(weight.packed, shift), **scales}


def multiply(
    gpu: Gpu,
    rng: Rng,
    dtype: str,
    M: int,
    size: tuple[int, int, int],
    nested: bool,
    tuning: int,
    shift: int = 0,
) -> None:
    """One product with a random codebook, and sometimes a bias; ``shift`` is of A and the codes."""
    N, K, blocksize = size
    code = str(rng.choice(CODES))
    weight = make_weight(gpu, (N, K), blocksize, nested, code)
    A = rounded(rng.standard_normal((M, K)), dtype)
    bias = rounded(rng.standard_normal(N), dtype) if rng.random() < 0.5 else None
    sizes: dict[str, Any] = {
        "M": M,
        "N": N,
        "K": K,
        "blocksize": blocksize,
        "dtype": gpu.constant("dtype", dtype),
    }
    workspace = gpu.call(
        "bnb_cuda_gemm_4bit_workspace", **sizes, tuning=tuning, multiprocessors=gpu.multiprocessors
    )
    out = gpu.room((M, N), STORAGE[dtype], rng.integers(2))
    gpu.call(
        "bnb_cuda_gemm_4bit",
        A=gpu.put(A, shift),
        **put_weight(gpu, rng, weight, shift),
        code=gpu.put(GIVEN_CODE, rng.integers(2)) if code == "given" else None,
        format=gpu.constant("format", "nf4" if code == "given" else code),
        bias=None if bias is None else gpu.put(bias, rng.integers(2)),
        out=out,
        **sizes,
        tuning=tuning,
        workspace=gpu.room(workspace, np.uint8) if workspace else None,
    )
    added = None if bias is None else widened(bias, dtype)
    expect_product(out.get(), widened(A, dtype), weight.values, weight.squares, added, dtype)


def plan(gpu: Gpu, rng: Rng, M: int, size: tuple[int, int, int]) -> None:
    """What is planned for this GPU runs on it."""
    N, K, blocksize = size
    tuning = gpu.call(
        "bnb_cuda_gemm_4bit_plan",
        dtype=gpu.constant("dtype", "bfloat16"),
        M=M,
        N=N,
        K=K,
        blocksize=blocksize,
        capability=gpu.capability,
        multiprocessors=gpu.multiprocessors,
    )
    if tuning != gpu.abi.constants["BNB_GEMM_DEQUANTIZE"]:
        multiply(gpu, rng, "bfloat16", M, size, False, tuning)


def takes(gpu: Gpu, M: int, tuning: int) -> bool:
    """Whether this GPU has a kernel for a tuning and so many tokens."""
    try:
        multiply(gpu, np.random.default_rng(0), "bfloat16", M, (16, 64, 64), False, tuning)
    except ValueError:
        return False
    finally:
        gpu.free_all()
    return True


def tile_of(gpu: Gpu, tuning: int) -> int:
    """The tokens of one tile, of which one more needs more workspace; without one some that fill tiles of every kind."""

    def workspace(M: int) -> int:
        sizes = {"M": M, "N": 1, "K": 64, "blocksize": 64, "multiprocessors": 1}
        return gpu.call(
            "bnb_cuda_gemm_4bit_workspace", dtype=gpu.constant("dtype", "bfloat16"), tuning=tuning, **sizes
        )

    if workspace(1):
        return next(M for M in count(8, 8) if workspace(M + 1) > workspace(1))
    return 24


def gemm(gpu: Gpu) -> Iterator[tuple]:
    tunings = 0
    for tuning in count():
        if not takes(gpu, 1, tuning):
            break
        tunings += 1
        tile = tile_of(gpu, tuning)
        tokens = {1, tile // 2 + 3, tile, tile + 1, 2 * tile + 5}
        print(f"tuning {tuning}: tiles of {tile} tokens", flush=True)
        # Both kinds of scales everywhere, the dtypes in turn: with one accesses are as with the other.
        for index, (size, M) in enumerate(product(SIZES, sorted(tokens))):
            yield multiply, HALVES[index % 2], M, size, False, tuning
            yield multiply, HALVES[(index + 1) % 2], M, size, True, tuning
    expect(tunings > 0, "tunings")
    simt, fused = gpu.abi.constants["BNB_GEMM_SIMT"], gpu.abi.constants["BNB_GEMM_FUSED"]
    for size, nested, dtype in product(PLAIN_SIZES, (False, True), FLOATS):
        yield from ((multiply, dtype, M, size, nested, simt) for M in (1, 4, 5))
        yield multiply, dtype, 3, size, nested, simt, 1
    for size, nested, dtype in product(SIZES[:6], (False, True), FLOATS):
        yield from ((multiply, dtype, M, size, nested, fused) for M in (1, 9, 33))
        yield multiply, dtype, 2, size, nested, fused, 1
    for size, M in product(SIZES[:6], (1, 8, 9, 16, 17, 24, 25, 32, 33, 64, 65, 128, 129, 257)):
        yield plan, M, size


# Rows of each expert: one token, none in between, none at all, one expert for each width of tile.
COUNTS = (
    (1,),
    (0, 0, 9, 0),
    (0, 3, 0, 1, 17),
    (0, 0),
    (70, 1, 33),
    tuple(i % 4 for i in range(19)),
    (9, 8),
    (20, 0, 30),
    (131, 0, 66, 1),
    tuple(i % 2 for i in range(70)),
)
# (N, K, blocksize): whole blocks in a row; rows that end inside a block; odd N; one block for an expert; tiles of both
# dimensions that are short.
GROUPED_SIZES = (
    (24, 64, 64),
    (48, 96, 128),
    (7, 160, 32),
    (2, 32, 64),
    (136, 320, 64),
    (264, 1088, 64),
    (40, 1024, 1024),
)
STRAYS = 3  # rows that belong to no expert


def grouped_product(
    gpu: Gpu,
    rng: Rng,
    transposed: bool,
    dtype: str,
    counts: tuple[int, ...],
    size: tuple[int, int, int],
    nested: bool,
) -> None:
    (N, K, blocksize), E, R = size, len(counts), sum(counts) + STRAYS
    code = str(rng.choice(CODES[:2]))
    weight = make_weight(gpu, (E, N, K), blocksize, nested, code)
    columns, outputs = (N, K) if transposed else (K, N)
    A = rounded(rng.standard_normal((R, columns)), dtype)
    bias = rounded(rng.standard_normal((E, N)), dtype) if not transposed and rng.random() < 0.5 else None
    ends = np.cumsum(counts).astype(np.int32)
    out, shift = gpu.room((R, outputs), STORAGE[dtype], rng.integers(2)), int(rng.random() < 0.2)
    gpu.call(
        "bnb_cuda_gemm_4bit_grouped_transposed" if transposed else "bnb_cuda_gemm_4bit_grouped",
        A=gpu.put(A, shift),
        dtype=gpu.constant("dtype", dtype),
        **put_weight(gpu, rng, weight, shift),
        format=gpu.constant("format", code),
        offsets=gpu.put(ends, rng.integers(2)),
        **({} if bias is None else {"bias": gpu.put(bias, rng.integers(2))}),
        out=out,
        E=E,
        R=R,
        N=N,
        K=K,
        blocksize=blocksize,
    )
    result, values = out.get(), widened(A, dtype)
    expect(result[ends[-1] :] == 0, "rows of no expert")
    for expert, (end, rows) in enumerate(zip(ends, counts, strict=True)):
        own = slice(end - rows, end)
        W, W2 = weight.values[expert], weight.squares[expert]
        if transposed:
            W, W2 = W.T, W2.T
        added = None if bias is None else widened(bias[expert], dtype)
        expect_product(result[own], values[own], W, W2, added, dtype)


def grouped(gpu: Gpu) -> Iterator[tuple]:
    for index, (size, counts, dtype) in enumerate(product(GROUPED_SIZES, COUNTS, FLOATS)):
        yield grouped_product, False, dtype, counts, size, index % 2 == 0
        yield grouped_product, True, dtype, counts, size, index % 2 == 1
