"""Linear layers for LLM.int8() (Dettmers et al., 2022): int8 weight, activations quantized on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.int8 import MatmulLtState, matmul
from ._checkpoint import load_int8, maybe_rearrange_weight, save_int8_statistics
from ._layers import (
    bias_as,
    bias_to_save,
    forget_given_bias,
    move_tensor,
    move_with_statistics,
    parameter_of,
    restore_class,
)
from .int8_params import Int8Params

__all__ = ["Linear8bitLt"]


class Linear8bitLt(nn.Linear):
    """``nn.Linear`` with an int8 weight, quantized when the layer first moves to a device or, failing that, runs.

    Args:
        has_fp16_weights: keep the float weight, train it, and quantize it in each forward.
        threshold: input features with a value of at least this magnitude are multiplied in the input's dtype; 0 is off.
        index: not used by the layer; programs read it.

    ``state_dict`` holds the int8 weight, its row statistics ``SCB`` and the number of the layout, ``weight_format``.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: Any = None,
    ) -> None:
        if threshold < 0.0:
            raise ValueError(f"threshold must be 0 (off) or positive, got {threshold}")
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self.index = index
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        self.state.use_pool = threshold > 0.0 and not has_fp16_weights
        self.weight = Int8Params(
            self.weight.data, has_fp16_weights=has_fp16_weights, requires_grad=has_fp16_weights
        )
        self._register_load_state_dict_pre_hook(maybe_rearrange_weight)

    def init_8bit_state(self) -> None:
        """Move the int8 weight and its statistics from the parameter to the state.

        A weight moved with ``.to`` after a forward comes without statistics: they are in the state already.
        """
        self.state.CB = self.weight.CB
        if self.weight.SCB is not None:
            self.state.SCB = self.weight.SCB
        self.weight.CB = None
        self.weight.SCB = None

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` to ``[..., out_features]`` in x's dtype."""
        state, weight = self.state, parameter_of(self, "weight")
        if state.has_fp16_weights and state.is_training and not self.training:
            state.reset_grads()  # the weight may have been trained since it was quantized last
        state.is_training = self.training
        if getattr(weight, "CB", None) is not None:
            self.init_8bit_state()
        elif state.CB is None and weight.dtype == torch.int8 and getattr(weight, "SCB", None) is not None:
            weight.CB = weight.data  # built from int8 data and never moved
            self.init_8bit_state()
        product = matmul(x, weight, bias=bias_as(self, x.dtype), state=state)
        if not torch.compiler.is_compiling():
            self._adopt_codes()
        return product

    def _adopt_codes(self) -> None:
        """Make the parameter the int8 weight that the state holds, in case this forward quantized it."""
        weight, codes = parameter_of(self, "weight"), self.state.CB
        if self.state.has_fp16_weights or codes is None or weight.data_ptr() == codes.data_ptr():
            return
        weight.requires_grad = False
        weight.data = codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear8bitLt:
        forget_given_bias(self)
        move_with_statistics(self, super()._apply, fn, recurse)
        weight, state = self.weight, self.state
        if state.CB is not None:
            is_weight = weight.dtype == torch.int8 and weight.shape == state.CB.shape
            state.CB = weight.data if is_weight else move_tensor(state.CB, weight.device)
        if state.SCB is not None:
            state.SCB = move_tensor(state.SCB, weight.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        restore_class(self, Int8Params)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bias is not None and not keep_vars:
            destination[f"{prefix}bias"] = bias_to_save(self)
        absmax = getattr(self.weight, "SCB", None)
        absmax = self.state.SCB if absmax is None else absmax
        # A weight that a program replaced, for example to tie it, has no statistics.
        if absmax is not None and not self.state.has_fp16_weights and self.weight.dtype == torch.int8:
            save_int8_statistics(destination, prefix, absmax, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        forget_given_bias(self)
        load_int8(self, super()._load_from_state_dict, *arguments)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, format=int8, blocksize=row, weight_dtype={self.weight.dtype}, "
            f"has_fp16_weights={self.state.has_fp16_weights}, threshold={self.state.threshold}"
        )


# Pickles record the public path.
Linear8bitLt.__module__ = "bitsandbytes.nn.modules"
