"""Experts4bit: products and gradients against float64, routing without waiting, checkpoints, other forms, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import bitsandbytes as bnb
from bitsandbytes._ops import OPERATORS
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Experts4bit, Params4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from oracles import FLOAT_DTYPES, assert_same_bytes, relative_error

# A GPU says so where it has no kernel of its own; the results are what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:There is no grouped 4-bit kernel")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SIZE = (6, 64, 40)  # experts, in, out


def make(device, *size, quantized=True, **options) -> Experts4bit:
    layer = Experts4bit(*(size or SIZE), **options)
    return layer.to(device) if quantized else layer


def choices(tokens: int, top_k: int, num_experts: int, device) -> Tensor:
    """Different experts for each token, as a router chooses."""
    return torch.rand(tokens, num_experts).topk(top_k).indices.to(device)


def decoded(layer: Experts4bit) -> Tensor:
    """The weights before they are rounded to any dtype."""
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    return dequantize_4bit(layer.weight.data, state).cpu().double()


def dense_product(x: Tensor, experts: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [T, k, K]`` by the chosen weights, in x's dtype and without any sorting."""
    result = torch.einsum("tjk,tjnk->tjn", x, weight[experts])
    return result if bias is None else result + bias[experts]


def expected_output(layer: Experts4bit, x: Tensor, experts: Tensor) -> Tensor:
    chosen = experts.cpu() if experts.dim() == 2 else experts.cpu().unsqueeze(1)
    x = x.detach().cpu().double()
    if x.dim() == 2:
        x = x.unsqueeze(1).expand(-1, chosen.shape[1], -1)
    bias = None if layer.bias is None else layer.bias.detach().cpu().double()
    return dense_product(x, chosen, decoded(layer), bias).view(*experts.shape, layer.out_features)


def same_state(actual, expected):
    assert list(actual) == list(expected)
    for key in expected:
        assert_same_bytes(actual[key], expected[key])


# --- products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("size", "blocksize"), [(SIZE, 64), ((3, 96, 26), 32), ((5, 33, 64), 64), ((1, 128, 7), 128)], ids=str
)
def test_output_is_that_of_the_decoded_weights(device, size, blocksize, bias, quant_type, nested):
    options = {"quant_type": quant_type, "compress_statistics": nested, "blocksize": blocksize}
    layer = make(device, *size, bias=bias, **options)
    E, K, N = size
    for tokens, top_k in ((1, 1), (1, min(E, 3)), (9, min(E, 2)), (0, 1), (40, E)):
        experts = choices(tokens, top_k, E, device)
        for shape in ((tokens, K), (tokens, top_k, K)):
            x = torch.randn(shape, device=device)
            y = layer(x, experts)
            assert y.shape == (tokens, top_k, N) and y.dtype == x.dtype
            assert relative_error(y, expected_output(layer, x, experts)) < 2e-6
    experts = torch.randint(E, (7,), device=device)
    x = torch.randn(7, K, device=device)
    assert layer(x, experts).shape == (7, N)
    assert relative_error(layer(x, experts), expected_output(layer, x, experts)) < 2e-6


