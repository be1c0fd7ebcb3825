"""The LLM.int8() functions (Dettmers et al., "LLM.int8()", 2022): row-wise int8 with outlier columns kept apart.

Statistics are absolute maxima: ``value ~ int8 * absmax / 127``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from .._checks import ArgumentError, check_dtype

__all__ = [
    "C",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
]

C = 127.0


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize the rows of ``A [..., K]`` (float16, bfloat16 or float32) to int8.

    With ``threshold > 0``, elements of at least that magnitude are outliers: they do not count in their row's
    absmax, and every column that holds one is zero in the result.

    Returns ``(int8 like A, float32 absmax [rows], int64 outlier columns, ascending)``; the last is None without a
    threshold. A row of zeros gives zeros.

    Raises:
        ValueError: ``A`` is not floating point or ``threshold`` is negative.
    """
    return _ops.int8_vectorwise_quant(A.detach(), threshold)


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """``A * stats / 127`` for int8 rows and their float32 absmax; float32.

    Raises:
        ValueError: ``A`` is not int8 or ``stats`` does not have one value a row.
    """
    return _ops.int8_vectorwise_dequant(A, stats)


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantize ``A [..., K]`` to int8 by rows and by columns.

    Returns ``(int8 by row, int8 by column, row absmax, column absmax, outlier columns)``. Outlier columns are zero in
    the first result; in the second, outlier elements are.

    Raises:
        ValueError: one of the older pre-allocated arguments is not None, or ``A`` is not floating point.
    """
    given = {"col_stats": col_stats, "row_stats": row_stats, "out_col": out_col, "out_row": out_row}
    for name, tensor in given.items():
        if tensor is not None:
            raise ArgumentError(f"{name} must be None: results are allocated by int8_double_quant")
    return _ops.int8_double_quant(A.detach(), threshold)


def int8_linear_matmul(
    A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32
) -> Tensor:
    """``A @ B.T`` for int8 ``A [..., K]`` and ``B [N, K]``, exact in int32. ``dtype`` has no effect.

    Raises:
        ValueError: an argument is not int8, shapes do not match, or ``out`` is not int32 of the result's shape.
    """
    if out is None:
        return _ops.int8_linear_matmul(A, B)
    check_dtype(out, torch.int32, "out")
    torch.ops.bitsandbytes.int8_linear_matmul.out(A, B, out)
    return out


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Turn an int32 product into float16: ``A * row_stats * col_stats / 127**2 + bias``, rounded once.

    Raises:
        ValueError: ``A`` is not int32, or the statistics are not float32 with one value a row and a column.
    """
    result = _ops.int8_mm_dequant(A, row_stats, col_stats, None, bias)
    return result if out is None else out.copy_(result)
