"""Whether the tensors of a call are of the kind that those of an earlier call were.

Asking tensors one by one for type, dtype, strides and lazy negation takes the host half of an optimizer's step on 1000
tensors, and a third of a small layer's call. The guards that torch.compile puts on its arguments ask all of that in one
call, and keep no tensor alive; they answer yes only to what is just as before, so after a no (and where torch has no such
guards) every question is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Likeness", "comparison_with"]

_GUARDS = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)


def comparison_with(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Says of as many tensors whether each is like the one in its place here, whatever its values and its address.

    None where that cannot be said: there are no guards, or a tensor occurs twice, which guards never accept.
    """
    if _GUARDS is None:
        return None
    try:
        guards = _GUARDS(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except TypeError:  # they are private to torch, so another version's may be made from something else
        return None
    return guards.check if guards.check(*tensors) else None


class Likeness:
    """Remembers what the gradients of one launch were found to be."""

    def __init__(self) -> None:
        self._check: Callable[..., bool] | None = None
        self._can_compare = True

    def holds(self, grads: list[Tensor]) -> bool:
        """Whether the ``grads`` are like those that were last remembered."""
        return self._check is not None and self._check(*grads)

    def remember(self, grads: list[Tensor]) -> None:
        """Take the ``grads``, contiguous and plain, as what to compare with."""
        self._check = comparison_with(grads) if self._can_compare else None
        self._can_compare = self._check is not None
