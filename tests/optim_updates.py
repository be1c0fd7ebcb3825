"""The optimizer operators step by step, for kernels that are compared with plain torch.

Compared is each step from what plain torch left before it. A 16-bit parameter that was rounded the other way would carry
that into later steps, and with coupled weight decay into its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bitsandbytes._formats.codebooks import create_dynamic_map
from bitsandbytes._formats.rules import RULES
from bitsandbytes._ops import OPERATORS
from optim_cases import BLOCK

State = dict[str, Tensor | None]

WITHOUT_ROOT = ("momentum", "lion")
BETAS = {"beta1": 0.9, "beta2": 0.99, "beta3": 0.999}


def gradients(n: int, dtype: torch.dtype, device: str = "cpu", steps: int = 4) -> list[Tensor]:
    """Over many decades, with exact zeros, an element that is not finite, and one whose square is not."""
    result = []
    for _ in range(steps):
        g = torch.randn(n) * torch.logspace(-6, 2, n)[torch.randperm(n)]
        g[::5] = 0.0
        if n > 300:
            g[270], g[271] = float("inf"), float("nan")
            g[272] = 1e30
        result.append(g.to(device, dtype))
    return result


def fresh_32bit(name: str, p: Tensor) -> State:
    """The state before the first step of the rule ``name``; later ones work on a copy of ``p``."""
    rule, n = RULES[name], p.numel()
    return {
        "p": p.clone(),
        "state1": torch.zeros(rule.averages, n, device=p.device),
        "state2": torch.zeros(n, device=p.device) if rule.states == 2 else None,
        "unorm": torch.zeros(1, device=p.device),
    }


def fresh_8bit(name: str, p: Tensor) -> State:
    rule, n = RULES[name], p.numel()
    two, blocks = rule.states == 2, -(n // -BLOCK)
    return {
        "p": p.clone(),
        "state1": torch.zeros(rule.averages, n, dtype=torch.uint8, device=p.device),
        "state2": torch.zeros(n, dtype=torch.uint8, device=p.device) if two else None,
        "absmax1": torch.zeros(rule.averages, blocks, device=p.device),
        "absmax2": torch.zeros(blocks, device=p.device) if two else None,
    }


def step_32bit(
    kernel: str,
    name: str,
    state: State,
    g: Tensor,
    step: int,
    *,
    max_unorm: float = 0.0,
    param_norm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    OPERATORS["optimizer_update_32bit"].run_with(
        kernel, name, g, state["p"], state["state1"], state["state2"], state["unorm"], max_unorm, param_norm,
        *BETAS.values(), 2.0, 1e-8, 0.1, step, 1e-2, 0.5, skip_zeros,
    )  # fmt: skip


def step_8bit(
    kernel: str,
    name: str,
    state: State,
    g: Tensor,
    step: int,
    *,
    decay: float = 0.1,
    scale: float = 0.5,
    skip_zeros: bool = False,
) -> None:
    two = state["state2"] is not None
    maps = create_dynamic_map(True).to(g.device), create_dynamic_map(False).to(g.device) if two else None
    OPERATORS["optimizer_update_8bit_blockwise"].run_with(
        kernel, name, g, state["p"], state["state1"], state["state2"], *BETAS.values(), 2.0, 1e-8, step, 1e-2, *maps,
        state["absmax1"], state["absmax2"], decay, scale, skip_zeros,
    )  # fmt: skip


def run(step: Callable, kernel: str, name: str, state: State, grads: list[Tensor], **settings) -> State:
    """``state`` after all steps."""
    for number, g in enumerate(grads, start=1):
        step(kernel, name, state, g, number, **settings)
    return state


def each_step(
    step: Callable, kernel: str, name: str, oracle: State, grads: list[Tensor], **settings
) -> Iterator[tuple[State, State, State]]:
    """What a step started from, what ``kernel`` made of it, and what plain torch did; the next starts from the latter."""
    for number, g in enumerate(grads, start=1):
        before, ours = ({k: None if x is None else x.clone() for k, x in oracle.items()} for _ in range(2))
        step(kernel, name, ours, g, number, **settings)
        step("default", name, oracle, g, number, **settings)
        yield before, ours, oracle
