"""LLM.int8() on the CPU: the native row quantization, and torch's int8 product."""

from __future__ import annotations

import torch

from ..._native import DTYPE_ID, lib, ptr, threads
from ..._ops import int8_linear_matmul, int8_vectorwise_quant
from .registration import native_kernel

__all__: list[str] = []


@native_kernel(int8_vectorwise_quant, "bnb_cpu_int8_vectorwise_quant")
def _(A, threshold=0.0):
    A = A.contiguous()
    rows, cols = A.shape[:-1].numel(), A.shape[-1]
    quantized = torch.empty_like(A, dtype=torch.int8)
    row_stats = torch.empty(rows, dtype=torch.float32)
    flags = torch.zeros(cols, dtype=torch.uint8) if threshold > 0.0 else None
    lib.bnb_cpu_int8_vectorwise_quant(
        ptr(A),
        DTYPE_ID[A.dtype],
        ptr(quantized),
        ptr(row_stats),
        ptr(flags),
        rows,
        cols,
        threshold,
        threads(),
    )
    return quantized, row_stats, None if flags is None else flags.nonzero().view(-1)


def _int8_linear_matmul(A, B, out):
    K = A.shape[-1]
    rows, columns = A.reshape(A.shape[:-1].numel(), K), out.view(A.shape[:-1].numel(), B.shape[0])
    if K == 1:  # torch takes a transposed column for a plain row
        torch.mul(rows.int(), B.reshape(1, -1).int(), out=columns)
    else:
        torch._int_mm(rows.contiguous(), B.contiguous().t(), out=columns)


# Without VNNI, torch's int8 product may saturate in between; the default backend is exact there.
if hasattr(torch, "_int_mm") and torch.cpu._is_vnni_supported():
    int8_linear_matmul.kernel("cpu")(_int8_linear_matmul)
