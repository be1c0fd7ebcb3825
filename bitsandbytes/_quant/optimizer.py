"""One optimizer step on one tensor, as functions over the operators; the optimizer classes call these.

``p``, the states and their statistics change in place. The two functions at the end belong to the tensor-wise 8-bit
state and the gradient clipping of earlier releases.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import ArgumentError, check_dtype
from .._formats.rules import RULES, step_scalars
from .._native import is_on_gpu
from .deprecation import deprecated
from .tensorwise import decode, encode_nearest

__all__ = [
    "optimizer_update_8bit",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "percentile_clipping",
    "str2optimizer8bit",
]


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One step of the named rule with float32 state, in place.

    Args:
        optimizer_name: adam, lamb, ademamix, momentum, lars, rmsprop, adagrad or lion.
        g, p: gradient and parameter, float16, bfloat16 or float32 alike.
        state1: float32 like ``p``; for ademamix ``[2, *p.shape]``, the fast and the slow average.
        state2: float32 like ``p``, for adam, lamb and ademamix.
        step: counts from 1.
        unorm_vec: float32 ``[1]``, receives the norm of the update (not its square) when ``max_unorm > 0``.
        max_unorm: the update's norm may be this times the parameter's; 0 is no limit. A zero parameter has none.
        skip_zeros: leave elements, and their state, alone where the gradient is exactly zero.

    Raises:
        ValueError: an unknown name, dtypes or sizes that do not fit (also a ``RuntimeError``).
        RuntimeError: tensors on different devices.
    """
    is_on_gpu([g, p, state1, state2, unorm_vec])
    param_norm = 0.0
    if max_unorm > 0.0:
        param_norm = float(torch.linalg.vector_norm(p, dtype=torch.float32))
    torch.ops.bitsandbytes.optimizer_update_32bit(
        optimizer_name,
        g,
        p,
        state1,
        state2,
        unorm_vec,
        max_unorm,
        param_norm,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        weight_decay,
        step,
        lr,
        gnorm_scale,
        skip_zeros,
    )


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """One step of the named rule with 8-bit state in blocks of 256, in place. There is no limit on the update's norm.

    Args:
        optimizer_name, g, p, step, skip_zeros: as in :func:`optimizer_update_32bit`.
        state1, state2: uint8 codes, shaped as there.
        qmap1, qmap2: ascending float32 ``[256]``; the signed and the unsigned dynamic map.
        absmax1, absmax2: float32 ``[blocks]``; ``absmax1`` is ``[2, blocks]`` for ademamix.

    Raises:
        ValueError: an unknown name, dtypes or sizes that do not fit (also a ``RuntimeError``).
        RuntimeError: tensors on different devices.
    """
    is_on_gpu([p, g, state1, state2, qmap1, qmap2, absmax1, absmax2])
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        optimizer_name,
        g,
        p,
        state1,
        state2,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        step,
        lr,
        qmap1,
        qmap2,
        absmax1,
        absmax2,
        weight_decay,
        gnorm_scale,
        skip_zeros,
    )


def update_limited(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state: dict[str, Tensor],
    max_unorm: float,
    scalars: dict[str, float],
    skip_zeros: bool = False,
    norm_of: Callable[[Tensor], Tensor] = torch.linalg.vector_norm,
) -> None:
    """A step with the update's norm limited as in :func:`optimizer_update_32bit`, for any kind of state.

    The 8-bit operator knows no limit, and no operator a norm over processes, so it first runs on a parameter of zeros:
    what it leaves there is the direction, whose norm sets the step. Costs two float32 tensors like ``p``; nothing waits
    for the device.

    Args:
        state: by their names in an optimizer's state, the averages, maps and absmax, and ``unorm_vec``.
        scalars: beta1, beta2, beta3, alpha, eps, weight_decay, step, lr and gnorm_scale.
        norm_of: norm of a whole float32 tensor, given the part of it that is here.
    """
    h = step_scalars(optimizer_name, **scalars, skip_zeros=skip_zeros)  # type: ignore[arg-type]
    gradient, weights = g.float() * h.gnorm_scale, p.float()
    if h.decay:
        gradient = gradient + weights * h.decay
    is_8bit = state["state1"].dtype == torch.uint8
    moves = (gradient * gradient).isfinite() if h.shrink != 1.0 and is_8bit else None
    if skip_zeros:
        gradient = torch.where(g == 0, 0.0, gradient)
        moves = (g != 0) if moves is None else moves & (g != 0)

    unit_lr = scalars["lr"] / h.step_size if h.step_size else 1.0
    step_on_zeros = {**scalars, "weight_decay": 0.0, "gnorm_scale": 1.0, "lr": unit_lr}
    change = torch.zeros_like(weights)
    update = optimizer_update_8bit_blockwise if is_8bit else optimizer_update_32bit
    statistics = {key: state.get(key) for key in ("qmap1", "qmap2", "absmax1", "absmax2")} if is_8bit else {}
    if p.numel():
        update(
            optimizer_name,
            gradient,
            change,
            state1=state["state1"],
            state2=state.get("state2"),
            skip_zeros=skip_zeros,
            **statistics,  # type: ignore[arg-type]
            **step_on_zeros,  # type: ignore[arg-type]
        )

    norm, limit = norm_of(torch.where(change.isfinite(), change, 0.0)), norm_of(weights) * max_unorm
    state["unorm_vec"].copy_(norm.view(1))
    ratio = torch.where(limit > 0, (limit / norm).clamp(max=1.0), 1.0)
    moved = weights * h.shrink + change * (ratio * h.step_size)
    p.copy_(moved if moves is None else torch.where(moves, moved, weights))


