"""Products of rows sorted by expert with a frozen stack of 4-bit weights, and sorting them.

Nothing here waits for the device: how many rows an expert gets is known to the device alone. Gradients reach the rows and
the bias, never the weights; as with one weight, only the packed stack is kept for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import ArgumentError
from .._formats.state import QuantState
from .._ops import gemm_4bit_grouped, gemm_4bit_grouped_transposed
from .fourbit import _statistics

__all__ = ["GroupedMatMul4Bit", "RowsOfChoices", "grouped_matmul_4bit", "rows_of_choices", "sort_by_expert"]


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """``(order, offsets)`` of integer ``experts`` of any shape.

    ``order`` (int64) lists the positions of the flattened ``experts`` by expert, in their own order within each;
    ``offsets [num_experts]`` (int32) says where each expert's end. What is no expert comes last, past all offsets.
    """
    # Without the sign bit a negative number is a large one.
    flat = experts.reshape(-1).long().bitwise_and(torch.iinfo(torch.int64).max)
    ascending, order = torch.sort(flat, stable=True)
    each = torch.arange(num_experts, device=flat.device)
    return order, torch.searchsorted(ascending, each, right=True, out_int32=True)


def grouped_matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``A[r] @ W[e].T + bias[e]`` for the rows r of each expert e, which end at ``offsets[e]``.

    ``A [R, K]`` holds the rows sorted by expert, ``B`` packs the stack ``W [E, N, K]`` that ``quant_state`` describes,
    ``bias [E, N]`` has A's dtype. Returns ``[R, N]`` in A's dtype, zero at and past ``offsets[-1]``. ``A`` and ``bias``
    get gradients.

    Raises:
        ValueError: ``quant_state`` describes no stack, or a tensor does not fit it.
        NotImplementedError: the statistics are nested in blocks of other than 256.
    """
    shape = quant_state.shape
    if shape is None or len(shape) != 3:
        raise ArgumentError(
            f"quant_state.shape must be 3D [E, N, K], got {shape if shape is None else list(shape)}"
        )
    return _product(A, B, offsets, bias, quant_state, False)


def _product(
    A: Tensor, B: Tensor, offsets: Tensor, bias: Tensor | None, quant_state: QuantState, transposed: bool
) -> Tensor:
    if torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad)):
        return GroupedMatMul4Bit.apply(A, B, offsets, bias, quant_state, transposed)
    return _gemm(A, B, offsets, bias, quant_state, transposed)


def _gemm(
    A: Tensor, B: Tensor, offsets: Tensor, bias: Tensor | None, quant_state: QuantState, transposed: bool
) -> Tensor:
    """The operator, with the statistics as they are kept; it expands nested ones itself."""
    absmax, *nested = _statistics(quant_state)
    stack = (B, quant_state.shape, absmax, quant_state.blocksize, quant_state.quant_type)
    if transposed:
        return gemm_4bit_grouped_transposed(A, *stack, offsets, *nested)
    return gemm_4bit_grouped(A, *stack, offsets, bias, *nested)


def _sum_by_expert(rows: Tensor, offsets: Tensor) -> Tensor:
    """``[E, N]`` float32: the sum of each expert's rows."""
    positions = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets, positions, right=True)
    sums = rows.new_zeros((offsets.shape[0] + 1, rows.shape[1]), dtype=torch.float32)
    return sums.index_add(0, expert, rows.float())[:-1]  # the last is that of rows without an expert


class GroupedMatMul4Bit(torch.autograd.Function):
    """``apply(A, B, offsets, bias, quant_state, transposed)``: the product for inputs that need gradients.

    ``transposed`` multiplies by ``W[e]`` instead of ``W[e].T``. Each is the gradient of the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        offsets: Tensor,
        bias: Tensor | None,
        quant_state: QuantState,
        transposed: bool,
    ) -> Tensor:
        ctx.quant_state, ctx.transposed = quant_state, transposed
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(B, offsets)
        return _gemm(A, B, offsets, bias, quant_state, transposed)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_A = grad_bias = None
        B, offsets = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            grad_A = _product(grad_output, B, offsets, None, ctx.quant_state, not ctx.transposed)
        if ctx.needs_input_grad[3]:
            grad_bias = _sum_by_expert(grad_output, offsets).to(ctx.bias_dtype)
        return grad_A, None, None, grad_bias, None, None


def rows_of_choices(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Row ``order[i] // top_k`` of ``x [T, K]`` for each of its tokens' choices, sorted: ``[T * top_k, K]``."""
    if torch.is_grad_enabled() and x.requires_grad:
        return RowsOfChoices.apply(x, order, top_k)
    return x.index_select(0, order if top_k == 1 else order // top_k)


class RowsOfChoices(torch.autograd.Function):
    """``apply(x, order, top_k)``: :func:`rows_of_choices` of a tensor that needs a gradient.

    The gradient of a token is summed over its choices at once, in a fixed order; that of ``index_select`` would add
    them one by one, each time rounded to the gradient's dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.tokens, ctx.top_k = x.shape[0], top_k
        ctx.save_for_backward(order)
        return x.index_select(0, order if top_k == 1 else order // top_k)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        grads = torch.empty_like(grad_output).index_copy_(0, order, grad_output)
        if ctx.top_k != 1:
            grads = grads.view(ctx.tokens, ctx.top_k, grads.shape[1]).sum(1)
        return grads, None, None
