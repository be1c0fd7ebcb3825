"""Quantized weights in state dicts: what layers write beside ``weight``, and reading it back.

Loading is exact and all or nothing: everything about a weight is checked before the layer changes, and whatever does
not fit becomes one of ``load_state_dict``'s error messages. A layer takes the format, block size and storage that the
checkpoint was made with, whether it was quantized before or not. On the meta device there is nothing to copy into, so
the checkpoint's tensors (copies, unless ``assign=True``) take the place of the layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .._formats.state import QuantState
from .._formats.table import (
    BLOCKSIZES,
    FLOAT_DTYPES,
    FORMATS,
    INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING,
    LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING,
    STORAGE_DTYPES,
)
from .int8_params import Int8Params
from .params4bit import Params4bit

__all__ = [
    "load_4bit",
    "load_int8",
    "maybe_rearrange_weight",
    "read_state",
    "save_int8_statistics",
    "save_state",
    "take_entries",
]

_BLOB = "quant_state."


# --- 4-bit -----------------------------------------------------------------------------------------------------


def save_state(destination: dict[str, Any], key: str, state: QuantState, keep_vars: bool) -> None:
    """Write a state's entries as ``<key>.<entry>``."""
    for name, value in state.as_dict(packed=True).items():
        destination[f"{key}.{name}"] = value if keep_vars else value.detach()


def take_entries(state_dict: dict[str, Any], key: str) -> dict[str, Any]:
    """Remove the quantization entries of the tensor ``key`` and return them under their own names."""
    prefix = f"{key}."
    names = (k[len(prefix) :] for k in state_dict if k.startswith(prefix))
    known = [name for name in names if name in QuantState.valid_qs_keys or name.startswith(_BLOB)]
    return {name: state_dict.pop(prefix + name) for name in known}


def read_state(
    packed: Any, entries: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], device: Any, duplicate: bool
) -> QuantState:
    """The state that checkpoint ``entries`` describe, after checking that it fits ``packed`` and one of ``shapes``.

    Raises:
        ValueError: an entry is missing, damaged or does not fit; the text says which.
    """
    if not isinstance(packed, Tensor):
        raise ValueError(f"expected a tensor of packed codes, got {type(packed).__name__}")
    if duplicate:
        entries = {
            name: value.to(device, copy=True)
            if isinstance(value, Tensor) and not name.startswith(_BLOB)
            else value
            for name, value in entries.items()
        }
    try:
        state = QuantState.from_dict(entries, device)
    except KeyError as error:
        raise ValueError(f"the quantization entry {error} is missing; found {sorted(entries)}") from error
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the quantization entries {sorted(entries)} cannot be read: {error}") from error
    _check_state(state, entries)

    if state.shape is None or not any(tuple(state.shape) == tuple(shape) for shape in shapes):
        allowed = " or ".join(str(list(shape)) for shape in dict.fromkeys(tuple(s) for s in shapes))
        held = None if state.shape is None else list(state.shape)
        raise ValueError(
            f"size mismatch: the checkpoint holds a quantized tensor of shape {held}, expected {allowed}"
        )
    _check_sizes(packed, state)
    for owner in (state, state.state2):  # some tools cast every floating-point tensor of a checkpoint
        if owner is not None and owner.absmax.is_floating_point():
            owner.absmax = owner.absmax.float()
    return state


def _check_state(state: QuantState, entries: Mapping[str, Any]) -> None:
    blobs = [name for name in entries if name.startswith(_BLOB)]
    if blobs and blobs[0].removeprefix(f"{_BLOB}bitsandbytes__") != state.quant_type:
        raise ValueError(f"{blobs[0]!r} says its format is {state.quant_type!r}")
    facts = [
        ("quant_type", state.quant_type, tuple(FORMATS)),
        ("blocksize", state.blocksize, BLOCKSIZES),
        ("dtype", state.dtype, FLOAT_DTYPES),
    ]
    for name, value, allowed in facts:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
    if state.nested and not (isinstance(state.state2.blocksize, int) and state.state2.blocksize > 0):
        raise ValueError(f"nested_blocksize must be a positive integer, got {state.state2.blocksize!r}")


