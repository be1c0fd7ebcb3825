"""The operators under the names a backend with Triton registers them by. Importable only where Triton is.

No Triton kernel stands behind these yet: each runs the default backend's plain torch on the tensors' own device, so
results are those of every other device. A kernel takes its place here, behind the same signature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # noqa: F401  where there is no Triton, importing this module fails
from torch import Tensor

from ... import _ops
from ..default import ops as _default_ops, optimizers as _default_optimizers  # noqa: F401  they register the kernels

__all__ = [
    "dequantize_4bit",
    "dequantize_4bit_inplace",
    "dequantize_blockwise",
    "dequantize_blockwise_inplace",
    "gemv_4bit",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "quantize_4bit",
    "quantize_blockwise",
]


def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """``(codes uint8 like A, absmax float32 [blocks])``."""
    return _ops.quantize_blockwise.run_with("default", A, code, blocksize)


def dequantize_blockwise(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    """Values of ``dtype``, shaped like the uint8 codes ``A``."""
    return _ops.dequantize_blockwise.run_with("default", A, absmax, code, blocksize, dtype)


def dequantize_blockwise_inplace(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    """:func:`dequantize_blockwise` into ``out``."""
    out.copy_(dequantize_blockwise(A, absmax, code, blocksize, dtype))


def quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``(packed [bytes / itemsize, 1], absmax float32 [blocks])``."""
    return _ops.quantize_4bit.run_with("default", A, blocksize, quant_type, quant_storage)


def dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Values of ``shape`` and ``dtype`` from packed codes."""
    return _ops.dequantize_4bit.run_with("default", A, absmax, blocksize, quant_type, shape, dtype)


def dequantize_4bit_inplace(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """:func:`dequantize_4bit` into ``out``."""
    out.copy_(dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype))


def gemv_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    """``A @ W.T`` for the packed weight ``B`` of shape ``shapeB``."""
    return _ops.gemv_4bit.run_with("default", A, B, shapeB, absmax, code, blocksize)


def optimizer_update_8bit_blockwise(*args) -> None:
    """One step with 8-bit state, in place; arguments as the operator's schema lists them."""
    _ops.optimizer_update_8bit_blockwise.run_with("default", *args)


def optimizer_update_32bit(*args) -> None:
    """One step with float32 state, in place; arguments as the operator's schema lists them."""
    _ops.optimizer_update_32bit.run_with("default", *args)
