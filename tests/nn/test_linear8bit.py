"""Linear8bitLt: golden outputs, where the int8 weight lives, moving, copying, tying, one graph."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params, Linear8bitLt
from oracles import assert_same_bytes, golden, relative_error

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def golden_layer(device, **options):
    vectors = golden("int8")
    layer = Linear8bitLt(64, 24, has_fp16_weights=False, **options)
    layer.weight.data = vectors["W"].clone()
    layer.bias.data = golden("linear8bitlt_state_dict")["bias"].clone()
    return layer.to(device)


def same_state(actual, expected):
    assert list(actual) == list(expected)
    for key in expected:
        assert_same_bytes(actual[key], expected[key])


def test_constructor_is_the_published_one():
    names = "input_features output_features bias has_fp16_weights threshold index device"
    assert list(inspect.signature(Linear8bitLt).parameters) == names.split()
    layer = Linear8bitLt(8, 4, index=7, threshold=6.0, has_fp16_weights=False)
    assert layer.index == 7
    assert (layer.state.threshold, layer.state.has_fp16_weights, layer.state.use_pool) == (6.0, False, True)
    assert type(layer.weight) is Int8Params and not layer.weight.requires_grad
    trained = Linear8bitLt(8, 4, threshold=6.0)
    assert trained.weight.requires_grad and trained.weight.has_fp16_weights and not trained.state.use_pool
    assert Linear8bitLt.__module__ == Int8Params.__module__ == "bitsandbytes.nn.modules"
    with pytest.raises(ValueError, match="threshold"):
        Linear8bitLt(8, 4, threshold=-1.0)


def test_golden_state_dict(device):
    own, saved = golden_layer(device).state_dict(), golden("linear8bitlt_state_dict")
    assert list(own) == ["weight", "bias", "SCB", "weight_format"]
    assert own.keys() == saved.keys()
    for key in saved:
        assert_same_bytes(own[key], saved[key])


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("threshold", [0, 6])
def test_golden_inference(device, threshold, dtype):
    io = golden("linear8bitlt_io")
    expected = io[f"y_eval_t{threshold}_{dtype}"]
    layer = golden_layer(device, threshold=float(threshold)).eval()
    layer.bias.data = golden("int8")["bias"].to(device)
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == "f32" else {"rtol": 1e-2, "atol": 2e-2}
    torch.testing.assert_close(layer(io["x_f16"].to(device, expected.dtype)).cpu(), expected, **tolerance)


def test_golden_training():
    io = golden("linear8bitlt_io")
    layer = golden_layer("cpu")
    layer.bias.data = golden("int8")["bias"].float()
    x = io["x_f16"].float().requires_grad_()
    y = layer(x)
    y.backward(io["grad_out"])
    torch.testing.assert_close(y, io["y_train_f32"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, io["grad_x_f32"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, io["grad_bias_f32"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("training", [True, False])
def test_output_of_any_rank_in_the_input_dtype(device, training, threshold, dtype):
    layer = Linear8bitLt(64, 48, has_fp16_weights=False, threshold=threshold).to(device).train(training)
    weight = int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB).cpu().double()
    for shape in [(64,), (3, 64), (0, 64), (2, 3, 64), (2, 1, 3, 64)]:
        x = torch.randn(shape, device=device, dtype=dtype)
        y = layer(x)
        assert y.shape == (*shape[:-1], 48) and y.dtype == dtype
        assert relative_error(y, x.cpu().double() @ weight.t() + layer.bias.detach().cpu().double()) < 0.03
    assert layer.bias.dtype == dtype


def test_codes_move_from_the_weight_to_the_state_in_the_first_forward(device):
    layer = Linear8bitLt(64, 48, has_fp16_weights=False).to(device)
    assert layer.weight.CB is not None and layer.state.CB is None
    layer(torch.randn(2, 64, device=device))
    assert layer.weight.CB is None and layer.weight.SCB is None
    assert layer.state.CB.data_ptr() == layer.weight.data_ptr()
    assert layer.state.SCB.shape == (48,)


def test_a_layer_that_never_moved_quantizes_when_it_runs():
    layer = Linear8bitLt(64, 48, has_fp16_weights=False)
    moved = copy.deepcopy(layer).to("cpu")
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), moved(x))
    assert layer.weight.dtype == torch.int8 and layer.weight.data_ptr() == layer.state.CB.data_ptr()
    same_state(layer.state_dict(), moved.state_dict())


def test_a_new_weight_is_picked_up_after_a_reset(device):
    layer = Linear8bitLt(64, 48, has_fp16_weights=False, bias=False).to(device)
    x = torch.randn(2, 64, device=device)
    layer(x)
    merged = torch.randn(48, 64)
    layer.weight = Int8Params(merged, requires_grad=False, has_fp16_weights=False).to(device)
    layer.state.reset_grads()
    assert relative_error(layer(x), x.cpu().double() @ merged.double().t()) < 0.03


def test_float_weights_train(device):
    layer = Linear8bitLt(64, 48).to(device)
    assert layer.weight.dtype == torch.float32
    x = torch.randn(32, 64, device=device)
    layer(x).square().sum().backward()
    exact = nn.Linear(64, 48).to(device)
    exact.load_state_dict(layer.state_dict())
    exact(x).square().sum().backward()
    assert relative_error(layer.weight.grad, exact.weight.grad.double()) < 0.03
    assert relative_error(layer.bias.grad, exact.bias.grad.double()) < 0.03
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_evaluation_sees_the_last_step_of_training(device):
    layer = Linear8bitLt(64, 48, bias=False).to(device)
    x = torch.randn(4, 64, device=device)
    layer(x).sum().backward()
    with torch.no_grad():
        layer.weight.data.neg_()  # an optimizer may write without telling autograd
    assert relative_error(layer.eval()(x), x.cpu().double() @ layer.weight.detach().cpu().double().t()) < 0.03


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("move", ["module", "parent", "method"])
def test_moves_take_codes_and_statistics_along(device, move, used, accelerators):
    for target in ["cpu", *accelerators, "meta"]:
        layer = Linear8bitLt(64, 48, has_fp16_weights=False).to(device)
        if used:
            layer(torch.randn(2, 64, device=device))
        parent = nn.Sequential(layer)
        if move == "parent":
            parent.to(target)
        elif move == "method" and target != "meta":
            getattr(parent, target)()
        else:
            layer.to(target)
        holder = layer.state if used else layer.weight
        assert type(layer.weight) is Int8Params and layer.weight.dtype == torch.int8
        assert {t.device.type for t in (layer.weight, holder.CB, holder.SCB)} == {target}
        assert target == "meta" or holder.CB.data_ptr() == layer.weight.data_ptr()


def test_round_trips_between_devices_change_nothing(accelerators):
    layer = Linear8bitLt(64, 48, has_fp16_weights=False, threshold=2.0).to("cpu").eval()
    x = torch.randn(3, 64)
    first: dict[str, torch.Tensor] = {}
    for device in ["cpu", *accelerators] * 2:
        y = layer.to(device)(x.to(device))
        assert torch.equal(first.setdefault(device, y), y)


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.type(torch.float16)]
)
def test_casts_leave_codes_alone(device, cast):
    layer = golden_layer(device)
    cast(layer)
    assert_same_bytes(layer.weight.data, golden("int8")["CB"])
    assert layer.state_dict()["SCB"].dtype == torch.float32


def test_meta_and_back():
    layer = golden_layer("cpu").eval()
    saved = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 64)
    expected = layer(x)
    layer.to("meta")
    assert type(layer.weight) is Int8Params and layer.state.SCB.is_meta
    layer.to_empty(device="cpu").load_state_dict(saved)
    same_state(layer.state_dict(), saved)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saving_is_the_same_before_and_after_a_forward(device, dtype, threshold):
    layer = golden_layer(device, threshold=threshold)
    before = copy.deepcopy(layer.state_dict())
    for training in (True, False, True):
        for needs_grad in (True, False):
            x = torch.randn(3, 64, device=device, dtype=dtype, requires_grad=needs_grad)
            product = layer.train(training)(x)
            if needs_grad:
                product.sum().backward()
            with torch.inference_mode():
                layer(x)
            same_state(layer.state_dict(), before)


def test_a_call_without_gradients_gives_the_values_of_one_with(device):
    for threshold in (0.0, 2.0):
        layer = golden_layer(device, threshold=threshold).eval()
        for shape in ((64,), (5, 64), (2, 3, 64), (0, 64)):
            x = torch.randn(shape, device=device, dtype=torch.bfloat16)
            expected = layer(x.clone().requires_grad_())
            with torch.no_grad():
                actual = layer(x)
            assert actual.shape == (*shape[:-1], 24) and not actual.requires_grad
            assert_same_bytes(actual, expected.detach())


def test_the_int8_weight_is_neither_copied_nor_quantized_again(device):
    layer = golden_layer(device).eval()
    x = torch.randn(3, 64, device=device).half()
    layer(x)
    weight, codes = layer.weight, layer.state.CB
    where = codes.data_ptr()
    for _ in range(3):
        layer(x)
    assert layer.weight is weight and layer.state.CB is codes
    assert weight.data_ptr() == codes.data_ptr() == where


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(device, how, used):
    layer = golden_layer(device, threshold=6.0).eval()
    x = torch.randn(3, 64, device=device)
    if used:
        layer(x)
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert type(twin.weight) is Int8Params
    assert torch.equal(twin(x), layer(x))
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert twin.state.CB.data_ptr() == twin.weight.data_ptr()
    same_state(twin.state_dict(), layer.state_dict())


def test_pickles_of_earlier_releases_get_their_parameter_class_back():
    layer = golden_layer("cpu").eval()
    plain = nn.Parameter(layer.weight.data, requires_grad=False)
    plain.__dict__.update(layer.weight.__dict__)
    x = torch.randn(2, 64)
    expected = copy.deepcopy(layer)(x)
    layer._parameters["weight"] = plain
    restored = pickle.loads(pickle.dumps(layer))
    assert type(restored.weight) is Int8Params
    assert torch.equal(restored(x), expected)


def test_a_tied_weight_is_saved_as_it_is():
    layer = Linear8bitLt(64, 24, has_fp16_weights=False).to("cpu")
    layer.weight = nn.Embedding(24, 64).weight
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_offloading_clears_the_state():
    layer = golden_layer("cpu")
    layer(torch.randn(2, 64))
    layer.state.SCB = None
    layer.state.CxB = None
    assert list(layer.state_dict()) == ["weight", "bias"]
    with pytest.raises(ValueError, match="SCB"):
        layer(torch.randn(2, 64))
    layer.state.CB = None
    with pytest.raises(ValueError, match="SCB"):
        layer(torch.randn(2, 64))


def test_int8_data_with_statistics_set_afterwards_runs():
    source = golden_layer("cpu").eval()
    layer = Linear8bitLt(64, 24, has_fp16_weights=False).eval()
    layer.bias = source.bias
    layer.weight = Int8Params(source.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.weight.SCB = source.weight.SCB
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), source(x))


def test_root_face_and_repr():
    assert bnb.nn.modules.Linear8bitLt is Linear8bitLt
    text = repr(golden_layer("cpu", threshold=6.0))
    for part in ("int8", "threshold=6.0", "has_fp16_weights=False", "in_features=64"):
        assert part in text


class TestOneGraph:
    """torch.compile(fullgraph=True): a graph break raises."""

    @pytest.fixture(autouse=True)
    def _reset(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("used", [False, True])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("has_fp16_weights", [True, False])
    def test_forward_and_backward(self, device, has_fp16_weights, training, used):
        layer = Linear8bitLt(64, 48, has_fp16_weights=has_fp16_weights).to(device).train(training)
        eager = torch.randn(3, 64, device=device, requires_grad=True)
        if used:
            layer(eager)
        twin = copy.deepcopy(layer)
        traced = eager.detach().clone().requires_grad_()

        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(traced)
        expected = twin(eager)

        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        (gradient,) = torch.autograd.grad(y.sum(), traced)
        torch.testing.assert_close(
            gradient, torch.autograd.grad(expected.sum(), eager)[0], rtol=1e-4, atol=1e-4
        )

    def test_inductor(self, device):
        layer = Linear8bitLt(64, 48, has_fp16_weights=False).to(device).eval()
        x = torch.randn(3, 64, device=device)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-4, atol=1e-4)

    def test_outliers_need_dynamic_shapes(self, device):
        layer = Linear8bitLt(64, 48, has_fp16_weights=False, threshold=2.0).to(device).eval()
        x = torch.randn(3, 64, device=device)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
            y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)
