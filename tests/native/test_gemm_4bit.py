"""Products with a 4-bit weight on every instruction set of this machine, against float64.

Sums differ in order between instruction sets and between the kernels for few and for many rows, so results are not
compared bit for bit; with the number of threads they must not change at all.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitsandbytes import _native, functional as F
from bitsandbytes._formats.table import BLOCKSIZES, FLOAT_DTYPES, FORMATS

# N, K, blocksize. K: whole blocks; whole words with blocks that cross rows; less than one word; odd; more than the
# kernels take at a time, and an odd multiple of 64 of that. N: less than a vector, odd, more than a panel.
SHAPES = [
    (16, 128, 32),
    (37, 96, 32),
    (130, 256, 64),
    (64, 320, 4096),
    (5, 520, 64),
    (70, 8, 32),
    (33, 1000, 128),
    (19, 77, 64),
    (1, 1, 32),
    (66, 4, 64),
    (9, 4480, 64),
    (131, 1216, 64),
    (3, 8256, 4096),
]
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 70]


class Weight:
    """A packed weight with random codes, its scales nested or not, and what it decodes to."""

    def __init__(self, N: int, K: int, blocksize: int, code: Tensor, nested: bool = False) -> None:
        self.shape, self.blocksize, self.code = (N, K), blocksize, code
        blocks = -(N * K // -blocksize)
        codes = torch.randint(16, (N * K + N * K % 2,), dtype=torch.uint8)
        self.packed = codes[0::2] << 4 | codes[1::2]
        self.scales = [torch.rand(blocks) + 0.5, None, None, None]
        scales = self.scales[0]
        if nested:
            quantized, state = F.quantize_blockwise(scales - 1.0, blocksize=256)
            self.scales = [state.absmax, quantized, state.code, torch.ones(1)]
            scales = F.dequantize_blockwise(quantized, state) + 1.0
        expanded = scales.repeat_interleave(blocksize)[: N * K].double()
        self.decoded = (code.double()[codes[: N * K].int()] * expanded).view(N, K)

    def multiply(self, library, A: Tensor, bias: Tensor | None = None, threads: int = 1) -> Tensor:
        N, K = self.shape
        out = torch.full((A.shape[0] + 1, N), math.nan, dtype=A.dtype)
        arguments = (A, _native.DTYPE_ID[A.dtype], self.packed, *self.scales, self.code, bias, out)
        library.bnb_cpu_gemm_4bit(*map(address, arguments), A.shape[0], N, K, self.blocksize, threads)
        assert out[-1].isnan().all(), "wrote past the end"
        return out[:-1]

    def multiply_transposed(self, library, A: Tensor, threads: int = 1) -> Tensor:
        N, K = self.shape
        out = torch.full((A.shape[0] + 1, K), math.nan, dtype=A.dtype)
        arguments = (A, _native.DTYPE_ID[A.dtype], self.packed, *self.scales, self.code, out)
        library.bnb_cpu_gemm_4bit_transposed(
            *map(address, arguments), A.shape[0], N, K, self.blocksize, threads
        )
        assert out[-1].isnan().all(), "wrote past the end"
        return out[:-1]


def address(value):
    return value.data_ptr() if isinstance(value, Tensor) else value


def streams_integers(name: str, dtype: torch.dtype, M: int) -> bool:
    """Whether that variant rounds activations to a fraction of the largest of 64, and codes of the largest code."""
    return name == "avx2" and dtype != torch.float32 and M <= 2


def nf4() -> Tensor:
    return torch.tensor(FORMATS["nf4"].values)


def assert_close(
    result: Tensor, expected: Tensor, what: object, bias: Tensor | None = None, usual: float = 0.0
) -> None:
    """Norm-wise: weights and results round once in the activations' dtype; float32 sums. A bias may cancel a product.

    Few results may all be small by chance, and say little of the sums behind them: ``usual`` is what their norm would be.
    """
    eps = torch.finfo(result.dtype).eps
    size = expected.norm().clamp_min(usual) + (
        0.0 if bias is None else bias.double().expand_as(expected).norm()
    )
    expected = expected if bias is None else expected + bias.double()
    error = (result.double() - expected).norm() / size.clamp_min(1e-300)
    assert error <= eps + 1e-6, (what, error)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("problem", SHAPES, ids=str)
def test_product_is_the_decoded_one_for_any_number_of_rows(variants, problem, dtype, nested):
    weight = Weight(*problem, nf4(), nested)
    N, K = weight.shape
    for name, library in variants.items():
        for M in ROWS if name != "neon" else ROWS[::4]:  # an emulator is slow
            A, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
            expected = A.double() @ weight.decoded.T
            usual = float(A.double().norm() * weight.decoded.norm()) / K**0.5
            assert_close(weight.multiply(library, A), expected, (name, M), usual=usual)
            assert_close(weight.multiply(library, A, bias, 2), expected, (name, M, "bias"), bias, usual)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("problem", SHAPES, ids=str)
def test_transposed_product_is_the_decoded_one(variants, problem, dtype, nested):
    weight = Weight(*problem, nf4(), nested)
    for name, library in variants.items():
        for M in (1, 2, 7, 33):
            A = torch.randn(M, weight.shape[0]).to(dtype)
            usual = float(A.double().norm() * weight.decoded.norm()) / weight.shape[0] ** 0.5
            result = weight.multiply_transposed(library, A, 2)
            assert_close(result, A.double() @ weight.decoded, (name, M), usual=usual)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_large_problems_meet_the_bound_of_their_dtype(variants, dtype):
    """Long sums and more rows than share one decoded panel."""
    weight = Weight(200, 2112, 64, nf4())
    bound = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 1e-5}[dtype]
    for M in (1, 4, 16, 100, 600):
        A, B = torch.randn(M, 2112).to(dtype), torch.randn(M, 200).to(dtype)
        forward, transposed = A.double() @ weight.decoded.T, B.double() @ weight.decoded
        for name, library in variants.items():
            if name == "neon" and M > 16:  # an emulator is slow
                continue
            for result, expected in (
                (weight.multiply(library, A), forward),
                (weight.multiply_transposed(library, B), transposed),
            ):
                error = (result.double() - expected).norm() / expected.norm()
                assert error <= bound, (name, M, float(error))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("M", [1, 5, 12])
def test_any_codebook_and_block_size(variants, M, blocksize):
    weight = Weight(40, 4224, blocksize, torch.randn(16) * torch.logspace(-3, 3, 16))
    for dtype in FLOAT_DTYPES[: 1 if M > 1 else None]:
        A = torch.randn(M, 4224).to(dtype) / 1000
        for name, library in variants.items():
            assert_close(weight.multiply(library, A), A.double() @ weight.decoded.T, name)


@pytest.mark.parametrize(("K", "blocksize"), [(320, 64), (96, 32), (77, 64)])
@pytest.mark.parametrize("M", [1, 2, 8, 12])
@pytest.mark.parametrize("smallest", [-38, -6])
def test_one_activation_finds_the_exact_float_of_its_code(variants, smallest, M, K, blocksize):
    """Each code of a row by itself, so that none is taken for another and no bit of an entry is lost."""
    code = torch.randn(16) * torch.logspace(smallest, 3, 16)
    weight = Weight(40, K, blocksize, code)
    for name, library in variants.items():
        for k in torch.randperm(K).split(M) if name != "neon" else [torch.arange(M)]:  # an emulator is slow
            A = torch.zeros(M, K)
            A[range(len(k)), k] = 1.0
            expected = weight.decoded.T[k].float()  # a product of two floats, rounded once
            assert torch.equal(weight.multiply(library, A)[: len(k)], expected), (name, k)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 8, 12, 40])
def test_one_weight_finds_the_exact_float_of_its_activation(variants, M, dtype):
    code = torch.zeros(16)
    code[5] = 1.0
    weight = Weight(100, 320, 64, code)
    weight.packed.zero_()
    weight.scales[0].fill_(1.0)
    where = torch.randint(320, (100,))
    at = torch.arange(100) * 320 + where
    weight.packed[at // 2] = torch.where(at % 2 == 0, 0x50, 0x05).to(torch.uint8)
    A = (torch.randn(M, 320) * torch.exp2(torch.randint(-20, 10, (M, 320)).float())).to(dtype)
    G = A[:, :100].contiguous()
    gradient = torch.zeros(M, 320, dtype=torch.float64).index_add_(1, where, G.double()).to(dtype)
    once = where.bincount(minlength=320) <= 1
    for name, library in variants.items():
        if streams_integers(name, dtype, M):
            largest = A.float().view(M, 5, 64).abs().amax(2).repeat_interleave(64, dim=1)[:, where]
            error = (weight.multiply(library, A) - A[:, where]).abs()
            assert (error <= largest * 2**-14 + A[:, where].abs() * torch.finfo(dtype).eps).all(), name
            large = A[:, where].abs() >= largest * 2**-5  # bits that both round to are the same
            assert dtype == torch.float16 or error[large].eq(0).all(), name
        else:
            assert torch.equal(weight.multiply(library, A), A[:, where]), name
        assert torch.equal(weight.multiply_transposed(library, G)[:, once], gradient[:, once]), name


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 4, 12])
@pytest.mark.parametrize("outlier", [3.0, 30.0, 1000.0, 60000.0])
@pytest.mark.parametrize("outliers", [1, 2, 20])
def test_large_activations_leave_the_bits_of_the_others(variants, outliers, outlier, M, dtype):
    """Weights that are zero where an activation is large, so that only the others are in the result."""
    weight = Weight(300, 640, 64, nf4())
    columns = torch.cat([64 * block + torch.randperm(64)[:outliers] for block in range(10)])
    at = (torch.arange(300)[:, None] * 640 + columns).flatten()
    for part, keep, zero in ((at[at % 2 == 0], 0x0F, 0x70), (at[at % 2 == 1], 0xF0, 0x07)):
        weight.packed[part // 2] = weight.packed[part // 2] & keep | zero
    weight.decoded[:, columns] = 0.0
    A = torch.randn(M, 640).to(dtype)
    A[:, columns] = outlier
    for name, library in variants.items():
        assert_close(weight.multiply(library, A), A.double() @ weight.decoded.T, name)


@pytest.mark.parametrize("M", [1, 2, 4])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-25, 1e-13, 1e-11, 1e20, 1e25, 1e30])
def test_small_and_large_activations_beside_zeros(variants, size, M):
    weight = Weight(100, 320, 64, nf4())
    A = (torch.randn(M, 320) * size).to(torch.bfloat16)
    A[:, 64:128] = 0.0
    for name, library in variants.items():
        assert_close(weight.multiply(library, A), A.double() @ weight.decoded.T, name)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 4, 12, 40])
def test_the_ends_of_the_range(variants, M, dtype):
    """The largest values, infinities and NaN among activations and scales: nothing else overflows or becomes NaN."""
    weight = Weight(128, 128, 64, torch.linspace(0.1, 1.0, 16) / 256)
    A = torch.rand(M, 128).to(dtype)
    A[0, 3] = torch.finfo(dtype).max
    A[-1, 5], A[M // 2, 7] = math.inf, -torch.finfo(dtype).max
    if M > 4:
        A[3] = math.nan
    for infinite in (False, True):
        if infinite:
            weight.scales[0][21] = math.inf  # half of row 10
            weight.decoded[10, 64:] = math.inf
        sizes = weight.decoded.nan_to_num(0, 0, 0).abs()
        for multiply, W, size in (
            (weight.multiply, weight.decoded.T, sizes.T),
            (weight.multiply_transposed, weight.decoded, sizes),
        ):
            expected, size = A.double() @ W, A.double().nan_to_num(0, 0, 0).abs() @ size
            bound = (2 * torch.finfo(dtype).eps + 128 * torch.finfo(torch.float32).eps) * size
            for name, library in variants.items():
                result = multiply(library, A).double()
                assert torch.equal(result.isnan(), expected.isnan()), (name, infinite)
                assert torch.equal(result.isinf(), expected.isinf()), (name, infinite)
                finite = expected.isfinite()
                assert ((result - expected).abs() <= bound)[finite].all(), (name, infinite)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 4, 12])
def test_infinities_and_nan_of_a_codebook_reach_their_outputs_only(variants, M, dtype):
    code = nf4()
    code[3], code[9] = math.inf, math.nan
    weight = Weight(2000, 32, 32, code)
    A = torch.ones(M, 32, dtype=dtype)
    expected = A.double() @ weight.decoded.T
    assert expected.isnan().any() and expected.isinf().any() and expected.isfinite().any()
    for name, library in variants.items():
        result = weight.multiply(library, A)
        assert torch.equal(result.isnan(), expected.isnan()), name
        assert torch.equal(result.isinf(), expected.isinf()), name


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(variants, dtype):
    weight = Weight(700, 640, 64, nf4())
    for M in (1, 3, 8, 70):
        A, B = torch.randn(M, 640).to(dtype), torch.randn(M, 700).to(dtype)
        for name, library in variants.items():
            for threads in (2, 3, 64):
                one, other = weight.multiply(library, A), weight.multiply(library, A, None, threads)
                assert torch.equal(one, other), (name, M, threads)
                one, other = (weight.multiply_transposed(library, B, t) for t in (1, threads))
                assert torch.equal(one, other), (name, M, threads)


@pytest.mark.parametrize("problem", SHAPES, ids=str)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(variants, problem):
    """In how many tiles rows are multiplied, and how large each is, depends on how many there are.

    Not where there are so few that other kernels multiply them.
    """
    weight = Weight(*problem, nf4())
    A = torch.randn(40, weight.shape[1])
    for name, library in variants.items():
        many = weight.multiply(library, A)
        for M in (10, 13, 16):
            assert torch.equal(weight.multiply(library, A[:M].clone()), many[:M]), (name, M)


def test_a_row_of_nan_leaves_other_rows_alone(variants):
    weight = Weight(40, 256, 64, nf4())
    for M in (3, 9, 40):
        A = torch.randn(M, 256)
        A[1] = math.nan
        for name, library in variants.items():
            result = weight.multiply(library, A)
            assert result[1].isnan().all(), name
            assert_close(result[2:], A[2:].double() @ weight.decoded.T, name)


@pytest.mark.parametrize(("M", "N", "K"), [(0, 4, 64), (2, 0, 64), (3, 4, 0)])
def test_empty_products(variants, M, N, K):
    bias = torch.randn(N)
    weight = Weight(N, K, 64, nf4())
    for library in variants.values():
        assert torch.equal(weight.multiply(library, torch.randn(M, K), bias), bias.expand(M, N))
        assert torch.equal(weight.multiply_transposed(library, torch.randn(M, N)), torch.zeros(M, K)) or N
