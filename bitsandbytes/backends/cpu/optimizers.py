"""Native optimizer updates for the CPU, registered only where the loaded library has them."""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from ..._formats.rules import RULES
from ..._native import ABI, DTYPE_ID, RULE_ID, has_native, lib, ptr, threads
from ..._ops import (
    Operator,
    optimizer_update_4bit_blockwise,
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
    optimizer_update_many,
    round_to_bfloat16,
)
from ..default.optimizer_update import update_kernel
from ..default.optimizers import plain_memory
from .registration import native_kernel as _native_kernel

__all__: list[str] = []


def _native_update(operator: Operator, symbol: str) -> Callable[[Callable], Callable]:
    """Register the update for the CPU if the library has its symbol."""
    return update_kernel(operator, "cpu") if has_native(symbol) else lambda fill: fill


@_native_kernel(round_to_bfloat16, "bnb_cpu_round_to_bfloat16")
def _(A, key, offset, out):
    A = A.contiguous()
    lib.bnb_cpu_round_to_bfloat16(ptr(A), ptr(out), A.numel(), key, offset, threads())


@_native_update(optimizer_update_32bit, "bnb_cpu_optimizer_update_32bit")
def _(update):
    g, unorm, device = update.g.contiguous(), None, update.p.device
    if update.limit is not None:
        unorm = torch.empty(1) if update.unorm_vec is None else update.unorm_vec
    with plain_memory(device, update.p, update.state1, update.state2, unorm) as (p, *states, unorm):
        lib.bnb_cpu_optimizer_update_32bit(
            ptr(g),
            DTYPE_ID[g.dtype],
            ptr(p),
            DTYPE_ID[p.dtype],
            *map(ptr, states),
            ptr(unorm),
            p.numel(),
            RULE_ID[update.rule.name],
            update.config(),
            threads(),
        )


@_native_update(optimizer_update_4bit_blockwise, "bnb_cpu_optimizer_update_4bit_blockwise")
def _(update):
    _update_coded(lib.bnb_cpu_optimizer_update_4bit_blockwise, update, update.key)


@_native_update(optimizer_update_8bit_blockwise, "bnb_cpu_optimizer_update_8bit_blockwise")
def _(update):
    _update_coded(lib.bnb_cpu_optimizer_update_8bit_blockwise, update)


def _update_coded(kernel, update, *key):
    g, maps = update.g.contiguous(), update.maps()
    tensors = (update.p, update.state1, update.state2, update.absmax1, update.absmax2)
    memory = plain_memory(update.p.device, *tensors)
    with memory as (p, *states):
        kernel(
            ptr(g),
            DTYPE_ID[g.dtype],
            *map(ptr, maps),
            ptr(p),
            DTYPE_ID[p.dtype],
            *map(ptr, states),
            p.numel(),
            RULE_ID[update.rule.name],
            update.config(),
            *key,
            threads(),
        )


def _update_many(
    optimizer_name, g, p, table, configs, scratch, qmap1, qmap2, counts, settings, lr, seeds, blocks
):
    if not g:
        return
    hyper = ABI.structs["bnb_optimizer_hyper"]  # type: ignore[union-attr]
    addresses = struct.pack(f"{len(g)}q", *map(Tensor.data_ptr, g))
    each, first, entry_bytes = len(settings) // len(counts), 0, table.stride(0) * table.itemsize
    for row, count in enumerate(counts):
        *numbers, skip_zeros = settings[row * each : (row + 1) * each]
        lib.bnb_cpu_optimizer_update_many(
            addresses[8 * first : 8 * (first + count)],
            bytes(hyper(ptr(lr[row]), *numbers, 0, bool(skip_zeros), False)),
            table.data_ptr() + first * entry_bytes,
            DTYPE_ID[p[0].dtype],
            ptr(qmap1),
            ptr(qmap2),
            count,
            RULE_ID[RULES[optimizer_name].name],
            threads(),
        )
        first += count


# Limits, dice and gradients of another dtype are left to single steps.
_update_many.plain_only = True  # type: ignore[attr-defined]

if has_native("bnb_cpu_optimizer_update_many"):
    optimizer_update_many.kernel("cpu")(_update_many)
