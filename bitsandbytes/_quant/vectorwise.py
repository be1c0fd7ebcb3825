"""The first generation of int8 matmuls: vector-wise quantization in its variants, statistics, layout-aware products.

``_quant/int8.py`` replaced these. They are plain torch on any device; everything is computed in float32, and a vector
of zeros quantizes to zeros.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from .deprecation import deprecated
from .layouts import State, from_layout, to_layout
from .sparse import COOSparseTensor

__all__ = [
    "dequant_min_max",
    "double_quant",
    "get_colrow_absmax",
    "get_row_absmax",
    "igemmlt",
    "mm_dequant",
    "vectorwise_dequant",
    "vectorwise_mm_dequant",
    "vectorwise_quant",
]

_LARGEST = 127.0
_TRUNCATION = 0.7  # of the largest magnitude, for "truncated-vector"
_INT8_FUNCTIONS = "Use the int8_* functions instead."


def _to_int8(values: Tensor, largest: Tensor) -> Tensor:
    scale = torch.where(largest > 0, _LARGEST / largest, torch.zeros_like(largest))
    return (values * scale).round().clamp(-_LARGEST, _LARGEST).nan_to_num(0.0).to(torch.int8)


def _zeropoint(values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """``values`` on a grid of 256 steps between ``low`` and ``high``, and the steps per unit."""
    extent = high - low
    steps = 255.0 / torch.where(extent == 0, torch.ones_like(extent), extent)
    zero = torch.round(low * steps)
    return torch.round(values * steps - zero) + zero, steps


def quantize_vectors(x: Tensor, dim: int, quant_type: str) -> tuple[Tensor, Tensor] | None:
    values = x.float()
    if quant_type in ("vector", "row"):
        largest = values.abs().amax(dim=dim, keepdim=True)
        return _to_int8(values, largest), largest
    if quant_type == "linear":
        largest = values.abs().max()
        return _to_int8(values, largest), largest
    if quant_type == "truncated-vector":
        largest = values.abs().amax(dim=dim, keepdim=True) * _TRUNCATION
        return _to_int8(values, largest), largest
    if quant_type == "zeropoint":
        return _zeropoint(values, values.min(), values.max())
    if quant_type in ("vector-zeropoint", "row-zeropoint"):
        return _zeropoint(values, values.amin(dim=dim, keepdim=True), values.amax(dim=dim, keepdim=True))
    return None


def dequantize_product(
    xq: Tensor, S1: Tensor, S2: Tensor, dtype: torch.dtype, quant_type: str
) -> Tensor | None:
    values = xq.float()
    S1, S2 = (_drop_batch(scale.float(), values) for scale in (S1, S2))
    if quant_type in ("vector", "truncated-vector"):
        return (values * (S1 / _LARGEST) * (S2 / _LARGEST)).to(dtype)
    if quant_type in ("linear", "row"):
        return (values * (S1 * S2 / (_LARGEST * _LARGEST))).to(dtype)
    if quant_type in ("zeropoint", "row-zeropoint"):
        return (values * (1.0 / (S1 * S2))).to(dtype)
    if quant_type == "vector-zeropoint":
        return (values * (1.0 / S1) * (1.0 / S2.transpose(-1, -2))).to(dtype)
    return None


def _drop_batch(scale: Tensor, values: Tensor) -> Tensor:
    return scale.squeeze(0) if values.dim() == 2 and scale.dim() == 3 else scale


@deprecated(_INT8_FUNCTIONS)
def vectorwise_quant(x: Tensor, dim: int = 1, quant_type: str = "vector") -> tuple[Tensor, Tensor] | None:
    """Quantize along ``dim``.

    ====================================  ===================================================================
    ``quant_type``                        result
    ====================================  ===================================================================
    ``vector``, ``row``                   int8, largest magnitude of each vector (kept dimension)
    ``linear``                            int8, largest magnitude of the tensor (0-dim)
    ``truncated-vector``                  int8, 0.7 times the largest magnitude; what lies beyond is clipped
    ``zeropoint``                         float32 on a grid of 256 steps over the range, steps per unit
    ``vector-zeropoint``, ``row-…``       the same for each vector
    anything else                         None
    ====================================  ===================================================================
    """
    return quantize_vectors(x, dim, quant_type)


@deprecated(_INT8_FUNCTIONS)
def vectorwise_mm_dequant(
    xq: Tensor, S1: Tensor, S2: Tensor, dtype: torch.dtype = torch.half, quant_type: str = "vector"
) -> Tensor | None:
    """Scale the product of two matrices that :func:`vectorwise_quant` quantized; None for an unknown type.

    Args:
        xq: the product, ``[..., M, N]``.
        S1: scales of the left operand, ``[..., M, 1]``, or one for all.
        S2: scales of the right operand, ``[1, N]`` (``[N, 1]`` for ``vector-zeropoint``), or one for all.
    """
    return dequantize_product(xq, S1, S2, dtype, quant_type)


@deprecated(_INT8_FUNCTIONS)
def vectorwise_dequant(xq: Tensor, max1: Tensor, quant_type: str = "vector") -> Tensor | None:
    """``xq / 127 * max1`` in float32; None unless ``quant_type`` is ``"vector"``."""
    return xq.float() / _LARGEST * max1.float() if quant_type == "vector" else None


@deprecated("Asymmetric int8 products are no longer made.")
def dequant_min_max(
    xq: Tensor, A: Tensor, B: Tensor, SA: tuple[Tensor, Tensor], SB: Tensor, dtype: torch.dtype = torch.half
) -> Tensor:
    """Scale the product of an asymmetrically quantized left operand and a vector-wise quantized right one.

    Args:
        xq: int32 ``[M, N]``, product of the two int8 matrices.
        A: unused.
        B: the real right operand, ``[N, K]``.
        SA: ``(minimum, half of the range)`` of each row of the left operand, which is
            ``minimum + half + q * half / 127``.
        SB: largest magnitude of each row of ``B``, ``[1, N]``.
    """
    low, half = SA
    values = xq.float()
    offset = B.float().sum(dim=1) * (low + half)
    return (values * (_drop_batch(SB, values) / _LARGEST) * (half / _LARGEST) + offset).to(dtype)


def _masked_magnitudes(A: Tensor, threshold: float) -> tuple[Tensor, Tensor | None]:
    if not A.is_floating_point():
        raise ValueError(f"A must be a floating point tensor, got {A.dtype}")
    magnitudes = A.abs().reshape(-1, A.shape[-1])
    if threshold <= 0.0:
        return magnitudes.float(), None
    outliers = magnitudes >= threshold
    return magnitudes.float().masked_fill_(outliers, 0.0), outliers


@deprecated(_INT8_FUNCTIONS)
def get_colrow_absmax(
    A: Tensor,
    row_stats: Tensor | None = None,
    col_stats: Tensor | None = None,
    nnz_block_ptr: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(row absmax, column absmax, outlier mask)``, float32; magnitudes of at least ``threshold`` do not count.

    Statistics that are given are returned as they are. The mask ``[rows, columns]`` is None without a threshold.
    """
    magnitudes, outliers = _masked_magnitudes(A, threshold)
    row_stats = magnitudes.amax(dim=1) if row_stats is None else row_stats
    col_stats = magnitudes.amax(dim=0) if col_stats is None else col_stats
    return row_stats, col_stats, outliers


