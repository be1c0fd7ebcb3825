"""Grouped 4-bit products on the CPU: the native kernels of one weight, expert after expert, on slices of the stack.

An expert is a whole number of blocks of at least 32 values, so its bytes are as aligned as those of the stack.
"""

from __future__ import annotations

from ..._ops import gemm_4bit, gemm_4bit_grouped, gemm_4bit_grouped_transposed, gemm_4bit_transposed
from ..default.grouped import Stack, rows_of_experts
from .registration import native_kernel

__all__: list[str] = []


@native_kernel(gemm_4bit_grouped, "bnb_cpu_gemm_4bit")
def _(
    A,
    B,
    shapeB,
    absmax,
    blocksize,
    quant_type,
    offsets,
    bias,
    absmax_8bit,
    absmax_code,
    absmax_offset,
    out,
):
    stack, end = Stack.of(B, shapeB, absmax, blocksize, (absmax_8bit, absmax_code, absmax_offset)), 0
    multiply, shape = gemm_4bit.kernels["cpu"], shapeB[1:]
    for expert, rows in rows_of_experts(offsets, A.shape[0]):
        scales, nested = stack.statistics_of(expert)
        own_bias = None if bias is None else bias[expert]
        weight = (stack.bytes_of(expert), shape, scales, blocksize, quant_type)
        multiply(A[rows], *weight, own_bias, *nested, out[rows])
        end = rows.stop
    out[end:].zero_()


@native_kernel(gemm_4bit_grouped_transposed, "bnb_cpu_gemm_4bit_transposed")
def _(
    A, B, shapeB, absmax, blocksize, quant_type, offsets, absmax_8bit, absmax_code, absmax_offset, out
):  # fmt: skip
    stack, end = Stack.of(B, shapeB, absmax, blocksize, (absmax_8bit, absmax_code, absmax_offset)), 0
    multiply, shape = gemm_4bit_transposed.kernels["cpu"], shapeB[1:]
    for expert, rows in rows_of_experts(offsets, A.shape[0]):
        scales, nested = stack.statistics_of(expert)
        weight = (stack.bytes_of(expert), shape, scales, blocksize, quant_type)
        multiply(A[rows], *weight, *nested, out[rows])
        end = rows.stop
    out[end:].zero_()
