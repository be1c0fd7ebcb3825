"""Between torch and the C ABI: pointers, streams, the device guard, and ABI ids of dtypes, formats and rules."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from .abi import Abi

__all__ = [
    "are_on_current_gpu",
    "device_of",
    "dtype_ids",
    "get_ptr",
    "has_room_for_maps",
    "is_on_gpu",
    "named_ids",
    "ptr",
    "stream_of",
    "sync_gpu",
    "threads",
]


def dtype_ids(abi: Abi | None) -> dict[torch.dtype, IntEnum]:
    """torch dtype -> bnb_dtype; empty without a library."""
    return {} if abi is None else {getattr(torch, m.name.lower()): m for m in abi.enums["bnb_dtype"]}


def named_ids(abi: Abi | None, enum: str) -> dict[str, IntEnum]:
    """Lower-case member name -> member, as formats and optimizer rules are named in Python; empty without a library."""
    return {} if abi is None or enum not in abi.enums else {m.name.lower(): m for m in abi.enums[enum]}


def ptr(tensor: Tensor | None) -> int | None:
    """Address of the first element, as the argtypes of native functions take it."""
    return None if tensor is None else tensor.data_ptr()


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:
    """Address of the first element as ``c_void_p``; None for None."""
    return None if A is None else ctypes.c_void_p(A.data_ptr())


def threads() -> int:
    """How many threads a CPU kernel may use: torch's setting."""
    return torch.get_num_threads()


def stream_of(tensor: Tensor) -> int:
    """Raw handle of the current stream of the tensor's CUDA device."""
    return torch._C._cuda_getCurrentRawStream(tensor.device.index)


def _get_tensor_stream(tensor: Tensor) -> ctypes.c_void_p:
    """Raw current stream of the tensor's device; for a CPU (paged) tensor, of the current accelerator."""
    kind, index = tensor.device.type, tensor.device.index
    if kind == "cpu":
        if hasattr(torch, "xpu") and torch.xpu.is_available():
            kind, index = "xpu", torch.xpu.current_device()
        elif torch.cuda.is_available():
            kind, index = "cuda", torch.cuda.current_device()
    if kind == "xpu":
        return ctypes.c_void_p(torch._C._xpu_getCurrentRawStream(index))
    if kind == "cuda":
        return ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(index))
    return ctypes.c_void_p(None)


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's CUDA device current; free when it already is."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@lru_cache(maxsize=1)
def _has_several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def are_on_current_gpu(index: int, tensors: Iterable[Tensor | None]) -> bool:
    """Whether CUDA device ``index`` is current and holds all these, each of which is on some CUDA device."""
    if index != torch._C._cuda_getDevice():
        return False
    return not _has_several_gpus() or all(x is None or x.get_device() == index for x in tensors)


def _cuda_device_of(tensor: Tensor) -> AbstractContextManager:
    """Select the tensor's device; a null context where there is at most one CUDA device."""
    return device_of(tensor) if torch.cuda.device_count() > 1 else nullcontext()


def has_room_for_maps(device: torch.device, maps: int) -> bool:
    """Whether the kernels' look-up tables of so many maps, of 32 KiB each and as much again, fit a GPU's shared memory.

    Two take 96 KiB, which GPUs have from compute capability 8.0 on; one fits all.
    """
    return device.type != "cuda" or maps < 2 or torch.cuda.get_device_capability(device) >= (8, 0)


def is_on_gpu(tensors: Iterable[Tensor | None]) -> bool:
    """True if all tensors can meet in one kernel; None and paged tensors count as anywhere.

    Raises:
        RuntimeError: CPU and accelerator are mixed, or two accelerators.
    """
    given = [t for t in tensors if t is not None and not getattr(t, "is_paged", False)]
    if len({t.device.type == "cpu" for t in given}) > 1:
        raise RuntimeError(
            "All input tensors need to be on the same device, but found some on the CPU and some not:\n"
            f"{[(tuple(t.shape), t.device) for t in given]}"
        )
    if len({t.device for t in given}) > 1:
        raise RuntimeError(
            "Input tensors need to be on the same GPU, but found several:\n"
            f"{[(tuple(t.shape), t.device) for t in given]}"
        )
    return True


def sync_gpu(t: Tensor) -> None:
    """Wait for the tensor's CUDA or XPU device; nothing to wait for elsewhere."""
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)
    elif t.device.type == "xpu":
        torch.xpu.synchronize(t.device)
