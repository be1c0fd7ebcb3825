"""Optimizer updates on CUDA: single tensors through the operators everyone has, many through one launch.

Paged state is used where it lies: the kernel's address for it is the host's. Any other tensor in host memory, and any
strided one, is copied to the device and back.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..._formats.rules import RULES
from ..._native import ABI, DTYPE_ID, RULE_ID, device_of, has_native, has_room_for_maps, lib, ptr, stream_of
from ..._ops import (
    Operator,
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
    optimizer_update_many,
)
from ..default.optimizer_update import update_kernel
from ..default.optimizers import plain_memory, update_8bit

__all__: list[str] = []


def _native_update(operator: Operator, symbol: str) -> Callable[[Callable], Callable]:
    """Register the update for CUDA if the library has its symbol."""
    return update_kernel(operator, "cuda") if has_native(symbol) else lambda fill: fill


def _scratch(count: int, device: torch.device) -> Tensor:
    return torch.empty(lib.bnb_cuda_optimizer_scratch(count), dtype=torch.uint8, device=device)


class _Reachable:
    """Tensors as contiguous memory that a kernel on ``device`` can reach; copies are written back at the end."""

    def __init__(self, device: torch.device, *tensors: Tensor | None) -> None:
        self._tensors = tensors
        self._paged = [getattr(t, "is_paged", False) and t.is_contiguous() for t in tensors]  # type: ignore[union-attr]
        moved = (None if paged else t for t, paged in zip(tensors, self._paged, strict=True))
        self._memory = plain_memory(device, *moved)

    def __enter__(self) -> list[Tensor | None]:
        work = self._memory.__enter__()
        return [t if paged else w for t, w, paged in zip(self._tensors, work, self._paged, strict=True)]

    def __exit__(self, *error: object) -> None:
        self._memory.__exit__(*error)  # type: ignore[arg-type]


@_native_update(optimizer_update_32bit, "bnb_cuda_optimizer_update_32bit")
def _(update):
    g, device, unorm, scratch = update.g.contiguous(), update.p.device, None, None
    if update.limit is not None:
        unorm = torch.empty(1, device=device) if update.unorm_vec is None else update.unorm_vec
        scratch = _scratch(1, device)
    memory = _Reachable(device, update.p, update.state1, update.state2, unorm)
    with device_of(update.p), memory as (p, *states, unorm):
        lib.bnb_cuda_optimizer_update_32bit(
            ptr(g),
            DTYPE_ID[g.dtype],
            ptr(p),
            DTYPE_ID[update.p.dtype],
            *map(ptr, states),
            ptr(unorm),
            ptr(scratch),
            update.p.numel(),
            RULE_ID[update.rule.name],
            update.config(),
            stream_of(update.p),
        )


@lru_cache
def _warn_of_small_memory(capability: tuple[int, int]) -> None:
    warnings.warn(
        f"8-bit optimizers with two states are slow on GPUs of compute capability {capability[0]}.{capability[1]}: "
        "their shared memory has no room for the kernel's tables, so plain torch computes the step",
        stacklevel=2,
    )


@_native_update(optimizer_update_8bit_blockwise, "bnb_cuda_optimizer_update_8bit_blockwise")
def _(update):
    if not has_room_for_maps(update.p.device, update.rule.states):
        _warn_of_small_memory(torch.cuda.get_device_capability(update.p.device))
        update_8bit(update)
        return
    g, maps = update.g.contiguous(), update.maps()
    tensors = (update.p, update.state1, update.state2, update.absmax1, update.absmax2)
    memory = _Reachable(update.p.device, *tensors)
    with device_of(update.p), memory as (p, *states):
        lib.bnb_cuda_optimizer_update_8bit_blockwise(
            ptr(g),
            DTYPE_ID[g.dtype],
            *map(ptr, maps),
            ptr(p),
            DTYPE_ID[update.p.dtype],
            *map(ptr, states),
            update.p.numel(),
            RULE_ID[update.rule.name],
            update.config(),
            stream_of(update.p),
        )


def _update_many(
    optimizer_name, g, p, table, configs, scratch, qmap1, qmap2, counts, settings, lr, seeds, blocks
):
    if not g:
        return
    rule, stream = RULE_ID[RULES[optimizer_name].name], stream_of(table)
    hyper, config = (ABI.structs[f"bnb_optimizer_{name}"] for name in ("hyper", "config"))  # type: ignore[union-attr]
    config_bytes, entry_bytes = len(bytes(config())), table.stride(0) * table.itemsize
    assert config_bytes * len(g) <= configs.nbytes
    assert scratch is None or lib.bnb_cuda_optimizer_scratch(len(g)) <= scratch.nbytes
    addresses = struct.pack(f"{len(g)}q", *map(Tensor.data_ptr, g))
    each, first = len(settings) // len(counts), 0
    entries, derived = table.data_ptr(), configs.data_ptr()
    with device_of(table):
        for row, count in enumerate(counts):
            *numbers, skip_zeros = settings[row * each : (row + 1) * each]
            lib.bnb_cuda_optimizer_begin(
                addresses[8 * first : 8 * (first + count)],
                bytes(
                    hyper(ptr(lr[row]), *numbers, seeds[row] if seeds else 0, bool(skip_zeros), bool(seeds))
                ),
                entries + first * entry_bytes,
                derived + first * config_bytes,
                count,
                rule,
                stream,
            )
            first += count
        lib.bnb_cuda_optimizer_update_many(
            entries,
            derived,
            DTYPE_ID[g[0].dtype],
            DTYPE_ID[p[0].dtype],
            ptr(qmap1),
            ptr(qmap2),
            ptr(scratch),
            len(g),
            blocks,
            rule,
            stream,
        )


if has_native("bnb_cuda_optimizer_update_many"):
    optimizer_update_many.kernel("cuda")(_update_many)
