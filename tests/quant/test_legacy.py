"""The historic functions: exact integer matmuls, tensor- and vector-wise quantization, quantiles.

Oracles are float64 or integer arithmetic on the CPU, so every device is held to the same numbers.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes.autograd._functions import MatMul8bit, matmul_cublas

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")

INT8_MAPS = {"signed": lambda: F.create_dynamic_map(), "fp8": lambda: F.create_fp8_map(True, 4, 3, 8)}


def random_int8(*shape: int, device: str) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8).to(device)


def exact_product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return torch.matmul(A.cpu().long(), B.cpu().long())


# --- deprecation -----------------------------------------------------------------------------------------------

DEPRECATED_CALLS = {
    "igemm": lambda x: F.igemm(x, x),
    "batched_igemm": lambda x: F.batched_igemm(x[None], x[None]),
    "check_matmul": lambda x: F.check_matmul(x, x, None, False, False),
    "quantize": lambda x: F.quantize(x.float()),
    "dequantize": lambda x: F.dequantize(x.view(torch.uint8), absmax=torch.tensor(1.0)),
    "quantize_no_absmax": lambda x: F.quantize_no_absmax(x.float(), F.create_dynamic_map()),
    "dequantize_no_absmax": lambda x: F.dequantize_no_absmax(x.view(torch.uint8), F.create_dynamic_map()),
    "estimate_quantiles": lambda x: F.estimate_quantiles(x.float()),
    "create_quantile_map": lambda x: F.create_quantile_map(x.float()),
    "vectorwise_quant": lambda x: F.vectorwise_quant(x.float()),
    "vectorwise_mm_dequant": lambda x: F.vectorwise_mm_dequant(x, torch.ones(16, 1), torch.ones(1, 16)),
    "vectorwise_dequant": lambda x: F.vectorwise_dequant(x, torch.ones(16, 1)),
    "get_colrow_absmax": lambda x: F.get_colrow_absmax(x.half()),
    "get_row_absmax": lambda x: F.get_row_absmax(x.half()),
    "double_quant": lambda x: F.double_quant(x.half()),
    "transform": lambda x: F.transform(x, "col32"),
    "get_special_format_str": lambda x: F.get_special_format_str(),
    "coo_zeros": lambda x: F.coo_zeros(2, 2, 1, "cpu"),
    "pipeline_test": lambda x: F.pipeline_test(x, 4),
}


@pytest.mark.parametrize("name", DEPRECATED_CALLS)
def test_a_historic_function_warns_once_and_works(name):
    with pytest.warns(FutureWarning, match=f"^{name} is deprecated") as caught:
        DEPRECATED_CALLS[name](torch.zeros(16, 16, dtype=torch.int8))
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning points at the caller"


def test_low_level_helpers_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.fill(torch.zeros(3), 1.0)
        F._mul(torch.ones(3), torch.ones(3))
        F.COOSparseTensor(
            1, 1, 0, *(torch.zeros(0, dtype=torch.int32) for _ in range(2)), torch.zeros(0).half()
        )


# --- integer matmuls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [
        ((5, 7), (7, 3)),
        ((1, 1), (1, 1)),
        ((64, 96), (96, 32)),
        ((2, 5, 7), (7, 3)),
        ((2, 5, 7), (2, 7, 3)),
        ((4, 2100), (2100, 4)),
        ((0, 7), (7, 3)),
    ],
)
@pytest.mark.parametrize(("transposed_A", "transposed_B"), [*itertools.product([False, True], repeat=2)])
def test_igemm_is_exact(device, shape_a, shape_b, transposed_A, transposed_B):
    A, B = random_int8(*shape_a, device=device), random_int8(*shape_b, device=device)
    expected = exact_product(A, B)
    given_A = A.transpose(-1, -2).contiguous() if transposed_A else A
    given_B = B.transpose(-1, -2).contiguous() if transposed_B else B

    result = F.igemm(given_A, given_B, transposed_A=transposed_A, transposed_B=transposed_B)

    assert result.dtype == torch.int32
    assert torch.equal(result.cpu().long(), expected)


def test_igemm_accepts_strided_views(device):
    A, B = random_int8(7, 5, device=device).t(), random_int8(3, 14, device=device)[:, ::2].t()
    assert torch.equal(F.igemm(A, B).cpu().long(), exact_product(A, B))


def test_igemm_does_not_lose_large_sums(device):
    A = torch.full((1, 4096), -128, dtype=torch.int8, device=device)
    assert F.igemm(A, A.t()).item() == 4096 * 128 * 128


def test_igemm_contracts_batch_and_sequence_into_out(device):
    A, B = random_int8(3, 5, 7, device=device), random_int8(3, 5, 4, device=device)
    out = torch.zeros(7, 4, dtype=torch.int32, device=device)

    assert F.igemm(A, B, out=out) is out

    expected = torch.einsum("bsi,bso->io", A.cpu().long(), B.cpu().long())
    assert torch.equal(out.cpu().long(), expected)


def test_igemm_writes_out(device):
    A, B = random_int8(5, 7, device=device), random_int8(7, 3, device=device)
    out = torch.empty(5, 3, dtype=torch.int32, device=device)
    assert F.igemm(A, B, out=out) is out
    assert torch.equal(out.cpu().long(), exact_product(A, B))


def test_batched_igemm_is_exact(device):
    A, B = random_int8(3, 5, 7, device=device), random_int8(3, 7, 4, device=device)
    assert torch.equal(F.batched_igemm(A, B).cpu().long(), exact_product(A, B))


def test_integer_matmuls_reject_what_does_not_fit():
    int8 = torch.zeros(4, 5, dtype=torch.int8)
    with pytest.raises(TypeError, match="int8"):
        F.igemm(int8.float(), int8)
    with pytest.raises(ValueError, match="Tensor dimensions incorrect"):
        F.igemm(int8, int8)
    with pytest.raises(ValueError, match="bsi,bso->io"):
        F.igemm(int8[None], int8[None])
    with pytest.raises(ValueError, match="Expected 3-dimensional tensors for bmm"):
        F.batched_igemm(int8, int8.t())
    with pytest.raises(ValueError, match="Tensor dimensions incorrect"):
        F.check_matmul(int8, int8.t(), torch.zeros(3, 3), False, False)


def test_check_matmul_tells_the_size():
    A, B = torch.zeros(2, 3, 4, dtype=torch.int8), torch.zeros(4, 6, dtype=torch.int8)
    assert F.check_matmul(A, B, None, False, False) == (2, 3, 6)
    assert F.check_matmul(A[0], B, None, False, False) == (3, 6)
    assert F.check_matmul(A[0], B.t(), None, False, True) == (3, 6)
    assert F.check_matmul(A, A, torch.zeros(4, 4), False, False) == (4, 4)
    assert F.check_matmul(A.float(), B.float(), None, False, False, torch.float32) == (2, 3, 6)


@pytest.mark.parametrize("quant_type", ["vector", "row", "linear", "truncated-vector"])
def test_int8_matmul_of_the_first_generation_is_close(device, quant_type):
    A, B = torch.randn(2, 32, 48, device=device), torch.randn(48, 24, device=device)
    A.requires_grad_()
    B.requires_grad_()

    out = MatMul8bit.apply(A, B, None, quant_type)
    G = torch.randn_like(out)
    out.backward(G)

    bound = 0.35 if quant_type == "truncated-vector" else 0.04
    exact_A, exact_B, exact_G = A.detach().double(), B.detach().double(), G.double()
    for result, exact in (
        (out.detach(), exact_A @ exact_B),
        (A.grad, exact_G @ exact_B.t()),
        (B.grad, torch.einsum("bmk,bmn->kn", exact_A, exact_G)),
    ):
        assert (result.double() - exact).norm() <= bound * exact.norm()


def test_matmul_cublas_leaves_the_product_exact_at_other_precisions():
    A, B = torch.randn(4, 6), torch.randn(6, 3)
    assert torch.equal(matmul_cublas(A, B, precision=[32, 32, 32]), A @ B)


# --- elementwise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_fill_sets_every_element(device, dtype):
    values = torch.zeros(3, 5, dtype=dtype, device=device)
    F.fill(values, 7)
    assert (values == 7).all()


def test_mul_and_arange_work_in_place(device):
    values = torch.zeros(6, device=device)
    F.arange(values)
    F._mul(values, torch.full_like(values, 2.0))
    assert values.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


@pytest.mark.parametrize(("name", "dtype"), [("fill", torch.float16), ("cosine", torch.float32)])
def test_unknown_elementwise_function_is_named(name, dtype):
    with pytest.raises(NotImplementedError, match=f"Function not implemented: {name}"):
        F.elementwise_func(name, torch.zeros(2, dtype=dtype), None, 0.0)


# --- one scale for a tensor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", INT8_MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (17, 31), (0,)])
def test_quantize_takes_the_nearest_entry(device, code, dtype, shape):
    code = INT8_MAPS[code]().to(device)
    A = torch.randn(shape, device=device).to(dtype)

    indices, (absmax, kept) = F.quantize(A, code)
    restored = F.dequantize(indices, (absmax, kept))

    assert indices.dtype == torch.uint8 and indices.shape == A.shape
    assert absmax.dtype == torch.float32 and absmax.dim() == 0
    assert restored.dtype == torch.float32
    if A.numel():
        assert absmax == A.float().abs().max()
        exact = A.cpu().double().reshape(-1, 1) / absmax.cpu().double()
        best = (exact - code.cpu().double()).abs().min(dim=1).values
        chosen = (exact.squeeze(1) - code.cpu().double()[indices.cpu().long().reshape(-1)]).abs()
        assert (chosen <= best + 1e-7).all()


def test_quantize_survives_zeros(device):
    indices, state = F.quantize(torch.zeros(5, device=device))
    assert (F.dequantize(indices, state) == 0).all()


def test_quantize_fills_out(device):
    A, out = torch.randn(8, device=device), torch.empty(8, dtype=torch.uint8, device=device)
    indices, state = F.quantize(A, out=out)
    assert indices is out
    restored = torch.empty(8, device=device)
    assert F.dequantize(indices, state, out=restored) is restored


def test_dequantize_needs_a_scale():
    with pytest.raises(AssertionError, match="state or absmax"):
        F.dequantize(torch.zeros(2, dtype=torch.uint8))


def test_no_absmax_pair_is_a_table_look_up(device):
    code = F.create_dynamic_map().to(device)
    indices = F.quantize_no_absmax(code, code)
    assert torch.equal(code[indices.long()], code)
    assert torch.equal(F.dequantize_no_absmax(indices, code), code)


def test_a_tie_takes_the_lower_entry(device):
    code = torch.linspace(-1, 1, 256, device=device).mul(128).round().div(128)
    code[-1] = 1.0
    middle = (code[100] + code[101]) / 2
    assert F.quantize_no_absmax(middle.view(1), code).item() == 100


# --- quantiles -------------------------------------------------------------------------------------------------


def quantiles_oracle(values: torch.Tensor, offset: float, count: int) -> torch.Tensor:
    chunk = min(values.numel(), 4096)
    rows = values.cpu().double()[: values.numel() // chunk * chunk].view(-1, chunk).sort(dim=1).values
    columns = [round((offset + i * (1 - 2 * offset) / 255) * (chunk - 1)) for i in range(256)]
    result = rows[:, columns].mean(dim=0)
    return result if count == 256 else result[[int(i * 255 / (count - 1)) for i in range(count)]]


@pytest.mark.parametrize("numel", [256, 1000, 4096, 4097, 3 * 4096])
@pytest.mark.parametrize("count", [256, 16, 255])
def test_quantiles_are_averaged_order_statistics(device, numel, count):
    values = torch.rand(numel, device=device)
    offset = 1 / 512 if count == 256 else 1 / (2 * count)

    result = F.estimate_quantiles(values, num_quantiles=count)

    assert result.dtype == torch.float32 and result.shape == (count,)
    # A position may round either way; neighbouring order statistics of a uniform sample are close.
    torch.testing.assert_close(
        result.cpu().double(), quantiles_oracle(values, offset, count), atol=0.05, rtol=0
    )
    if numel > 4096:
        torch.testing.assert_close(
            result.cpu(),
            torch.quantile(values.cpu(), torch.linspace(offset, 1 - offset, count)),
            atol=0.1,
            rtol=0,
        )


def test_quantiles_of_too_few_values_are_refused():
    with pytest.raises(NotImplementedError, match="256"):
        F.estimate_quantiles(torch.rand(255))
    with pytest.raises(NotImplementedError, match="256"):
        F.estimate_quantiles(torch.rand(512), num_quantiles=257)


@pytest.mark.parametrize("total_bits", [4, 8])
def test_quantile_map_is_a_map(device, total_bits):
    table = F.create_quantile_map(torch.randn(8192, device=device), total_bits)
    assert table.shape == (256,) and table.abs().max() == 1
    assert (table.diff() >= 0).all()
    assert table.unique().numel() == 2**total_bits


def test_histogram_accumulates_repeated_cells(device):
    histogram = torch.zeros(4, 4, device=device)
    index1 = torch.tensor([0, 1, 1, 3], dtype=torch.int32, device=device)
    index2 = torch.tensor([2, 1, 1, 0], dtype=torch.int32, device=device)
    F.histogram_scatter_add_2d(histogram, index1, index2, torch.tensor([1.0, 2.0, 3.0, 4.0], device=device))
    assert histogram[0, 2] == 1 and histogram[1, 1] == 5 and histogram[3, 0] == 4 and histogram.sum() == 10


# --- vector-wise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["vector", "row", "linear"])
@pytest.mark.parametrize("dim", [0, 1])
def test_vectorwise_quant_rounds_to_the_nearest(device, quant_type, dim):
    x = torch.randn(13, 17, device=device)
    x[2] = 0
    q, largest = F.vectorwise_quant(x, dim, quant_type)

    exact = x.cpu().double()
    expected = exact.abs().max() if quant_type == "linear" else exact.abs().amax(dim=dim, keepdim=True)
    assert q.dtype == torch.int8
    assert torch.equal(largest.cpu().double(), expected)
    assert ((exact * 127 / expected.clamp(min=1e-30) - q.cpu().double()).abs() <= 0.5 + 1e-4).all()


def test_truncated_vectors_clip(device):
    x = torch.tensor([[1.0, 0.6, -1.0, 0.0]], device=device)
    q, largest = F.vectorwise_quant(x, 1, "truncated-vector")
    assert largest.item() == pytest.approx(0.7)
    assert q.tolist() == [[127, 109, -127, 0]]


@pytest.mark.parametrize("quant_type", ["zeropoint", "vector-zeropoint", "row-zeropoint"])
def test_zeropoint_uses_the_whole_range(device, quant_type):
    x = torch.rand(9, 33, device=device) + 2
    grid, steps = F.vectorwise_quant(x, 1, quant_type)
    assert torch.equal(grid, grid.round())
    assert (grid.amax(dim=1) - grid.amin(dim=1) <= 256).all()
    torch.testing.assert_close(grid / steps, x, atol=1 / 255, rtol=0)


def test_zeropoint_of_a_constant_is_finite(device):
    grid, steps = F.vectorwise_quant(torch.full((2, 3), 5.0, device=device), 1, "zeropoint")
    assert steps == 255 and (grid == 5 * 255).all()


def test_unknown_quant_type_gives_none():
    assert F.vectorwise_quant(torch.ones(2, 2), quant_type="other") is None
    assert F.vectorwise_dequant(torch.ones(2, 2), torch.ones(2, 1), quant_type="other") is None
    assert F.vectorwise_mm_dequant(torch.ones(1, 1), torch.ones(1), torch.ones(1), quant_type="other") is None


@pytest.mark.parametrize("quant_type", ["vector", "linear", "zeropoint"])
def test_vectorwise_product_is_close(device, quant_type):
    A, B = torch.rand(32, 64, device=device) - 0.4, torch.rand(64, 16, device=device) - 0.4
    q_A, scale_A = F.vectorwise_quant(A, 1, quant_type)
    q_B, scale_B = F.vectorwise_quant(B, 0, quant_type)
    product = q_A.cpu().double() @ q_B.cpu().double()
    result = F.vectorwise_mm_dequant(product.float().to(device), scale_A, scale_B, torch.float32, quant_type)
    exact = A.cpu().double() @ B.cpu().double()
    assert (result.cpu().double() - exact).norm() <= 0.02 * exact.norm()


def test_vectorwise_dequant_inverts_vectorwise_quant(device):
    x = torch.randn(5, 40, device=device)
    q, largest = F.vectorwise_quant(x)
    error = (F.vectorwise_dequant(q, largest) - x).abs()
    assert (error <= largest / 254 * 1.001).all()


def test_min_max_product_adds_the_offset(device):
    A, B = torch.rand(6, 40, device=device) + 3, torch.randn(5, 40, device=device)
    low = A.amin(dim=1, keepdim=True)
    half = (A.amax(dim=1, keepdim=True) - low) / 2
    q_A = ((A - low - half) / half * 127).round().to(torch.int8)
    q_B, scale_B = F.vectorwise_quant(B, 1)
    product = F.igemm(q_A, q_B.t())
    result = F.dequant_min_max(product, q_A, B, (low, half), scale_B.t(), torch.float32)
    torch.testing.assert_close(result, A @ B.t(), atol=0.3, rtol=0.02)


# --- statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_absmax_leaves_outliers_out(device, threshold):
    A = torch.randn(12, 20, device=device).half()
    A[3, 4], A[7, 0] = 9.0, -2.0
    exact = A.cpu().double().abs()
    mask = exact >= threshold if threshold else torch.zeros_like(exact, dtype=torch.bool)

    rows, columns, outliers = F.get_colrow_absmax(A, threshold=threshold)

    assert torch.equal(rows.cpu().double(), exact.masked_fill(mask, 0).amax(dim=1))
    assert torch.equal(columns.cpu().double(), exact.masked_fill(mask, 0).amax(dim=0))
    assert outliers is None if not threshold else torch.equal(outliers.cpu(), mask)
    assert torch.equal(F.get_row_absmax(A, threshold), rows)


def test_double_quant_returns_the_outliers_as_a_sparse_matrix(device):
    A = torch.randn(6, 10, device=device).half()
    A[1, 3], A[4, 3], A[5, 9] = 7.0, -8.0, 6.0
    by_row, by_column, rows, columns, outliers = F.double_quant(A, threshold=6.0)

    expected = torch.ops.bitsandbytes.int8_double_quant(A, 6.0)
    for result, reference in zip((by_row, by_column, rows, columns), expected[:4], strict=True):
        assert torch.equal(result, reference)
    assert outliers.nnz == 3
    dense = torch.zeros(6, 10, dtype=torch.float16)
    dense[outliers.rowidx.cpu().long(), outliers.colidx.cpu().long()] = outliers.values.cpu()
    assert torch.equal(dense, torch.where(A.cpu().abs() >= 6, A.cpu(), 0))
    assert F.double_quant(A)[4] is None
    with pytest.raises(ValueError, match="out_row must be None"):
        F.double_quant(A, out_row=by_row)
