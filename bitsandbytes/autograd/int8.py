"""LLM.int8(): matmul with an int8 weight and activations quantized on the way, outlier columns kept apart.

Where int8 products are slow to train with (CPU, XPU) the training path decodes the weight instead. The weight's
int8 form lives in a state that the layer owns; backward reads it there again rather than saving a copy.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .._checks import ArgumentError
from .._ops import int8_linear, int8_mixed_scaled_mm, int8_scaled_mm
from .._quant.int8 import int8_vectorwise_quant

__all__ = ["GlobalOutlierPooler", "MatMul8bitFp", "MatMul8bitLt", "MatmulLtState", "logger", "matmul"]

logger = logging.getLogger("bitsandbytes.autograd._functions")

_FACE = "bitsandbytes.autograd._functions"
_DECODE_TO_TRAIN = ("cpu", "xpu")  # device types that train through MatMul8bitFp
_RETIRED = ("CxB", "CxBt", "formatB", "_tile_indices")


class GlobalOutlierPooler:
    """Unites outlier dimensions over layers of one width. The library itself does not read it."""

    _instance: GlobalOutlierPooler | None = None

    outliers: set[int]
    model_dim: int | None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Forget everything."""
        self.outliers = set()
        self.model_dim = None

    @classmethod
    def get_instance(cls) -> GlobalOutlierPooler:
        """The one instance of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def add_outliers(self, outlier_idx: Tensor, feature_dim: int) -> None:
        """Add indices; the first call fixes the width, and calls with another width have no effect."""
        if self.model_dim is None:
            self.model_dim = feature_dim
        if feature_dim == self.model_dim:
            self.outliers.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> Tensor:
        """The indices so far, as int64."""
        return torch.tensor(sorted(self.outliers), dtype=torch.int64)


@dataclass
class MatmulLtState:
    """What an int8 layer keeps between calls. A plain mutable object: programs assign attributes, also new ones.

    ``CB`` is the int8 weight ``[N, K]`` and ``SCB`` its row absmax (float32 ``[N]``); ``idx`` are the outlier columns of
    the last forward with a threshold, listed when they are asked for, because that waits for a GPU. The other fields are
    kept for programs that set them.
    """

    force_no_igemmlt: bool = False
    CB: Tensor | None = None
    SB: Tensor | None = None
    SCB: Tensor | None = None
    SBt: Tensor | None = None
    CBt: Tensor | None = None
    subB: Tensor | None = None
    outlier_pool: GlobalOutlierPooler | None = None
    idx: Tensor | None = None

    # Without annotations: these are no constructor fields and do not count in comparisons.
    has_accumulated_gradients = False
    threshold = 0.0  # activations of at least this magnitude are outliers; 0 is off
    is_training = True
    has_fp16_weights = True  # True: the float weight is quantized in forward; False: CB and SCB are fixed
    use_pool = False
    noted_cast = False  # whether this state's first input that is not float16 was logged
    outlier_flags = None  # uint8 [K], of a forward whose outlier columns nobody has asked for yet

    def reset_grads(self) -> None:
        """Drop the int8 weight, so that the next forward takes it from the layer again."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None

    def __getattr__(self, name: str) -> Any:
        if name in _RETIRED:
            warnings.warn(
                f"MatmulLtState.{name} is deprecated and will be removed", FutureWarning, stacklevel=2
            )
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _listed_outliers(state: MatmulLtState) -> Tensor | None:
    if state.outlier_flags is not None:
        state.idx = state.outlier_flags.nonzero().view(-1)
    return state.__dict__.get("_idx")


def _set_outliers(state: MatmulLtState, columns: Tensor | None) -> None:
    state.outlier_flags = None
    state.__dict__["_idx"] = columns


