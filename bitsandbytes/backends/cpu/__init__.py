"""Native kernels for the CPU."""

from . import embedding, grouped, int8, optimizers

__all__ = ["embedding", "grouped", "int8", "optimizers"]
