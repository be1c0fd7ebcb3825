"""The 4-bit matmul on CUDA: up to about a thousand tokens the kernels read the 4 bits themselves; for more the weight is
decoded once and torch multiplies.

Which of the two is the native library's decision (``bnb_cuda_gemm_4bit_plan``), asked once for each problem. Nothing
is kept between calls, results repeat bit for bit, and both paths may be captured into a graph.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..._native import (
    ABI,
    DTYPE_ID,
    FORMAT_ID,
    are_on_current_gpu,
    device_of,
    has_native,
    lib,
    ptr,
    stream_of,
)
from ..._ops import dequantize_4bit, dequantize_4bit_nested, gemm_4bit, gemv_4bit
from ..._ops_shortcuts import fourbit_product
from ..default.ops import linear_into

__all__ = ["_gemm_4bit_custom_max_m", "_gemm_4bit_use_custom_fn", "aligned"]

_HAS_GEMM = has_native("bnb_cuda_gemm_4bit")

# Rows up to which a fused 4-bit matmul may be chosen; 0 while there is none.
_gemm_4bit_custom_max_m: int = ABI.constants["BNB_GEMM_MOST_FUSED_ROWS"] if _HAS_GEMM and ABI else 0

_ALIGNMENT = 16  # of what the fused kernel reads in vectors
_ANY_FORMAT = next(iter(FORMAT_ID.values()), None)  # where a codebook is given


class _Fused(NamedTuple):
    """How a fused kernel computes a problem."""

    tuning: int
    workspace: int  # bytes


@lru_cache(maxsize=4096)
def _fused(device_index: int, dtype: torch.dtype, M: int, N: int, K: int, blocksize: int) -> _Fused | None:
    """The fused kernel for this problem, or None: decode the weight and multiply densely."""
    if ABI is None or M > _gemm_4bit_custom_max_m:
        return None
    device = torch.cuda.get_device_properties(device_index)
    problem = (DTYPE_ID[dtype], M, N, K, blocksize)
    tuning = lib.bnb_cuda_gemm_4bit_plan(
        *problem, 10 * device.major + device.minor, device.multi_processor_count
    )
    if tuning == ABI.constants["BNB_GEMM_DEQUANTIZE"]:
        return None
    workspace = lib.bnb_cuda_gemm_4bit_workspace(*problem, tuning, device.multi_processor_count)
    return _Fused(tuning, workspace)


def _gemm_4bit_use_custom_fn(device_index: int, dtype: torch.dtype, M: int, N: int, K: int) -> bool:
    """Whether the fused kernel multiplies this problem in blocks of 64."""
    return _fused(device_index, dtype, M, N, K, 64) is not None


def aligned(x: Tensor) -> Tensor:
    """``x`` as the kernels read it: contiguous and aligned. Copies what is not, which is cheap for activations."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def _workspace(fused: _Fused, A: Tensor) -> Tensor | None:
    return A.new_empty(fused.workspace, dtype=torch.uint8) if fused.workspace else None


def _warn_of_blocks_across_rows(K: int, blocksize: int) -> None:
    warnings.warn(
        f"The inner dimension ({K}) is not a multiple of the block size ({blocksize}): "
        "falling back to slower implementation, which decodes the whole weight",
        stacklevel=2,
    )


def _dense(A: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    linear_into(A.reshape(-1, weight.shape[1]), weight, bias, out.view(-1, weight.shape[0]))


def _gemm_4bit(
    A, B, shapeB, absmax, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset, out
):
    N, K = shapeB
    M = out.numel() // N if N else 0
    if out.numel() == 0:
        return
    absmax = absmax.contiguous()
    if absmax_8bit is not None:
        absmax_8bit, absmax_code = absmax_8bit.contiguous(), absmax_code.contiguous()
        absmax_offset = absmax_offset.float()

    fused = _fused(out.device.index, A.dtype, M, N, K, blocksize)
    B = B.contiguous()
    if fused is None or B.data_ptr() % _ALIGNMENT:
        if K % blocksize and M <= _gemm_4bit_custom_max_m:
            _warn_of_blocks_across_rows(K, blocksize)
        if absmax_8bit is None:
            weight = dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype)
        else:
            nested = (absmax, absmax_8bit, absmax_code, absmax_offset)
            weight = dequantize_4bit_nested(B, *nested, blocksize, quant_type, shapeB, A.dtype)
        _dense(A, weight, bias, out)
        return
    A = aligned(A)
    bias = None if bias is None else bias.contiguous()
    workspace = _workspace(fused, A)
    with device_of(out):
        lib.bnb_cuda_gemm_4bit(
            ptr(A),
            DTYPE_ID[A.dtype],
            ptr(B),
            ptr(absmax),
            ptr(absmax_8bit),
            ptr(absmax_code),
            ptr(absmax_offset),
            None,
            FORMAT_ID[quant_type],
            ptr(bias),
            ptr(out),
            M,
            N,
            K,
            blocksize,
            fused.tuning,
            ptr(workspace),
            stream_of(out),
        )


def _multiply_quickly(
    A, B, shapeB, absmax, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset
) -> Tensor | None:
    """``gemm_4bit`` by a fused kernel on the current device, as :meth:`Operator.shortcut` wants it."""
    product = fourbit_product(
        "is_cuda", A, B, shapeB, absmax, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset
    )
    index = A.get_device()
    tensors = (B, absmax, bias, absmax_8bit, absmax_code, absmax_offset)
    if product is None or not are_on_current_gpu(index, tensors):
        return None
    values, dtype, packed, absmax, codes, table, offset, bias, M, N, K, shape, _ = product
    fused = _fused(index, A.dtype, M, N, K, blocksize)
    if fused is None or (values | packed) % _ALIGNMENT:
        return None
    out = A.new_empty(*shape)  # sizes one by one are parsed sooner
    workspace = _workspace(fused, A)
    lib.bnb_cuda_gemm_4bit(
        values, dtype, packed, absmax, codes, table, offset, None, FORMAT_ID[quant_type], bias, out.data_ptr(),
        M, N, K, blocksize, fused.tuning, None if workspace is None else workspace.data_ptr(),
        torch._C._cuda_getCurrentRawStream(index),
    )  # fmt: skip
    return out


def _gemv_4bit(A, B, shapeB, absmax, code, blocksize, out):
    N, K = shapeB
    if out.numel() == 0:
        return
    M = out.numel() // N
    fused = _fused(out.device.index, A.dtype, M, N, K, blocksize)
    B = B.contiguous()
    if fused is None or B.data_ptr() % _ALIGNMENT:
        gemv_4bit.kernels["default"](A, B, shapeB, absmax, code, blocksize, out)
        return
    A, absmax, code = aligned(A), absmax.contiguous(), code.contiguous()
    workspace = _workspace(fused, A)
    with device_of(out):
        lib.bnb_cuda_gemm_4bit(
            ptr(A),
            DTYPE_ID[A.dtype],
            ptr(B),
            ptr(absmax),
            None,
            None,
            None,
            ptr(code),
            _ANY_FORMAT,
            None,
            ptr(out),
            M,
            N,
            K,
            blocksize,
            fused.tuning,
            ptr(workspace),
            stream_of(out),
        )


if _HAS_GEMM:
    gemm_4bit.kernel("cuda")(_gemm_4bit)
    gemm_4bit.shortcut("cuda", _multiply_quickly)
    gemv_4bit.kernel("cuda")(_gemv_4bit)
