"""What calls past the dispatcher ask of their arguments (see :meth:`Operator.shortcut`), whatever the device.

A small layer's call consists of frames, questions to tensors and arguments of native functions: of each the fewest. The
conditions are those of the operators' checks, and that a kernel can read the tensors as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._formats.table import BLOCKSIZES, NESTED_BLOCKSIZE, STORAGE_DTYPES
from ._native import DTYPE_ID, FORMAT_ID
from ._operator import PLAIN_TENSORS

__all__ = ["fourbit_product", "is_int8_layer"]


# A gemm_4bit in numbers: addresses, of which 0 is none, with bnb_dtype after the first, M, N and K; and the result's shape.
# (A, dtype, packed, absmax, absmax_8bit, absmax_code, absmax_offset, bias, M, N, K, shape)
FourbitProduct = tuple[int, int, int, int, int, int, int, int, int, int, int, list[int]]


def fourbit_product(
    is_here: str,
    A: Tensor,
    B: Tensor,
    shapeB: Any,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
) -> FourbitProduct | None:
    """The product, or None where it must go the long way. ``is_here`` is ``"is_cpu"`` or ``"is_cuda"``: of all tensors."""
    for tensor in (A, B, absmax, bias, absmax_8bit, absmax_code, absmax_offset):
        if tensor is not None and (
            type(tensor) not in PLAIN_TENSORS
            or not getattr(tensor, is_here)
            or not tensor.is_contiguous()
            or tensor.is_neg()
        ):
            return None
    dtype, shape, values = A.dtype, [*A.shape], A.numel()
    if (
        quant_type not in FORMAT_ID
        or dtype not in DTYPE_ID
        or blocksize not in BLOCKSIZES
        or len(shapeB) != 2
    ):
        return None
    N, K = shapeB
    if not shape or shape[-1] != K or not values:
        return None
    if B.dtype not in STORAGE_DTYPES or B.nbytes < (N * K + 1) // 2:
        return None
    scales = -(N * K // -blocksize)
    codes = table = offset = 0
    if absmax_8bit is not None:
        if absmax_8bit.dtype is not torch.uint8 or absmax_8bit.dim() != 1 or absmax_8bit.numel() < scales:
            return None
        if absmax_code is None or absmax_code.dtype is not torch.float32 or absmax_code.numel() != 256:
            return None
        if absmax_offset is None or absmax_offset.dtype is not torch.float32 or absmax_offset.numel() != 1:
            return None
        scales = -(scales // -NESTED_BLOCKSIZE)
        codes, table, offset = absmax_8bit.data_ptr(), absmax_code.data_ptr(), absmax_offset.data_ptr()
    if absmax.dtype is not torch.float32 or absmax.numel() < scales:
        return None
    added = 0
    if bias is not None:
        if bias.dtype is not dtype or bias.dim() != 1 or bias.numel() != N:
            return None
        added = bias.data_ptr()
    shape[-1] = N
    return (
        A.data_ptr(), DTYPE_ID[dtype], B.data_ptr(), absmax.data_ptr(), codes, table, offset, added,
        values // K, N, K, shape,
    )  # fmt: skip


def is_int8_layer(
    is_here: str, A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float
) -> bool:
    """Whether an ``int8_linear`` need not go the long way."""
    for tensor in (A, CB, SCB, bias):
        if tensor is None:
            continue
        if (
            type(tensor) not in PLAIN_TENSORS
            or not getattr(tensor, is_here)
            or tensor.is_neg()
            or not tensor.is_contiguous()
        ):
            return False
    if A.dtype not in DTYPE_ID or CB.dtype is not torch.int8 or SCB.dtype is not torch.float32:
        return False
    columns, shape = A.shape[-1:], CB.shape
    if len(shape) != 2 or columns != shape[1:] or SCB.numel() != shape[0] or not threshold >= 0.0:
        return False
    if bias is not None and (bias.dtype not in DTYPE_ID or bias.numel() != shape[0]):
        return False
    return A.numel() > 0
