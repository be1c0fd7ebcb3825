"""Adam. Weight decay is decoupled and comes before the step, so only its default tells Adam from AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ._base import Optimizer2State
from ._variants import accepts_older_keywords, warn_ignored

__all__ = ["Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit"]

# What the 8-bit classes insist on. They keep 8 bits whatever optim_bits says.
ONLY_8BIT = {"amsgrad": False, "optim_bits": 32}


class AdamFamily(Optimizer2State, rule="adam"):
    """The signature that all Adam classes share.

    Args:
        params: parameters or groups of them.
        lr: learning rate; a tensor of one element is read at every step.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: share of the parameter, times ``lr``, taken away before each step.
        amsgrad: not available.
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
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        if amsgrad:
            warn_ignored(self, amsgrad=amsgrad)
        super().__init__(
            self._rule_name,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=is_paged,
        )


class Adam(AdamFamily):
    """Adam with 8-bit or 32-bit state."""


class Adam8bit(AdamFamily, bits=8, requires=ONLY_8BIT):
    """Adam with 8-bit state."""


class Adam32bit(AdamFamily, bits=32):
    """Adam with 32-bit state."""


class PagedAdam(AdamFamily, paged=True):
    """Adam with state in pageable memory."""


class PagedAdam8bit(AdamFamily, bits=8, paged=True, requires=ONLY_8BIT):
    """Adam with 8-bit state in pageable memory."""


class PagedAdam32bit(AdamFamily, bits=32, paged=True):
    """Adam with 32-bit state in pageable memory."""
