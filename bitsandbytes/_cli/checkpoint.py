"""A Hugging Face model folder as one set of named tensors, whatever files hold them.

Looked for, in this order: ``model.safetensors.index.json`` and its shards, ``model.safetensors``,
``pytorch_model.bin.index.json`` and its shards, ``pytorch_model.bin``. Only headers are read here; values come
through :meth:`Checkpoint.read`, in runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CliError
from .tensor_files import CheckpointFile, Entry, PickleFile, SafetensorsFile

__all__ = ["INDEX_SUFFIX", "SAFETENSORS_NAME", "Checkpoint", "read_json"]

SAFETENSORS_NAME = "model.safetensors"
INDEX_SUFFIX = ".index.json"
_WEIGHT_FILES = (SAFETENSORS_NAME, "pytorch_model.bin")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CliError: it is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CliError(f"{path} is missing") from error
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CliError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CliError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


class Checkpoint:
    """The tensors of a model folder, or of a single file. ``any_name`` also takes a folder of other safetensors files.

    Raises:
        CliError: nothing there to read, or a file is missing or damaged.
    """

    def __init__(self, path: Path, any_name: bool = False) -> None:
        self.path = path
        self.files: list[CheckpointFile] = []
        self.entries: dict[str, Entry] = {}
        self._file_of: dict[str, CheckpointFile] = {}
        if path.is_file():
            self._open(path, None)
        elif path.is_dir():
            self._open_folder(any_name)
        else:
            raise CliError(f"{path} does not exist")

    def _open_folder(self, any_name: bool) -> None:
        for name in _WEIGHT_FILES:
            index = self.path / f"{name}{INDEX_SUFFIX}"
            if index.is_file():
                return self._open_shards(index)
            if (self.path / name).is_file():
                return self._open(self.path / name, None)
        others = sorted(self.path.glob("*.safetensors")) if any_name else []
        if others:
            for path in others:
                self._open(path, None)
            return None
        looked_for = ", ".join(f"{name}, {name}{INDEX_SUFFIX}" for name in _WEIGHT_FILES)
        raise CliError(f"no weights in {self.path}: looked for {looked_for}")

    def _open_shards(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CliError(f"{index} has no weight_map of tensor names to file names")
        for file_name in dict.fromkeys(weight_map.values()):
            if Path(file_name).name != file_name:
                raise CliError(f"{index} names {file_name}, which is not a file beside it")
            if not (self.path / file_name).is_file():
                raise CliError(f"{self.path / file_name} is missing, but {index.name} names it")
            self._open(
                self.path / file_name, {name for name, held in weight_map.items() if held == file_name}
            )

    def _open(self, path: Path, wanted: set[str] | None) -> None:
        """Take the file's tensors; ``wanted`` are the ones the index says it has (None: whatever it has)."""
        file = PickleFile(path) if path.suffix in (".bin", ".pt", ".pth") else SafetensorsFile(path)
        if wanted is not None and (lost := sorted(wanted - set(file.entries))):
            raise CliError(f"{path} lacks {lost[0]}, which the index says it holds")
        self.files.append(file)
        for name, entry in file.entries.items():
            if wanted is None or name in wanted:
                self.entries[name] = entry
                self._file_of[name] = file

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def same_memory(self) -> dict[str, str]:
        """``{later: earlier}`` for tensors that a PyTorch file holds under two names."""
        same: dict[str, str] = {}
        for file in self.files:
            if isinstance(file, PickleFile):
                same |= file.same_memory()
        return same

    def metadata(self, key: str) -> list[str]:
        """The strings under ``key`` in the files' own metadata, where they have one: JSON lists, joined."""
        values: list[str] = []
        for file in self.files:
            if isinstance(file, SafetensorsFile) and key in file.metadata:
                values += json.loads(file.metadata[key])
        return values

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor."""
        return self._file_of[name].read(name, start, stop)

    def read_whole(self, name: str) -> Tensor:
        """A tensor in its shape, still in the file's own memory."""
        return self.read(name).view(self.entries[name].shape)

    def release(self, name: str) -> None:
        """Give back the memory that reading ``name`` took."""
        self._file_of[name].release()

    def close(self) -> None:
        for file in self.files:
            file.close()
