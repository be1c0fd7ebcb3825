"""Muon with 8-bit momentum, against torch's Muon and against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitsandbytes import optim
from bitsandbytes.optim import muon

needs_torch_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch.optim.Muon")


def trained(make, device, shape=(96, 64), steps=5):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape, device=device))
    optimizer = make([p])
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        p.grad = torch.randn(shape, generator=generator).to(device)
        optimizer.step()
    return p.detach(), optimizer


@needs_torch_muon
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(96, 64), (32, 200)])
def test_steps_are_torchs(device, shape, nesterov, adjust):
    """32-bit momentum exactly the same rule; 8-bit momentum within a fifth of the distance travelled."""
    options = {"lr": 0.02, "nesterov": nesterov, "adjust_lr_fn": adjust}
    torch.manual_seed(0)
    start = torch.randn(shape, device=device)
    theirs, _ = trained(lambda p: torch.optim.Muon(p, **options), device, shape)
    exact, _ = trained(lambda p: optim.Muon8bit(p, min_8bit_size=10**9, **options), device, shape)
    coded, optimizer = trained(lambda p: optim.Muon8bit(p, min_8bit_size=0, **options), device, shape)

    travelled = (theirs - start).norm()
    # Products in bfloat16, of momenta that differ in the last place.
    assert (exact - theirs).norm() <= 2e-3 * travelled
    assert (coded - theirs).norm() <= 0.2 * travelled
    state = next(iter(optimizer.state.values()))
    assert state["state1"].dtype == torch.uint8 and state["state1"].shape == shape
    assert state["absmax1"].numel() == -(coded.numel() // -256)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_own_iteration_orthogonalizes(monkeypatch, device, shape):
    """Singular values land between 0.6 and 1.3: what the coefficients promise, and bfloat16."""
    monkeypatch.setattr(muon, "_torch_newton_schulz", None)
    torch.manual_seed(0)
    matrix = torch.randn(shape, device=device)

    result = muon.orthogonalized(matrix, muon._COEFFICIENTS, 5, 1e-7).float().cpu()

    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.6 and singular.max() < 1.3
    u, _, v = torch.linalg.svd(matrix.cpu(), full_matrices=False)
    assert (result * (u @ v)).sum() / (result.norm() * (u @ v).norm()) > 0.97


def test_learns(device):
    torch.manual_seed(0)
    model = nn.Linear(96, 64, bias=False).to(device)
    x, target = torch.randn(256, 96, device=device), torch.randn(96, 64, device=device)
    optimizer = optim.Muon8bit(model.parameters(), lr=0.3, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = (model(x) - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_resumed_run_is_the_uninterrupted_one(device):
    def make(params):
        return optim.Muon8bit(params, lr=0.02, nesterov=False)

    p, optimizer = trained(make, device)
    q = nn.Parameter(p.clone())
    resumed = optim.Muon8bit([q])
    resumed.load_state_dict(optimizer.state_dict())
    original = optimizer.param_groups[0]["params"][0]
    for parameter, stepper in ((original, optimizer), (q, resumed)):
        parameter.grad = torch.ones_like(parameter)
        stepper.step()

    assert torch.equal(original, q)


@pytest.mark.parametrize(
    "options", [{"lr": -1}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"ns_steps": 0}, {"adjust_lr_fn": "x"}]
)
def test_nonsense_is_refused(options):
    with pytest.raises(ValueError):
        optim.Muon8bit([nn.Parameter(torch.ones(2, 2))], **options)


def test_only_matrices():
    with pytest.raises(ValueError, match="matrices only"):
        optim.Muon8bit([nn.Parameter(torch.ones(2))])
