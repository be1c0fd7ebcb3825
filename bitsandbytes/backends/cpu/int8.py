"""LLM.int8() on the CPU: native kernels, and torch's int8 product where that is faster.

Sums are the same integers on every path, and values are computed from them in the same order as by the default backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._native import ABI, DTYPE_ID, has_native, lib, ptr, threads
from ..._ops import (
    int8_double_quant,
    int8_linear,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_scaled_mm,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from ..._ops_shortcuts import Int8Numbers, int8_product
from .memory import empty
from .registration import native_kernel

__all__: list[str] = []


def _rows(A: Tensor) -> int:
    return A.shape[:-1].numel()


def _dtype_id(tensor: Tensor | None) -> Any:
    return 0 if tensor is None else DTYPE_ID[tensor.dtype]


def _flags(threshold: float, columns: int) -> Tensor | None:
    """Where a kernel marks outlier columns."""
    return empty((columns,), (1,), torch.uint8).zero_() if threshold > 0.0 else None


def _marked(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.nonzero().view(-1)


# --- quantization ----------------------------------------------------------------------------------------------


@native_kernel(int8_vectorwise_quant, "bnb_cpu_int8_vectorwise_quant")
def _(A, threshold):
    if A.dtype not in DTYPE_ID:
        return int8_vectorwise_quant.kernels["default"](A, threshold)
    A = A.contiguous()
    rows, columns = _rows(A), A.shape[-1]
    quantized = torch.empty(A.shape, dtype=torch.int8, device="cpu")
    row_stats = torch.empty(rows, dtype=torch.float32, device="cpu")
    flags = _flags(threshold, columns)
    lib.bnb_cpu_int8_vectorwise_quant(
        ptr(A),
        DTYPE_ID[A.dtype],
        ptr(quantized),
        ptr(row_stats),
        ptr(flags),
        rows,
        columns,
        threshold,
        threads(),
    )
    return quantized, row_stats, _marked(flags)


@native_kernel(int8_double_quant, "bnb_cpu_int8_double_quant")
def _(A, threshold):
    if A.dtype not in DTYPE_ID:
        return int8_double_quant.kernels["default"](A, threshold)
    A = A.contiguous()
    rows, columns = _rows(A), A.shape[-1]
    by_row, by_column = (torch.empty(A.shape, dtype=torch.int8, device="cpu") for _ in range(2))
    row_stats, col_stats = (torch.empty(n, dtype=torch.float32, device="cpu") for n in (rows, columns))
    flags = _flags(threshold, columns)
    lib.bnb_cpu_int8_double_quant(
        ptr(A),
        DTYPE_ID[A.dtype],
        ptr(by_row),
        ptr(by_column),
        ptr(row_stats),
        ptr(col_stats),
        ptr(flags),
        rows,
        columns,
        threshold,
        threads(),
    )
    outliers = torch.empty(0, dtype=torch.int64, device="cpu") if flags is None else _marked(flags)
    return by_row, by_column, row_stats, col_stats, outliers


@native_kernel(int8_vectorwise_dequant, "bnb_cpu_int8_vectorwise_dequant")
def _(A, stats, out):
    A, stats = A.contiguous(), stats.to(torch.float32).contiguous()
    lib.bnb_cpu_int8_vectorwise_dequant(ptr(A), ptr(stats), ptr(out), _rows(A), A.shape[-1], threads())


# --- products --------------------------------------------------------------------------------------------------

_ISA: bytes = lib.bnb_cpu_int8_isa() if has_native("bnb_cpu_int8_isa") else b""
_HAS_VNNI = torch.cpu._is_vnni_supported()  # without, torch's int8 product may saturate in between
_HAS_TILES = torch.cpu._is_amx_tile_supported()

# Up to so many rows our kernel is the fastest, by instruction set: benchmarking/bench_int8.py. Beyond, torch's product
# is, if a set without AMX is forced, or without VNNI the default backend's in float32.
_OWN_ROWS = {b"avx512vnni": 16 if _HAS_TILES else None, b"scalar": 0 if _HAS_VNNI else 2}

_SMALL_ROWS = 64  # below which the host's share of a call counts


def _is_ours(rows: int) -> bool:
    """Whether our kernel multiplies so many activations."""
    most = _OWN_ROWS.get(_ISA)
    return most is None or rows <= most


@native_kernel(int8_linear_matmul, "bnb_cpu_int8_linear_matmul")
def _(A, B, out):
    K = A.shape[-1]
    if _is_ours(_rows(A)):
        A, B = A.contiguous(), B.contiguous()
        lib.bnb_cpu_int8_linear_matmul(ptr(A), ptr(B), ptr(out), _rows(A), B.shape[0], K, threads())
    elif _HAS_VNNI and K > 1:  # torch takes a transposed column for a plain row
        torch._int_mm(A.reshape(-1, K), B.contiguous().t(), out=out.view(-1, B.shape[0]))
    else:
        int8_linear_matmul.kernels["default"](A, B, out)


@native_kernel(int8_mm_dequant, "bnb_cpu_int8_mm_dequant")
def _(A, row_stats, col_stats, dtype, bias, out):
    if out.dtype not in DTYPE_ID or (bias is not None and bias.dtype not in DTYPE_ID):
        int8_mm_dequant.kernels["default"](A, row_stats, col_stats, dtype, bias, out)
        return
    A, row_stats, col_stats = A.contiguous(), row_stats.contiguous(), col_stats.contiguous()
    bias = None if bias is None else bias.contiguous()
    lib.bnb_cpu_int8_mm_dequant(
        ptr(A),
        ptr(row_stats),
        ptr(col_stats),
        ptr(bias),
        _dtype_id(bias),
        ptr(out),
        DTYPE_ID[out.dtype],
        _rows(A),
        A.shape[-1],
        threads(),
    )


@native_kernel(int8_scaled_mm, "bnb_cpu_int8_scaled_mm")
def _(A, B, row_stats, col_stats, bias, dtype, out):
    plain = out.dtype in DTYPE_ID and (bias is None or bias.dtype in DTYPE_ID)
    if not plain or not _is_ours(_rows(A)):
        int8_scaled_mm.kernels["default"](A, B, row_stats, col_stats, bias, dtype, out)
        return
    A, B, row_stats, col_stats = (x.contiguous() for x in (A, B, row_stats, col_stats))
    bias = None if bias is None else bias.contiguous()
    lib.bnb_cpu_int8_scaled_mm(
        ptr(A),
        ptr(B),
        ptr(row_stats),
        ptr(col_stats),
        ptr(bias),
        _dtype_id(bias),
        ptr(out),
        DTYPE_ID[out.dtype],
        _rows(A),
        B.shape[0],
        B.shape[1],
        threads(),
    )


def _linear(
    numbers: Int8Numbers,
    A: Tensor,
    CB: Tensor,
    SCB: Tensor,
    bias: Tensor | None,
    threshold: float,
    out: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """What the kernel takes as it is, plain and contiguous."""
    dtype, bias_dtype, M, N, K = numbers
    flags = _flags(threshold, K)
    _product(
        _arguments(
            A.data_ptr(), dtype, CB.data_ptr(), SCB.data_ptr(), 0 if bias is None else bias.data_ptr(), bias_dtype,
            out.data_ptr(), 0 if flags is None else flags.data_ptr(), M, N, K, threshold, torch.get_num_threads(),
        )
    )  # fmt: skip
    return out, flags


@native_kernel(int8_linear, "bnb_cpu_int8_linear_with")
def _(A, CB, SCB, bias, threshold):
    rows, (N, K) = _rows(A), CB.shape
    plain = A.dtype in DTYPE_ID and (bias is None or bias.dtype in DTYPE_ID)
    if not plain or not _is_ours(rows):
        return int8_linear.kernels["default"](A, CB, SCB, bias, threshold)
    bias = None if bias is None else bias.contiguous()
    numbers, out = (DTYPE_ID[A.dtype], _dtype_id(bias), rows, N, K), A.new_empty(*A.shape[:-1], N)
    return _linear(numbers, A.contiguous(), CB.contiguous(), SCB.contiguous(), bias, threshold, out)


def _linear_small(A, CB, SCB, bias, threshold) -> tuple[Tensor, Tensor | None] | None:
    """``int8_linear`` of few rows, as :meth:`Operator.shortcut` wants it."""
    product = int8_product("is_cpu", A, CB, SCB, bias, threshold)
    if product is None:
        return None
    numbers, shape, strides = product
    rows = numbers[2]
    if rows >= _SMALL_ROWS or not _is_ours(rows):
        return None
    return _linear(numbers, A, CB, SCB, bias, threshold, empty(shape, strides, A.dtype))


if ABI and has_native("bnb_cpu_int8_linear_with"):
    _arguments, _product = ABI.packer("bnb_int8_linear_arguments"), lib.bnb_cpu_int8_linear_with
    int8_linear.shortcut("cpu", _linear_small)
