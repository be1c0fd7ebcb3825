"""Memory for the results of small calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["empty"]


def _of_torch(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


# ``empty(shape, strides, dtype)``: uninitialised values on the CPU. What torch.compile's code allocates with where torch
# has it, which takes half of the microsecond of ``new_empty``: nothing is parsed, and no dispatcher asked.
empty: Callable[..., Any] = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cpu", _of_torch
)
