"""Parameters of which a process holds a part: DTensors (FSDP2, tensor parallelism) and FSDP1's flattened ones.

Each process updates its part with state of its own, whose blocks of 256 values start where the part starts. Such blocks
mean nothing to another number of processes, so a checkpoint holds the state of sharded parameters as float32 tensors
sharded like the parameter (``state1``, ``state2``, and ``state1_slow`` where state1 stacks two averages), which any
torch tool saves, gathers and reshards; ``optim_bits`` beside them says what they are encoded to when they are loaded.
Onto the same layout that gives back the same codes and absmax, bit for bit: in every block the largest value is
written as exactly its absmax, which the signed map could not say of a negative one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._formats.codebooks import midpoints
from .._formats.rules import Rule
from .._formats.table import OPTIMIZER_4BIT_BLOCKSIZE, OPTIMIZER_BLOCKSIZE

__all__ = [
    "BITS_KEY",
    "encoded",
    "global_norm",
    "global_numel",
    "is_dtensor",
    "is_sharded",
    "like_parameter",
    "local_grad",
    "local_of",
    "part_for",
    "record_sizes",
    "shard_offset",
    "sharded_form",
    "unsharded_values",
]

BITS_KEY = "optim_bits"
_SIZE_ATTRIBUTE = "_bnb_global_numel"
_SLOW = "state1_slow"


def is_dtensor(tensor: object) -> bool:
    """Whether ``tensor`` is a DTensor. None can exist before its module was imported, which takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(p: Tensor) -> bool:
    """Whether torch's sharded checkpointing will look at the state of ``p``."""
    return is_dtensor(p) or getattr(p, "_fsdp_flattened", False)


def local_of(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, sharing memory; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_grad(p: Tensor) -> Tensor:
    """The gradient of this process's part of ``p``."""
    grad = p.grad
    assert grad is not None
    if is_dtensor(grad) and is_dtensor(p) and grad.placements != p.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return local_of(grad)


def global_numel(p: Tensor) -> int | None:
    """How many elements ``p`` has over all processes; None if this cannot be known."""
    recorded = getattr(p, _SIZE_ATTRIBUTE, None)
    if recorded is not None or is_dtensor(p) or not is_sharded(p):
        return p.numel() if recorded is None else recorded
    whole = getattr(p, "_unpadded_unsharded_size", None)  # of a FlatParameter
    return None if whole is None else whole.numel()


def record_sizes(module: torch.nn.Module) -> None:
    """Note the whole size of each parameter, which FSDP1 with ``use_orig_params=True`` hides from optimizers.

    Call it on the wrapped module, or on the plain one before wrapping, and before the first step. Without it, 8-bit
    optimizers keep 8-bit state for all of FSDP1's parameters, as ``min_8bit_size`` has nothing to be compared with.
    """
    for p in module.parameters():
        if not is_sharded(p):
            setattr(p, _SIZE_ATTRIBUTE, p.numel())
    for part in module.modules():
        flat = getattr(getattr(part, "_handle", None), "flat_param", None)
        for p, numel in zip(getattr(flat, "_params", None) or (), getattr(flat, "_numels", ()), strict=False):
            setattr(p, _SIZE_ATTRIBUTE, numel)


def shard_offset(p: Tensor) -> int:
    """Position of this process's first element in the whole parameter, whose range its part is if rows are sharded."""
    if not is_dtensor(p):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return sum(start * stride for start, stride in zip(offset, _contiguous_strides(p.shape), strict=True))


def _contiguous_strides(shape: torch.Size) -> list[int]:
    return [int(torch.Size(shape[axis + 1 :]).numel()) for axis in range(len(shape))]


def global_norm(part: Tensor, p: Tensor) -> Tensor:
    """Norm of the whole tensor of which ``part`` belongs to this process's part of ``p``; all processes must call it."""
    if not is_dtensor(p):
        return torch.linalg.vector_norm(part, dtype=torch.float32)
    return torch.linalg.vector_norm(like_parameter(part, p), dtype=torch.float32).full_tensor()


def like_parameter(part: Tensor, p: Tensor) -> Tensor:
    """``part`` as this process's part of a DTensor laid out like ``p``; ``part`` itself for other parameters."""
    if not is_dtensor(p):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        p.device_mesh,  # type: ignore[attr-defined]
        p.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=p.shape,
        stride=tuple(_contiguous_strides(p.shape)),
    )


def part_for(value: Tensor, p: Tensor) -> Tensor:
    """This process's part of a saved tensor that is shaped like the whole of ``p``, or like its part."""
    if not is_dtensor(p):
        return value.full_tensor() if is_dtensor(value) else value  # type: ignore[attr-defined]
    from torch.distributed.tensor import distribute_tensor

    if is_dtensor(value):
        if value.device_mesh == p.device_mesh:  # type: ignore[attr-defined]
            return value.redistribute(placements=p.placements).to_local()  # type: ignore[attr-defined]
        value = value.full_tensor()  # type: ignore[attr-defined]
    whole = value.to(p.device)
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()  # type: ignore[attr-defined]


