"""Native kernels for the CPU."""

from . import int8, optimizers

__all__ = ["int8", "optimizers"]
