"""LLM.int8(): rows and columns to int8, exact integer products, outlier columns kept apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

import oracles
from bitsandbytes import functional as F
from oracles import FLOAT_DTYPES, assert_same_bytes, golden, relative_error
from shapes import LAYOUTS, in_layout


def with_outliers(
    rows: int, columns: int, dtype: torch.dtype = torch.float16, device: str = "cpu"
) -> torch.Tensor:
    """Normal values with three outliers of at least 6 in two columns, and a row of zeros."""
    A = torch.randn(rows, columns).clamp(-4, 4)
    A[1, 3], A[rows - 1, 3], A[0, columns - 1] = 7.5, -6.0, 12.0
    A[2] = 0.0
    return A.to(dtype).to(device)


def assert_same_int8(actual: torch.Tensor, expected: torch.Tensor, device: str) -> None:
    """Exact on the CPU; a GPU may divide approximately: off by one at most, in one value of 500."""
    assert actual.dtype == torch.int8 and actual.shape == expected.shape
    difference = (actual.cpu().int() - expected.int()).abs()
    if device == "cpu":
        assert difference.max() == 0 if difference.numel() else True
    else:
        assert difference.max() <= 1
        assert int((difference > 0).sum()) <= max(1, expected.numel() // 500)


# --- published vectors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, 6, 3])
def test_published_rows(device, threshold):
    arrays = golden("int8")

    q, row_stats, columns = F.int8_vectorwise_quant(arrays["A"].to(device), threshold=float(threshold))

    assert_same_int8(q, arrays[f"t{threshold}.q"], device)
    assert_same_bytes(row_stats, arrays[f"t{threshold}.row_stats"])
    if threshold:
        assert_same_bytes(columns, arrays[f"t{threshold}.outlier_cols"])
    else:
        assert columns is None


def test_published_weight(device):
    arrays = golden("int8")

    CB, SCB, _ = F.int8_vectorwise_quant(arrays["W"].to(device))

    assert_same_int8(CB, arrays["CB"], device)
    assert_same_bytes(SCB, arrays["SCB"])
    dequantized = F.int8_vectorwise_dequant(arrays["CB"].to(device), arrays["SCB"].to(device))
    torch.testing.assert_close(dequantized.cpu(), arrays["CB_dequant_f32"], rtol=2.4e-7, atol=0)


def test_published_products(device):
    arrays = {name: value.to(device) for name, value in golden("int8").items()}

    acc = F.int8_linear_matmul(arrays["t0.q"], arrays["CB"])

    assert_same_bytes(acc, arrays["t0.acc_i32"])
    scales = (arrays["t0.row_stats"], arrays["SCB"])
    for key, bias in (("t0.mm_dequant_f16", None), ("t0.mm_dequant_bias_f16", arrays["bias"])):
        values = F.int8_mm_dequant(acc, *scales, bias=bias)
        assert values.dtype == torch.float16
        torch.testing.assert_close(values, arrays[key], rtol=1e-3, atol=1e-6 if bias is None else 1e-3)
    scaled = torch.ops.bitsandbytes.int8_scaled_mm(arrays["t0.q"], arrays["CB"], *scales, None, torch.float32)
    torch.testing.assert_close(scaled, arrays["t0.scaled_mm_f32"], rtol=3e-5, atol=1e-6)


def test_published_mixed_product(device):
    arrays = {name: value.to(device) for name, value in golden("int8").items()}

    result, outliers = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        arrays["A"],
        arrays["t6.q"],
        arrays["CB"],
        arrays["t6.row_stats"],
        arrays["SCB"],
        arrays["t6.outlier_cols"],
        arrays["bias"],
    )

    assert result.dtype == torch.float16
    torch.testing.assert_close(result, arrays["t6.mixed_out_f16"], atol=2e-2, rtol=1e-2)
    assert_same_bytes(outliers, arrays["t6.subA"].cpu())


def test_gpu_vectors(device):
    arrays = {
        name.removeprefix("int8/"): v
        for name, v in golden("cuda/quant_cuda").items()
        if name.startswith("int8/")
    }

    for threshold in (0, 6):
        q, stats, columns = F.int8_vectorwise_quant(arrays["in"].to(device), threshold=float(threshold))
        assert_same_int8(q, arrays[f"t{threshold}_q"], "a GPU made the expected values")
        torch.testing.assert_close(stats.cpu(), arrays[f"t{threshold}_stats"], rtol=0, atol=0)
        if threshold:
            assert columns.tolist() == arrays["t6_cols"].tolist()
    acc = F.int8_linear_matmul(arrays["t0_q"].to(device), arrays["B"].to(device))
    assert_same_bytes(acc, arrays["mm"])
    values = F.int8_mm_dequant(
        acc, arrays["t0_stats"].to(device), arrays["col_stats"].to(device), bias=arrays["bias"].to(device)
    )
    torch.testing.assert_close(values.cpu(), arrays["mm_dequant"], rtol=2e-3, atol=2e-3)


# --- rows ------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 70),
    dtype=st.sampled_from(FLOAT_DTYPES),
    threshold=st.sampled_from([0.0, 0.5, 2.0, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_rows_against_the_oracle(device, rows, columns, dtype, threshold, seed):
    A = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)

    q, row_stats, outliers = F.int8_vectorwise_quant(A, threshold=threshold)

    expected, absmax, expected_columns = oracles.int8_rows(A, threshold)
    assert_same_int8(q, expected, device)
    assert_same_bytes(row_stats, absmax)
    if threshold:
        assert outliers.dtype == torch.int64
        assert outliers.tolist() == expected_columns.tolist()
    else:
        assert outliers is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_outliers_do_not_count_in_their_rows_absmax(device, dtype):
    A = with_outliers(6, 40, dtype, device)

    q, row_stats, columns = F.int8_vectorwise_quant(A, threshold=6.0)

    assert columns.tolist() == [3, 39]
    assert (q[:, [3, 39]] == 0).all()
    assert (row_stats <= 4.0).all()
    assert row_stats[2].item() == 0.0 and (q[2] == 0).all()
    kept = [k for k in range(40) if k not in (3, 39)]
    assert q[:, kept].abs().max() == 127


def test_other_elements_of_outlier_columns_count(device):
    A = torch.tensor([[1.0, 8.0], [1.0, 4.0]], dtype=torch.float16, device=device)

    q, row_stats, columns = F.int8_vectorwise_quant(A, threshold=6.0)

    assert columns.tolist() == [1]
    assert row_stats.tolist() == [1.0, 4.0]
    assert q.tolist() == [[127, 0], [32, 0]]


def test_the_threshold_itself_is_an_outlier(device):
    A = torch.tensor([[6.0, 5.996, 1.0]], dtype=torch.float16, device=device)

    _, row_stats, columns = F.int8_vectorwise_quant(A, threshold=6.0)

    assert columns.tolist() == [0]
    assert row_stats.item() == A[0, 1].item()


def test_no_outliers_give_an_empty_list(device):
    _, _, columns = F.int8_vectorwise_quant(
        torch.randn(3, 8, device=device, dtype=torch.float16), threshold=100.0
    )

    assert columns.shape == (0,) and columns.dtype == torch.int64


def test_all_outliers_give_zeros(device):
    q, row_stats, columns = F.int8_vectorwise_quant(
        torch.full((3, 4), 9.0, device=device).half(), threshold=6.0
    )

    assert (q == 0).all() and (row_stats == 0).all()
    assert columns.tolist() == [0, 1, 2, 3]


def test_input_is_left_alone(device):
    A = with_outliers(5, 16, device=device)
    before = A.clone()

    F.int8_vectorwise_quant(A, threshold=6.0)
    F.int8_double_quant(A, threshold=6.0)

    assert torch.equal(A, before)


def test_read_only_input_is_accepted():
    """An expanded tensor cannot be written to element by element."""
    A = torch.randn(1, 16).half().expand(4, 16)

    q, _, _ = F.int8_vectorwise_quant(A, threshold=1.0)

    assert torch.equal(q[0], q[3])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(device, layout):
    A = with_outliers(6, 40, device=device)

    for threshold in (0.0, 6.0):
        for expected, actual in zip(
            F.int8_vectorwise_quant(A, threshold=threshold),
            F.int8_vectorwise_quant(in_layout(layout, A), threshold=threshold),
            strict=True,
        ):
            assert expected is actual is None or torch.equal(expected, actual)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_dequantized_rows_are_within_half_a_step(device, dtype):
    A = torch.randn(20, 65, device=device).to(dtype)

    q, row_stats, _ = F.int8_vectorwise_quant(A)
    values = F.int8_vectorwise_dequant(q, row_stats)

    assert values.dtype == torch.float32
    # Six float32 roundings on the way there and back, each 2^-24 of up to 127 steps: 9e-5 of half a step.
    assert ((values - A.float()).abs() <= row_stats[:, None] / 254 * (1 + 1e-4)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(device, value):
    A = torch.randn(4, 16, device=device, dtype=torch.float16)
    expected, expected_stats, _ = F.int8_vectorwise_quant(A)
    A[1, 5] = value

    q, row_stats, _ = F.int8_vectorwise_quant(A)

    kept = [0, 2, 3]
    assert torch.equal(q[kept], expected[kept]) and torch.equal(row_stats[kept], expected_stats[kept])
    assert not row_stats[1].isfinite()


@pytest.mark.parametrize("scale", [1e-7, 6e4])
def test_smallest_and_largest_halves(device, scale):
    A = (torch.rand(5, 33) * scale).half().to(device)

    q, row_stats, _ = F.int8_vectorwise_quant(A)

    expected, absmax, _ = oracles.int8_rows(A)
    assert_same_int8(q, expected, device)
    assert_same_bytes(row_stats, absmax)


@pytest.mark.parametrize("shape", [(0, 8), (0, 1)], ids=str)
def test_no_rows(device, shape):
    q, row_stats, columns = F.int8_vectorwise_quant(
        torch.empty(shape, device=device, dtype=torch.float16), 6.0
    )

    assert q.shape == shape and row_stats.shape == (0,) and columns.shape == (0,)
    assert F.int8_vectorwise_dequant(q, row_stats).shape == shape


# --- rows and columns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_double_quant_against_the_oracle(device, threshold, dtype):
    A = with_outliers(17, 35, dtype, device)

    q_row, q_col, row_stats, col_stats, columns = F.int8_double_quant(A, threshold=threshold)

    expected, absmax, expected_columns = oracles.int8_rows(A, threshold)
    assert_same_int8(q_row, expected, device)
    assert_same_bytes(row_stats, absmax)
    expected, absmax = oracles.int8_columns(A, threshold)
    assert_same_int8(q_col, expected, device)
    assert_same_bytes(col_stats, absmax)
    assert (
        (columns is None or columns.numel() == 0)
        if threshold == 0
        else torch.equal(columns.cpu(), expected_columns)
    )


def test_double_quant_keeps_the_columns_of_outliers(device):
    """Only the outlier elements are zero in the column-wise result."""
    A = with_outliers(6, 40, device=device)

    _, q_col, _, col_stats, _ = F.int8_double_quant(A, threshold=6.0)

    assert q_col[1, 3] == 0 and q_col[5, 3] == 0 and q_col[0, 39] == 0
    assert (q_col[:, 3] != 0).any()
    assert col_stats[3] < 6.0


def test_double_quant_of_large_halves_does_not_overflow(device):
    A = torch.full((2, 4), 6e4, dtype=torch.float16, device=device)

    q_row, q_col, row_stats, col_stats, _ = F.int8_double_quant(A)

    assert (q_row == 127).all() and (q_col == 127).all()
    assert row_stats.isfinite().all() and col_stats.isfinite().all()


@pytest.mark.parametrize("name", ["col_stats", "row_stats", "out_col", "out_row"])
def test_double_quant_takes_no_preallocated_results(device, name):
    with pytest.raises(ValueError, match=rf"{name} must be None"):
        F.int8_double_quant(torch.ones(2, 4, device=device).half(), **{name: torch.ones(2, device=device)})


# --- products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [(1, 1, 1), (2, 3, 5), (17, 33, 65), (4, 24, 64), (31, 48, 100)], ids=str)
def test_products_are_exact(device, problem):
    M, N, K = problem
    A = torch.randint(-128, 128, (M, K), dtype=torch.int8, device=device)
    B = torch.randint(-128, 128, (N, K), dtype=torch.int8, device=device)

    result = F.int8_linear_matmul(A, B)

    assert result.dtype == torch.int32
    assert torch.equal(result.cpu().long(), oracles.int8_matmul(A, B))


@pytest.mark.parametrize("K", [1024, 1025, 4097, 131_071])
@pytest.mark.parametrize("pattern", ["largest", "odd"])
def test_long_products_are_exact_beyond_what_float32_holds(device, K, pattern):
    """Sums above 2**24 need integers; (-128)² · 131071 just fits 32 bits."""
    value = -128 if pattern == "largest" else 127
    A = torch.full((2, K), value, dtype=torch.int8, device=device)
    B = torch.full((3, K), value, dtype=torch.int8, device=device)
    B[1, ::2] = 1
    B[2] = torch.randint(-128, 128, (K,), dtype=torch.int8)

    assert torch.equal(F.int8_linear_matmul(A, B).cpu().long(), oracles.int8_matmul(A, B))


def test_products_of_batches(device):
    A = torch.randint(-127, 128, (2, 5, 48), dtype=torch.int8, device=device)
    B = torch.randint(-127, 128, (24, 48), dtype=torch.int8, device=device)

    result = F.int8_linear_matmul(A, B, dtype=torch.float32)

    assert result.shape == (2, 5, 24) and result.dtype == torch.int32
    assert torch.equal(result.cpu().long(), oracles.int8_matmul(A, B))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_of_any_layout(device, layout):
    A = torch.randint(-127, 128, (6, 48), dtype=torch.int8, device=device)
    B = torch.randint(-127, 128, (24, 48), dtype=torch.int8, device=device)

    result = F.int8_linear_matmul(in_layout(layout, A), in_layout(layout, B))

    assert torch.equal(result, F.int8_linear_matmul(A, B))


@pytest.mark.parametrize("layout", ["plain", "strided", "transposed"])
def test_products_go_where_the_caller_wants_them(device, layout):
    A = torch.randint(-127, 128, (6, 48), dtype=torch.int8, device=device)
    B = torch.randint(-127, 128, (24, 48), dtype=torch.int8, device=device)
    poisoned = torch.full((6, 24), -7, dtype=torch.int32, device=device)
    out = poisoned if layout == "plain" else in_layout(layout, poisoned)

    result = F.int8_linear_matmul(A, B, out=out)

    assert result is out
    assert torch.equal(out.cpu().long(), oracles.int8_matmul(A, B))


def test_product_errors_name_the_argument(device):
    A = torch.ones(2, 8, dtype=torch.int8, device=device)

    for a, b, message in (
        (A.float(), A, "A must be int8"),
        (A, A.float(), "B must be int8"),
        (A, A[0], "Only two.*dimensional"),
        (A, A[:, :4], "Inner dimensions do not match"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            F.int8_linear_matmul(a, b)
    with pytest.raises(ValueError, match="out must be int32"):
        F.int8_linear_matmul(A, A, out=torch.empty(2, 2, device=device))
    with pytest.raises(ValueError, match=r"(?i)expected.*shape"):
        F.int8_linear_matmul(A, A, out=torch.empty(2, 3, dtype=torch.int32, device=device))


def test_empty_products(device):
    A = torch.empty(0, 8, dtype=torch.int8, device=device)
    B = torch.ones(3, 8, dtype=torch.int8, device=device)

    assert F.int8_linear_matmul(A, B).shape == (0, 3)
    assert (F.int8_linear_matmul(B[:, :0], B[:, :0]) == 0).all()


# --- scaling products ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_dtype", [None, *FLOAT_DTYPES], ids=str)
@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24)], ids=str)
def test_scaled_products_against_float64(device, shape, bias_dtype):
    acc = torch.randint(-(2**20), 2**20, shape, dtype=torch.int32, device=device)
    rows, cols = torch.rand(acc.numel() // 24, device=device) * 3, torch.rand(24, device=device) * 3
    bias = None if bias_dtype is None else torch.randn(24, device=device).to(bias_dtype)

    result = F.int8_mm_dequant(acc, rows, cols, bias=bias)

    assert result.dtype == torch.float16 and result.shape == shape
    assert relative_error(result, oracles.int8_mm_dequant(acc, rows, cols, bias)) < 2**-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_large_scaled_products_do_not_pass_through_float16(device, dtype):
    acc = torch.full((2, 3), 2**30, dtype=torch.int32, device=device)
    scale = torch.full((3,), 50.0, device=device)

    result = torch.ops.bitsandbytes.int8_mm_dequant(acc, scale[:2], scale, dtype)

    assert result.dtype == dtype
    assert relative_error(result, oracles.int8_mm_dequant(acc, scale[:2], scale)) < torch.finfo(dtype).eps


def test_scaled_products_round_once(device):
    """A bias added after a first rounding to float16 would be lost."""
    acc = torch.full((1, 1), 16129, dtype=torch.int32, device=device)
    row, col = torch.tensor([2048.0], device=device), torch.tensor([1.0], device=device)

    result = F.int8_mm_dequant(acc, row, col, bias=torch.tensor([1.5], device=device))

    assert result.item() == 2050.0  # 2049.5; 2048 + 1.5 in float16 would be 2050 too, 2048 + 1 would not
    assert F.int8_mm_dequant(acc, row, col, bias=torch.tensor([0.75], device=device)).item() == 2048.0


def test_scaled_products_go_where_the_caller_wants_them(device):
    acc = torch.randint(-1000, 1000, (5, 24), dtype=torch.int32, device=device)
    rows, cols = torch.rand(5, device=device), torch.rand(24, device=device)
    out = torch.full((24, 5), torch.nan, dtype=torch.float16, device=device).t()

    result = F.int8_mm_dequant(acc, rows, cols, out=out)

    assert result is out
    assert torch.equal(out, F.int8_mm_dequant(acc, rows.view(5, 1), cols.view(1, 24)))


def test_scaling_errors_name_the_argument(device):
    acc = torch.ones(2, 3, dtype=torch.int32, device=device)
    rows, cols = torch.ones(2, device=device), torch.ones(3, device=device)

    for arguments, message in (
        ((acc.float(), rows, cols), "A must be int32"),
        ((acc, rows.half(), cols), "row_stats must be float32"),
        ((acc, rows, cols.half()), "col_stats must be float32"),
        ((acc, cols, cols), "row_stats must have 2 values"),
        ((acc, rows, rows), "col_stats must have 3 values"),
    ):
        with pytest.raises(ValueError, match=message):
            F.int8_mm_dequant(*arguments)
    with pytest.raises(ValueError, match="bias must have 3 values"):
        F.int8_mm_dequant(acc, rows, cols, bias=rows)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool], ids=str)
def test_quantizing_what_is_no_float_is_refused(device, dtype):
    for function in (F.int8_vectorwise_quant, F.int8_double_quant):
        with pytest.raises(ValueError, match="A must be a floating point tensor"):
            function(torch.ones(2, 4, device=device).to(dtype))


def test_negative_threshold_is_refused(device):
    with pytest.raises(ValueError, match="non-negative"):
        F.int8_vectorwise_quant(torch.ones(2, 4, device=device).half(), threshold=-1.0)


def test_dequantizing_needs_int8_and_a_scale_a_row(device):
    with pytest.raises((ValueError, RuntimeError), match="A must be int8"):
        F.int8_vectorwise_dequant(torch.ones(2, 4, device=device), torch.ones(2, device=device))
    with pytest.raises((ValueError, RuntimeError), match="stats"):
        F.int8_vectorwise_dequant(
            torch.ones(2, 4, device=device, dtype=torch.int8), torch.ones(3, device=device)
        )


# --- the whole way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [(32, 32, 32), (7, 33, 65), (64, 96, 128)], ids=str)
def test_int8_product_is_close_to_the_float_one(device, problem):
    M, N, K = problem
    A, B = torch.randn(M, K, device=device).half(), torch.randn(N, K, device=device).half()

    (qA, rows, _), (qB, cols, _) = F.int8_vectorwise_quant(A), F.int8_vectorwise_quant(B)
    result = F.int8_mm_dequant(F.int8_linear_matmul(qA, qB), rows, cols)

    assert relative_error(result, oracles.matmul_4bit(A, B)) < 0.02


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_outlier_columns_are_exact(device, dtype):
    """With every column an outlier the product has the activations' own precision, times an int8 weight."""
    A = (torch.randn(5, 16, device=device) + 20).to(dtype)
    W = torch.randn(8, 16, device=device).half()
    CA, SCA, columns = F.int8_vectorwise_quant(A, threshold=6.0)
    CB, SCB, _ = F.int8_vectorwise_quant(W)

    result, outliers = torch.ops.bitsandbytes.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns)

    assert torch.equal(outliers, A)
    exact = oracles.matmul_4bit(A, F.int8_vectorwise_dequant(CB, SCB))
    assert relative_error(result, exact) < 2 * torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("columns", [None, torch.empty(0, dtype=torch.int64)], ids=["none", "empty"])
def test_without_outliers_the_mixed_product_is_the_plain_one(device, columns):
    A, W = torch.randn(5, 16, device=device).half(), torch.randn(8, 16, device=device).half()
    CA, SCA, _ = F.int8_vectorwise_quant(A)
    CB, SCB, _ = F.int8_vectorwise_quant(W)

    result, outliers = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        A, CA, CB, SCA, SCB, None if columns is None else columns.to(device)
    )

    assert torch.equal(result, torch.ops.bitsandbytes.int8_scaled_mm(CA, CB, SCA, SCB))
    assert outliers.numel() == 0 and outliers.dtype == torch.float16


def test_the_constant_is_public():
    assert F.C == 127.0
