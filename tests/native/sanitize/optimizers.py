"""Optimizer steps of every rule, on one tensor and on many, and managed memory, where their state may lie."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from gpu import Buffer, Gpu
from values import EPS, FLOATS, Rng, blocks_of, expect, map_of_256, per_value, rounded, widened

BLOCK = 256
AVERAGES = {"adam": 2, "ademamix": 3, "momentum": 1, "lion": 1, "rmsprop": 1, "adagrad": 1}
COUPLED_DECAY = ("momentum", "rmsprop", "adagrad")
OF_SQUARES = ("rmsprop", "adagrad")
# (of the parameter, of the gradient)
DTYPES = (*((dtype, dtype) for dtype in FLOATS), ("float16", "float32"), ("bfloat16", "float32"))
LENGTHS = (1, 7, 255, 256, 257, 4097)
MANY = (0, 1, 255, 256, 257, 5000)
LAUNCH = 448  # tensors that one launch begins


def direction(
    rule: str, g: np.ndarray, states: list[np.ndarray], h: Any
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The step that a rule takes, and its state afterwards."""
    if rule == "adam":
        m = states[0] * h.beta1 + g * h.rest1
        v = states[1] * h.beta2 + g * g * h.rest2
        return m / (np.sqrt(v) + h.eps), [m, v]
    if rule == "ademamix":
        fast = states[0] * h.beta1 + g * h.rest1
        slow = states[1] * h.beta3 + g * h.rest3
        v = states[2] * h.beta2 + g * g * h.rest2
        root = np.sqrt(v) / h.correction2 + h.eps
        return (fast / h.correction1 + slow * h.alpha) / root, [fast, slow, v]
    if rule == "momentum":
        m = g if h.first_step else states[0] * h.beta1 + g
        return m, [m]
    if rule == "lion":
        return np.sign(states[0] * h.beta1 + g * h.rest1), [states[0] * h.beta2 + g * h.rest2]
    v = states[0] * h.beta1 + g * g * h.rest1 if rule == "rmsprop" else states[0] + g * g
    return g / (np.sqrt(v) + h.eps), [v]


class Tensor:
    """A parameter with its gradient and state, on the GPU and here; the state takes 32 bits or 8."""

    def __init__(self, gpu: Gpu, rng: Rng, rule: str, dtypes: tuple[str, str], n: int, bits: int) -> None:
        self.rule, self.n, self.bits, self.p_dtype = rule, n, bits, dtypes[0]
        shift = int(rng.random() < 0.3)
        p, g = (rounded(rng.standard_normal(n), dtype) for dtype in dtypes)
        g[::5] = 0
        self.p_before, self.gradient = widened(p, dtypes[0]), widened(g, dtypes[1])
        self.p, self.g = gpu.put(p, shift), gpu.put(g, shift)
        averages, self.first = AVERAGES[rule], max(AVERAGES[rule] - 1, 1)
        self.maps = [map_of_256(signed=k < self.first) for k in range(averages)]
        if bits == 8:
            absmax = rng.uniform(0.5, 1.0, (averages, blocks_of(n, BLOCK))).astype(np.float32)
            least = 128 if rule in OF_SQUARES else 0  # whose map has negative values, too
            codes = rng.integers(least, 256, (averages, n), dtype=np.uint8)
            self.before = [self.decoded(k, codes[k], absmax[k]) for k in range(averages)]
            self.absmax = self._put_states(gpu, absmax, shift)
            self.state = self._put_states(gpu, codes, shift)
        else:
            states = rng.uniform(0.0, 1.0, (averages, n)).astype(np.float32)
            self.before = list(states)
            self.absmax, self.state = [None, None], self._put_states(gpu, states, shift)
        self.unorm = gpu.room(1, np.float32)
        self.step = gpu.put(np.zeros(1, np.int64))

    def _put_states(self, gpu: Gpu, rows: np.ndarray, shift: int) -> list[Buffer | None]:
        second = gpu.put(rows[self.first :], shift) if len(rows) > self.first else None
        return [gpu.put(rows[: self.first], shift), second]

    @staticmethod
    def _rows(buffers: list[Buffer | None]) -> np.ndarray:
        return np.concatenate([buffer.get() for buffer in buffers if buffer is not None])

    def decoded(self, k: int, codes: np.ndarray, absmax: np.ndarray) -> np.ndarray:
        return self.maps[k][codes] * per_value(absmax, BLOCK, self.n)

    def check(self, h: Any, rounds: bool = False, relative: bool | None = None) -> None:
        """The parameter and its state are what one step with these scalars makes of them.

        ``relative`` says what the limit of the update's norm means; without it, there is none.
        """
        g, p = self.gradient * h.gnorm_scale + self.p_before * h.decay, self.p_before
        u, states = direction(self.rule, g, self.before, h)
        size = h.step_size
        if relative is not None:
            norm = np.sqrt(np.square(u, dtype=np.float64).sum())
            limit = h.limit * (np.sqrt(np.square(p, dtype=np.float64).sum()) if relative else 1.0)
            expect(np.abs(self.unorm.get() - norm) <= 1e-4 * norm, "norm of the update")
            size = size * limit / norm if 0 < limit < norm else size
        still = (self.gradient == 0) & h.skip_zeros
        moved = np.where(still, p, p * h.shrink - u * size)
        # Where the state has 8 bits, roots and quotients are approximate; a rounding at random takes either neighbour.
        allowed = (
            EPS[self.p_dtype] * (np.abs(p) + np.abs(moved)) * (1 + rounds) + 1e-4 * np.abs(u * size) + 1e-7
        )
        expect(np.abs(widened(self.p.get(), self.p_dtype) - moved) <= allowed, "parameters")
        held = self._rows(self.state)
        absmax = self._rows(self.absmax) if self.bits == 8 else None
        for k, state in enumerate(states):
            exact = np.where(still, self.before[k], state)
            if absmax is None:
                expect(np.abs(held[k] - exact) <= 1e-5 * np.abs(exact) + 1e-6, "state")
                continue
            # A value keeps its sign, so those next to zero may take the entry after the nearest.
            scale = per_value(absmax[k], BLOCK, self.n)
            expect(
                np.abs(self.decoded(k, held[k], absmax[k]) - exact) <= (gap(self.maps[k]) + 1e-4) * scale,
                "state",
            )
            for block, largest in enumerate(absmax[k]):
                own = np.abs(exact[BLOCK * block : BLOCK * (block + 1)]).max()
                expect(np.abs(largest - own) <= 1e-5 * own, "absmax")


