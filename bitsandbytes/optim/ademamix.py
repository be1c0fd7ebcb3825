"""AdEMAMix: Adam with a second, slower average of the gradient ("The AdEMAMix Optimizer", Pagliardini et al., 2024).

Both averages lie in one buffer, ``state1 [2, *p.shape]``: first the fast one, then the slow one. The slow average
has no bias correction; schedules for its weight and its decay keep the first steps stable instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._base import Optimizer2State
from ._rules import check_hyperparameters, scheduled
from ._variants import accepts_older_keywords

__all__ = [
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "ReferenceAdEMAMix",
]


class AdEMAMix(Optimizer2State, rule="ademamix"):
    """AdEMAMix with 8-bit or 32-bit state.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the fast average, of the average of squares, and of the slow average.
        alpha: weight of the slow average.
        t_alpha: steps over which alpha grows from 0; None for no schedule.
        t_beta3: steps over which the slow average's decay grows from the fast one's; None for no schedule.
        eps: added to the denominator.
        weight_decay: share of the parameter, times ``lr``, taken away before each step.
        optim_bits: 8 or 32, how the state is kept.
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
        betas: Sequence[float] | str = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        super().__init__(
            self._rule_name,
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            optim_bits=optim_bits,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
        )

    def _state1_buffer(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        return self._get_state_double_buffer(p, dtype=dtype)

    def _get_state_double_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros ``[2, *p.shape]``, paged as :meth:`get_state_buffer` would."""
        return self._buffer(p, (2, *p.shape), dtype)


class AdEMAMix8bit(AdEMAMix, bits=8, hides=("optim_bits",)):
    """AdEMAMix with 8-bit state."""


class AdEMAMix32bit(AdEMAMix, bits=32, hides=("optim_bits",)):
    """AdEMAMix with 32-bit state."""


class PagedAdEMAMix(AdEMAMix, paged=True, hides=("is_paged",)):
    """AdEMAMix with state in pageable memory."""


class PagedAdEMAMix8bit(AdEMAMix8bit, paged=True, hides=("is_paged",)):
    """AdEMAMix with 8-bit state in pageable memory."""


class PagedAdEMAMix32bit(AdEMAMix32bit, paged=True, hides=("is_paged",)):
    """AdEMAMix with 32-bit state in pageable memory."""


class ReferenceAdEMAMix(torch.optim.Optimizer):
    """AdEMAMix in plain torch with float32 state ``m1_m2 [2, ...]`` and ``nu``; the groups count the steps."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_beta3: int | None = None,
        t_alpha: int | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        defaults.update(t_beta3=t_beta3, t_alpha=t_alpha)
        check_hyperparameters(defaults)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            step = group["step"] = group.get("step", 0) + 1
            beta1, beta2, _ = group["betas"]
            alpha, beta3 = scheduled(group["betas"], group["alpha"], group["t_alpha"], group["t_beta3"], step)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["m1_m2"] = p.new_zeros((2, *p.shape), dtype=torch.float32)
                    state["nu"] = torch.zeros_like(p, dtype=torch.float32)
                (m1, m2), nu, g = state["m1_m2"], state["nu"], p.grad.float()
                m1.mul_(beta1).add_(g, alpha=1 - beta1)
                m2.mul_(beta3).add_(g, alpha=1 - beta3)
                nu.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                denominator = (nu / (1 - beta2**step)).sqrt() + group["eps"]
                update = (m1 / (1 - beta1**step) + alpha * m2) / denominator
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))
        return loss


_ReferenceAdEMAMix = ReferenceAdEMAMix  # the name it has always been imported by
