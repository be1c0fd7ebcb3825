"""Gradient descent with momentum, and what LARS shares with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ._base import Optimizer1State
from ._variants import accepts_older_keywords, warn_ignored

__all__ = ["SGD", "SGD8bit", "SGD32bit"]


def check_momentum(owner: object, momentum: float, dampening: float, nesterov: bool) -> None:
    """Refuse a momentum of zero, which would keep a state for nothing; warn about what has no effect."""
    if momentum == 0:
        raise NotImplementedError(
            f"{type(owner).__name__} without momentum is not supported; use torch.optim.SGD"
        )
    if dampening:
        warn_ignored(owner, dampening=dampening)
    if nesterov:
        warn_ignored(owner, nesterov=nesterov)


class SGDFamily(Optimizer1State, rule="momentum"):
    """The signature that all SGD classes share.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: decay of the sum of gradients; must not be 0.
        dampening, nesterov: no effect.
        weight_decay: share of the parameter added to its gradient.
        optim_bits: 8 or 32, how the state is kept.
        args: an object with ``optim_bits, min_8bit_size, max_unorm, skip_zeros`` that replaces those settings.
        min_8bit_size: parameters with fewer elements keep 32-bit state.

    Raises:
        NotImplementedError: ``momentum`` is 0.
        ValueError: a negative, infinite or NaN setting, or a momentum or dampening outside [0, 1).
    """

    @accepts_older_keywords
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        check_momentum(self, momentum, dampening, nesterov)
        super().__init__(
            self._rule_name,
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
        )


class SGD(SGDFamily):
    """SGD with momentum, with 8-bit or 32-bit state."""


class SGD8bit(SGDFamily, bits=8, hides=("optim_bits",)):
    """SGD with momentum, with 8-bit state."""


class SGD32bit(SGDFamily, bits=32, hides=("optim_bits",)):
    """SGD with momentum, with 32-bit state."""
