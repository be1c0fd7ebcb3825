"""Calls every CUDA function of bnb.h over small shapes, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck --padding 64 --error-exitcode 9 python tests/native/sanitize
    compute-sanitizer --tool racecheck --error-exitcode 9 python tests/native/sanitize --only gemm --shard 0/8
    compute-sanitizer --tool initcheck --error-exitcode 9 python tests/native/sanitize --untouched

It needs numpy and a GPU, but no torch, whose start alone takes longer under the sanitizer than all of this. Results are
compared with numpy, so that a kernel that does nothing is no success. Without options it also fails if bnb.h has a
function that nothing here calls. `--shard i/n` takes an n-th of the cases.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # shards share the processor's cores

import numpy as np

import elementwise
import int8
import optimizers
import products
from gpu import CUDA_FUNCTIONS, ROOT, Gpu, GpuError

# Each yields a check and what follows the GPU and a random generator in its arguments.
FAMILIES: dict[str, Callable[[Gpu], Iterator[tuple]]] = {
    "quantize": elementwise.quantize,
    "dequantize": elementwise.dequantize,
    "embedding": elementwise.embedding,
    "gemm": products.gemm,
    "grouped": products.grouped,
    "int8": int8.int8,
    "optimizer": optimizers.optimizer,
    "managed": optimizers.managed_memory,
}
_REPORT_EVERY = 10.0  # seconds


def run_family(gpu: Gpu, name: str, shard: tuple[int, int], start: float) -> int:
    """Run a shard of a family; the number of failures."""
    failures = done = 0
    calls, reported = gpu.calls.total(), time.monotonic()

    def report(state: str) -> None:
        made = gpu.calls.total() - calls
        print(f"{time.monotonic() - start:6.1f} s  {name}: {done} cases, {made} calls{state}", flush=True)

    for check, *arguments in FAMILIES[name](gpu):
        label = f"{check.__name__}{tuple(arguments)}"
        seed = zlib.crc32(label.encode())
        if seed % shard[1] != shard[0]:  # every n-th one would have one kind of case each
            continue
        try:
            check(gpu, np.random.default_rng(seed), *arguments)
        except GpuError:
            print(f"{label} was running", flush=True)
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            failures += 1
            print(f"FAILED {label}: {error}", flush=True)
        gpu.free_all()
        done += 1
        if time.monotonic() - reported > _REPORT_EVERY:
            reported = time.monotonic()
            report(" so far")
    report(f", {failures} FAILED" if failures else "")
    return failures


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def shard(text: str) -> tuple[int, int]:
        index, number = map(int, text.split("/"))
        if not 0 <= index < number:
            raise ValueError
        return index, number

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=FAMILIES, action="append", help="a family; may be repeated")
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N")
    parser.add_argument("--untouched", action="store_true", help="do not poison the memory of results")
    parser.add_argument(
        "--library", type=Path, help="with bnb.h beside it; default: the newest of the package"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.monotonic()
    built = sorted(
        (ROOT / "bitsandbytes").glob("libbitsandbytes_cuda*.so"), key=lambda file: file.stat().st_mtime
    )
    library = options.library or (built[-1] if built else None)
    if library is None:
        print("there is no bitsandbytes/libbitsandbytes_cuda*.so; `make cuda` builds it", file=sys.stderr)
        return 2
    gpu = Gpu(library, poison=not options.untouched)
    failures = sum(run_family(gpu, name, options.shard, start) for name in options.only or FAMILIES)
    declared = {name for name in gpu.abi.prototypes if name.startswith(CUDA_FUNCTIONS)}
    forgotten = sorted(declared - gpu.calls.keys())
    if forgotten and not options.only and options.shard == (0, 1):
        print(f"FAILED: nothing calls {', '.join(forgotten)}")
        failures += len(forgotten)
    print(f"{gpu.calls.total()} calls of {len(gpu.calls)} functions; {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
