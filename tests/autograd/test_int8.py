"""LLM.int8() products: golden vectors, the outlier decomposition in float64, gradients, and the state's life."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from bitsandbytes.autograd._functions import (
    GlobalOutlierPooler,
    MatMul8bitFp,
    MatMul8bitLt,
    MatmulLtState,
    matmul,
)
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from oracles import golden, int8_rows, relative_error

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def frozen_state(weight, threshold=0.0, training=False):
    """A state whose int8 weight is fixed, as a layer's after its first forward."""
    state = MatmulLtState()
    state.CB, state.SCB, _ = int8_vectorwise_quant(weight.half())
    state.has_fp16_weights = False
    state.is_training = training
    state.threshold = threshold
    return state


def decomposed(A, state, threshold):
    """The product in float64: inlier columns through int8, outlier columns as they are."""
    q, row_stats, columns = int8_rows(A, threshold)
    CB, SCB = state.CB.cpu().double(), state.SCB.cpu().double()
    product = (q.double().reshape(-1, A.shape[-1]) @ CB.t()) * row_stats.double().view(-1, 1) * SCB / 127**2
    outliers = A.detach().cpu().double().reshape(-1, A.shape[-1])[:, columns]
    product += outliers @ (CB[:, columns] * SCB.view(-1, 1) / 127).t()
    return product.view(*A.shape[:-1], -1), columns


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("threshold", [0, 6])
def test_golden_inference(device, threshold, dtype):
    vectors, io = golden("int8"), golden("linear8bitlt_io")
    expected = io[f"y_eval_t{threshold}_{dtype}"]
    state = MatmulLtState(CB=vectors["CB"].to(device), SCB=vectors["SCB"].to(device))
    state.is_training = state.has_fp16_weights = False

    A = io["x_f16"].to(device, expected.dtype)
    bias = vectors["bias"].to(device, expected.dtype)
    product = matmul(A, state.CB, state=state, threshold=float(threshold), bias=bias)

    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == "f32" else {"rtol": 1e-2, "atol": 2e-2}
    torch.testing.assert_close(product.cpu(), expected, **tolerance)


