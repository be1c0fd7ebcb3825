"""The operators under the names of ``bitsandbytes.backends.triton.ops``: importable with Triton only, same results."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import pytest
import torch

MODULE = "bitsandbytes.backends.triton.ops"
HAS_TRITON = importlib.util.find_spec("triton") is not None
operators = torch.ops.bitsandbytes


@pytest.fixture
def ops(monkeypatch) -> types.ModuleType:
    """The module; where there is no Triton, an empty stand-in satisfies its import."""
    if not HAS_TRITON:
        monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return importlib.import_module(MODULE)


@pytest.mark.skipif(HAS_TRITON, reason="Triton is installed")
def test_without_triton_the_module_cannot_be_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match="triton"):
        importlib.import_module(MODULE)


def test_quantization_is_that_of_the_operators(ops, device):
    A = torch.randn(3, 128, device=device)
    code = torch.linspace(-1, 1, 256, device=device)
    codes, absmax = ops.quantize_blockwise(A, code, 64)
    for result, expected in zip((codes, absmax), operators.quantize_blockwise(A, code, 64), strict=True):
        assert torch.equal(result, expected)
    restored = ops.dequantize_blockwise(codes, absmax, code, 64, torch.float16)
    out = torch.empty_like(restored)
    assert ops.dequantize_blockwise_inplace(codes, absmax, code, 64, torch.float16, out) is None
    assert torch.equal(restored, operators.dequantize_blockwise(codes, absmax, code, 64, torch.float16))
    assert torch.equal(out, restored)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_is_that_of_the_operators(ops, device, quant_type):
    from bitsandbytes.functional import get_4bit_type

    W, x = torch.randn(24, 128, device=device), torch.randn(1, 128, device=device)
    packed, absmax = ops.quantize_4bit(W, 64, quant_type, torch.uint8)
    expected = operators.quantize_4bit(W, 64, quant_type, torch.uint8)
    assert torch.equal(packed, expected[0]) and torch.equal(absmax, expected[1])
    restored = ops.dequantize_4bit(packed, absmax, 64, quant_type, W.shape, torch.bfloat16)
    out = torch.empty_like(restored)
    ops.dequantize_4bit_inplace(packed, absmax, 64, quant_type, W.shape, torch.bfloat16, out)
    assert torch.equal(
        restored, operators.dequantize_4bit(packed, absmax, 64, quant_type, W.shape, torch.bfloat16)
    )
    assert torch.equal(out, restored)
    code = get_4bit_type(quant_type, device=device)
    result = ops.gemv_4bit(x, packed, W.shape, absmax, code, 64)
    torch.testing.assert_close(result, operators.gemv_4bit(x, packed, W.shape, absmax, code, 64))


def test_optimizer_updates_are_those_of_the_operators(ops, device):
    g, p = torch.randn(512, device=device), torch.randn(512, device=device)
    ours, theirs = p.clone(), p.clone()
    scalars = (0.0, 0.0, 0.9, 0.99, 0.0, 0.0, 1e-8, 0.0, 1, 1e-2, 1.0, False)
    ops.optimizer_update_32bit("lion", g, ours, torch.zeros_like(p), None, None, *scalars)
    operators.optimizer_update_32bit("lion", g, theirs, torch.zeros_like(p), None, None, *scalars)
    assert not torch.equal(ours, p)
    torch.testing.assert_close(ours, theirs)

    ours, theirs = p.clone(), p.clone()
    qmap = torch.linspace(-1, 1, 256, device=device)
    for update, parameter in (
        (ops.optimizer_update_8bit_blockwise, ours),
        (operators.optimizer_update_8bit_blockwise, theirs),
    ):
        state = torch.full((512,), 127, dtype=torch.uint8, device=device)
        absmax = torch.zeros(2, device=device)
        step = (0.9, 0.99, 0.0, 0.0, 1e-8, 1, 1e-2)
        update("lion", g, parameter, state, None, *step, qmap, None, absmax, None, 0.0, 1.0, False)
    assert not torch.equal(ours, p)
    torch.testing.assert_close(ours, theirs)
