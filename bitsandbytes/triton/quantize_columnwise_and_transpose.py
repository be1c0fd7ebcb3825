"""Column-wise int8 quantization of a matrix into its transpose, for products over the other dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from ._int8 import LARGEST, absmax, check_matrix, nonzero, round_to_int8

__all__ = ["quantize_columnwise_and_transpose"]


def quantize_columnwise_and_transpose(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(int8 [C, R], absmax float16 [C])`` of a float matrix ``x [R, C]``: its columns, quantized, as rows."""
    check_matrix(x)
    values = x.float()
    largest = absmax(values, 0)
    quantized = round_to_int8(values * LARGEST / nonzero(largest))
    return quantized.t().contiguous(), largest.reshape(-1).to(torch.float16)
