"""Native kernels for the CPU."""

from . import optimizers

__all__ = ["optimizers"]
