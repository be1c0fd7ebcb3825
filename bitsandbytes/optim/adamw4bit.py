"""AdamW with 4 bits for each of its two averages: a byte and a sixteenth a parameter, an eighth of float32's eight.

Blocks of 128 ("Memory Efficient Optimizers with 4-bit States", Li et al., 2023). The average of gradients keeps the
signed dynamic map. That of squares takes levels in geometric progression down to 2**-12 of its block's largest and no
zero, which a denominator could not bear; it moves by a thousandth a step, so it is rounded at random, right on
average, where rounding to nearest would hold it still.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._formats.codebooks import create_dynamic_map
from .._formats.table import OPTIMIZER_4BIT_BLOCKSIZE
from ._base import Group, Optimizer2State
from ._rounding import new_seed, rounding_key

__all__ = ["AdamW4bit"]

_LEVELS_PER_OCTAVE = 15 / 12  # of the squares' map: sixteen levels over twelve octaves


class AdamW4bit(Optimizer2State, rule="adam"):
    """AdamW with 4-bit state.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: share of the parameter, times ``lr``, taken away before each step.
        min_4bit_size: parameters with fewer elements keep 32-bit state.
        is_paged: keep large state in pageable memory.
        stochastic_rounding: round bfloat16 parameters at random too.

    Raises:
        ValueError: a negative, infinite or NaN setting, or a beta outside [0, 1).
    """

    _state_bits = 4
    _blocksize = OPTIMIZER_4BIT_BLOCKSIZE
    _map_entries = 16

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_4bit_size: int = 4096,
        is_paged: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            self._rule_name,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits=self._state_bits,
            min_8bit_size=min_4bit_size,
            is_paged=is_paged,
            stochastic_rounding=stochastic_rounding,  # type: ignore[call-arg]
        )

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; see :class:`Optimizer8bit`. It gets a seed for the rounding of its state."""
        if isinstance(param_group, dict) and "state_seed" not in param_group:
            param_group["state_seed"] = new_seed()
        super().add_param_group(param_group)

    def fill_qmap(self) -> None:
        """Make the sixteen levels of either average, the largest 1."""
        dynamic = create_dynamic_map(signed=True, max_exponent_bits=3, total_bits=4).unique()
        exponents = (torch.arange(16, dtype=torch.float64) - 15) / _LEVELS_PER_OCTAVE
        self.name2qmap["dynamic"] = dynamic
        self.name2qmap["udynamic"] = torch.exp2(exponents).float()

    def _state_shape(self, p: Tensor, dtype: torch.dtype) -> tuple[int, ...]:
        return (-(p.numel() // -2),) if dtype == torch.uint8 else super()._state_shape(p, dtype)

    @torch.no_grad()
    def update_step(self, group: Group, p: Tensor, gindex: int, pindex: int) -> None:
        """One step on ``p``; see :class:`Optimizer8bit`."""
        self._key = rounding_key(group["state_seed"], pindex, self.state[p]["step"] + 1)
        super().update_step(group, p, gindex, pindex)

    def _update(
        self, g: Tensor, p: Tensor, state: Group, scalars: Group, max_unorm: float, skip_zeros: bool
    ) -> None:
        if state["state1"].dtype == torch.float32:
            super()._update(g, p, state, scalars, max_unorm, skip_zeros)
            return
        torch.ops.bitsandbytes.optimizer_update_4bit_blockwise(
            self.optimizer_name,
            g,
            p,
            **{key: state[key] for key in ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")},
            **scalars,
            key=self._key,
        )
