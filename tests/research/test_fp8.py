"""Emulated FP8: rounding against a float64 model, gradients by their definition, accuracy of whole layers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.research.autograd._functions import MatMulFP8Global, MatMulFP8Mixed, get_block_sizes, prod

MATMULS = [bnb.research.matmul_fp8_mixed, bnb.research.matmul_fp8_global]
LAYERS = [bnb.research.nn.LinearFP8Mixed, bnb.research.nn.LinearFP8Global]


@pytest.fixture
def codes(device) -> dict[str, torch.Tensor]:
    create = bnb.functional.create_fp8_map
    return {"fw_code": create(True, 4, 3, 8).to(device), "bw_code": create(True, 5, 2, 8).to(device)}


def nearest(values: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Values rounded to the nearest entry of the map; float64."""
    table = code.cpu().double().unique()
    thresholds = (table[:-1] + table[1:]) / 2
    return table[torch.bucketize(values, thresholds)]


def rounded_tensor(x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    exact = x.detach().cpu().double()
    scale = exact.abs().max()
    return nearest(exact / scale, code) * scale


def rounded_blocks(x: torch.Tensor, code: torch.Tensor, blocksize: int) -> torch.Tensor:
    exact = x.detach().cpu().double().reshape(-1)
    blocks = []
    for block in exact.split(blocksize):
        scale = block.abs().max().clamp(min=1e-38)
        blocks.append(nearest(block / scale, code) * scale)
    return torch.cat(blocks).view(x.shape)


def random_clear_of_thresholds(*shape: int, code: torch.Tensor, blocksize: int | None = None) -> torch.Tensor:
    """Normal values, none so near a threshold of ``code`` that float32 may round it either way."""
    x = torch.randn(shape)
    table = code.cpu().double().unique()
    thresholds = (table[:-1] + table[1:]) / 2
    for block in x.view(-1).split(blocksize or x.numel()):
        scaled = block.double() / block.abs().max()
        block[(scaled[:, None] - thresholds).abs().amin(1) < 1e-6] *= 0.999
    return x


def agrees(result: torch.Tensor, exact: torch.Tensor, bound: float = 2e-3) -> bool:
    """Within ``bound`` of the norm."""
    return bool((result.detach().cpu().double() - exact).norm() <= bound * exact.norm())


@pytest.mark.parametrize("shape", [(1, 8), (7, 83), (2, 3, 96), (2, 2, 2, 64), (40,)])
def test_mixed_matmul_follows_its_definition(device, codes, shape):
    fw_code, bw_code = codes["fw_code"], codes["bw_code"]
    bsz, bsz2 = get_block_sizes(torch.empty(shape), torch.empty(shape[-1], 72))
    A = random_clear_of_thresholds(*shape, code=fw_code, blocksize=bsz).to(device).requires_grad_()
    B = random_clear_of_thresholds(shape[-1], 72, code=fw_code).to(device).requires_grad_()
    G = random_clear_of_thresholds(*shape[:-1], 72, code=bw_code, blocksize=bsz2).to(device)

    Y = bnb.research.matmul_fp8_mixed(A, B, **codes)
    Y.backward(G)

    weight = rounded_tensor(B, codes["fw_code"])
    rows, grad = A.detach().cpu().double().reshape(-1, shape[-1]), G.cpu().double().reshape(-1, 72)
    assert Y.shape == (*shape[:-1], 72)
    assert agrees(Y, rounded_blocks(A, codes["fw_code"], bsz) @ weight)
    assert agrees(A.grad, rounded_blocks(G, codes["bw_code"], bsz2) @ weight.t())
    assert agrees(B.grad, rows.t() @ grad, 1e-5)


@pytest.mark.parametrize("shape", [(1, 8), (7, 83), (2, 3, 96), (40,)])
def test_global_matmul_follows_its_definition(device, codes, shape):
    A = random_clear_of_thresholds(*shape, code=codes["fw_code"]).to(device).requires_grad_()
    B = random_clear_of_thresholds(shape[-1], 72, code=codes["fw_code"]).to(device).requires_grad_()
    G = random_clear_of_thresholds(*shape[:-1], 72, code=codes["bw_code"]).to(device)

    Y = bnb.research.matmul_fp8_global(A, B, **codes)
    Y.backward(G)

    weight = rounded_tensor(B, codes["fw_code"])
    rows, grad = rounded_tensor(A, codes["fw_code"]), rounded_tensor(G, codes["bw_code"])
    assert agrees(Y, rows @ weight)
    assert agrees(A.grad, grad @ weight.t())
    assert agrees(B.grad, rows.reshape(-1, shape[-1]).t() @ grad.reshape(-1, 72))


@pytest.mark.parametrize("matmul", MATMULS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("K", "N"), [(32, 96), (96, 96), (83, 40)])
def test_a_single_matmul_is_close(device, codes, matmul, dtype, K, N):
    """The acceptance figure: mean error below 0.115 for Xavier weights."""
    A = torch.randn(64, K, device=device).to(dtype).requires_grad_()
    B = nn.init.xavier_uniform_(torch.empty(K, N, device=device)).to(dtype).requires_grad_()

    Y = matmul(A, B, **codes)
    Y.float().square().mean().backward()

    assert Y.dtype == dtype and A.grad.dtype == dtype and B.grad.dtype == dtype
    assert (Y.float() - A.float() @ B.float()).abs().mean() < 0.115


@pytest.mark.parametrize("layer", LAYERS)
def test_two_layers_train_as_full_precision_does(device, layer):
    """The acceptance figures: output within 0.05, gradients of weights and biases within 2e-5, on average."""
    exact = nn.Sequential(nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 1024)).to(device)
    emulated = nn.Sequential(layer(1024, 2048), nn.GELU(), layer(2048, 1024)).to(device)
    emulated.load_state_dict(exact.state_dict())
    x = torch.randn(10, 1024, device=device)

    expected, result = exact(x), emulated(x)
    expected.mean().backward()
    result.mean().backward()

    assert (result - expected).abs().mean() < 0.05
    for ours, theirs in zip(emulated.parameters(), exact.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().mean() < 2e-5


@pytest.mark.parametrize("matmul", MATMULS)
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_nothing_in_nothing_out(device, codes, matmul, shape):
    A = torch.zeros(shape, device=device, dtype=torch.float16, requires_grad=True)
    B = torch.randn(16, 8, device=device, dtype=torch.float16, requires_grad=True)
    Y = matmul(A, B, **codes)
    Y.sum().backward()
    assert Y.shape == (*shape[:-1], 8) and Y.dtype == torch.float16
    assert A.grad.shape == A.shape and not B.grad.any()


@pytest.mark.parametrize("matmul", MATMULS)
def test_zeros_give_zeros(device, codes, matmul):
    A, B = torch.zeros(3, 16, device=device, requires_grad=True), torch.zeros(16, 8, device=device)
    Y = matmul(A, B, **codes)
    Y.sum().backward()
    assert not Y.any() and not A.grad.any()


@pytest.mark.parametrize("matmul", MATMULS)
def test_only_needed_gradients_are_computed(device, codes, matmul):
    A, B = torch.randn(4, 16, device=device), torch.randn(16, 8, device=device)
    matmul(A.requires_grad_(), B, **codes).sum().backward()
    assert A.grad is not None and B.grad is None
    A = A.detach()
    matmul(A, B.requires_grad_(), **codes).sum().backward()
    assert A.grad is None and B.grad is not None


@pytest.mark.parametrize("matmul", MATMULS)
def test_saved_tensors_pass_through_hooks_and_are_freed(device, codes, matmul):
    A = torch.randn(4, 16, device=device, requires_grad=True)
    B = torch.randn(16, 8, device=device, requires_grad=True)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        Y = matmul(A, B, **codes)
    assert len(packed) == 2
    Y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        Y.sum().backward()


@pytest.mark.parametrize("layer", LAYERS)
def test_autocast_decides_the_dtype(device, layer):
    module = layer(32, 16).to(device)
    x = torch.randn(4, 32, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = module(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32 and module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (2, 1, 3, 48)])
def test_layers_take_any_rank_without_noise(device, layer, bias, shape):
    module = layer(48, 20, bias=bias).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = module(torch.randn(shape, device=device))
        out.sum().backward()
    assert out.shape == (*shape[:-1], 20)
    assert (module.bias is None) != bias


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_are_plain_linears_to_checkpoints_and_copies(device, layer):
    module = layer(48, 20).to(device)
    x = torch.randn(3, 48, device=device)
    before = module(x)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert torch.equal(copy.deepcopy(module)(x), before)
    fresh = layer(48, 20).to(device)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), before)
    assert module.fw_code.device == x.device
    assert "fp8" in repr(module)


