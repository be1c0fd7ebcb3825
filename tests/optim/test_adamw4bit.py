"""AdamW with 4-bit state: how much it keeps, how near to AdamW it trains, what its checkpoints hold."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from bitsandbytes import optim

WRAPPER = "__bnb_optimizer_quant_state__"


def regression(device, make, steps=200):
    """Mean loss of the last 40 steps of a small network that learns another one; inputs of very unequal sizes."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)).to(device)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 257), nn.GELU(), nn.Linear(257, 10)
    ).to(device)
    optimizer, losses = make(model.parameters()), []
    for _ in range(steps):
        x = (torch.randn(128, 64, generator=generator) * torch.logspace(-1.5, 0.5, 64)).to(device)
        loss = (model(x) - 3 * teacher(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], sum(losses[-40:]) / 40


def stepped(device, p, steps=3, start=None, seed=0, **options):
    optimizer = optim.AdamW4bit([p], lr=1e-2, **options)
    if start is not None:
        optimizer.load_state_dict(start)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=generator).to(device, p.dtype)
        optimizer.step()
    return optimizer


def state_bytes(optimizer, p):
    tensors = {key: t for key, t in optimizer.state[p].items() if isinstance(t, torch.Tensor)}
    # One map serves all parameters.
    return sum(t.nbytes for key, t in tensors.items() if not key.startswith("qmap"))


def test_state_takes_a_byte_and_a_sixteenth_a_parameter(device):
    p = nn.Parameter(torch.ones(512, 128, device=device))

    optimizer = stepped(device, p, steps=1)

    assert state_bytes(optimizer, p) == p.numel() + 2 * 4 * p.numel() // 128
    reference = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    reference.step()
    assert 7.5 * state_bytes(optimizer, p) <= sum(
        reference.state[p][k].nbytes for k in ("exp_avg", "exp_avg_sq")
    )


def test_loss_is_within_a_twentieth_of_adamws(device):
    first, exact = regression(device, lambda params: torch.optim.AdamW(params, lr=3e-3))
    _, ours = regression(device, lambda params: optim.AdamW4bit(params, lr=3e-3))

    assert exact < 0.05 * first
    assert ours <= 1.05 * exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 127, 129, 4097])
def test_first_step_is_adamws(device, dtype, n):
    """It uses the averages before they are encoded: zeros decode to zeros."""
    torch.manual_seed(0)
    start, grad = torch.randn(n, device=device, dtype=dtype), torch.randn(n, device=device, dtype=dtype)
    results = []
    for make in (
        lambda p: optim.AdamW4bit(p, lr=1e-2, min_4bit_size=0),
        lambda p: optim.AdamW32bit(p, lr=1e-2),
    ):
        p = nn.Parameter(start.clone())
        p.grad = grad.clone()
        make([p]).step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_zero_gradients_never_move_a_parameter_and_broken_ones_stay_alone(device):
    p = nn.Parameter(torch.ones(3, 256, device=device))
    optimizer = optim.AdamW4bit([p], lr=0.1, weight_decay=0.0, min_4bit_size=0)
    for _ in range(5):
        p.grad = torch.randn_like(p)
        p.grad[:, 7] = 0.0
        p.grad[1, 3] = math.inf
        p.grad[1, 4] = math.nan
        optimizer.step()

    assert (p[:, 7] == 1.0).all()
    assert p.isfinite().all() and p[1, 3] == 1.0 and p[1, 4] == 1.0
    assert (p[1, 5:7] != 1.0).all()


def test_slow_average_moves_although_its_steps_are_smaller_than_its_levels(device):
    """A gradient that halves: squares decay to a quarter; nearest levels would never leave the first ones."""
    p = nn.Parameter(torch.zeros(128 * 64, device=device))
    optimizer = optim.AdamW4bit([p], lr=0.0, betas=(0.9, 0.99))
    scale = torch.ones_like(p)
    for step in range(300):
        scale[1::2] = 1.0 if step == 0 else 0.5
        p.grad = scale.clone()
        optimizer.step()

    state = optimizer.state[p]
    codes = torch.stack((state["state2"] >> 4, state["state2"] & 15), dim=-1).view(-1).int()
    values = state["qmap2"][codes] * state["absmax2"].repeat_interleave(128)
    small, large = values[1::2].mean().item(), values[::2].mean().item()
    assert small / large == pytest.approx(0.25, rel=0.1)


def test_state_has_the_documented_keys(device):
    p = nn.Parameter(torch.ones(65, 65, device=device))
    saved = stepped(device, p).state_dict()

    state = saved["state"][0]
    blocks = -(65 * 65 // -128)
    assert state.keys() == {"step", WRAPPER}
    shapes = {key: tuple(value.shape) for key, value in state[WRAPPER].items()}
    assert shapes == {
        "state1": (2113,), "state2": (2113,), "qmap1": (16,), "qmap2": (16,), "absmax1": (blocks,), "absmax2": (blocks,)
    }  # fmt: skip
    assert "state_seed" in saved["param_groups"][0]


def test_resumed_run_is_the_uninterrupted_one(device):
    whole, half = (nn.Parameter(torch.ones(70, 64, device=device)) for _ in range(2))
    torch.manual_seed(0)
    one = stepped(device, whole)
    torch.manual_seed(0)
    two = stepped(device, half)
    file = io.BytesIO()
    torch.save(two.state_dict(), file)
    file.seek(0)
    generator = torch.Generator().manual_seed(5)
    resumed = optim.AdamW4bit([half])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        grad = torch.randn(70, 64, generator=generator).to(device)
        for p, optimizer in ((whole, one), (half, resumed)):
            p.grad = grad.clone()
            optimizer.step()

    assert torch.equal(whole, half)


def test_state_of_other_bits_is_refused(device):
    p = nn.Parameter(torch.ones(70, 64, device=device))
    eight = optim.AdamW8bit([p])
    p.grad = torch.ones_like(p)
    eight.step()

    with pytest.raises(ValueError, match="state1 must have shape"):
        optim.AdamW4bit([p]).load_state_dict(eight.state_dict())


def test_small_parameters_and_overridden_ones_keep_32_bits(device):
    p, q = (nn.Parameter(torch.ones(n, device=device)) for n in (4095, 4096))
    optimizer = optim.AdamW4bit([p, q])
    for x in (p, q):
        x.grad = torch.ones_like(x)
    optimizer.step()

    assert [optimizer.state[x]["state1"].dtype for x in (p, q)] == [torch.float32, torch.uint8]
