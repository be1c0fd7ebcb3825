"""Many tensors, one step: the tables through which a kernel finds any number of parameters and their state.

Tensors of one kind (rule, dtypes, kind of state, device) stand in one table in the device's memory, made once and used step
after step, so a step costs a fixed few launches. Passing every state tensor to an operator each time would cost the
host more than the GPU needs: 1000 tensors with six lists take a millisecond of conversions alone. So the operator
``optimizer_update_many`` takes the lists that matter to the caller (gradients, and the parameters it changes) and one
table that stands for the state; whoever made the table keeps its tensors alive and sees that they have not moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._formats.table import OPTIMIZER_BLOCKSIZE
from .._ops import optimizer_update_many

__all__ = ["Hyper", "StepTable", "step_counters"]

# Room for one bnb_optimizer_config, and for what bnb_cuda_optimizer_scratch asks for; the backend checks it.
_CONFIG_BYTES = 96
_SCRATCH_BYTES, _SCRATCH_BYTES_EACH = 1 << 16, 32
_LISTS = (1, 2)  # where the operator takes gradients and parameters
_FIELDS = ("state1", "state2", "absmax1", "absmax2", "unorm_vec")


class Hyper(NamedTuple):
    """What users set for tensors of one group; the fields of ``bnb_optimizer_hyper`` in ``csrc/bnb.h``."""

    lr: float
    beta1: float
    beta2: float
    beta3: float
    alpha: float
    eps: float
    weight_decay: float
    gnorm_scale: float
    t_alpha: float
    t_beta3: float
    max_unorm: float
    skip_zeros: bool


def _on_device(values: list, device: torch.device) -> Tensor:
    """int64 on the device, uploaded without waiting for it."""
    uploaded = torch.tensor(values, dtype=torch.int64)
    return uploaded if device.type == "cpu" else uploaded.pin_memory().to(device, non_blocking=True)


def step_counters(steps: list[int], device: torch.device) -> Tensor:
    """Counts of steps taken, on the device, where they advance with every step."""
    return _on_device(steps, device)


class StepTable:
    """Tensors that one launch steps; it keeps parameters and state alive.

    Args:
        optimizer_name: one name for all.
        params: contiguous tensors of one dtype on one device.
        states: for each, a dict with ``state1`` and, as the rule and the kind of state need, ``state2``, ``absmax1``,
            ``absmax2``, ``qmap1``, ``qmap2`` and ``unorm_vec``.
        counters: for each, the device address of its count of steps, an int64 that :func:`step_counters` made.
        limited: whether norms may be limited.
        dice: for each, its place in its group and the position of its first element in the whole parameter: what
            stochastic rounding takes its dice from, beside the seed and the step.
    """

    def __init__(
        self,
        optimizer_name: str,
        params: list[Tensor],
        states: Sequence[dict],
        counters: list[int],
        limited: bool,
        dice: list[tuple[int, int]],
    ) -> None:
        device = params[0].device
        self.optimizer_name, self.params = optimizer_name, params
        self.tensors = [[state.get(name) for name in _FIELDS] for state in states]  # kept alive
        self.qmap1, self.qmap2 = states[0].get("qmap1"), states[0].get("qmap2")
        rows, block = [], 0
        for p, tensors, counter, (place, offset) in zip(params, self.tensors, counters, dice, strict=True):
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
            if not limited:
                addresses[4] = 0
            rows.append([0, p.data_ptr(), *addresses, counter, p.numel(), block, place, offset, -1])
            block -= p.numel() // -OPTIMIZER_BLOCKSIZE
        self.blocks = block
        self.table = _on_device(rows, device)
        self.configs = torch.empty(_CONFIG_BYTES * len(params), dtype=torch.uint8, device=device)
        size = _SCRATCH_BYTES + _SCRATCH_BYTES_EACH * len(params)
        self.scratch = torch.empty(size, dtype=torch.uint8, device=device) if limited else None

    def step(
        self,
        gradients: list[Tensor],
        counts: list[int],
        hypers: list[Hyper],
        lrs: list[Tensor | None],
        seeds: list[int],
        plain: bool,
    ) -> None:
        """Take one step: the first ``counts[0]`` tensors with ``hypers[0]``, and so on.

        ``lrs`` holds, where it is not None, a float32 tensor of one element on the device instead of a hyper's lr;
        ``seeds``, unless empty, 64-bit seeds that bfloat16 parameters are rounded with. ``plain`` says that
        ``all_plain`` is known to hold for gradients and parameters, see ``Operator``.
        """
        optimizer_update_many.call_knowing(
            _LISTS if plain else (),
            self.optimizer_name,
            gradients,
            self.params,
            self.table,
            self.configs,
            self.scratch,
            self.qmap1,
            self.qmap2,
            counts,
            [float(value) for hyper in hypers for value in hyper],
            lrs,
            seeds,
            self.blocks,
        )