# After the class is made: in its body the field would take the property for its default.
MatmulLtState.idx = property(_listed_outliers, _set_outliers)  # type: ignore[assignment]


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """``A @ B.T + bias`` in int8 for activations ``A [..., K]`` and the weight ``B [N, K]``.

    The weight is taken from ``state.CB`` and ``state.SCB`` when ``state.has_fp16_weights`` is False and they are set,
    and is quantized otherwise. ``threshold > 0`` replaces ``state.threshold``. Returns ``[..., N]`` in A's dtype; ``out``
    has no effect.

    Raises:
        ValueError: ``A`` is not floating point, shapes do not match, or an int8 weight comes without its ``SCB``.
    """
    if state is None:
        state = MatmulLtState()
    if threshold > 0.0:
        state.threshold = threshold
    if state.is_training and A.device.type in _DECODE_TO_TRAIN:
        return MatMul8bitFp.apply(A, B, None, bias, state)
    if torch.is_grad_enabled() and _needs_grad(A, B, bias):
        return MatMul8bitLt.apply(A, B, None, bias, state)
    return _multiply(A, B, bias, state)


def _needs_grad(*operands: Tensor | None) -> bool:
    return any(operand is not None and operand.requires_grad for operand in operands)


def _prepare_weight(B: Tensor, state: MatmulLtState) -> None:
    """Make sure ``state`` holds the int8 weight.

    A float weight is quantized again in every training forward, except while gradients accumulate.
    """
    if not state.has_fp16_weights and (state.CB is not None or B.dtype == torch.int8):
        if state.SCB is None:
            raise ArgumentError(
                "state.SCB must be set: the row absmax of an int8 weight is not known without it"
            )
        if state.CB is None:
            state.CB = B
        return
    if state.CB is None or state.SCB is None or (state.is_training and not _accumulates(B)):
        state.reset_grads()
        state.CB, state.SCB, _ = int8_vectorwise_quant(B.detach().to(torch.float16))


def _accumulates(B: Tensor) -> bool:
    """Whether gradients of earlier forwards wait in ``B.grad``; a traced graph does not ask, and quantizes again."""
    return not torch.compiler.is_compiling() and B.is_leaf and B.grad is not None


