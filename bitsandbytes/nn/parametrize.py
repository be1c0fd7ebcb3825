"""4-bit storage for any parameter of any module, through torch's parametrizations.

Expert weights of mixture-of-experts models are often plain parameters, stacked to three dimensions, that no linear
layer owns. Here such a parameter is stored packed and decoded when it is read, at most once in each forward of its
module. Checkpoints hold it under its own name, with the same entries beside it as a 4-bit layer's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as P

from .._formats.state import QuantState
from .._quant.fourbit import dequantize_4bit, quantize_4bit
from ._checkpoint import read_state, save_state, take_entries
from ._layers import move_state

__all__ = ["Bnb4bitParametrization", "replace_parameter_4bit", "replace_parameter_4bit_prequantized"]


class Bnb4bitParametrization(nn.Module):
    """Decodes a packed parameter when it is read; no gradients."""

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """The parameter in the shape and dtype it was quantized from."""
        return dequantize_4bit(quantized_param, self.quant_state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bnb4bitParametrization:
        # Follow the packed parameter. The probe is of its dtype, so that a cast of the module leaves it alone.
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.quant_state.absmax.device)).device
        if device != self.quant_state.absmax.device:
            move_state(self.quant_state, device)
        return self

    def extra_repr(self) -> str:
        state = self.quant_state
        shape = None if state.shape is None else list(state.shape)
        return (
            f"quant_type={state.quant_type}, blocksize={state.blocksize}, nested={state.nested}, shape={shape}, "
            f"dtype={state.dtype}"
        )


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize the parameter ``module.<param_name>``, of any rank, where it lies; reading it then decodes it.

    Raises:
        AttributeError: the module has no such attribute.
        TypeError: the attribute is not an ``nn.Parameter``.
        ValueError: the parameter's dtype, ``quant_type`` or ``blocksize`` is not supported.
    """
    original = _parameter(module, param_name)
    packed, state = quantize_4bit(
        original.data, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    setattr(module, param_name, nn.Parameter(packed, requires_grad=False))
    del original
    _parametrize(module, param_name, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: Mapping[str, Any], device: torch.device | str
) -> None:
    """Declare that ``module.<param_name>`` already holds packed codes, with the checkpoint entries ``qs_dict``.

    Raises:
        AttributeError: the module has no such attribute.
        TypeError: the attribute is not an ``nn.Parameter``.
        ValueError: ``qs_dict`` does not describe one quantization state.
    """
    original = _parameter(module, param_name)
    state = QuantState.from_dict(qs_dict, device=device)
    setattr(module, param_name, nn.Parameter(original.data.to(device), requires_grad=False))
    del original
    _parametrize(module, param_name, state)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter '{name}'")
    if not isinstance(getattr(module, name), nn.Parameter):
        raise TypeError(f"Parameter '{name}' is not an instance of nn.Parameter")
    return getattr(module, name)


def _parametrize(module: nn.Module, param_name: str, state: QuantState) -> None:
    # unsafe: torch's check would decode and encode again, and there is nothing to encode with.
    P.register_parametrization(module, param_name, Bnb4bitParametrization(state), unsafe=True)
    # torch's property remembers this very module: a cycle, and copies of the module would share one cache entry.
    setattr(type(module), param_name, property(partial(_read, param_name), partial(_write, param_name)))
    _register_parametrization_hooks(module, param_name)


def _read(param_name: str, module: nn.Module) -> Tensor:
    decode = module.parametrizations[param_name]
    if not P._cache_enabled:
        return decode()
    key = (id(module), param_name)
    value = P._cache.get(key)
    if value is None:
        value = P._cache[key] = decode()
    return value


def _write(param_name: str, module: nn.Module, value: Tensor) -> None:
    module.parametrizations[param_name].right_inverse(value)


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    """Checkpoints under the parameter's own name, and one decoding per forward."""
    module.register_state_dict_post_hook(partial(_parametrized_state_dict_post_hook, param_name=param_name))
    module.register_load_state_dict_pre_hook(
        partial(_parametrized_load_state_dict_pre_hook, param_name=param_name)
    )
    module.register_forward_pre_hook(_enable_parametrization_cache)
    # Also when the forward raises, as under checkpointing, which stops a recomputation early.
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


def _enable_parametrization_cache(module: nn.Module, inputs: Any) -> None:
    P._cache_enabled += 1


def _disable_parametrization_cache(module: nn.Module, inputs: Any, output: Any) -> None:
    P._cache_enabled = max(P._cache_enabled - 1, 0)
    if P._cache_enabled == 0:
        P._cache = {}


def _parametrized_state_dict_post_hook(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    *,
    param_name: str = "weight",
    **kwargs: Any,
) -> None:
    """Store the packed parameter as ``<param_name>`` and its quantization state beside it."""
    stored = f"{prefix}parametrizations.{param_name}.original"
    if stored not in state_dict:
        return
    key = f"{prefix}{param_name}"
    state_dict[key] = state_dict.pop(stored)
    parametrization = next(
        p for p in module.parametrizations[param_name] if isinstance(p, Bnb4bitParametrization)
    )
    save_state(state_dict, key, parametrization.quant_state, keep_vars=False)


def _parametrized_load_state_dict_pre_hook(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
    *,
    param_name: str,
) -> None:
    """Read what :func:`_parametrized_state_dict_post_hook` stored; the values themselves are left to torch."""
    if not P.is_parametrized(module, param_name):  # it was removed again
        return
    key, stored = f"{prefix}{param_name}", f"{prefix}parametrizations.{param_name}.original"
    if key not in state_dict and f"{key}.weight" in state_dict:
        key = f"{key}.weight"  # where an Experts4bit of that name has it
    entries = take_entries(state_dict, key)
    if key not in state_dict:
        return
    packed = state_dict.pop(key)
    parametrizations = module.parametrizations[param_name]
    parametrization = next(p for p in parametrizations if isinstance(p, Bnb4bitParametrization))
    state, original = parametrization.quant_state, parametrizations.original
    assign = local_metadata.get("assign_to_params_buffers", False)
    in_place = not assign and not original.is_meta
    try:
        if not entries:
            raise ValueError(
                "the checkpoint holds no quantization entries beside it, but the parameter is quantized"
            )
        device = original.device if in_place else getattr(packed, "device", "cpu")
        loaded = read_state(packed, entries, [tuple(state.shape)], device, duplicate=not assign)
    except ValueError as error:
        error_msgs.append(f"While loading {key}: {error}")
        state_dict[stored] = original.detach()  # so that torch does not report it as missing, too
        return
    parametrization.quant_state = loaded
    if not assign and (original.shape != packed.shape or original.dtype != packed.dtype or original.is_meta):
        parametrizations.original = nn.Parameter(
            torch.empty_like(packed, device=device, memory_format=torch.contiguous_format),
            requires_grad=False,
        )
    state_dict[stored] = packed
