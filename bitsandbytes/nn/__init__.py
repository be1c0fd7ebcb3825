"""Layers and parameters that are kept in 4 or 8 bits, and embeddings with 32-bit optimizer state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import modules, parametrize
from .embedding import Embedding, StableEmbedding
from .experts4bit import Experts4bit
from .int8_params import Int8Params
from .linear4bit import Linear4bit, LinearFP4, LinearNF4
from .linear8bit import Linear8bitLt
from .params4bit import Params4bit
from .quantized_embedding import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4

if TYPE_CHECKING:
    from . import triton_based_modules
    from .outliers import OutlierAwareLinear
    from .switchback import (
        StandardLinear,
        SwitchBackLinear,
        SwitchBackLinearBnb,
        SwitchBackLinearGlobal,
        SwitchBackLinearVectorwise,
    )

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Experts4bit",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "Params4bit",
    "StableEmbedding",
    "StandardLinear",
    "SwitchBackLinear",
    "SwitchBackLinearBnb",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearVectorwise",
    "modules",
    "parametrize",
    "triton_based_modules",
]

# Loaded when they are asked for.
_LAZY = {
    "OutlierAwareLinear": "outliers",
    "StandardLinear": "switchback",
    "SwitchBackLinear": "switchback",
    "SwitchBackLinearBnb": "switchback",
    "SwitchBackLinearGlobal": "switchback",
    "SwitchBackLinearVectorwise": "switchback",
    "triton_based_modules": None,
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = _LAZY[name]
    value = (
        import_module(f"{__name__}.{name}")
        if home is None
        else getattr(import_module(f"{__name__}.{home}"), name)
    )
    globals()[name] = value
    return value
