"""SwitchBack linear layers: int8 matmuls forward and for the input's gradient, the weight's gradient in 16 bits.

The weight gradient sums over the whole batch and is what int8 noise hurts, so it "switches back" (Wortsman et al.,
"Stable and low-precision training for large-scale vision-language models", 2023). The layers differ in how they scale
the weight and in what they keep for the backward pass. They are built on the primitives of ``bitsandbytes.triton``,
which run on any device; outputs are float16 whatever the input. Parameters and checkpoints are those of
``torch.nn.Linear``.
"""

from __future__ import annotations

import functools
import logging
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.switchback import switchback_bnb
from ..triton.dequantize_rowwise import dequantize_rowwise
from ..triton.int8_matmul_mixed_dequantize import int8_matmul_mixed_dequantize
from ..triton.int8_matmul_rowwise_dequantize import int8_matmul_rowwise_dequantize
from ..triton.quantize_columnwise_and_transpose import quantize_columnwise_and_transpose
from ..triton.quantize_global import quantize_global, quantize_global_transpose
from ..triton.quantize_rowwise import quantize_rowwise
from .linear8bit import Linear8bitLt

__all__ = [
    "StandardLinear",
    "StandardLinearFunction",
    "SwitchBackLinear",
    "SwitchBackLinearBnb",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
]

logger = logging.getLogger("bitsandbytes.nn.triton_based_modules")

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _rows(X: Tensor) -> Tensor:
    return X.reshape(prod(X.shape[:-1]), X.shape[-1])


