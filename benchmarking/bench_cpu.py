"""The 4-bit linear on a CPU against a dense one in the same run: inference, layers from memory, forward with dX.

Every row's baseline is torch's dense layer of the same dtype with the same threads, or one thread where two are timed.
"24 layers in turn" reads weights that no cache holds, as decoding a token does. Bytes are what must be read and written:
activations, weight, output.

    python benchmarking/bench_cpu.py [--threads 1] [--rows 1 4] [--no-write]

Given rows, only products with so many are measured, inference alone.

Where BNB_CPU_ISA forces an instruction set, only products are measured, against the dense layer, which torch computes
with all that the machine has, and against dequantizing with that set before torch multiplies:

    BNB_CPU_ISA=avx2 python benchmarking/bench_cpu.py
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
from harness import Report, measure_pair, row
from torch import Tensor
from torch.nn.functional import linear

from bitsandbytes import functional as F
from bitsandbytes.autograd.fourbit import matmul_4bit

SHAPES = [(4096, 4096), (14336, 4096)]
ROWS = [1, 4, 16, 64, 256, 1024]
LAYERS = 24
TRAINED_ROWS = [64, 512]
FORCED_ROWS = [1, 4, 16, 64, 256]


def quantized(dense: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """The layer's function, and the bytes of its weight."""
    packed, state = F.quantize_4bit(dense, quant_type="nf4", blocksize=64)
    return lambda A: matmul_4bit(A, packed, state), packed.nbytes + state.absmax.nbytes


def weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) / shape[1] ** 0.5).to(dtype)


def bench_products(
    report: Report, shape: tuple[int, int], dtype: torch.dtype, numbers_of_rows: list[int]
) -> None:
    dense = weight(shape, dtype)
    layer, held = quantized(dense)

    def bench(rows: int) -> None:
        A = torch.randn(rows, shape[1], dtype=dtype)
        times = measure_pair(lambda: layer(A), lambda: linear(A, dense), "cpu")
        moved = held + A.nbytes + rows * shape[0] * dtype.itemsize
        name = f"nf4 linear M={rows}"
        report.add(row(name, "dense linear", times, shape=shape, dtype=dtype, device="cpu", moved=moved))

    for rows in numbers_of_rows:
        if dtype == torch.bfloat16 or rows * shape[0] <= 1024 * 4096:  # else torch alone takes seconds
            bench(rows)


def bench_forced(
    report: Report, shape: tuple[int, int], dtype: torch.dtype, numbers_of_rows: list[int]
) -> None:
    """Products of the forced instruction set; a fused one has to be no slower than its two halves."""
    dense = weight(shape, dtype)
    packed, state = F.quantize_4bit(dense, quant_type="nf4", blocksize=64)
    rebuilt = torch.empty_like(dense)
    for rows in numbers_of_rows:
        A = torch.randn(rows, shape[1], dtype=dtype)
        moved = packed.nbytes + state.absmax.nbytes + A.nbytes + rows * shape[0] * dtype.itemsize
        baselines: dict[str, Callable[[], Tensor]] = {
            "dense linear": lambda A=A: linear(A, dense),
            "dequantize, linear": lambda A=A: linear(A, F.dequantize_4bit(packed, state, out=rebuilt)),
        }
        for name, baseline in baselines.items():
            times = measure_pair(lambda A=A: matmul_4bit(A, packed, state), baseline, "cpu")
            operation = f"nf4 linear M={rows}"
            report.add(row(operation, name, times, shape=shape, dtype=dtype, device="cpu", moved=moved))


def bench_layers(report: Report, shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense = [weight(shape, dtype) for _ in range(LAYERS)]
    layers, held = zip(*map(quantized, dense), strict=True)
    A = torch.randn(1, shape[1], dtype=dtype)

    def in_turn(run: Callable[[int], Tensor]) -> None:
        for index in range(LAYERS):
            run(index)

    times = measure_pair(
        lambda: in_turn(lambda index: layers[index](A)),
        lambda: in_turn(lambda index: linear(A, dense[index])),
        "cpu",
        seconds=1.5,
    )
    name = f"nf4 {LAYERS} layers in turn M=1"
    report.add(
        row(name, "dense linear", times, shape=shape, dtype=dtype, device="cpu", moved=sum(held), cold=True)
    )


def bench_training(report: Report, shape: tuple[int, int], dtype: torch.dtype, rows: int) -> None:
    dense = weight(shape, dtype)
    layer, held = quantized(dense)
    A = torch.randn(rows, shape[1], dtype=dtype, requires_grad=True)
    gradient = torch.randn(rows, shape[0], dtype=dtype)

    def step(run: Callable[[Tensor], Tensor]) -> None:
        torch.autograd.grad(run(A), A, gradient)

    times = measure_pair(lambda: step(layer), lambda: step(lambda x: linear(x, dense)), "cpu", seconds=1.0)
    moved = 2 * held + 2 * A.nbytes + 2 * gradient.nbytes
    name = f"nf4 forward + dX M={rows}"
    report.add(row(name, "dense linear", times, shape=shape, dtype=dtype, device="cpu", moved=moved))


def bench_threads(report: Report, shape: tuple[int, int], dtype: torch.dtype, rows: int) -> None:
    """Two threads against one. torch does not run in between: its own threads wait busily for a while."""
    layer, held = quantized(weight(shape, dtype))
    A = torch.randn(rows, shape[1], dtype=dtype)

    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        layer(A)

    times = measure_pair(lambda: run(2), lambda: run(1), "cpu")
    torch.set_num_threads(2)
    moved = held + A.nbytes + rows * shape[0] * dtype.itemsize
    name = f"nf4 linear M={rows}"
    report.add(row(name, "one thread", times, shape=shape, dtype=dtype, device="cpu", moved=moved))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--rows", type=int, nargs="+", help="of activations; all other measurements are left out"
    )
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()

    forced = os.environ.get("BNB_CPU_ISA")
    name = f"cpu-4bit-{forced}" if forced else "cpu-4bit"
    report = Report(f"{name}-rows" if options.rows else name)
    for threads in options.threads:
        torch.set_num_threads(threads)
        if forced:
            bench_forced(report, SHAPES[0], torch.bfloat16, options.rows or FORCED_ROWS)
            continue
        for dtype in (torch.bfloat16, torch.float32):
            for shape in SHAPES:
                bench_products(report, shape, dtype, options.rows or ROWS)
        bench_products(report, SHAPES[0], torch.float16, options.rows or ROWS)
        if options.rows:
            continue
        bench_layers(report, SHAPES[0], torch.bfloat16)
        for rows in TRAINED_ROWS:
            bench_training(report, SHAPES[0], torch.bfloat16, rows)
    if (os.cpu_count() or 1) > 1 and not forced and not options.rows:
        for rows in ROWS:
            bench_threads(report, SHAPES[0], torch.bfloat16, rows)
    if not options.no_write:
        print(f"written to {report.write()}")


if __name__ == "__main__":
    main()
