"""Tensors in CUDA managed memory: they look like CPU tensors, and their pages migrate to whoever touches them.

Optimizer state kept there may exceed the GPU's memory. The memory belongs to the tensor's storage and is freed with
it, by reference counting alone. Without a GPU library every function here raises RuntimeError when called.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = ["FIRST_CUDA_DEVICE", "CUBLAS_Context", "GlobalPageManager", "get_paged", "prefetch_tensor"]

FIRST_CUDA_DEVICE = torch.device("cuda", 0)
_HOST = -1


def _library() -> Any:
    from . import lib  # at call time: tests replace it

    return lib


def _free(address: int) -> None:
    _library().bnb_cuda_managed_free(address)


def get_paged(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device = FIRST_CUDA_DEVICE
) -> Tensor:
    """An uninitialised tensor in managed memory that prefers ``device``.

    Raises:
        RuntimeError: there is no GPU library, or no memory.
    """
    device = torch.device(device)
    count = math.prod(shape)
    size = count * dtype.itemsize
    memory = ctypes.c_void_p()
    with torch.cuda.device(device) if torch.cuda.is_available() else _no_device():
        _library().bnb_cuda_managed_alloc(ctypes.byref(memory), max(size, 1))
    address = memory.value or 0
    buffer = (ctypes.c_uint8 * max(size, 1)).from_address(address)
    # torch.frombuffer keeps the buffer object alive as long as the storage. At interpreter exit the driver cleans up.
    weakref.finalize(buffer, _free, address).atexit = False
    tensor = torch.frombuffer(buffer, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
    tensor = tensor.view(shape)
    tensor.is_paged = True  # type: ignore[attr-defined]
    tensor.page_deviceid = device.index or 0  # type: ignore[attr-defined]
    return tensor


class _no_device:
    """Stands in for the device guard where there is no CUDA: the native call itself then explains."""

    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Start moving a paged tensor's pages to its device, or to the host.

    Raises:
        AssertionError: the tensor is not paged.
    """
    assert A.is_paged, "Only paged tensors can be prefetched!"  # type: ignore[attr-defined]
    device = _HOST if to_cpu else A.page_deviceid  # type: ignore[attr-defined]
    stream = torch.cuda.current_stream(A.page_deviceid).cuda_stream if torch.cuda.is_available() else None  # type: ignore[attr-defined]
    _library().bnb_cuda_managed_prefetch(A.data_ptr(), A.nbytes, device, stream)


class GlobalPageManager:
    """All paged tensors of the process, so that they can be prefetched together."""

    _instance: GlobalPageManager | None = None
    paged_tensors: list[Tensor]

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Forget all tensors."""
        self.paged_tensors = []
        self._registered: list[weakref.ref[Tensor]] = []

    @classmethod
    def get_instance(cls) -> GlobalPageManager:
        """The one manager of the process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def register(self, tensor: Tensor) -> None:
        """Include a tensor in :meth:`prefetch_all` for as long as its owner keeps it.

        ``paged_tensors`` is the plain list that users fill; what is in there stays alive.
        """
        self._registered = [ref for ref in self._registered if ref() is not None]
        self._registered.append(weakref.ref(tensor))

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """Prefetch every tensor, the last added first: the first added are needed first and must not be evicted."""
        registered = [tensor for ref in self._registered if (tensor := ref()) is not None]
        for tensor in reversed([*registered, *self.paged_tensors]):
            prefetch_tensor(tensor, to_cpu)


class CUBLAS_Context:
    """Opaque per-device handles that earlier C functions took as their first argument."""

    _instance: CUBLAS_Context | None = None
    context: dict[int, ctypes.c_void_p]

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Forget all handles."""
        self.context = {}

    @classmethod
    def get_instance(cls) -> CUBLAS_Context:
        """The one table of handles of the process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def get_context(self, device: torch.device) -> ctypes.c_void_p:
        """The handle of a device, made while that device is current."""
        index = device.index if device.index is not None else torch.cuda.current_device()
        if index not in self.context:
            with torch.cuda.device(index):
                self.context[index] = ctypes.c_void_p(_library().get_context())
        return self.context[index]
