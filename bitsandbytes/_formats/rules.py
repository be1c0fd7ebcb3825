"""The update rules as facts: which names share one arithmetic, what state they keep, the scalars one step needs.

There are fewer rules than names: ``lamb`` is Adam and ``lars`` is momentum, each with a limit on the norm of the
update. The arithmetic stands twice: in plain torch in ``backends/default/optimizers.py``, natively in
``csrc/common/optimizer_rules.h``. Both read their scalars from :func:`step_scalars`, which derives them in double
precision: ``1 - 0.999`` taken in float32 is already off by 5e-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

__all__ = ["RULES", "Rule", "StepScalars", "step_scalars"]


@dataclass(frozen=True)
class Rule:
    """One arithmetic. ``averages`` is how many tensors state1 stacks, ``states`` whether there is a state2."""

    name: str
    states: int = 1
    averages: int = 1
    coupled_decay: bool = False  # weight decay joins the gradient; otherwise it shrinks the parameter
    bias_corrected: bool = False  # by the step size, as in Adam


_ADAM = Rule("adam", states=2, bias_corrected=True)
_MOMENTUM = Rule("momentum", coupled_decay=True)

RULES = {
    "adam": _ADAM,
    "lamb": _ADAM,
    "ademamix": Rule("ademamix", states=2, averages=2),
    "momentum": _MOMENTUM,
    "lars": _MOMENTUM,
    "rmsprop": Rule("rmsprop", coupled_decay=True),
    "adagrad": Rule("adagrad", coupled_decay=True),
    "lion": Rule("lion"),
}


class StepScalars(NamedTuple):
    """What the arithmetic of one step multiplies with; the fields of ``bnb_optimizer_config`` in ``csrc/bnb.h``.

    A rule turns the gradient and the state into a direction ``u``; the step is then ``p = p * shrink - step_size * u``.
    """

    beta1: float
    beta2: float
    beta3: float
    rest1: float  # 1 - beta1
    rest2: float
    rest3: float
    correction1: float  # 1 - beta1 ** step
    correction2: float  # sqrt(1 - beta2 ** step)
    alpha: float
    eps: float
    decay: float  # added to the gradient, times p
    shrink: float  # what weight decay leaves of p before the step
    step_size: float
    gnorm_scale: float
    first_step: bool
    skip_zeros: bool


def step_scalars(
    optimizer_name: str,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> StepScalars:
    """Derive the scalars of step number ``step`` (the first is 1) from the hyper-parameters users set.

    Adam's bias correction sits in the step size and in ``eps``: ``lr * c2 / c1 * m / (sqrt(v) + eps * c2)``. The norm
    that LAMB limits is that of ``m / (sqrt(v) + eps * c2)``.
    """
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    rule = RULES[optimizer_name]
    correction1 = 1.0 - beta1**step
    correction2 = sqrt(1.0 - beta2**step)
    step_size = lr
    if rule.bias_corrected:
        step_size = lr * correction2 / correction1
        eps = eps * correction2
    return StepScalars(
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        rest1=1.0 - beta1,
        rest2=1.0 - beta2,
        rest3=1.0 - beta3,
        correction1=correction1,
        correction2=correction2,
        alpha=alpha,
        eps=eps,
        decay=weight_decay if rule.coupled_decay else 0.0,
        shrink=1.0 if rule.coupled_decay else 1.0 - lr * weight_decay,
        step_size=step_size,
        gnorm_scale=gnorm_scale,
        first_step=step == 1,
        skip_zeros=skip_zeros,
    )
