"""Matmuls whose operands are rounded to FP8, emulated: quantize to a 256-entry map, dequantize, multiply.

Right on every device, and as fast as its 16/32-bit matmul plus the rounding. The forward pass uses the map with four
exponent bits, the gradient the one with five. "Mixed" scales activations block-wise and keeps the weight gradient
unquantized; "global" has one scale for each tensor and quantizes everything.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..._quant.tensorwise import decode, quantize_tensorwise
from ...autograd.autocast import apply_under_autocast
from ...autograd.switchback import SwitchBackBnb, switchback_bnb

__all__ = [
    "MatMulFP8Global",
    "MatMulFP8Mixed",
    "SwitchBackBnb",
    "get_block_sizes",
    "matmul_fp8_global",
    "matmul_fp8_mixed",
    "prod",
    "switchback_bnb",
]

_SMALLEST_BLOCK, _LARGEST_BLOCK = 64, 4096


def _block_size(features: int) -> int:
    """The smallest power of two that holds all features, within the block sizes every device quantizes."""
    return min(max(1 << max(features - 1, 0).bit_length(), _SMALLEST_BLOCK), _LARGEST_BLOCK)


def get_block_sizes(input_matrix: Tensor, weight_matrix: Tensor) -> tuple[int, int]:
    """Block sizes for the input and for the gradient of the output of ``input @ weight``.

    ``input_matrix`` is ``[..., K]``; ``weight_matrix`` is ``[K, N]`` or ``[N, K]``.
    """
    K = input_matrix.shape[-1]
    rows, columns = weight_matrix.shape
    return _block_size(K), _block_size(rows if columns == K else columns)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _round_tensorwise(values: Tensor, code: Tensor) -> Tensor:
    indices, absmax = quantize_tensorwise(values, code)
    return (decode(indices, code) * absmax).to(values.dtype)


def _round_blockwise(values: Tensor, code: Tensor, blocksize: int) -> Tensor:
    code = code.to(values.device)
    indices, absmax = torch.ops.bitsandbytes.quantize_blockwise(values, code, blocksize)
    return torch.ops.bitsandbytes.dequantize_blockwise(indices, absmax, code, blocksize, values.dtype)


class _MatMulFP8(torch.autograd.Function):
    """What both functions share: ``apply(A, B, out, fw_code, bw_code, bsz, bsz2)``, shapes, gradients' dtypes."""

    @staticmethod
    def round_input(A: Tensor, code: Tensor, blocksize: int) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def weight_gradient(A: Tensor, grad: Tensor, rounded_grad: Tensor, fw_code: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def multiply(
        cls, ctx: Any, A: Tensor, B: Tensor, fw_code: Tensor, bw_code: Tensor, bsz: int, bsz2: int
    ) -> Tensor:
        if bsz == -1 or bsz2 == -1:
            bsz, bsz2 = get_block_sizes(A, B)
        ctx.input_shape, ctx.dtypes, ctx.blocksize = A.shape, (A.dtype, B.dtype), bsz2
        ctx.codes = fw_code, bw_code
        rows = _rows(A)
        weight = _round_tensorwise(B, fw_code).to(A.dtype)
        needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(A if needs_B else None, weight if needs_A else None)
        output = cls.round_input(rows, fw_code, bsz) @ weight
        return output.view(*A.shape[:-1], B.shape[-1])

    @classmethod
    def gradients(cls, ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs_A, needs_B, *_ = ctx.needs_input_grad
        dtype_A, dtype_B = ctx.dtypes
        fw_code, bw_code = ctx.codes
        A, weight = ctx.saved_tensors
        grad = _rows(grad_output).to(dtype_A)
        needs_rounded = needs_A or cls is MatMulFP8Global
        rounded = cls.round_input(grad, bw_code, ctx.blocksize) if needs_rounded else grad
        grad_A = (rounded @ weight.t()).view(ctx.input_shape) if needs_A else None
        grad_B = cls.weight_gradient(_rows(A), grad, rounded, fw_code).to(dtype_B) if needs_B else None
        return grad_A, grad_B, None, None, None, None, None


class MatMulFP8Mixed(_MatMulFP8):
    """Block-wise scales for activations and gradients, one scale for the weight, unquantized weight gradient."""

    @staticmethod
    def round_input(A: Tensor, code: Tensor, blocksize: int) -> Tensor:
        return _round_blockwise(A, code, blocksize)

    @staticmethod
    def weight_gradient(A: Tensor, grad: Tensor, rounded_grad: Tensor, fw_code: Tensor) -> Tensor:
        return A.t() @ grad

    @staticmethod
    def forward(ctx, A, B, out=None, fw_code=None, bw_code=None, bsz=-1, bsz2=-1):
        return MatMulFP8Mixed.multiply(ctx, A, B, fw_code, bw_code, bsz, bsz2)

    @staticmethod
    def backward(ctx, grad_output):
        return MatMulFP8Mixed.gradients(ctx, grad_output)


class MatMulFP8Global(_MatMulFP8):
    """One scale for each tensor; the weight gradient multiplies quantized operands as well."""

    @staticmethod
    def round_input(A: Tensor, code: Tensor, blocksize: int) -> Tensor:
        return _round_tensorwise(A, code)

    @staticmethod
    def weight_gradient(A: Tensor, grad: Tensor, rounded_grad: Tensor, fw_code: Tensor) -> Tensor:
        return _round_tensorwise(A, fw_code).t() @ rounded_grad

    @staticmethod
    def forward(ctx, A, B, out=None, fw_code=None, bw_code=None, bsz=-1, bsz2=-1):
        return MatMulFP8Global.multiply(ctx, A, B, fw_code, bw_code, bsz, bsz2)

    @staticmethod
    def backward(ctx, grad_output):
        return MatMulFP8Global.gradients(ctx, grad_output)


def matmul_fp8_mixed(
    A: Tensor,
    B: Tensor,
    fw_code: Tensor,
    bw_code: Tensor,
    out: Tensor | None = None,
    bsz: int = -1,
    bsz2: int = -1,
) -> Tensor:
    """``A @ B`` rounded to FP8: activations and gradients block-wise, the weight with one scale.

    The gradient of ``B`` is computed from unquantized operands.

    Args:
        A: ``[..., K]``, float16, bfloat16 or float32.
        B: ``[K, N]``, usually ``weight.t()``.
        fw_code, bw_code: ascending float32 maps of 256 entries for the operands and for the gradient, as
            ``create_fp8_map(True, 4, 3, 8)`` and ``create_fp8_map(True, 5, 2, 8)`` make them.
        out: ignored.
        bsz, bsz2: block sizes for A and for the gradient; -1 chooses both from the shapes.

    Returns:
        ``[..., N]`` in A's dtype.
    """
    return apply_under_autocast(MatMulFP8Mixed.apply, A, B, out, fw_code, bw_code, bsz, bsz2)


def matmul_fp8_global(
    A: Tensor,
    B: Tensor,
    fw_code: Tensor,
    bw_code: Tensor,
    out: Tensor | None = None,
    bsz: int = -1,
    bsz2: int = -1,
) -> Tensor:
    """``A @ B`` rounded to FP8 with one scale for each tensor, gradients too; arguments as :func:`matmul_fp8_mixed`."""
    return apply_under_autocast(MatMulFP8Global.apply, A, B, out, fw_code, bw_code, bsz, bsz2)
