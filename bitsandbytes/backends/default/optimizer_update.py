"""The arguments of an optimizer update as one value, for every backend.

The operators take up to nineteen arguments, because their schemas are contracts. A kernel takes the ``Update`` that is
made of them right after the check, with the scalars derived.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..._formats.rules import RULES, Rule, StepScalars, step_scalars
from ..._native import ABI
from ..._operator import Operator

__all__ = ["Update", "update_kernel"]

_SCALARS = (
    *("beta1", "beta2", "beta3", "alpha", "eps"),
    *("weight_decay", "step", "lr", "gnorm_scale", "skip_zeros"),
)


class Update(NamedTuple):
    """One step on one tensor. What the rule or the kind of state has no use for is None."""

    rule: Rule
    scalars: StepScalars
    g: Tensor
    p: Tensor
    state1: Tensor
    state2: Tensor | None
    qmap1: Tensor | None
    qmap2: Tensor | None
    absmax1: Tensor | None
    absmax2: Tensor | None
    unorm_vec: Tensor | None
    limit: (
        float | None
    )  # what the norm of the direction may be, and 0 for anything; None if nobody asks for the norm
    key: int  # of the dice that 4-bit state is rounded by

    def maps(self) -> list[Tensor | None]:
        """The maps as contiguous memory."""
        return [None if qmap is None else qmap.contiguous() for qmap in (self.qmap1, self.qmap2)]

    def config(self) -> bytes:
        """``bnb_optimizer_config``; a pointer argument takes bytes."""
        config = ABI.structs["bnb_optimizer_config"]  # type: ignore[union-attr]
        return bytes(config(limit=self.limit or 0.0, **self.scalars._asdict()))


def _update(given: dict[str, Any]) -> Update:
    rule = RULES[given["optimizer_name"]]
    used = given if rule.states == 2 else {**given, "state2": None, "qmap2": None, "absmax2": None}
    tensors = ("g", "p", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec")
    max_unorm = given.get("max_unorm", 0.0)
    return Update(
        rule=rule,
        scalars=step_scalars(
            given["optimizer_name"], **{name: given[name] for name in _SCALARS if name in given}
        ),
        limit=max_unorm * given["param_norm"] if max_unorm > 0.0 else None,
        key=given.get("key", 0),
        **{name: used.get(name) for name in tensors},  # type: ignore[arg-type]
    )


def update_kernel(operator: Operator, device: str) -> Callable[[Callable[[Update], None]], Callable]:
    """Register a kernel that takes an :class:`Update` for one of the operators that update a single tensor."""
    names = tuple(inspect.signature(operator.check).parameters)

    def register(fill: Callable[[Update], None]) -> Callable:
        @operator.kernel(device)
        def kernel(*args: Any) -> None:
            fill(_update(dict(zip(names, args, strict=True))))

        return kernel

    return register