def gap(ascending: np.ndarray) -> float:
    return float(np.diff(ascending).max() / 2)


def draw_config(gpu: Gpu, rng: Rng, rule: str, skip_zeros: bool, limit: float) -> Any:
    values = {"beta1": 0.9, "beta2": 0.99, "beta3": 0.999, "rest1": 0.1, "rest2": 0.01, "rest3": 0.001}
    config = gpu.abi.structs["bnb_optimizer_config"](
        **values,
        correction1=0.19,
        correction2=0.14,
        alpha=2.0,
        eps=1e-2,
        shrink=0.99,
        step_size=1e-2,
        limit=limit,
    )
    config.decay = 0.1 if rule in COUPLED_DECAY and rng.random() < 0.5 else 0.0
    config.gnorm_scale = 1.0 if rng.random() < 0.5 else 0.5
    config.first_step, config.skip_zeros = bool(rng.random() < 0.3), skip_zeros
    return config


def update_32bit(gpu: Gpu, rng: Rng, rule: str, dtypes: tuple[str, str], n: int, limited: bool) -> None:
    tensor = Tensor(gpu, rng, rule, dtypes, n, 32)
    config = draw_config(gpu, rng, rule, not limited and rng.random() < 0.5, 0.3 if limited else 0.0)
    scratch = gpu.room(gpu.call("bnb_cuda_optimizer_scratch", count=1), np.uint8) if limited else None
    gpu.call(
        "bnb_cuda_optimizer_update_32bit",
        g=tensor.g,
        g_dtype=gpu.constant("dtype", dtypes[1]),
        p=tensor.p,
        p_dtype=gpu.constant("dtype", dtypes[0]),
        state1=tensor.state[0],
        state2=tensor.state[1],
        unorm=tensor.unorm if limited else None,
        scratch=scratch,
        n=n,
        rule=gpu.constant("rule", rule),
        config=ctypes.byref(config),
    )
    tensor.check(config, relative=False if limited else None)


def update_8bit(gpu: Gpu, rng: Rng, rule: str, dtypes: tuple[str, str], n: int) -> None:
    tensor = Tensor(gpu, rng, rule, dtypes, n, 8)
    config = draw_config(gpu, rng, rule, bool(rng.random() < 0.5), 0.0)
    maps = put_maps(gpu, tensor)
    gpu.call(
        "bnb_cuda_optimizer_update_8bit_blockwise",
        g=tensor.g,
        g_dtype=gpu.constant("dtype", dtypes[1]),
        **maps,
        p=tensor.p,
        p_dtype=gpu.constant("dtype", dtypes[0]),
        state1=tensor.state[0],
        state2=tensor.state[1],
        absmax1=tensor.absmax[0],
        absmax2=tensor.absmax[1],
        n=n,
        rule=gpu.constant("rule", rule),
        config=ctypes.byref(config),
    )
    tensor.check(config)


def put_maps(gpu: Gpu, tensor: Tensor) -> dict[str, Buffer | None]:
    if tensor.bits != 8:
        return {}
    second = gpu.put(tensor.maps[-1]) if len(tensor.maps) > tensor.first else None
    return {"qmap1": gpu.put(tensor.maps[0]), "qmap2": second}


