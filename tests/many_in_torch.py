"""Stepping many tensors at once on a device that has no kernel for it: what the tables hold, carried out one by one, with
the kernels that a single step has, so that results are the same bits.

So that everything around the kernel (which parameters share a table, what happens when something moves, shards, dice,
counters) is tested where there is no GPU.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from bitsandbytes._formats.rules import RULES
from bitsandbytes._ops import OPERATORS, optimizer_update_many
from bitsandbytes._quant import optimizer_table
from bitsandbytes._quant.optimizer import update_limited
from bitsandbytes.optim._rounding import rounding_key
from bitsandbytes.optim._rules import scheduled

_COLUMNS = 13


def install(replace=setattr) -> list[int]:
    """Step on the CPU as on CUDA; returns a list that the number of tensors of every launch is appended to."""
    launches: list[int] = []

    def step(table, gradients, counts, hypers, lrs, seeds, plain):
        launches.append(len(gradients))
        rows = iter(zip(table.table.tolist(), table.params, gradients, table.tensors, strict=True))
        for index, (count, hyper, lr) in enumerate(zip(counts, hypers, lrs, strict=True)):
            for _ in range(count):
                _step_one(table, *next(rows), hyper, lr, seeds[index] if seeds else None)

    replace(optimizer_update_many, "kernels", {**optimizer_update_many.kernels, "cpu": step})
    replace(
        optimizer_table,
        "_on_device",
        lambda values, device: torch.tensor(values, dtype=torch.int64, device=device),
    )
    replace(optimizer_table.StepTable, "step", step)
    return launches


def _step_one(table, row: list[int], p: Tensor, g: Tensor, tensors, hyper, lr, seed: int | None) -> None:
    assert len(row) == _COLUMNS
    _, address, *addresses, counter, n, _, place, offset, _ = row
    assert (address, n) == (p.data_ptr(), p.numel()) and g.shape == p.shape and g.is_contiguous()
    assert [0 if t is None else t.data_ptr() for t in tensors[:4]] == addresses[:4]
    steps = ctypes.c_int64.from_address(counter)
    steps.value += 1
    name, (state1, state2, absmax1, absmax2, unorm) = table.optimizer_name, tensors
    betas = (hyper.beta1, hyper.beta2, hyper.beta3)
    alpha, beta3 = scheduled(betas, hyper.alpha, hyper.t_alpha, hyper.t_beta3, steps.value)
    exact = p.float() if seed is not None or g.dtype != p.dtype else p
    g = g.to(exact.dtype)
    rate = hyper.lr if lr is None else float(lr)
    scalars = {
        "beta1": hyper.beta1, "beta2": hyper.beta2, "beta3": beta3, "alpha": alpha, "eps": hyper.eps,
        "weight_decay": hyper.weight_decay, "step": steps.value, "lr": rate, "gnorm_scale": hyper.gnorm_scale,
    }  # fmt: skip
    state = {"state1": state1, "state2": state2, "qmap1": table.qmap1, "qmap2": table.qmap2}
    state.update(absmax1=absmax1, absmax2=absmax2, unorm_vec=unorm)
    if hyper.max_unorm > 0.0 and n:
        update_limited(name, g, exact, state, hyper.max_unorm, scalars, hyper.skip_zeros)
    elif n:
        _update(name, g, exact, state, scalars, hyper.skip_zeros)
    if seed is not None:
        key = rounding_key(seed, place, steps.value)
        torch.ops.bitsandbytes.round_to_bfloat16.out(exact, key, offset, out=p)
    elif exact is not p:
        p.copy_(exact)


def _update(name: str, g: Tensor, p: Tensor, state: dict, scalars: dict, skip_zeros: bool) -> None:
    b1, b2, b3, alpha, eps, decay, step, lr, scale = scalars.values()
    state2 = state["state2"] if RULES[name].states == 2 else None
    if state["state1"].dtype == torch.uint8:
        OPERATORS["optimizer_update_8bit_blockwise"](
            name, g, p, state["state1"], state2, b1, b2, b3, alpha, eps, step, lr, state["qmap1"],
            state["qmap2"], state["absmax1"], state["absmax2"], decay, scale, skip_zeros,
        )  # fmt: skip
    else:
        OPERATORS["optimizer_update_32bit"](
            name, g, p, state["state1"], state2, None, 0.0, 0.0, b1, b2, b3, alpha, eps, decay, step, lr,
            scale, skip_zeros,
        )  # fmt: skip
