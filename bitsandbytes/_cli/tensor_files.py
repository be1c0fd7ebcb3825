"""Reading and writing tensor files piece by piece: safetensors both ways, PyTorch checkpoints for reading.

A model is larger than memory, so nothing here holds a file, nor even a tensor. Files are mapped, a caller reads
runs of elements, and ``release`` gives the pages back. The writer knows every shape before the first value, so each
tensor has its place and values go straight there.

A safetensors file is eight bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, begin
and end in the data), and the data. A file whose header is not yet written starts with eight zero bytes: no reader
takes it for whole.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import CliError

__all__ = ["CheckpointFile", "Entry", "PickleFile", "SafetensorsFile", "SafetensorsWriter", "nbytes_of"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # what the format's own reader allows
_ALIGNMENT = 8
_REOPEN_BYTES = 64 << 20  # a mapped PyTorch file is mapped anew after this much was read
_SCRATCH_BYTES = 4 << 20


class Entry(NamedTuple):
    """What a file says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def nbytes_of(entries: Iterable[Entry]) -> int:
    """Bytes of data all these tensors take."""
    return sum(entry.nbytes for entry in entries)


class CheckpointFile(Protocol):
    """A file of named tensors that is read in runs of elements."""

    path: Path
    entries: dict[str, Entry]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor; valid until the file is closed."""

    def release(self) -> None:
        """Give back the memory that reading took. Tensors read before stay valid."""

    def close(self) -> None: ...


class SafetensorsFile:
    """A mapped safetensors file.

    Raises:
        CliError: the file is missing, truncated, or its header is not one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._begins: dict[str, int] = {}
        self.metadata: dict[str, str] = {}
        try:
            with path.open("rb") as file:
                self._read_header(file, os.fstat(file.fileno()).st_size)
                # Copy-on-write: torch wants a writable buffer, and nothing must ever reach the file.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CliError(f"cannot read {path}: {error.strerror}") from error

    def _read_header(self, file: Any, size: int) -> None:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or not 0 < length <= min(size - _LENGTH_BYTES, _LARGEST_HEADER):
            raise CliError(
                f"{self.path} is damaged or truncated: {size} bytes, a header of {length} announced"
            )
        try:
            header = json.loads(file.read(length))
            self.metadata = header.pop("__metadata__", None) or {}
            for name, fields in header.items():
                self._add(name, fields, _LENGTH_BYTES + length, size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CliError(
                f"{self.path} is damaged: its header is no safetensors header ({error})"
            ) from error

    def _add(self, name: str, fields: Mapping[str, Any], data: int, size: int) -> None:
        dtype = DTYPES.get(fields["dtype"])
        if dtype is None:
            raise CliError(f"{self.path}: {name} has dtype {fields['dtype']}; known are {', '.join(DTYPES)}")
        entry = Entry(dtype, tuple(int(n) for n in fields["shape"]))
        begin, end = fields["data_offsets"]
        if begin < 0 or min(entry.shape, default=0) < 0 or end - begin != entry.nbytes:
            raise CliError(f"{self.path} is damaged: {name} does not have the bytes its shape needs")
        if data + end > size:
            raise CliError(f"{self.path} is truncated: {name} ends at byte {data + end}, the file at {size}")
        self.entries[name] = entry
        self._begins[name] = data + begin

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        entry = self.entries[name]
        dtype = entry.dtype
        stop = entry.numel if stop is None else stop
        if stop <= start:
            return torch.empty(0, dtype=dtype)
        offset = self._begins[name] + start * dtype.itemsize
        if offset % dtype.itemsize == 0:
            return torch.frombuffer(self._map, dtype=dtype, count=stop - start, offset=offset)
        nbytes = (stop - start) * dtype.itemsize
        return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=offset).clone().view(dtype)

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        with contextlib.suppress(
            BufferError
        ):  # a tensor still refers to the mapping, which then goes with it
            self._map.close()


