"""Settings of single parameters: who they reach, and that they reach nobody else."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.optim import SGD, Adam8bit, AdEMAMix, GlobalOptimManager


@pytest.fixture(autouse=True)
def manager():
    """The process-wide registry, as each test found it."""
    instance = GlobalOptimManager.get_instance()
    before = dict(vars(instance))
    instance.initialize()
    yield instance
    vars(instance).clear()
    vars(instance).update(before)


def parameter(n: int = 5000, device: str = "cpu") -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(n, device=device))
    p.grad = torch.ones_like(p)
    return p


def bits_of(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> int:
    return {torch.uint8: 8, torch.float32: 32}[optimizer.state[p]["state1"].dtype]


class Holder(torch.nn.Module):
    def __init__(self, weight: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight


def test_there_is_one_instance(manager):
    assert GlobalOptimManager.get_instance() is manager
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOptimManager()


@pytest.mark.parametrize("order", ["register first", "override first"])
def test_override_works_before_and_after_registering(manager, order, device):
    p, q = parameter(device=device), parameter(device=device)
    actions = [
        lambda: manager.register_parameters([p, q]),
        lambda: manager.override_config(p, "optim_bits", 32),
    ]
    for action in actions if order == "register first" else reversed(actions):
        action()
    optimizer = Adam8bit([p, q])

    for _ in range(3):
        optimizer.step()

    assert (bits_of(optimizer, p), bits_of(optimizer, q)) == (32, 8)


def test_override_works_after_the_optimizer_was_made(manager, device):
    p = parameter(device=device)
    optimizer = Adam8bit([p])
    manager.override_config(p, "optim_bits", 32)

    optimizer.step()

    assert bits_of(optimizer, p) == 32


def test_override_wins_at_every_step(manager, device):
    p, q = parameter(4, device), parameter(4, device)
    optimizer = SGD([p, q], lr=0.1, momentum=0.5)
    manager.override_config([p], key_value_dict={"lr": 1.0, "unknown": 1})

    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    p.grad = q.grad = torch.ones_like(p)
    optimizer.step()

    assert (p[0].item(), q[0].item()) == pytest.approx((1 - 1.0 - 1.5, 0.9))


def test_list_shares_its_settings_and_later_calls_add_to_them(manager):
    p, q = parameter(), parameter()
    manager.override_config([p, q], key_value_dict={"lr": 1.0})
    manager.override_config(p, "eps", 0.5)

    assert manager.pid2config[id(p)] is manager.pid2config[id(q)]
    assert manager.config_of(q) == {"lr": 1.0, "eps": 0.5}
    assert manager.uses_config_override


def test_override_needs_one_form(manager):
    p = parameter()
    with pytest.raises(AssertionError):
        manager.override_config(p, "lr", 1.0, key_value_dict={"lr": 2.0})
    manager.override_config(p, "lr", None)

    assert manager.config_of(p) is None


def test_register_takes_groups_and_refuses_nothing(manager):
    p, q = parameter(), parameter()
    manager.override_config(q, "lr", 1.0)
    manager.register_parameters([{"params": [p]}, {"params": [p, q]}])

    assert manager.index2config == {(1, 1): {"lr": 1.0}}
    with pytest.raises(IndexError):
        manager.register_parameters([])


def test_position_in_another_optimizer_inherits_nothing(manager, device):
    p, other = parameter(device=device), parameter(device=device)
    manager.override_config(p, "optim_bits", 32)
    manager.register_parameters([p])
    first, second = Adam8bit([p]), Adam8bit([other])

    first.step()
    second.step()

    assert (0, 0) in manager.index2config
    assert (bits_of(first, p), bits_of(second, other)) == (32, 8)


def test_entry_dies_with_its_parameter(manager):
    p = parameter()
    alive = weakref.ref(p)
    manager.override_config(p, "lr", 1.0)
    manager.register_parameters([p])

    del p

    assert alive() is None
    assert manager.pid2config == {}


def test_reused_id_inherits_nothing(manager):
    p, q = parameter(), parameter()
    manager.override_config(p, "lr", 1.0)
    # What is left when an id is taken over: the dict entry of the old owner under the new one's id.
    manager.pid2config[id(q)] = manager.pid2config.pop(id(p))
    manager._parameters[id(q)] = manager._parameters.pop(id(p))

    assert manager.config_of(q) is None


def test_entries_written_by_hand_count(manager):
    p = parameter()
    manager.pid2config[id(p)] = {"lr": 1.0}
    manager.index2config[(0, 0)] = {"eps": 0.5}

    assert manager.config_of(p, (0, 0)) == {"lr": 1.0, "eps": 0.5}


def test_module_request_is_honoured_at_the_first_step(manager, device):
    module = torch.nn.Linear(80, 80).to(device)
    module.weight.grad = torch.ones_like(module.weight)
    optimizer = Adam8bit(module.parameters())
    manager.register_module_override(module, "weight", {"optim_bits": 32})

    optimizer.step()

    assert bits_of(optimizer, module.weight) == 32
    assert manager.index2config[(0, 0)] == {"optim_bits": 32}


@pytest.mark.parametrize("name", ["Embedding", "StableEmbedding"])
def test_embeddings_ask_for_32_bits(name, device):
    layer = getattr(bnb.nn, name)(100, 64).to(device)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer = Adam8bit([layer.weight])

    optimizer.step()

    assert bits_of(optimizer, layer.weight) == 32


def test_parameters_own_setting_wins_over_its_modules(manager, device):
    module = Holder(parameter(device=device))
    manager.register_module_override(module, "weight", {"optim_bits": 32, "eps": 0.5})
    manager.override_config(module.weight, "optim_bits", 8)
    optimizer = Adam8bit(module.parameters())

    optimizer.step()

    assert bits_of(optimizer, module.weight) == 8
    assert optimizer.get_config(0, 0, optimizer.param_groups[0])["eps"] == 0.5


def test_registry_keeps_no_module_alive(manager):
    module = torch.nn.Linear(4, 4)
    alive = weakref.ref(module)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    assert [(type(m), n, c) for m, n, c in manager.module_weight_config_triple] == [
        (torch.nn.Linear, "weight", {"optim_bits": 32})
    ]
    gc.disable()
    try:
        del module
        assert alive() is None
    finally:
        gc.enable()

    assert manager.module_weight_config_triple == []


@pytest.mark.parametrize(("name", "error"), [("weight", AssertionError), ("missing", AttributeError)])
def test_request_for_nothing_fails_at_the_first_step(manager, name, error):
    module = Holder(None)
    manager.register_module_override(module, name, {"optim_bits": 32})

    with pytest.raises(error):
        Adam8bit([parameter()]).step()


def test_norm_limit_may_be_asked_for_after_the_state_was_made(manager, device):
    p = parameter(device=device)
    optimizer = AdEMAMix([p], lr=1.0, optim_bits=8)
    optimizer.step()
    before = p.detach().clone()
    manager.override_config(p, "max_unorm", 1e-3)

    optimizer.step()

    assert (p.detach() - before).norm() <= 1.001e-3 * before.norm() + before.norm() * 1e-2 + 1e-6
    assert optimizer.state[p]["unorm_vec"] > 0


def test_optimizer_keeps_no_parameter_alive_after_it_died(manager, device):
    p = parameter(device=device)
    alive = weakref.ref(p)
    optimizer = Adam8bit([p])
    optimizer.step()

    del optimizer, p
    gc.collect()

    assert alive() is None
