"""Products with a packed 4-bit weight against float64: every dtype, layout, storage and number of rows."""

from __future__ import annotations

import math

import pytest
import torch

from bitsandbytes import functional as F
from oracles import (
    FLOAT_DTYPES,
    QUANT_TYPES,
    STORAGE_DTYPES,
    product_error,
)
from shapes import LAYOUTS, MATMUL_SHAPES, in_layout

# A GPU says so where rows end inside a block; the results are what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:The inner dimension")


def product_bound(dtype: torch.dtype, K: int) -> float:
    """Norm-wise error of a product: weight and result round once; float32 sums K products."""
    return torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * (4 + math.sqrt(K))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("problem", MATMUL_SHAPES, ids=str)
def test_gemv_against_float64(device, problem, quant_type, dtype, nested):
    M, N, K = problem
    weight = torch.randn(N, K, device=device, dtype=dtype) / math.sqrt(K)
    A = torch.randn(M, K, device=device, dtype=dtype)
    packed, state = F.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
    state.dtype = torch.float32

    result = F.gemv_4bit(A, packed, state=state)

    assert result.dtype == dtype and result.shape == (M, N)
    assert product_error(result, A, F.dequantize_4bit(packed, state)) <= product_bound(dtype, K)


@pytest.mark.parametrize("storage", STORAGE_DTYPES, ids=str)
def test_gemv_reads_bytes_whatever_their_shape_and_storage(device, storage):
    weight, A = torch.randn(32, 64, device=device), torch.randn(2, 3, 64, device=device)
    packed, state = F.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
    expected = F.gemv_4bit(A, *F.quantize_4bit(weight, quant_type="nf4")[:1], state=state)

    assert expected.shape == (2, 3, 32)
    for held in (packed, packed.t(), packed.view(-1)):
        assert torch.equal(F.gemv_4bit(A, held, state=state), expected)
    assert torch.equal(F.gemv_4bit(A, packed, transposed_A=True, transposed_B=True, state=state), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gemv_takes_activations_in_any_layout(device, layout):
    A = torch.randn(5, 64, device=device)
    packed, state = F.quantize_4bit(torch.randn(32, 64, device=device), quant_type="nf4")

    torch.testing.assert_close(
        F.gemv_4bit(in_layout(layout, A), packed, state=state), F.gemv_4bit(A, packed, state=state)
    )


@pytest.mark.parametrize("layout", ["plain", "strided"])
def test_gemv_writes_to_out(device, layout):
    A = torch.randn(1, 64, device=device)
    packed, state = F.quantize_4bit(torch.randn(32, 64, device=device), quant_type="fp4")
    poisoned = torch.full((1, 32), torch.nan, device=device)
    out = poisoned if layout == "plain" else in_layout(layout, poisoned)

    result = F.gemv_4bit(A, packed, out=out, state=state)

    assert result is out
    assert torch.equal(out, F.gemv_4bit(A, packed, state=state))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 256])
def test_identity_weight_reproduces_the_input(device, dim, dtype, quant_type):
    A = torch.randn(3, dim, device=device, dtype=dtype)
    packed, state = F.quantize_4bit(torch.eye(dim, device=device, dtype=dtype), quant_type=quant_type)

    torch.testing.assert_close(F.gemv_4bit(A, packed, state=state), A)


