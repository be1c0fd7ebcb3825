"""Linear layers whose weight is kept in 4 bits (Dettmers et al., "QLoRA", 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import ArgumentError
from .._formats.state import QuantState
from .._formats.table import FLOAT_DTYPES
from .._native import has_avx512bf16
from ..autograd.fourbit import matmul_4bit
from ._checkpoint import load_4bit, save_state
from ._layers import (
    bias_as,
    bias_to_save,
    check_format_and_storage,
    forget_given_bias,
    move_with_statistics,
    restore_class,
)
from ._notices import notify
from .params4bit import Params4bit, quant_state_of

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4"]


class Linear4bit(nn.Linear):
    """``nn.Linear`` with a 4-bit weight, quantized when the layer first moves to a device (the CPU counts).

    Args:
        compute_dtype: dtype of the multiplication; None takes that of the first input. Inputs are cast to it, and
            outputs back to the input's.
        compress_statistics: quantize the block statistics as well (0.4 bits a weight less).
        quant_type: "fp4" or "nf4".
        quant_storage: dtype the packed bytes pass for, so that sharding tools see a float tensor.

    ``state_dict`` holds the packed weight and its statistics, and loads into quantized and unquantized layers alike.

    Raises:
        ValueError: an unknown ``quant_type``, ``quant_storage`` or ``compute_dtype``.
    """

    _only_quant_type: str | None = None

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        check_format_and_storage(quant_type, quant_storage)
        if compute_dtype is not None and compute_dtype not in FLOAT_DTYPES:
            raise ArgumentError(
                f"compute_dtype must be None or one of {list(FLOAT_DTYPES)}, got {compute_dtype!r}"
            )
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage
        # Programs read this. Our weight stays in the standard layout whatever it says.
        self.support_avx512bf16_for_cpu = has_avx512bf16()

    def set_compute_type(self, x: Tensor) -> None:
        """Take the compute dtype from the first input; warn where that makes the layer slow."""
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        elif x.dtype == torch.float16 and self.compute_dtype in (None, torch.float32):
            slow = "inference" if x.numel() == x.shape[-1] else "inference or training speed"
            notify(
                f"The input of a Linear4bit layer is float16 while its compute_dtype is {self.compute_dtype or 'unset'}. "
                f"This will lead to slow {slow}."
            )

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` to ``[..., out_features]`` in x's dtype; gradients reach x and the bias."""
        own = self._parameters  # nn.Module.__getattr__ takes half a microsecond
        weight = own.get("weight")
        quant_state = getattr(weight, "quant_state", None)
        if quant_state is None:
            quant_state = quant_state_of(self)
            weight = self.weight  # which that may have replaced
        dtype = x.dtype
        if not dtype.is_floating_point:
            raise ArgumentError(f"x must be a floating-point tensor, got {dtype}")
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        compute_dtype = self.compute_dtype
        bias = own.get("bias")
        if bias is None or bias.dtype is not compute_dtype:
            bias = bias_as(self, dtype if compute_dtype is None else compute_dtype)
        if compute_dtype is None or compute_dtype is dtype:
            return matmul_4bit(x, weight, quant_state, None, bias)
        return matmul_4bit(x.to(compute_dtype), weight, quant_state, bias=bias).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        forget_given_bias(self)
        move_with_statistics(self, super()._apply, fn, recurse)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        restore_class(self, Params4bit)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bias is not None and not keep_vars:
            destination[f"{prefix}bias"] = bias_to_save(self)
        state = getattr(self.weight, "quant_state", None)
        if state is not None:
            save_state(destination, f"{prefix}weight", state, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        forget_given_bias(self)
        shape = (self.out_features, self.in_features)
        load_4bit(self, super()._load_from_state_dict, shape, self._only_quant_type, *arguments)

    def extra_repr(self) -> str:
        weight = self.weight
        quantized = getattr(weight, "quant_state", None) is not None
        return (
            f"{super().extra_repr()}, quant_type={getattr(weight, 'quant_type', None)}, "
            f"blocksize={getattr(weight, 'blocksize', None)}, nested={bool(getattr(weight, 'compress_statistics', False))}, "
            f"compute_dtype={self.compute_dtype}, quant_storage={self.quant_storage}, quantized={quantized}"
        )


class LinearFP4(Linear4bit):
    """:class:`Linear4bit` in FP4."""

    _only_quant_type = "fp4"

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "fp4",
            quant_storage,
            device,
        )


class LinearNF4(Linear4bit):
    """:class:`Linear4bit` in NF4, the format for normally distributed weights."""

    _only_quant_type = "nf4"

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "nf4",
            quant_storage,
            device,
        )


# Pickles record the public path.
for _public in (Linear4bit, LinearFP4, LinearNF4):
    _public.__module__ = "bitsandbytes.nn.modules"
