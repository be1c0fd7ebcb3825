"""Which backends this machine has, and loading them.

A backend is a module that registers kernels for one device type when it is imported. A built-in one that fails is
reported once and leaves the others usable; a third party's (entry-point group ``bitsandbytes.backends``) stops the
import, because its user asked for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator
from types import ModuleType

import torch

from .._native.specs import has_cuda_device
from . import utils

__all__ = ["ENTRY_POINT_GROUP", "load_builtin", "load_plugins", "utils"]

ENTRY_POINT_GROUP = "bitsandbytes.backends"

logger = logging.getLogger(__name__)


def _present() -> Iterator[str]:
    """Names of the built-in backends whose device this machine has; the default one first."""
    yield "default"
    yield "cpu"
    if has_cuda_device():
        yield "cuda"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        yield "xpu"
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        yield "mps"
    if _has_hpu():
        yield "hpu"


def _has_hpu() -> bool:
    """Importing Habana's torch bridge is what makes ``torch.hpu`` exist."""
    if importlib.util.find_spec("habana_frameworks") is None:
        return False
    if importlib.util.find_spec("habana_frameworks.torch") is None:
        return False
    importlib.import_module("habana_frameworks.torch")
    return hasattr(torch, "hpu") and torch.hpu.is_available()


def load_builtin() -> dict[str, ModuleType]:
    """Import the ``ops`` modules of the backends this machine has, by name."""
    loaded = {}
    for name in _present():
        try:
            loaded[name] = importlib.import_module(f"{__name__}.{name}.ops")
        except Exception as error:  # any failure: the other backends must stay usable
            logger.warning("bitsandbytes: the %s backend failed to load and is not used: %s", name, error)
    return loaded


def load_plugins() -> None:
    """Load every entry point of the group and call it without arguments.

    Raises:
        RuntimeError: one failed to load, or its call raised.
    """
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()()
        except Exception as error:
            raise RuntimeError(f"bitsandbytes: failed to load backend {entry.name}: {error}") from error
