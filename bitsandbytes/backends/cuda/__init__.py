"""Native kernels for CUDA and ROCm devices."""

from . import embedding, grouped, int8, optimizers

__all__ = ["embedding", "grouped", "int8", "optimizers"]