def _weight_and_bias_gradients(ctx: Any, G: Tensor, X: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``G.T @ X`` in G's dtype and the sum of G's rows; autograd casts them to the parameters' dtypes."""
    _, needs_W, needs_bias = ctx.needs_input_grad
    grad_W = G.t() @ _rows(X).to(G.dtype) if needs_W and X is not None else None
    return grad_W, G.sum(dim=0) if needs_bias else None


class _SwitchBackGlobal(torch.autograd.Function):
    """``apply(X, W, bias)``: rows of X, and W as a whole, in int8."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        needs_X, needs_W, _ = ctx.needs_input_grad
        ctx.save_for_backward(X if needs_W else None, W if needs_X else None)
        ctx.input_shape = X.shape
        X_int8, state_X = quantize_rowwise(_rows(X))
        W_int8, state_W = quantize_global(W)
        out = int8_matmul_mixed_dequantize(X_int8, W_int8.t(), state_X, state_W, bias)
        return out.view(*X.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        X, W = ctx.saved_tensors
        G = _rows(grad_output)
        grad_X = None
        if ctx.needs_input_grad[0]:
            G_int8, state_G = quantize_rowwise(G)
            W_int8, state_W = quantize_global_transpose(W)
            grad_X = int8_matmul_mixed_dequantize(G_int8, W_int8.t(), state_G, state_W, None).view(
                ctx.input_shape
            )
        return grad_X, *_weight_and_bias_gradients(ctx, G, X)


class _SwitchBackVectorwise(torch.autograd.Function):
    """``apply(X, W, bias)``: rows of X, and W by output channel forward and by input channel backward, in int8."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        needs_X, needs_W, _ = ctx.needs_input_grad
        ctx.save_for_backward(X if needs_W else None, W if needs_X else None)
        ctx.input_shape = X.shape
        X_int8, state_X = quantize_rowwise(_rows(X))
        W_int8, state_W = quantize_rowwise(W)
        out = int8_matmul_rowwise_dequantize(X_int8, W_int8.t(), state_X, state_W, bias)
        return out.view(*X.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        X, W = ctx.saved_tensors
        G = _rows(grad_output)
        grad_X = None
        if ctx.needs_input_grad[0]:
            G_int8, state_G = quantize_rowwise(G)
            W_int8, state_W = quantize_columnwise_and_transpose(W)
            grad_X = int8_matmul_rowwise_dequantize(G_int8, W_int8.t(), state_G, state_W, None).view(
                ctx.input_shape
            )
        return grad_X, *_weight_and_bias_gradients(ctx, G, X)


class _SwitchBackGlobalMemEfficient(torch.autograd.Function):
    """As :class:`_SwitchBackGlobal`, keeping only the int8 operands for the backward pass."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        X_int8, state_X = quantize_rowwise(_rows(X))
        W_int8, state_W = quantize_global(W)
        needs_X, needs_W, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            *((X_int8, state_X) if needs_W else (None, None)),
            *((W_int8, state_W) if needs_X else (None, None)),
        )
        ctx.input_shape = X.shape
        out = int8_matmul_mixed_dequantize(X_int8, W_int8.t(), state_X, state_W, bias)
        return out.view(*X.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        X_int8, state_X, W_int8, state_W = ctx.saved_tensors
        G = _rows(grad_output)
        grad_X = None
        if ctx.needs_input_grad[0]:
            G_int8, state_G = quantize_rowwise(G)
            grad_X = int8_matmul_mixed_dequantize(G_int8, W_int8, state_G, state_W, None).view(
                ctx.input_shape
            )
        X = dequantize_rowwise(X_int8, state_X) if ctx.needs_input_grad[1] else None
        return grad_X, *_weight_and_bias_gradients(ctx, G, X)


class SwitchBackLinear(nn.Linear):
    """A linear layer trained with int8 matmuls; drop-in for ``torch.nn.Linear`` with float16 outputs.

    Args:
        in_features, out_features, bias, device, dtype: as for ``torch.nn.Linear``.
        vector_wise_quantization: one scale for each channel of the weight instead of a single one.
        mem_efficient: keep int8 activations and weights for the backward pass instead of the originals.

    Raises:
        ValueError: both ``vector_wise_quantization`` and ``mem_efficient``.
    """

    W_int8: Tensor  # the buffers of a layer prepared for evaluation
    state_W: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        vector_wise_quantization: bool = False,
        mem_efficient: bool = False,
    ) -> None:
        if vector_wise_quantization and mem_efficient:
            raise ValueError(
                "mem_efficient is not supported with vector_wise_quantization: choose one of them"
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.vector_wise_quantization = vector_wise_quantization
        self.mem_efficient = mem_efficient

    @property
    def _function(self) -> type[torch.autograd.Function]:
        if self.vector_wise_quantization:
            return _SwitchBackVectorwise
        return _SwitchBackGlobalMemEfficient if self.mem_efficient else _SwitchBackGlobal

    @property
    def _is_prepared(self) -> bool:
        return "W_int8" in self._buffers

    def prepare_for_eval(self) -> None:
        """Replace the weight by its int8 copy, buffers ``W_int8`` and ``state_W``. Evaluation only from then on.

        Usually over a whole model: ``model.apply(lambda m: hasattr(m, "prepare_for_eval") and m.prepare_for_eval())``.
        A second call has no effect.
        """
        if self._is_prepared:
            return
        logger.info("preparing for eval: the weight is replaced by its int8 copy")
        quantize = quantize_rowwise if self.vector_wise_quantization else quantize_global
        self._replace_weight(*quantize(self.weight.detach()))

    def _replace_weight(self, W_int8: Tensor, state_W: Tensor) -> None:
        del self.weight
        self.register_buffer("W_int8", W_int8)
        self.register_buffer("state_W", state_W)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A checkpoint saved after :meth:`prepare_for_eval` prepares the layer that loads it."""
        W_int8, state_W = (state_dict.get(prefix + name) for name in ("W_int8", "state_W"))
        if W_int8 is not None and state_W is not None and not self._is_prepared:
            device = self.weight.device
            self._replace_weight(
                torch.empty_like(W_int8, device=device), torch.empty_like(state_W, device=device)
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_prepared:
            return self._function.apply(x, self.weight, self.bias)
        if self.training:
            raise AttributeError(
                "the weight was replaced by its int8 copy (prepare_for_eval): only eval mode works"
            )
        multiply = (
            int8_matmul_rowwise_dequantize if self.vector_wise_quantization else int8_matmul_mixed_dequantize
        )
        X_int8, state_X = quantize_rowwise(_rows(x))
        out = multiply(X_int8, self.W_int8.t(), state_X, self.state_W, self.bias)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        scales = "vector-wise" if self.vector_wise_quantization else "global"
        dtype = "int8" if self._is_prepared else str(self.weight.dtype).removeprefix("torch.")
        return f"{super().extra_repr()}, format=int8 {scales}, weight={dtype}, mem_efficient={self.mem_efficient}"


SwitchBackLinearGlobal = functools.partial(SwitchBackLinear, vector_wise_quantization=False)
SwitchBackLinearGlobalMemEfficient = functools.partial(
    SwitchBackLinear, vector_wise_quantization=False, mem_efficient=True
)
SwitchBackLinearVectorwise = functools.partial(SwitchBackLinear, vector_wise_quantization=True)


class StandardLinearFunction(torch.autograd.Function):
    """``apply(input, weight, bias)``: an exact linear layer, gradients in the gradient's dtype."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        needs_X, needs_W, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if needs_W else None, weight if needs_X else None)
        return nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        X, W = ctx.saved_tensors
        G = _rows(grad_output)
        grad_X = grad_output @ W.to(grad_output.dtype) if ctx.needs_input_grad[0] else None
        return grad_X, *_weight_and_bias_gradients(ctx, G, X)


class StandardLinear(nn.Linear):
    """An exact linear layer through :class:`StandardLinearFunction`: the baseline of the others."""

    def forward(self, x: Tensor) -> Tensor:
        return StandardLinearFunction.apply(x, self.weight, self.bias)


class SwitchBackLinearBnb(Linear8bitLt):
    """``Linear8bitLt`` whose weight gradient is computed from unquantized activations. Outputs are float16.

    Args:
        input_features, output_features, bias, device: as for ``torch.nn.Linear``.
        has_fp16_weights: keep the float weight and quantize it as it is used (training); otherwise it is quantized
            once, when the layer is moved to its device.
        memory_efficient_backward: recorded in the state.
        threshold: columns of the input with a magnitude of at least this are multiplied in float16; 0 for none.
        index: opaque, kept for the caller.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        memory_efficient_backward: bool = False,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            has_fp16_weights=has_fp16_weights,
            threshold=threshold,
            index=index,
            device=device,
        )
        state: Any = self.state
        state.memory_efficient_backward = memory_efficient_backward

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` to ``[..., out_features]``, float16 plus the bias."""
        state = self.state
        state.is_training = self.training
        if getattr(self.weight, "CB", None) is not None:
            self.init_8bit_state()
        fixed = not state.has_fp16_weights and state.CB is not None
        weight = self.weight if fixed else self.weight.half()
        out = switchback_bnb(x.half(), weight, bias=None, state=state)
        if not state.has_fp16_weights and state.CB is not None and self.weight.dtype != torch.int8:
            self.weight.requires_grad = False
            self.weight.data = state.CB
        return out if self.bias is None else out + self.bias


for _class in (SwitchBackLinear, StandardLinear, StandardLinearFunction):
    _class.__module__ = "bitsandbytes.nn.triton_based_modules"  # the face that pickles record
SwitchBackLinearBnb.__module__ = "bitsandbytes.nn.modules"