def gemm(A, packed, state, bias=None):
    """The operator with the arguments a state gives it."""
    arguments = (A, packed, list(state.shape))
    if not state.nested:
        return torch.ops.bitsandbytes.gemm_4bit(
            *arguments, state.absmax, state.blocksize, state.quant_type, bias
        )
    second = (state.absmax, state.state2.code, state.offset)
    return torch.ops.bitsandbytes.gemm_4bit(
        *arguments, state.state2.absmax, state.blocksize, state.quant_type, bias, *second
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("problem", [*MATMUL_SHAPES, (3, 600, 64), (200, 48, 320)], ids=str)
def test_gemm_against_float64(device, problem, quant_type, dtype, nested):
    M, N, K = problem
    weight = torch.randn(N, K, device=device) / math.sqrt(K)
    packed, state = F.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
    A, bias = torch.randn(M, K, device=device).to(dtype), torch.randn(N, device=device).to(dtype)
    decoded = F.dequantize_4bit(packed, state)

    for with_bias in (None, bias):
        result = gemm(A, packed, state, with_bias)
        assert result.dtype == dtype and result.shape == (M, N)
        assert product_error(result, A, decoded, with_bias) <= product_bound(dtype, K)


@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_gemm_takes_any_leading_dimensions(device, lead):
    packed, state = F.quantize_4bit(torch.randn(33, 64, device=device), quant_type="nf4")
    A = torch.randn(*lead, 64, device=device)

    result = gemm(A, packed, state)

    assert result.shape == (*lead, 33)
    torch.testing.assert_close(result.view(-1, 33), gemm(A.reshape(-1, 64), packed, state))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gemm_takes_activations_in_any_layout(device, layout):
    A = torch.randn(5, 64, device=device)
    packed, state = F.quantize_4bit(torch.randn(32, 64, device=device), quant_type="nf4")

    torch.testing.assert_close(gemm(in_layout(layout, A), packed, state), gemm(A, packed, state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gemm_takes_an_offset_of_another_dtype(device, dtype):
    """Files loaded under a 16-bit default dtype hold such offsets; they mean their float32 value."""
    packed, state = F.quantize_4bit(
        torch.randn(600, 64, device=device), quant_type="nf4", compress_statistics=True
    )
    A = torch.randn(2, 64, device=device)
    state.offset = state.offset.to(dtype)
    result = gemm(A, packed, state)

    state.offset = state.offset.float()

    assert torch.equal(result, gemm(A, packed, state))


# Mean error over sqrt(dim) and its spread, for dim up to 512 and beyond.
GEMV_ACCEPTANCE = {
    torch.float16: ((5.2e-5, 6.3e-6), (1.8e-5, 2.8e-6)),
    torch.float32: ((2e-8, 2e-9), (1e-8, 2e-9)),
    torch.bfloat16: ((4.2e-4, 5.9e-5), (1.4e-4, 9.5e-6)),
}


@pytest.mark.parametrize("dim", [128, 512, 1024])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_gemv_is_as_accurate_as_dequantize_and_linear(device, quant_type, dtype, dim):
    A = torch.randn(1, dim, device=device, dtype=dtype)
    weight = (torch.randn(4 * dim, dim, device=device) / math.sqrt(dim)).to(dtype)
    packed, state = F.quantize_4bit(weight, quant_type=quant_type)

    error = F.gemv_4bit(A, packed, state=state) - torch.nn.functional.linear(
        A, F.dequantize_4bit(packed, state)
    )

    mean, spread = GEMV_ACCEPTANCE[dtype][dim > 512]
    assert error.abs().double().mean().item() / math.sqrt(dim) < mean + 7 * spread


# --- errors ---------------------------------------------------------------------------------------------------


def test_gemv_needs_a_state(device):
    with pytest.raises(ValueError, match="state cannot be None"):
        F.gemv_4bit(torch.ones(1, 64, device=device), torch.ones(32, 1, dtype=torch.uint8, device=device))


def test_gemv_names_an_inner_dimension_that_does_not_match(device):
    packed, state = F.quantize_4bit(torch.randn(32, 64, device=device))

    with pytest.raises((ValueError, RuntimeError), match=r"A inner dim \(32\)"):
        F.gemv_4bit(torch.ones(1, 32, device=device), packed, state=state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_gemv_names_an_unsupported_dtype(device, dtype):
    if dtype == torch.float64 and device == "mps":
        pytest.skip("mps has no float64")
    packed, state = F.quantize_4bit(torch.randn(32, 64, device=device))

    with pytest.raises(ValueError, match="A must be float16, bfloat16, or float32"):
        F.gemv_4bit(torch.ones(1, 64, device=device).to(dtype), packed, state=state)
