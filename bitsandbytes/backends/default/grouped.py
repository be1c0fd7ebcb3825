"""Grouped 4-bit products in plain torch: one expert after another, decoded into one buffer that all of them share.

No more than one decoded expert is ever held. Which rows are whose must be known on the host, so on a GPU this waits for
the device once and cannot be captured into a graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import ArgumentError
from ..._formats.packing import as_bytes
from ..._formats.table import NESTED_BLOCKSIZE
from ..._ops import gemm_4bit_grouped, gemm_4bit_grouped_transposed
from .ops import expanded, linear_into

__all__ = ["Stack", "rows_of_experts"]

_Nested = tuple[Tensor | None, Tensor | None, Tensor | None]


@cache
def _warn_of_one_by_one(device_type: str) -> None:
    warnings.warn(
        f"There is no grouped 4-bit kernel for {device_type} in this library: experts are multiplied one after another, "
        "and every product waits for the device to know which rows are whose",
        stacklevel=2,
    )


def rows_of_experts(offsets: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which.

    Raises:
        ValueError: ``offsets`` decrease, or exceed ``rows``.
    """
    if offsets.device.type != "cpu":
        _warn_of_one_by_one(offsets.device.type)
    ends = offsets.tolist()
    if ends != sorted(ends) or any(not 0 <= end <= rows for end in ends):
        raise ArgumentError(f"offsets must not decrease and lie between 0 and A's {rows} rows, got {ends}")
    starts = [0, *ends[:-1]]
    return (
        (expert, slice(start, end))
        for expert, (start, end) in enumerate(zip(starts, ends, strict=True))
        if start < end
    )


class Stack(NamedTuple):
    """A stacked 4-bit weight as flat tensors, from which experts are taken one by one without a copy."""

    packed: Tensor  # bytes
    absmax: Tensor
    nested: _Nested  # absmax_8bit, absmax_code and absmax_offset, or three times None
    numel: int  # of one expert; a multiple of the block size, hence even
    blocksize: int

    @classmethod
    def of(cls, B: Tensor, shapeB, absmax: Tensor, blocksize: int, nested: _Nested) -> Stack:
        absmax_8bit, code, offset = nested
        if absmax_8bit is not None:
            absmax_8bit = absmax_8bit.contiguous()
        numel = shapeB[1] * shapeB[2]
        return cls(as_bytes(B), absmax.reshape(-1), (absmax_8bit, code, offset), numel, blocksize)

    def bytes_of(self, expert: int) -> Tensor:
        count = self.numel // 2
        return self.packed[expert * count : (expert + 1) * count]

    def statistics_of(self, expert: int) -> tuple[Tensor, _Nested]:
        """The expert's absmax and nested statistics, which stay nested if it begins with one of their blocks."""
        blocks = self.numel // self.blocksize
        first, end = expert * blocks, (expert + 1) * blocks
        absmax_8bit, code, offset = self.nested
        if absmax_8bit is None or code is None or offset is None:
            return self.absmax[first:end], self.nested
        group, lead = divmod(first, NESTED_BLOCKSIZE)
        absmax = self.absmax[group : -(end // -NESTED_BLOCKSIZE)]
        codes = absmax_8bit[first - lead : end]
        if lead == 0:
            return absmax, (codes, code, offset)
        return expanded(absmax, codes, code, offset)[lead:], (None, None, None)

    def scales_of(self, expert: int) -> Tensor:
        """The expert's scales, one float32 for each block."""
        absmax, (absmax_8bit, code, offset) = self.statistics_of(expert)
        if absmax_8bit is None or code is None or offset is None:
            return absmax
        return expanded(absmax, absmax_8bit, code, offset)


def _decoded(
    A: Tensor, stack: Stack, shapeB, quant_type: str, offsets: Tensor
) -> Iterator[tuple[int, slice, Tensor]]:
    """Each expert that has rows, which, and its weight in A's dtype: valid until the next one."""
    weight = torch.empty(shapeB[1:], dtype=A.dtype, device=A.device)
    for expert, rows in rows_of_experts(offsets, A.shape[0]):
        torch.ops.bitsandbytes.dequantize_4bit.out(
            stack.bytes_of(expert),
            stack.scales_of(expert),
            stack.blocksize,
            quant_type,
            weight.shape,
            weight.dtype,
            weight,
        )
        yield expert, rows, weight


@gemm_4bit_grouped.kernel("default")
def _(
    A,
    B,
    shapeB,
    absmax,
    blocksize,
    quant_type,
    offsets,
    bias,
    absmax_8bit,
    absmax_code,
    absmax_offset,
    out,
):
    stack, end = Stack.of(B, shapeB, absmax, blocksize, (absmax_8bit, absmax_code, absmax_offset)), 0
    for expert, rows, weight in _decoded(A, stack, shapeB, quant_type, offsets):
        linear_into(A[rows], weight, None if bias is None else bias[expert], out[rows])
        end = rows.stop
    out[end:].zero_()


@gemm_4bit_grouped_transposed.kernel("default")
def _(
    A, B, shapeB, absmax, blocksize, quant_type, offsets, absmax_8bit, absmax_code, absmax_offset, out
):  # fmt: skip
    stack, end = Stack.of(B, shapeB, absmax, blocksize, (absmax_8bit, absmax_code, absmax_offset)), 0
    for _expert, rows, weight in _decoded(A, stack, shapeB, quant_type, offsets):
        linear_into(A[rows], weight.t(), None, out[rows])
        end = rows.stop
    out[end:].zero_()
