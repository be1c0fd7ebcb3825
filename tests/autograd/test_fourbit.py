"""matmul_4bit: products against float64, gradients, layouts of the packed weight, and what a backward keeps."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from bitsandbytes.autograd._functions import MatMul4Bit, matmul_4bit
from bitsandbytes.functional import (
    QuantState,
    _convert_weight_packed_for_cpu,
    dequantize_4bit,
    quantize_4bit,
    quantize_blockwise,
)
from oracles import QUANT_TYPES, STORAGE_DTYPES, relative_error
from shapes import MATMUL_SHAPES

# Relative error of a product: the decoded weight and the result round to the dtype, half a unit in the last place each.
TOLERANCE = {dtype: 2 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def packed_weight(device, N=96, K=64, dtype=torch.float32, **options):
    return quantize_4bit(torch.randn(N, K, device=device, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_product_is_that_of_the_decoded_weight(device, quant_type, nested, dtype):
    for M, N, K in MATMUL_SHAPES:
        packed, state = packed_weight(device, N, K, dtype, quant_type=quant_type, compress_statistics=nested)
        A = torch.randn(M, K, device=device, dtype=dtype)
        bias = torch.randn(N, device=device, dtype=dtype)

        product = matmul_4bit(A, packed, state, bias=bias)

        weight = dequantize_4bit(packed, state).cpu().double()
        expected = A.cpu().double() @ weight.t() + bias.cpu().double()
        # Of the sum of magnitudes: a sum of few terms may cancel to almost nothing.
        magnitude = A.cpu().double().abs() @ weight.abs().t() + bias.cpu().double().abs()
        assert product.dtype == dtype
        assert (product.cpu().double() - expected).norm() < TOLERANCE[dtype] * magnitude.norm()


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 3, 2), (0,), (2, 0)])
def test_any_rank_and_no_rows_at_all(device, leading):
    packed, state = packed_weight(device)
    A = torch.randn(*leading, 64, device=device, requires_grad=True)
    bias = torch.randn(96, device=device, requires_grad=True)

    product = matmul_4bit(A, packed, state, bias=bias)
    product.sum().backward()

    assert product.shape == (*leading, 96)
    assert A.grad.shape == A.shape
    rows = A.numel() // 64
    assert bias.grad.tolist() == [float(rows)] * 96
    with torch.no_grad():
        assert torch.equal(matmul_4bit(A, packed, state, bias=bias), product)


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
def test_packed_weight_may_lie_in_any_way(device, storage):
    packed, state = packed_weight(device, quant_storage=storage)
    A = torch.randn(3, 64, device=device, requires_grad=True)
    expected = matmul_4bit(A, packed, state)
    (gradient,) = torch.autograd.grad(expected.sum(), A)
    larger = torch.cat([packed.view(torch.uint8).reshape(-1)[:1], packed.view(torch.uint8).reshape(-1)])

    ways = {"transposed": packed.t(), "flat": packed.reshape(-1)}
    if storage == torch.uint8:
        ways["slice"] = larger[1:].view(-1, 1)
    for name, way in ways.items():
        product = matmul_4bit(A, way, state)
        # Bytes that are not aligned may take another kernel, which adds in another order.
        assert relative_error(product, expected.double()) < 1e-6, name
        assert relative_error(torch.autograd.grad(product.sum(), A)[0], gradient.double()) < 1e-6, name


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_gradients_reach_input_and_bias_only(device, nested):
    packed, state = packed_weight(device, compress_statistics=nested)
    A = torch.randn(2, 3, 64, device=device, requires_grad=True)
    bias = torch.randn(96, device=device, requires_grad=True)
    grad = torch.randn(2, 3, 96, device=device)

    matmul_4bit(A, packed, state, bias=bias).backward(grad)

    weight = dequantize_4bit(packed, state).cpu().double()
    assert relative_error(A.grad, grad.cpu().double() @ weight) < 2e-6
    assert relative_error(bias.grad, grad.cpu().double().sum((0, 1))) < 2e-6
    assert packed.grad is None


def test_forward_decodes_in_the_input_dtype_and_backward_in_the_state_dtype_first(device):
    packed, state = packed_weight(device, dtype=torch.float16)
    A = torch.randn(3, 64, device=device, requires_grad=True)

    product = matmul_4bit(A, packed, state)
    product.sum().backward()

    rounded = dequantize_4bit(packed, state)
    exact_state = copy.copy(state)
    exact_state.dtype = torch.float32
    exact = dequantize_4bit(packed, exact_state)
    assert state.dtype == torch.float16, "the state must not change"
    assert not torch.equal(exact, rounded.float())
    assert relative_error(product, A.detach().cpu().double() @ exact.cpu().double().t()) < 2e-6
    assert relative_error(A.grad, rounded.cpu().double().sum(0).expand(3, -1)) < 2e-6


def test_backward_keeps_nothing_but_the_packed_weight(device):
    packed, state = packed_weight(device, N=256, K=256)
    A = torch.randn(512, 256, device=device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        matmul_4bit(A, packed, state).sum()
    assert sum(kept) == packed.nbytes


def test_weight_quantized_transposed_still_multiplies_and_says_so(device):
    packed, state = packed_weight(device, N=64, K=96)  # [in, out]
    A = torch.randn(2, 64, device=device, requires_grad=True)
    bias = torch.randn(96, device=device, requires_grad=True)

    with pytest.warns(DeprecationWarning, match="Re-quantize from the weight"):
        product = matmul_4bit(A, packed.t(), state, bias=bias)
    product.sum().backward()

    weight = dequantize_4bit(packed, state).cpu().double()
    assert relative_error(product, A.detach().cpu().double() @ weight + bias.detach().cpu().double()) < 2e-6
    assert relative_error(A.grad, weight.sum(1).expand(2, -1)) < 2e-6
    assert bias.grad.tolist() == [2.0] * 96


def test_square_weight_is_out_by_in(device):
    packed, state = packed_weight(device, N=64, K=64)
    A = torch.randn(2, 64, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        product = matmul_4bit(A, packed, state)
    assert (
        relative_error(product, A.cpu().double() @ dequantize_4bit(packed, state).cpu().double().t()) < 2e-6
    )


@pytest.mark.parametrize("needs_grad", [False, True])
def test_out_is_filled_and_returned(device, needs_grad):
    packed, state = packed_weight(device)
    A = torch.randn(2, 64, device=device, requires_grad=needs_grad)
    out = torch.empty(2, 96, device=device)

    result = matmul_4bit(A, packed, state, out=out)

    assert result is out
    assert torch.equal(out, matmul_4bit(A, packed, state))


def test_the_function_itself_fills_out(device):
    packed, state = packed_weight(device)
    A = torch.randn(2, 64, device=device, requires_grad=True)
    out = torch.empty(2, 96, device=device)
    result = MatMul4Bit.apply(A, packed, out, None, state)
    result.sum().backward()
    assert result.data_ptr() == out.data_ptr()
    assert relative_error(A.grad, dequantize_4bit(packed, state).sum(0).cpu().double().expand(2, -1)) < 2e-6


def test_flattened_nested_statistics_are_treated_as_plain(device):
    packed, state = packed_weight(device, compress_statistics=True)
    A = torch.randn(2, 64, device=device)
    expected = matmul_4bit(A, packed, state)
    from bitsandbytes.functional import dequantize_blockwise

    state.absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    state.nested, state.offset, state.state2 = False, None, None

    assert relative_error(matmul_4bit(A, packed, state), expected.double()) < 1e-6


def test_statistics_that_a_loader_cast_still_work(device):
    packed, state = packed_weight(device)
    A = torch.randn(2, 64, device=device)
    expected = matmul_4bit(A, packed, state)
    state.absmax = state.absmax.half()
    assert relative_error(matmul_4bit(A, packed, state), expected.double()) < 1e-3


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("remembers", [True, False], ids=["ours", "pickled by an earlier release"])
def test_state_in_the_cpu_tile_layout_is_unpacked(nested, remembers):
    packed, state = packed_weight("cpu", N=64, K=128, quant_type="nf4", compress_statistics=nested)
    A = torch.randn(3, 128, requires_grad=True)
    expected = matmul_4bit(A, packed, state)
    tiles, tile_state = _convert_weight_packed_for_cpu(packed, copy.copy(state))
    if not remembers:
        del tile_state.original_statistics

    product = matmul_4bit(A, tiles, tile_state)
    product.sum().backward()

    assert tile_state.packing_format_for_cpu
    # Without the statistics kept aside theirs are bfloat16: a relative 2**-9.
    assert relative_error(product, expected.double()) < (1e-7 if remembers else 2**-8)
    assert A.grad.shape == A.shape


def test_what_does_not_fit_is_named(device):
    packed, state = packed_weight(device)
    A = torch.randn(2, 64, device=device)
    with pytest.raises(ValueError, match="quant_state is required"):
        matmul_4bit(A, packed, None)
    stack, stack_state = quantize_4bit(torch.randn(2, 4, 64, device=device))
    with pytest.raises(ValueError, match="must be 2D"):
        matmul_4bit(A, stack, stack_state)
    with pytest.raises(RuntimeError, match="inner dim"):
        matmul_4bit(torch.randn(2, 63, device=device), packed, state)
    with pytest.raises(ValueError, match="at least"):
        matmul_4bit(A, packed[:-1], state)
    with pytest.raises(ValueError, match="bias"):
        matmul_4bit(A, packed, state, bias=torch.randn(95, device=device))
    with pytest.raises(ValueError, match="float16, bfloat16, or float32"):
        matmul_4bit(A.long(), packed, state)


def test_other_second_level_blocks_are_refused(device):
    packed, state = packed_weight(device)
    absmax, state2 = quantize_blockwise(state.absmax, blocksize=128)
    nested = QuantState(
        absmax,
        state.shape,
        state.code,
        state.blocksize,
        state.quant_type,
        state.dtype,
        state.absmax.mean(),
        state2,
    )
    with pytest.raises(NotImplementedError, match=r"state2\.blocksize"):
        matmul_4bit(torch.randn(2, 64, device=device), packed, nested)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_one_graph_gives_the_same_product_and_gradient(device, nested):
    packed, state = packed_weight(device, compress_statistics=nested)
    bias = torch.randn(96, device=device, requires_grad=True)
    eager = torch.randn(3, 64, device=device, requires_grad=True)
    traced = eager.detach().clone().requires_grad_()

    expected = matmul_4bit(eager, packed, state, bias=bias)
    compiled = torch.compile(
        lambda x: matmul_4bit(x, packed, state, bias=bias), fullgraph=True, backend="aot_eager"
    )
    product = compiled(traced)

    torch.testing.assert_close(product, expected)
    torch.testing.assert_close(
        torch.autograd.grad(product.sum(), traced)[0], torch.autograd.grad(expected.sum(), eager)[0]
    )
