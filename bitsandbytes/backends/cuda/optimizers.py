"""Optimizer updates on CUDA: single tensors through the operators everyone has, many through one launch.

Paged state is used where it lies: the kernel's address for it is the host's. Any other tensor in host memory, and any
strided one, is copied to the device and back.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from ..._formats.rules import RULES, StepScalars, step_scalars
from ..._native import ABI, DTYPE_ID, RULE_ID, device_of, has_native, lib, ptr, stream_of
from ..._ops import (
    Operator,
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
    optimizer_update_many,
)
from ..default.optimizers import plain_memory

__all__: list[str] = []


def _native_kernel(operator: Operator, symbol: str) -> Callable[[Callable], Callable]:
    """Register the filling for CUDA if the library has its symbol."""
    return operator.kernel("cuda") if has_native(symbol) else lambda fill: fill


def _config(scalars: StepScalars, limit: float = 0.0) -> bytes:
    """``bnb_optimizer_config``; a pointer argument takes bytes."""
    return bytes(ABI.structs["bnb_optimizer_config"](limit=limit, **scalars._asdict()))  # type: ignore[union-attr]


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


@_native_kernel(optimizer_update_32bit, "bnb_cuda_optimizer_update_32bit")
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
    rule, g, device = RULES[optimizer_name], g.contiguous(), p.device
    scalars = step_scalars(
        optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, skip_zeros
    )
    unorm = scratch = None
    if max_unorm > 0.0:
        unorm = torch.empty(1, device=device) if unorm_vec is None else unorm_vec
        scratch = _scratch(1, device)
    memory = _Reachable(device, p, state1, state2 if rule.states == 2 else None, unorm)
    with device_of(p), memory as (p, *states, unorm):
        lib.bnb_cuda_optimizer_update_32bit(
            ptr(g),
            DTYPE_ID[g.dtype],
            ptr(p),
            DTYPE_ID[p.dtype],
            *map(ptr, states),
            ptr(unorm),
            ptr(scratch),
            p.numel(),
            RULE_ID[rule.name],
            _config(scalars, max_unorm * param_norm),
            stream_of(p),
        )


@_native_kernel(optimizer_update_8bit_blockwise, "bnb_cuda_optimizer_update_8bit_blockwise")
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
    memory = _Reachable(p.device, p, state1, state2, absmax1, absmax2)
    with device_of(p), memory as (p, *states):
        lib.bnb_cuda_optimizer_update_8bit_blockwise(
            ptr(g),
            DTYPE_ID[g.dtype],
            *map(ptr, maps),
            ptr(p),
            DTYPE_ID[p.dtype],
            *map(ptr, states),
            p.numel(),
            RULE_ID[rule.name],
            _config(scalars),
            stream_of(p),
        )


@_native_kernel(optimizer_update_many, "bnb_cuda_optimizer_update_many")
def _(optimizer_name, g, p, table, configs, scratch, qmap1, qmap2, counts, settings, lr, seeds, blocks):
    if not g:
        return
    rule, stream = RULE_ID[RULES[optimizer_name].name], stream_of(table)
    hyper, config = (ABI.structs[f"bnb_optimizer_{name}"] for name in ("hyper", "config"))  # type: ignore[union-attr]
    config_bytes, entry_bytes = len(bytes(config())), table.stride(0) * table.itemsize
    assert config_bytes * len(g) <= configs.nbytes
    assert scratch is None or lib.bnb_cuda_optimizer_scratch(len(g)) <= scratch.nbytes
    addresses = array("q", [gradient.data_ptr() for gradient in g]).tobytes()
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
