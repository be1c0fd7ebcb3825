"""Muon: steps along the nearest orthogonal matrix to the momentum (Jordan et al., 2024), whose momentum takes 8 bits.

Orthogonalisation is torch's own; its name is private, so the same iteration stands here for a torch that has moved it.
Of a sharded matrix every process gathers the whole update, orthogonalises it, and steps on its own part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._formats.table import OPTIMIZER_BLOCKSIZE
from ._base import Group, Optimizer1State
from ._sharded import like_parameter, part_for

try:
    from torch.optim._muon import _zeropower_via_newtonschulz as _torch_newton_schulz
except ImportError:
    _torch_newton_schulz = None  # type: ignore[assignment]

__all__ = ["Muon8bit"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero among those that keep singular values near one
_LR_RULES = (None, "original", "match_rms_adamw")


class Muon8bit(Optimizer1State, rule="momentum"):
    """Muon with 8-bit momentum, for matrices; give embeddings, heads and vectors to AdamW8bit.

    Args:
        params: two-dimensional parameters, or groups of them.
        lr: learning rate.
        weight_decay: share of the parameter, times ``lr``, taken away before each step.
        momentum: decay of the average of gradients.
        nesterov: step along an interpolation of gradient and average instead of the average.
        ns_coefficients, ns_steps, eps: of the Newton-Schulz iteration.
        adjust_lr_fn: ``"original"`` scales lr by ``sqrt(max(1, rows / columns))``; ``"match_rms_adamw"`` by
            ``0.2 * sqrt(max(rows, columns))``, so that AdamW's lr and decay serve.
        min_8bit_size: parameters with fewer elements keep 32-bit momentum.

    Raises:
        ValueError: a negative, infinite or NaN setting, a momentum outside [0, 1), a parameter that is no matrix.
    """

    _needs_every_part = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = False,
    ) -> None:
        if adjust_lr_fn not in _LR_RULES:
            raise ValueError(f"adjust_lr_fn must be one of {_LR_RULES}, got {adjust_lr_fn!r}")
        if not 0 < ns_steps < 100:
            raise ValueError(f"ns_steps must be between 1 and 99, got {ns_steps}")
        if len(ns_coefficients) != 3:
            raise ValueError(f"ns_coefficients must be three numbers, got {ns_coefficients!r}")
        super().__init__(
            self._rule_name,
            params,
            lr,
            (momentum, 0.0),
            eps,
            weight_decay,
            optim_bits=8,
            min_8bit_size=min_8bit_size,
            stochastic_rounding=stochastic_rounding,  # type: ignore[call-arg]
        )
        own = {"nesterov": nesterov, "ns_coefficients": tuple(ns_coefficients), "ns_steps": ns_steps}
        own["adjust_lr_fn"] = adjust_lr_fn
        self.defaults.update(own)
        for group in self.param_groups:
            for key, value in own.items():
                group.setdefault(key, value)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of matrices; see :class:`Optimizer8bit`."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dim() != 2:
                self.param_groups.pop()
                raise ValueError(f"Muon8bit takes matrices only, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def update_step(self, group: Group, p: Tensor, gindex: int, pindex: int) -> None:
        """One step on ``p``; see :class:`Optimizer8bit`."""
        self._current = (group, p)
        super().update_step(group, p, gindex, pindex)

    def _update(
        self, g: Tensor, p: Tensor, state: Group, scalars: Group, max_unorm: float, skip_zeros: bool
    ) -> None:
        group, owner = self._current
        average, g, momentum = _decoded(state), g.float(), scalars["beta1"]
        average.lerp_(g, 1.0 - momentum)
        direction = g.lerp(average, momentum) if group["nesterov"] else average
        whole = like_parameter(direction, owner)
        whole = whole.full_tensor() if whole is not direction else whole  # type: ignore[attr-defined]
        steps = (group["ns_coefficients"], group["ns_steps"], scalars["eps"])
        part = part_for(orthogonalized(whole, *steps), owner) if whole.numel() else whole
        _encode(average, state)
        lr = scalars["lr"]
        p.mul_(1.0 - lr * scalars["weight_decay"])
        p.sub_((part * _adjusted(lr, group["adjust_lr_fn"], owner)).to(p.dtype))


def orthogonalized(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Roughly ``U @ V.T`` of the singular value decomposition ``U, S, V`` of ``matrix``, in bfloat16."""
    if _torch_newton_schulz is not None:
        return _torch_newton_schulz(matrix, coefficients, steps, eps)
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    X = matrix.bfloat16().T if tall else matrix.bfloat16()
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        gram = X @ X.T
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X.T if tall else X


def _adjusted(lr: float, how: str | None, p: Tensor) -> float:
    rows, columns = p.shape
    if how == "match_rms_adamw":
        return lr * 0.2 * math.sqrt(max(rows, columns))
    return lr * math.sqrt(max(1.0, rows / max(columns, 1)))


def _decoded(state: Group) -> Tensor:
    """The average in float32: a copy of 8-bit state, 32-bit state itself."""
    if state["state1"].dtype == torch.float32:
        return state["state1"]
    codes, absmax, qmap = (state[key] for key in ("state1", "absmax1", "qmap1"))
    return torch.ops.bitsandbytes.dequantize_blockwise(
        codes, absmax, qmap, OPTIMIZER_BLOCKSIZE, torch.float32
    )


def _encode(average: Tensor, state: Group) -> None:
    if state["state1"].dtype == torch.uint8 and average.numel():
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(
            average, state["qmap1"], OPTIMIZER_BLOCKSIZE
        )
        state["state1"].copy_(codes)
        state["absmax1"].copy_(absmax)
