"""Int8 quantization with one scale for the whole matrix, as it is or transposed."""

from __future__ import annotations

from torch import Tensor

from ._int8 import LARGEST, absmax, check_matrix, nonzero, round_to_int8

__all__ = ["quantize_global", "quantize_global_transpose"]


def quantize_global(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(int8 [R, C], absmax [1] in x's dtype)`` of a float matrix: ``round(127 * x * (1 / absmax))``."""
    check_matrix(x)
    values = x.float()
    largest = absmax(values.reshape(1, -1), 1).reshape(1)
    return round_to_int8(values * LARGEST * nonzero(largest).reciprocal()), largest.to(x.dtype)


def quantize_global_transpose(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_global` into the transpose: ``(int8 [C, R], absmax [1])``."""
    quantized, largest = quantize_global(x)
    return quantized.t().contiguous(), largest
