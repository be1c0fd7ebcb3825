"""What the int8 primitives share: rounding, statistics of possibly empty tensors, the scaled product.

Statistics are computed in float32 and rounded to float16 only for the caller; a vector of zeros quantizes to zeros,
and what is not finite to zero (its statistic carries the infinity or NaN into the result).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LARGEST", "absmax", "check_matrix", "round_to_int8", "scaled_product"]

LARGEST = 127.0
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def check_matrix(x: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a 2D float tensor, got {x.dim()}D {x.dtype}")


def absmax(values: Tensor, dim: int) -> Tensor:
    """Largest magnitudes along ``dim``, which stays with size one; zero where there is nothing."""
    if values.shape[dim] == 0:
        return values.sum(dim=dim, keepdim=True)
    return values.abs().amax(dim=dim, keepdim=True)


def nonzero(largest: Tensor) -> Tensor:
    """``largest`` as something to divide by: a vector of zeros gives zeros."""
    return largest.clamp(min=_SMALLEST_NORMAL)


def round_to_int8(values: Tensor) -> Tensor:
    """Nearest integers, ties to even."""
    return values.round().clamp_(-LARGEST, LARGEST).nan_to_num_(0.0).to(torch.int8)


def scaled_product(a: Tensor, b: Tensor, state_x: Tensor, state_w: Tensor, bias: Tensor | None) -> Tensor:
    """``state_w * (state_x * (a @ b / 127**2))``, rounded to float16; then the bias is added in float16."""
    assert a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0], (
        f"incompatible dimensions: {tuple(a.shape)} x {tuple(b.shape)}"
    )
    product = torch.ops.bitsandbytes.int8_linear_matmul(a.contiguous(), b.t().contiguous()).float()
    product *= 1.0 / (LARGEST * LARGEST)
    product *= state_x.float().reshape(-1, 1)
    product *= state_w.float().reshape(1, -1)
    result = product.to(torch.float16)
    return result if bias is None else result + bias.to(torch.float16)
