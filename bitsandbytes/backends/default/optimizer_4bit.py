"""The optimizer update with 4-bit state, in plain torch: two codes a byte, blocks of 128, any of the rules.

state1 takes the nearest entry of its map. state2, an average so slow that rounding to nearest would hold it in place
for hundreds of steps, takes the entry below or above at random, right on average; see ``rounding.py`` for the dice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._formats.codebooks import midpoints
from ..._formats.table import OPTIMIZER_4BIT_BLOCKSIZE
from ..._ops import optimizer_update_4bit_blockwise
from .optimizer_update import update_kernel
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


@update_kernel(optimizer_update_4bit_blockwise, "default")
def _(update):
    h, p, qmap1, qmap2 = update.scalars, update.p, update.qmap1, update.qmap2
    advance, n, size = UPDATES[update.rule.name], p.numel(), OPTIMIZER_4BIT_BLOCKSIZE
    memory = plain_memory(p.device, p, update.state1, update.state2, update.absmax1, update.absmax2)
    with memory as (parameter, first, second, scale1, scale2):
        parameter, gradient = parameter.view(-1), update.g.reshape(-1)
        for start in range(0, n, _CHUNK):
            span = slice(start, min(start + _CHUNK, n))
            byte, block = slice(start // 2, (span.stop + 1) // 2), slice(start // size, -(span.stop // -size))
            p_old, count = parameter[span].float(), span.stop - start
            m = _decode(first[byte], qmap1, scale1[block], count)
            v = None if second is None else _decode(second[byte], qmap2, scale2[block], count)
            direction, m, v = advance(gradient_of(gradient[span].float(), p_old, h), m, v, h)
            good = m.isfinite() if v is None else m.isfinite() & v.isfinite()
            p_new = torch.where(good, moved(p_old, direction, h.step_size, h), p_old)
            _encode(torch.where(good, m, 0.0), qmap1, None, first[byte], scale1[block])
            if v is not None:
                dice = random_bits(update.key, torch.arange(start, span.stop, device=p.device)) & 0xFFFF
                _encode(torch.where(good, v, 0.0), qmap2, dice, second[byte], scale2[block])
            parameter[span] = p_new
