"""The optimizer updates' cases: every rule in float64, with 32-bit and with 8-bit state.

The rules are spelled out from their papers' formulas; weight decay comes before the step, decoupled for the rules of
Adam's family and for Lion, added to the gradient for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Generator, Tensor

from .._formats.codebooks import create_dynamic_map
from .._formats.table import OPTIMIZER_4BIT_BLOCKSIZE, OPTIMIZER_BLOCKSIZE
from .selftest_cases import Case, excess

__all__ = ["optimizer_cases"]

_NAMES = ("adam", "lamb", "ademamix", "momentum", "lars", "lion", "rmsprop", "adagrad")
_TWO_STATES = ("adam", "lamb", "ademamix")
_DECOUPLED = (*_TWO_STATES, "lion")
_BETA1, _BETA2, _BETA3, _ALPHA = 0.9, 0.99, 0.9999, 5.0
_EPS, _DECAY, _STEP, _LR, _SCALE = 1e-8, 0.01, 3, 1e-3, 0.5

_PARAMETER = 1e-3  # of the step's norm: the parameter itself is rounded to float32
_SIGN = 2e-2  # the same for Lion, where one sign next to zero may fall the other way
_STATE = 1e-6
_CODE = (
    1e-5  # of a block's absmax; the rule that keeps a sign may leave the nearest entry by the map's smallest
)


def _exact(
    name: str, g: Tensor, p: Tensor, m: Tensor, v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """New parameter and state in float64."""
    g = g * _SCALE
    if name not in _DECOUPLED:
        g = g + _DECAY * p
    else:
        p = p * (1 - _LR * _DECAY)
    c1, c2 = 1 - _BETA1**_STEP, sqrt(1 - _BETA2**_STEP)
    if name in _TWO_STATES:
        assert v is not None
        v = _BETA2 * v + (1 - _BETA2) * g * g
        if name == "ademamix":
            fast, slow = _BETA1 * m[0] + (1 - _BETA1) * g, _BETA3 * m[1] + (1 - _BETA3) * g
            return (
                p - _LR * (fast / c1 + _ALPHA * slow) / (v.sqrt() / c2 + _EPS),
                torch.stack((fast, slow)),
                v,
            )
        m = _BETA1 * m + (1 - _BETA1) * g
        return p - _LR * (m / c1) / (v.sqrt() / c2 + _EPS), m, v
    if name in ("momentum", "lars"):
        m = _BETA1 * m + g
        return p - _LR * m, m, None
    if name == "lion":
        return p - _LR * (_BETA1 * m + (1 - _BETA1) * g).sign(), _BETA2 * m + (1 - _BETA2) * g, None
    m = m + g * g if name == "adagrad" else _BETA1 * m + (1 - _BETA1) * g * g
    return p - _LR * g / (m.sqrt() + _EPS), m, None


def _step_error(p: Tensor, before: Tensor, exact: Tensor) -> float:
    error = (p.double() - exact).norm() / (exact - before.double()).norm()
    return float("inf") if error.isnan() else error.item()


def _case_32bit(name: str, numel: int) -> Case:
    def make(generator: Generator) -> tuple:
        g, p = torch.randn(numel, generator=generator), torch.randn(numel, generator=generator)
        m = torch.randn((2, numel) if name == "ademamix" else (numel,), generator=generator)
        if name in ("rmsprop", "adagrad"):
            m = m.abs()
        v = torch.rand(numel, generator=generator) if name in _TWO_STATES else None
        scalars = (_BETA1, _BETA2, _BETA3, _ALPHA, _EPS, _DECAY, _STEP, _LR, _SCALE)
        return name, g, p, m, v, None, 0.0, 0.0, *scalars

    def error(args: tuple, after: Sequence) -> float:
        g, p, m = (tensor.double() for tensor in args[1:4])
        exact_p, exact_m, exact_v = _exact(name, g, p, m, None if args[4] is None else args[4].double())
        errors = [_step_error(after[2], args[2], exact_p)]
        for state, exact in ((after[3], exact_m), (after[4], exact_v)):
            if exact is not None:
                off = ((state.double() - exact).abs().max() / exact.abs().max()).item()
                errors.append(errors[0] if off <= _STATE else float("inf"))
        return max(errors)

    limit = _SIGN if name == "lion" else _PARAMETER
    return Case("optimizer_update_32bit", name, make, error, limit, in_place=True)


def _decode(codes: Tensor, qmap: Tensor, absmax: Tensor) -> Tensor:
    flat = qmap.double()[codes.reshape(absmax.shape[0], -1).long()]
    return flat * absmax.double().repeat_interleave(OPTIMIZER_BLOCKSIZE, dim=1)[:, : flat.shape[1]]


def _case_8bit(name: str, numel: int) -> Case:
    blocks = -(numel // -OPTIMIZER_BLOCKSIZE)
    averages = 2 if name == "ademamix" else 1

    def make(generator: Generator) -> tuple:
        g, p = torch.randn(numel, generator=generator), torch.randn(numel, generator=generator)
        # Squares are not negative: those codes lie in the upper half of the signed map.
        lowest = 128 if name in ("rmsprop", "adagrad") else 0
        m = torch.randint(lowest, 256, (averages, numel), generator=generator, dtype=torch.uint8)
        absmax = torch.rand((averages, blocks), generator=generator) + 0.5
        m, absmax = (m, absmax) if averages > 1 else (m[0], absmax[0])
        second: tuple = (None, None, None)
        if name in _TWO_STATES:
            v = torch.randint(128, 256, (numel,), generator=generator, dtype=torch.uint8)
            second = (v, create_dynamic_map(signed=False), torch.rand(blocks, generator=generator) + 0.5)
        qmap = create_dynamic_map(signed=True)
        scalars = (_BETA1, _BETA2, _BETA3, _ALPHA, _EPS, _STEP, _LR)
        return name, g, p, m, second[0], *scalars, qmap, second[1], absmax, second[2], _DECAY, _SCALE

    def error(args: tuple, after: Sequence) -> float:
        m = _decode(args[3], args[12], args[14].view(averages, -1))
        v = None if args[4] is None else _decode(args[4], args[13], args[15].view(1, -1))[0]
        exact = _exact(name, args[1].double(), args[2].double(), m if averages > 1 else m[0], v)
        found = _step_error(after[2], args[2], exact[0])
        for codes, qmap, absmax, state in (
            (after[3], after[12], after[14], exact[1]),
            (after[4], after[13], after[15], exact[2]),
        ):
            if state is None:
                continue
            rows = state.view(-1, numel)
            scale = (
                absmax.view(rows.shape[0], -1)
                .double()
                .repeat_interleave(OPTIMIZER_BLOCKSIZE, dim=1)[:, :numel]
            )
            chosen = qmap.double()[codes.view(rows.shape[0], -1).long()]
            if excess((rows / scale).contiguous(), chosen, qmap.double()) > _CODE:
                return float("inf")
        return found

    limit = _SIGN if name == "lion" else _PARAMETER
    return Case("optimizer_update_8bit_blockwise", name, make, error, limit, in_place=True)


def _unpacked(packed: Tensor, qmap: Tensor, absmax: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """Map entries and the scale of each element, in float64."""
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1)[:numel]
    return qmap.double()[codes.long()], absmax.double().repeat_interleave(OPTIMIZER_4BIT_BLOCKSIZE)[:numel]


def _between(values: Tensor, chosen: Tensor, table: Tensor) -> float:
    """How far ``chosen`` is outside the two entries of ``table`` that enclose ``values``, at worst."""
    below = (torch.searchsorted(table, values, right=True) - 1).clamp(0, table.numel() - 2)
    outside = torch.maximum(table[below] - chosen, chosen - table[below + 1])
    # A value next to an entry may be taken for one on its other side.
    close = torch.minimum((values - table[below]).abs(), (values - table[below + 1]).abs()) < _CODE
    return torch.where(close, 0.0, outside).max().item()


def _case_4bit(name: str, numel: int) -> Case:
    """state1 takes the nearest entry, state2 one of the two around the value."""
    blocks, packed = -(numel // -OPTIMIZER_4BIT_BLOCKSIZE), -(numel // -2)

    def state(generator: Generator) -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 256, (packed,), generator=generator, dtype=torch.uint8)
        return codes, torch.rand(blocks, generator=generator) + 0.5

    def make(generator: Generator) -> tuple:
        g, p = torch.randn(numel, generator=generator), torch.randn(numel, generator=generator)
        m, scale1 = state(generator)
        v, scale2 = state(generator) if name in _TWO_STATES else (None, None)
        qmap1 = create_dynamic_map(signed=True, max_exponent_bits=3, total_bits=4).unique()
        qmap2 = None if v is None else torch.exp2((torch.arange(16) - 15) / 2.0)
        scalars = (_BETA1, _BETA2, _BETA3, _ALPHA, _EPS, _STEP, _LR)
        return name, g, p, m, v, *scalars, qmap1, qmap2, scale1, scale2, _DECAY, _SCALE, 7

    def error(args: tuple, after: Sequence) -> float:
        m, scale = _unpacked(args[3], args[12], args[14], numel)
        v = None
        if args[4] is not None:
            entries, scale2 = _unpacked(args[4], args[13], args[15], numel)
            v = entries * scale2
        exact_p, exact_m, exact_v = _exact(name, args[1].double(), args[2].double(), m * scale, v)
        chosen, scale = _unpacked(after[3], after[12], after[14], numel)
        right = excess((exact_m / scale).contiguous(), chosen, after[12].double()) <= _CODE
        if exact_v is not None:
            chosen, scale = _unpacked(after[4], after[13], after[15], numel)
            right &= _between(exact_v / scale, chosen, after[13].double()) <= _CODE
        return _step_error(after[2], args[2], exact_p) if right else float("inf")

    limit = _SIGN if name == "lion" else _PARAMETER
    return Case("optimizer_update_4bit_blockwise", name, make, error, limit, in_place=True)


def _case_rounding(numel: int) -> Case:
    """Each value becomes one of its two neighbours in bfloat16, and there is no drift."""

    def make(generator: Generator) -> tuple:
        return torch.randn(numel, generator=generator), 7, 0

    def error(args: tuple, after: Sequence) -> float:
        values = args[0].double()
        magnitude = values.abs().clamp(min=2.0**-126)  # a normal draw can be exactly 0
        step = torch.exp2(magnitude.log2().floor() - 7)
        off = (after[0].double() - values) / step
        drift = off.mean().abs().item() * sqrt(numel)
        return off.abs().max().item() if drift < 3.0 else float("inf")  # the spread of off is at most a half

    return Case("round_to_bfloat16", "normal", make, error, 1.0)


def optimizer_cases(numel: int) -> list[Case]:
    """The state widths of every rule, for a parameter of ``numel`` elements, and the rounding of parameters."""
    both = [case(name, numel) for case in (_case_32bit, _case_8bit) for name in _NAMES]
    return [*both, _case_4bit("adam", numel), _case_4bit("lion", numel), _case_rounding(numel)]
