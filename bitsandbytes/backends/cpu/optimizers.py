"""Native optimizer updates for the CPU, registered only where the loaded library has them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..._native import DTYPE_ID, RULE_ID, has_native, lib, ptr, threads
from ..._ops import (
    Operator,
    optimizer_update_4bit_blockwise,
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
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
