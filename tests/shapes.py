"""The partitions worth testing: tails, odd sizes, one block, many; and layouts that are not contiguous.

Tests and benchmarks draw from the same lists, so that what is timed is also checked.
"""

from __future__ import annotations

import torch

__all__ = [
    "LAYER_SHAPES",
    "LAYOUTS",
    "MATMUL_SHAPES",
    "TENSOR_SHAPES",
    "block_edges",
    "in_layout",
]

# Tensors whose rows do not line up with blocks, whose size is odd, or which have one element, row or block.
TENSOR_SHAPES = [
    (1,),
    (13,),
    (64,),
    (2, 50),
    (6, 64),
    (7, 33),
    (7, 96),
    (3, 5, 7),
    (4, 64, 32),
    (9, 65),
    (300, 400),
]

# (M, N, K) of small matmuls: one row, few rows, K that is no multiple of a block, odd everything.
MATMUL_SHAPES = [(1, 1, 2), (1, 64, 64), (1, 96, 160), (3, 33, 64), (5, 48, 100), (17, 31, 65), (64, 96, 128)]

# (N, K) of real layers: the projections of a 22M sentence encoder, a 1B, a 7B and an 8B language model.
LAYER_SHAPES = [
    (384, 384),
    (1536, 384),
    (2048, 2048),
    (8192, 2048),
    (4096, 4096),
    (11008, 4096),
    (14336, 4096),
]


def block_edges(blocksize: int) -> list[int]:
    """Element counts around one block and several: a lone value, a tail of one, a tail one short, odd and even."""
    return [1, 2, blocksize - 1, blocksize, blocksize + 1, 2 * blocksize, 3 * blocksize + 7]


def _transposed(values: torch.Tensor) -> torch.Tensor:
    return values.transpose(0, -1).contiguous().transpose(0, -1)


def _strided(values: torch.Tensor) -> torch.Tensor:
    wide = values.new_zeros((*values.shape[:-1], 2 * values.shape[-1]))
    wide[..., ::2] = values
    return wide[..., ::2]


def _offset(values: torch.Tensor) -> torch.Tensor:
    held = values.new_zeros(values.numel() + 3)
    held[3:] = values.reshape(-1)
    return held[3:].view(values.shape)


def _row_gaps(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([values, torch.zeros_like(values)], dim=1)[:, 0]


# Ways to hold the same values in other strides.
LAYOUTS = {"transposed": _transposed, "strided": _strided, "offset": _offset, "row_gaps": _row_gaps}


def in_layout(name: str, values: torch.Tensor) -> torch.Tensor:
    """``values``, equal element by element, held in the named layout."""
    held = LAYOUTS[name](values)
    assert held.shape == values.shape
    return held
