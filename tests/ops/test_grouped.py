"""Grouped 4-bit products: every expert multiplies its own rows and nobody else's, within the memory of one expert."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from bitsandbytes import functional as F
from bitsandbytes._ops import OPERATORS
from oracles import FLOAT_DTYPES, product_error

# A GPU says so where it has no kernel of its own; the results are what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:There is no grouped 4-bit kernel")

# Rows of each expert: one token, all on one, none in between, none at all, many, and a long tail of small ones.
COUNTS = [(1,), (0, 0, 9, 0), (0, 3, 0, 1, 17), (0, 0), (70, 1, 33), tuple(i % 4 for i in range(19))]
# (N, K, blocksize): whole blocks in a row; rows that end inside a block; odd N; one block for an expert.
SIZES = [(24, 64, 64), (48, 96, 128), (7, 160, 32), (2, 32, 64)]


def ends(counts: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(device, torch.int32)


def arguments(packed: Tensor, state: F.QuantState, offsets: Tensor) -> tuple[tuple, tuple]:
    """What follows A, and what follows the bias."""
    nested = (state.absmax, state.state2.code, state.offset) if state.nested else (None, None, None)
    absmax = state.state2.absmax if state.nested else state.absmax
    return (packed, list(state.shape), absmax, state.blocksize, state.quant_type, offsets), nested


def check_product(result: Tensor, A: Tensor, counts: tuple[int, ...], weight: Tensor, bias=None) -> None:
    start = 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        if count:
            own_bias = None if bias is None else bias[expert]
            bound = torch.finfo(A.dtype).eps + torch.finfo(torch.float32).eps * (4 + A.shape[1] ** 0.5)
            assert product_error(result[rows], A[rows], weight[expert], own_bias) <= bound
        start += count
    assert not result[start:].any() and not result[start:].isnan().any()


@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=lambda c: f"{len(c)}x{sum(c)}")
@pytest.mark.parametrize("backend", ["own", "default"])
def test_each_expert_multiplies_its_rows(device, backend, counts, size, quant_type, dtype, nested):
    N, K, blocksize = size
    stack = torch.randn(len(counts), N, K, device=device) / K**0.5
    packed, state = F.quantize_4bit(
        stack, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    weight = F.dequantize_4bit(packed, state)
    head, tail = arguments(packed, state, ends(counts, device))
    key = (
        "default" if backend == "default" or device not in OPERATORS["gemm_4bit_grouped"].kernels else device
    )
    strays = 3  # rows that belong to no expert
    A = torch.randn(sum(counts) + strays, K, device=device).to(dtype)
    bias = torch.randn(len(counts), N, device=device).to(dtype)
    for own_bias in (None, bias):
        result = OPERATORS["gemm_4bit_grouped"].run_with(key, A, *head, own_bias, *tail)
        check_product(result, A, counts, weight, own_bias)
    grad = torch.randn(sum(counts) + strays, N, device=device).to(dtype)
    result = OPERATORS["gemm_4bit_grouped_transposed"].run_with(key, grad, *head, *tail)
    check_product(result, grad, counts, weight.transpose(1, 2))


@pytest.mark.parametrize("storage", oracles.STORAGE_DTYPES, ids=str)
def test_bytes_are_read_whatever_their_storage(device, storage):
    stack, A = torch.randn(3, 16, 64, device=device), torch.randn(5, 64, device=device)
    packed, state = F.quantize_4bit(stack, quant_type="nf4", quant_storage=storage)
    head, _ = arguments(packed, state, ends((2, 0, 3), device))

    check_product(
        torch.ops.bitsandbytes.gemm_4bit_grouped(A, *head), A, (2, 0, 3), F.dequantize_4bit(packed, state)
    )


@pytest.mark.parametrize("wrong", [[3, 2, 5], [0, 2, 6], [-1, 2, 5]], ids=str)
def test_offsets_that_cannot_be_are_refused_on_the_cpu(wrong):
    packed, state = F.quantize_4bit(torch.randn(3, 16, 64), quant_type="nf4")
    head, _ = arguments(packed, state, torch.tensor(wrong, dtype=torch.int32))

    with pytest.raises(ValueError, match="offsets must not decrease and lie between 0 and A's 5 rows"):
        torch.ops.bitsandbytes.gemm_4bit_grouped(torch.randn(5, 64), *head)
    with pytest.raises(ValueError, match="offsets must not decrease"):
        torch.ops.bitsandbytes.gemm_4bit_grouped_transposed(torch.randn(5, 16), *head)


class PeakMemory(TorchDispatchMode):
    """Bytes of the memory that torch's operators allocate while this is active: alive now, and at most so far."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self.seen | given:
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("backend", ["default", "cpu"])
@pytest.mark.parametrize("name", ["gemm_4bit_grouped", "gemm_4bit_grouped_transposed"])
def test_no_more_than_one_expert_is_decoded(name, backend, nested):
    kernel = OPERATORS[name].kernels.get(backend)
    if kernel is None:
        pytest.skip("needs the native CPU library")
    E, N, K = 8, 96, 256
    packed, state = F.quantize_4bit(torch.randn(E, N, K), compress_statistics=nested, quant_type="nf4")
    head, tail = arguments(packed, state, ends((2, 0, 1, 5, 0, 0, 3, 1), "cpu"))
    transposed = name.endswith("transposed")
    A, out = torch.randn(12, N if transposed else K), torch.empty(12, K if transposed else N)
    kernel(A, *head, *(() if transposed else (None,)), *tail, out)  # what is kept between calls is made now

    with PeakMemory() as memory:
        kernel(A, *head, *(() if transposed else (None,)), *tail, out)

    one_expert = N * K * A.element_size()
    assert memory.peak <= 1.1 * one_expert  # some scales, too
    assert (memory.peak >= one_expert) == (backend == "default")
