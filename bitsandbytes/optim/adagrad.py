"""Adagrad: gradients over the root of the sum of all their squares so far."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ._base import Optimizer1State
from ._variants import accepts_older_keywords

__all__ = ["Adagrad", "Adagrad8bit", "Adagrad32bit"]


class AdagradFamily(Optimizer1State, rule="adagrad"):
    """The signature that all Adagrad classes share.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        lr_decay, initial_accumulator_value: must be 0.
        weight_decay: share of the parameter added to its gradient.
        eps: added to the denominator.
        optim_bits: 8 or 32, how the state is kept.
        args: an object with ``optim_bits, min_8bit_size, max_unorm, skip_zeros`` that replaces those settings.
        min_8bit_size: parameters with fewer elements keep 32-bit state.

    Raises:
        ValueError: a negative, infinite or NaN setting, or one that must be 0.
    """

    @accepts_older_keywords
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        if initial_accumulator_value != 0:
            raise ValueError(f"initial_accumulator_value must be 0, got {initial_accumulator_value}")
        if lr_decay != 0:
            raise ValueError(f"lr_decay must be 0, got {lr_decay}")
        super().__init__(
            self._rule_name, params, lr, (0.0, 0.0), eps, weight_decay, optim_bits, args, min_8bit_size
        )


class Adagrad(AdagradFamily):
    """Adagrad with 8-bit or 32-bit state."""


class Adagrad8bit(AdagradFamily, bits=8, defaults={"optim_bits": 8}, requires={"optim_bits": 8}):
    """Adagrad with 8-bit state."""


class Adagrad32bit(AdagradFamily, bits=32):
    """Adagrad with 32-bit state."""
