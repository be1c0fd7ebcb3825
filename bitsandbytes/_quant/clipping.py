"""Scales that fit: clip each block's outliers where that lowers the error of the whole block.

A block's scale is its largest magnitude, so one outlier coarsens every other value. Clipping it first costs that value
and helps the rest; the file format, the codes and every loader stay what they are. The search is plain: each ratio of
the largest magnitude is tried with the quantizer itself, and the least sum of squared errors wins (the weight clipping
of post-training quantization, as in Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["clip_to_fit"]

_RATIOS = [1.0 - 0.04 * step for step in range(1, 13)]  # below about a half no block of weights gains
_RUN_ELEMENTS = 1 << 17  # searched together: what is tried stays in the cache; a multiple of every block size


def clip_to_fit(A: Tensor, blocksize: int, quant_type: str) -> Tensor:
    """``A`` with each block clipped to the share of its largest magnitude that quantizes best.

    ``A`` is float16, bfloat16 or float32 of any shape; blocks run over the flattened tensor as in ``quantize_4bit``,
    whose result on what is returned never has a larger squared error than on ``A``. Blocks with NaN or infinite values
    stay as they are.
    """
    values = A.reshape(-1)
    clipped = torch.empty_like(values)
    for start in range(0, values.numel(), _RUN_ELEMENTS):
        run = values[start : start + _RUN_ELEMENTS]
        blocks = run.new_zeros(-(run.numel() // -blocksize), blocksize)
        blocks.view(-1)[: run.numel()] = run
        clipped[start : start + run.numel()] = _clip_blocks(blocks, quant_type).view(-1)[: run.numel()]
    return clipped.view(A.shape)


def _clip_blocks(blocks: Tensor, quant_type: str) -> Tensor:
    largest = blocks.abs().amax(1, keepdim=True)
    best, least = blocks, _errors(blocks, blocks, quant_type)
    for ratio in _RATIOS:
        limit = largest * ratio
        clipped = torch.minimum(torch.maximum(blocks, -limit), limit)
        errors = _errors(clipped, blocks, quant_type)
        better = errors < least  # false for NaN
        best, least = torch.where(better, clipped, best), torch.where(better, errors, least)
    return best


def _errors(clipped: Tensor, blocks: Tensor, quant_type: str) -> Tensor:
    """``[blocks, 1]`` float32 sums of squares: what quantizing ``clipped`` loses of ``blocks``."""
    blocksize = blocks.shape[1]
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit(clipped, blocksize, quant_type, torch.uint8)
    decoded = torch.ops.bitsandbytes.dequantize_4bit(
        codes, absmax, blocksize, quant_type, blocks.shape, torch.float32
    )
    return (decoded - blocks).square_().sum(1, keepdim=True)
