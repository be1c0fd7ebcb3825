"""The CUDA kernels of the 4-bit and block-wise operators: equal to plain torch, on any size, stream and graph."""

from __future__ import annotations

import warnings

import pytest
import torch

import oracles
from bitsandbytes import _ops
from bitsandbytes._native import has_native
from bitsandbytes.backends.cuda.gemm_4bit import _gemm_4bit_use_custom_fn
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, get_4bit_type, quantize_4bit

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_native("bnb_cuda_gemm_4bit"),
    reason="needs an NVIDIA GPU and the CUDA library",
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]

# Of the relative norm. What is decoded first rounds the weight as well and the sum before the bias; float32 may be TF32.
FUSED_TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 2e-3}
DENSE_TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 2e-3}


def values_of(n: int, dtype: torch.dtype, kind: str) -> torch.Tensor:
    """Values on the GPU, of every magnitude or with what no quantizer likes."""
    x = torch.randn(n, device="cuda")
    if kind == "tiny":
        x *= 1e-39
    elif kind == "wide":
        x *= torch.logspace(-30, 30, n, device="cuda")
    elif kind == "special" and n:
        for value in (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38):
            x[torch.randint(n, (1 + n // 500,), device="cuda")] = value
        x[: n // 4] = 0.0
    return x.to(dtype)


def sizes_of(blocksize: int) -> list[int]:
    return [
        1,
        2,
        blocksize - 1,
        blocksize,
        blocksize + 1,
        3 * blocksize + 7,
        37 * blocksize,
        40 * blocksize + 1,
    ]


def assert_equal_bits(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        oracles.assert_same_bytes(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_4bit_equals_plain_torch(quant_type, blocksize, dtype):
    for n in sizes_of(blocksize):
        for kind in ("normal", "tiny", "wide", "special"):
            A = values_of(n, dtype, kind)
            arguments = (A, blocksize, quant_type, torch.uint8)

            expected = _ops.quantize_4bit.run_with("default", *arguments)

            assert_equal_bits(torch.ops.bitsandbytes.quantize_4bit(*arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [*BLOCKSIZES, 48])
def test_quantize_blockwise_equals_plain_torch(blocksize, dtype):
    maps = [create_dynamic_map(), create_dynamic_map(signed=False), torch.linspace(-1, 1, 256)]
    maps.append(torch.cat([torch.zeros(100), torch.linspace(-1e-7, 1, 156)]).sort().values)
    for code in maps:
        for n in sizes_of(blocksize):
            for kind in ("normal", "tiny", "special"):
                arguments = (values_of(n, dtype, kind), code.cuda(), blocksize)

                expected = _ops.quantize_blockwise.run_with("default", *arguments)

                assert_equal_bits(torch.ops.bitsandbytes.quantize_blockwise(*arguments), expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_values_on_and_beside_thresholds_take_the_same_codes(quant_type):
    """Every float within a few steps of a threshold, on both sides of zero."""
    values = get_4bit_type(quant_type, "cuda").sort().values
    middle = (values[1:] + values[:-1]) / 2
    steps = torch.arange(-40, 41, device="cuda", dtype=torch.int32)
    near = (middle.view(torch.int32).unsqueeze(1) + steps).view(torch.float32)
    A = torch.cat([near, torch.ones(near.shape[0], 128 - near.shape[1] % 128, device="cuda")], dim=1).reshape(
        -1
    )
    arguments = (A, 128, quant_type, torch.uint8)

    assert_equal_bits(
        torch.ops.bitsandbytes.quantize_4bit(*arguments), _ops.quantize_4bit.run_with("default", *arguments)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_memory_is_quantized_alike(dtype):
    for offset in (1, 3, 7):
        A = values_of(5000, dtype, "normal")[offset:]

        packed, absmax = torch.ops.bitsandbytes.quantize_4bit(A, 64, "nf4", torch.uint8)
        expected = _ops.quantize_4bit.run_with("default", A.clone(), 64, "nf4", torch.uint8)
        assert_equal_bits((packed, absmax), expected)

        code = create_dynamic_map().cuda()
        codes = torch.ops.bitsandbytes.quantize_blockwise(A, code, 64)
        expected = _ops.quantize_blockwise.run_with("default", A.clone(), code, 64)
        assert_equal_bits(codes, expected)
        held = torch.zeros(offset + A.numel(), dtype=torch.uint8, device="cuda")[offset:]
        torch.ops.bitsandbytes.quantize_blockwise.out(
            A, code, 64, held, statistics := torch.zeros_like(codes[1])
        )
        assert_equal_bits((held, statistics), expected)

        held = torch.cat([packed.new_zeros(offset, 1), packed])[offset:]
        decoded = torch.ops.bitsandbytes.dequantize_4bit(held, absmax, 64, "nf4", A.shape, dtype)
        expected = _ops.dequantize_4bit.run_with("default", packed, absmax, 64, "nf4", A.shape, dtype)
        oracles.assert_same_bytes(decoded, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize_equals_plain_torch(blocksize, dtype):
    code = create_dynamic_map().cuda()
    for n in sizes_of(blocksize):
        packed = torch.randint(256, ((n + 1) // 2, 1), dtype=torch.uint8, device="cuda")
        codes = torch.randint(256, (n,), dtype=torch.uint8, device="cuda")
        absmax = values_of(-(n // -blocksize), torch.float32, "special")
        for quant_type in ("nf4", "fp4"):
            arguments = (packed, absmax, blocksize, quant_type, (n,), dtype)
            expected = _ops.dequantize_4bit.run_with("default", *arguments)
            oracles.assert_same_bytes(torch.ops.bitsandbytes.dequantize_4bit(*arguments), expected)
        arguments = (codes, absmax, code, blocksize, dtype)
        expected = _ops.dequantize_blockwise.run_with("default", *arguments)
        oracles.assert_same_bytes(torch.ops.bitsandbytes.dequantize_blockwise(*arguments), expected)


# --- the matmul -------------------------------------------------------------------------------------------------


class Weight:
    """A quantized random weight, decoded by plain torch, and the operator's arguments for it."""

    def __init__(self, N, K, blocksize=64, quant_type="nf4", nested=False):
        self.shape = (N, K)
        self.packed, self.state = quantize_4bit(
            torch.randn(N, K, device="cuda") / K**0.5,
            blocksize=blocksize,
            quant_type=quant_type,
            compress_statistics=nested,
        )
        self.values = dequantize_4bit(self.packed, self.state).double()

    def gemm(self, A, bias=None):
        state = self.state
        arguments = (state.absmax, state.blocksize, state.quant_type, bias)
        if state.nested:
            arguments = (state.state2.absmax, *arguments[1:], state.absmax, state.state2.code, state.offset)
        return torch.ops.bitsandbytes.gemm_4bit(A, self.packed, self.shape, *arguments)

    def exact(self, A, bias=None):
        product = A.double() @ self.values.t()
        return product if bias is None else product + bias.double()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 16, 17, 32, 33, 100])
def test_matmul_is_as_exact_as_its_dtype(M, dtype, nested):
    for N, K in ((256, 512), (1000, 1024), (17, 64), (3, 4096), (2112, 1088)):
        weight = Weight(N, K, nested=nested)
        allowed = FUSED_TOLERANCE[dtype] * (
            2 if M * N < 1000 else 1
        )  # few results' roundings do not average out
        A = torch.randn(M, K, device="cuda", dtype=dtype)
        bias = torch.randn(N, device="cuda", dtype=dtype)

        for added in (None, bias):
            exact = weight.exact(A, added)
            # Few results may all be small by chance, and say little of the sums behind them.
            usual = (A.double().norm(dim=1, keepdim=True) * weight.values.norm(dim=1)).norm() / K**0.5
            error = (weight.gemm(A, added).double() - exact).norm()
            assert error < allowed * max(exact.norm(), usual)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_matmul_takes_every_format_and_block_size(blocksize, quant_type, nested):
    for N, K in ((144, 4096), (50, 8192)):
        weight = Weight(N, K, blocksize, quant_type, nested)
        for M in (1, 12, 31):
            A = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)

            assert oracles.relative_error(weight.gemm(A), weight.exact(A)) < 6e-3


def test_matmul_writes_every_element_and_nothing_else():
    weight = Weight(133, 576)
    for M in (1, 8, 20):
        A = torch.randn(M, 576, device="cuda", dtype=torch.float16)
        code = get_4bit_type("nf4", "cuda")
        held = torch.full((M + 2, 133), float("nan"), device="cuda", dtype=torch.float16)
        arguments = (A, weight.packed, weight.shape, weight.state.absmax, code, 64)

        torch.ops.bitsandbytes.gemv_4bit.out(*arguments, out=held[1 : M + 1])

        assert held[0].isnan().all() and held[-1].isnan().all()
        assert oracles.relative_error(held[1 : M + 1], weight.exact(A)) < 1e-3


def test_any_codebook_multiplies():
    code = torch.randn(16, device="cuda")
    packed = torch.randint(256, (320 * 256 // 2, 1), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(320 * 256 // 64, device="cuda") + 0.5
    nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).view(320, 256)
    weight = code[nibbles.int()].double() * absmax.view(320, 4).repeat_interleave(64, dim=1)
    for dtype in (torch.bfloat16, torch.float16):
        A = torch.randn(3, 256, device="cuda", dtype=dtype)

        product = torch.ops.bitsandbytes.gemv_4bit(A, packed, (320, 256), absmax, code, 64)

        assert oracles.relative_error(product, A.double() @ weight.t()) < 4e-3


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tuning_computes_the_same_product(dtype, nested):
    """Shapes that the plan would not choose here are compiled too."""
    tried = 0
    for N, K, blocksize in (
        (1200, 2304, 64),
        (515, 4096, 64),
        (64, 64, 64),
        (4096, 1024, 256),
        (333, 576, 64),
    ):
        weight = Weight(N, K, nested=nested, blocksize=blocksize)
        for M in (1, 8, 13, 32, 61, 128, 150):
            A = torch.randn(M, K, device="cuda", dtype=dtype)
            allowed = FUSED_TOLERANCE[dtype] * (2 if M * N < 1000 else 1)
            for tuning in (*range(32), -2):
                out = _product(A, weight, tuning)
                if out is None:
                    continue
                tried += 1
                assert oracles.relative_error(out, weight.exact(A)) < allowed, (tuning, M, N, K)
                again = _product(A, weight, tuning)
                assert torch.equal(out, again), (tuning, M, N, K)
    assert tried > 100


def _product(A, weight, tuning):
    """``A @ weight.T`` by one tuning into poisoned memory; None if that does not take it."""
    from bitsandbytes._native import DTYPE_ID, FORMAT_ID, lib, ptr, stream_of

    state, (M, K), N = weight.state, A.shape, weight.shape[0]
    inner = state.state2 if state.nested else None
    scales = (
        (ptr(state.absmax), None, None, None)
        if inner is None
        else (ptr(inner.absmax), ptr(state.absmax), ptr(inner.code), ptr(state.offset))
    )
    out = torch.full((M, N), float("nan"), device="cuda", dtype=A.dtype)
    problem = (DTYPE_ID[A.dtype], M, N, K, state.blocksize)
    multiprocessors = torch.cuda.get_device_properties(A.device).multi_processor_count
    size = lib.bnb_cuda_gemm_4bit_workspace(*problem, tuning, multiprocessors)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
    head = (ptr(A), DTYPE_ID[A.dtype], ptr(weight.packed), *scales, None, FORMAT_ID["nf4"], None, ptr(out))
    try:
        lib.bnb_cuda_gemm_4bit(*head, M, N, K, state.blocksize, tuning, ptr(workspace), stream_of(A))
    except ValueError:
        return None
    return out


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_planned_for_large_layers_is_as_exact(dtype, nested):
    for N, K in ((4096, 4096), (14336 + 8, 2048 + 64)):
        weight = Weight(N, K, nested=nested)
        for M in (16, 24, 31, 64, 130, 256, 300, 500, 513, 700, 1000, 1024, 1100):
            A = torch.randn(M, K, device="cuda", dtype=dtype)
            fused = _gemm_4bit_use_custom_fn(A.device.index, dtype, M, N, K)
            allowed = (FUSED_TOLERANCE if fused else DENSE_TOLERANCE)[dtype]
            assert oracles.relative_error(weight.gemm(A), weight.exact(A)) < allowed, (M, N, K)


def test_repeated_products_are_bit_equal():
    weight = Weight(4096, 4096)
    for M in (1, 16, 32, 64, 200, 1024):
        A = torch.randn(M, 4096, device="cuda", dtype=torch.bfloat16)
        first = weight.gemm(A)
        for _ in range(20):
            assert torch.equal(weight.gemm(A), first)


def test_activations_may_lie_anyhow():
    weight = Weight(96, 256)
    A = torch.randn(2, 3, 512, device="cuda", dtype=torch.bfloat16)
    strided, shifted = A[..., ::2], A.view(-1)[3 : 3 + 256]
    assert oracles.relative_error(weight.gemm(strided), weight.exact(strided)) < 3e-3
    assert oracles.relative_error(weight.gemm(shifted), weight.exact(shifted)) < 3e-3
    assert weight.gemm(strided).shape == (2, 3, 96) and weight.gemm(shifted).shape == (96,)


def test_blocks_across_rows_warn_and_still_multiply():
    weight = Weight(64, 96)
    A = torch.randn(2, 96, device="cuda", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="inner dimension.*falling back to slower implementation"):
        product = weight.gemm(A)
    assert oracles.relative_error(product, weight.exact(A)) < 4e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Weight(64, 128).gemm(torch.randn(2, 128, device="cuda", dtype=torch.bfloat16))


@pytest.mark.parametrize("M", [1, 16, 64])
@pytest.mark.parametrize("nested", [False, True])
def test_a_captured_graph_replays_with_new_inputs(M, nested):
    weight = Weight(512, 1024, nested=nested)
    A = torch.randn(M, 1024, device="cuda", dtype=torch.bfloat16)
    weight.gemm(A)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = weight.gemm(A)
        second = weight.gemm(A * 2)
    A.copy_(torch.randn_like(A))
    graph.replay()

    assert oracles.relative_error(first, weight.exact(A)) < 3e-3
    assert torch.equal(second, 2 * first)


def test_kernels_wait_for_what_wrote_their_inputs():
    """Activations, weight and statistics made by the kernel just before, many times over, on a stream of its own."""
    stream = torch.cuda.Stream()
    weight = Weight(2048, 4096)
    inputs = [torch.randn(4, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    expected = [weight.gemm(A) for A in inputs]
    packed, absmax = weight.packed.clone(), weight.state.absmax.clone()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(10):
            for A, wanted in zip(inputs, expected, strict=True):
                torch.cuda._sleep(20000)
                held = A + 0
                packed.zero_()
                absmax.zero_()
                absmax.copy_(weight.state.absmax)
                packed.copy_(weight.packed)
                product = torch.ops.bitsandbytes.gemm_4bit(held, packed, weight.shape, absmax, 64, "nf4")
                assert torch.equal(product, wanted)


def test_chained_products_see_their_predecessors_results():
    """Each launch may begin before the last has ended; what it reads is that one's result all the same."""
    weights = [Weight(1024, 1024) for _ in range(4)]
    A = torch.randn(2, 1024, device="cuda", dtype=torch.bfloat16)
    for _ in range(50):
        x, y = A, A
        for weight in weights:
            x = weight.gemm(x)
        for weight in weights:
            y = weight.gemm(y)
            torch.cuda.synchronize()
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_symbols_of_earlier_releases_multiply(dtype):
    from bitsandbytes.functional import get_ptr, lib

    suffix = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    for N, K, blocksize in ((320, 512, 64), (64, 96, 32)):
        weight = Weight(N, K, blocksize)
        A = torch.randn(1, K, device="cuda", dtype=dtype)
        out = torch.empty(1, N, device="cuda", dtype=dtype)
        stream = torch.cuda.current_stream().cuda_stream
        code = weight.state.code
        packed, absmax = get_ptr(weight.packed), get_ptr(weight.state.absmax)

        naive = getattr(lib, f"cgemm_4bit_inference_naive_{suffix}")
        naive(
            N, 1, K, get_ptr(A), packed, absmax, get_ptr(code), get_ptr(out), N, K // 2, N, blocksize, stream
        )
        assert oracles.relative_error(out, weight.exact(A)) < 2 * FUSED_TOLERANCE[dtype]

        gemm = getattr(lib, f"cgemm_4bit_{suffix}")
        gemm(get_ptr(A), packed, absmax, None, None, None, get_ptr(out), None, 1, N, K, blocksize, 2, stream)
        assert oracles.relative_error(out, weight.exact(A)) < 2 * FUSED_TOLERANCE[dtype]


def test_symbols_of_earlier_releases_quantize():
    from bitsandbytes.functional import get_ptr, lib

    A = values_of(1000, torch.bfloat16, "normal")
    expected = torch.ops.bitsandbytes.quantize_4bit(A, 64, "nf4", torch.uint8)
    packed, absmax = torch.zeros_like(expected[0]), torch.zeros_like(expected[1])
    torch.cuda.synchronize()
    lib.cquantize_blockwise_bf16_nf4(None, get_ptr(A), get_ptr(absmax), get_ptr(packed), 64, 1000)
    torch.cuda.synchronize()

    assert_equal_bits((packed, absmax), expected)
