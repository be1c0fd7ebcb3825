"""``selftest``: every operator on every device here, with fresh random inputs, against float64.

Prints for each which kernel ran, its error and the one allowed, and how fast it was. The speed is a rough one, of a
few calls in a row; ``benchmarking/`` measures properly.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .. import _ops
from .._native import has_native, lib
from .errors import CliError
from .selftest_cases import Case, bytes_moved, cases

__all__ = ["add_arguments", "run"]

_REPEATS = 3
_COLUMNS = "{:<32} {:<24} {:<8} {:<22} {:>9} {:>9} {:>8}  {}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="only this device (default: all that are here)")
    parser.add_argument("--quick", action="store_true", help="small inputs, one call each")
    parser.add_argument("--seed", type=int, help="the inputs' seed (default: a new one each time)")


def run(options: argparse.Namespace) -> int:
    devices = _devices(options.device)
    seed = torch.seed() % (1 << 32) if options.seed is None else options.seed
    todo = cases(options.quick)
    print(f"seed {seed}")
    print(_COLUMNS.format("operator", "case", "device", "path", "error", "allowed", "GB/s", "result"))
    failures = 0
    for device in devices:
        for number, case in enumerate(todo):
            failures += not _check(case, device, seed + number, 1 if options.quick else _REPEATS)
    untested = sorted(set(_ops.OPERATORS) - {case.operator for case in todo})
    for name in untested:
        print(f"{name}: no case tests this operator")
    failures += len(untested)
    count = len(devices) * len(todo)
    print(
        f"{count} checks on {', '.join(map(str, devices))}: {f'{failures} FAILED' if failures else 'all passed'}"
    )
    return 1 if failures else 0


def _devices(wanted: str | None) -> list[torch.device]:
    if wanted is not None:
        try:
            device = torch.device(wanted)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise CliError(f"--device {wanted}: {str(error).splitlines()[0]}") from error
        if device.type == "meta":
            raise CliError("--device meta: there is nothing to compute on it")
        return [device]
    found = [torch.device("cpu")]
    for kind in ("cuda", "xpu", "mps", "hpu"):
        module = getattr(torch, kind, None)
        if module is not None and hasattr(module, "is_available") and module.is_available():
            count = module.device_count() if hasattr(module, "device_count") else 1
            found += [torch.device(kind, index) for index in range(count)]
    return found


def _check(case: Case, device: torch.device, seed: int, repeats: int) -> bool:
    """Run one case and print its line; returns whether it passed."""
    path = path_of(case.operator, device)
    columns = [case.operator, case.label, str(device), path]
    try:
        error, rate = _measure(case, device, seed, repeats)
    except Exception as problem:  # a kernel may fail in any way: that is a finding, and the next case follows
        text = f"FAIL {type(problem).__name__}: {problem}".splitlines()[0]
        print(_COLUMNS.format(*columns, "-", f"{case.limit:.1e}", "-", text), flush=True)
        return False
    passed = error <= case.limit
    rest = [f"{error:.1e}", f"{case.limit:.1e}", f"{rate / 1e9:.2f}", "ok" if passed else "FAIL"]
    print(_COLUMNS.format(*columns, *rest), flush=True)
    return passed


def _measure(case: Case, device: torch.device, seed: int, repeats: int) -> tuple[float, float]:
    """The error of one call, and bytes a second of the fastest of several more."""
    operator = getattr(torch.ops.bitsandbytes, case.operator)
    arguments = case.make(torch.Generator().manual_seed(seed))
    on_device = _map(arguments, lambda tensor: tensor.to(device, copy=True))
    results = operator(*on_device)
    if case.in_place:
        results = on_device
    elif isinstance(results, Tensor):
        results = (results,)
    moved = bytes_moved(arguments) + (bytes_moved(arguments) // 2 if case.in_place else bytes_moved(results))
    error = case.error(arguments, _map(results, Tensor.cpu))

    seconds = []
    for _ in range(repeats):
        _synchronize(device)
        begin = time.perf_counter()
        operator(*on_device)
        _synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return error, moved / min(seconds)


def _map(values: Sequence[Any], function: Callable[[Tensor], Tensor]) -> tuple:
    return tuple(function(value) if isinstance(value, Tensor) else value for value in values)


def _synchronize(device: torch.device) -> None:
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", None)
    if synchronize is not None:
        synchronize()


def path_of(operator: str, device: torch.device) -> str:
    """Which kernel serves the operator: ``cpu native avx512``, ``cuda torch``, ``default``, or a plug-in's."""
    fill = _ops.OPERATORS[operator].kernels.get(device.type)
    if fill is None:
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type, device.type.upper())
        own = torch._C._dispatch_has_kernel_for_dispatch_key(f"bitsandbytes::{operator}", key)
        return f"{device.type} plug-in" if own else "default"
    module = fill.__module__
    if ".triton." in module:
        return f"{device.type} triton"
    if not _calls_library(fill):
        return f"{device.type} torch"
    isa = lib.bnb_cpu_isa() if device.type == "cpu" and has_native("bnb_cpu_isa") else b""
    return f"{device.type} native {isa.decode() if isinstance(isa, bytes) else isa}".rstrip()


def _calls_library(function: Any, depth: int = 3) -> bool:
    """Whether a kernel reaches the native library, itself or through functions of its module."""
    names = function.__code__.co_names
    if "lib" in names:
        return True
    helpers = [function.__globals__.get(name) for name in names]
    return depth > 0 and any(_calls_library(f, depth - 1) for f in helpers if isinstance(f, FunctionType))
