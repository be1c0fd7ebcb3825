"""Products of grouped rows with a stack of 4-bit weights, one weight for each expert; part of ``_ops.py``.

Rows are sorted by expert, and ``offsets [E]`` (int32) says where those of each expert end, as torch's grouped matmul has
it: rows ``offsets[e - 1]`` to ``offsets[e]`` belong to expert e. Rows at or past ``offsets[-1]`` belong to none, and their
results are zero. Blocks run over the flattened stack, so an expert must be a whole number of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import (
    ArgumentError,
    check_block_scales,
    check_blocksize,
    check_dtype,
    check_float,
    check_format,
    check_packed,
    check_same_device,
    check_storage,
)
from ._operator import Result, operator

__all__ = ["gemm_4bit_grouped", "gemm_4bit_grouped_transposed"]


def _check_grouped(A: Tensor, B: Tensor, shapeB, blocksize, quant_type, offsets: Tensor, inner: int) -> None:
    """``inner`` is the dimension of ``shapeB`` that A's columns go along."""
    if len(shapeB) != 3:
        raise ArgumentError(f"shapeB must be 3D [E, N, K], got {list(shapeB)}")
    E, N, K = shapeB
    if A.dim() != 2 or A.shape[1] != shapeB[inner]:
        raise ArgumentError(
            f"A must be 2D with {shapeB[inner]} columns for shapeB {list(shapeB)}, got shape {list(A.shape)}"
        )
    check_float(A.dtype, "A must be float16, bfloat16, or float32: a 4-bit matmul")
    check_storage(B.dtype, "B's dtype")
    check_blocksize(blocksize)
    check_format(quant_type)
    if N * K % blocksize != 0:
        raise ArgumentError(
            f"an expert must be a whole number of blocks: N * K = {N} * {K} is no multiple of blocksize {blocksize}"
        )
    check_packed(B, E * N * K, "B")
    check_dtype(offsets, torch.int32, "offsets")
    if offsets.dim() != 1 or offsets.shape[0] != E:
        raise ArgumentError(
            f"offsets must be 1D with one end for each of the {E} experts, got shape {list(offsets.shape)}"
        )


@operator(
    "gemm_4bit_grouped(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "Tensor offsets, Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, "
    "Tensor? absmax_offset=None) -> Tensor"
)
def gemm_4bit_grouped(
    A: Tensor,
    B: Tensor,
    shapeB,
    absmax: Tensor,
    blocksize,
    quant_type,
    offsets: Tensor,
    bias=None,
    absmax_8bit=None,
    absmax_code=None,
    absmax_offset=None,
):
    """``A[r] @ W[e].T + bias[e]`` for the rows r of each expert e; ``A [R, K]``, ``W [E, N, K]``, ``bias [E, N]``.

    Statistics as in ``gemm_4bit``, of the whole stack. Offsets that decrease or exceed R are a ValueError where they
    are read on the host; a GPU cannot say, and takes no row that is not there.
    """
    _check_grouped(A, B, shapeB, blocksize, quant_type, offsets, 2)
    nested = {"absmax_8bit": absmax_8bit, "absmax_code": absmax_code, "absmax_offset": absmax_offset}
    check_same_device(A, B=B, absmax=absmax, offsets=offsets, bias=bias, **nested)
    E, N, K = shapeB
    check_block_scales(E * N * K, blocksize, absmax, **nested)
    if bias is not None:
        if tuple(bias.shape) != (E, N):
            raise ArgumentError(f"bias must be [E, N] = [{E}, {N}], got {list(bias.shape)}")
        if bias.dtype != A.dtype:
            raise ArgumentError(f"bias dtype ({bias.dtype}) must match A's dtype ({A.dtype})")
    return Result((A.shape[0], N), A.dtype)


@operator(
    "gemm_4bit_grouped_transposed(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "Tensor offsets, Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor"
)
def gemm_4bit_grouped_transposed(
    A: Tensor,
    B: Tensor,
    shapeB,
    absmax: Tensor,
    blocksize,
    quant_type,
    offsets: Tensor,
    absmax_8bit=None,
    absmax_code=None,
    absmax_offset=None,
):
    """``A[r] @ W[e]`` for ``A [R, N]``: the gradient of what :func:`gemm_4bit_grouped` multiplied, ``[R, K]``."""
    _check_grouped(A, B, shapeB, blocksize, quant_type, offsets, 1)
    nested = {"absmax_8bit": absmax_8bit, "absmax_code": absmax_code, "absmax_offset": absmax_offset}
    check_same_device(A, B=B, absmax=absmax, offsets=offsets, **nested)
    E, N, K = shapeB
    check_block_scales(E * N * K, blocksize, absmax, **nested)
    return Result((A.shape[0], K), A.dtype)
