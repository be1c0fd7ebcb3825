"""Stochastic rounding to bfloat16 in plain torch: the oracle of ``csrc/common/stochastic_rounding.h``.

The random bits are a hash of the key and the element's index, computed in int64, whose low 32 bits multiply as
unsigned numbers do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._ops import round_to_bfloat16

__all__ = ["random_bits"]

_CHUNK = 1 << 22  # elements rounded together: bounds the temporaries
_LOW = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


def random_bits(key: int, index: Tensor) -> Tensor:
    """Thirty-two random bits (int64) for each element ``index`` (int64) of the step that ``key`` stands for."""
    low = _mixed((index & _LOW) ^ (key & _LOW))
    high = (index >> 32) * 0x9E3779B9
    return _mixed(((low + high) & _LOW) ^ (key >> 32 & _LOW))


@round_to_bfloat16.kernel("default")
def _(A, key, offset, out):
    values, rounded = A.reshape(-1), out.view(-1)
    for start in range(0, values.numel(), _CHUNK):
        chunk = values[start : start + _CHUNK]
        index = torch.arange(offset + start, offset + start + chunk.numel(), device=A.device)
        bits = chunk.view(torch.int32)
        raised = (bits.long() & _LOW) + (random_bits(key, index) & 0xFFFF)
        kept = (raised >> 16).to(torch.int16).view(torch.bfloat16)
        rounded[start : start + _CHUNK] = torch.where(chunk.isfinite(), kept, chunk.to(torch.bfloat16))
