"""Native CUDA kernels, registered only where the loaded library has them; the default backend serves the rest.

Kernels run on the tensor's device and the caller's current stream, allocate nothing and may be captured into a graph.
They read plain contiguous memory, so strided inputs are copied first.
"""

from __future__ import annotations

from ..._formats.table import BLOCKSIZES
from ..._native import DTYPE_ID, FORMAT_ID, device_of, lib, ptr, stream_of
from ..._ops import (
    dequantize_4bit,
    dequantize_4bit_nested,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)
from .gemm_4bit import _gemm_4bit_custom_max_m, _gemm_4bit_use_custom_fn
from .registration import native_kernel

__all__ = ["_gemm_4bit_custom_max_m", "_gemm_4bit_use_custom_fn"]

# What the quantization kernels are compiled for; the default backend takes any block size.
_BLOCKSIZES = frozenset(BLOCKSIZES)


@native_kernel(quantize_4bit, "bnb_cuda_quantize_4bit")
def _(A, blocksize, quant_type, quant_storage, packed, absmax):
    A = A.contiguous()
    with device_of(A):
        lib.bnb_cuda_quantize_4bit(
            ptr(A),
            DTYPE_ID[A.dtype],
            FORMAT_ID[quant_type],
            ptr(packed),
            ptr(absmax),
            A.numel(),
            blocksize,
            stream_of(A),
        )


@native_kernel(quantize_blockwise, "bnb_cuda_quantize_blockwise")
def _(A, code, blocksize, codes, absmax):
    if blocksize not in _BLOCKSIZES:
        return quantize_blockwise.kernels["default"](A, code, blocksize, codes, absmax)
    A, code = A.contiguous(), code.contiguous()
    with device_of(A):
        lib.bnb_cuda_quantize_blockwise(
            ptr(code), ptr(A), DTYPE_ID[A.dtype], ptr(codes), ptr(absmax), A.numel(), blocksize, stream_of(A)
        )


@native_kernel(dequantize_4bit, "bnb_cuda_dequantize_4bit")
def _(A, absmax, blocksize, quant_type, shape, dtype, out):
    A, absmax = A.contiguous(), absmax.contiguous()
    with device_of(out):
        lib.bnb_cuda_dequantize_4bit(
            ptr(A),
            ptr(absmax),
            FORMAT_ID[quant_type],
            ptr(out),
            DTYPE_ID[dtype],
            out.numel(),
            blocksize,
            stream_of(out),
        )


@native_kernel(dequantize_4bit_nested, "bnb_cuda_dequantize_4bit_nested")
def _(A, absmax, absmax_8bit, absmax_code, absmax_offset, blocksize, quant_type, shape, dtype, out):
    A, absmax, absmax_8bit = A.contiguous(), absmax.contiguous(), absmax_8bit.contiguous()
    absmax_code, absmax_offset = absmax_code.contiguous(), absmax_offset.float()
    with device_of(out):
        lib.bnb_cuda_dequantize_4bit_nested(
            ptr(A),
            ptr(absmax),
            ptr(absmax_8bit),
            ptr(absmax_code),
            ptr(absmax_offset),
            FORMAT_ID[quant_type],
            ptr(out),
            DTYPE_ID[dtype],
            out.numel(),
            blocksize,
            stream_of(out),
        )


@native_kernel(dequantize_blockwise, "bnb_cuda_dequantize_blockwise")
def _(A, absmax, code, blocksize, dtype, out):
    A, absmax, code = A.contiguous(), absmax.contiguous(), code.contiguous()
    with device_of(out):
        lib.bnb_cuda_dequantize_blockwise(
            ptr(code), ptr(A), ptr(absmax), ptr(out), DTYPE_ID[dtype], out.numel(), blocksize, stream_of(out)
        )
