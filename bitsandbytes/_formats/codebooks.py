"""Codebooks: the 4-bit tables and the constructors of 256-entry maps.

A codebook is a float32 table that codes index; the largest magnitude is one, so a block's absmax scales it.
NF4 holds the quantiles of a normal distribution, FP4 a sign, two exponent bits and one mantissa bit
(Dettmers et al., "QLoRA", 2023); the dynamic map is a floating-point format whose exponent length varies
(Dettmers, "8-bit Approximations for Parallelism in Deep Learning", 2016).

Tables are built from scalar float32 arithmetic, so that they do not depend on the default dtype, the device, or
how a build of torch vectorises ``linspace``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FP4",
    "NF4",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "encoding_table",
    "get_4bit_type",
    "midpoints",
    "name2qmap",
]

# Ascending. The same sixteen values stand in csrc/common/codebooks.h; tests/native compares the two.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# In units of 1/12: bit 3 of a code is the sign, its low bits index these magnitudes.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(value / 12 for value in _FP4_TWELFTHS) + tuple(0.0 - value / 12 for value in _FP4_TWELFTHS)

# "AbnormalFloat" for blocks of 64 values (Yoshida, "NF4 Isn't Information Theoretically Optimal", 2023); descending.
_AF4_BLOCK_64 = (
    1.0,
    0.7242486476898193,
    0.5549623370170593,
    0.4256388247013092,
    0.3167566657066345,
    0.2196127474308014,
    0.12934483587741852,
    0.0427316389977932,
    0.0,
    -0.049348119646310806,
    -0.14982478320598602,
    -0.25607553124427795,
    -0.37369510531425476,
    -0.5124374032020569,
    -0.6944100856781006,
    -1.0,
)

_INT4 = tuple(value / 7 for value in (*range(7, -1, -1), *range(0, -8, -1)))

# Maps that `quantize_blockwise` and the optimizers share, by name and device.
name2qmap: dict[str, Tensor] = {}


def _float32(values: Any, device: torch.device | str | None = None) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device or "cpu")


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The 16 values of a 4-bit type, float32, in the order of their codes.

    ``"nf4"`` and ``"fp4"`` can be quantized to; ``"int4"`` and ``"af4"`` (blocks of 64 only) are tables for study.
    ``device=None`` means ``"cuda"``.

    Raises:
        NotImplementedError: the type is unknown, or ``"af4"`` was asked for with another block size.
    """
    tables = {"nf4": NF4, "fp4": FP4, "int4": _INT4, "af4": _AF4_BLOCK_64}
    if typename not in tables:
        raise NotImplementedError(f"4-bit type {typename!r} is not supported; use one of {sorted(tables)}")
    if typename == "af4" and blocksize != 64:
        raise NotImplementedError(f"4-bit AbnormalFloats exist for blocksize 64 only, got {blocksize}")
    return _float32(tables[typename], "cuda" if device is None else device)


def midpoints(values: Tensor) -> Tensor:
    """Decision thresholds between neighbours of an ascending float32 table (one fewer than its entries)."""
    return (values[:-1] + values[1:]) / 2


