"""GPUs whose shared memory is too small for the tables of two maps, as those of compute capability 7.5."""

from __future__ import annotations

import warnings

import pytest
import torch

from bitsandbytes import optim
from bitsandbytes._native import has_native

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_native("bnb_cuda_optimizer_update_many")),
    reason="needs an NVIDIA GPU and the CUDA library",
)


def test_two_states_step_in_plain_torch_with_one_warning(monkeypatch):
    start, gradient = torch.randn(2, 5000, device="cuda").unbind()
    expected = torch.nn.Parameter(start.cpu())
    expected.grad = gradient.cpu()
    optim.AdamW8bit([expected], min_8bit_size=0).step()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))

    with pytest.warns(UserWarning, match="no room") as caught:
        for _ in range(2):
            parameter = torch.nn.Parameter(start.clone())
            parameter.grad = gradient.clone()
            optim.AdamW8bit([parameter], min_8bit_size=0).step()
            assert (parameter.cpu() - expected).abs().max() <= 1e-6

    assert len(caught) == 1


def test_one_state_has_room(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    parameter = torch.nn.Parameter(torch.ones(5000, device="cuda"))
    parameter.grad = torch.ones_like(parameter)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim.Lion8bit([parameter], lr=0.5, min_8bit_size=0).step()

    assert torch.equal(parameter.detach(), torch.full_like(parameter, 0.5))