def _decoded(state: MatmulLtState, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype``: one rounding of the float32 product."""
    if state.CB is None or state.SCB is None:
        raise RuntimeError("state must contain the CB matrix and its SCB for backward")
    scale = state.SCB.view(-1, 1) * (1.0 / 127.0)
    if state.CB.device.type == "cpu":  # which would convert both operands of a mixed product first
        return state.CB.to(dtype, copy=True).mul_(scale)
    return torch.mul(state.CB, scale, out=torch.empty_like(state.CB, dtype=dtype))


def _check_activations(A: Tensor, state: MatmulLtState) -> None:
    if not A.is_floating_point():
        raise ArgumentError(f"A must be a floating point tensor, got {A.dtype}")
    K = state.CB.shape[1]  # type: ignore[union-attr]
    if A.dim() < 1 or A.shape[-1] != K:
        raise ArgumentError(f"A's last dimension must be {K}, as the weight's, got shape {tuple(A.shape)}")


def _note_cast(A: Tensor, state: MatmulLtState) -> None:
    # The text is what programs filter on. Our operators read A as it is: nothing overflows at 65504.
    if A.dtype != torch.float16 and not state.noted_cast and not torch.compiler.is_compiling():
        state.noted_cast = True  # once for each layer, not for each call
        logger.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", A.dtype)


def _multiply(A: Tensor, B: Tensor, bias: Tensor | None, state: MatmulLtState) -> Tensor:
    """The int8 product, where nothing is kept for a gradient of the weight."""
    _prepare_weight(B, state)
    _check_activations(A, state)
    _note_cast(A, state)
    product, flags = int8_linear(A, state.CB, state.SCB, bias, float(state.threshold))
    if flags is not None:
        state.outlier_flags = flags
    return product


def _rows(x: Tensor) -> Tensor:
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _grad_bias(grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    return grad_output.sum_to_size(grad_output.shape[-1]).to(dtype)


class MatMul8bitLt(torch.autograd.Function):
    """``apply(A, B, out, bias, state)``: int8 arithmetic in forward, the decoded weight in backward."""

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
        ctx.state = state
        ctx.shape, ctx.dtype = A.shape, A.dtype
        ctx.dtype_B = B.dtype
        ctx.dtype_bias = None if bias is None else bias.dtype
        if not ctx.needs_input_grad[1]:
            return _multiply(A, B, bias, state)

        _prepare_weight(B, state)
        _check_activations(A, state)
        _note_cast(A, state)
        rows = _rows(A)
        by_row, row_stats, columns = int8_vectorwise_quant(rows, float(state.threshold))
        outliers = None
        if columns is None:
            inliers = rows
            product = int8_scaled_mm(by_row, state.CB, row_stats, state.SCB, bias, A.dtype)
        else:
            state.idx = columns
            inliers = rows.index_fill(1, columns, 0)  # zero here and added in full in backward
            product, outliers = int8_mixed_scaled_mm(
                rows, by_row, state.CB, row_stats, state.SCB, columns, bias
            )
        by_column, col_stats, _ = int8_vectorwise_quant(inliers.t().contiguous())
        ctx.save_for_backward(by_column, col_stats, outliers, columns)
        return product.view(*A.shape[:-1], product.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs_A, needs_B, _, needs_bias, _ = ctx.needs_input_grad
        grad_A = grad_B = grad_bias = None
        if needs_bias:
            grad_bias = _grad_bias(grad_output, ctx.dtype_bias)
        if needs_B:
            grad_B = MatMul8bitLt._grad_weight(ctx, _rows(grad_output))
        if needs_A:
            grad_A = (grad_output.to(ctx.dtype) @ _decoded(ctx.state, ctx.dtype)).view(ctx.shape)
        return grad_A, grad_B, None, grad_bias, None

    @staticmethod
    def _grad_weight(ctx: Any, grad: Tensor) -> Tensor:
        """``grad.T @ A`` in int8, both quantized by columns; A's outlier columns in its own dtype."""
        by_column, col_stats, outliers, columns = ctx.saved_tensors
        grad_by_column, grad_stats, _ = int8_vectorwise_quant(grad.t().contiguous())
        grad_B = int8_scaled_mm(grad_by_column, by_column, grad_stats, col_stats, None, ctx.dtype_B)
        if columns is not None and outliers.numel() > 0:
            grad_B[:, columns] += (grad.to(outliers.dtype).t() @ outliers).to(ctx.dtype_B)
        return grad_B


class MatMul8bitFp(torch.autograd.Function):
    """``apply(A, B, out, bias, state)``: decode the weight and multiply in A's dtype; outliers need no care."""

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
        _prepare_weight(B, state)
        _check_activations(A, state)
        ctx.state = state
        ctx.dtype, ctx.dtype_B = A.dtype, B.dtype
        ctx.dtype_bias = None if bias is None else bias.dtype
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(A)
        bias = None if bias is None else bias.to(A.dtype)
        return torch.nn.functional.linear(A, _decoded(state, A.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs_A, needs_B, _, needs_bias, _ = ctx.needs_input_grad
        grad_A = grad_B = grad_bias = None
        if needs_bias:
            grad_bias = _grad_bias(grad_output, ctx.dtype_bias)
        if needs_B:
            (A,) = ctx.saved_tensors
            grad_B = (_rows(grad_output).t() @ _rows(A)).to(ctx.dtype_B)
        if needs_A:
            grad_A = grad_output.to(ctx.dtype) @ _decoded(ctx.state, ctx.dtype)
        return grad_A, grad_B, None, grad_bias, None


# Pickles record the public path.
for _public in (GlobalOutlierPooler, MatmulLtState, MatMul8bitLt, MatMul8bitFp):
    _public.__module__ = _FACE
