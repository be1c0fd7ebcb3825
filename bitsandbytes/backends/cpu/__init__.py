"""Native kernels for the CPU."""

from . import embedding, int8, optimizers

__all__ = ["embedding", "int8", "optimizers"]
