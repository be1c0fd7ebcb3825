"""Everything that touches the shared library: finding it, binding it, and handing tensors over.

``lib`` is the library or its stand-in; ``has_native(name)`` says whether a symbol is really there, which is what a
backend asks before it registers a kernel. The id tables are empty when there is no library.
"""

from __future__ import annotations

from .library import BNBNativeLibrary
from .loader import load
from .tensors import (
    are_on_current_gpu,
    device_of,
    dtype_ids,
    get_ptr,
    has_room_for_maps,
    is_on_gpu,
    named_ids,
    ptr,
    stream_of,
    sync_gpu,
    threads,
)

__all__ = [
    "ABI",
    "DTYPE_ID",
    "FORMAT_ID",
    "RULE_ID",
    "are_on_current_gpu",
    "device_of",
    "get_ptr",
    "has_avx512bf16",
    "has_native",
    "has_room_for_maps",
    "is_on_gpu",
    "lib",
    "ptr",
    "stream_of",
    "sync_gpu",
    "threads",
]

lib: BNBNativeLibrary = load()

# What bnb.h declares; None when nothing was loaded.
ABI = lib.__dict__.get("_abi")
DTYPE_ID = dtype_ids(ABI)
FORMAT_ID = named_ids(ABI, "bnb_format")
RULE_ID = named_ids(ABI, "bnb_rule")


def has_native(name: str) -> bool:
    """Whether the loaded library has this symbol."""
    return lib.has(name)


def has_avx512bf16() -> bool:
    """Whether this CPU has AVX512-BF16; False if the library does not say."""
    return bool(has_native("has_avx512bf16_cpu") and lib.has_avx512bf16_cpu())
