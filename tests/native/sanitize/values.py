"""Float types, 4-bit weights and comparisons in numpy: what the results are checked against."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from gpu import Gpu

Rng = np.random.Generator

FLOATS = ("float32", "float16", "bfloat16")
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# numpy has no bfloat16: here it is its bits.
STORAGE: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values as they lie in memory in a dtype."""
    with np.errstate(over="ignore"):
        values = np.asarray(values, np.float32)
        if dtype != "bfloat16":
            return values.astype(STORAGE[dtype])
    bits = values.view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, nearest).astype(np.uint16)


def widened(stored: np.ndarray, dtype: str) -> np.ndarray:
    """And back."""
    if dtype != "bfloat16":
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def unpacked(packed: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` codes of bytes that hold two, the first in the high nibble."""
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[:count]


def per_value(scales: np.ndarray, blocksize: int, count: int) -> np.ndarray:
    return np.repeat(scales, blocksize)[:count]


def blocks_of(count: int, blocksize: int) -> int:
    return -(count // -blocksize)


def map_of_256(signed: bool = True) -> np.ndarray:
    """An ascending map, denser near zero."""
    steps = np.linspace(-1.0 if signed else 0.0, 1.0, 256)
    return (np.sign(steps) * np.abs(steps) ** 3).astype(np.float32)


class Scales(NamedTuple):
    """A block's scale each, and the arguments that say so."""

    expanded: np.ndarray
    arguments: dict[str, np.ndarray]


def make_scales(rng: Rng, blocks: int, nested: bool) -> Scales:
    if not nested:
        absmax = rng.uniform(0.5, 1.5, blocks).astype(np.float32)
        return Scales(absmax, {"absmax": absmax})
    codes = rng.integers(0, 256, blocks, dtype=np.uint8)
    absmax = rng.uniform(0.1, 0.5, blocks_of(blocks, 256)).astype(np.float32)
    code, offset = map_of_256(), np.array([1.0], np.float32)
    expanded = code[codes] * per_value(absmax, 256, blocks) + offset
    arguments: dict[str, np.ndarray] = {
        "absmax": absmax,
        "absmax_8bit": codes,
        "absmax_code": code,
        "absmax_offset": offset,
    }
    return Scales(expanded, arguments)


class Weight(NamedTuple):
    packed: np.ndarray
    scales: Scales
    values: np.ndarray  # decoded
    squares: np.ndarray


GIVEN_CODE = np.random.default_rng(16).standard_normal(16).astype(np.float32)


@functools.lru_cache(maxsize=3)
def make_weight(gpu: Gpu, shape: tuple[int, ...], blocksize: int, nested: bool, code: str) -> Weight:
    """A random weight in nf4, in fp4 or by GIVEN_CODE ("given")."""
    rng, count = np.random.default_rng(len(shape) + count_of(shape)), count_of(shape)
    packed = rng.integers(0, 256, (count + 1) // 2, dtype=np.uint8)
    scales = make_scales(rng, blocks_of(count, blocksize), nested)
    table = GIVEN_CODE if code == "given" else gpu.codebook(code)
    values = table[unpacked(packed, count)] * per_value(scales.expanded, blocksize, count)
    return Weight(packed, scales, values.reshape(shape), np.square(values).reshape(shape))


def count_of(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def expect(holds: Any, what: str) -> None:
    if not np.all(holds):
        wrong = np.size(holds) - np.count_nonzero(holds)
        raise AssertionError(f"{what}: {wrong} of {np.size(holds)} are wrong")


def expect_equal(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    both_nan = np.isnan(actual) & np.isnan(expected)
    expect((actual == expected) | both_nan, what)


def expect_product(
    out: np.ndarray, A: np.ndarray, W: np.ndarray, W2: np.ndarray, bias: Any, dtype: str
) -> None:
    """``out`` is A @ W.T + bias as exact as its dtype: W2 are the squares of W.

    Weights round to the dtype and sums to float32, by errors that are as good as independent: a sum of many is far from
    what they could amount to, and a hundredth of the products cannot be missing from it.
    """
    exact = A @ W.T + (0.0 if bias is None else bias)
    spread = np.sqrt(np.square(A) @ W2.T)
    allowed = (4 * EPS[dtype] + 1e-5) * spread + EPS[dtype] * np.abs(exact)
    expect(np.abs(widened(out, dtype) - exact) <= allowed, "product")
