"""Differentiable matmuls with 4-bit and int8 weights."""

from __future__ import annotations

from . import _functions
from .fourbit import matmul_4bit
from .int8 import MatmulLtState, matmul

__all__ = ["MatmulLtState", "_functions", "matmul", "matmul_4bit"]
