"""Stochastic rounding of bfloat16 parameters: where its dice come from.

A group with a ``rounding_seed`` rounds stochastically. The seed is drawn from torch's generator when the group is made,
is saved with the group, and is the same in every process, so replicas stay equal. The key of one parameter's step
hashes the seed, the parameter's place in the group and the step; the kernels hash that with the element's index.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ._sharded import shard_offset

__all__ = ["new_seed", "rounding_key", "write_rounded"]

_WORD = (1 << 64) - 1


def new_seed() -> int:
    """A seed from torch's default generator; that of the first process if there are several."""
    seed = torch.randint(1 << 62, (), dtype=torch.int64)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        shared = [int(seed)]
        dist.broadcast_object_list(shared)
        return shared[0]
    return int(seed)


def rounding_key(seed: int, index: int, step: int) -> int:
    """A key of 63 bits for one step of one parameter; neighbours have nothing in common (splitmix64)."""
    key = seed & _WORD
    for part in (index, step):
        key = (key + (part + 1) * 0x9E3779B97F4A7C15) & _WORD
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _WORD
        key ^= key >> 31
    return key >> 1


def write_rounded(parameter: Tensor, part: Tensor, values: Tensor, seed: int, index: int, step: int) -> None:
    """Round float32 ``values`` into ``part``, what is here of ``parameter``; shards share the dice of the whole."""
    key, offset = rounding_key(seed, index, step), shard_offset(parameter)
    if part.is_contiguous():
        torch.ops.bitsandbytes.round_to_bfloat16.out(values, key, offset, out=part)
    else:
        part.copy_(torch.ops.bitsandbytes.round_to_bfloat16(values, key, offset))