@pytest.mark.parametrize("layer", LAYERS)
def test_maps_follow_the_input(layer, accelerators):
    module = layer(32, 8)
    module(torch.randn(2, 32))
    assert module.fw_code.device.type == "cpu"
    for name in accelerators:
        module.to(name)(torch.randn(2, 32, device=name))
        assert module.fw_code.device.type == name and module.bw_code.device.type == name


@pytest.mark.parametrize(
    ("K", "N", "expected"),
    [
        (1, 64, (64, 64)),
        (65, 128, (128, 128)),
        (1024, 2048, (1024, 2048)),
        (1025, 2049, (2048, 4096)),
        (5000, 9000, (4096, 4096)),
        (96, 96, (128, 128)),
    ],
)
def test_block_sizes_are_powers_of_two_that_hold_the_features(K, N, expected):
    A = torch.empty(3, K, device="meta")
    assert get_block_sizes(A, torch.empty(K, N, device="meta")) == expected
    assert get_block_sizes(A, torch.empty(N, K, device="meta")) == expected
    layer = bnb.research.nn.LinearFP8Mixed(min(K, 128), min(N, 128))
    assert (layer.bsz, layer.bsz2) == get_block_sizes(torch.empty(1, min(K, 128)), layer.weight)


def test_names():
    assert prod([2, 3, 4]) == 24
    assert issubclass(MatMulFP8Mixed, torch.autograd.Function)
    assert issubclass(MatMulFP8Global, torch.autograd.Function)
    assert not hasattr(bnb, "matmul_fp8_mixed")


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_trace_without_graph_breaks(device, layer):
    module = layer(48, 20).to(device)
    x, y = (torch.ones(3, 48, device=device).mul_(0.3).requires_grad_() for _ in range(2))
    expected = module(x)
    expected.square().sum().backward()
    result = torch.compile(module, fullgraph=True, backend="aot_eager")(y)
    result.square().sum().backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(y.grad, x.grad)
