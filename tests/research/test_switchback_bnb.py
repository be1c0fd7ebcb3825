"""``switchback_bnb``: int8 forward, decoded weight for the input's gradient, exact weight gradient."""

from __future__ import annotations

import itertools

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.research import switchback_bnb
from bitsandbytes.research.autograd._functions import SwitchBackBnb

pytestmark = pytest.mark.filterwarnings("ignore:.*inputs will be cast from:UserWarning")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(values after rounding to int8 rows, float64; absmax)``."""
    exact = x.detach().cpu().double()
    absmax = exact.abs().amax(dim=-1, keepdim=True).clamp(min=1e-300)
    return (127 * exact / absmax).round() * absmax / 127, absmax


def fraction_outside(result: torch.Tensor, exact: torch.Tensor, atol: float, rtol: float) -> float:
    difference = (result.detach().cpu().double() - exact).abs()
    return (difference > atol + rtol * exact.abs()).double().mean().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("threshold", "bias", "transposed", "has_fp16_weights"),
    [*itertools.product([0.0, 6.0], [False, True], [False, True], [True, False])],
)
def test_acceptance(device, dtype, threshold, bias, transposed, has_fp16_weights):
    """The figures for M = 64, N = 48, K = 32."""
    A = torch.randn(64, 32, device=device)
    if threshold:
        A[:, torch.randperm(32)[:4]] = 6.0
    A = A.to(dtype).requires_grad_()
    B = torch.randn(32, 48, device=device).t() if transposed else torch.randn(48, 32, device=device)
    B = torch.nn.init.xavier_uniform_(B).to(dtype).requires_grad_()
    bias = torch.randn(48, device=device).to(dtype).requires_grad_() if bias else None
    state = bnb.MatmulLtState()
    state.threshold, state.has_fp16_weights = threshold, has_fp16_weights
    if not has_fp16_weights:
        state.CB, state.SCB, _ = bnb.functional.int8_vectorwise_quant(B.detach().half())
    target = torch.randn(64, 48, device=device).to(dtype)

    out = switchback_bnb(A, B, state=state, bias=bias)
    torch.nn.functional.mse_loss(out, target).backward()

    exact_A, exact_B, exact_target = (t.detach().cpu().double() for t in (A, B, target))
    exact = exact_A @ exact_B.t() + (0 if bias is None else bias.detach().cpu().double())
    exact_G = 2 * (exact - exact_target) / exact.numel()
    assert out.dtype == dtype
    assert fraction_outside(out, exact, 0.01, 0.1) <= (0.0175 if dtype == torch.float16 else 0.021)
    assert fraction_outside(out, exact, 0.035, 0.2) <= 0.001
    torch.testing.assert_close(A.grad.cpu().double(), exact_G @ exact_B, atol=0.015, rtol=0.1)
    torch.testing.assert_close(B.grad.cpu().double(), exact_G.t() @ exact_A, atol=0.18, rtol=0.3)
    if bias is not None:
        torch.testing.assert_close(bias.grad.cpu().double(), exact_G.sum(dim=0), atol=0.1, rtol=0.01)


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32), (2, 2, 2, 32)])
def test_any_rank_follows_the_definition(device, shape):
    A = torch.randn(shape, device=device, requires_grad=True)
    B = torch.randn(48, 32, device=device, requires_grad=True)
    G = torch.randn(*shape[:-1], 48, device=device)

    out = switchback_bnb(A, B)
    out.backward(G)

    rows, grad = A.detach().cpu().double().reshape(-1, 32), G.cpu().double().reshape(-1, 48)
    weight, _ = int8_rows(B.half())
    expected = int8_rows(rows)[0] @ weight.t()
    # A value half-way between two integers may round either way in float32.
    for result, exact in ((out, expected), (A.grad, grad @ weight), (B.grad, grad.t() @ rows)):
        difference = result.detach().cpu().double().view(exact.shape) - exact
        assert difference.norm() <= 2e-3 * exact.norm()


def test_outlier_columns_use_the_float_weight(device):
    A, B = torch.zeros(4, 16, device=device), torch.randn(8, 16, device=device)
    A[:, 5] = 20.0
    state = bnb.MatmulLtState()
    out = switchback_bnb(A, B, state=state, threshold=6.0)
    assert state.threshold == 6.0 and state.idx.tolist() == [5]
    torch.testing.assert_close(out, A @ B.t())


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_nothing_in_nothing_out(device, shape):
    A = torch.zeros(shape, device=device, dtype=torch.float16, requires_grad=True)
    B = torch.randn(8, 16, device=device, dtype=torch.float16, requires_grad=True)
    out = switchback_bnb(A, B)
    out.sum().backward()
    assert out.shape == (*shape[:-1], 8) and out.dtype == torch.float16
    assert A.grad.shape == A.shape and B.grad.shape == B.shape and not B.grad.any()


def test_the_weight_is_quantized_once_while_gradients_accumulate(device):
    A, B = torch.randn(4, 16, device=device), torch.randn(8, 16, device=device, requires_grad=True)
    state = bnb.MatmulLtState()
    switchback_bnb(A, B, state=state).sum().backward()
    first = state.CB
    assert state.SB == ((8, 16), "row") and state.CBt.shape == (8, 16) and state.SCBt.shape == (16,)
    switchback_bnb(A, B, state=state).sum().backward()
    assert state.CB is first, "B.grad is there: the step is not over"
    B.grad = None
    switchback_bnb(A, B, state=state)
    assert state.CB is not first
    kept, state.is_training = state.CB, False
    switchback_bnb(A, B, state=state)
    assert state.CB is kept


def test_backward_needs_the_quantized_weight(device):
    A = torch.randn(4, 16, device=device, requires_grad=True)
    state = bnb.MatmulLtState()
    out = switchback_bnb(A, torch.randn(8, 16, device=device), state=state)
    state.reset_grads()
    with pytest.raises(Exception, match="CB matrix"):
        out.sum().backward()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes_than_float16_warn(device, dtype, recwarn):
    switchback_bnb(torch.randn(2, 16, device=device).to(dtype), torch.randn(8, 16, device=device).to(dtype))
    expected = [] if dtype == torch.float16 else [f"inputs will be cast from {dtype} to float16"]
    assert [w.category for w in recwarn] == [UserWarning] * len(expected)
    assert all(text in str(w.message) for w, text in zip(recwarn, expected, strict=True))


def test_autocast_decides_the_dtype(device):
    A, B = (
        torch.randn(4, 16, device=device, requires_grad=True),
        torch.randn(8, 16, device=device, requires_grad=True),
    )
    with torch.autocast(device, dtype=torch.bfloat16):
        out = switchback_bnb(A, B)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and A.grad.dtype == B.grad.dtype == torch.float32


def test_saved_tensors_pass_through_hooks_and_are_freed(device):
    A, B = (
        torch.randn(4, 16, device=device, requires_grad=True),
        torch.randn(8, 16, device=device, requires_grad=True),
    )
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        out = SwitchBackBnb.apply(A, B, None, None, bnb.MatmulLtState())
    assert len(packed) == 3
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
