"""``inspect``: what a model's tensors are, what they take, and what quantizing cost.

A quantized weight is several tensors in the file; they are shown as one. With the source given, weights are decoded
run by run and compared: the relative error is ``|w - w'| / |w|`` over the whole tensor.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .._quant.blockwise import expand_absmax
from .checkpoint import Checkpoint
from .errors import CliError
from .plan import TRANSPOSED_KEY
from .progress import Progress, human_bytes
from .tensor_files import Entry, nbytes_of

__all__ = ["add_arguments", "run"]

_BLOB = ".quant_state.bitsandbytes__"
_RUN_ELEMENTS = 1 << 22  # a multiple of every block size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", type=Path, help="a model folder or one .safetensors file")
    parser.add_argument("--source", type=Path, help="the unquantized model, to measure the error against")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace) -> int:
    checkpoint = Checkpoint(options.path, any_name=True)
    source = Checkpoint(options.source, any_name=True) if options.source else None
    try:
        weights = _weights(checkpoint)
        if not weights:
            raise CliError(f"{options.path} holds no tensors")
        totals = _totals(checkpoint, weights)
        if source is not None:
            totals |= _compare(weights, checkpoint, source)
    finally:
        checkpoint.close()
        if source is not None:
            source.close()
    rows = [weight.row for weight in weights]
    if options.json:
        found = {"path": str(options.path), "tensors": [asdict(row) for row in rows], "totals": totals}
        print(json.dumps(found, indent=2))
    else:
        _print_table(rows, totals, source is not None)
    return 0


@dataclass
class _Row:
    """One line: a weight with everything that belongs to it."""

    name: str
    format: str
    blocksize: int | None
    double_quant: bool
    shape: list[int]
    bytes: int
    bits_per_weight: float
    relative_error: float | None = None

    @property
    def described(self) -> str:
        block = f"/{self.blocksize}" if self.blocksize else ""
        return self.format + block + ("+dq" if self.double_quant else "")


# --- what the tensors are --------------------------------------------------------------------------------------


class _Plain:
    """A tensor that is what it says."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        entry = checkpoint.entries[name]
        self._checkpoint, self._name = checkpoint, name
        self.row = _row(name, str(entry.dtype).removeprefix("torch."), entry.shape, entry.nbytes)

    def decode(self, start: int, stop: int) -> Tensor:
        return self._checkpoint.read(self._name, start, stop)


