"""A roofline for choosing among tile configurations of a Triton matmul, as its autotuner's pruning hooks.

A configuration is Triton's ``Config`` or anything with ``kwargs`` (``BLOCK_M, BLOCK_N, BLOCK_K`` and optionally
``SPLIT_K``), ``num_warps`` and ``num_stages``. The device's figures come from torch, with round numbers where it does
not tell them; only the order of the estimates matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["early_config_prune", "estimate_matmul_time"]

_WARP = 32
_REGISTERS_PER_THREAD = 255
_KEPT_STAGES = 2  # of configurations that differ only in pipeline depth, the deepest so many are tried


@dataclass(frozen=True)
class _Machine:
    """Per-device limits; the defaults are those of an A100."""

    multiprocessors: int = 108
    shared_memory: int = 166_912  # bytes one block may use
    clock: float = 1.4e9  # Hz
    bandwidth: float = 1.5e12  # bytes/s
    flops_per_cycle: int = 2048  # of one multiprocessor's tensor cores at 16 bits

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Machine:
        if tensor.device.type != "cuda":
            return cls()
        properties = torch.cuda.get_device_properties(tensor.device)
        return cls(
            multiprocessors=properties.multi_processor_count,
            shared_memory=getattr(properties, "shared_memory_per_block_optin", cls.shared_memory),
        )


def _tile_bytes(block_m: int, block_n: int, block_k: int, itemsize: int) -> int:
    return (block_m + block_n) * block_k * itemsize


def early_config_prune(configs: list[Any], named_args: dict[str, Any], **kwargs: Any) -> list[Any]:
    """The configurations worth timing: those that fit the device, the deepest pipelines of each tile shape.

    Args:
        configs: candidates.
        named_args: the kernel's arguments; ``A`` tells the device and the element size.

    Returns:
        Fitting candidates in their order; the smallest one if none fits.
    """
    A = named_args["A"]
    machine, itemsize = _Machine.of(A), A.element_size()

    def footprint(config: Any) -> int:
        tile = config.kwargs
        return config.num_stages * _tile_bytes(tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"], itemsize)

    def fits(config: Any) -> bool:
        accumulators = config.kwargs["BLOCK_M"] * config.kwargs["BLOCK_N"] / (config.num_warps * _WARP)
        return footprint(config) <= machine.shared_memory and accumulators <= _REGISTERS_PER_THREAD

    fitting = [config for config in configs if fits(config)]
    if not fitting:
        return [min(configs, key=footprint)] if configs else []
    depths: dict[tuple, set[int]] = {}
    for config in fitting:
        depths.setdefault(_shape_key(config), set()).add(config.num_stages)
    return [c for c in fitting if c.num_stages in sorted(depths[_shape_key(c)])[-_KEPT_STAGES:]]


def _shape_key(config: Any) -> tuple:
    return (*sorted(config.kwargs.items()), config.num_warps)


def estimate_matmul_time(
    num_warps: int,
    num_stages: int,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    M: int,
    N: int,
    K: int,
    BLOCK_M: int,
    BLOCK_N: int,
    BLOCK_K: int,
    SPLIT_K: int = 1,
    debug: bool = False,
    **kwargs: Any,
) -> float:
    """Estimated milliseconds of ``C [M, N] = A [M, K] @ B [K, N]`` with the given tile.

    The larger of arithmetic and memory time, whole waves of blocks counted; what a short pipeline does not overlap is
    added. ``debug`` has no effect.
    """
    machine, itemsize = _Machine.of(A), A.element_size()
    blocks = -(M // -BLOCK_M) * -(N // -BLOCK_N) * SPLIT_K
    waves = -(blocks // -machine.multiprocessors)
    steps = max(1, -(K // -(BLOCK_K * SPLIT_K)))

    rate = machine.flops_per_cycle * (2 / itemsize) * machine.clock * min(1.0, num_warps / 4)
    compute = waves * steps * 2 * BLOCK_M * BLOCK_N * BLOCK_K / rate
    loaded = blocks * steps * _tile_bytes(BLOCK_M, BLOCK_N, BLOCK_K, itemsize)
    stored = M * N * C.element_size() * (1 if SPLIT_K == 1 else 2 * SPLIT_K)
    busy = min(1.0, blocks / machine.multiprocessors)
    memory = (loaded + stored) / (machine.bandwidth * busy)

    longer, shorter = max(compute, memory), min(compute, memory)
    return 1e3 * (longer + shorter / max(1, num_stages))
