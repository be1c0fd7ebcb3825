"""Face: layers and parameters under the path that pickles record and integrations patch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._checkpoint import maybe_rearrange_weight
from ._notices import logger
from .embedding import Embedding, StableEmbedding
from .experts4bit import Experts4bit
from .int8_params import Int8Params
from .linear4bit import Linear4bit, LinearFP4, LinearNF4
from .linear8bit import Linear8bitLt
from .params4bit import Params4bit, fix_4bit_weight_quant_state_from_module
from .quantized_embedding import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4

if TYPE_CHECKING:
    from .outliers import OutlierAwareLinear
    from .switchback import SwitchBackLinearBnb

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
    "SwitchBackLinearBnb",
    "fix_4bit_weight_quant_state_from_module",
    "logger",
    "maybe_rearrange_weight",
]

# Loaded when they are asked for.
_LAZY = {"OutlierAwareLinear": "outliers", "SwitchBackLinearBnb": "switchback"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"{__package__}.{_LAZY[name]}"), name)
    return value
