"""The LLM.int8() operators; part of ``_ops.py``, which imports them."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ._checks import ArgumentError, check_dtype, check_same_device, require
from ._operator import Result, operator

__all__ = [
    "int8_double_quant",
    "int8_linear",
    "int8_linear_matmul",
    "int8_mixed_scaled_mm",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
]


def _new_size() -> Any:
    """A size that only the data knows, under tracing."""
    return torch.library.get_ctx().new_dynamic_size()


def _check_activations(A: Tensor) -> None:
    if not A.is_floating_point():
        raise ArgumentError(f"A must be a floating point tensor, got {A.dtype}")
    if A.dim() < 1:
        raise ArgumentError("A must have at least one dimension, got a 0-dim tensor")


def _rows(A: Tensor) -> Any:
    return prod(A.shape[:-1])


def _fake_int8_vectorwise_quant(A, threshold=0.0):
    _check_int8_vectorwise_quant(A, threshold)
    outliers = None if threshold == 0.0 else A.new_empty((_new_size(),), dtype=torch.int64)
    return A.new_empty(A.shape, dtype=torch.int8), A.new_empty((_rows(A),), dtype=torch.float32), outliers


def _check_int8_vectorwise_quant(A: Tensor, threshold=0.0) -> None:
    _check_activations(A)
    if threshold < 0.0:
        raise ArgumentError(f"threshold must be non-negative, got {threshold}")


@operator(
    "int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    fake=_fake_int8_vectorwise_quant,
)
def int8_vectorwise_quant(A: Tensor, threshold=0.0):
    """``(int8 like A, row absmax [rows], outlier columns or None)``; outlier columns are zero in the int8 rows."""
    _check_int8_vectorwise_quant(A, threshold)


@operator("int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor")
def int8_vectorwise_dequant(A: Tensor, stats: Tensor):
    """``A * stats / 127`` row by row, in float32."""
    check_dtype(A, torch.int8, "A")
    check_same_device(A, stats=stats)
    require(A.dim() >= 1, "A must have at least one dimension, got a 0-dim tensor")
    if stats.numel() != _rows(A):
        raise ArgumentError(f"stats must have one value for each of A's {_rows(A)} rows, got {stats.numel()}")
    return Result(A.shape, torch.float32)


def _fake_int8_double_quant(A, threshold=0.0):
    _check_int8_vectorwise_quant(A, threshold)
    return (
        A.new_empty(A.shape, dtype=torch.int8),
        A.new_empty(A.shape, dtype=torch.int8),
        A.new_empty((_rows(A),), dtype=torch.float32),
        A.new_empty((A.shape[-1],), dtype=torch.float32),
        A.new_empty((_new_size(),), dtype=torch.int64),
    )


@operator(
    "int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    fake=_fake_int8_double_quant,
)
def int8_double_quant(A: Tensor, threshold=0.0):
    """``(int8 by row, int8 by column, row absmax, column absmax, outlier columns)``."""
    _check_int8_vectorwise_quant(A, threshold)


@operator("int8_linear_matmul(Tensor A, Tensor B) -> Tensor", out=True)
def int8_linear_matmul(A: Tensor, B: Tensor):
    """``A @ B.T`` exactly, int8 to int32; ``A [..., K]``, ``B [N, K]``."""
    check_dtype(A, torch.int8, "A")
    check_dtype(B, torch.int8, "B")
    check_same_device(A, B=B)
    if A.dim() < 1 or B.dim() != 2:
        raise ArgumentError(f"Only two dimensional matrices are supported for B, got {B.dim()} dimensions")
    if A.shape[-1] != B.shape[1]:
        raise ArgumentError(f"Inner dimensions do not match: A has {A.shape[-1]}, B has {B.shape[1]}")
    return Result((*A.shape[:-1], B.shape[0]), torch.int32)


def _check_scales(
    A: Tensor, rows, columns, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None
) -> None:
    check_dtype(row_stats, torch.float32, "row_stats")
    check_dtype(col_stats, torch.float32, "col_stats")
    check_same_device(A, row_stats=row_stats, col_stats=col_stats, bias=bias)
    if row_stats.numel() != rows:
        raise ArgumentError(f"row_stats must have {rows} values, one a row of A, got {row_stats.numel()}")
    if col_stats.numel() != columns:
        raise ArgumentError(
            f"col_stats must have {columns} values, one a column of the product, got {col_stats.numel()}"
        )
    if bias is not None and bias.numel() != columns:
        raise ArgumentError(f"bias must have {columns} values, got {bias.numel()}")


@operator(
    "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor"
)
def int8_mm_dequant(A: Tensor, row_stats: Tensor, col_stats: Tensor, dtype=None, bias=None):
    """Scale an int32 product by ``row_stats * col_stats / 127**2``, add the bias, round once to ``dtype``."""
    check_dtype(A, torch.int32, "A")
    require(A.dim() >= 1, "A must have at least one dimension, got a 0-dim tensor")
    _check_scales(A, _rows(A), A.shape[-1], row_stats, col_stats, bias)
    return Result(A.shape, dtype or torch.float16)


@operator(
    "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor"
)
def int8_scaled_mm(A: Tensor, B: Tensor, row_stats: Tensor, col_stats: Tensor, bias=None, dtype=None):
    """:func:`int8_linear_matmul` followed by :func:`int8_mm_dequant`."""
    shape, _ = int8_linear_matmul.check(A, B)
    _check_scales(A, _rows(A), B.shape[0], row_stats, col_stats, bias)
    return Result(shape, dtype or torch.float16)


def _fake_int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, outlier_cols=None, bias=None):
    _check_int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, outlier_cols, bias)
    return A.new_empty((*CA.shape[:-1], CB.shape[0])), A.new_empty((*A.shape[:-1], _new_size()))


def _check_int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, outlier_cols=None, bias=None) -> None:
    int8_linear_matmul.check(CA, CB)
    _check_scales(CA, _rows(CA), CB.shape[0], SCA, SCB, bias)
    check_same_device(A, CA=CA, outlier_cols=outlier_cols)
    if tuple(A.shape) != tuple(CA.shape):
        raise ArgumentError(f"A and CA must have the same shape, got {tuple(A.shape)} and {tuple(CA.shape)}")


@operator(
    "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
    "Tensor? bias=None) -> (Tensor, Tensor?)",
    fake=_fake_int8_mixed_scaled_mm,
)
def int8_mixed_scaled_mm(
    A: Tensor, CA: Tensor, CB: Tensor, SCA: Tensor, SCB: Tensor, outlier_cols=None, bias=None
):
    """``(product, A's outlier columns)``: outlier columns in A's dtype, everything else in int8."""
    _check_int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, outlier_cols, bias)


def _fake_int8_linear(A, CB, SCB, bias=None, threshold=0.0):
    _check_int8_linear(A, CB, SCB, bias, threshold)
    flags = A.new_empty((A.shape[-1],), dtype=torch.uint8) if threshold else None
    return A.new_empty((*A.shape[:-1], CB.shape[0])), flags


def _check_int8_linear(A: Tensor, CB: Tensor, SCB: Tensor, bias=None, threshold=0.0) -> None:
    _check_int8_vectorwise_quant(A, threshold)
    check_dtype(CB, torch.int8, "CB")
    check_dtype(SCB, torch.float32, "SCB")
    check_same_device(A, CB=CB, SCB=SCB, bias=bias)
    shape = CB.shape
    if len(shape) != 2 or A.shape[-1] != shape[1]:
        raise ArgumentError(f"CB must be [N, {A.shape[-1]}], as A's last dimension, got {tuple(shape)}")
    for name, values in (("SCB", SCB), ("bias", bias)):
        if values is not None and values.numel() != shape[0]:
            raise ArgumentError(f"{name} must have {shape[0]} values, one a row of CB, got {values.numel()}")


@operator(
    "int8_linear(Tensor A, Tensor CB, Tensor SCB, Tensor? bias=None, float threshold=0.0) -> (Tensor, Tensor?)",
    fake=_fake_int8_linear,
)
def int8_linear(A: Tensor, CB: Tensor, SCB: Tensor, bias=None, threshold=0.0):
    """``(product in A's dtype, flags of outlier columns or None)``: A quantized on the way, otherwise as the two above.

    Flags are uint8 ``[K]``, 1 for an outlier column: a list would have a length that only the data knows.
    """
    _check_int8_linear(A, CB, SCB, bias, threshold)
