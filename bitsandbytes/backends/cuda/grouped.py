"""Grouped 4-bit products by the native CUDA kernels: one launch, no temporaries, and no waiting for the device.

Which rows are whose is read on the device, so everything may be captured into a graph.
"""

from __future__ import annotations

from ..._native import DTYPE_ID, FORMAT_ID, device_of, has_native, lib, ptr, stream_of
from ..._ops import gemm_4bit_grouped, gemm_4bit_grouped_transposed
from .gemm_4bit import aligned

__all__: list[str] = []


def _operands(A, B, absmax, quant_type, offsets, nested):
    """What the native functions take first, up to the offsets; and the tensors themselves, to be kept until then."""
    absmax_8bit, absmax_code, absmax_offset = nested
    if absmax_8bit is not None:
        nested = (absmax_8bit.contiguous(), absmax_code.contiguous(), absmax_offset.float())
    A, tensors = aligned(A), (B.contiguous(), absmax.contiguous(), *nested)
    offsets = offsets.contiguous()
    pointers = (ptr(A), DTYPE_ID[A.dtype], *map(ptr, tensors), FORMAT_ID[quant_type], ptr(offsets))
    return pointers, (A, offsets, *tensors)


def _gemm_4bit_grouped(
    A, B, shapeB, absmax, blocksize, quant_type, offsets, bias, absmax_8bit, absmax_code, absmax_offset, out
):  # fmt: skip
    if out.numel() == 0:
        return
    nested = (absmax_8bit, absmax_code, absmax_offset)
    operands, _held = _operands(A, B, absmax, quant_type, offsets, nested)
    bias = None if bias is None else bias.contiguous()
    sizes = (shapeB[0], A.shape[0], *shapeB[1:])
    with device_of(out):
        lib.bnb_cuda_gemm_4bit_grouped(*operands, ptr(bias), ptr(out), *sizes, blocksize, stream_of(out))


def _gemm_4bit_grouped_transposed(
    A, B, shapeB, absmax, blocksize, quant_type, offsets, absmax_8bit, absmax_code, absmax_offset, out
):  # fmt: skip
    if out.numel() == 0:
        return
    nested = (absmax_8bit, absmax_code, absmax_offset)
    operands, _held = _operands(A, B, absmax, quant_type, offsets, nested)
    sizes = (shapeB[0], A.shape[0], *shapeB[1:])
    with device_of(out):
        lib.bnb_cuda_gemm_4bit_grouped_transposed(*operands, ptr(out), *sizes, blocksize, stream_of(out))


if has_native("bnb_cuda_gemm_4bit_grouped"):
    gemm_4bit_grouped.kernel("cuda")(_gemm_4bit_grouped)
    gemm_4bit_grouped_transposed.kernel("cuda")(_gemm_4bit_grouped_transposed)