def _encode_tensorwise(values: Tensor, qmap: Tensor, keep_sign: bool, codes: Tensor, new_max: Tensor) -> None:
    """Codes of values scaled by their largest magnitude, which is written to ``new_max``."""
    new_max.copy_(values.abs().max().view_as(new_max))
    nearest = encode_nearest(values * new_max.clamp(min=1e-38).reciprocal(), qmap).int()
    if keep_sign:
        negative = decode(nearest, qmap).signbit()
        nearest += ((values > 0) & negative).int() - ((values < 0) & ~negative).int()
    codes.copy_(nearest)


# The rules that ever had state with one absmax for the whole tensor, by the name older programs look them up under.
str2optimizer8bit = {name: RULES[name] for name in ("adam", "momentum", "rmsprop", "lion", "lamb", "lars")}


@deprecated("Use optimizer_update_8bit_blockwise instead.")
def optimizer_update_8bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    max1: Tensor,
    max2: Tensor | None,
    new_max1: Tensor,
    new_max2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
) -> None:
    """One step with 8-bit state that has one absmax (float32 ``[1]``) for the whole tensor, in place.

    Reads ``max1`` and ``max2``, writes the new maxima to ``new_max1`` and ``new_max2``; callers swap them.

    Raises:
        ValueError: the gradient is neither float32 nor float16, the state is not uint8, or the name is none of
            adam, lamb, momentum, lars, rmsprop and lion.
    """
    if g.dtype not in (torch.float32, torch.float16) or state1.dtype != torch.uint8:
        raise ArgumentError(
            f"Gradient+optimizer bit data type combination not supported: grad {g.dtype}, optimizer {state1.dtype}"
        )
    if optimizer_name not in str2optimizer8bit:
        raise ArgumentError(f"Unsupported optimizer name: {optimizer_name!r}")
    exact1 = decode(state1, qmap1) * max1
    exact2 = None
    if RULES[optimizer_name].states == 2:
        if state2 is None or qmap2 is None or max2 is None or new_max2 is None:
            raise ArgumentError(f"{optimizer_name} needs state2, qmap2, max2 and new_max2")
        check_dtype(state2, torch.uint8, "state2")
        exact2 = decode(state2, qmap2) * max2
    optimizer_update_32bit(
        optimizer_name,
        g,
        p,
        exact1,
        beta1,
        eps,
        step,
        lr,
        exact2,
        beta2,
        weight_decay=weight_decay,
        gnorm_scale=gnorm_scale,
        unorm_vec=unorm_vec,
        max_unorm=max_unorm,
    )
    _encode_tensorwise(exact1, qmap1, True, state1, new_max1)
    if exact2 is not None:
        _encode_tensorwise(exact2, qmap2, False, state2, new_max2)  # type: ignore[arg-type]


def scale_to_percentile(
    grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int
) -> tuple[Tensor, Tensor, Tensor | float]:
    """:func:`percentile_clipping` without the warning, for any float dtype."""
    norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
    squared = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).square()  # of a sharded gradient
    if step == 1:
        gnorm_vec.fill_(squared)
    else:
        gnorm_vec[step % 100] = squared
    current = gnorm_vec[step % 100].sqrt()
    clip = gnorm_vec.sort().values[percentile].sqrt()
    return current, clip, clip / current if current > clip else 1.0


@deprecated("Use torch.nn.utils.clip_grad_norm_ instead.")
def percentile_clipping(
    grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int = 5
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Scale that brings a gradient down to a percentile of the norms of its last 100 steps.

    ``gnorm_vec`` (float32 ``[100]``, zeros at first) holds squared norms; this step's is recorded in it.

    Returns:
        ``(current_gnorm, clip_value, gnorm_scale)``; the scale is 1.0 unless the norm exceeds the clip value.

    Raises:
        ValueError: the gradient is neither float32 nor float16.
    """
    if grad.dtype not in (torch.float32, torch.float16):
        raise ArgumentError(f"Gradient type {grad.dtype} not supported! grad must be float32 or float16")
    return scale_to_percentile(grad, gnorm_vec, step, percentile)
