"""The int8 matmul before LLM.int8(): both operands vector-wise quantized, gradients too if wanted.

Kept for programs that still call it; :func:`bitsandbytes.matmul` replaced it. ``precision`` names the bits of the
forward product, of the gradient of A and of the gradient of B; anything but 8 means the operands' own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._quant.deprecation import deprecated
from .._quant.legacy import integer_matmul
from .._quant.vectorwise import dequantize_product, quantize_vectors

__all__ = ["MatMul8bit", "bmm_cublas", "matmul_cublas", "mm_cublas", "supports_igemmlt"]


def _product(A: Tensor, B: Tensor, bits: int, quant_type: str) -> Tensor:
    if bits != 8:
        return torch.matmul(A, B)
    quantized_A = quantize_vectors(A, -1, quant_type)
    quantized_B = quantize_vectors(B, -2, quant_type)
    if quantized_A is None or quantized_B is None or quantized_A[0].dtype != torch.int8:
        raise ValueError(
            f"quant_type must be one of vector, row, linear, truncated-vector, got {quant_type!r}"
        )
    (q_A, scale_A), (q_B, scale_B) = quantized_A, quantized_B
    result = dequantize_product(integer_matmul(q_A, q_B), scale_A, scale_B, A.dtype, quant_type)
    assert result is not None
    return result


class MatMul8bit(torch.autograd.Function):
    """``apply(A, B, out, quant_type, precision)``: ``A [..., M, K] @ B [..., K, N]`` in int8, in A's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        quant_type: str = "vector",
        precision: Sequence[int] | None = None,
    ) -> Tensor:
        ctx.quant_type, ctx.precision = quant_type, precision or (8, 8, 8)
        ctx.save_for_backward(A, B)
        return _product(A, B, ctx.precision[0], quant_type)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        A, B = ctx.saved_tensors
        needs_A, needs_B, *_ = ctx.needs_input_grad
        grad_A = grad_B = None
        if needs_A:
            grad_A = _product(grad_output, B.transpose(-1, -2), ctx.precision[1], ctx.quant_type)
        if needs_B:
            G, rows = grad_output, A
            if A.dim() > B.dim():  # one weight for the whole batch: its gradient sums over the batch
                G, rows = G.reshape(-1, G.shape[-1]), rows.reshape(-1, rows.shape[-1])
            grad_B = _product(rows.transpose(-1, -2), G, ctx.precision[2], ctx.quant_type)
        return grad_A, grad_B, None, None, None


@deprecated("Use bitsandbytes.matmul instead.")
def matmul_cublas(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    quant_type: str = "vector",
    precision: Sequence[int] | None = None,
) -> Tensor:
    """``A @ B`` with vector-wise int8 operands, in A's dtype.

    Args:
        A: ``[M, K]`` or ``[b, M, K]``.
        B: ``[K, N]`` or ``[b, K, N]``.
        out: ignored.
        quant_type: ``vector``, ``row``, ``linear`` or ``truncated-vector``.
        precision: bits of the product and of the two gradients; all 8 by default.
    """
    return MatMul8bit.apply(A, B, out, quant_type, precision)


mm_cublas = matmul_cublas
bmm_cublas = matmul_cublas


@deprecated("Int8 matmuls work on every device.")
def supports_igemmlt(device: torch.device | str) -> bool:
    """Whether a device is a CUDA GPU with int8 tensor cores."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 5)
