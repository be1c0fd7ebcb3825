"""LLM.int8() on a GPU next to dense 16-bit ``torch.nn.functional.linear``: a layer's product with its quantization.

Each row replays a CUDA graph of many calls over weights that together exceed the caches, so a time is that of one call
without the host; beside it stands the share of what the machine could do: of the bytes that must move at the speed of a
copy, or of 1979 TOP/s, whichever takes longer. Outliers are columns of which every activation is one. ``--package`` takes
a folder with another installation of bitsandbytes and times its layer the same way, in a process of its own, without
graphs where it waits for the device.

    python benchmarking/bench_int8_cuda.py [--package DIR] [--no-write]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from graphs import copies_of, copy_bandwidth, graph_times, times_of_package

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192)]
TOKENS = [1, 16, 64, 128, 256, 512, 1024, 4096]
OUTLIERS = [None, 0, 1, 16, 64]  # columns; None is a threshold of 0
OUTLIER_SHAPES = SHAPES[:2]
THRESHOLD = 6.0
DTYPE = torch.float16  # which the published layer asks for
PEAK = 1979e12  # operations a second of the tensor cores on int8, by the data sheet of an H100 or H200


def activations(M: int, K: int, outliers: int | None) -> torch.Tensor:
    A = torch.randn(M, K, device="cuda").clamp(-5, 5)
    if outliers:
        A[:, torch.randperm(K)[:outliers]] = 2 * THRESHOLD
    return A.to(DTYPE)


def times_of_layer(
    N: int, K: int, tokens: list[int], outliers: int | None, eager: bool
) -> dict[int, list[float]]:
    """Times of ``bnb.matmul`` by number of tokens, with whatever bitsandbytes is imported."""
    import bitsandbytes as bnb

    states = []
    for _ in range(copies_of(N * K)):
        state = bnb.MatmulLtState()
        weight = torch.randn(N, K, device="cuda", dtype=DTYPE) / K**0.5
        state.CB, state.SCB, _ = bnb.functional.int8_vectorwise_quant(weight)
        state.has_fp16_weights, state.is_training = False, False
        state.threshold = 0.0 if outliers is None else THRESHOLD
        states.append(state)
    found = {}
    with torch.no_grad():
        for M in tokens:
            A = activations(M, K, outliers)

            def call(i: int, A: torch.Tensor = A) -> None:
                state = states[i % len(states)]
                bnb.matmul(A, state.CB, state=state)

            count = max(20, len(states))
            found[M] = eager_times(call, count) if eager else graph_times(call, count)
    return found


def eager_times(call, count: int) -> list[float]:
    """Seconds of one call of ``count``, host and all."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(count):
            call(i)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / count)
    return times


def times_of_dense(N: int, K: int, tokens: list[int]) -> dict[int, list[float]]:
    weights = [torch.randn(N, K, device="cuda", dtype=DTYPE) for _ in range(copies_of(N * K * 2))]
    found = {}
    for M in tokens:
        A = activations(M, K, None)
        found[M] = graph_times(
            lambda i, A=A: torch.nn.functional.linear(A, weights[i % len(weights)]), max(20, len(weights))
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", help="folder with another bitsandbytes to time as well")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(times_of_layer(*json.loads(options.child))))
        return

    from harness import Report, Row, row

    report = Report("int8")
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")

    def add(name: str, times: list[float], dense: list[float], M: int, N: int, K: int) -> None:
        moved = N * K + 2 * M * (N + K)
        made: Row = row(
            name,
            "dense linear",
            (times, dense),
            shape=(M, N, K),
            dtype=DTYPE,
            device="cuda",
            moved=moved,
            cold=True,
        )
        report.rows.append(made)
        least = max(moved / bandwidth, 2 * M * N * K / PEAK)
        print(
            f"{name:32} {M:5} x {N:5} x {K:5} {made.median * 1e6:8.2f} us   dense {made.baseline_median * 1e6:8.2f} us"
            f"   {made.ratio:5.2f}x   {least / made.median:4.0%} of the machine",
            flush=True,
        )

    for N, K in SHAPES:
        dense = times_of_dense(N, K, TOKENS)
        torch.cuda.empty_cache()
        for outliers in OUTLIERS if (N, K) in OUTLIER_SHAPES else OUTLIERS[:2]:
            name = "threshold 0" if outliers is None else f"{outliers} outlier columns"
            times = times_of_layer(N, K, TOKENS, outliers, False)
            torch.cuda.empty_cache()
            for M in TOKENS:
                add(f"int8 {name}", times[M], dense[M], M, N, K)
            if options.package and outliers in (None, 16):
                waits = outliers is not None  # for the device, so no graph can be made of it
                found = times_of_package(__file__, options.package, N, K, TOKENS, outliers, waits)
                for M, theirs in found.items():
                    add(f"{name}, other package", theirs, dense[M], M, N, K)
    for rows, columns in ((8192, 28672), (16384, 4096)):
        from bitsandbytes.functional import int8_vectorwise_quant

        A = torch.randn(rows, columns, device="cuda", dtype=DTYPE)
        times = graph_times(lambda i, A=A: int8_vectorwise_quant(A), 5)
        moved = 3 * A.numel()
        copying = [moved / bandwidth]
        made = row(
            "int8_vectorwise_quant", "copy of as many bytes", (times, copying), shape=(rows, columns), dtype=DTYPE,
            device="cuda", moved=moved,
        )  # fmt: skip
        report.rows.append(made)
        print(
            f"{made.operation} {rows} x {columns}: {statistics.median(times) * 1e6:.1f} us, {made.ratio:.0%} of a copy"
        )
    if not options.no_write:
        print(report.write())


if __name__ == "__main__":
    main()
