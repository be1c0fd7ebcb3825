"""What to do with each tensor of a checkpoint: copy it, or quantize it, and under which name.

An item reads its values in runs and never keeps them, except where the model stores a weight in another form than it
computes with (transposed, or several weights fused into one): such a tensor is held whole while it is worked on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checkpoint import Checkpoint

__all__ = ["TRANSPOSED_KEY", "Item", "Plan", "Stored", "Whole", "first_float_dtype"]

TRANSPOSED_KEY = (
    "bitsandbytes.transposed"  # in a file's metadata: the weights stored the other way round in SRC
)


class Stored:
    """Values as the checkpoint stores them."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self.dtype, self.shape = checkpoint.entries[name]

    def read(self, start: int, stop: int) -> Tensor:
        return self._checkpoint.read(self._name, start, stop)

    def release(self) -> None:
        self._checkpoint.release(self._name)

    def done(self) -> None:
        self.release()


class Whole:
    """Values that have to be made first; ``make`` returns the whole tensor. Kept until ``done``."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor], done: Callable[[], None]
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._make, self._done = make, done
        self._values: Tensor | None = None

    def read(self, start: int, stop: int) -> Tensor:
        if self._values is None:
            self._values = self._make().contiguous().reshape(-1)
        return self._values[start:stop]

    def release(self) -> None:
        pass

    def done(self) -> None:
        self._values = None
        self._done()


@dataclass
class Item:
    """One tensor of the result. ``module`` is the layer it makes quantized, None for a tensor that is copied."""

    name: str
    values: Stored | Whole
    module: str | None = None
    transposed: bool = False


@dataclass
class Plan:
    """All items in order, the dtype weights are cast to before they are quantized, and what the config has to say.

    ``skip_modules`` is None where a loader's own choice of layers is the right one. ``notes`` are for the user.
    """

    items: list[Item]
    dtype: torch.dtype
    skip_modules: list[str] | None
    notes: list[str] = field(default_factory=list)


def first_float_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype a loader takes for the model's when its config names none."""
    floats = (entry.dtype for entry in checkpoint.entries.values() if entry.dtype.is_floating_point)
    return next(floats, torch.float32)
