"""What the quantized layers share: moving between devices, and a bias that follows the dtype of the computation.

``nn.Module`` moves a parameter with whatever function it is given and wraps the result itself. Left alone it would cast
packed bytes to another dtype, lose the parameter's class on the way to and from the meta device, and leave statistics
behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import ArgumentError
from .._formats.state import QuantState
from .._formats.table import FORMATS, STORAGE_DTYPES
from .int8_params import Int8Params
from .params4bit import Params4bit

__all__ = [
    "bias_as",
    "bias_to_save",
    "check_format_and_storage",
    "forget_given_bias",
    "move_state",
    "move_tensor",
    "move_with_statistics",
    "parameter_of",
    "restore_class",
]

_GIVEN_BIAS = "_given_bias"


def check_format_and_storage(quant_type: str, quant_storage: torch.dtype) -> None:
    """Refuse at construction what would fail when the weight is quantized."""
    if quant_type not in FORMATS:
        raise ArgumentError(f"quant_type must be one of {sorted(FORMATS)}, got {quant_type!r}")
    if quant_storage not in STORAGE_DTYPES:
        raise ArgumentError(f"quant_storage must be one of {list(STORAGE_DTYPES)}, got {quant_storage!r}")


def restore_class(module: nn.Module, cls: type[Params4bit] | type[Int8Params]) -> None:
    """Pickles of earlier releases hold the weight as a plain parameter that carries the attributes."""
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter and ("bnb_quantized" in weight.__dict__ or "SCB" in weight.__dict__):
        module._parameters["weight"] = cls(
            weight.data, **{**weight.__dict__, "requires_grad": weight.requires_grad}
        )


def move_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; from meta, which holds no values, uninitialised memory."""
    if tensor.is_meta and device.type != "meta":
        return torch.empty_like(tensor, device=device)
    return tensor.to(device)


def move_state(state: QuantState, device: torch.device) -> None:
    """Move a state's tensors in place, also away from the meta device."""
    if not state.absmax.is_meta or device.type == "meta":
        state.to(device)
        return
    for owner, names in ((state, ("absmax", "code", "offset")), (state.state2, ("absmax", "code"))):
        for name in names if owner is not None else ():
            tensor = getattr(owner, name)
            if tensor is not None:
                setattr(owner, name, move_tensor(tensor, device))


def move_with_statistics(
    module: nn.Module, apply: Callable[..., Any], fn: Callable[[Tensor], Tensor], recurse: bool = True
) -> None:
    """Run ``nn.Module._apply`` (``apply``) so that the quantized weight keeps class, attributes and bytes.

    Statistics go where the weight goes.
    """
    weight = module._parameters.get("weight")
    if not isinstance(weight, (Params4bit, Int8Params)):
        apply(fn, recurse)
        return
    cls = type(weight)
    attributes: dict[str, Any] = {}

    def keep_codes(tensor: Tensor) -> Tensor:
        if tensor is not weight:
            return fn(tensor)
        was_quantized, dtype = _holds_codes(weight), weight.dtype
        moved = fn(weight)
        if was_quantized and moved.dtype != dtype:
            moved = weight.to(moved.device)
        attributes.update(weight.__dict__)
        return moved.data  # a plain tensor: what nn.Parameter can wrap

    apply(keep_codes, recurse)

    moved = module._parameters["weight"]
    if type(moved) is not cls:
        moved = torch.Tensor._make_subclass(cls, moved.data, moved.requires_grad)
        moved.__dict__.update(attributes)
        module._parameters["weight"] = moved
    if isinstance(moved, Params4bit):
        if moved.quant_state is not None and moved.quant_state.absmax.device != moved.device:
            move_state(moved.quant_state, moved.device)
    elif isinstance(moved, Int8Params):
        if moved.CB is not None:
            moved.CB = moved.data
        if moved.SCB is not None:
            moved.SCB = move_tensor(moved.SCB, moved.device)


def _holds_codes(weight: Params4bit | Int8Params) -> bool:
    return weight.bnb_quantized if isinstance(weight, Params4bit) else weight.dtype == torch.int8


def parameter_of(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)``, without the half microsecond of ``nn.Module.__getattr__`` where it is a parameter."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def bias_as(module: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """The layer's bias in ``dtype``. The parameter itself is cast, as programs expect; saving still writes the original."""
    bias = parameter_of(module, "bias")
    if bias is None or bias.dtype is dtype:
        return bias
    if torch.compiler.is_compiling():
        return bias.to(dtype)
    given = bias_to_save(module)
    bias.data = given.to(dtype)
    module.__dict__[_GIVEN_BIAS] = given
    return bias


def bias_to_save(module: nn.Module) -> Tensor:
    """The bias as it was given, unless its value changed after :func:`bias_as` cast it."""
    bias, given = module.bias.data, module.__dict__.get(_GIVEN_BIAS)
    if given is None or given.shape != bias.shape or bias.is_meta:
        return bias
    given = given.to(bias.device)
    return given if torch.equal(given.to(bias.dtype), bias) else bias


def forget_given_bias(module: nn.Module) -> None:
    """Undo :func:`bias_as`: the parameter is as it was given, so that moving and loading round nothing."""
    given = module.__dict__.get(_GIVEN_BIAS)
    if given is not None and module.bias is not None:
        module.bias.data = bias_to_save(module).to(given.dtype)
    module.__dict__.pop(_GIVEN_BIAS, None)