@pytest.mark.parametrize("function", [MatMul8bitLt, MatMul8bitFp])
def test_golden_gradient_of_the_input(device, function):
    vectors, io = golden("int8"), golden("linear8bitlt_io")
    state = MatmulLtState(CB=vectors["CB"].to(device), SCB=vectors["SCB"].to(device))
    state.has_fp16_weights, state.threshold = False, 6.0
    A = io["x_f16"].to(device, torch.float32).requires_grad_()
    bias = vectors["bias"].to(device, torch.float32).requires_grad_()

    function.apply(A, state.CB, None, bias, state).backward(io["grad_out"].to(device))

    torch.testing.assert_close(A.grad.cpu(), io["grad_x_f32"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(A.grad.cpu(), io["grad_x_lt_t6_f32"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad.cpu(), io["grad_bias_f32"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_outlier_columns_multiply_in_their_own_dtype(device, threshold, dtype):
    weight = torch.randn(48, 40, device=device)
    A = torch.randn(17, 40, device=device, dtype=dtype)
    state = frozen_state(weight, threshold)

    product = matmul(A, weight, state=state)

    expected, columns = decomposed(A, state, threshold)
    assert product.dtype == dtype
    # One code of one value may go either way, where 127 / absmax is rounded differently.
    assert relative_error(product, expected) < ROUNDING[dtype] + 1e-3
    if threshold:
        assert 0 < columns.numel() < 40
        assert state.idx.cpu().tolist() == columns.tolist()
    else:
        assert state.idx is None


def test_columns_without_outliers_take_the_plain_path(device):
    weight = torch.randn(48, 40, device=device)
    A = torch.randn(5, 40, device=device)
    with_threshold, plain = frozen_state(weight, 100.0), frozen_state(weight)
    assert torch.equal(matmul(A, weight, state=with_threshold), matmul(A, weight, state=plain))
    assert with_threshold.idx.tolist() == []


def test_outlier_columns_are_listed_when_they_are_asked_for(device):
    """A forward leaves flags on the device; what is assigned, copied or pickled is the list that it always was."""
    weight = torch.randn(48, 40, device=device)
    A = torch.zeros(5, 40, device=device)
    A[2, 7], A[4, 39] = 9.0, -9.0
    state = frozen_state(weight, 6.0)
    matmul(A, weight, state=state)
    assert state.outlier_flags.shape == (40,)

    copies = copy.deepcopy(state), pickle.loads(pickle.dumps(state))

    assert [s.idx.tolist() for s in (*copies, state)] == [[7, 39]] * 3
    assert state.idx.dtype == torch.int64 and state.outlier_flags is None
    matmul(A, weight, state=state)
    state.idx = torch.tensor([3])
    assert state.idx.tolist() == [3]
    assert MatmulLtState(idx=state.idx).idx is state.idx and MatmulLtState() == MatmulLtState()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_beyond_float16_do_not_overflow(device, dtype):
    weight = torch.randn(48, 40, device=device)
    A = torch.randn(5, 40, device=device, dtype=dtype) * 1e6

    product = matmul(A, weight, state=frozen_state(weight))

    assert relative_error(product, A.cpu().double() @ weight.cpu().double().t()) < 0.03


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 3, 2), (0,), (2, 0, 3)])
def test_any_rank_and_no_rows_at_all(device, leading, threshold, training):
    weight = torch.randn(48, 40, device=device)
    A = torch.randn(*leading, 40, device=device, requires_grad=True)
    bias = torch.randn(48, device=device, requires_grad=True)
    state = frozen_state(weight, threshold, training)

    product = matmul(A, weight, state=state, bias=bias)
    product.sum().backward()

    rows = A.detach().reshape(A.numel() // 40, 40)
    flat = matmul(rows, weight, state=state, bias=bias)
    assert product.shape == (*leading, 48)
    assert torch.allclose(product.reshape(flat.shape), flat, atol=1e-5)
    assert A.grad.shape == A.shape
    assert bias.grad.tolist() == [float(A.numel() // 40)] * 48


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [MatMul8bitLt, MatMul8bitFp])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_gradients_against_the_float_product(device, function, threshold, dtype):
    weight = torch.randn(48, 40, device=device, dtype=dtype, requires_grad=True)
    A = torch.randn(2, 32, 40, device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(48, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 32, 48, device=device, dtype=dtype)
    state = MatmulLtState()
    state.threshold = threshold

    function.apply(A, weight, None, bias, state).backward(grad)

    exact = grad.cpu().double()
    decoded = int8_vectorwise_dequant(state.CB, state.SCB).cpu().double()
    assert relative_error(A.grad, exact @ decoded) < 2 * ROUNDING[dtype]
    assert relative_error(bias.grad, exact.sum((0, 1))) < ROUNDING[dtype]
    assert weight.grad.dtype == dtype
    grad_weight = exact.reshape(-1, 48).t() @ A.detach().cpu().double().reshape(-1, 40)
    assert relative_error(weight.grad, grad_weight) < (0.02 if function is MatMul8bitLt else ROUNDING[dtype])


def test_training_on_a_cpu_decodes_the_weight():
    weight, A = torch.randn(48, 40), torch.randn(5, 40)
    product = matmul(A, weight, state=frozen_state(weight, training=True))
    decoded = int8_vectorwise_dequant(*int8_vectorwise_quant(weight.half())[:2])
    torch.testing.assert_close(product, A @ decoded.t())


def test_transposed_weight_is_made_contiguous(device):
    weight = torch.randn(40, 48, device=device)
    A = torch.randn(5, 40, device=device)
    state = MatmulLtState()
    state.is_training = False
    assert torch.equal(matmul(A, weight.t(), state=state), matmul(A, weight.t().contiguous(), state=state))
    assert state.CB.shape == (48, 40)


class TestState:
    def test_float_weight_is_quantized_anew_unless_gradients_accumulate(self):
        weight = torch.nn.Parameter(torch.randn(48, 40))
        A, state = torch.randn(5, 40), MatmulLtState()
        matmul(A, weight, state=state).sum().backward()
        first = state.CB
        matmul(A, weight, state=state)
        assert state.CB is first, "gradients wait in weight.grad"
        weight.grad = None
        matmul(A, weight, state=state)
        assert state.CB is not first
        state.is_training, first = False, state.CB
        matmul(A, weight, state=state)
        assert state.CB is first

    def test_threshold_argument_stays(self):
        weight, state = torch.randn(48, 40), MatmulLtState()
        matmul(torch.randn(5, 40), weight, state=state, threshold=3.0)
        matmul(torch.randn(5, 40), weight, state=state)
        assert state.threshold == 3.0

    def test_reset_takes_the_weight_again(self):
        weight = torch.randn(48, 40)
        state = frozen_state(torch.zeros(48, 40))
        state.reset_grads()
        assert (state.CB, state.SB, state.SCB, state.SBt, state.CBt) == (None,) * 5
        A = torch.randn(5, 40)
        assert torch.equal(matmul(A, weight, state=state), matmul(A, weight, state=frozen_state(weight)))

    def test_backward_reads_the_weight_from_the_state(self):
        weight, A = torch.randn(48, 40), torch.randn(5, 40, requires_grad=True)
        state = frozen_state(weight)
        product = matmul(A, weight, state=state)
        state.CB = None
        with pytest.raises(Exception, match="CB matrix"):
            product.sum().backward()

    def test_fields_and_their_order(self):
        state = MatmulLtState(True, 1, 2, 3, 4, 5, 6, 7, 8)
        names = ["force_no_igemmlt", "CB", "SB", "SCB", "SBt", "CBt", "subB", "outlier_pool", "idx"]
        assert [getattr(state, name) for name in names] == [True, 1, 2, 3, 4, 5, 6, 7, 8]
        plain = MatmulLtState()
        assert not plain.has_accumulated_gradients
        assert plain.threshold == 0.0
        assert plain.is_training and plain.has_fp16_weights and not plain.use_pool
        with pytest.raises(TypeError):
            hash(plain)
        with pytest.raises(TypeError):
            MatmulLtState(threshold=1.0)

    @pytest.mark.parametrize("name", ["CxB", "CxBt", "formatB", "_tile_indices"])
    def test_retired_fields_read_as_none(self, name):
        state = MatmulLtState()
        with pytest.warns(FutureWarning, match="is deprecated and will be removed"):
            assert getattr(state, name) is None
        setattr(state, name, 3)
        assert getattr(state, name) == 3
        with pytest.raises(AttributeError, match="no attribute 'other'"):
            _ = state.other

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
    def test_copies_keep_what_was_assigned(self, duplicate):
        state = frozen_state(torch.randn(48, 40), 6.0)
        state.memory_efficient_backward = True
        twin = duplicate(state)
        assert (twin.threshold, twin.has_fp16_weights, twin.memory_efficient_backward) == (6.0, False, True)
        assert torch.equal(twin.CB, state.CB) and torch.equal(twin.SCB, state.SCB)
        assert type(state).__module__ == "bitsandbytes.autograd._functions"


def test_inputs_that_are_not_float16_are_reported_once_a_layer(caplog):
    weight = torch.randn(48, 40)
    state = frozen_state(weight)
    with caplog.at_level("WARNING", logger="bitsandbytes.autograd._functions"):
        matmul(torch.randn(5, 40).half(), weight, state=frozen_state(weight))
        assert not caplog.records
        matmul(torch.randn(5, 40), weight, state=state)
        matmul(torch.randn(5, 40), weight, state=state)
    assert caplog.text.count("inputs will be cast from torch.float32") == 1


def test_what_does_not_fit_is_named(device):
    weight = torch.randn(48, 40, device=device)
    with pytest.raises(ValueError, match="last dimension must be 40"):
        matmul(torch.randn(5, 39, device=device), weight, state=frozen_state(weight))
    with pytest.raises(ValueError, match="last dimension must be 40"):
        matmul(torch.randn(5, 39, device=device), weight, state=frozen_state(weight, training=True))
    orphan = MatmulLtState()
    orphan.has_fp16_weights = False
    with pytest.raises(ValueError, match="SCB"):
        matmul(torch.randn(5, 40, device=device), weight.to(torch.int8), state=orphan)
    with pytest.raises(ValueError, match="floating point"):
        matmul(torch.ones(5, 40, device=device, dtype=torch.int64), weight, state=frozen_state(weight))


@pytest.mark.parametrize("training", [True, False])
def test_one_graph_gives_the_same_product_and_gradient(device, training):
    weight = torch.randn(48, 40, device=device)
    state = frozen_state(weight, training=training)
    eager = torch.randn(5, 40, device=device, requires_grad=True)
    traced = eager.detach().clone().requires_grad_()
    expected = matmul(eager, weight, state=state)
    product = torch.compile(lambda x: matmul(x, weight, state=state), fullgraph=True, backend="aot_eager")(
        traced
    )
    torch.testing.assert_close(product, expected)
    torch.testing.assert_close(
        torch.autograd.grad(product.sum(), traced)[0], torch.autograd.grad(expected.sum(), eager)[0]
    )


def test_pooler_unites_dimensions_of_one_width():
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOutlierPooler()
    pooler = GlobalOutlierPooler.get_instance()
    pooler.initialize()
    assert pooler is GlobalOutlierPooler.get_instance()
    pooler.add_outliers(torch.tensor([3, 1]), 16)
    pooler.add_outliers(torch.tensor([9, 3]), 16)
    pooler.add_outliers(torch.tensor([5]), 32)
    found = pooler.get_current_outlier_idx()
    assert found.dtype == torch.int64
    assert sorted(found.tolist()) == [1, 3, 9]
    pooler.initialize()
    assert pooler.model_dim is None