@deprecated(_INT8_FUNCTIONS)
def get_row_absmax(A: Tensor, threshold: float = 0.0) -> Tensor:
    """Row absmax, float32; magnitudes of at least ``threshold`` do not count."""
    return _masked_magnitudes(A, threshold)[0].amax(dim=1)


@deprecated("Use int8_double_quant instead.")
def double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, COOSparseTensor | None]:
    """``int8_double_quant`` with the outliers themselves as a sparse matrix; None without a threshold.

    Raises:
        ValueError: a pre-allocated argument was given.
    """
    for name, given in (
        ("col_stats", col_stats),
        ("row_stats", row_stats),
        ("out_col", out_col),
        ("out_row", out_row),
    ):
        if given is not None:
            raise ValueError(f"{name} must be None: results are always allocated")
    by_row, by_column, rows, columns, _ = torch.ops.bitsandbytes.int8_double_quant(A, threshold)
    if threshold <= 0.0:
        return by_row, by_column, rows, columns, None
    matrix = A.reshape(-1, A.shape[-1])
    rowidx, colidx = (matrix.abs() >= threshold).nonzero(as_tuple=True)
    values = matrix[rowidx, colidx].to(torch.float16)
    height, width = matrix.shape
    outliers = COOSparseTensor(height, width, values.numel(), rowidx.int(), colidx.int(), values)
    return by_row, by_column, rows, columns, outliers


@deprecated("Use int8_linear_matmul instead.")
def igemmlt(
    A: Tensor,
    B: Tensor,
    SA: State,
    SB: State,
    out: Tensor | None = None,
    Sout: State | None = None,
    dtype: torch.dtype = torch.int32,
) -> tuple[Tensor, State]:
    """``A @ B.T`` of int8 matrices in the layouts and of the logical shapes that ``SA`` and ``SB`` tell.

    Returns:
        ``(int32 product, (shape, layout))`` in the layout of ``Sout`` if given, else row-major when ``A`` is, else
        ``col32``. ``dtype`` is ignored.
    """
    (shape, order), (shape_b, order_b) = SA, SB
    left = from_layout(A, order, (prod(shape[:-1]), shape[-1]))
    product = torch.ops.bitsandbytes.int8_linear_matmul(left, from_layout(B, order_b, tuple(shape_b)))
    logical = torch.Size((*shape[:-1], shape_b[0]))
    order_out = Sout[1] if Sout is not None else ("row" if order == "row" else "col32")
    result = product.view(logical) if order_out == "row" else to_layout(product, order_out)
    if out is not None:
        result = out.copy_(result.view(out.shape))
    return result, (logical, order_out)


@deprecated("Use int8_mm_dequant instead.")
def mm_dequant(
    A: Tensor,
    quant_state: State,
    row_stats: Tensor,
    col_stats: Tensor,
    out: Tensor | None = None,
    new_row_stats: Tensor | None = None,
    new_col_stats: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Scale the int32 product that :func:`igemmlt` returned (``quant_state`` is its second result) to float16.

    ``new_row_stats`` and ``new_col_stats`` receive the row and column absmax of the result.
    """
    shape, order = quant_state
    product = from_layout(A, order, (prod(shape[:-1]), shape[-1]))
    result = torch.ops.bitsandbytes.int8_mm_dequant(product, row_stats, col_stats, torch.float16, bias)
    if new_row_stats is not None:
        new_row_stats.copy_(result.abs().amax(dim=1))
    if new_col_stats is not None:
        new_col_stats.copy_(result.abs().amax(dim=0))
    result = result.view(shape)
    return result if out is None else out.copy_(result)
