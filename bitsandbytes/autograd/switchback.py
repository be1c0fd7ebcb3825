"""SwitchBack over the LLM.int8() operators: int8 forward, weight gradient in full precision.

The forward pass multiplies row-wise int8 activations and weights, outlier columns apart; the gradient of the input
uses the dequantized int8 weight, the gradient of the weight the unquantized activations (Wortsman et al., "Stable and
low-precision training for large-scale vision-language models", 2023). The quantized weight lives in the caller's
``MatmulLtState`` so that it is made once per optimizer step while gradients accumulate.
"""

from __future__ import annotations

import warnings
from math import prod
from typing import Any

import torch
from torch import Tensor

from .autocast import apply_under_autocast
from .int8 import MatmulLtState

__all__ = ["SwitchBackBnb", "switchback_bnb"]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _quantize_weight(B: Tensor, state: Any) -> None:
    """Fill a ``MatmulLtState`` from the float weight unless what it holds is still good."""
    if state.CB is not None and not state.has_fp16_weights:
        return
    accumulating = B.is_leaf and B.grad is not None
    if state.SB is None or state.CB is None or (state.is_training and not accumulating):
        state.reset_grads()
        by_row, by_column, row_stats, col_stats, _ = torch.ops.bitsandbytes.int8_double_quant(
            B.detach().to(torch.float16).contiguous()
        )
        state.CB, state.CBt, state.SCB, state.SCBt = by_row, by_column, row_stats, col_stats
        state.SB = (by_row.shape, "row")


def _dequantized(CB: Tensor, SCB: Tensor, dtype: torch.dtype) -> Tensor:
    return (CB.to(dtype) * (SCB.reshape(-1, 1) / 127.0)).to(dtype)


def _add_outliers(output: Tensor, rows: Tensor, columns: Tensor, B: Tensor, state: Any) -> None:
    if state.has_fp16_weights:
        weight = B[:, columns].to(rows.dtype)
    else:
        weight = _dequantized(state.CB[:, columns], state.SCB, rows.dtype)
    output.addmm_(rows[:, columns], weight.t())


class SwitchBackBnb(torch.autograd.Function):
    """``apply(A, B, out, bias, state)``; see :func:`switchback_bnb`."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Tensor:
        state = MatmulLtState() if state is None else state
        ctx.input_shape, ctx.weight_shape, ctx.state = A.shape, B.shape, state
        ctx.dtypes = A.dtype, B.dtype, None if bias is None else bias.dtype
        ctx.empty = A.numel() == 0
        if ctx.empty:
            output = A.new_zeros((*A.shape[:-1], B.shape[0]))
            return output if bias is None else output + bias.to(A.dtype)

        if A.dtype != torch.float16:
            # The text is what programs filter on. Our operator reads A as it is: nothing overflows at 65504.
            warnings.warn(
                f"switchback_bnb: inputs will be cast from {A.dtype} to float16 during quantization",
                stacklevel=2,
            )
        _quantize_weight(B, state)
        rows = _rows(A)
        CA, SCA, columns = torch.ops.bitsandbytes.int8_vectorwise_quant(rows, float(state.threshold))
        output = torch.ops.bitsandbytes.int8_scaled_mm(CA, state.CB, SCA, state.SCB, bias, A.dtype)
        if columns is not None:
            state.idx = columns
            if columns.numel():
                _add_outliers(output, rows, columns, B, state)

        needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            A if needs_B else None, state.CB if needs_A else None, state.SCB if needs_A else None
        )
        return output.view(*A.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs_A, needs_B, _, needs_bias, _ = ctx.needs_input_grad
        dtype_A, dtype_B, dtype_bias = ctx.dtypes
        rows_of_grad = _rows(grad_output)
        grad_A = grad_B = grad_bias = None
        if needs_bias:
            wide = torch.promote_types(grad_output.dtype, dtype_bias)
            grad_bias = rows_of_grad.sum(dim=0, dtype=wide).to(dtype_bias)
        if ctx.empty:
            grad_A = grad_output.new_zeros(ctx.input_shape, dtype=dtype_A) if needs_A else None
            grad_B = grad_output.new_zeros(ctx.weight_shape, dtype=dtype_B) if needs_B else None
            return grad_A, grad_B, None, grad_bias, None

        A, CB, SCB = ctx.saved_tensors
        if needs_B:
            grad_B = (rows_of_grad.t() @ _rows(A).to(grad_output.dtype)).to(dtype_B)
        if needs_A:
            if ctx.state.CB is None:
                raise Exception("State must contain the CB matrix for backward")
            weight = _dequantized(CB, SCB, dtype_A)
            grad_A = (rows_of_grad.to(dtype_A) @ weight).view(ctx.input_shape)
        return grad_A, grad_B, None, grad_bias, None


def switchback_bnb(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """``A @ B.T + bias`` with int8 operands forward, and a weight gradient in full precision.

    Args:
        A: activations ``[..., K]``, quantized row by row.
        B: weight ``[N, K]``, any strides; not read when ``state`` holds fixed int8 weights.
        out: ignored.
        state: keeps the quantized weight between calls; a fresh one by default.
        threshold: if positive, columns of A with a magnitude of at least this are multiplied in A's dtype.
        bias: ``[N]``.

    Returns:
        ``[..., N]`` in A's dtype.

    Warns:
        UserWarning: A is not float16.
    """
    state = MatmulLtState() if state is None else state
    if threshold > 0.0:
        state.threshold = threshold
    return apply_under_autocast(SwitchBackBnb.apply, A, B, out, bias, state)
