"""The formats: which there are, their block sizes and storage types. Checks, backends and tests iterate over this."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .codebooks import FP4, NF4

__all__ = [
    "BLOCKSIZES",
    "DEFAULT_BLOCKSIZE",
    "FLOAT_DTYPES",
    "FORMATS",
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "NESTED_BLOCKSIZE",
    "OPTIMIZER_4BIT_BLOCKSIZE",
    "OPTIMIZER_BLOCKSIZE",
    "STORAGE_DTYPES",
    "FourBitFormat",
]


@dataclass(frozen=True)
class FourBitFormat:
    """A 4-bit format weights can be quantized to: its name in checkpoints and its values in the order of codes."""

    name: str
    values: tuple[float, ...]


FORMATS = {"fp4": FourBitFormat("fp4", FP4), "nf4": FourBitFormat("nf4", NF4)}

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # values that share one absmax in a 4-bit format
DEFAULT_BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256  # absmax values that share one second-level absmax
OPTIMIZER_BLOCKSIZE = 256  # elements of an 8-bit optimizer state that share one absmax
OPTIMIZER_4BIT_BLOCKSIZE = 128

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STORAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)

# How a checkpoint may name the memory order of an int8 weight; only "row" is computed with.
LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {
    number: name for name, number in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()
}
