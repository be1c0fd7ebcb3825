"""Face: the base classes of the optimizers and the registry of per-parameter settings."""

from .._native import sync_gpu
from .._overrides import GlobalOptimManager
from ._base import MockArgs, Optimizer1State, Optimizer2State, Optimizer8bit

__all__ = [
    "GlobalOptimManager",
    "MockArgs",
    "Optimizer1State",
    "Optimizer2State",
    "Optimizer8bit",
    "sync_gpu",
]
