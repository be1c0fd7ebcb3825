"""Marks the functions that survive for the programs that still call them.

Every one of them warns with ``FutureWarning`` when called, once for each calling line as Python's filters go, and
keeps doing what it always did. Code of this package calls the undecorated helpers underneath instead.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["deprecated"]

_Function = TypeVar("_Function", bound=Callable)


def deprecated(advice: str) -> Callable[[_Function], _Function]:
    """Warn with ``FutureWarning`` on each call; ``advice`` tells what to use instead."""

    def mark(function: _Function) -> _Function:
        message = (
            f"{function.__name__} is deprecated and will be removed in a future release. {advice}".strip()
        )

        @functools.wraps(function)
        def warn_and_call(*args: Any, **kwargs: Any) -> Any:
            warnings.warn(message, FutureWarning, stacklevel=2)
            return function(*args, **kwargs)

        warn_and_call.__deprecated__ = message  # type: ignore[attr-defined]
        return warn_and_call  # type: ignore[return-value]

    return mark
