"""Scales fitted to the weights: never worse than plain ones, better on weights as they are, and as good as a search."""

from __future__ import annotations

import pytest
import torch

import oracles
from bitsandbytes._quant.clipping import clip_to_fit
from oracles import FLOAT_DTYPES, QUANT_TYPES


def block_errors(A: torch.Tensor, target: torch.Tensor, blocksize: int, quant_type: str) -> torch.Tensor:
    """What quantizing ``A`` loses of ``target``, a sum of squares for each block."""
    packed, absmax = oracles.quantize_4bit(A, blocksize, quant_type)
    decoded = oracles.dequantize_4bit(packed, absmax, blocksize, quant_type, A.shape, torch.float32)
    errors = (decoded.cpu() - target.cpu().float()).double().square().view(-1)
    whole = torch.zeros(-(errors.numel() // -blocksize) * blocksize, dtype=torch.float64)
    whole[: errors.numel()] = errors
    return whole.view(-1, blocksize).sum(1)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("shape", "blocksize"), [((64, 192), 64), ((33, 77), 32), ((7,), 4096), ((3, 5, 97), 128)]
)
def test_no_block_loses_and_the_whole_gains(device, quant_type, dtype, shape, blocksize):
    A = torch.randn(shape).to(device, dtype)

    clipped = clip_to_fit(A, blocksize, quant_type)

    assert clipped.shape == A.shape and clipped.dtype == dtype and clipped.device == A.device
    before = block_errors(A, A, blocksize, quant_type)
    after = block_errors(clipped, A, blocksize, quant_type)
    assert (after <= before * (1 + 1e-5)).all()
    if before.numel() > 50:  # a dozen blocks may all be lucky as they are
        assert after.sum() < 0.97 * before.sum()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_an_outlier_no_longer_rules_its_block(quant_type):
    """One value three times as large as any other of 4096: clipping it costs less than it coarsens the rest."""
    A = torch.rand(4096) * 2 - 1
    A[17] = 3.0

    clipped = clip_to_fit(A, 4096, quant_type)

    assert clipped.abs().max() < 2.2
    assert torch.equal(clipped.abs() < A.abs(), A.abs() > clipped.abs().max())


def test_runs_are_seamless():
    """Longer than what is searched at a time, with a rest: each block as if it came alone."""
    A = torch.randn((1 << 17) + 200)

    clipped = clip_to_fit(A, 64, "fp4")

    for start in (0, (1 << 17) - 64, 1 << 17, (1 << 17) + 192):
        assert torch.equal(clipped[start : start + 64], clip_to_fit(A[start : start + 64], 64, "fp4"))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_blocks_that_are_not_finite_stay(value):
    A = torch.randn(4, 64)
    A[1, 5] = value

    clipped = clip_to_fit(A, 64, "nf4")

    assert torch.equal(clipped[1].nan_to_num(7.0, 8.0, 9.0), A[1].nan_to_num(7.0, 8.0, 9.0))
    assert clipped[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("A", [torch.empty(0), torch.zeros(5, 64), torch.randn(64, 9).t()])
def test_empty_zero_and_transposed(A):
    clipped = clip_to_fit(A, 64, "nf4")

    assert clipped.shape == A.shape
    assert torch.equal(clipped, clip_to_fit(A.contiguous(), 64, "nf4"))
    assert (clipped.abs() <= A.abs()).all()
