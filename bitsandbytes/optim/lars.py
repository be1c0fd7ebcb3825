"""LARS: momentum whose update is limited to a small multiple of the parameter's norm (You et al., 2017).

The limit is a clip: it never lengthens an update. A parameter of zeros has none, so it can leave zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._base import Optimizer1State
from ._variants import accepts_older_keywords
from .sgd import check_momentum

__all__ = ["LARS", "LARS8bit", "LARS32bit", "PytorchLARS"]


class LARSFamily(Optimizer1State, rule="lars"):
    """The signature that all LARS classes share.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, optim_bits, args, min_8bit_size: as in ``SGD``.
        max_unorm: the update's norm may be at most this times the parameter's.

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
        max_unorm: float = 0.02,
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
            max_unorm=max_unorm,
        )


class LARS(LARSFamily):
    """LARS with 8-bit or 32-bit state."""


class LARS8bit(LARSFamily, bits=8, hides=("optim_bits",)):
    """LARS with 8-bit state."""


class LARS32bit(LARSFamily, bits=32, hides=("optim_bits",)):
    """LARS with 32-bit state."""


class PytorchLARS(torch.optim.Optimizer):
    """LARS in plain torch, with dampening and Nesterov momentum; the reference for the classes above.

    Raises:
        ValueError: a negative setting, or Nesterov momentum without momentum or with dampening.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        for name, value in (
            ("learning rate", lr),
            ("momentum value", momentum),
            ("weight_decay value", weight_decay),
        ):
            if not value >= 0.0:
                raise ValueError(f"Invalid {name}: {value}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "max_unorm": max_unorm,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what ``closure`` returns.

        Raises:
            AssertionError: ``max_unorm`` is set and a parameter is not float32.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(group, p)
        return loss

    def _update(self, group: dict[str, Any], p: Tensor) -> None:
        assert p.grad is not None
        update = p.grad.add(p, alpha=group["weight_decay"])
        momentum, state = group["momentum"], self.state[p]
        if momentum:
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = update.clone()
            else:
                state["momentum_buffer"].mul_(momentum).add_(update, alpha=1 - group["dampening"])
            if group["nesterov"]:
                update = update.add(state["momentum_buffer"], alpha=momentum)
            else:
                update = state["momentum_buffer"]
        scale: float | Tensor = 1.0
        if group["max_unorm"] > 0.0:
            assert p.dtype == torch.float32, f"max_unorm needs float32 parameters, got {p.dtype}"
            limit = group["max_unorm"] * torch.linalg.vector_norm(p)
            norm = torch.linalg.vector_norm(update)
            scale = torch.where((limit > 0) & (norm > limit), limit / norm, 1.0)
        p.sub_(group["lr"] * scale * update)
