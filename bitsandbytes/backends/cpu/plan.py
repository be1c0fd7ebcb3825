"""From how many rows on a product takes less time with the weight decoded and torch's product than with our kernels.

A pure function of the problem and the processor, so that tests ask it about processors they do not run on. The figures
are those of benchmarking/bench_cpu.py.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from ..._native import has_avx512bf16, lib

__all__ = ["LEAST_DENSE_ROWS", "Processor", "dense_rows", "dense_rows_here"]

LEAST_DENSE_ROWS = 12  # up to here no plan has to be asked


class Processor(NamedTuple):
    """What decides how fast our kernels are, and how fast torch's."""

    isa: str  # whose kernels run; another than the best may be forced
    avx512bf16: bool = False
    amx: bool = False
    fast_mkl: bool = False  # MKL with AVX-512 on a processor of the vendor it is tuned for


def dense_rows(dtype: torch.dtype, tiled: bool, cpu: Processor) -> float:
    """Infinite where our kernels are never slower; ``tiled`` says that blocks hold a multiple of 64 codes of a row.

    In bfloat16 only where torch has instructions that our kernels do not use: AMX where blocks are not ``tiled``, or
    whatever this machine has when another instruction set is forced. In float32 where our kernels do not use AMX and
    MKL comes nearer to the peak: on a Xeon it takes 0.37 ms for a row more of 4096 x 4096 and our kernel 0.50, which
    makes good for 5 ms of decoding from 110 rows on; 0.89 and 1.13 ms for one of 14336 x 4096, from 200 rows on.
    """
    in_tiles = tiled and cpu.isa == "avx512amx"
    if dtype is torch.float32:
        return 192 if cpu.fast_mkl and not in_tiles else math.inf
    if dtype is not torch.bfloat16:
        return math.inf
    if cpu.amx:
        return math.inf if in_tiles else 32
    return LEAST_DENSE_ROWS if cpu.avx512bf16 and cpu.isa not in ("avx512amx", "avx512bf16") else math.inf


@cache
def dense_rows_here(dtype: torch.dtype, tiled: bool) -> float:
    """:func:`dense_rows` of this machine."""
    return dense_rows(dtype, tiled, _this_processor())


def _this_processor() -> Processor:
    return Processor(
        isa=(lib.bnb_cpu_isa() or b"").decode(),
        avx512bf16=has_avx512bf16(),
        amx=getattr(torch.cpu, "_is_amx_tile_supported", bool)(),
        fast_mkl=lib.bnb_cpu_is_intel() and lib.bnb_cpu_has_avx512f() and torch.backends.mkl.is_available(),
    )
