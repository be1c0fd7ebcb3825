"""Row-wise int8 quantization. One pass over the matrix: memory bound."""

from __future__ import annotations

import torch
from torch import Tensor

from ._int8 import LARGEST, absmax, check_matrix, nonzero, round_to_int8

__all__ = ["quantize_rowwise"]


def quantize_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(int8 [R, C], absmax float16 [R])`` of a float matrix ``x [R, C]``: ``round(127 * x / absmax)`` row by row."""
    check_matrix(x)
    values = x.float()
    largest = absmax(values, 1)
    return round_to_int8(values * LARGEST / nonzero(largest)), largest.reshape(-1).to(torch.float16)
