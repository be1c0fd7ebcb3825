"""Paged state: managed memory where there is some, ordinary memory and one warning elsewhere."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch

import bitsandbytes.optim as optim
from bitsandbytes._native import has_native
from optim_cases import CLASSES, make

PAGED = [name for name in CLASSES if name.startswith("Paged")]
LARGE = 100_000  # elements from which state is paged

needs_managed_memory = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_native("bnb_cuda_managed_alloc")),
    reason="needs CUDA managed memory",
)


def parameter(n: int, device: str) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(n, device=device))
    p.grad = torch.randn(n, device=device)
    return p


@pytest.mark.parametrize("name", PAGED)
def test_on_a_cpu_state_is_ordinary_with_one_warning(name):
    params = [parameter(LARGE, "cpu"), parameter(LARGE, "cpu")]
    optimizer = make(name, params)

    with pytest.warns(UserWarning, match="ordinary memory instead of paged memory") as caught:
        optimizer.step()
        optimizer.step()

    assert len([w for w in caught if "paged memory" in str(w.message)]) == 1
    assert not hasattr(optimizer.state[params[0]]["state1"], "is_paged")


@pytest.mark.parametrize("name", PAGED)
def test_paged_takes_the_steps_of_its_unpaged_twin(name, device):
    start = torch.randn(LARGE)
    p, q = (torch.nn.Parameter(start.clone().to(device)) for _ in range(2))
    paged, plain = make(name, [p]), make(name.removeprefix("Paged"), [q])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            paged.step()
            plain.step()

    assert torch.equal(p, q)


def test_is_paged_keyword_pages(device):
    assert optim.AdamW([parameter(4, device)], is_paged=True).is_paged
    assert optim.PagedAdam([parameter(4, device)], is_paged=False).is_paged


@needs_managed_memory
@pytest.mark.parametrize("size", [LARGE - 1, LARGE])
def test_only_large_state_is_paged(size):
    p = parameter(size, "cuda")
    optimizer = optim.PagedAdamW8bit([p])

    optimizer.step()

    state = optimizer.state[p]
    for key in ("state1", "state2"):
        assert getattr(state[key], "is_paged", False) == (size >= LARGE)
    assert state["absmax1"].device == p.device


@needs_managed_memory
def test_paged_state_returns_when_the_optimizer_dies():
    p = parameter(LARGE, "cuda")
    optimizer = optim.PagedAdamW8bit([p])
    optimizer.step()
    state = weakref.ref(optimizer.state[p]["state1"])

    del optimizer
    gc.collect()

    assert state() is None


@needs_managed_memory
@pytest.mark.parametrize("how", ["load", "deepcopy"])
def test_state_is_paged_again_after(how):
    p = parameter(LARGE, "cuda")
    optimizer = optim.PagedAdamW8bit([p])
    optimizer.step()
    if how == "load":
        other, q = optim.PagedAdamW8bit([p]), p
        other.load_state_dict(optimizer.state_dict())
    else:
        q, other = copy.deepcopy((p, optimizer))
        q.grad = p.grad.clone()

    state = other.state[q]["state1"]
    assert state.is_paged
    assert state.data_ptr() != optimizer.state[p]["state1"].data_ptr()
    assert torch.equal(state, optimizer.state[p]["state1"])
    other.step()
    assert other.state[q]["step"] == 2


@needs_managed_memory
def test_unpaged_optimizer_loads_paged_state_as_ordinary():
    p = parameter(LARGE, "cuda")
    optimizer = optim.PagedAdamW8bit([p])
    optimizer.step()

    other = optim.AdamW8bit([p])
    other.load_state_dict(optimizer.state_dict())

    assert not getattr(other.state[p]["state1"], "is_paged", False)
    assert other.state[p]["state1"].device == p.device
