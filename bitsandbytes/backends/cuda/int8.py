"""LLM.int8() on CUDA: native kernels, and torch's int8 product for many rows where ours is made for few.

Sums are the same integers on every path, and values are computed from them in the same order as by the default backend.
Which columns are outliers stays on the device: nothing here waits for it but `int8_vectorwise_quant`, which must return
their list.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..._native import DTYPE_ID, are_on_current_gpu, device_of, has_native, lib, ptr, stream_of
from ..._operator import PLAIN_TENSORS
from ..._ops import (
    int8_linear,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_scaled_mm,
    int8_vectorwise_quant,
)
from ..._ops_shortcuts import int8_product
from .registration import native_kernel

__all__: list[str] = []

# torch's int8 product on CUDA takes more rows than these, and multiples of the other in the other sizes.
_FEW_ROWS, _MULTIPLE = 16, 8


def _rows(A: Tensor) -> int:
    return A.shape[:-1].numel()


def _dtype_id(tensor: Tensor | None) -> Any:
    return 0 if tensor is None else DTYPE_ID[tensor.dtype]


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether the kernels know these dtypes."""
    return all(tensor is None or tensor.dtype in DTYPE_ID for tensor in tensors)


@lru_cache(maxsize=64)
def _has_own_for_many(device_index: int) -> bool:
    """Whether the device has our kernel for many rows, which beats the library's."""
    return torch.cuda.get_device_capability(device_index) == (9, 0)


def _takes_library(A: Tensor, B: Tensor) -> bool:
    N, K = B.shape
    many = _rows(A) > _FEW_ROWS and not _has_own_for_many(A.device.index)
    return many and N > 0 and K > 0 and N % _MULTIPLE == 0 and K % _MULTIPLE == 0


# --- quantization ----------------------------------------------------------------------------------------------


