"""Native kernels for CUDA and ROCm devices."""

from . import embedding, optimizers

__all__ = ["embedding", "optimizers"]
