"""The inverse of row-wise int8 quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from ._int8 import LARGEST

__all__ = ["dequantize_rowwise"]


def dequantize_rowwise(x: Tensor, state_x: Tensor) -> Tensor:
    """``state_x * x / 127`` row by row, float16, of int8 ``x [R, C]`` and absmax ``state_x [R]``."""
    if x.dim() != 2 or x.dtype != torch.int8:
        raise ValueError(f"x must be a 2D int8 tensor, got {x.dim()}D {x.dtype}")
    return (state_x.float().reshape(-1, 1) * x / LARGEST).to(torch.float16)
