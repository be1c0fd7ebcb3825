"""Look-ups in quantized tables in plain torch: the rows asked for are decoded, never the table."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._formats.codebooks import get_4bit_type
from ..._formats.packing import as_bytes
from ..._ops import embedding_4bit, embedding_8bit

__all__: list[str] = []


def _check_indices(indices: Tensor, rows: int) -> None:
    """As torch's own look-up does, on the CPU; other devices cannot say without waiting for the data."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = indices.aminmax()
        if low < 0 or high >= rows:
            wrong = int(low if low < 0 else high)
            raise IndexError(f"index {wrong} is out of range for a table of {rows} rows")


@embedding_4bit.kernel("default")
def _(indices, A, absmax, blocksize, quant_type, num_embeddings, embedding_dim, dtype, out):
    _check_indices(indices, num_embeddings)
    columns = torch.arange(embedding_dim, device=A.device)
    positions = indices.long().unsqueeze(-1) * embedding_dim + columns
    both = as_bytes(A).view(-1)[positions >> 1].int()
    nibbles = torch.where(positions % 2 == 0, both >> 4, both & 0xF)
    values = get_4bit_type(quant_type, A.device)[nibbles]
    out.copy_(values * absmax.reshape(-1)[positions // blocksize])


@embedding_8bit.kernel("default")
def _(indices, A, absmax, dtype, out):
    _check_indices(indices, A.shape[0])
    # Multiplied, not divided: devices divide by a constant in different ways.
    scale = F.embedding(indices, absmax.view(-1, 1)) * (1.0 / 127.0)
    out.copy_(F.embedding(indices, A) * scale)
