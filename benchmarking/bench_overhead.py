"""What one call of a layer costs beside its arithmetic: a 64 x 64 layer and one token, so that all is overhead.

python benchmarking/bench_overhead.py [--device cpu] [--no-write]
"""

from __future__ import annotations

import argparse
import time

import torch
from harness import Report, row

from bitsandbytes import nn

SIZE = 64
CALLS = 50  # in one timing: shorter than a time slice of a shared machine
TIMINGS = 301


def layers(dtype: torch.dtype, device: str) -> dict[str, torch.nn.Module]:
    made: dict[str, torch.nn.Module] = {}
    for nested in (False, True):
        made[f"Linear4bit nested={nested}"] = nn.Linear4bit(
            SIZE, SIZE, compute_dtype=dtype, compress_statistics=nested, quant_type="nf4"
        )
    for threshold in (0.0, 6.0):
        made[f"Linear8bitLt threshold={threshold:g}"] = nn.Linear8bitLt(
            SIZE, SIZE, has_fp16_weights=False, threshold=threshold
        )
    return {name: layer.to(device).eval() for name, layer in made.items()}


def seconds_a_call(layer: torch.nn.Module, x: torch.Tensor) -> float:
    """Wall time: on a GPU the host's, as long as the device keeps up."""
    start = time.perf_counter()
    for _ in range(CALLS):
        layer(x)
    elapsed = time.perf_counter() - start
    if x.is_cuda:
        torch.cuda.synchronize()
    return elapsed / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)

    report = Report(f"overhead-{options.device}")
    for dtype in (torch.bfloat16, torch.float32):
        dense = torch.nn.Linear(SIZE, SIZE, dtype=dtype, device=options.device)
        x = torch.randn(1, SIZE, dtype=dtype, device=options.device)
        for name, layer in layers(dtype, options.device).items():
            times: tuple[list[float], list[float]] = ([], [])
            with torch.inference_mode():
                for _ in range(TIMINGS):
                    times[0].append(seconds_a_call(layer, x))
                    times[1].append(seconds_a_call(dense, x))
            report.add(
                row(
                    name,
                    "nn.Linear",
                    times,
                    shape=(SIZE, SIZE),
                    dtype=dtype,
                    device=options.device,
                    moved=0,
                )
            )
    if not options.no_write:
        print(f"written to {report.write()}")


if __name__ == "__main__":
    main()