class _FourBit:
    """Packed codes, statistics, codebook and blob."""

    def __init__(self, checkpoint: Checkpoint, name: str, members: list[str]) -> None:
        self._checkpoint, self._name = checkpoint, name
        entries = {member: checkpoint.entries[member] for member in members}
        parts = {member: checkpoint.read_whole(member) for member in members if member != name}
        try:
            state = F.QuantState.from_dict(parts, device="cpu")
            self._absmax = expand_absmax(state)
        except (ValueError, KeyError, AssertionError, TypeError, AttributeError) as error:
            raise CliError(f"{checkpoint.path}: the statistics of {name} are damaged: {error}") from error
        self._state = state
        shape = tuple(state.shape or ())
        assert state.blocksize is not None and state.quant_type is not None
        self._blocksize = state.blocksize
        blocks = -(prod(shape) // -state.blocksize)
        if entries[name].nbytes < (prod(shape) + 1) // 2 or self._absmax.numel() < blocks:
            raise CliError(f"{checkpoint.path}: {name} holds too little for its shape {list(shape)}")
        self.row = _row(
            name, state.quant_type, shape, nbytes_of(entries.values()), state.blocksize, state.nested
        )

    def decode(self, start: int, stop: int) -> Tensor:
        state, itemsize = self._state, self._checkpoint.entries[self._name].dtype.itemsize
        packed = self._checkpoint.read(self._name, start // 2 // itemsize, -((stop + 1) // 2 // -itemsize))
        absmax = self._absmax[start // self._blocksize : -(stop // -self._blocksize)]
        run = F.QuantState(
            absmax,
            torch.Size((stop - start,)),
            state.code,
            state.blocksize,
            state.quant_type,
            state.dtype,
        )
        return F.dequantize_4bit(packed.view(torch.uint8).view(-1, 1), run)


class _Int8:
    """int8 rows and their absmax."""

    def __init__(self, checkpoint: Checkpoint, name: str, members: list[str]) -> None:
        self._checkpoint, self._name = checkpoint, name
        entries = {member: checkpoint.entries[member] for member in members}
        self._shape = entries[name].shape
        statistics = name.removesuffix("weight") + "SCB"
        self._row_stats = checkpoint.read(statistics).float()
        if self._row_stats.numel() != self._shape[0]:
            raise CliError(f"{checkpoint.path}: {statistics} does not have one value a row of {name}")
        self.row = _row(name, "int8", self._shape, nbytes_of(entries.values()))

    def decode(self, start: int, stop: int) -> Tensor:
        # Runs need not begin with a row, so the scales are laid out value by value.
        columns = self._shape[1]
        rows = torch.arange(start // columns, -(stop // -columns))
        scales = self._row_stats[rows].repeat_interleave(columns)[start % columns :][: stop - start]
        return self._checkpoint.read(self._name, start, stop) * scales / F.C


def _row(
    name: str,
    kind: str,
    shape: tuple[int, ...],
    size: int,
    blocksize: int | None = None,
    nested: bool = False,
) -> _Row:
    return _Row(name, kind, blocksize, nested, list(shape), size, 8 * size / max(prod(shape), 1))


def _weights(checkpoint: Checkpoint) -> list[_Plain | _FourBit | _Int8]:
    """One object a weight, in the order of names."""
    owners = {name.partition(_BLOB)[0] for name in checkpoint if _BLOB in name}
    members: dict[str, list[str]] = {name: [name] for name in owners if name in checkpoint.entries}
    for name in checkpoint:
        for owner in (name.rpartition(".")[0], name.rpartition(".")[0].removesuffix(".quant_state")):
            if owner in members:
                members[owner].append(name)
    for name, entry in checkpoint.entries.items():
        below = name.removesuffix("weight")
        if entry.dtype == torch.int8 and f"{below}SCB" in checkpoint.entries and below != name:
            keys = (name, f"{below}SCB", f"{below}weight_format")
            members[name] = [key for key in keys if key in checkpoint.entries]

    taken = {member for group in members.values() for member in group}
    weights: list[_Plain | _FourBit | _Int8] = []
    for name in sorted(set(checkpoint) - taken | set(members)):
        if name not in members:
            weights.append(_Plain(checkpoint, name))
        elif name in owners:
            weights.append(_FourBit(checkpoint, name, members[name]))
        else:
            weights.append(_Int8(checkpoint, name, members[name]))
    return weights


# --- what quantizing cost --------------------------------------------------------------------------------------


def _totals(checkpoint: Checkpoint, weights: list) -> dict[str, Any]:
    size = nbytes_of(checkpoint.entries.values())
    count = sum(prod(weight.row.shape) for weight in weights)
    return {
        "tensors": len(weights),
        "weights": count,
        "bytes": size,
        "bits_per_weight": 8 * size / max(count, 1),
    }


def _compare(weights: list, checkpoint: Checkpoint, source: Checkpoint) -> dict[str, Any]:
    """Fill in each row's relative error; returns the totals over all weights that the source has."""
    transposed = set(checkpoint.metadata(TRANSPOSED_KEY))
    difference = magnitude = 0.0
    common = [weight for weight in weights if weight.row.name in source.entries]
    with Progress(sum(prod(weight.row.shape) for weight in common)) as progress:
        for weight in common:
            name = weight.row.name
            if (sums := _squares(weight, source, name in transposed, progress)) is None:
                continue
            weight.row.relative_error = _ratio(*sums)
            difference, magnitude = difference + sums[0], magnitude + sums[1]
            source.release(name)
            checkpoint.release(name)
    return {
        "source_bytes": nbytes_of(source.entries.values()),
        "relative_error": _ratio(difference, magnitude),
    }


def _squares(
    weight: Any, source: Checkpoint, transposed: bool, progress: Progress
) -> tuple[float, float] | None:
    """Sums of squared differences and of squared source values; None where the two cannot be compared."""
    name, shape = weight.row.name, tuple(weight.row.shape)
    entry: Entry = source.entries[name]
    if entry.shape != (shape[::-1] if transposed else shape) or not entry.dtype.is_floating_point:
        return None
    whole = source.read_whole(name).t().reshape(-1) if transposed else None
    difference = magnitude = 0.0
    for start in range(0, prod(shape), _RUN_ELEMENTS):
        stop = min(start + _RUN_ELEMENTS, prod(shape))
        original = (source.read(name, start, stop) if whole is None else whole[start:stop]).float()
        decoded = weight.decode(start, stop).float()
        difference += (decoded - original).square().sum(dtype=torch.float64).item()
        magnitude += original.square().sum(dtype=torch.float64).item()
        source.release(name)
        progress.advance(stop - start, name)
    return difference, magnitude


def _ratio(difference: float, magnitude: float) -> float:
    if difference == 0.0:
        return 0.0
    return sqrt(difference / magnitude) if magnitude else float("inf")


# --- the table -------------------------------------------------------------------------------------------------


def _print_table(rows: list[_Row], totals: dict[str, Any], with_error: bool) -> None:
    lines = [["tensor", "format", "shape", "bytes", "bits/weight", *(["error"] if with_error else [])]]
    for row in rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        line = [row.name, row.described, shape, f"{row.bytes:,}", f"{row.bits_per_weight:.3f}"]
        if with_error:
            line.append("-" if row.relative_error is None else f"{row.relative_error:.3e}")
        lines.append(line)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        left = [text.ljust(width) for text, width in zip(line[:3], widths[:3], strict=True)]
        right = [text.rjust(width) for text, width in zip(line[3:], widths[3:], strict=True)]
        print("  ".join(left + right).rstrip())

    for kind in sorted({row.described for row in rows}):
        of_kind = [row for row in rows if row.described == kind]
        print(f"{kind}: {len(of_kind)} tensors, {human_bytes(sum(row.bytes for row in of_kind))}")
    text = f"total: {totals['weights']:,} weights, {human_bytes(totals['bytes'])}, {totals['bits_per_weight']:.3f} bits/weight"
    if with_error:
        share = totals["bytes"] / max(totals["source_bytes"], 1)
        text += f", {share:.1%} of the source, relative error {totals['relative_error']:.3e}"
    print(text)
