"""The library as built for another processor, called through an emulator: a native library by its functions.

While there is such a library, tensors that say where their memory is are noted; what the arguments point to is looked
up there, and travels to the other process and back.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import torch

from bitsandbytes import _native
from bitsandbytes._native.abi import Prototype

__all__ = ["EmulatedLibrary", "find_neon"]

FOLDER = Path(__file__).parents[1] / "build" / "neon"


def find_neon() -> list[str] | None:
    """The command that serves the library for ARM, if ``make neon`` has built it and an emulator is installed."""
    files = [FOLDER / "emulated_server", FOLDER / "libbitsandbytes_cpu.so"]
    emulator = shutil.which("qemu-aarch64")
    if emulator is None or not all(file.exists() for file in files):
        return None
    return [emulator, "-L", os.environ.get("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu"), *map(str, files)]


class EmulatedLibrary:
    """Calls to ``command``'s library; no function of it may keep a pointer."""

    def __init__(self, command: list[str], isa: str) -> None:
        _MEMORY.watch()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "BNB_CPU_ISA": isa},
        )

    def close(self) -> None:
        _MEMORY.forget()
        self._process.stdin.close()
        self._process.wait(60)

    def __getattr__(self, name: str) -> Any:
        prototype = _native.ABI.prototypes[name]
        return lambda *arguments: self._call(name, prototype, arguments)

    def _call(self, name: str, prototype: Prototype, arguments: tuple) -> Any:
        # A pointer argument takes bytes too; as tensors they are found like the others.
        structs = [
            torch.frombuffer(bytearray(a), dtype=torch.uint8) for a in arguments if isinstance(a, bytes)
        ]
        starts_of_structs = iter([held.data_ptr() for held in structs])
        arguments = tuple(next(starts_of_structs) if isinstance(a, bytes) else a for a in arguments)
        pointers = [
            _is_pointer(kind) and bool(value)
            for kind, value in zip(prototype.argtypes, arguments, strict=True)
        ]
        regions = _MEMORY.regions(
            [value for value, points in zip(arguments, pointers, strict=True) if points]
        )
        starts = list(regions)
        request = [_integers(len(name)), name.encode(), _integers(len(starts))]
        for start in starts:
            request += [_integers(regions[start], start % 64), ctypes.string_at(start, regions[start])]
        real, integers = 0.0, []
        for kind, value, points in zip(prototype.argtypes, arguments, pointers, strict=True):
            if kind is ctypes.c_float:
                real = value
            elif points:
                start = next(start for start in starts if start <= value < start + regions[start])
                integers.append((starts.index(start), value - start))
            else:
                integers.append((-1, int(value or 0)))
        text = prototype.restype is ctypes.c_char_p
        request += [_integers(len(integers)), *(_integers(*pair) for pair in integers)]
        request += [struct.pack("<f", real), _integers(text)]
        self._process.stdin.write(b"".join(request))
        self._process.stdin.flush()

        result, length = struct.unpack("<qq", self._read(16))
        answer = self._read(length)
        for start in starts:
            ctypes.memmove(start, self._read(regions[start]), regions[start])
        if prototype.returns_status:
            assert result & 0xFFFFFFFF == 0, f"{name} failed with status {result & 0xFFFFFFFF}"
        return answer if text else result

    def _read(self, count: int) -> bytes:
        found = self._process.stdout.read(count)
        assert len(found) == count, f"the emulated library has died ({self._process.wait(60)})"
        return found


def _is_pointer(kind: Any) -> bool:
    return kind is ctypes.c_void_p or (isinstance(kind, type) and issubclass(kind, ctypes._Pointer))


class _Memory:
    """Which storage each address lies in that a tensor gave out: the last one to have it, for memory is used again."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[int, int]] = {}  # address -> start and bytes of its storage
        self._data_ptr = torch.Tensor.data_ptr

    def watch(self) -> None:
        def data_ptr(tensor: torch.Tensor) -> int:
            address = self._data_ptr(tensor)
            if address and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._storages[address] = storage.data_ptr(), storage.nbytes()
            return address

        torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign,assignment]

    def forget(self) -> None:
        torch.Tensor.data_ptr = self._data_ptr  # type: ignore[method-assign]
        self._storages.clear()

    def regions(self, pointers: list[int]) -> dict[int, int]:
        """Start and bytes of the memory that each pointer lies in."""
        missing = [pointer for pointer in pointers if pointer not in self._storages]
        assert not missing, f"pointers that no tensor gave out: {missing}"
        return dict(self._storages[pointer] for pointer in pointers)


_MEMORY = _Memory()


def _integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)
