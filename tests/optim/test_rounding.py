"""Stochastic rounding of bfloat16 parameters: unbiased, the same everywhere, and continued by a checkpoint."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from bitsandbytes import optim
from bitsandbytes.backends.default.rounding import random_bits
from processes import run_python

ONE_UP = 1.0 + 2.0**-7  # the bfloat16 after 1


def rounded(values, key=1, offset=0):
    return torch.ops.bitsandbytes.round_to_bfloat16(values, key, offset)


def in_plain_torch(values, key=1, offset=0):
    """The oracle on the CPU, whatever kernel serves it."""
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    index = torch.arange(offset, offset + values.numel())
    return ((bits + (random_bits(key, index) & 0xFFFF)) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("n", [0, 1, 255, 16385, 100003])
@pytest.mark.parametrize("offset", [0, 77, 2**32 - 5, 2**40])
def test_every_device_rolls_the_same_dice(device, n, offset):
    values = torch.randn(n)

    assert torch.equal(
        rounded(values.to(device), 2**61 + 3, offset).cpu(), in_plain_torch(values, 2**61 + 3, offset)
    )


def test_pieces_round_as_the_whole(device):
    values = torch.randn(1000, device=device)

    pieces = [rounded(part, 5, start) for part, start in ((values[:300], 0), (values[300:], 300))]

    assert torch.equal(torch.cat(pieces), rounded(values, 5))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_mean_is_the_value(device, share):
    """As often up as the value is far up; four standard deviations of a count."""
    n = 1 << 16
    values = torch.full((n,), 1.0 + share * 2.0**-7, device=device)

    result = rounded(values)

    assert set(result.tolist()) <= {1.0, ONE_UP}
    up = (result == ONE_UP).float().mean().item()
    assert abs(up - share) <= 4 * math.sqrt(share * (1 - share) / n) + 2.0**-16


def test_values_of_bfloat16_and_those_without_neighbours_stay(device):
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.5, -3.0, 2.0**-130], device=device)

    assert torch.equal(rounded(special).float(), special)
    assert rounded(torch.tensor([math.nan], device=device)).isnan().all()


def test_dice_of_neighbouring_elements_and_keys_are_independent():
    """Correlations of uniform numbers, against four standard deviations."""
    n = 1 << 16
    index = torch.arange(n)

    def uniform(key, shift=0):
        return ((random_bits(key, index + shift) & 0xFFFF).double() / 0xFFFF - 0.5) * math.sqrt(12)

    first = uniform(optim._rounding.rounding_key(3, 0, 1))
    assert abs(first.mean()) <= 4 / math.sqrt(n)
    for other in (
        uniform(optim._rounding.rounding_key(3, 0, 1), 1),
        uniform(optim._rounding.rounding_key(3, 0, 2)),
        uniform(optim._rounding.rounding_key(3, 1, 1)),
    ):
        assert abs((first * other).mean()) <= 4 / math.sqrt(n)


def test_wrong_dtype_is_refused(device):
    with pytest.raises(ValueError, match="A must be float32"):
        rounded(torch.ones(3, dtype=torch.bfloat16, device=device))


# --- optimizers ------------------------------------------------------------------------------------------------


def trained(device, steps=4, start=None, **options):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.ones(70, 64, device=device, dtype=torch.bfloat16))
    optimizer = optim.AdamW8bit([p], lr=1e-4, weight_decay=0.0, **options)
    if start is not None:
        p.data.copy_(start[0].detach())
        optimizer.load_state_dict(start[1].state_dict())
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p, optimizer


def test_small_steps_count(device):
    """A step of 1e-4 is lost below 1, whose neighbour is 2**-8 away, and arrives on average with the dice."""
    still, _ = trained(device)
    moved, _ = trained(device, stochastic_rounding=True)

    assert torch.equal(still, torch.ones_like(still))
    mean = 1.0 - moved.float().mean().item()
    assert mean == pytest.approx(4e-4, abs=4 * math.sqrt(4e-4 * 2.0**-8 / moved.numel()))


def test_checkpoint_continues_the_dice(device):
    whole, _ = trained(device, steps=6, stochastic_rounding=True)
    half = trained(device, steps=3, stochastic_rounding=True)

    torch.manual_seed(1)
    resumed, _ = trained(device, steps=3, start=half, stochastic_rounding=True)

    assert torch.equal(resumed, whole)


def test_copy_keeps_rounding(device):
    p, optimizer = trained(device, steps=1, stochastic_rounding=True)
    q, other = copy.deepcopy((p, optimizer))
    q = other.param_groups[0]["params"][0]
    for parameter, stepper in ((p, optimizer), (q, other)):
        parameter.grad = torch.ones_like(parameter)
        stepper.step()
    assert torch.equal(p, q)


def test_seed_comes_from_torchs_generator():
    def seed(start):
        torch.manual_seed(start)
        return optim.Lion([torch.nn.Parameter(torch.ones(2))], stochastic_rounding=True).param_groups[0][
            "rounding_seed"
        ]

    assert seed(1) == seed(1) != seed(2)


def test_off_unless_asked_for_and_never_for_other_dtypes(device):
    assert "rounding_seed" not in optim.AdamW([torch.nn.Parameter(torch.ones(2))]).param_groups[0]
    results = []
    for options in ({}, {"stochastic_rounding": True}):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 300, device=device))
        p.grad = torch.ones_like(p)
        optim.SGD([p], lr=0.1, momentum=0.9, **options).step()
        results.append(p)
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_other_than_true_and_false_is_refused(value):
    with pytest.raises(ValueError, match="stochastic_rounding must be True or False"):
        optim.AdamW8bit([torch.nn.Parameter(torch.ones(2))], stochastic_rounding=value)


def test_number_of_threads_does_not_matter():
    code = """
    import torch, bitsandbytes
    torch.set_num_threads({threads})
    values = torch.randn(200_001, generator=torch.Generator().manual_seed(0))
    print(torch.ops.bitsandbytes.round_to_bfloat16(values, 9, 0).view(torch.int16).long().cumsum(0).sum().item())
    """
    results = {run_python(code.replace("{threads}", str(n))).stdout for n in (1, 3)}
    assert len(results) == 1
