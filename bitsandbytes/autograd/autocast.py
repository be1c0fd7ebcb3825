"""Autocast for autograd functions of our own: cast the operands as torch casts those of ``linear``, then switch it off.

Inside a custom function autocast would change the dtype of one matmul and not of the rounding around it, so functions
are applied with it disabled, to operands that already have its dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["apply_under_autocast"]


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    # Tracers of older torch do not know this question; what they trace for has autocast.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def apply_under_autocast(function: Callable[..., Tensor], A: Tensor, B: Tensor, *args: Any) -> Tensor:
    """``function(A, B, *args)``, with both operands in autocast's dtype if it is on for A's device."""
    device_type = A.device.type
    dtype = _autocast_dtype(device_type)
    if dtype is None:
        return function(A, B, *args)
    with torch.autocast(device_type, enabled=False):
        return function(A.to(dtype), B.to(dtype) if B.is_floating_point() else B, *args)