def update_many(
    gpu: Gpu, rng: Rng, rule: str, dtypes: tuple[str, str], bits: int, limited: bool, count: int
) -> None:
    tensors = [
        Tensor(gpu, rng, rule, dtypes, MANY[i % len(MANY)] if count <= 6 else 1 + i % 3, bits)
        for i in range(count)
    ]
    table = (gpu.abi.structs["bnb_optimizer_tensor"] * count)()
    blocks = 0
    for place, (entry, tensor) in enumerate(zip(table, tensors, strict=True)):
        named = {"p": tensor.p, "state1": tensor.state[0], "state2": tensor.state[1], "step": tensor.step}
        named |= {"absmax1": tensor.absmax[0], "absmax2": tensor.absmax[1], "unorm": tensor.unorm}
        for name, buffer in named.items():
            setattr(entry, name, buffer.address if buffer is not None else None)
        entry.n, entry.first_block, entry.place = tensor.n, blocks, place
        blocks += blocks_of(tensor.n, BLOCK)
    rounds = dtypes[0] == "bfloat16" and rng.random() < 0.5
    hyper = gpu.abi.structs["bnb_optimizer_hyper"](
        lr=1e-2, beta1=0.9, beta2=0.99, beta3=0.999, alpha=2.0, eps=1e-2, weight_decay=0.1, gnorm_scale=1.0,
        t_alpha=10.0, t_beta3=10.0, max_unorm=1e-3 if limited else 0.0, seed=5, skip_zeros=False, rounds=rounds,
    )  # fmt: skip
    if rng.random() < 0.5:
        hyper.lr_address, hyper.lr = gpu.put(np.array([1e-2], np.float32)).address, -1.0
    Config = gpu.abi.structs["bnb_optimizer_config"]
    shared: dict[str, Any] = {
        "tensors": gpu.put(np.frombuffer(table, np.uint8)),
        "configs": gpu.put(np.zeros(count * ctypes.sizeof(Config), np.uint8)),  # there is padding to read
        "count": count,
        "rule": gpu.constant("rule", rule),
    }
    gradients = (ctypes.c_int64 * count)(*(tensor.g.address for tensor in tensors))
    gpu.call("bnb_cuda_optimizer_begin", gradients=gradients, hyper=ctypes.byref(hyper), **shared)
    scratch = gpu.room(gpu.call("bnb_cuda_optimizer_scratch", count=count), np.uint8) if limited else None
    gpu.call(
        "bnb_cuda_optimizer_update_many",
        **shared,
        g_dtype=gpu.constant("dtype", dtypes[1]),
        p_dtype=gpu.constant("dtype", dtypes[0]),
        **put_maps(gpu, tensors[0]),
        scratch=scratch,
        blocks=blocks,
    )
    configs = (Config * count).from_buffer_copy(shared["configs"].get())
    for tensor, config in zip(tensors, configs, strict=True):
        expect(tensor.step.get() == 1, "number of the step")
        expect(np.float32(config.step_size) > 0 and config.first_step, "scalars of the step")
        tensor.check(config, rounds, relative=True if limited else None)


def managed(gpu: Gpu, rng: Rng, n: int) -> None:
    """State in managed memory, moved to the GPU, stepped there and moved back."""
    tensor = Tensor(gpu, rng, "momentum", ("float32", "float32"), n, 32)
    memory = ctypes.c_void_p()
    gpu.call("bnb_cuda_managed_alloc", memory=ctypes.byref(memory), bytes=4 * n)
    address = memory.value
    assert address
    ctypes.memmove(address, tensor.before[0].ctypes.data, 4 * n)
    gpu.call("bnb_cuda_managed_prefetch", memory=address, bytes=4 * n, device=0)
    config = draw_config(gpu, rng, "momentum", False, 0.0)
    dtype = gpu.constant("dtype", "float32")
    gpu.call(
        "bnb_cuda_optimizer_update_32bit",
        g=tensor.g,
        g_dtype=dtype,
        p=tensor.p,
        p_dtype=dtype,
        state1=address,
        n=n,
        rule=gpu.constant("rule", "momentum"),
        config=ctypes.byref(config),
    )
    gpu.call("bnb_cuda_managed_prefetch", memory=address, bytes=4 * n, device=-1)
    held = np.ctypeslib.as_array((ctypes.c_float * n).from_address(address)).copy()
    gpu.call("bnb_cuda_managed_free", memory=address)
    tensor.state = [gpu.put(held[None]), None]
    tensor.check(config)


def optimizer(gpu: Gpu) -> Iterator[tuple]:
    for rule, dtypes, n in product(AVERAGES, DTYPES, LENGTHS):
        yield update_8bit, rule, dtypes, n
        yield from ((update_32bit, rule, dtypes, n, limited) for limited in (False, True))
    for rule, dtypes, bits, limited in product(AVERAGES, DTYPES, (8, 32), (False, True)):
        yield update_many, rule, dtypes, bits, limited, len(MANY)
    for bits in (8, 32):
        yield update_many, "adam", DTYPES[0], bits, True, LAUNCH + 2


def managed_memory(gpu: Gpu) -> Iterator[tuple]:
    yield from ((managed, n) for n in (1, 257, 1024))
