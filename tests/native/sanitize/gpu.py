"""The CUDA library and a GPU, by ctypes alone.

No framework starts under the sanitizer, and none pools memory: every array is an allocation of the driver of exactly
its size, so that memcheck sees the first byte beyond it. Types of arguments come from bnb.h, as in the package.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
CUDA_FUNCTIONS = "bnb_cuda_"
_POISON = 0xFF  # NaN in every float type
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76  # CU_DEVICE_ATTRIBUTE_*


class GpuError(RuntimeError):
    """The driver failed; it may have nothing to do with the call that it says so of, and nothing works after it."""


def _parser() -> Any:
    """abi.py of the package, without the package, which needs torch."""
    spec = importlib.util.spec_from_file_location("abi", ROOT / "bitsandbytes" / "_native" / "abi.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Buffer:
    """An array on the GPU."""

    def __init__(self, gpu: Gpu, address: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.gpu, self.address, self.shape, self.dtype = gpu, address, shape, dtype

    def get(self) -> np.ndarray:
        """Its content, once all calls are done."""
        array = np.empty(self.shape, self.dtype)
        self.gpu.synchronize()
        if array.nbytes:
            self.gpu.driver(
                "cuMemcpyDtoH_v2",
                ctypes.c_void_p(array.ctypes.data),
                ctypes.c_uint64(self.address),
                ctypes.c_size_t(array.nbytes),
            )
        return array


class Gpu:
    """The first GPU, a stream of it, and the library.

    ``poison`` fills what a call shall write with NaN. Without it, initcheck sees who reads what nobody wrote.
    """

    def __init__(self, library: Path, poison: bool = True) -> None:
        self.poison = poison
        self.calls: Counter[str] = Counter()
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._allocated: list[int] = []
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.driver("cuInit", 0)
        self.driver("cuDeviceGet", ctypes.byref(device), 0)
        self.driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.driver("cuCtxSetCurrent", context)
        self.driver(
            "cuStreamCreate", ctypes.byref(stream), 0
        )  # it waits for copies, which use the default stream
        self.stream = stream.value
        self.multiprocessors = self._attribute(_MULTIPROCESSORS, device)
        self.capability = 10 * self._attribute(_MAJOR, device) + self._attribute(_MINOR, device)

        parser = _parser()
        self.abi = parser.parse_header(library.parent / "bnb.h")
        native = ctypes.CDLL(str(library))
        check = parser.error_check(native, self.abi.enums["bnb_status"])
        self._functions = {
            name: self.abi.bind(getattr(native, name), name, check)
            for name in self.abi.prototypes
            if name.startswith(CUDA_FUNCTIONS) or name == "bnb_codebook"
        }

    def driver(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            raise GpuError(f"{name}: CUDA error {status}")

    def _attribute(self, attribute: int, device: ctypes.c_int) -> int:
        value = ctypes.c_int()
        self.driver("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return value.value

    def synchronize(self) -> None:
        self.driver("cuCtxSynchronize")

    def constant(self, enum: str, name: str) -> int:
        """``constant("dtype", "float16")`` is BNB_DTYPE_FLOAT16."""
        return int(self.abi.enums[f"bnb_{enum}"][name.upper()])

    def call(self, name: str, **given: Any) -> Any:
        """Call a function by the names of its parameters, and wait for it; those that are not given are null."""
        prototype = self.abi.prototypes[name]
        unknown = given.keys() - set(prototype.argnames)
        assert not unknown, f"{name} has no parameter {sorted(unknown)}"
        given.setdefault("stream", self.stream)
        arguments = [given.get(parameter) for parameter in prototype.argnames]
        result = self._functions[name](
            *(argument.address if isinstance(argument, Buffer) else argument for argument in arguments)
        )
        self.calls[name] += 1
        if "stream" in prototype.argnames:
            self.synchronize()
        return result

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype, shift: int) -> Buffer:
        size = int(np.prod(shape)) * dtype.itemsize
        if size == 0:
            return Buffer(self, 0, shape, dtype)
        memory, lead = ctypes.c_uint64(), shift * dtype.itemsize
        self.driver("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(lead + size))
        self._allocated.append(memory.value)
        return Buffer(self, memory.value + lead, shape, dtype)

    def put(self, array: np.ndarray, shift: SupportsInt = 0) -> Buffer:
        """A copy on the GPU, ``shift`` elements after an address that is aligned to anything."""
        array = np.ascontiguousarray(array)
        buffer = self._allocate(array.shape, array.dtype, int(shift))
        if array.nbytes:
            self.driver(
                "cuMemcpyHtoD_v2",
                ctypes.c_uint64(buffer.address),
                ctypes.c_void_p(array.ctypes.data),
                ctypes.c_size_t(array.nbytes),
            )
        return buffer

    def room(self, shape: int | tuple[int, ...], dtype: Any, shift: SupportsInt = 0) -> Buffer:
        """Memory for a result."""
        shape = shape if isinstance(shape, tuple) else (shape,)
        buffer = self._allocate(shape, np.dtype(dtype), int(shift))
        size = int(np.prod(shape)) * buffer.dtype.itemsize
        if size and self.poison:
            self.driver(
                "cuMemsetD8_v2",
                ctypes.c_uint64(buffer.address),
                ctypes.c_ubyte(_POISON),
                ctypes.c_size_t(size),
            )
        return buffer

    def free_all(self) -> None:
        while self._allocated:
            self.driver("cuMemFree_v2", ctypes.c_uint64(self._allocated.pop()))

    def codebook(self, form: str) -> np.ndarray:
        """The sixteen values of a 4-bit format."""
        values, thresholds = np.empty(16, np.float32), np.empty(15, np.float32)
        self._functions["bnb_codebook"](
            self.constant("format", form), values.ctypes.data, thresholds.ctypes.data
        )
        return values
