"""What calls past the dispatcher ask of their arguments (see :meth:`Operator.shortcut`), whatever the device.

A small layer's call consists of frames, questions to tensors and arguments of native functions: of each the fewest. The
conditions are those of the operators' checks, and that a kernel can read the tensors as they are. They depend on what
kind of tensors these are and on nothing in them, so a call like an earlier one is only asked whether it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._alike import comparison_with
from ._formats.table import BLOCKSIZES, NESTED_BLOCKSIZE, STORAGE_DTYPES
from ._native import DTYPE_ID, FORMAT_ID
from ._operator import PLAIN_TENSORS

__all__ = ["Int8Numbers", "fourbit_product", "int8_product"]

Sizes = tuple[int, ...]

# Of A the bnb_dtype and the number of rows; of the result, which is contiguous, shape and strides.
FourbitKind = tuple[int, int, Sizes, Sizes]

# A gemm_4bit in numbers: addresses, of which 0 is none, with bnb_dtype after the first, M, N and K; and the result's shape
# and strides.
# (A, dtype, packed, absmax, absmax_8bit, absmax_code, absmax_offset, bias, M, N, K, shape, strides)
FourbitProduct = tuple[int, int, int, int, int, int, int, int, int, int, int, Sizes, Sizes]

# An int8_linear: bnb_dtype of A and of the bias, or 0; M, N and K.
Int8Numbers = tuple[int, int, int, int, int]
Int8Product = tuple[Int8Numbers, Sizes, Sizes]  # with shape and strides of the result

# Calls that needed no long way: by the arguments that are no tensors, some of what A is and how many tensors there are, a
# function that says whether tensors are like theirs, and what follows. No tensor is in here, and nothing of one layer alone.
_KNOWN: dict[tuple, tuple[Callable[..., bool], Any]] = {}
_MOST_KNOWN = 1024  # a kilobyte each; what is beyond were inputs of ever new shapes


def _remember(key: tuple, tensors: tuple[Tensor, ...], found: Any) -> None:
    are_alike = comparison_with(tensors)
    if are_alike is not None:
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = are_alike, found


def _are_readable(tensors: tuple[Tensor, ...], is_here: str) -> bool:
    """Whether all are on the device, none is missing, and a kernel can read them as they are."""
    for tensor in tensors:
        if (
            type(tensor) not in PLAIN_TENSORS
            or not getattr(tensor, is_here)
            or not tensor.is_contiguous()
            or tensor.is_neg()
        ):
            return False
    return True


def _result(A: Tensor, N: int) -> tuple[Sizes, Sizes]:
    """Shape and strides of a product of ``A`` with ``N`` columns."""
    shape, strides = (*A.shape[:-1], N), [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * max(size, 1))
    return shape, tuple(reversed(strides))


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
    if len(shapeB) != 2:
        return None
    N, K = shapeB
    tensors: tuple = (A, B, absmax) if bias is None else (A, B, absmax, bias)
    if absmax_8bit is not None:
        tensors = (*tensors, absmax_8bit, absmax_code, absmax_offset)
    elif absmax_code is not None or absmax_offset is not None:
        return None
    # How many tensors there are says which they are. Layers of one model may alternate in dtype and device.
    key = (is_here, A.get_device(), A.dtype, A.shape, N, K, blocksize, quant_type, len(tensors))
    try:
        known = _KNOWN.get(key)
    except TypeError:  # a symbolic size, or what the operator does not take
        return None
    if known is not None and known[0](*tensors):
        kind = known[1]
    else:
        kind = _fourbit_kind(is_here, tensors, bias, N, K, blocksize, quant_type)
        if kind is None:
            return None
        _remember(key, tensors, kind)
    dtype, M, shape, strides = kind
    codes = table = offset = 0
    if absmax_8bit is not None:
        codes, table, offset = absmax_8bit.data_ptr(), absmax_code.data_ptr(), absmax_offset.data_ptr()  # type: ignore[union-attr]
    return (
        A.data_ptr(), dtype, B.data_ptr(), absmax.data_ptr(), codes, table, offset,
        0 if bias is None else bias.data_ptr(), M, N, K, shape, strides,
    )  # fmt: skip


def _fourbit_kind(
    is_here: str,
    tensors: tuple[Tensor, ...],
    bias: Tensor | None,
    N: int,
    K: int,
    blocksize: int,
    quant_type: str,
) -> FourbitKind | None:
    """Every question that the check of ``gemm_4bit`` asks; ``tensors`` has ``bias`` fourth, if at all."""
    if not _are_readable(tensors, is_here):
        return None
    A, B, absmax, *rest = tensors
    dtype, values = A.dtype, A.numel()
    if quant_type not in FORMAT_ID or dtype not in DTYPE_ID or blocksize not in BLOCKSIZES:
        return None
    if A.shape[-1:] != (K,) or not values:
        return None
    if B.dtype not in STORAGE_DTYPES or B.nbytes < (N * K + 1) // 2:
        return None
    if bias is not None and (bias.dtype is not dtype or bias.dim() != 1 or bias.numel() != N):
        return None
    scales = -(N * K // -blocksize)
    nested = rest if bias is None else rest[1:]
    if nested:
        absmax_8bit, code, offset = nested
        if absmax_8bit.dtype is not torch.uint8 or absmax_8bit.dim() != 1 or absmax_8bit.numel() < scales:
            return None
        if code.dtype is not torch.float32 or code.numel() != 256:
            return None
        if offset.dtype is not torch.float32 or offset.numel() != 1:
            return None
        scales = -(scales // -NESTED_BLOCKSIZE)
    if absmax.dtype is not torch.float32 or absmax.numel() < scales:
        return None
    return DTYPE_ID[dtype], values // K, *_result(A, N)


def int8_product(
    is_here: str, A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float
) -> Int8Product | None:
    """An ``int8_linear``, or None where it must go the long way."""
    if not threshold >= 0.0:
        return None
    tensors = (A, CB, SCB) if bias is None else (A, CB, SCB, bias)
    key = (is_here, A.get_device(), A.dtype, A.shape, getattr(CB, "shape", None), len(tensors))
    try:
        known = _KNOWN.get(key)
    except TypeError:  # a symbolic size
        return None
    if known is not None and known[0](*tensors):
        return known[1]
    product = _int8_product(is_here, tensors, bias)
    if product is not None:
        _remember(key, tensors, product)
    return product


def _int8_product(is_here: str, tensors: tuple[Tensor, ...], bias: Tensor | None) -> Int8Product | None:
    """Every question that the check of ``int8_linear`` asks."""
    if not _are_readable(tensors, is_here):
        return None
    A, CB, SCB, *_ = tensors
    if A.dtype not in DTYPE_ID or CB.dtype is not torch.int8 or SCB.dtype is not torch.float32:
        return None
    shape, values = CB.shape, A.numel()
    if len(shape) != 2 or A.shape[-1:] != shape[1:] or SCB.numel() != shape[0] or not values:
        return None
    if bias is not None and (bias.dtype not in DTYPE_ID or bias.numel() != shape[0]):
        return None
    N, K = shape
    added = 0 if bias is None else DTYPE_ID[bias.dtype]
    return (DTYPE_ID[A.dtype], added, values // K, N, K), *_result(A, N)