# --- saving ----------------------------------------------------------------------------------------------------


def _decoded(codes: Tensor, qmap: Tensor, absmax: Tensor, shape: torch.Size) -> Tensor:
    """Values of codes; the lowest code of the signed map counts as -1, so that a block's largest value is its absmax
    whatever its sign."""
    ends = torch.cat((torch.where(qmap[:1] < 0, -1.0, qmap[:1]), qmap[1:]))
    codes, blocksize = codes.reshape(-1), OPTIMIZER_BLOCKSIZE
    if qmap.numel() == 16:
        codes, blocksize = torch.stack((codes >> 4, codes & 15), dim=-1).view(-1), OPTIMIZER_4BIT_BLOCKSIZE
    n = shape.numel()
    scale = absmax.reshape(-1).repeat_interleave(blocksize)[:n]
    return (ends[codes[:n].int()] * scale).view(shape)


def _bits_of(state: Mapping[str, Any]) -> int:
    return 32 if state["state1"].dtype != torch.uint8 else 4 if state["qmap1"].numel() == 16 else 8


def unsharded_values(shape: torch.Size, state: Mapping[str, Any], rule: Rule) -> dict[str, Tensor]:
    """The averages as separate float32 tensors of the parameter's ``shape``, from any kind of state."""
    values: dict[str, Tensor] = {}
    for key in ("state1", "state2")[: rule.states]:
        stored, index = state[key], key[-1]
        averages = [stored] if key == "state2" or rule.averages == 1 else list(stored)
        if stored.dtype == torch.uint8:
            scales = state[f"absmax{index}"].reshape(len(averages), -1)
            qmap = state[f"qmap{index}"].to(stored.device)
            averages = [_decoded(codes, qmap, s, shape) for codes, s in zip(averages, scales, strict=True)]
        values.update(zip((key, _SLOW), averages, strict=False))
    return values


def sharded_form(p: Tensor, state: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    """What a checkpoint holds of the state of a sharded parameter. Not-encoded state is aliased."""
    shown = {"step": state["step"], BITS_KEY: _bits_of(state)}
    if "gnorm_vec" in state and is_dtensor(p):
        shown["gnorm_vec"] = state["gnorm_vec"]
    values = unsharded_values(local_of(p).shape, state, rule)
    return {**shown, **{key: like_parameter(value, p) for key, value in values.items()}}


# --- loading ---------------------------------------------------------------------------------------------------


def encoded(p: Tensor, saved: Mapping[str, Any], rule: Rule, maps: Mapping[str, Tensor]) -> dict[str, Any]:
    """State of ``p`` as the optimizer keeps it, from a checkpoint that was sharded or one that was not.

    ``maps`` are the maps of 8-bit state by the names ``qmap1`` and ``qmap2``, on the device of ``p``.
    """
    coded = (saved[BITS_KEY] if BITS_KEY in saved else _bits_of(saved)) != 32
    whole = {key: value for key, value in saved.items() if key not in ("state1", "state2", _SLOW)}
    state: dict[str, Any] = {
        key: value
        for key, value in whole.items()
        if key != BITS_KEY and not key.startswith(("absmax", "qmap"))
    }
    values = (
        saved
        if saved["state1"].dtype == torch.float32 and _SLOW in saved
        else unsharded_values(p.shape, saved, rule)
    )
    for key in ("state1", "state2")[: rule.states]:
        names = (key, _SLOW) if key == "state1" and rule.averages == 2 else (key,)
        parts = [part_for(values[name], p).to(p.device) for name in names]
        if not coded:
            state[key] = torch.stack(parts) if len(parts) > 1 else parts[0].clone()
            continue
        index = key[-1]
        codes, scales = zip(*(_encoded(part, maps[f"qmap{index}"]) for part in parts), strict=True)
        state[key] = torch.stack(codes) if len(parts) > 1 else codes[0]
        state[f"qmap{index}"] = maps[f"qmap{index}"]
        state[f"absmax{index}"] = torch.stack(scales) if len(parts) > 1 else scales[0]
    return state


def _encoded(values: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the nearest entries, and one absmax a block."""
    if qmap.numel() == 16:
        return _encoded_4bit(values.reshape(-1), qmap)
    if not values.numel():
        return values.to(torch.uint8), values.new_zeros(0)
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values.contiguous(), qmap, OPTIMIZER_BLOCKSIZE)
    # The operator floors the absmax of a short last block; state of nothing but zeros has an absmax of zero.
    return codes.view(values.shape), torch.where(absmax <= 1e-38, 0.0, absmax)


def _encoded_4bit(values: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    n, size = values.numel(), OPTIMIZER_4BIT_BLOCKSIZE
    blocks = torch.nn.functional.pad(values, (0, -n % size)).view(-1, size)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * absmax.clamp(min=1e-38).reciprocal().unsqueeze(1)).view(-1)[:n]
    codes = torch.bucketize(scaled, midpoints(qmap)).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, n % 2)).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], absmax
