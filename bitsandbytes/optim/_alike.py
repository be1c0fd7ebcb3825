"""Whether the gradients of a step are of the kind that those of earlier steps were.

Asking 1000 tensors one by one for type, dtype, strides and lazy negation takes the host half of a step. The guards that
torch.compile puts on its arguments ask all of that in one call, and keep no tensor alive; they answer yes only to what
is just as before, so after a no (and where torch has no such guards) every question is asked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Likeness"]

_GUARDS = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)


class Likeness:
    """Remembers what the gradients of one launch were found to be."""

    def __init__(self) -> None:
        self._check: Callable[..., bool] | None = None
        self._guards = _GUARDS

    def holds(self, grads: list[Tensor]) -> bool:
        """Whether the ``grads`` are like those that were last remembered."""
        return self._check is not None and self._check(*grads)

    def remember(self, grads: list[Tensor]) -> None:
        """Take the ``grads``, contiguous and plain, as what to compare with."""
        self._check = None
        if self._guards is None:
            return
        try:
            guards = self._guards(*grads, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        except TypeError:  # they are private to torch, so another version's may be made from something else
            self._guards = None
            return
        if guards.check(*grads):
            self._check = guards.check
        else:  # a gradient that two parameters share is never accepted
            self._guards = None
