"""The optimizer update with 4-bit state, in plain torch: two codes a byte, blocks of 128, any of the rules.

state1 takes the nearest entry of its map. state2, an average so slow that rounding to nearest would hold it in place
for hundreds of steps, takes the entry below or above at random, right on average; see ``rounding.py`` for the dice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._formats.codebooks import midpoints
from ..._formats.rules import RULES, step_scalars
from ..._formats.table import OPTIMIZER_4BIT_BLOCKSIZE
from ..._ops import optimizer_update_4bit_blockwise
from .optimizers import UPDATES, gradient_of, moved, plain_memory
from .rounding import random_bits

__all__: list[str] = []

_CHUNK = 1 << 22  # elements updated together; a multiple of the block size
_TINY = 1e-38


def _decode(packed: Tensor, qmap: Tensor, absmax: Tensor, n: int) -> Tensor:
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1)[:n]
    return qmap[codes.int()] * absmax.repeat_interleave(OPTIMIZER_4BIT_BLOCKSIZE)[:n]


def _encode(values: Tensor, qmap: Tensor, dice: Tensor | None, packed: Tensor, absmax: Tensor) -> None:
    """Write codes and absmax of flat finite values; ``dice`` are 16 random bits each, or None for the nearest entry."""
    n, size = values.numel(), OPTIMIZER_4BIT_BLOCKSIZE
    blocks = torch.nn.functional.pad(values, (0, -n % size)).view(-1, size)
    absmax.copy_(blocks.abs().amax(dim=1))
    scaled = (blocks * absmax.clamp(min=_TINY).reciprocal().unsqueeze(1)).view(-1)[:n]
    if dice is None:
        codes = torch.bucketize(scaled, midpoints(qmap), out_int32=True)
    else:
        below = (torch.bucketize(scaled, qmap, out_int32=True, right=True) - 1).clamp_(0, qmap.numel() - 2)
        share = (scaled - qmap[below]) / (qmap[below + 1] - qmap[below])
        codes = below + (dice < share * 65536.0)
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, n % 2)).view(-1, 2)
    packed.copy_(codes[:, 0] << 4 | codes[:, 1])


@optimizer_update_4bit_blockwise.kernel("default")
def _(
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
    key,
):
    h = step_scalars(optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale)
    rule, n, size = RULES[optimizer_name], p.numel(), OPTIMIZER_4BIT_BLOCKSIZE
    with plain_memory(p.device, p, state1, state2, absmax1, absmax2) as (
        parameter,
        first,
        second,
        scale1,
        scale2,
    ):
        parameter, gradient = parameter.view(-1), g.reshape(-1)
        for start in range(0, n, _CHUNK):
            span = slice(start, min(start + _CHUNK, n))
            byte, block = slice(start // 2, (span.stop + 1) // 2), slice(start // size, -(span.stop // -size))
            p_old, count = parameter[span].float(), span.stop - start
            m = _decode(first[byte], qmap1, scale1[block], count)
            v = None if second is None else _decode(second[byte], qmap2, scale2[block], count)
            direction, m, v = UPDATES[rule.name](gradient_of(gradient[span].float(), p_old, h), m, v, h)
            good = m.isfinite() if v is None else m.isfinite() & v.isfinite()
            p_new = torch.where(good, moved(p_old, direction, h.step_size, h), p_old)
            _encode(torch.where(good, m, 0.0), qmap1, None, first[byte], scale1[block])
            if v is not None:
                dice = random_bits(key, torch.arange(start, span.stop, device=p.device)) & 0xFFFF
                _encode(torch.where(good, v, 0.0), qmap2, dice, second[byte], scale2[block])
            parameter[span] = p_new
