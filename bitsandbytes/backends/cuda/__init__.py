"""Native kernels for CUDA and ROCm devices."""

from . import optimizers

__all__ = ["optimizers"]
