"""Linear4bit: golden outputs, the flow of dtypes, moving, copying, warnings, bad input, one graph."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from oracles import QUANT_TYPES, STORAGE_DTYPES, assert_same_bytes, golden, relative_error

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def same_state(actual, expected):
    assert list(actual) == list(expected)
    for key in expected:
        assert_same_bytes(actual[key], expected[key])


def expected_output(layer, x):
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).cpu().double()
    product = x.detach().cpu().double() @ weight.t()
    return product if layer.bias is None else product + layer.bias.detach().cpu().double()


@pytest.mark.parametrize("name", ["nf4", "nf4_nested", "fp4"])
def test_golden_output_and_gradients(device, name):
    io = golden("linear4bit_io")
    layer = Linear4bit(128, 160, compute_dtype=torch.float32).to(device)
    layer.load_state_dict(golden(f"linear4bit_{name}_state_dict"))
    x = io["x"].to(device, copy=True).requires_grad_()

    y = layer(x)
    y.backward(io["grad_out"].to(device))

    torch.testing.assert_close(y.cpu(), io[f"{name}.y"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.cpu(), io[f"{name}.grad_x"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad.cpu(), io[f"{name}.grad_bias"], rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None


@pytest.mark.parametrize("name", ["nf4", "nf4_nested", "fp4", "nf4_nested_bf16storage"])
def test_golden_state_dict_from_the_float_weight(device, name):
    saved = golden(f"linear4bit_{name}_state_dict")
    layer = Linear4bit(
        128,
        160,
        compute_dtype=torch.float32,
        compress_statistics="nested" in name,
        quant_type=name.split("_")[0],
        quant_storage=saved["weight"].dtype,
    )
    layer.weight.data = golden("quant4bit_nested")["w"]
    layer.bias.data = saved["bias"]

    own = layer.to(device).state_dict()

    assert list(own) == ["weight", "bias", *(k for k in own if k.startswith("weight."))]
    assert own.keys() == saved.keys()
    for key in saved:
        if key.endswith(("weight", "absmax", "quant_map", "bias")):
            if device == "cpu":
                assert_same_bytes(own[key], saved[key])
            else:
                assert own[key].shape == saved[key].shape


def test_constructor_is_the_published_one():
    names = "input_features output_features bias compute_dtype compress_statistics quant_type quant_storage device"
    assert list(inspect.signature(Linear4bit).parameters) == names.split()
    for cls in (LinearFP4, LinearNF4):
        assert list(inspect.signature(cls).parameters) == [n for n in names.split() if n != "quant_type"]
    layer = Linear4bit(64, 8, True, torch.bfloat16)
    assert (layer.compute_dtype, layer.compute_type_is_set) == (torch.bfloat16, True)
    assert layer.quant_state is None and "quant_state" in layer.__dict__
    assert isinstance(layer, nn.Linear) and layer.weight.module is layer
    assert layer.weight.dtype == torch.float32 and not layer.weight.requires_grad
    assert LinearNF4(64, 8).weight.quant_type == "nf4" and LinearFP4(64, 8).weight.quant_type == "fp4"
    with pytest.raises(TypeError):
        Linear4bit(64, 8, dtype=torch.float16)


def test_empty_layers_and_overwritten_parts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about initialising nothing
        layer = Linear4bit(0, 0, bias=None, compute_dtype=torch.float32)
    source = LinearNF4(64, 8, bias=False).to("cpu")
    layer.in_features, layer.out_features = 64, 8
    layer.weight = Params4bit(source.weight.data, requires_grad=False)
    layer.weight.quant_state = source.quant_state
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_output_is_that_of_the_decoded_weight(device, quant_type, nested, storage):
    layer = Linear4bit(96, 48, compress_statistics=nested, quant_type=quant_type, quant_storage=storage).to(
        device
    )
    for shape in [(96,), (3, 96), (0, 96), (2, 3, 1, 96)]:
        x = torch.randn(shape, device=device)
        for training in (True, False):
            y = layer.train(training)(x)
            assert y.shape == (*shape[:-1], 48)
            assert relative_error(y, expected_output(layer, x)) < 2e-6


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("compute_dtype", [None, *DTYPES])
def test_flow_of_dtypes(device, compute_dtype, x_dtype):
    layer = Linear4bit(64, 48, compute_dtype=compute_dtype).to(device)
    x = torch.randn(3, 64, device=device, dtype=x_dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = layer(x)

    computes_in = compute_dtype or x_dtype
    assert y.dtype == x_dtype
    assert layer.compute_dtype == (None if (compute_dtype, x_dtype) == (None, torch.float16) else computes_in)
    assert layer.bias.dtype == computes_in
    assert layer.compute_type_is_set
    assert relative_error(y, expected_output(layer, x)) < max(TOLERANCE[computes_in], TOLERANCE[x_dtype])


def test_saving_is_the_same_before_and_after_a_forward(device):
    layer = LinearNF4(64, 48, compute_dtype=torch.bfloat16).to(device)
    before = copy.deepcopy(layer.state_dict())
    for training in (True, False):
        layer.train(training)(torch.randn(3, 64, device=device))
        same_state(layer.state_dict(), before)
    same_state(pickle.loads(pickle.dumps(layer)).state_dict(), before)
    same_state(layer.to("cpu").to(device).state_dict(), before)


def test_a_bias_that_was_trained_is_saved_as_trained():
    layer = LinearNF4(64, 48, compute_dtype=torch.bfloat16).to("cpu")
    layer(torch.randn(3, 64))
    with torch.no_grad():
        layer.bias += 1.0
    assert_same_bytes(layer.state_dict()["bias"], layer.bias.data)
    layer.load_state_dict({**layer.state_dict(), "bias": torch.arange(48.0) / 7})
    assert torch.equal(layer.state_dict()["bias"], torch.arange(48.0) / 7)


def test_float16_input_without_a_fast_compute_dtype_warns(caplog):
    def forward_of_ten(rows):
        net = nn.Sequential(*[Linear4bit(64, 64) for _ in range(10)]).to("cpu")
        net(torch.rand(rows, 64, dtype=torch.float16))

    with pytest.warns(UserWarning, match=r"inference or training"):
        forward_of_ten(10)
    with pytest.warns(UserWarning, match=r"inference."):
        forward_of_ten(1)
    with pytest.warns(UserWarning) as record, caplog.at_level("WARNING", logger="bitsandbytes.nn.modules"):
        caplog.clear()
        forward_of_ten(10)
        forward_of_ten(1)
    assert len(record) == 2
    assert "will lead to slow inference or training speed." in caplog.text
    assert "will lead to slow inference.\n" in caplog.text


def test_no_warning_when_the_compute_dtype_was_chosen():
    layer = Linear4bit(64, 8, compute_dtype=torch.float32).to("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.rand(2, 64, dtype=torch.float16))


def test_unquantized_layer_says_what_to_do(caplog):
    with pytest.warns(UserWarning, match="quantization state not initialized"), pytest.raises(AssertionError):
        Linear4bit(64, 8)(torch.randn(2, 64))
    assert "quantization state not initialized" in caplog.text


def test_state_is_recovered_when_a_tool_replaced_the_parameter(device):
    layer = LinearNF4(64, 8).to(device)
    x = torch.randn(2, 64, device=device)
    expected = layer(x)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(layer(x), expected)
    assert type(layer.weight) is Params4bit and layer.weight.quant_state is layer.quant_state


@pytest.mark.parametrize(
    "options", [{"quant_type": "nf5"}, {"quant_storage": torch.int8}, {"compute_dtype": torch.int32}]
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Linear4bit(64, 8, **options)


def test_bad_input_is_named(device):
    layer = LinearNF4(64, 8).to(device)
    with pytest.raises(RuntimeError, match="inner dim"):
        layer(torch.randn(2, 63, device=device))
    with pytest.raises(ValueError, match=r"floating-point tensor, got torch\.int64"):
        layer(torch.ones(2, 64, device=device, dtype=torch.int64))


def test_twice_to_a_device_is_once(device):
    layer = LinearNF4(64, 8).to(device)
    before = copy.deepcopy(layer.state_dict())
    same_state(layer.to(device).state_dict(), before)
    assert layer.weight.module is layer and layer.weight.quant_state is layer.quant_state


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
def test_casting_a_quantized_layer_leaves_its_codes_alone(device, storage):
    layer = LinearNF4(64, 8, quant_storage=storage).to(device)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 64, device=device)
    expected = layer(x)
    for cast in (
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.float(),
        lambda m: m.double(),
    ):
        cast(layer)
        after = layer.state_dict()
        for key in before:
            if key != "bias":
                assert_same_bytes(after[key], before[key])
    layer.float()
    assert relative_error(layer(x), expected.double()) < 1e-2


def test_casting_before_quantizing_decides_the_dtype_of_the_state(device):
    assert LinearNF4(64, 8).half().to(device).quant_state.dtype == torch.float16
    assert (
        nn.Sequential(LinearNF4(64, 8)).to(torch.bfloat16).to(device)[0].quant_state.dtype == torch.bfloat16
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", STORAGE_DTYPES)
def test_meta_and_back(storage, nested):
    model = nn.Sequential(LinearNF4(64, 8, compress_statistics=nested, quant_storage=storage)).to("cpu")
    saved = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 64)
    expected = model(x)

    model.to("meta")
    layer = model[0]
    assert type(layer.weight) is Params4bit and layer.weight.is_meta
    assert layer.weight.module is layer and layer.quant_state is layer.weight.quant_state
    assert list(model.state_dict()) == list(saved)
    with pytest.raises(NotImplementedError, match="meta"):
        copy.deepcopy(model).to("cpu")

    model.to_empty(device="cpu")
    assert type(model[0].weight) is Params4bit
    model.load_state_dict(saved)
    same_state(model.state_dict(), saved)
    assert torch.equal(model(x), expected)


def test_an_unquantized_layer_goes_to_meta_and_back():
    layer = LinearNF4(64, 8).to("meta")
    assert type(layer.weight) is Params4bit and not layer.weight.bnb_quantized
    layer.to_empty(device="cpu")
    assert type(layer.weight) is Params4bit and layer.weight.shape == (8, 64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 64))
    assert layer.to("cpu").quant_state is not None


def test_gradients_and_attributes_survive_moves(device):
    layer = LinearNF4(64, 8).to("cpu")
    layer(torch.randn(2, 64)).sum().backward()
    layer.to(device)
    assert layer.bias.grad.device.type == device
    assert layer.weight.device.type == layer.quant_state.absmax.device.type == device


@pytest.mark.parametrize("flag", ["overwrite_module_params", "swap_module_params"])
def test_moves_under_torch_future_flags(flag):
    setter = getattr(torch.__future__, f"set_{flag}_on_conversion")
    setter(True)
    try:
        layer = LinearNF4(64, 8).to("cpu")
        x = torch.randn(2, 64)
        expected = layer(x)
        layer = layer.half().to("cpu").float()
        assert type(layer.weight) is Params4bit and layer.weight.bnb_quantized
        assert relative_error(layer(x), expected.double()) < 1e-2
    finally:
        setter(False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(how, device):
    layer = LinearNF4(64, 8).to(device)
    x = torch.randn(2, 64, device=device)
    expected = layer(x)
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(x), expected)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert twin.weight.module is twin and twin.quant_state is twin.weight.quant_state
    same_state(twin.state_dict(), layer.state_dict())


def test_pickles_of_earlier_releases_get_their_parameter_class_back():
    layer = LinearNF4(64, 8).to("cpu")
    x = torch.randn(2, 64)
    expected = layer(x)
    plain = nn.Parameter(layer.weight.data, requires_grad=False)
    plain.__dict__.update(layer.weight.__dict__, module=layer)
    layer._parameters["weight"] = plain
    restored = pickle.loads(pickle.dumps(layer))
    assert type(restored.weight) is Params4bit and restored.weight.module is restored
    assert restored.weight.quant_state is restored.quant_state
    assert torch.equal(restored(x), expected)


def test_shared_weights_stay_shared(device):
    model = nn.Sequential(LinearNF4(64, 64, bias=False), LinearNF4(64, 64, bias=False))
    model[1].weight = model[0].weight
    model.to(device)
    assert model[1].weight is model[0].weight
    twin = copy.deepcopy(model)
    assert twin[1].weight is twin[0].weight
    x = torch.randn(2, 64, device=device)
    assert torch.equal(twin(x), model(x))


def test_forward_is_resolved_through_the_class(monkeypatch):
    layer = LinearNF4(64, 8).to("cpu")
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: "patched")
    assert layer(torch.randn(2, 64)) == "patched"


def test_pickles_record_the_face():
    for cls in (Linear4bit, LinearFP4, LinearNF4, Params4bit):
        assert cls.__module__ == "bitsandbytes.nn.modules"
        assert getattr(bnb.nn.modules, cls.__name__) is getattr(bnb.nn, cls.__name__) is cls


def test_repr_tells_format_block_size_dtypes_and_nesting():
    text = repr(LinearNF4(64, 8, compute_dtype=torch.bfloat16, compress_statistics=False).to("cpu"))
    for part in (
        "nf4",
        "blocksize=64",
        "compute_dtype=torch.bfloat16",
        "quant_storage=torch.uint8",
        "nested=False",
    ):
        assert part in text


def test_parameter_count_from_the_packed_size():
    for storage in STORAGE_DTYPES:
        p = LinearNF4(64, 48, quant_storage=storage).to("cpu").weight
        assert p.numel() * 2 * p.element_size() == 64 * 48


class TestOneGraph:
    """torch.compile(fullgraph=True): a graph break raises."""

    @pytest.fixture(autouse=True)
    def _reset(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def check(self, module, x, backend="aot_eager", **options):
        traced = x.detach().clone().requires_grad_(x.requires_grad)
        expected = module(x)
        y = torch.compile(module, fullgraph=True, backend=backend, **options)(traced)
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
        if x.requires_grad:
            grad = torch.randn_like(expected)
            expected.backward(grad)
            y.backward(grad)
            torch.testing.assert_close(traced.grad, x.grad, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("nested", [True, False])
    @pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
    def test_forward_and_backward(self, device, compute_dtype, nested, training):
        layer = Linear4bit(64, 48, compute_dtype=compute_dtype, compress_statistics=nested).to(device)
        self.check(layer.train(training), torch.randn(3, 64, device=device, requires_grad=True))

    def test_first_call_is_traced_too(self, device):
        layer = Linear4bit(64, 48).to(device).eval()
        x = torch.randn(3, 64, device=device)
        y = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(y, layer(x))

    def test_several_layers(self, device):
        net = nn.Sequential(LinearNF4(64, 64), nn.GELU(), LinearFP4(64, 64), nn.GELU(), LinearNF4(64, 8)).to(
            device
        )
        self.check(net, torch.randn(3, 64, device=device, requires_grad=True))

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_inductor(self, device, mode):
        net = nn.Sequential(LinearNF4(64, 48), LinearNF4(48, 8)).to(device)
        self.check(net, torch.randn(3, 64, device=device, requires_grad=True), backend="inductor", mode=mode)

    @pytest.mark.parametrize("nested", [True, False])
    def test_under_activation_checkpointing(self, device, nested):
        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = LinearNF4(64, 48, compute_dtype=torch.float32, compress_statistics=nested)
                self.outer = nn.Linear(48, 8)

            def forward(self, x):
                return self.outer(checkpoint(self.inner, x, use_reentrant=False))

        self.check(Checkpointed().to(device), torch.randn(3, 64, device=device, requires_grad=True))

    def test_one_graph_for_every_number_of_rows(self, device):
        graphs = []
        layer = LinearNF4(64, 8, compute_dtype=torch.float32).to(device)
        compiled = torch.compile(
            layer, fullgraph=True, dynamic=True, backend=lambda g, _: graphs.append(g) or g
        )
        for rows in (4, 3, 7):
            x = torch.randn(rows, 64, device=device)
            torch.testing.assert_close(compiled(x), layer(x))
        assert len(graphs) == 1

    def test_export(self):
        layer = LinearNF4(64, 8, compute_dtype=torch.float32).to("cpu")
        x = torch.randn(3, 64)
        exported = torch.export.export(layer, (x,))
        torch.testing.assert_close(exported.module()(x), layer(x))
        assert type(layer.weight) is Params4bit and layer.weight.quant_state is layer.quant_state
