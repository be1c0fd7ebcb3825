"""Stepping many tensors at once on a CPU: bit for bit what single steps do, and what single steps are left to do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitsandbytes import optim
from bitsandbytes._native import ABI, has_native, lib
from optim_cases import make, one_by_one

pytestmark = pytest.mark.skipif(
    not has_native("bnb_cpu_optimizer_update_many"), reason="needs the native library"
)

SIZES = [4096, 1, 70_001, 255, 256, 257, 4097, 16_384]  # of 4096 elements and more, state has 8 bits


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(size).to(dtype)) for size in SIZES]
    return [*params, nn.Parameter(torch.randn(64, 80).to(dtype)), nn.Parameter(torch.empty(0, dtype=dtype))]


def groups_of(params: list[nn.Parameter]) -> list[dict]:
    return [{"params": params[::2], "lr": 1e-2}, {"params": params[1::2], "lr": 3e-3, "weight_decay": 0.2}]


def step(together, apart, params, twins) -> None:
    for p, q in zip(params, twins, strict=True):
        p.grad = torch.randn_like(p) * torch.rand(()) * 0.1
        q.grad = p.grad.clone()
    together.step()
    apart.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", ["AdamW", "AdEMAMix", "SGD", "Lion", "RMSprop", "Adagrad"])
def test_together_is_one_by_one(family, bits, dtype):
    params = parameters(dtype)
    twins = copy.deepcopy(params)
    together = make(f"{family}{bits}bit", groups_of(params))
    apart = one_by_one(f"{family}{bits}bit", groups_of(twins))

    for _ in range(3):
        step(together, apart, params, twins)

    assert together._many._launches and not together._many._rest
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        for key, value in apart.state[q].items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(together.state[p][key], value), key


GRADIENTS = {  # instead of the gradient of a parameter of 64 x 80
    "negated": lambda g: torch._neg_view(-g),
    "strided": lambda g: g.t().contiguous().t(),
    "shared": lambda g: g,  # by two parameters
    "missing": lambda g: None,
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_may_be_of_another_kind_at_every_step(kind):
    params = [*parameters(torch.float32), nn.Parameter(torch.randn(64, 80))]
    twins = copy.deepcopy(params)
    together, apart = optim.AdamW8bit(params), one_by_one("AdamW8bit", twins)
    changed = [i for i, p in enumerate(params) if p.dim() == 2]

    for turn in range(7):
        step_on = torch.randn(64, 80)
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if turn % 3 == 2:
            for i in changed if kind == "shared" else changed[:1]:
                params[i].grad = GRADIENTS[kind](step_on)
                twins[i].grad = None if params[i].grad is None else step_on.clone()
        together.step()
        apart.step()

    assert all(map(torch.equal, params, twins))
    assert [together.state[p]["step"] for p in params] == [apart.state[q]["step"] for q in twins]


def test_a_step_on_familiar_gradients_is_seen_by_whoever_watches_operators():
    params = parameters(torch.float32)
    optimizer = optim.AdamW8bit(params)
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(2):
        optimizer.step()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()

    assert "bitsandbytes::optimizer_update_many" in {event.key for event in profile.key_averages()}


def test_the_number_of_threads_changes_nothing():
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            params = parameters(torch.float32)
            optimizer = optim.AdamW8bit(params)
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
            results.append(params)
    finally:
        torch.set_num_threads(before)

    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("case", ["limit", "dice", "gradient"])
def test_what_is_left_to_single_steps(case):
    params = parameters(torch.bfloat16)
    optimizer = {
        "limit": lambda: optim.LAMB8bit(params),
        "dice": lambda: optim.AdamW8bit(params, stochastic_rounding=True),
        "gradient": lambda: optim.AdamW8bit(params),
    }[case]()
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
        if case == "gradient":
            p.grad_dtype = None
            p.grad = torch.randn(p.shape)
    optimizer.step()

    assert not optimizer._many._launches
    assert all((p != q).any() for p, q in zip(params, before, strict=True) if p.numel() > 1000)


def test_limits_and_dice_are_refused_by_name():
    hyper = ABI.structs["bnb_optimizer_hyper"]
    arguments = (b"\0" * 8, bytes(hyper(max_unorm=1.0)), b"\0" * 104, 0, None, None, 1, 0, 1)
    with pytest.raises(ValueError, match="no limit and no dice"):
        lib.bnb_cpu_optimizer_update_many(*arguments)