def _check_sizes(packed: Tensor, state: QuantState) -> None:
    numel = prod(state.shape)
    blocks = -(numel // -state.blocksize)
    if packed.dtype not in STORAGE_DTYPES:
        raise ValueError(f"packed codes must be one of {list(STORAGE_DTYPES)}, got {packed.dtype}")
    held, needed = packed.numel() * packed.element_size(), (numel + 1) // 2
    if held != needed:
        raise ValueError(f"packed codes of shape {list(state.shape)} must have {needed} bytes, got {held}")
    expected = [("absmax", state.absmax, blocks), ("quant_map", state.code, 16)]
    if state.nested:
        second = state.state2
        expected += [
            ("nested_absmax", second.absmax, -(blocks // -second.blocksize)),
            ("nested_quant_map", second.code, 256),
        ]
    for name, tensor, count in expected:
        if tensor.numel() != count:
            raise ValueError(
                f"{name} must have {count} values for shape {list(state.shape)}, got {tensor.numel()}"
            )
    if state.nested != (state.absmax.dtype == torch.uint8):
        kind = (
            "uint8 beside nested statistics" if state.nested else "floating point without nested statistics"
        )
        raise ValueError(f"absmax must be {kind}, got {state.absmax.dtype}")


def load_4bit(
    module: nn.Module,
    load: Callable[..., None],
    shape: tuple[int, ...],
    quant_type: str | None,
    *arguments: Any,
) -> None:
    """``nn.Module._load_from_state_dict`` (``load``, with its ``arguments``) for a layer with a 4-bit weight.

    ``shape`` is that of the float weight; ``quant_type`` is the only format the layer takes, if it has just one.
    """
    state_dict, prefix, local_metadata, strict, missing_keys, _, error_msgs = arguments
    key = f"{prefix}weight"
    entries = take_entries(state_dict, key)
    packed = state_dict.get(key)
    done = False
    if packed is not None and (entries or not _has_hooks(module)):
        if entries:
            assign = local_metadata.get("assign_to_params_buffers", False)
            try:
                _load_4bit_weight(module, packed, entries, assign, shape, quant_type)
                _allocate_bias(module, state_dict.get(f"{prefix}bias"), assign)
            except ValueError as error:
                error_msgs.append(f"While loading {key}: {error}")
            done = True
            del state_dict[key]
        else:
            quantized = getattr(module.weight, "quant_state", None) is not None
            done = _refuse_unlike(state_dict, key, module.weight, quantized, error_msgs)
            if quantized and not done and strict:
                missing_keys += [f"{key}.{name}" for name in module.weight.quant_state.as_dict(packed=True)]
    _load_rest(module, load, arguments, key if done else None)


def _load_4bit_weight(
    module: nn.Module,
    packed: Any,
    entries: dict[str, Any],
    assign: bool,
    shape: tuple[int, ...],
    quant_type: str | None,
) -> None:
    """Check a packed weight and its entries, then make them the layer's."""
    weight = module.weight
    in_place = isinstance(weight, Params4bit) and not assign and not weight.is_meta
    device = weight.device if in_place else getattr(packed, "device", "cpu")
    # A layer quantized from a transposed weight loads what it saved.
    own = getattr(getattr(weight, "quant_state", None), "shape", None)
    state = read_state(
        packed, entries, [shape] if own is None else [shape, tuple(own)], device, duplicate=not assign
    )
    if quant_type not in (None, state.quant_type):
        raise ValueError(f"{type(module).__name__} holds {quant_type}, the checkpoint {state.quant_type}")

    if in_place:
        _replace_data(weight, packed.detach())
    else:
        cls = type(weight) if isinstance(weight, Params4bit) else Params4bit
        weight = cls(
            packed.detach() if assign else packed.detach().clone(), requires_grad=False, module=module
        )
        module.weight = weight
    weight.quant_state = state
    weight.blocksize = state.blocksize
    weight.compress_statistics = state.nested
    weight.quant_type = state.quant_type
    weight.quant_storage = packed.dtype
    weight.bnb_quantized = True
    for layer in (module, weight.module):  # they differ where layers share a weight
        if layer is not None:
            layer.quant_state = state
            layer.quant_storage = packed.dtype


def _has_hooks(module: nn.Module) -> bool:
    """Whether a program put hooks of its own before loading; some quantize float weights there, so let them."""
    hooks = (getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values())
    return any(hook is not maybe_rearrange_weight for hook in hooks)


def _load_rest(module: nn.Module, load: Callable[..., None], arguments: tuple, done: str | None) -> None:
    """Let torch load everything but the key that is ``done``. Assigning, it would drop the parameter's class."""
    weight = module.weight
    load(*arguments)
    missing_keys = arguments[4]
    if done in missing_keys:
        missing_keys.remove(done)
    cls = type(weight)
    if issubclass(cls, (Params4bit, Int8Params)) and type(module.weight) is not cls:
        given = module.weight
        module.weight = torch.Tensor._make_subclass(cls, given.data, given.requires_grad)
        module.weight.__dict__.update(weight.__dict__)


def _allocate_bias(module: nn.Module, given: Any, assign: bool) -> None:
    """A layer that leaves the meta device with its weight takes its bias along."""
    bias = module._parameters.get("bias")
    if bias is None or not bias.is_meta or assign or not isinstance(given, Tensor) or given.is_meta:
        return
    module.bias = nn.Parameter(torch.empty_like(bias, device=given.device), requires_grad=bias.requires_grad)


def _refuse_unlike(
    state_dict: dict[str, Any], key: str, weight: Tensor, quantized: bool, error_msgs: list[str]
) -> bool:
    """Codes without statistics must not pass for values, nor values for codes. torch copies between any dtypes."""
    value = state_dict[key]
    if not isinstance(value, Tensor):
        return False
    if quantized and (value.shape != weight.shape or value.dtype != weight.dtype):
        problem = "this layer is quantized; load such a checkpoint first and quantize then"
    elif not quantized and value.dtype in (torch.uint8, torch.int8) and weight.dtype != value.dtype:
        problem = "quantized codes without their statistics"
    else:
        return False
    del state_dict[key]
    error_msgs.append(
        f"size mismatch for {key}: {value.dtype} of shape {list(value.shape)} in the checkpoint, "
        f"{weight.dtype} of shape {list(weight.shape)} in the model: {problem}"
    )
    return True


def _replace_data(weight: nn.Parameter, values: Tensor) -> None:
    """Copy ``values`` into a parameter, in its own memory where they fit."""
    if weight.shape == values.shape and weight.dtype == values.dtype:
        weight.data.copy_(values)
    else:
        if not values.is_floating_point():
            weight.requires_grad = False
        weight.data = values.to(weight.device, copy=True, memory_format=torch.contiguous_format)


# --- int8 ------------------------------------------------------------------------------------------------------


def save_int8_statistics(destination: dict[str, Any], prefix: str, absmax: Tensor, keep_vars: bool) -> None:
    """Write what belongs to int8 rows: their absmax, and the number of the row-major layout."""
    destination[f"{prefix}SCB"] = absmax if keep_vars else absmax.detach()
    destination[f"{prefix}weight_format"] = torch.tensor(
        LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING["row"], dtype=torch.uint8
    )


def maybe_rearrange_weight(
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load-state-dict pre-hook: take ``weight_format`` out of the checkpoint and make sure that we read that layout.

    Older files hold its name, newer ones its number; a missing one means "row".

    Raises:
        ValueError: another layout than "row", or no layout at all.
    """
    if state_dict.get(f"{prefix}weight") is None:
        return
    found = state_dict.pop(f"{prefix}weight_format", "row")
    if isinstance(found, Tensor):
        found = found.item()
    if isinstance(found, int):
        if found not in INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING:
            raise ValueError(f"Expected supported weight format - got {found}")
        found = INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING[found]
    if found != "row":
        raise ValueError(f"Only 'row' weight format is supported, got {found}")


def load_int8(module: nn.Module, load: Callable[..., None], *arguments: Any) -> None:
    """``nn.Module._load_from_state_dict`` (``load``, with its ``arguments``) for a layer with an int8 weight.

    The layer holds its statistics in the weight or, after a forward, in ``module.state``.
    """
    maybe_rearrange_weight(*arguments)
    state_dict, prefix, local_metadata, _, _, _, error_msgs = arguments
    key = f"{prefix}weight"
    codes, absmax = state_dict.get(key), state_dict.pop(f"{prefix}SCB", None)
    weight = module.weight
    is_int8 = weight.dtype == torch.int8
    held = _absmax_of(module)
    done = False
    if codes is None:
        if absmax is not None and held is None:
            error_msgs.append(_not_quantized(module, key))
        elif absmax is not None and absmax.shape != held.shape:
            error_msgs.append(
                f"size mismatch for {prefix}SCB: {list(absmax.shape)} instead of {list(held.shape)}"
            )
        elif absmax is not None:
            held.copy_(absmax)
    elif absmax is None and _has_hooks(module):
        pass
    elif absmax is None and not is_int8:
        done = _refuse_unlike(state_dict, key, weight, False, error_msgs)
    else:
        done = True
        del state_dict[key]
        absmax = held if absmax is None else absmax  # older files may lack it: the layer keeps its own
        if getattr(weight, "has_fp16_weights", not is_int8):
            error_msgs.append(_not_quantized(module, key))
        elif (problem := _int8_problem(codes, absmax, weight)) is not None:
            error_msgs.append(f"While loading {key}: {problem}")
        else:
            assign = local_metadata.get("assign_to_params_buffers", False)
            _place_int8(module, codes.detach(), absmax, assign)
            _allocate_bias(module, state_dict.get(f"{prefix}bias"), assign)
    if not done and codes is not None and hasattr(module, "state"):
        module.state.reset_grads()  # what it holds was quantized from the weight before
    _load_rest(module, load, arguments, key if done else None)


def _absmax_of(module: nn.Module) -> Tensor | None:
    absmax = getattr(module.weight, "SCB", None)
    return absmax if absmax is not None else getattr(getattr(module, "state", None), "SCB", None)


def _not_quantized(module: nn.Module, key: str) -> str:
    return (
        f"Loading a quantized checkpoint into non-quantized {type(module).__name__} is not supported: {key} is int8, the layer keeps "
        "float weights"
    )


def _int8_problem(codes: Any, absmax: Any, weight: Tensor) -> str | None:
    if not isinstance(codes, Tensor) or codes.dtype != torch.int8:
        came = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        return f"expected int8 codes for a quantized layer, got {came}; quantize after loading float weights"
    if codes.shape != weight.shape:
        return (
            f"size mismatch: shape {list(codes.shape)} in the checkpoint, {list(weight.shape)} in the model"
        )
    if absmax is None:
        return "int8 codes without SCB, the absmax of their rows"
    if not isinstance(absmax, Tensor) or not absmax.is_floating_point() or absmax.numel() != codes.shape[0]:
        came = f"{absmax.dtype} {list(absmax.shape)}" if isinstance(absmax, Tensor) else type(absmax).__name__
        return f"SCB must hold {codes.shape[0]} floating-point values, one a row, got {came}"
    return None


def _place_int8(module: nn.Module, codes: Tensor, absmax: Tensor, assign: bool) -> None:
    """Put checked codes and statistics where the layer keeps them."""
    weight, state = module.weight, getattr(module, "state", None)
    absmax = absmax.detach().reshape(-1).float()
    in_place = isinstance(weight, Int8Params) and not assign and not weight.is_meta
    if in_place:
        _replace_data(weight, codes)
        absmax = absmax.to(weight.device)
    else:
        data = codes if assign else codes.clone()
        cls = type(weight) if isinstance(weight, Int8Params) else Int8Params
        weight = module.weight = cls(data, requires_grad=False, has_fp16_weights=False)
    if not assign:
        absmax = absmax.clone()

    used = state is not None and state.CB is not None  # a forward has moved the statistics into the state
    if used and in_place:
        state.CB = weight.data
        if state.SCB is not None and state.SCB.shape == absmax.shape and state.SCB.device == absmax.device:
            state.SCB.copy_(absmax)
        else:
            state.SCB = absmax
        return
    if state is not None:
        state.reset_grads()
    weight.CB = weight.data
    if in_place and weight.SCB is not None and weight.SCB.device == absmax.device:
        weight.SCB.copy_(absmax)
    else:
        weight.SCB = absmax


# Pickled layers refer to their hook, by the public path.
maybe_rearrange_weight.__module__ = "bitsandbytes.nn.modules"