@pytest.mark.parametrize("chosen", [0, 3, 5])
def test_all_tokens_may_choose_one_expert_even_twice(device, chosen):
    layer = make(device, bias=True)
    experts = torch.full((11, 2), chosen, device=device)
    x = torch.randn(11, 64, device=device)

    y = layer(x, experts)

    assert relative_error(y, expected_output(layer, x, experts)) < 2e-6
    assert torch.equal(y[:, 0], y[:, 1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_indices_of_any_integer_type_and_layout(device, dtype):
    layer = make(device)
    experts, x = choices(9, 2, 6, device), torch.randn(9, 64, device=device)
    strided = experts.to(dtype).t().contiguous().t()

    assert torch.equal(layer(x, strided), layer(x, experts))


@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("compute_dtype", [None, *FLOAT_DTYPES], ids=str)
def test_flow_of_dtypes(device, compute_dtype, x_dtype):
    layer = make(device, bias=True, compute_dtype=compute_dtype)
    x, experts = torch.randn(5, 64, device=device, dtype=x_dtype), choices(5, 2, 6, device)

    y = layer(x, experts)

    assert y.dtype == x_dtype and layer.compute_dtype == compute_dtype
    assert layer.bias.dtype == torch.float32
    bound = max(TOLERANCE[compute_dtype or x_dtype], TOLERANCE[x_dtype])
    assert relative_error(y, expected_output(layer, x, experts)) < bound


def test_sorted_rows_are_multiplied_in_place(device):
    """What sorts for itself, once for two layers, gets the same."""
    up, down = make(device), make(device, 6, 40, 64)
    x, experts = torch.randn(9, 64, device=device), choices(9, 2, 6, device)

    order, offsets = up.route(experts)
    hidden = up.forward_sorted(x[order // 2], offsets).relu()
    results = down.forward_sorted(hidden, offsets)

    expected = down(up(x, experts).relu(), experts).flatten(0, 1)
    assert torch.equal(results, expected[order])
    assert offsets.dtype == torch.int32 and offsets[-1] == 18


def test_rows_past_the_last_expert_are_zero(device):
    layer = make(device, bias=True)
    offsets = torch.tensor([2, 2, 3, 3, 3, 4], dtype=torch.int32, device=device)

    y = layer.forward_sorted(torch.randn(7, 64, device=device), offsets)

    assert y[:4].all() and not y[4:].any()


@pytest.mark.parametrize("wrong", [-1, 6, -(2**40), 2**40])
def test_an_index_of_no_expert(device, wrong):
    layer = make(device, bias=True)
    experts, x = choices(5, 2, 6, device), torch.randn(5, 64, device=device)
    right = layer(x, experts)
    experts[3, 1] = wrong

    if device == "cpu":
        with pytest.raises(IndexError, match=rf"experts must be in 0\.\.5, got {wrong}"):
            layer(x, experts)
    else:
        right[3, 1] = 0.0
        torch.testing.assert_close(layer(x, experts), right)


def test_a_compiled_graph_gives_zeros_for_an_index_of_no_expert():
    layer = make("cpu", bias=True)
    experts, x = torch.tensor([[0, -1], [6, 2]]), torch.randn(2, 64)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, experts)

    assert not y[0, 1].any() and not y[1, 0].any()
    torch.testing.assert_close(y[0, 0], layer(x, experts.clamp(0, 5))[0, 0])


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_inputs", [False, True])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_gradients_are_those_of_the_decoded_weights(device, nested, compute_dtype, own_inputs):
    layer = make(device, bias=True, compute_dtype=compute_dtype, compress_statistics=nested)
    experts = choices(9, 3, 6, device)
    x = torch.randn((9, 3, 64) if own_inputs else (9, 64), device=device, requires_grad=True)
    grad = torch.randn(9, 3, 40, device=device)

    layer(x, experts).backward(grad)

    exact = x.detach().cpu().double().requires_grad_()
    bias = layer.bias.detach().cpu().double().requires_grad_()
    rows = exact if own_inputs else exact.unsqueeze(1).expand(-1, 3, -1)
    dense_product(rows, experts.cpu(), decoded(layer), bias).backward(grad.cpu().double())
    bound = TOLERANCE[compute_dtype or torch.float32]
    assert relative_error(x.grad, exact.grad) < bound
    assert relative_error(layer.bias.grad, bias.grad) < bound
    assert layer.weight.grad is None and x.grad.dtype == torch.float32


def test_the_gradient_of_a_gradient(device):
    layer = make(device)
    experts, x = choices(4, 2, 6, device), torch.randn(4, 64, device=device, requires_grad=True)

    (grad,) = torch.autograd.grad(layer(x, experts).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)

    exact, chosen = x.detach().cpu().double().requires_grad_(), experts.cpu()
    rows = exact.unsqueeze(1).expand(-1, 2, -1)
    loss = dense_product(rows, chosen, decoded(layer)).square().sum()
    (expected,) = torch.autograd.grad(loss, exact, create_graph=True)
    (expected,) = torch.autograd.grad(expected.sum(), exact)
    assert relative_error(second, expected) < 1e-5


def test_a_frozen_bias_and_no_tokens_give_no_trouble(device):
    layer = make(device, bias=True)
    layer.bias.requires_grad_(False)
    x = torch.randn(0, 64, device=device, requires_grad=True)
    layer(x, choices(0, 2, 6, device)).sum().backward()
    assert x.grad.shape == (0, 64) and layer.bias.grad is None

    layer.bias.requires_grad_(True)
    x = torch.randn(3, 64, device=device)
    layer(x, torch.zeros(3, 1, dtype=torch.long, device=device)).sum().backward()
    assert layer.bias.grad[0].eq(3).all() and not layer.bias.grad[1:].any()


# --- devices, checkpoints, copies ----------------------------------------------------------------------------------


def test_quantized_when_moved_as_a_linear_layer_is(device):
    layer = Experts4bit(2, 64, 32, quant_type="fp4", compress_statistics=False)
    dense = layer.weight.data.clone()
    assert layer.weight.shape == (2, 32, 64) and not layer.weight.requires_grad and layer.quant_state is None

    assert layer.to(device) is layer

    packed, state = bnb.functional.quantize_4bit(dense.to(device), quant_type="fp4", blocksize=64)
    assert type(layer.weight) is Params4bit and layer.weight.quant_state is layer.quant_state
    assert_same_bytes(layer.weight.data, packed)
    assert layer.quant_state == state and state.shape == (2, 32, 64)
    again = layer.to(device).to("cpu").half()
    assert_same_bytes(again.weight.data, packed.cpu())
    assert Experts4bit(2, 64, 32).quantize().quant_state is not None


@pytest.mark.parametrize("nested", [False, True])
def test_state_dict_has_the_keys_of_a_linear_layer(nested):
    layer = make("cpu", bias=True, compress_statistics=nested)
    linear = bnb.nn.Linear4bit(64, 40, compress_statistics=nested, quant_type="nf4").to("cpu")

    assert set(layer.state_dict()) == set(linear.state_dict())
    assert all(type(value) is Tensor for value in layer.state_dict().values())
    assert layer.state_dict()["weight"].shape == (6 * 64 * 40 // 2, 1)


@pytest.mark.parametrize("target", ["quantized", "float", "meta"])
@pytest.mark.parametrize("nested", [False, True])
def test_state_dict_round_trip(device, nested, target):
    source = make(device, bias=True, compress_statistics=nested, quant_type="nf4", blocksize=128)
    options = {"bias": True, "quant_type": "fp4", "compress_statistics": not nested}
    loaded = make(device, quantized=target == "quantized", **options)
    if target == "meta":
        loaded.to("meta")
    model = nn.Sequential(loaded)

    model.load_state_dict({f"0.{k}": v for k, v in source.state_dict().items()}, assign=target == "meta")

    same_state(loaded.to(device).state_dict(), source.state_dict())
    x, experts = torch.randn(5, 64, device=device), choices(5, 2, 6, device)
    assert torch.equal(loaded(x, experts), source(x, experts))


def test_checkpoints_that_do_not_fit_are_refused():
    saved = make("cpu").state_dict()
    with pytest.raises(RuntimeError, match=r"shape \[6, 40, 64\], expected \[6, 64, 40\]"):
        make("cpu", 6, 40, 64).load_state_dict(saved)
    with pytest.raises(RuntimeError, match="absmax"):
        make("cpu").load_state_dict({k: v for k, v in saved.items() if k != "weight.absmax"})


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_compute_the_same_and_share_nothing(how, device):
    layer = make(device, bias=True)
    x, experts = torch.randn(5, 64, device=device), choices(5, 2, 6, device)
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))

    assert torch.equal(twin(x, experts), layer(x, experts))
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert twin.weight.module is twin and twin.quant_state is twin.weight.quant_state


def test_state_is_recovered_when_a_tool_replaced_the_parameter(device):
    layer = make(device)
    x, experts = torch.randn(5, 64, device=device), choices(5, 2, 6, device)
    expected = layer(x, experts)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(layer(x, experts), expected)


# --- other forms of the same weight --------------------------------------------------------------------------------


def test_from_dense(device):
    weight, bias = torch.randn(3, 40, 64, device=device), torch.randn(3, 40, device=device)
    layer = Experts4bit.from_dense(weight, bias, quant_type="fp4", blocksize=32, compress_statistics=False)

    packed, state = bnb.functional.quantize_4bit(weight, quant_type="fp4", blocksize=32)
    assert_same_bytes(layer.weight.data, packed)
    assert layer.quant_state == state and layer.quant_state is layer.weight.quant_state
    assert torch.equal(layer.bias, bias) and layer.bias.data_ptr() != bias.data_ptr()
    assert layer.weight.blocksize == 32 and layer.weight.module is layer
    assert Experts4bit.from_dense(weight.bfloat16(), device="cpu").quant_state.dtype == torch.bfloat16


@pytest.mark.parametrize("nested", [False, True])
def test_a_parametrized_parameter_and_back(device, nested):
    """The codes and statistics stay where they are; nothing is quantized twice."""
    module = nn.Module()
    module.up = nn.Parameter(torch.randn(6, 40, 64, device=device, dtype=torch.bfloat16))
    replace_parameter_4bit(module, "up", compress_statistics=nested, blocksize=32)
    values, codes = module.up, module.parametrizations.up.original

    layer = Experts4bit.from_parametrized(module, "up", compute_dtype=torch.float32)

    assert (layer.num_experts, layer.in_features, layer.out_features) == (6, 64, 40)
    assert layer.weight.data_ptr() == codes.data_ptr()
    assert layer.quant_state == module.parametrizations.up[0].quant_state
    x, experts = torch.randn(5, 64, device=device), choices(5, 2, 6, device)
    assert relative_error(layer(x, experts), expected_output(layer, x, experts)) < 2e-6
    assert torch.equal(dequantize_4bit(layer.weight.data, layer.quant_state), values)

    other = nn.Module()
    other.register_buffer("up", torch.zeros(3))
    layer.to_parametrized(other, "up")
    assert torch.equal(other.up, values)
    assert other.parametrizations.up.original.data_ptr() == codes.data_ptr()
    same_state(other.state_dict(), module.state_dict())
    with pytest.raises(ValueError, match="name must not be a parametrized parameter, got 'up'"):
        layer.to_parametrized(other, "up")


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints_go_both_ways(nested):
    """One file serves a model with parametrized parameters, and one with Experts4bit in their place."""
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.up = nn.Parameter(torch.randn(6, 40, 64))
    replace_parameter_4bit(model.mlp, "up", compress_statistics=nested)
    saved = model.state_dict()

    layer = Experts4bit.from_state_dict(saved, "mlp.up")
    assert layer.weight.data_ptr() == saved["mlp.up"].data_ptr()
    assert torch.equal(dequantize_4bit(layer.weight.data, layer.quant_state), model.mlp.up)

    replaced = nn.Module()
    replaced.mlp = nn.Module()
    replaced.mlp.up = layer
    again = Experts4bit.from_state_dict(replaced.state_dict(), "mlp.up")
    same_state(again.state_dict(), layer.state_dict())

    fresh = nn.Module()
    fresh.mlp = nn.Module()
    fresh.mlp.up = nn.Parameter(torch.randn(6, 40, 64))
    replace_parameter_4bit(fresh.mlp, "up", quant_type="fp4")
    fresh.load_state_dict(replaced.state_dict(), strict=True)
    same_state(fresh.state_dict(), saved)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quant_type": "nf5"}, "quant_type"),
        ({"blocksize": 48}, "blocksize 48"),
        ({"blocksize": 512}, r"in_features \* out_features must be a multiple of blocksize 512"),
        ({"compute_dtype": torch.int8}, "compute_dtype"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        Experts4bit(6, 64, 41, **options)


def test_bad_input_is_named(device):
    layer = make(device)
    x, experts = torch.randn(5, 64, device=device), choices(5, 2, 6, device)
    elsewhere = "meta" if device == "cpu" else "cpu"
    for bad_x, bad_experts, text in (
        (x.long(), experts, r"x must be a floating-point tensor, got torch\.int64"),
        (
            x[:, :63],
            experts,
            r"x must be \[5, 64\] or \[5, 2, 64\] for experts \[5, 2\], got shape \[5, 63\]",
        ),
        (x[:4], experts, r"got shape \[4, 64\]"),
        (x, experts[:, 0].unsqueeze(0).unsqueeze(0), r"experts must be \[T\] or \[T, top_k\]"),
        (x, experts.float(), r"experts must be a tensor of integers, got torch\.float32"),
        (x, experts.to(elsewhere), "experts must be on x's device"),
    ):
        with pytest.raises(ValueError, match=text):
            layer(bad_x, bad_experts)
    with pytest.raises(ValueError, match=r"x must be floating-point \[rows, 64\]"):
        layer.forward_sorted(x[:, :63], torch.zeros(6, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="offsets must be int32"):
        layer.forward_sorted(x, torch.zeros(6, device=device))


def test_an_unquantized_module_says_what_to_do():
    layer = make("cpu", quantized=False)
    with pytest.raises(ValueError, match="Experts4bit is not quantized: move it to a device first"):
        layer(torch.randn(5, 64), choices(5, 2, 6, "cpu"))


def test_what_cannot_become_experts_is_named():
    module = nn.Linear(64, 4)
    with pytest.raises(
        ValueError, match="name must be a parameter that replace_parameter_4bit quantized, got 'weight'"
    ):
        Experts4bit.from_parametrized(module, "weight")
    replace_parameter_4bit(module, "weight")
    with pytest.raises(
        ValueError, match=r"must be 3D \[experts, out_features, in_features\], got shape \[4, 64\]"
    ):
        Experts4bit.from_parametrized(module, "weight")
    with pytest.raises(ValueError, match="has no 'mlp.up'"):
        Experts4bit.from_state_dict(module.state_dict(), "mlp.up")
    with pytest.raises(ValueError, match=r"weight must be 3D .*, got shape \[4, 64\]"):
        Experts4bit.from_dense(torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"bias must be \[2, 4\], one row an expert, got \[4\]"):
        Experts4bit.from_dense(torch.randn(2, 4, 64), torch.randn(4))


def test_repr_tells_sizes_and_format():
    text = repr(make("cpu", compute_dtype=torch.bfloat16))
    for part in ("num_experts=6", "in_features=64", "out_features=40", "nf4", "nested=True", "bfloat16"):
        assert part in text
    assert bnb.nn.modules.Experts4bit is Experts4bit and Experts4bit.__module__ == "bitsandbytes.nn.modules"


# --- graphs --------------------------------------------------------------------------------------------------------


class TestOneGraph:
    """torch.compile(fullgraph=True): a graph break raises."""

    @pytest.fixture(autouse=True)
    def _reset(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("own_inputs", [False, True])
    def test_forward_and_backward(self, device, own_inputs, nested, backend):
        layer = make(device, bias=True, compress_statistics=nested)
        experts = choices(5, 2, 6, device)
        shape = (5, 2, 64) if own_inputs else (5, 64)
        x = torch.randn(shape, device=device, requires_grad=True)
        traced = x.detach().clone().requires_grad_()
        grad = torch.randn(5, 2, 40, device=device)

        expected = layer(x, experts)
        expected.backward(grad)
        bias_grad, layer.bias.grad = layer.bias.grad, None
        y = torch.compile(layer, fullgraph=True, backend=backend)(traced, experts)
        y.backward(grad)

        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(traced.grad, x.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.bias.grad, bias_grad, rtol=1e-4, atol=1e-5)

    def test_one_graph_for_every_number_of_tokens(self, device):
        graphs = []
        layer = make(device)
        compiled = torch.compile(
            layer, fullgraph=True, dynamic=True, backend=lambda g, _: graphs.append(g) or g
        )
        for tokens in (4, 3, 7):
            x, experts = torch.randn(tokens, 64, device=device), choices(tokens, 2, 6, device)
            torch.testing.assert_close(compiled(x, experts), layer(x, experts))
        assert len(graphs) == 1

    def test_export(self):
        layer = make("cpu", bias=True)
        x, experts = torch.randn(3, 64), choices(3, 2, 6, "cpu")
        exported = torch.export.export(layer, (x, experts))
        torch.testing.assert_close(exported.module()(x, experts), layer(x, experts))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOnTheDevice:
    """Routing waits for nothing and can be captured; the whole layer can where the product has a kernel."""

    def test_routing_does_not_wait(self):
        layer, experts = make("cuda"), choices(64, 4, 6, "cuda")
        layer.route(experts)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer.route(experts)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.skipif(
        "cuda" not in OPERATORS["gemm_4bit_grouped"].kernels, reason="needs a grouped CUDA kernel"
    )
    def test_a_captured_layer_follows_its_inputs(self):
        layer = make("cuda", bias=True)
        x, experts = torch.randn(9, 64, device="cuda"), choices(9, 2, 6, "cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            layer(x, experts)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            y = layer(x, experts)
        for _ in range(3):
            x.normal_()
            experts.copy_(choices(9, 2, 6, "cuda"))
            graph.replay()
            torch.testing.assert_close(y, layer(x, experts).detach())
