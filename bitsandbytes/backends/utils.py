"""Face: what third-party backends and programs import from here."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from .._formats.table import FORMATS

__all__ = ["CODE", "GAUDI_SW_VER", "get_gaudi_sw_version", "triton_available"]


@functools.cache
def _codes() -> dict[str, Tensor]:
    return {
        name: torch.tensor(fmt.values, dtype=torch.float32, device="cpu") for name, fmt in FORMATS.items()
    }


def get_gaudi_sw_version() -> str | None:
    """Version of the installed Habana software (``"1.22.0"``), None without it."""
    for package in ("habana-torch-plugin", "habana_torch_plugin"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


triton_available: bool = importlib.util.find_spec("triton") is not None


def __getattr__(name: str):
    if name == "CODE":
        return _codes()
    if name == "GAUDI_SW_VER":
        return get_gaudi_sw_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
