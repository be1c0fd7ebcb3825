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

# Rows of each expert: one token, all on one, none in between, none at all, many, a long tail of small ones; and means
# between those, as kernels for tiles of several widths take them.
COUNTS = [
    (1,),
    (0, 0, 9, 0),
    (0, 3, 0, 1, 17),
    (0, 0),
    (70, 1, 33),
    tuple(i % 4 for i in range(19)),
    (9, 8),
    (20, 0, 30),
]
# (N, K, blocksize): whole blocks in a row; rows that end inside a block; odd N; one block for an expert; more than one
# tile of both dimensions, the last of them short.
SIZES = [(24, 64, 64), (48, 96, 128), (7, 160, 32), (2, 32, 64), (136, 320, 64)]


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


needs_cuda_kernel = pytest.mark.skipif(
    "cuda" not in OPERATORS["gemm_4bit_grouped"].kernels or not torch.cuda.is_available(),
    reason="needs a grouped CUDA kernel",
)


@needs_cuda_kernel
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("wrong", "counts"),
    [((3, 2, 5), (3, 0, 2)), ((0, 2, 9), (0, 2, 3)), ((-1, 2, 5), (0, 2, 3)), ((4, 9, 3), (3, 0, 0))],
    ids=str,
)
def test_offsets_that_cannot_be_take_no_row_that_is_not_there(wrong, counts, dtype):
    packed, state = F.quantize_4bit(torch.randn(3, 16, 64, device="cuda"), quant_type="nf4")
    head, _ = arguments(packed, state, torch.tensor(wrong, dtype=torch.int32, device="cuda"))
    A = torch.randn(5, 64, device="cuda", dtype=dtype)

    result = torch.ops.bitsandbytes.gemm_4bit_grouped(A, *head)

    check_product(result, A, counts, F.dequantize_4bit(packed, state))


@needs_cuda_kernel
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_nothing_is_allocated_but_the_result(dtype, nested):
    weight = torch.randn(8, 96, 256, device="cuda")
    packed, state = F.quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
    head, tail = arguments(packed, state, ends((2, 0, 1, 5, 0, 0, 3, 1), "cuda"))
    A, gradient = (
        torch.randn(12, 256, device="cuda", dtype=dtype),
        torch.randn(12, 96, device="cuda", dtype=dtype),
    )
    for name, rows, rest in (
        ("gemm_4bit_grouped", A, (None, *tail)),
        ("gemm_4bit_grouped_transposed", gradient, tail),
    ):
        operator = getattr(torch.ops.bitsandbytes, name)
        size = operator(rows, *head, *rest).nbytes
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        operator(rows, *head, *rest)
        assert torch.cuda.max_memory_allocated() - before <= size + 512


@needs_cuda_kernel
@pytest.mark.large_memory
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_experts_past_two_to_the_32_values(dtype):
    E, N, K, blocksize = 9, 16384, 32768, 4096
    packed = torch.randint(256, (E * N * K // 2, 1), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(E * N * K // blocksize, device="cuda") + 0.5
    counts = (1, 0, 0, 0, 1, 0, 0, 0, 2)
    A, gradient = (torch.randn(4, size, device="cuda", dtype=dtype) for size in (K, N))
    stack = (packed, [E, N, K], absmax, blocksize, "nf4", ends(counts, "cuda"))

    y = torch.ops.bitsandbytes.gemm_4bit_grouped(A, *stack)
    x = torch.ops.bitsandbytes.gemm_4bit_grouped_transposed(gradient, *stack)

    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows, blocks = slice(start, start + count), N * K // blocksize
        own = absmax[expert * blocks : (expert + 1) * blocks]
        codes = packed[expert * N * K // 2 : (expert + 1) * N * K // 2]
        weight = torch.ops.bitsandbytes.dequantize_4bit(codes, own, blocksize, "nf4", [N, K], torch.float32)
        for result, operand, matrix in ((y, A, weight.t()), (x, gradient, weight)):
            expected = operand[rows].float() @ matrix
            error = (result[rows].float() - expected).norm() / expected.norm()
            assert error <= torch.finfo(dtype).eps + 1e-5
        start += count
