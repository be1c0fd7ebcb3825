"""The optimizer updates in plain torch: right on any device, the reference for every faster kernel.

A rule is a function from the gradient and the state to a direction and the new state, all flat float32; what it costs
to store the state is a separate matter, so the 32-bit and the 8-bit update share the rules. The same arithmetic, in
the same order, stands in ``csrc/common/optimizer_rules.h``; a test holds the two together.

8-bit state: blocks of 256 values of the flattened parameter share one absmax. A value takes the nearest entry of its
map, a tie the lower one; in state1 a negative value never becomes zero (nor a positive one negative), so that a
decayed momentum keeps its sign. Exact zero stays exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..._formats.codebooks import midpoints
from ..._formats.rules import StepScalars
from ..._formats.table import OPTIMIZER_BLOCKSIZE
from ..._ops import optimizer_update_8bit_blockwise, optimizer_update_32bit
from .optimizer_update import update_kernel

__all__ = ["UPDATES", "gradient_of", "moved", "plain_memory", "update_8bit"]

_CHUNK = 1 << 22  # elements updated together: bounds the temporaries; a multiple of the block size
_TINY = 1e-38  # keeps the reciprocal of an all-zero block's absmax finite

_State = Tensor | None
_Update = tuple[Tensor, Tensor, _State]


# --- rules: (gradient, state1, state2, scalars) -> (direction, new state1, new state2) -------------------------


def _adam(g: Tensor, m: Tensor, v: Tensor, h: StepScalars) -> _Update:
    m = m * h.beta1 + g * h.rest1
    v = v * h.beta2 + g * g * h.rest2
    return m / (v.sqrt() + h.eps), m, v


def _ademamix(g: Tensor, m: Tensor, v: Tensor, h: StepScalars) -> _Update:
    fast = m[0] * h.beta1 + g * h.rest1
    slow = m[1] * h.beta3 + g * h.rest3
    v = v * h.beta2 + g * g * h.rest2
    direction = (fast / h.correction1 + slow * h.alpha) / (v.sqrt() / h.correction2 + h.eps)
    return direction, torch.stack((fast, slow)), v


def _momentum(g: Tensor, m: Tensor, v: _State, h: StepScalars) -> _Update:
    m = g if h.first_step else m * h.beta1 + g
    return m, m, None


def _lion(g: Tensor, m: Tensor, v: _State, h: StepScalars) -> _Update:
    return (m * h.beta1 + g * h.rest1).sign(), m * h.beta2 + g * h.rest2, None


def _rmsprop(g: Tensor, v: Tensor, _: _State, h: StepScalars) -> _Update:
    v = v * h.beta1 + g * g * h.rest1
    return g / (v.sqrt() + h.eps), v, None


def _adagrad(g: Tensor, v: Tensor, _: _State, h: StepScalars) -> _Update:
    v = v + g * g
    return g / (v.sqrt() + h.eps), v, None


UPDATES: dict[str, Callable[..., _Update]] = {
    "adam": _adam,
    "ademamix": _ademamix,
    "momentum": _momentum,
    "lion": _lion,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
}


# --- what both state widths share ------------------------------------------------------------------------------


@contextmanager
def plain_memory(device: torch.device, *tensors: _State) -> Iterator[list]:
    """Tensors as contiguous memory on ``device``; copies made for that are written back at the end.

    Strided tensors need it, and paged state, which torch sees as host memory.
    """
    work = [t if t is None else t.to(device).contiguous() for t in tensors]
    yield work
    for original, used in zip(tensors, work, strict=True):
        if original is not None and original is not used:
            original.copy_(used)  # type: ignore[arg-type]


def gradient_of(g: Tensor, p: Tensor, h: StepScalars) -> Tensor:
    scaled = g * h.gnorm_scale
    return scaled + p * h.decay if h.decay else scaled


def moved(p: Tensor, direction: Tensor, step_size: float | Tensor, h: StepScalars) -> Tensor:
    return p * h.shrink - direction * step_size


def _limited_step(direction: Tensor, unorm_vec: _State, limit: float, h: StepScalars) -> float | Tensor:
    """The step size that keeps the update's norm within ``limit``; zero is no limit, so a zero parameter can move.

    Values that are not finite do not count: they must not spread from their own element.
    """
    norm = torch.linalg.vector_norm(torch.where(direction.isfinite(), direction, 0.0))
    if unorm_vec is not None:
        unorm_vec.copy_(norm.view(1))
    if not limit > 0.0:
        return h.step_size
    return (limit / norm).clamp(max=1.0) * h.step_size


# --- 32-bit state ----------------------------------------------------------------------------------------------


@update_kernel(optimizer_update_32bit, "default")
def _(update):
    rule, h, p = update.rule, update.scalars, update.p
    advance, n, limited = UPDATES[rule.name], p.numel(), update.limit is not None
    chunk = max(n, 1) if limited else _CHUNK  # the norm is that of the whole update
    with plain_memory(p.device, p, update.state1, update.state2) as (parameter, first, second):
        parameter, gradient, m = parameter.view(-1), update.g.reshape(-1), first.view(rule.averages, n)
        for start in range(0, n, chunk):
            span = slice(start, start + chunk)
            p_old, g_raw = parameter[span].float(), gradient[span].float()
            m_old = m[:, span] if rule.averages > 1 else m[0, span]
            v_old = None if second is None else second.view(-1)[span]
            direction, m_new, v_new = advance(gradient_of(g_raw, p_old, h), m_old, v_old, h)
            step_size: float | Tensor = h.step_size
            if limited:
                step_size = _limited_step(direction, update.unorm_vec, update.limit, h)
            p_new = moved(p_old, direction, step_size, h)
            if h.skip_zeros:
                keep = g_raw == 0
                p_new, m_new = torch.where(keep, p_old, p_new), torch.where(keep, m_old, m_new)
                v_new = None if v_old is None or v_new is None else torch.where(keep, v_old, v_new)
            parameter[span] = p_new
            m_old.copy_(m_new)
            if v_old is not None and v_new is not None:
                v_old.copy_(v_new)


# --- 8-bit state -----------------------------------------------------------------------------------------------


def _decode(codes: Tensor, qmap: Tensor, absmax: Tensor) -> Tensor:
    """Values (float32) of flat codes whose blocks are scaled by ``absmax``."""
    scale = absmax.repeat_interleave(OPTIMIZER_BLOCKSIZE)[: codes.numel()]
    return qmap[codes.int()] * scale


def _encode(values: Tensor, qmap: Tensor, keep_sign: bool, codes: Tensor, absmax: Tensor) -> None:
    """Write the codes and the blocks' absmax of flat finite values."""
    n = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -n % OPTIMIZER_BLOCKSIZE)).view(-1, OPTIMIZER_BLOCKSIZE)
    torch.amax(blocks.abs(), dim=1, out=absmax)
    scaled = blocks * absmax.clamp(min=_TINY).reciprocal().unsqueeze(1)
    nearest = torch.bucketize(scaled.view(-1)[:n], midpoints(qmap), out_int32=True)
    if keep_sign:
        negative = qmap[nearest].signbit()
        nearest += ((values > 0) & negative).int() - ((values < 0) & ~negative).int()
    codes.copy_(nearest.clamp_(0, 255))


