"""Parameters that step together, as they do on CUDA: the same results as one by one, whatever they share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import many_in_torch
from bitsandbytes import optim
from optim_cases import make, one_by_one, parameters


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    return many_in_torch.install(monkeypatch.setattr)


def pair_of(name, params, **settings):
    """An optimizer that steps on many at once, and one that steps on its own copies one by one."""
    torch.manual_seed(0)
    together = make(name, params, **settings)
    torch.manual_seed(0)
    twins = copy.deepcopy(params)
    return together, one_by_one(name, twins, **settings), twins


def step(optimizers, params, twins, dtype=None):
    for p, q in zip(params, twins, strict=True):
        p.grad = (torch.randn_like(p) * 0.01).to(dtype or p.dtype)
        q.grad = p.grad.clone()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", ["AdamW", "AdEMAMix", "LAMB", "LARS", "SGD", "Lion"])
def test_together_is_one_by_one(launches, family, bits, dtype):
    params = parameters(12, dtype, device="cpu")
    together, apart, twins = pair_of(f"{family}{bits}bit", params)

    for _ in range(3):
        step((together, apart), params, twins)

    limits = {"rtol": 1e-2, "atol": 1e-3} if family in ("LAMB", "LARS") else {"rtol": 1e-6, "atol": 1e-7}
    if dtype == torch.bfloat16:
        limits = {"rtol": 1e-2, "atol": 1e-4}
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, **limits)
        assert together.state[p]["step"] == 3
    assert len(launches) == 3 * (1 if bits == 32 else 2)  # small parameters have 32-bit state
    assert sum(launches) == 3 * len(params)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "Lion8bit", "SGD32bit"])
def test_dice_are_those_of_single_steps(launches, name):
    params = [*parameters(12, torch.bfloat16, device="cpu"), nn.Parameter(torch.ones(300))]
    groups = [{"params": params[:5], "lr": 1e-2}, {"params": params[5:], "lr": 1e-3}]
    together, apart, twins = pair_of(name, params, stochastic_rounding=True)
    for optimizer, own in ((together, params), (apart, twins)):
        seed = optimizer.param_groups[0]["rounding_seed"]
        optimizer.param_groups.clear()
        for group, part, seed_of_group in zip(groups, (own[:5], own[5:]), (seed, -5), strict=True):
            optimizer.add_param_group({**group, "params": part, "rounding_seed": seed_of_group})

    for _ in range(3):
        step((together, apart), params, twins)

    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
    assert sum(launches) == 3 * len(params)


def test_rounding_may_be_switched_on_and_off(launches):
    params = parameters(12, torch.bfloat16, device="cpu")
    together, apart, twins = pair_of("AdamW32bit", params, stochastic_rounding=True)
    seed = together.param_groups[0]["rounding_seed"]

    for current in (seed, None, seed):
        for optimizer in (together, apart):
            optimizer.param_groups[0]["rounding_seed"] = current
        step((together, apart), params, twins)

    assert all(map(torch.equal, params, twins))


@pytest.mark.parametrize("bits", [8, 32])
def test_16bit_parameters_take_float32_gradients(launches, bits):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch ties the gradient's dtype to the parameter's")
    params = parameters(12, torch.bfloat16, device="cpu")
    together, apart, twins = pair_of(f"AdamW{bits}bit", params)
    for p in params + twins:
        p.grad_dtype = torch.float32

    for _ in range(2):
        step((together, apart), params, twins, torch.float32)

    for p, q in zip(params, twins, strict=True):  # float32 sums may differ in the last place, and round apart
        torch.testing.assert_close(p, q, rtol=2**-7, atol=0)
        assert (p != q).sum() <= 1 + p.numel() // 200
    assert sum(launches) == 2 * len(params)


def test_moved_parameters_and_replaced_state_are_noticed(launches):
    params = parameters(12, device="cpu")
    together, apart, twins = pair_of("AdamW8bit", params)
    for turn in range(5):
        step((together, apart), params, twins)
        if turn == 1:
            params[3].data = params[3].data.clone()
        if turn == 2:
            together.load_state_dict(copy.deepcopy(together.state_dict()))
        if turn == 3:
            for optimizer, own in ((together, params), (apart, twins)):
                optimizer.state[own[8]]["step"] = 1

    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert together.state[params[8]]["step"] == 2


def test_clipped_gradients_step_one_by_one(launches):
    params = parameters(12, device="cpu")
    optimizer = optim.AdamW8bit(params, percentile_clipping=5)
    for p in params:
        p.grad = torch.ones_like(p)

    optimizer.step()

    assert not launches
