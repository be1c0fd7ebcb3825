"""Native optimizer updates for the CPU, registered only where the loaded library has them."""

from __future__ import annotations

import torch

from ..._formats.rules import RULES, StepScalars, step_scalars
from ..._native import ABI, DTYPE_ID, RULE_ID, lib, ptr, threads
from ..._ops import (
    optimizer_update_4bit_blockwise,
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
    round_to_bfloat16,
)
from ..default.optimizers import plain_memory
from .registration import native_kernel as _native_kernel

__all__: list[str] = []


def _config(scalars: StepScalars, limit: float = 0.0) -> bytes:
    """``bnb_optimizer_config``; a pointer argument takes bytes."""
    return bytes(ABI.structs["bnb_optimizer_config"](limit=limit, **scalars._asdict()))  # type: ignore[union-attr]


@_native_kernel(round_to_bfloat16, "bnb_cpu_round_to_bfloat16")
def _(A, key, offset, out):
    A = A.contiguous()
    lib.bnb_cpu_round_to_bfloat16(ptr(A), ptr(out), A.numel(), key, offset, threads())


@_native_kernel(optimizer_update_32bit, "bnb_cpu_optimizer_update_32bit")
def _(
    optimizer_name,
    g,
    p,
    state1,
    state2,
    unorm_vec,
    max_unorm,
    param_norm,
    beta1,
    beta2,
    beta3,
    alpha,
    eps,
    weight_decay,
    step,
    lr,
    gnorm_scale,
    skip_zeros,
):
    rule, g, unorm = RULES[optimizer_name], g.contiguous(), None
    scalars = step_scalars(
        optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, skip_zeros
    )
    if max_unorm > 0.0:
        unorm = torch.empty(1) if unorm_vec is None else unorm_vec
    with plain_memory(p.device, p, state1, state2 if rule.states == 2 else None, unorm) as (
        p,
        *states,
        unorm,
    ):
        lib.bnb_cpu_optimizer_update_32bit(
            ptr(g),
            DTYPE_ID[g.dtype],
            ptr(p),
            DTYPE_ID[p.dtype],
            *map(ptr, states),
            ptr(unorm),
            p.numel(),
            RULE_ID[rule.name],
            _config(scalars, max_unorm * param_norm),
            threads(),
        )


@_native_kernel(optimizer_update_4bit_blockwise, "bnb_cpu_optimizer_update_4bit_blockwise")
def _(
    optimizer_name,
    g,
    p,
    state1,
    state2,
    beta1,
    beta2,
    beta3,
    alpha,
    eps,
    step,
    lr,
    qmap1,
    qmap2,
    absmax1,
    absmax2,
    weight_decay,
    gnorm_scale,
    key,
):
    rule = RULES[optimizer_name]
    if rule.states == 1:
        state2 = qmap2 = absmax2 = None
    g, maps = g.contiguous(), [None if qmap is None else qmap.contiguous() for qmap in (qmap1, qmap2)]
    scalars = step_scalars(
        optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale
    )
    with plain_memory(p.device, p, state1, state2, absmax1, absmax2) as (p, *states):
        lib.bnb_cpu_optimizer_update_4bit_blockwise(
            ptr(g),
            DTYPE_ID[g.dtype],
            *map(ptr, maps),
            ptr(p),
            DTYPE_ID[p.dtype],
            *map(ptr, states),
            p.numel(),
            RULE_ID[rule.name],
            _config(scalars),
            key,
            threads(),
        )


@_native_kernel(optimizer_update_8bit_blockwise, "bnb_cpu_optimizer_update_8bit_blockwise")
def _(
    optimizer_name,
    g,
    p,
    state1,
    state2,
    beta1,
    beta2,
    beta3,
    alpha,
    eps,
    step,
    lr,
    qmap1,
    qmap2,
    absmax1,
    absmax2,
    weight_decay,
    gnorm_scale,
    skip_zeros,
):
    rule = RULES[optimizer_name]
    if rule.states == 1:
        state2 = qmap2 = absmax2 = None
    g, maps = g.contiguous(), [None if qmap is None else qmap.contiguous() for qmap in (qmap1, qmap2)]
    scalars = step_scalars(
        optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, skip_zeros
    )
    with plain_memory(p.device, p, state1, state2, absmax1, absmax2) as (p, *states):
        lib.bnb_cpu_optimizer_update_8bit_blockwise(
            ptr(g),
            DTYPE_ID[g.dtype],
            *map(ptr, maps),
            ptr(p),
            DTYPE_ID[p.dtype],
            *map(ptr, states),
            p.numel(),
            RULE_ID[rule.name],
            _config(scalars),
            threads(),
        )
