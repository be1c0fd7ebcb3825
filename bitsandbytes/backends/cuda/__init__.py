"""Native kernels for CUDA and ROCm devices."""

from . import embedding, grouped, optimizers

__all__ = ["embedding", "grouped", "optimizers"]
