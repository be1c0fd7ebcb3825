"""Whether Triton can compile for this machine. Triton itself is only imported when someone asks."""

from __future__ import annotations

import functools
import importlib.util

__all__ = ["is_triton_available"]


@functools.cache
def is_triton_available() -> bool:
    """True if the triton package can be imported and finds a driver of a GPU that is present."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from triton.backends import backends

        return any(backend.driver.is_active() for backend in backends.values())
    except Exception:  # a broken or foreign installation counts as none
        return False