def update_8bit(update) -> None:
    """One step with 8-bit states, of an ``Update``."""
    rule, h, p, qmap1, qmap2 = update.rule, update.scalars, update.p, update.qmap1, update.qmap2
    advance, n, blocks = UPDATES[rule.name], p.numel(), -(p.numel() // -OPTIMIZER_BLOCKSIZE)
    memory = plain_memory(p.device, p, update.state1, update.state2, update.absmax1, update.absmax2)
    with memory as (parameter, first, second, scale1, scale2):
        parameter, gradient = parameter.view(-1), update.g.reshape(-1)
        first, scale1 = first.view(rule.averages, n), scale1.view(rule.averages, blocks)
        for start in range(0, n, _CHUNK):
            span = slice(start, start + _CHUNK)
            block = slice(start // OPTIMIZER_BLOCKSIZE, (start + _CHUNK) // OPTIMIZER_BLOCKSIZE)
            p_old, g_raw = parameter[span].float(), gradient[span].float()
            averages = [_decode(first[i, span], qmap1, scale1[i, block]) for i in range(rule.averages)]
            m_old = torch.stack(averages) if rule.averages > 1 else averages[0]
            v_old = None if second is None else _decode(second.view(-1)[span], qmap2, scale2.view(-1)[block])

            direction, m_new, v_new = advance(gradient_of(g_raw, p_old, h), m_old, v_old, h)
            p_new = moved(p_old, direction, h.step_size, h)
            if h.skip_zeros:
                keep = g_raw == 0
                p_new, m_new = torch.where(keep, p_old, p_new), torch.where(keep, m_old, m_new)
                v_new = None if v_old is None or v_new is None else torch.where(keep, v_old, v_new)

            # An element whose state is not finite starts anew and stays put; its block must not notice.
            good = m_new.isfinite() if rule.averages == 1 else m_new.isfinite().all(dim=0)
            m_new = m_new.view(rule.averages, -1)
            if v_new is not None:
                good &= v_new.isfinite()
                _encode(
                    torch.where(good, v_new, 0.0), qmap2, False, second.view(-1)[span], scale2.view(-1)[block]
                )
            for i in range(rule.averages):
                _encode(torch.where(good, m_new[i], 0.0), qmap1, True, first[i, span], scale1[i, block])
            parameter[span] = torch.where(good, p_new, p_old)


update_kernel(optimizer_update_8bit_blockwise, "default")(update_8bit)
