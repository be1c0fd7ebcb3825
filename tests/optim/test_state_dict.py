"""Checkpoints of optimizer state: their form, what loads, and that a resumed run is the uninterrupted one."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor

import bitsandbytes.optim as optim
from optim_cases import CLASSES, FAMILIES, TWO_STATES, family_of, make

WRAPPER = "__bnb_optimizer_quant_state__"


@pytest.fixture(autouse=True)
def _paged_on_a_cpu():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*paged memory")
        yield


def network(device: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """One parameter large enough for 8 bits, and one that is not."""
    return torch.nn.Linear(70, 64).to(device=device, dtype=dtype)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()


def trained(name: str, device: str, **settings) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = network(device)
    optimizer = make(name, model.parameters(), **settings)
    train(model, optimizer, seed=1)
    return model, optimizer


def resumed(name: str, model: torch.nn.Module, saved: dict, **settings):
    other = copy.deepcopy(model)
    optimizer = make(name, other.parameters(), **settings)
    optimizer.load_state_dict(saved)
    return other, optimizer


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        ours, theirs = a.state[p], b.state[q]
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if isinstance(value, Tensor):
                assert value.dtype == theirs[key].dtype
                assert torch.equal(value, theirs[key]), key
            else:
                assert (type(value), value) == (type(theirs[key]), theirs[key])


# --- form ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_shapes_and_dtypes(family, bits, device):
    model, optimizer = trained(f"{family}{bits}bit", device)
    stack = (2,) if family == "AdEMAMix" else ()
    blocks = -(64 * 70 // -256)
    code = torch.uint8 if bits == 8 else torch.float32

    state = optimizer.state_dict()["state"][0]

    assert state.keys() == {"step", WRAPPER}
    assert state["step"] == 3
    expected = {"state1": ((*stack, 64, 70), code)}
    if family in TWO_STATES:
        expected["state2"] = ((64, 70), code)
    for index in (1, 2) if family in TWO_STATES else (1,):
        if bits == 8:
            expected[f"qmap{index}"] = ((256,), torch.float32)
            expected[f"absmax{index}"] = ((*(stack if index == 1 else ()), blocks), torch.float32)
    if family in ("LAMB", "LARS"):
        expected["unorm_vec"] = ((1,), torch.float32)
    assert {key: (tuple(v.shape), v.dtype) for key, v in state[WRAPPER].items()} == expected
    assert all(v.device == model.weight.device for v in state[WRAPPER].values())


def test_saving_changes_nothing_and_copies_nothing(device):
    model, optimizer = trained("AdamW8bit", device)

    saved = optimizer.state_dict()

    own = optimizer.state[model.weight]
    assert WRAPPER not in own
    assert saved["state"][0][WRAPPER]["state1"] is own["state1"]


def test_no_wrapper_without_state(device):
    optimizer = optim.AdamW8bit(network(device).parameters())

    assert optimizer.state_dict()["state"] == {}


# --- resuming --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_resumed_run_is_the_uninterrupted_one(name, device):
    """Through a file, which loads with weights only."""
    model, optimizer = trained(name, device)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)

    other, loaded = resumed(name, model, torch.load(file, weights_only=True))
    for pair in ((model, optimizer), (other, loaded)):
        train(*pair, seed=2)

    assert_same_state(optimizer, loaded)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion32bit", "AdEMAMix8bit"])
def test_flat_checkpoints_of_earlier_releases_load(name, device):
    model, optimizer = trained(name, device)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state.update(state.pop(WRAPPER))

    other, loaded = resumed(name, model, saved)
    for pair in ((model, optimizer), (other, loaded)):
        train(*pair, seed=2)

    assert_same_state(optimizer, loaded)


@pytest.mark.parametrize(
    "name", ["Adam8bit", "AdEMAMix8bit", "Lion32bit", "PagedAdamW8bit", "LAMB8bit", "SGD8bit"]
)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_of_an_optimizer_keep_stepping(name, how, device):
    model, optimizer = trained(name, device)
    optimizer.param_groups[0]["lr"] = 0.123

    pair = (model, optimizer)
    if how == "deepcopy":
        other = copy.deepcopy(pair)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(pair))
    else:
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    for each in (pair, other):
        train(*each, seed=2)

    assert type(other[1]) is type(optimizer)
    assert other[1].mng is optimizer.mng
    assert_same_state(optimizer, other[1])


def test_loading_shares_nothing_with_the_checkpoint(device):
    model, optimizer = trained("AdamW8bit", device)
    saved = copy.deepcopy(optimizer.state_dict())
    untouched = copy.deepcopy(saved)

    train(*resumed("AdamW8bit", model, saved), seed=2)

    for index in (0, 1):
        for key, value in untouched["state"][index][WRAPPER].items():
            assert torch.equal(value, saved["state"][index][WRAPPER][key])
        assert saved["state"][index]["step"] == 3


def test_8bit_state_stays_8bit_in_a_32bit_optimizer(device):
    model, optimizer = trained("AdamW8bit", device)

    other, loaded = resumed("AdamW32bit", model, optimizer.state_dict())
    train(other, loaded, seed=2)

    assert loaded.state[other.weight]["state1"].dtype == torch.uint8


def test_saved_hyper_parameters_win_and_missing_ones_stay(device):
    model, optimizer = trained("AdamW", device, lr=0.5)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["t_alpha"]  # checkpoints of earlier releases have no schedules

    other, loaded = resumed("AdamW", model, saved, lr=0.1)

    assert loaded.param_groups[0]["lr"] == 0.5
    assert loaded.param_groups[0]["t_alpha"] is None
    assert all(x is y for x, y in zip(loaded.param_groups[0]["params"], other.parameters(), strict=True))


def test_state_follows_the_parameters_device_unless_told_otherwise(accelerators):
    if not accelerators:
        pytest.skip("needs an accelerator")
    model, optimizer = trained("AdamW8bit", "cpu")
    saved = optimizer.state_dict()
    moved = copy.deepcopy(model).to(accelerators[0])

    for move in (True, False):
        loaded = optim.AdamW8bit(moved.parameters())
        loaded.load_state_dict(saved, move_to_device=move)
        kind = moved.weight.device.type if move else "cpu"
        assert loaded.state[moved.weight]["state1"].device.type == kind
        train(moved, loaded, seed=2)  # the first step moves what was left behind
        assert loaded.state[moved.weight]["state1"].device == moved.weight.device


def test_integers_are_not_cast_and_foreign_floats_are(device):
    model, optimizer = trained("Adam8bit", device)
    model = model.bfloat16()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["count"] = torch.tensor([2**20 + 1])
    saved["state"][0]["extra"] = torch.ones(3)
    saved["state"][0]["step"] = torch.tensor(3.0)  # as checkpointing that only knows tensors leaves it

    loaded = optim.Adam8bit(model.parameters())
    loaded.load_state_dict(saved)

    state = loaded.state[model.weight]
    assert (state["count"].item(), state["count"].dtype) == (2**20 + 1, torch.int64)
    assert state["extra"].dtype == torch.bfloat16
    assert (state["step"], type(state["step"])) == (3, int)
    assert state["absmax1"].dtype == torch.float32


def test_state_of_a_channels_last_parameter_is_read_in_its_order_of_memory():
    """Such state was written for a parameter that the step had made contiguous, flat element by flat element."""
    p = torch.nn.Parameter(torch.randn(2, 3, 4, 5))
    optimizer = optim.SGD32bit([p], lr=0.1, momentum=0.9)
    flat = torch.arange(120.0)
    published = torch.empty_like(p, memory_format=torch.channels_last)
    torch.as_strided(published, (120,), (1,)).copy_(flat)

    optimizer.load_state_dict(
        {
            "state": {0: {"step": 1, "state1": published}},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )

    assert torch.equal(optimizer.state[p]["state1"].view(-1), flat)


def test_load_hooks_run(device):
    calls = []
    _, optimizer = trained("Adam", device)
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after"))

    optimizer.load_state_dict(optimizer.state_dict())

    assert calls == ["before", "after"]


# --- what does not fit -----------------------------------------------------------------------------------------


def _other_shape(state: dict) -> None:
    state["state1"] = state["state1"][..., :-1].contiguous()


def _other_blocks(state: dict) -> None:
    state["absmax1"] = state["absmax1"][..., :3].contiguous()


def _no_map(state: dict) -> None:
    del state["qmap1"]


def _none(state: dict) -> None:
    state["state2"] = None


def _half(state: dict) -> None:
    state["state1"] = state["state1"].half()


def _mixed(state: dict) -> None:
    state["state2"] = state["state2"].float()


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (_other_shape, "state1 must have shape"),
        (_other_blocks, "absmax1 must have shape"),
        (_no_map, "qmap1 must be a tensor"),
        (_none, "state2 must be a tensor"),
        (_half, "both be float32 or both uint8"),
        (_mixed, "both be float32 or both uint8"),
    ],
)
@pytest.mark.parametrize("family", ["AdamW", "AdEMAMix"])
def test_damaged_checkpoint_is_named_and_changes_nothing(family, damage, name, device):
    model, optimizer = trained(f"{family}8bit", device)
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved["state"][0][WRAPPER])
    before = copy.deepcopy((model, optimizer))

    with pytest.raises(ValueError, match=name):
        optimizer.load_state_dict(saved)

    assert_same_state(optimizer, before[1])


def test_other_groups_are_refused(device):
    model, optimizer = trained("AdamW8bit", device)
    saved = optimizer.state_dict()

    one = optim.AdamW8bit([model.weight])
    with pytest.raises(ValueError, match="2 parameters in group 0"):
        one.load_state_dict(saved)
    two = optim.AdamW8bit([{"params": [model.weight]}, {"params": [model.bias]}])
    with pytest.raises(ValueError, match="1 parameter groups"):
        two.load_state_dict(saved)


@pytest.mark.parametrize("name", [c for c in CLASSES if c.endswith("8bit") and family_of(c) == "Adam"])
def test_codes_and_maps_reload_exactly(name, device):
    model, optimizer = trained(name, device)

    _, loaded = resumed(name, model, optimizer.state_dict())

    assert_same_state(optimizer, loaded)
