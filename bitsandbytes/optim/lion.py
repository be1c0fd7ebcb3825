"""Lion: a step by the sign of an interpolation between momentum and gradient (Chen et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ._base import Optimizer1State
from ._variants import accepts_older_keywords

__all__ = ["Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit"]


class LionFamily(Optimizer1State, rule="lion"):
    """The signature that all Lion classes share.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: interpolation towards the gradient for the step, and for the momentum it leaves.
        weight_decay: share of the parameter, times ``lr``, taken away before each step.
        optim_bits: 8 or 32, how the state is kept.
        args: an object with ``optim_bits, min_8bit_size, max_unorm, skip_zeros`` that replaces those settings.
        min_8bit_size: parameters with fewer elements keep 32-bit state.
        is_paged: keep large state in pageable memory.

    Raises:
        ValueError: a negative, infinite or NaN setting, or a beta outside [0, 1).
    """

    @accepts_older_keywords
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        super().__init__(
            self._rule_name,
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=is_paged,
        )


class Lion(LionFamily):
    """Lion with 8-bit or 32-bit state."""


class Lion8bit(LionFamily, bits=8, hides=("optim_bits",)):
    """Lion with 8-bit state."""


class Lion32bit(LionFamily, bits=32, hides=("optim_bits",)):
    """Lion with 32-bit state."""


class PagedLion(LionFamily, paged=True, hides=("is_paged",)):
    """Lion with state in pageable memory."""


class PagedLion8bit(LionFamily, bits=8, paged=True, hides=("optim_bits", "is_paged")):
    """Lion with 8-bit state in pageable memory."""


class PagedLion32bit(LionFamily, bits=32, paged=True, hides=("optim_bits", "is_paged")):
    """Lion with 32-bit state in pageable memory."""
