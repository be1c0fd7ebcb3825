"""Face: emulated FP8 training and SwitchBack."""

from . import nn
from .autograd._functions import matmul_fp8_global, matmul_fp8_mixed, switchback_bnb

__all__ = ["matmul_fp8_global", "matmul_fp8_mixed", "nn", "switchback_bnb"]
