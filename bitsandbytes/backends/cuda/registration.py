"""Registering native CUDA kernels, one by one: an older library may lack some of them."""

from __future__ import annotations

from collections.abc import Callable

from ..._native import has_native
from ..._ops import Operator

__all__ = ["native_kernel"]


def native_kernel(operator: Operator, symbol: str) -> Callable[[Callable], Callable]:
    """Register the filling for CUDA if the library has its symbol."""
    return operator.kernel("cuda") if has_native(symbol) else lambda fill: fill
