"""Argument checks that operators share. Each names the argument, what came and what is allowed.

They run inside operators, hence also under tracing: comparisons of sizes may involve symbolic integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._formats.table import BLOCKSIZES, FLOAT_DTYPES, FORMATS, NESTED_BLOCKSIZE, STORAGE_DTYPES

__all__ = [
    "ArgumentError",
    "check_absmax",
    "check_block_scales",
    "check_blocksize",
    "check_dtype",
    "check_float",
    "check_format",
    "check_map",
    "check_packed",
    "check_positive_blocksize",
    "check_same_device",
    "check_storage",
    "require",
]


class ArgumentError(ValueError, RuntimeError):
    """A bad argument. A ``ValueError`` by nature; also the ``RuntimeError`` that torch's operators raise."""


def require(condition: bool, message: str) -> None:
    """Raise an :class:`ArgumentError` unless ``condition`` holds. For conditions whose message costs nothing."""
    if not condition:
        raise ArgumentError(message)


def check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ArgumentError(f"invalid blocksize {blocksize}: must be one of {list(BLOCKSIZES)}")


def check_positive_blocksize(blocksize: int) -> None:
    if blocksize <= 0:
        raise ArgumentError(f"blocksize must be positive, got {blocksize}")


def check_format(quant_type: str) -> None:
    if quant_type not in FORMATS:
        raise ArgumentError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")


def check_float(dtype: torch.dtype, what: str) -> None:
    if dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"{what} only supports 16/32-bit floats, but got {dtype}")


def check_storage(dtype: torch.dtype, name: str) -> None:
    if dtype not in STORAGE_DTYPES:
        raise ArgumentError(f"{name} must be one of uint8, float16, bfloat16, float32, got {dtype}")


def check_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.dtype is not dtype:
        raise ArgumentError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")


def check_same_device(reference: Tensor, name: str = "A", /, **tensors: Tensor | None) -> None:
    """Every given tensor must be where ``reference``, the argument ``name``, is. Paged memory is everywhere."""
    on_cpu = reference.is_cpu
    for argument, tensor in tensors.items():
        if tensor is None or (on_cpu and tensor.is_cpu):  # an attribute is quicker than a device object
            continue
        if tensor.device != reference.device and not getattr(tensor, "is_paged", False):
            raise ArgumentError(
                f"{argument} must be on the same device as {name} ({reference.device}), got {tensor.device}"
            )


def check_absmax(absmax: Tensor, numel: int, blocksize: int) -> None:
    """``absmax`` must be float32 and have a value for each block of ``numel`` elements."""
    check_dtype(absmax, torch.float32, "absmax")
    blocks = -(numel // -blocksize)
    if absmax.numel() < blocks:
        raise ArgumentError(
            f"absmax must have at least {blocks} values ({numel} elements in blocks of {blocksize}), "
            f"got {absmax.numel()}"
        )


def check_packed(packed: Tensor, numel: int, name: str) -> None:
    """``packed`` must hold half a byte for each of ``numel`` elements, in any storage dtype."""
    held = packed.numel() * packed.element_size()  # nbytes does not know symbolic sizes
    if held < (numel + 1) // 2:
        raise ArgumentError(
            f"{name} must hold at least {(numel + 1) // 2} bytes for {numel} 4-bit values, got {held}"
        )


def check_map(code: Tensor, name: str, entries: int = 256) -> None:
    check_dtype(code, torch.float32, name)
    if code.numel() != entries:
        raise ArgumentError(f"{name} must have {entries} entries, got {code.numel()}")


def check_block_scales(
    numel: int,
    blocksize: int,
    absmax: Tensor,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
) -> None:
    """One scale a block; or a code a block, an absmax for every 256 codes, their map and an offset."""
    if absmax_8bit is None:
        check_absmax(absmax, numel, blocksize)
        return
    check_dtype(absmax_8bit, torch.uint8, "absmax_8bit")
    blocks = -(numel // -blocksize)
    if absmax_8bit.dim() != 1 or absmax_8bit.numel() < blocks:
        raise ArgumentError(
            f"absmax_8bit must be 1D with at least {blocks} values, got shape {tuple(absmax_8bit.shape)}"
        )
    if absmax_code is None or absmax_offset is None:
        missing = "absmax_code" if absmax_code is None else "absmax_offset"
        raise ArgumentError(f"{missing} required when absmax_8bit is provided")
    check_map(absmax_code, "absmax_code")
    if absmax_offset.numel() != 1:
        raise ArgumentError(f"absmax_offset must be 0-dim (one value), got {absmax_offset.numel()}")
    check_absmax(absmax, blocks, NESTED_BLOCKSIZE)