def _quantize(A: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(int8 rows, row absmax, flags of outlier columns or None)``; outlier elements are zero, their columns are not."""
    rows, columns = _rows(A), A.shape[-1]
    codes = torch.empty(A.shape, dtype=torch.int8, device=A.device)
    row_stats = torch.empty(rows, dtype=torch.float32, device=A.device)
    flags = torch.empty(columns, dtype=torch.uint8, device=A.device) if threshold > 0.0 else None
    with device_of(A):
        lib.bnb_cuda_int8_vectorwise_quant(
            ptr(A),
            DTYPE_ID[A.dtype],
            ptr(codes),
            ptr(row_stats),
            ptr(flags),
            rows,
            columns,
            threshold,
            stream_of(A),
        )
    return codes, row_stats, flags


@native_kernel(int8_vectorwise_quant, "bnb_cuda_int8_vectorwise_quant")
def _(A, threshold):
    if not _is_plain(A):
        return int8_vectorwise_quant.kernels["default"](A, threshold)
    codes, row_stats, flags = _quantize(A.contiguous(), threshold)
    if flags is None:
        return codes, row_stats, None
    columns = flags.nonzero().view(-1)
    if columns.numel():
        codes.index_fill_(-1, columns, 0)
    return codes, row_stats, columns


# --- products --------------------------------------------------------------------------------------------------


@native_kernel(int8_linear_matmul, "bnb_cuda_int8_linear_matmul")
def _(A, B, out):
    A, B = A.contiguous(), B.contiguous()
    (N, K), M = B.shape, _rows(A)
    if _takes_library(A, B):
        torch._int_mm(A.view(M, K), B.t(), out=out.view(M, N))
        return
    with device_of(out):
        lib.bnb_cuda_int8_linear_matmul(ptr(A), ptr(B), ptr(out), M, N, K, stream_of(out))


@native_kernel(int8_mm_dequant, "bnb_cuda_int8_mm_dequant")
def _(A, row_stats, col_stats, dtype, bias, out):
    if not _is_plain(out, bias):
        int8_mm_dequant.kernels["default"](A, row_stats, col_stats, dtype, bias, out)
        return
    A, row_stats, col_stats = A.contiguous(), row_stats.contiguous(), col_stats.contiguous()
    bias = None if bias is None else bias.contiguous()
    with device_of(out):
        lib.bnb_cuda_int8_mm_dequant(
            ptr(A),
            ptr(row_stats),
            ptr(col_stats),
            ptr(bias),
            _dtype_id(bias),
            ptr(out),
            DTYPE_ID[out.dtype],
            _rows(A),
            A.shape[-1],
            stream_of(out),
        )


@native_kernel(int8_scaled_mm, "bnb_cuda_int8_scaled_mm")
def _(A, B, row_stats, col_stats, bias, dtype, out):
    if not _is_plain(out, bias) or _takes_library(A, B):
        int8_mm_dequant.kernels["cuda"](int8_linear_matmul(A, B), row_stats, col_stats, dtype, bias, out)
        return
    A, B, row_stats, col_stats = (x.contiguous() for x in (A, B, row_stats, col_stats))
    bias = None if bias is None else bias.contiguous()
    with device_of(out):
        lib.bnb_cuda_int8_scaled_mm(
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
            stream_of(out),
        )


@native_kernel(int8_linear, "bnb_cuda_int8_linear")
def _(A, CB, SCB, bias, threshold):
    if not _is_plain(A, bias):
        return int8_linear.kernels["default"](A, CB, SCB, bias, threshold)
    A, CB, SCB = A.contiguous(), CB.contiguous(), SCB.contiguous()
    bias = None if bias is None else bias.contiguous()
    if _takes_library(A, CB):
        return _linear_by_library(A, CB, SCB, bias, threshold)
    if type(A) not in PLAIN_TENSORS:
        A = A.as_subclass(Tensor)  # whose new tensors are no subclass's
    with device_of(A):
        return _linear(A, CB, SCB, bias, threshold)


def _linear(
    A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor | None]:
    """What the kernels take as it is, on the current device."""
    (N, K), M = CB.shape, _rows(A)
    out = A.new_empty(*A.shape[:-1], N)
    flags = A.new_empty(K, dtype=torch.uint8) if threshold > 0.0 else None
    workspace = A.new_empty(_linear_workspace(M, N, K, threshold > 0.0), dtype=torch.uint8)
    lib.bnb_cuda_int8_linear(
        A.data_ptr(), DTYPE_ID[A.dtype], CB.data_ptr(), SCB.data_ptr(), ptr(bias), _dtype_id(bias), out.data_ptr(),
        ptr(flags), M, N, K, threshold, workspace.data_ptr(), stream_of(out),
    )  # fmt: skip
    return out, flags


@lru_cache(maxsize=4096)
def _linear_workspace(M: int, N: int, K: int, outliers: bool) -> int:
    return lib.bnb_cuda_int8_linear_workspace(M, N, K, float(outliers))


def _linear_quickly(A, CB, SCB, bias, threshold) -> tuple[Tensor, Tensor | None] | None:
    """``int8_linear`` by our kernels on the current device, as :meth:`Operator.shortcut` wants it."""
    if int8_product("is_cuda", A, CB, SCB, bias, threshold) is None:
        return None
    if _takes_library(A, CB) or not are_on_current_gpu(A.get_device(), (CB, SCB, bias)):
        return None
    return _linear(A, CB, SCB, bias, threshold)


if has_native("bnb_cuda_int8_linear"):
    int8_linear.shortcut("cuda", _linear_quickly)


def _linear_by_library(
    A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor | None]:
    codes, row_stats, flags = _quantize(A, threshold)
    out = int8_mm_dequant(int8_linear_matmul(codes, CB), row_stats, SCB, A.dtype, bias)
    if flags is not None:
        with device_of(out):
            lib.bnb_cuda_int8_add_outliers(
                ptr(A),
                DTYPE_ID[A.dtype],
                ptr(codes),
                ptr(row_stats),
                ptr(CB),
                ptr(SCB),
                ptr(flags),
                ptr(out),
                row_stats.numel(),
                *CB.shape,
                stream_of(out),
            )
    return out, flags
