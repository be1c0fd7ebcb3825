"""RMSprop: gradients over the root of a running average of their squares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ._base import Optimizer1State
from ._variants import accepts_older_keywords, warn_ignored

__all__ = ["RMSprop", "RMSprop8bit", "RMSprop32bit"]


class RMSpropFamily(Optimizer1State, rule="rmsprop"):
    """The signature that all RMSprop classes share.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        alpha: decay of the average of squares; must not be 0.
        eps: added to the denominator.
        weight_decay: share of the parameter added to its gradient.
        momentum: no effect.
        centered: not available.
        optim_bits: 8 or 32, how the state is kept.
        args: an object with ``optim_bits, min_8bit_size, max_unorm, skip_zeros`` that replaces those settings.
        min_8bit_size: parameters with fewer elements keep 32-bit state.

    Raises:
        NotImplementedError: ``alpha`` is 0 or ``centered`` is set.
        ValueError: a negative, infinite or NaN setting, or alpha or momentum outside [0, 1).
    """

    @accepts_older_keywords
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        if alpha == 0:
            raise NotImplementedError(f"{type(self).__name__} with alpha=0 is not supported")
        if centered:
            raise NotImplementedError(f"{type(self).__name__} with centered=True is not supported")
        if momentum:
            warn_ignored(self, momentum=momentum)
        super().__init__(
            self._rule_name, params, lr, (alpha, momentum), eps, weight_decay, optim_bits, args, min_8bit_size
        )


class RMSprop(RMSpropFamily):
    """RMSprop with 8-bit or 32-bit state."""


class RMSprop8bit(RMSpropFamily, bits=8, hides=("optim_bits",)):
    """RMSprop with 8-bit state."""


class RMSprop32bit(RMSpropFamily, bits=32, hides=("optim_bits",)):
    """RMSprop with 32-bit state."""