class PickleFile:
    """A mapped file of ``torch.save``: a dict of tensors. Only tensors and plain containers are unpickled.

    torch offers no way to give pages back, so the mapping is dropped and made anew once enough was read.

    Raises:
        CliError: the file is missing or damaged, or holds anything but a dict of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, Tensor] = {}
        self._read_bytes = 0
        self._open()
        self.entries = {name: Entry(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def _open(self) -> None:
        try:
            with self.path.open("rb") as file:
                mappable = file.read(2) == b"PK"  # torch maps its zip files, not those of before 1.6
            loaded = torch.load(self.path, map_location="cpu", mmap=mappable, weights_only=True)
        except OSError as error:
            raise CliError(f"cannot read {self.path}: {error.strerror}") from error
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CliError(
                f"{self.path} is damaged or no PyTorch checkpoint of plain tensors: {reason}"
            ) from error
        if not isinstance(loaded, Mapping):
            raise CliError(f"{self.path} holds a {type(loaded).__name__}, expected a dict of tensors")
        self._tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}

    def same_memory(self) -> dict[str, str]:
        """Names whose tensor is, byte for byte, that of an earlier name: ``{later: earlier}``."""
        first: dict[tuple, str] = {}
        same = {}
        for name, tensor in self._tensors.items():
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tensor.numel() and first.setdefault(key, name) != name:
                same[name] = first[key]
        return same

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        run = self._tensors[name].detach().reshape(-1)[start:stop]
        self._read_bytes += run.numel() * run.element_size()
        return run

    def release(self) -> None:
        if self._read_bytes >= _REOPEN_BYTES:
            self._read_bytes = 0
            self._tensors = {}
            self._open()

    def close(self) -> None:
        self._tensors = {}


class SafetensorsWriter:
    """Writes one safetensors file from tensors that arrive in pieces and in any order.

    ``late`` tensors are small uint8 ones whose size is only known at the end, but not above the number given here.
    They follow all others, so every other tensor lies at a multiple of its item size.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, Entry], late: Mapping[str, int], metadata: dict
    ) -> None:
        self.path = path
        self.entries = dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))
        self.metadata = metadata
        self._late: dict[str, bytes | None] = dict.fromkeys(late)
        self._header_bytes = _padded(len(self._header(late)))
        self._begins: dict[str, int] = {}
        position = _LENGTH_BYTES + self._header_bytes
        for name, entry in self.entries.items():
            self._begins[name] = position
            position += entry.nbytes
        self._end = position
        self._missing = {name: entry.nbytes for name, entry in self.entries.items()}
        self._scratch = bytearray(_SCRATCH_BYTES)
        self._file = path.open("wb", buffering=0)

    def _header(self, late_sizes: Mapping[str, int]) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"} | self.metadata}
        position = 0
        tensors = list(self.entries.items()) + [
            (n, Entry(torch.uint8, (size,))) for n, size in late_sizes.items()
        ]
        for name, entry in tensors:
            end = position + entry.nbytes
            header[name] = {
                "dtype": NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [position, end],
            }
            position = end
        return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")

    def write(self, name: str, run: Tensor, start: int = 0) -> None:
        """Place a run of elements, the first of which is element ``start`` of the flattened tensor."""
        entry = self.entries[name]
        assert run.dtype == entry.dtype, f"{name}: {run.dtype} given, {entry.dtype} announced"
        values = run.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        assert values.numel() <= self._missing[name], f"{name}: more values than announced"
        position = self._begins[name] + start * entry.dtype.itemsize
        scratch = torch.frombuffer(self._scratch, dtype=torch.uint8)
        for first in range(0, values.numel(), _SCRATCH_BYTES):
            piece = values[first : first + _SCRATCH_BYTES]
            scratch[: piece.numel()].copy_(piece)
            self._put(memoryview(self._scratch)[: piece.numel()], position + first)
        self._missing[name] -= values.numel()

    def write_late(self, name: str, data: Tensor) -> None:
        """Give a late tensor's bytes."""
        self._late[name] = bytes(data.tolist())

    def _put(self, data: memoryview | bytes, position: int) -> None:
        self._file.seek(position)
        view = memoryview(data)
        while view.nbytes:
            view = view[self._file.write(view) :]

    def finish(self) -> int:
        """Write what was held back, last of all the header; returns the bytes of data. The file is then on disk."""
        unwritten = [name for name, missing in self._missing.items() if missing]
        late = {name: data for name, data in self._late.items() if data is not None}
        assert not unwritten and len(late) == len(self._late), f"{self.path}: not all tensors were written"
        position = self._end
        for data in late.values():
            self._put(data, position)
            position += len(data)
        header = self._header({name: len(data) for name, data in late.items()})
        assert len(header) <= self._header_bytes, "the header outgrew its place"
        self._file.truncate(position)
        os.fsync(self._file.fileno())
        header = self._header_bytes.to_bytes(_LENGTH_BYTES, "little") + header.ljust(self._header_bytes)
        self._put(header, 0)
        os.fsync(self._file.fileno())
        self._file.close()
        return position - _LENGTH_BYTES - self._header_bytes

    def close(self) -> None:
        """Give up on a file that was not finished."""
        self._file.close()


def _padded(size: int) -> int:
    return -(size // -_ALIGNMENT) * _ALIGNMENT
