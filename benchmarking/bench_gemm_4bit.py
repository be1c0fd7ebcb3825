"""The 4-bit matmul on a GPU next to dense bf16 ``torch.nn.functional.linear``, as a decoding step sees it.

Each row replays a CUDA graph of many calls over weights that together exceed the caches, so a time is that of one call
without the host. GB/s counts the packed weight, its statistics and the activations once; the floor is what a copy
reaches. ``--package`` takes a folder with another installation of bitsandbytes and times that one the same way, in a
process of its own.

    python benchmarking/bench_gemm_4bit.py [--quick] [--package DIR] [--no-write]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from graphs import copies_of, copy_bandwidth, graph_times, times_of_package

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192)]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
QUICK_TOKENS = [1, 8, 16, 32, 64, 128, 256, 512]
TRAINED = [(4096, 4096), (14336, 4096)]
TRAINING_TOKENS = 2048
BLOCKSIZE = 64
DTYPE = torch.bfloat16


def times_of_4bit(N: int, K: int, tokens: list[int], nested: bool) -> dict[int, list[float]]:
    """Times of ``matmul_4bit`` by number of tokens, with whatever bitsandbytes is imported."""
    import bitsandbytes as bnb

    def quantize():
        weight = torch.randn(N, K, device="cuda", dtype=DTYPE) / K**0.5
        return bnb.functional.quantize_4bit(
            weight, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=nested
        )

    weights = [quantize() for _ in range(copies_of(N * K // 2))]
    found = {}
    for M in tokens:
        A = torch.randn(M, K, device="cuda", dtype=DTYPE)

        def call(i: int, A: torch.Tensor = A) -> None:
            packed, state = weights[i % len(weights)]
            bnb.matmul_4bit(A, packed.t(), state)

        with torch.no_grad():
            found[M] = graph_times(call, max(20, len(weights)))
    return found


def times_of_dense(N: int, K: int, tokens: list[int]) -> dict[int, list[float]]:
    weights = [torch.randn(N, K, device="cuda", dtype=DTYPE) for _ in range(copies_of(N * K * 2))]
    found = {}
    for M in tokens:
        A = torch.randn(M, K, device="cuda", dtype=DTYPE)
        found[M] = graph_times(
            lambda i, A=A: torch.nn.functional.linear(A, weights[i % len(weights)]), max(20, len(weights))
        )
    return found


def with_gradient(forward: Callable[[torch.Tensor], torch.Tensor], A: torch.Tensor) -> None:
    """Forward and the gradient of the activations, as through a frozen layer."""
    out = forward(A)
    torch.autograd.grad(out, A, torch.ones_like(out))


def times_of_training(N: int, K: int, M: int) -> tuple[list[float], list[float]]:
    """Times of forward and gradient: through ``matmul_4bit``, and through the dense layer."""
    import bitsandbytes as bnb

    A = torch.randn(M, K, device="cuda", dtype=DTYPE, requires_grad=True)
    dense = [torch.randn(N, K, device="cuda", dtype=DTYPE) / K**0.5 for _ in range(copies_of(N * K * 2))]
    packed = [bnb.functional.quantize_4bit(weight, quant_type="nf4") for weight in dense]

    def ours(i: int) -> None:
        weight, state = packed[i % len(packed)]
        with_gradient(lambda x: bnb.matmul_4bit(x, weight.t(), state), A)

    def theirs(i: int) -> None:
        with_gradient(lambda x: torch.nn.functional.linear(x, dense[i % len(dense)]), A)

    return graph_times(ours, 20), graph_times(theirs, 20)


def moved(M: int, N: int, K: int, nested: bool) -> int:
    blocks = N * K // BLOCKSIZE
    return N * K // 2 + (blocks + blocks // 64 if nested else 4 * blocks) + 2 * M * (N + K)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few numbers of tokens")
    parser.add_argument("--package", help="folder with another bitsandbytes to time as well")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(times_of_4bit(*json.loads(options.child))))
        return

    from harness import Report, Row, row

    report = Report("gemm-4bit")
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    tokens = QUICK_TOKENS if options.quick else TOKENS

    def add(name: str, ours: list[float], dense: list[float], M: int, N: int, K: int, nested: bool) -> None:
        share = moved(M, N, K, nested) / bandwidth / (sorted(ours)[len(ours) // 2])
        shape = (M, N, K)
        kwargs = {"shape": shape, "dtype": DTYPE, "device": "cuda", "moved": moved(M, N, K, nested)}
        made: Row = row(name, "dense bf16 linear", (ours, dense), cold=True, **kwargs)
        report.rows.append(made)
        print(
            f"{name:22} {M:5} x {N:5} x {K:5} {made.median * 1e6:8.2f} us   dense {made.baseline_median * 1e6:8.2f} us"
            f"   {made.ratio:5.2f}x   {share:4.0%} of the byte floor",
            flush=True,
        )

    for N, K in SHAPES:
        dense = times_of_dense(N, K, tokens)
        torch.cuda.empty_cache()
        for nested in (False, True):
            kind = "nf4 nested" if nested else "nf4"
            times = times_of_4bit(N, K, tokens, nested)
            torch.cuda.empty_cache()
            for M in tokens:
                add(f"{kind} matmul_4bit", times[M], dense[M], M, N, K, nested)
            if options.package:
                theirs = times_of_package(__file__, options.package, N, K, tokens, nested)
                for M in tokens:
                    add(f"{kind} other package", theirs[M], dense[M], M, N, K, nested)
    for N, K in TRAINED:
        ours, dense_times = times_of_training(N, K, TRAINING_TOKENS)
        torch.cuda.empty_cache()
        add("nf4 forward + dX", ours, dense_times, TRAINING_TOKENS, N, K, False)
    if not options.no_write:
        print(report.write())


if __name__ == "__main__":
    main()
