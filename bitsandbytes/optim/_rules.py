"""What the optimizer classes know about rules beyond their arithmetic: schedules and the limits of settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["betas_of", "check_hyperparameters", "scheduled"]


def _is_finite_and_at_least_zero(value: Any) -> bool:
    return bool(0.0 <= value < math.inf)  # false for NaN; works for tensors of one element


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for settings that make no sense: negative, infinite or NaN, betas outside [0, 1)."""
    for key, label in (
        ("lr", "learning rate"),
        ("eps", "epsilon value"),
        ("weight_decay", "weight_decay value"),
    ):
        if key in group and not _is_finite_and_at_least_zero(group[key]):
            raise ValueError(f"Invalid {label}: {group[key]} ({key} must be finite and at least 0)")
    for key in ("alpha", "t_alpha", "t_beta3"):
        if group.get(key) is not None and not _is_finite_and_at_least_zero(group[key]):
            raise ValueError(f"Invalid {key}: {group[key]} (must be finite and at least 0)")
    betas = group.get("betas", ())
    if isinstance(betas, str) or not isinstance(betas, Sequence):
        raise TypeError(f"betas must be a sequence of numbers, got {betas!r}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta} (must be in [0, 1))")


def betas_of(text: str) -> list[float]:
    """Parse betas that came as text, ``"(0.9, 0.95)"``: configuration files hold them so."""
    return [float(part) for part in text.strip().strip("()[]").split(",") if part.strip()]


def scheduled(
    betas: Sequence[float], alpha: float, t_alpha: float | None, t_beta3: float | None, step: int
) -> tuple[float, float]:
    """``(alpha, beta3)`` of AdEMAMix at ``step``: both grow from Adam's behaviour to their final values.

    alpha grows linearly over ``t_alpha`` steps; beta3 grows from beta1 over ``t_beta3`` steps so that the half-life of
    the slow average grows linearly ("The AdEMAMix Optimizer", Pagliardini et al., 2024). None or 0 is no schedule.

    Raises:
        ValueError: a schedule with other than three betas, or one for beta3 that starts from beta1 = 0.
    """
    beta3 = betas[2] if len(betas) > 2 else 0.0
    if not t_alpha and not t_beta3:
        return alpha, beta3
    if len(betas) != 3:
        raise ValueError(f"t_alpha and t_beta3 need three betas, got {len(betas)}")
    if t_alpha:
        alpha = min(step * alpha / t_alpha, alpha)
    if t_beta3:
        if betas[0] <= 0.0 or beta3 <= 0.0:
            raise ValueError(f"t_beta3 needs beta1 > 0 and beta3 > 0, got betas={tuple(betas)}")
        log1, log3, progress = math.log(betas[0]), math.log(beta3), step / t_beta3
        # Past the end of the schedule the interpolation has no meaning; it may divide by zero.
        if progress < 1.0:
            beta3 = min(math.exp(log1 * log3 / ((1.0 - progress) * log3 + progress * log1)), beta3)
    return alpha, beta3
