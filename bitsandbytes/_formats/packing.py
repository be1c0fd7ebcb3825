"""Nibbles and bytes, and the private CPU tile layout that older releases stored.

Two codes share a byte: the even element is the high nibble. Blocks and rows are not padded; only an odd element
count leaves the last low nibble unused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .state import QuantState

__all__ = [
    "as_bytes",
    "convert_weight_packed_for_cpu",
    "convert_weight_packed_for_cpu_inverse",
    "pack_nibbles",
    "unpack_nibbles",
]

_TILE_ROWS = 32


def as_bytes(packed: Tensor) -> Tensor:
    """The bytes of a packed tensor of any storage dtype and orientation, as a flat uint8 tensor (a view if possible)."""
    return packed.contiguous().reshape(-1).view(torch.uint8)


def pack_nibbles(codes: Tensor, pad: int = 0) -> Tensor:
    """Pack a flat uint8 tensor of 4-bit codes into ``ceil(n / 2)`` bytes; ``pad`` fills the last nibble if n is odd."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), pad)])
    return (codes[0::2] << 4) | codes[1::2]


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` 4-bit codes of a packed tensor, as a flat uint8 tensor."""
    held = as_bytes(packed)[: (count + 1) // 2]
    return torch.stack((held >> 4, held & 0xF), dim=-1).reshape(-1)[:count]


def convert_weight_packed_for_cpu(
    qweight: Tensor, quant_state: QuantState, block_n: int = _TILE_ROWS
) -> tuple[Tensor, QuantState]:
    """Rearrange a packed ``[N, K]`` weight into tiles of ``block_n`` rows, for programs that ask for that layout.

    Returns ``(packed [N, K / 2] uint8, quant_state)``. Of the state, which is changed in place, ``absmax`` becomes
    bfloat16 ``[K / blocksize, N]``; what it was before is kept aside, so the inverse loses nothing. This library's own
    layers never use this layout.

    Raises:
        AssertionError: ``N`` is no multiple of ``block_n``, or ``K`` is odd or no multiple of the block size.
    """
    N, K = quant_state.shape
    blocksize = quant_state.blocksize
    assert N % block_n == 0, f"the number of rows must be a multiple of {block_n}, got {N}"
    assert K % 2 == 0 and K % blocksize == 0, (
        f"the row length must be an even multiple of {blocksize}, got {K}"
    )

    codes = unpack_nibbles(qweight, N * K).view(N // block_n, block_n, K // 2, 2)
    tiles = codes.permute(0, 2, 1, 3).reshape(N // block_n, K // 2, 2, block_n)
    packed = (tiles[:, :, 0] | (tiles[:, :, 1] << 4)).reshape(N, K // 2)

    absmax = quant_state.absmax
    if quant_state.nested:
        second = quant_state.state2
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(
            absmax, second.absmax, second.code, second.blocksize, torch.float32
        )
        absmax = absmax + quant_state.offset.float()

    quant_state.original_statistics = (quant_state.absmax, quant_state.offset, quant_state.state2)
    quant_state.original_storage_type = qweight.dtype
    quant_state.original_dtype = quant_state.dtype
    quant_state.original_nested = quant_state.nested
    quant_state.original_qshape = qweight.shape
    quant_state.packing_format_for_cpu = True
    quant_state.absmax = absmax.view(N, K // blocksize).t().contiguous().to(torch.bfloat16)
    quant_state.offset = quant_state.state2 = None
    quant_state.nested = False
    quant_state.dtype = torch.bfloat16
    return packed, quant_state


def convert_weight_packed_for_cpu_inverse(
    packed_weight: Tensor, quant_state: QuantState, block_n: int = _TILE_ROWS
) -> tuple[Tensor, QuantState]:
    """Undo :func:`convert_weight_packed_for_cpu` exactly: bytes, statistics, storage dtype and shape."""
    N, K = quant_state.shape
    tiles = as_bytes(packed_weight).view(N // block_n, K // 2, block_n)
    codes = torch.stack((tiles & 0xF, tiles >> 4), dim=2).reshape(N // block_n, K // 2, block_n, 2)
    codes = codes.permute(0, 2, 1, 3).reshape(-1)
    storage = getattr(quant_state, "original_storage_type", torch.uint8)
    qweight = pack_nibbles(codes).view(storage).view(quant_state.original_qshape)

    # States pickled by earlier releases kept no statistics aside: theirs are rebuilt from the bfloat16 ones.
    kept = getattr(quant_state, "original_statistics", None)
    if kept is None:
        kept = quant_state.absmax.t().contiguous().view(-1).float(), None, None
    quant_state.absmax, quant_state.offset, quant_state.state2 = kept
    quant_state.nested = quant_state.state2 is not None
    quant_state.dtype = quant_state.original_dtype
    for name in ("statistics", "storage_type", "dtype", "nested", "qshape"):
        quant_state.__dict__.pop(f"original_{name}", None)
    quant_state.packing_format_for_cpu = False
    return qweight, quant_state
