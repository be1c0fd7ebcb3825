"""``quantize``: a model folder in, the same model in 4 or 8 bits out, a few megabytes at a time.

Memory does not grow with the model. Values are read, quantized and written in runs of whole blocks (4-bit) or whole
rows (int8), which gives the same codes as quantizing the tensor at once; only the statistics of one tensor are kept
until it is done. Sizes are known before any value is, so every shard's layout is fixed first.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import torch

from .. import functional as F
from .._formats.table import BLOCKSIZES, DEFAULT_BLOCKSIZE, FLOAT_DTYPES, FORMATS, NESTED_BLOCKSIZE
from .._quant.clipping import clip_to_fit
from .checkpoint import INDEX_SUFFIX, SAFETENSORS_NAME, Checkpoint, read_json
from .errors import CliError
from .output_folder import OutputFolder, leftovers
from .plan import TRANSPOSED_KEY, Item, Plan
from .plan_by_model import Unplannable, plan_by_model
from .plan_by_name import plan_by_name
from .progress import Progress, human_bytes
from .tensor_files import Entry, SafetensorsWriter, nbytes_of

__all__ = ["add_arguments", "run"]

_RUN_ELEMENTS = 1 << 21  # values worked on at a time; a multiple of every block size
_LARGEST_COPIED_FILE = 256 << 20
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".ckpt")
_INT8_THRESHOLD = 6.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="a Hugging Face model folder")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to make")
    parser.add_argument("--format", required=True, choices=[*sorted(FORMATS, reverse=True), "int8"])
    parser.add_argument("--double-quant", action="store_true", help="quantize the 4-bit statistics as well")
    parser.add_argument(
        "--blocksize", type=int, choices=BLOCKSIZES, metavar="N",
        help=f"values that share a scale in 4 bits: {', '.join(map(str, BLOCKSIZES))} (default {DEFAULT_BLOCKSIZE})",
    )  # fmt: skip
    parser.add_argument(
        "--fit-scales", action="store_true",
        help="4 bits: clip each block where that lowers its squared error; slower to write, the same to load",
    )  # fmt: skip
    parser.add_argument(
        "--skip", nargs="+", action="extend", default=[], metavar="NAME",
        help="modules to leave alone, besides those transformers leaves alone: full name, first part, last part or regex",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where to quantize (default cpu)")
    parser.add_argument(
        "--dtype", choices=[_name(dtype) for dtype in FLOAT_DTYPES],
        help="what 4-bit layers compute in (default: the model's own dtype)",
    )  # fmt: skip
    parser.add_argument("--shard-size", type=_size, default=_size("4GB"), metavar="SIZE", help="default 4GB")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")


def run(options: argparse.Namespace) -> int:
    source, target = options.source, Path(options.target.absolute())
    config = _check(options, source, target)
    for text in leftovers(target):
        print(f"note: {text}", file=sys.stderr)
    begin = time.monotonic()
    with ExitStack() as stack:
        output = OutputFolder(target, options.overwrite)
        checkpoint = Checkpoint(source)
        stack.callback(checkpoint.close)
        _check_tensors(checkpoint)
        plan = _plan(checkpoint, config, options)
        for note in plan.notes:
            print(f"note: {note}", file=sys.stderr)
        quantized = [item for item in plan.items if item.module is not None]
        if not quantized:
            raise CliError(f"nothing to quantize in {source}: no linear layer is left")
        method = (
            _Int8(options.device, plan.dtype) if options.format == "int8" else _FourBit(options, plan.dtype)
        )
        shards = _shards(plan, method, options.shard_size)
        _check_space(target, sum(shard.nbytes for shard in shards))
        stack.enter_context(output)
        total = _write_shards(output.path, shards, plan, method)
        _copy_other_files(source, output.path)
        _write_config(output.path, config, plan, options)
    before = nbytes_of(checkpoint.entries.values())
    _explain_kept(plan, before)
    print(
        f"{target}: {human_bytes(before)} -> {human_bytes(total)} ({total / before:.1%}), {len(quantized)} weights in "
        f"{options.format}, {len(plan.items) - len(quantized)} tensors kept, {time.monotonic() - begin:.1f} s"
    )
    return 0


# --- checks ----------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace, source: Path, target: Path) -> dict[str, Any]:
    """What can be said before any weight is looked at; returns the config."""
    if not source.is_dir():
        raise CliError(f"{source} {'is not a folder' if source.exists() else 'does not exist'}")
    if source.resolve() == target.resolve() or target.resolve() in source.resolve().parents:
        raise CliError(f"{target} would replace the source")
    if options.format == "int8" and (
        options.double_quant or options.blocksize or options.fit_scales or options.dtype
    ):
        raise CliError(
            "--double-quant, --blocksize, --fit-scales and --dtype belong to the 4-bit formats; "
            "int8 has one scale a row"
        )
    try:
        options.device = torch.device(options.device)
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise CliError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    config = read_json(source / "config.json")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "some method")
        raise CliError(f"{source} is already quantized ({method}); quantize the original model")
    return config


def _check_tensors(checkpoint: Checkpoint) -> None:
    if not checkpoint.entries:
        raise CliError(f"no weights in {checkpoint.path}: its files hold no tensors")
    for name in checkpoint:
        if ".quant_state.bitsandbytes__" in name or name.endswith(".SCB"):
            raise CliError(
                f"{checkpoint.path} is already quantized: it holds {name}; quantize the original model"
            )


def _check_space(target: Path, needed: int) -> None:
    parent = next(path for path in target.parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CliError(
            f"not enough space at {parent}: {human_bytes(needed)} needed, {human_bytes(free)} free"
        )


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", text.strip())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB or 4GB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " "))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _explain_kept(plan: Plan, total: int) -> None:
    """A result that is hardly smaller should not be a riddle: stacked experts, above all, are no linear layers."""
    kept = {
        item.name: nbytes_of([Entry(item.values.dtype, item.values.shape)])
        for item in plan.items
        if not item.module
    }
    if kept and sum(kept.values()) > total / 2:
        share, largest = sum(kept.values()) / total, max(kept, key=kept.__getitem__)
        print(
            f"note: {share:.0%} of the bytes are not in linear layers and were kept, as {largest}",
            file=sys.stderr,
        )


# --- planning --------------------------------------------------------------------------------------------------


def _plan(checkpoint: Checkpoint, config: dict[str, Any], options: argparse.Namespace) -> Plan:
    keys = _Int8.KEYS if options.format == "int8" else _FourBit.keys(options.format, options.double_quant)
    try:
        plan = plan_by_model(checkpoint, config, options.skip, keys)
    except Unplannable as reason:
        plan = plan_by_name(checkpoint, config, options.skip)
        plan.notes.insert(0, f"{reason}: choosing layers by the names and shapes of their weights")
    if plan.dtype not in FLOAT_DTYPES:
        plan.dtype = torch.float32
    return plan


class _Shard:
    """The items of one output file, and its layout."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.entries: dict[str, Entry] = {}
        self.late: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.entries.values()) + sum(self.late.values())


