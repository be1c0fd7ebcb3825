"""Matmul with a frozen 4-bit weight: gradients reach the activations and the bias, never the weight.

A backward pass keeps the packed weight alone (half a byte a value) and decodes it again; neither the activations nor
a decoded weight are saved, which is what lets QLoRA fine-tune large models in little memory.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

from .._checks import ArgumentError
from .._formats.packing import convert_weight_packed_for_cpu_inverse
from .._formats.state import QuantState
from .._formats.table import NESTED_BLOCKSIZE
from .._ops import gemm_4bit, gemm_4bit_transposed
from .._quant.fourbit import dequantize_4bit

__all__ = ["MatMul4Bit", "matmul_4bit"]


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``A @ W.T + bias`` for activations ``A [..., K]`` and the 4-bit weight ``W [N, K]`` that ``B`` packs.

    ``B`` may have any storage dtype and lie as ``[m, 1]``, ``[1, m]`` or flat; ``quant_state`` alone says N and K.
    ``bias [N]`` has A's dtype. Returns ``[..., N]`` in A's dtype, or ``out`` filled with it. ``A`` and ``bias`` get
    gradients.

    Raises:
        ValueError: ``quant_state`` is None or describes no matrix, or a tensor does not fit it.
        NotImplementedError: the statistics are nested in blocks of other than 256.
    """
    if quant_state is None:
        raise ArgumentError(
            "quant_state is required: matmul_4bit needs the state that quantize_4bit returned"
        )
    shape = quant_state.shape
    if shape is None or len(shape) != 2:
        raise ArgumentError(
            f"quant_state.shape must be 2D [N, K], got {shape if shape is None else list(shape)}"
        )
    if quant_state.packing_format_for_cpu:
        B, quant_state = convert_weight_packed_for_cpu_inverse(B, copy.copy(quant_state))

    N, K = shape
    if N != K and A.dim() > 0 and A.shape[-1] == N:
        return _matmul_transposed(A, B, quant_state, out, bias)

    needs_grad = torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))
    if needs_grad:
        product = MatMul4Bit.apply(A, B, None, bias, quant_state)
    else:
        product = _gemm(A, B, bias, quant_state)
    return product if out is None else out.copy_(product)


def _matmul_transposed(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``A @ W + bias``: releases before 0.50 also took weights that were quantized as ``[K, N]``."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"matmul_4bit got a weight quantized in the shape {list(quant_state.shape)}, that is [in, out]; such weights "
            "will not be supported. Re-quantize from the weight in the shape [out, in].",
            DeprecationWarning,
            stacklevel=3,
        )
    weight = _decoded(B, quant_state).to(A.dtype)
    product = torch.nn.functional.linear(A, weight.t(), bias)
    return product if out is None else out.copy_(product)


def _gemm(A: Tensor, B: Tensor, bias: Tensor | None, quant_state: QuantState) -> Tensor:
    """The operator, with the statistics as they are kept; it expands nested ones itself.

    Some loaders cast all floating-point entries of a checkpoint, statistics among them, to the model's dtype.
    """
    shape = quant_state.shape
    if A.numel() == 0 and A.dim() > 0 and A.shape[-1] == shape[1]:
        product = A.new_zeros((*A.shape[:-1], shape[0]))
        return product if bias is None else product + bias
    absmax, absmax_8bit, code, offset = quant_state.absmax, None, None, None
    if quant_state.nested or absmax.dtype is not torch.float32:
        absmax, absmax_8bit, code, offset = _statistics(quant_state)
    blocksize, quant_type = quant_state.blocksize, quant_state.quant_type
    return gemm_4bit(A, B, shape, absmax, blocksize, quant_type, bias, absmax_8bit, code, offset)


def _statistics(quant_state: QuantState) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``absmax, absmax_8bit, absmax_code, absmax_offset``; only nested statistics have the last three."""
    absmax = quant_state.absmax
    if not quant_state.nested:
        return absmax if absmax.dtype is torch.float32 else absmax.float(), None, None, None
    second = quant_state.state2
    if second.blocksize != NESTED_BLOCKSIZE:
        raise NotImplementedError(
            f"quant_state.state2.blocksize must be {NESTED_BLOCKSIZE} for a matmul, got {second.blocksize}"
        )
    scales, code = second.absmax, second.code
    if scales.dtype is not torch.float32 or code.dtype is not torch.float32:
        scales, code = scales.float(), code.float()
    return scales, absmax, code, quant_state.offset


def _decoded(B: Tensor, quant_state: QuantState) -> Tensor:
    """The weight in the state's shape and dtype, however ``B`` lies."""
    return dequantize_4bit(B.reshape(-1, 1), quant_state)


def _transposed_product(grad_output: Tensor, B: Tensor, quant_state: QuantState) -> Tensor:
    """``grad_output @ W``, where gradients round W to the state's dtype first.

    On a CPU without a decoded weight, unless that rounding shows or the product needs a gradient of its own.
    """
    rounds_once = quant_state.dtype in (grad_output.dtype, torch.float32)
    fused = grad_output.device.type == "cpu" and rounds_once and grad_output.numel() > 0
    if not fused or torch.is_grad_enabled():
        return grad_output @ _decoded(B, quant_state).to(grad_output.dtype)
    absmax, *nested = _statistics(quant_state)
    return gemm_4bit_transposed(
        grad_output, B, quant_state.shape, absmax, quant_state.blocksize, quant_state.quant_type, *nested
    )


class MatMul4Bit(torch.autograd.Function):
    """``apply(A, B, out=None, bias=None, quant_state=None)``: :func:`matmul_4bit` for inputs that need gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> Tensor:
        if quant_state is None:
            raise ArgumentError("quant_state is required")
        ctx.quant_state = quant_state
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(B if ctx.needs_input_grad[0] else None)
        product = _gemm(A, B, bias, quant_state)
        if out is None:
            return product
        ctx.mark_dirty(out)
        return out.copy_(product)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_A = grad_bias = None
        if ctx.needs_input_grad[0]:
            (B,) = ctx.saved_tensors
            grad_A = _transposed_product(grad_output, B, ctx.quant_state)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_output.sum_to_size(grad_output.shape[-1]).to(ctx.bias_dtype)
        return grad_A, None, None, grad_bias, None


# Tracebacks and the profiler show the public path.
MatMul4Bit.__module__ = "bitsandbytes.autograd._functions"