@functools.lru_cache(maxsize=64)
def encoding_table(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(thresholds, codes)``: a scaled value above k thresholds gets ``codes[k]``. For ``"nf4"`` and ``"fp4"``.

    FP4's two zeros are neighbours: values up to and including zero take code 0, tiny positive ones code 8.
    """
    with torch.inference_mode(False):  # cached: must stay usable outside the mode it was first asked for in
        values, codes = torch.sort(get_4bit_type(quant_type, "cpu"), stable=True)
        return midpoints(values).to(device), codes.to(torch.uint8).to(device)


def _linspace(start: float, end: float, steps: int) -> Tensor:
    """``torch.linspace`` in float32 as its fused multiply-add rounds it: one rounding a value, on every machine."""
    low, high = _float32(start).double(), _float32(end).double()
    step = ((high - low).float() / (steps - 1)).double() if steps > 1 else low * 0
    index = torch.arange(steps, dtype=torch.float64, device="cpu")
    rising, falling = low + step * index, high - step * (steps - 1 - index)
    return torch.where(index < steps // 2, rising, falling).float()


def _padded(values: Tensor, total_bits: int) -> Tensor:
    """Sort ascending and fill up with zeros to 256 entries."""
    assert values.numel() == 2**total_bits, (
        f"a map of {total_bits} bits needs {2**total_bits} values, these settings give {values.numel()}"
    )
    zeros = _float32([0.0] * (256 - values.numel()))
    return torch.sort(torch.cat([values, zeros])).values


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The dynamic map: a leading run of zeros is the exponent, the bits left over are a linear fraction.

    Returns 256 ascending float32 values; for fewer than 8 bits the rest is zeros. The signed map has +1 but not -1.

    Raises:
        AssertionError: the settings do not give ``2**total_bits`` values.
    """
    fraction_bits = total_bits - 1
    groups = []
    for i in range(max_exponent_bits):
        width = i + fraction_bits - max_exponent_bits + (0 if signed else 1)
        boundaries = _linspace(0.1, 1.0, int(2.0**width + 1))
        groups.append(midpoints(boundaries) * 10.0 ** (i + 1 - max_exponent_bits))
    extra = 2 ** (fraction_bits - max_exponent_bits) if fraction_bits > max_exponent_bits else 0
    if extra > 1:
        groups.append(midpoints(_linspace(0.1, 1.0, extra)))
    values = torch.cat(groups)
    if signed:
        values = torch.cat([values, -values])
    return _padded(torch.cat([values, _float32([0.0, 1.0])]), total_bits)


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced values from -1 (signed) or 0 to 1; 256 ascending float32 values, zeros fill the middle."""
    count = 2**total_bits
    if (add_zero or total_bits < 8) and signed:
        count -= 1  # leave room for an exact zero
    values = _linspace(-1.0 if signed else 0.0, 1.0, count)
    half = count // 2
    return torch.cat([values[:half], _float32([0.0] * (256 - count)), values[half:]])


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> Tensor:
    """A small floating-point format's values, scaled to a largest magnitude of one.

    There are no encodings for NaN and infinity, so this is close to, not equal to, the E4M3 and E5M2 of hardware.
    Returns 256 ascending float32 values; for fewer than 8 bits the rest is zeros.

    Raises:
        AssertionError: the bits do not add up to ``total_bits``.
    """
    assert exponent_bits + precision_bits == total_bits - int(signed), (
        f"sign, exponent and precision bits must add up to {total_bits}, "
        f"got {int(signed)} + {exponent_bits} + {precision_bits}"
    )
    bias = 2 ** (exponent_bits - 1)
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**precision_bits):
            fraction = mantissa / 2**precision_bits
            if exponent == 0:
                values.append(fraction * 2.0**-bias)
            else:
                values.append((1 + fraction) * 2.0 ** -(exponent - bias - 1))
    if signed:
        values += [-value for value in values]
    table = _padded(_float32(values), total_bits)
    return table / table.max()


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution, from which NF4 was made. Needs scipy.

    Returns 256 ascending float32 values: negative ones, zeros, then one more positive than negative
    (as many with ``use_extra_value=False``).

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.stats import norm
    except ImportError as error:
        raise ImportError("create_normal_map needs Scipy; install it with `pip install scipy`") from error

    steps = 9 if use_extra_value else 8
    positive = norm.ppf(
        torch.linspace(offset, 0.5, steps, dtype=torch.float32, device="cpu")[:-1].numpy()
    ).tolist()
    negative = (
        -norm.ppf(torch.linspace(offset, 0.5, 8, dtype=torch.float32, device="cpu")[:-1].numpy())
    ).tolist()
    values = positive + [0.0] * (256 - len(positive) - len(negative)) + negative
    table = torch.sort(_float32(values)).values
    return table / table.max()