def _shards(plan: Plan, method: _FourBit | _Int8, limit: int) -> list[_Shard]:
    """Items in order, as many to a file as ``limit`` allows; what belongs to one weight stays together."""
    shards = [_Shard()]
    filled = 0
    for item in plan.items:
        entries: dict[str, Entry] = {item.name: Entry(item.values.dtype, tuple(item.values.shape))}
        late: dict[str, int] = {}
        if item.module is not None:
            entries, late = method.layout(item.name, tuple(item.values.shape))
        size = nbytes_of(entries.values()) + sum(late.values())
        if filled and filled + size > limit:
            shards.append(_Shard())
            filled = 0
        filled += size
        shards[-1].items.append(item)
        shards[-1].entries |= entries
        shards[-1].late |= late
    return shards


# --- formats ---------------------------------------------------------------------------------------------------


class _FourBit:
    """4-bit blocks: codes, statistics (maybe quantized in turn), codebook, and a blob that says how they were made."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype) -> None:
        self._format: str = options.format
        self._nested: bool = options.double_quant
        self._fit: bool = options.fit_scales
        self._blocksize: int = options.blocksize or DEFAULT_BLOCKSIZE
        self._device, self._dtype = options.device, dtype

    @staticmethod
    def keys(quant_type: str, nested: bool) -> list[str]:
        names = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
        return [
            "weight",
            *(f"weight.{name}" for name in names),
            f"weight.quant_state.bitsandbytes__{quant_type}",
        ]

    def layout(self, name: str, shape: tuple[int, ...]) -> tuple[dict[str, Entry], dict[str, int]]:
        """Every tensor's size, in the order of a layer's state dict; the blob's is a bound."""
        numel = prod(shape)
        blocks = -(numel // -self._blocksize)
        entries = {
            name: Entry(torch.uint8, ((numel + 1) // 2, 1)),
            f"{name}.absmax": Entry(torch.uint8 if self._nested else torch.float32, (blocks,)),
            f"{name}.quant_map": Entry(torch.float32, (16,)),
        }
        if self._nested:
            entries[f"{name}.nested_absmax"] = Entry(torch.float32, (-(blocks // -NESTED_BLOCKSIZE),))
            entries[f"{name}.nested_quant_map"] = Entry(torch.float32, (256,))
        return entries, {f"{name}.quant_state.bitsandbytes__{self._format}": 256 + 24 * len(shape)}

    def write(self, item: Item, writer: SafetensorsWriter, progress: Progress) -> bool:
        """Quantize an item into its place; returns whether all its values were finite."""
        numel = prod(item.values.shape)
        statistics = torch.empty(-(numel // -self._blocksize), dtype=torch.float32, device=self._device)
        state: F.QuantState | None = None
        for start in range(0, numel, _RUN_ELEMENTS):
            values = item.values.read(start, min(start + _RUN_ELEMENTS, numel))
            weight = values.to(self._device, self._dtype)
            if self._fit:
                weight = clip_to_fit(weight, self._blocksize, self._format)
            packed, state = F.quantize_4bit(weight, blocksize=self._blocksize, quant_type=self._format)
            writer.write(item.name, packed, start // 2)
            first = start // self._blocksize
            statistics[first : first + state.absmax.numel()] = state.absmax
            progress.advance(values.numel() * values.element_size(), item.name)
            del values, weight
            item.values.release()
        assert state is not None
        finite = bool(statistics.max().isfinite())  # the largest is NaN if any is
        state.absmax, state.shape = statistics, torch.Size(item.values.shape)
        if self._nested:
            state.offset = statistics.mean()
            state.absmax, state.state2 = F.quantize_blockwise(
                statistics - state.offset, blocksize=NESTED_BLOCKSIZE
            )
            state.nested = True
        for key, tensor in state.as_dict(packed=True).items():
            if key.startswith("quant_state."):
                writer.write_late(f"{item.name}.{key}", tensor)
            else:
                writer.write(f"{item.name}.{key}", tensor)
        return finite


class _Int8:
    """LLM.int8(): int8 rows and each row's absmax."""

    KEYS = ("weight", "SCB", "weight_format")

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype

    def layout(self, name: str, shape: tuple[int, ...]) -> tuple[dict[str, Entry], dict[str, int]]:
        below = name.removesuffix("weight")
        entries = {
            name: Entry(torch.int8, shape),
            f"{below}SCB": Entry(torch.float32, shape[:1]),
            f"{below}weight_format": Entry(torch.uint8, ()),
        }
        return entries, {}

    def write(self, item: Item, writer: SafetensorsWriter, progress: Progress) -> bool:
        """Quantize an item into its place; returns whether all its values were finite."""
        rows, columns = item.values.shape
        below = item.name.removesuffix("weight")
        at_once = max(_RUN_ELEMENTS // columns, 1)
        finite = True
        for first in range(0, rows, at_once):
            last = min(first + at_once, rows)
            values = item.values.read(first * columns, last * columns)
            # The layer quantizes its weight in float16, whatever dtype the model has.
            halves = values.to(self._device).to(self._dtype).to(torch.float16).view(last - first, columns)
            codes, statistics, _ = F.int8_vectorwise_quant(halves)
            writer.write(item.name, codes, first * columns)
            writer.write(f"{below}SCB", statistics, first)
            finite = finite and bool(statistics.max().isfinite())
            progress.advance(values.numel() * values.element_size(), item.name)
            del values
            item.values.release()
        writer.write(f"{below}weight_format", torch.zeros((), dtype=torch.uint8))
        return finite


# --- writing ---------------------------------------------------------------------------------------------------


def _write_shards(folder: Path, shards: list[_Shard], plan: Plan, method: _FourBit | _Int8) -> int:
    """Write all files and, if there are several, their index; returns the bytes of data."""
    stem = SAFETENSORS_NAME.removesuffix(".safetensors")
    total = 0
    weight_map: dict[str, str] = {}
    work = sum(prod(item.values.shape) * item.values.dtype.itemsize for item in plan.items)
    not_finite = []
    with Progress(work) as progress:
        for number, shard in enumerate(shards, 1):
            several = len(shards) > 1
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" if several else SAFETENSORS_NAME
            transposed = [item.name for item in shard.items if item.transposed]
            metadata = {TRANSPOSED_KEY: json.dumps(transposed)} if transposed else {}
            writer = SafetensorsWriter(folder / name, shard.entries, shard.late, metadata)
            try:
                for item in shard.items:
                    if item.module is None:
                        _copy_values(item, writer, progress)
                    elif not method.write(item, writer, progress):
                        not_finite.append(item.name)
                    item.values.done()
                total += writer.finish()
            finally:
                writer.close()
            weight_map |= dict.fromkeys([*shard.entries, *shard.late], name)
    for name in not_finite:
        print(f"warning: {name} holds NaN or infinite values, or ones too large for float16", file=sys.stderr)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / f"{SAFETENSORS_NAME}{INDEX_SUFFIX}", index)
    return total


def _copy_values(item: Item, writer: SafetensorsWriter, progress: Progress) -> None:
    numel = prod(item.values.shape)
    for start in range(0, numel, _RUN_ELEMENTS):
        values = item.values.read(start, min(start + _RUN_ELEMENTS, numel))
        writer.write(item.name, values, start)
        progress.advance(values.numel() * values.element_size(), item.name)
        del values
        item.values.release()


def _copy_other_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation settings, model code and the like: all but weights, indexes and hidden files."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
        weights = path.suffix in _OTHER_WEIGHTS or path.name.endswith(INDEX_SUFFIX)
        if hidden or weights or not path.is_file() or relative == Path("config.json"):
            continue
        if path.stat().st_size > _LARGEST_COPIED_FILE:
            print(f"note: {path} is large and was not copied", file=sys.stderr)
            continue
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / relative)


def _write_config(folder: Path, config: Mapping[str, Any], plan: Plan, options: argparse.Namespace) -> None:
    four_bit = options.format != "int8"
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four_bit,
        "load_in_8bit": not four_bit,
        "bnb_4bit_compute_dtype": (options.dtype or _name(plan.dtype)) if four_bit else _name(torch.float32),
        "bnb_4bit_quant_storage": _name(torch.uint8),
        "bnb_4bit_quant_type": options.format if four_bit else "fp4",
        "bnb_4bit_use_double_quant": options.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": plan.skip_modules,
        "llm_int8_threshold": _INT8_THRESHOLD,
    }
    written = dict(config)
    if not (config.get("dtype") or config.get("torch_dtype")):
        # Without it a loader takes the first float tensor's dtype, which is now that of a statistic.
        written["dtype"] = _name(plan.dtype)
    _write_json(folder / "config.json", written | {"quantization_config": quantization})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
