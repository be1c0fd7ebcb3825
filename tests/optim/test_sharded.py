"""Optimizers over several processes: FSDP2, distributed checkpoints, DDP and FSDP1, with gloo on the CPU and NCCL on two GPUs.

Every process sees the same data, so a sharded run has an unsharded one to be compared with. Each test starts its
processes once.
"""

from __future__ import annotations

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("needs gloo", allow_module_level=True)

from ranks import run_ranks

START = """
import warnings
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
import bitsandbytes as bnb
from bitsandbytes import optim

MESH = init_device_mesh(DEVICE, (WORLD,))
FULL = StateDictOptions(full_state_dict=True)


def network(width=300, hidden=70):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)).to(DEVICE)


def sharded(model):
    for layer in (*model, model):
        fully_shard(layer, mesh=MESH)
    return model


def train(model, optimizer, steps=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, model[0].in_features if isinstance(model, nn.Sequential) else 300, generator=generator).to(DEVICE)
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def parameters(model):
    return [whole(p) for p in model.parameters()]


def average(optimizer, p, name="state1"):
    state = optimizer.state[p]
    return state[name] if state[name].dtype == torch.float32 else bnb.functional.dequantize_blockwise(
        state[name], absmax=state["absmax" + name[-1]], code=state["qmap" + name[-1]], blocksize=256)
"""


@pytest.fixture(params=["cpu", "cuda"])
def where(request):
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return request.param


@pytest.fixture(params=["cpu", "cpu, together", "cuda"])
def how(request):
    """Where, and on the CPU also with many tensors at once, as on CUDA."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return request.param


def run(folder, world, code, device):
    if device.endswith("together"):
        device, code = "cpu", "import many_in_torch\nmany_in_torch.install()\n" + code
    run_ranks(folder, world, START + code, device)


def test_sharded_steps_are_the_unsharded_ones(tmp_path, how):
    """Bit for bit where the state has no blocks or the shards end where blocks do; otherwise as near as 8 bits are."""
    code = """
OPTIONS = {"LARS8bit": {"momentum": 0.9}, "SGD8bit": {"momentum": 0.9}, "LARS32bit": {"momentum": 0.9}}
for name in ("AdamW32bit", "AdamW8bit", "AdEMAMix8bit", "Lion8bit", "SGD8bit", "LAMB8bit", "LARS32bit", "LAMB32bit"):
    for hidden in (64, 71):
        aligned = hidden == 64 or name.endswith("32bit")
        pair = network(512, hidden), sharded(network(512, hidden))
        for model in pair:
            optimizer = getattr(optim, name)(model.parameters(), lr=1e-2, **OPTIONS.get(name, {}))
            train(model, optimizer)
        limited = name.startswith("LA")  # sums over shards are sums in another order
        if optim._many.optimizer_update_many.kernels.get(DEVICE):  # shards share tables, but for norms of the whole
            assert len(optimizer._many._rest) == (4 if limited else 0), name
        for ours, theirs in zip(*map(parameters, pair)):
            if aligned and not limited:
                assert torch.equal(ours, theirs), name
            else:
                bound = 1e-5 if limited and aligned else 0.1
                assert (ours - theirs).norm() <= bound * theirs.norm(), (name, hidden)
        for p in pair[1].parameters():
            assert optimizer.state[p]["state1"].shape[-p.dim():] == p.to_local().shape
            assert not isinstance(optimizer.state[p]["state1"], DTensor)
"""
    run(tmp_path, 2, code, how)


def test_shards_share_the_dice_and_processes_the_seed(tmp_path, how):
    """Each process seeds torch differently; rounding is still that of the whole, unsharded parameter."""
    code = """
def stepped(model):
    optimizer = optim.AdamW32bit(model.parameters(), lr=1e-3, stochastic_rounding=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer

def fresh():
    return network(64, 33).to(torch.bfloat16)

torch.manual_seed(RANK)
seeds = [None] * WORLD
one = optim.Lion(fresh().parameters(), stochastic_rounding=True)
dist.all_gather_object(seeds, one.param_groups[0]["rounding_seed"])
assert len(set(seeds)) == 1
torch.manual_seed(0)
plain = fresh()
torch.manual_seed(5)
stepped(plain)
parts = sharded(fresh())
torch.manual_seed(5)
stepped(parts)
assert all(map(torch.equal, parameters(plain), parameters(parts)))
assert not torch.equal(parameters(plain)[0], parameters(fresh())[0])
"""
    run(tmp_path, 2, code, how)


def test_the_width_of_state_follows_the_whole_parameter(tmp_path, where):
    """Each half of the larger parameter is below min_8bit_size; a process may even hold nothing of the smaller one."""
    code = """
model = nn.ParameterList([nn.Parameter(torch.ones(1, 5000)), nn.Parameter(torch.ones(10, 400))]).to(DEVICE)
fully_shard(model, mesh=MESH)
optimizer = optim.AdamW8bit(model.parameters(), min_8bit_size=4096)
sum(p.square().sum() for p in model).backward()
optimizer.step()
assert [optimizer.state[p]["state1"].dtype for p in model] == [torch.uint8, torch.float32]
assert [p.to_local().numel() for p in model] == [5000 if RANK == 0 else 0, 2000]
saved = get_optimizer_state_dict(model, optimizer)["state"]
assert sorted(state["optim_bits"] for state in saved.values()) == [8, 32]
"""
    run(tmp_path, 2, code, where)


SAVED = """
model = sharded(network())
optimizer = optim.{name}(model.parameters(), lr=1e-2)
"""

SAVE = """
train(model, optimizer)
saved = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
weight = saved["optimizer"]["state"]["0.weight"]
assert weight["state1"].placements == model[0].weight.placements
assert weight["state1"].shape == model[0].weight.shape
dcp.save(saved, checkpoint_id=FOLDER + "/checkpoint")
full = get_optimizer_state_dict(model, optimizer, options=FULL)
if RANK == 0:
    torch.save(full, FOLDER + "/full.pt")

# Resuming on the same layout is the uninterrupted run.
again = sharded(network())
resumed = type(optimizer)(again.parameters(), lr=3e-4)
target = {"model": get_model_state_dict(again), "optimizer": get_optimizer_state_dict(again, resumed)}
dcp.load(target, checkpoint_id=FOLDER + "/checkpoint")
set_model_state_dict(again, target["model"])
set_optimizer_state_dict(again, resumed, target["optimizer"])
for p, q in zip(model.parameters(), again.parameters()):
    ours, theirs = optimizer.state[p], resumed.state[q]
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key], key
train(model, optimizer, seed=2)
train(again, resumed, seed=2)
assert all(map(torch.equal, parameters(model), parameters(again)))
torch.save(parameters(model), FOLDER + "/continued.pt")
"""

LOAD = """
target = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
dcp.load(target, checkpoint_id=FOLDER + "/checkpoint")
set_model_state_dict(model, target["model"])
set_optimizer_state_dict(model, optimizer, target["optimizer"])
full, loaded = torch.load(FOLDER + "/full.pt", map_location=DEVICE), get_optimizer_state_dict(model, optimizer, options=FULL)
if RANK == 0:
    assert full["param_groups"] == loaded["param_groups"]
    for name, state in full["state"].items():
        assert loaded["state"][name]["step"] == state["step"] == 3
        for key, value in state.items():
            if isinstance(value, torch.Tensor):  # other shards have other blocks: half the widest gap of a map
                assert (value - loaded["state"][name][key]).abs().max() <= 0.01 * value.abs().max(), (name, key)
for p in model.parameters():
    wide = p.numel() >= 4096
    assert optimizer.state[p]["state1"].dtype == (torch.uint8 if wide else torch.float32)
train(model, optimizer, seed=2)
for ours, theirs in zip(parameters(model), torch.load(FOLDER + "/continued.pt", map_location=DEVICE)):
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()
"""


def test_optimizers_with_state_of_their_own(tmp_path, where):
    """Muon orthogonalizes the whole matrix, also for a process that holds none of it; 4-bit state reshards likewise."""
    code = """
class Matrices(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.single = nn.Parameter(torch.randn(70, 300)), nn.Parameter(torch.randn(1, 5000))

    def forward(self, x):  # FSDP2 looks at the first argument
        return (self.wide * x).sum().square() + self.single.square().sum()

def stepped(model, make, steps=3):
    optimizer = make(model.parameters())
    for _ in range(steps):
        model(torch.linspace(-1, 1, 300, device=DEVICE)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer

for make in (lambda p: optim.Muon8bit(p, lr=0.02), lambda p: optim.AdamW4bit(p, lr=1e-2)):
    pair = Matrices().to(DEVICE), Matrices().to(DEVICE)
    fully_shard(pair[1], mesh=MESH)
    stepped(pair[0], make)
    optimizer = stepped(pair[1], make)
    for ours, theirs, start in zip(*map(parameters, pair), parameters(Matrices().to(DEVICE))):
        assert (ours - theirs).norm() <= 0.2 * (theirs - start).norm()
    saved = get_optimizer_state_dict(pair[1], optimizer)
    assert saved["state"]["wide"]["state1"].shape == (70, 300)
    again = make(pair[1].parameters())
    set_optimizer_state_dict(pair[1], again, saved)
    for p in pair[1].parameters():
        for key, value in optimizer.state[p].items():
            other = again.state[p][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key
"""
    run(tmp_path, 2, code, where)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit"])
def test_checkpoint_of_two_processes_loads_on_one_and_four(tmp_path, where, name):
    start = SAVED.replace("{name}", name)
    run(tmp_path, 2, start + SAVE, where)
    run(tmp_path, 1, start + LOAD, where)
    if name == "AdamW8bit" and where == "cpu":
        run(tmp_path, 4, start + LOAD, where)


def test_gathered_state_loads_without_sharding_and_back(tmp_path, where):
    code = """
model = sharded(network())
optimizer = optim.AdamW8bit(model.parameters(), lr=1e-2)
train(model, optimizer)
full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
full = [full] if RANK == 0 else [None]
dist.broadcast_object_list(full)

plain = network()
other = optim.AdamW8bit(plain.parameters(), lr=3e-4)
other.load_state_dict(full[0])
assert other.state[plain[0].weight]["state1"].dtype == torch.uint8
assert other.state[plain[0].weight]["step"] == 3 and other.param_groups[0]["lr"] == 1e-2
values = average(other, plain[0].weight)
assert (values - full[0]["state"]["0.weight"]["state1"].to(DEVICE)).abs().max() <= 0.01 * values.abs().max()

# An ordinary checkpoint, blocks of whole parameters, onto shards.
back = optim.AdamW8bit(model.parameters())
back.load_state_dict(other.state_dict())
for p, q in zip(model.parameters(), plain.parameters()):
    again = whole(DTensor.from_local(average(back, p), MESH, p.placements, shape=p.shape, stride=p.stride()))
    assert (again - average(other, q)).abs().max() <= 0.01 * again.abs().max()
"""
    run(tmp_path, 2, code, where)


def test_ddp_keeps_replicas_equal_and_their_state_loads_in_one_process(tmp_path, where):
    code = """
single, model = network(), network()
pair = [optim.AdamW8bit(single.parameters(), lr=1e-2), None]
train(single, pair[0])
wrapped = nn.parallel.DistributedDataParallel(model)
optimizer = optim.AdamW8bit(wrapped.parameters(), lr=1e-2)
train(wrapped, optimizer)
assert all(map(torch.equal, parameters(single), parameters(model)))

saved = get_optimizer_state_dict(wrapped, optimizer)
dcp.save({"optimizer": saved}, checkpoint_id=FOLDER + "/ddp")
again = network()
loaded = optim.AdamW8bit(again.parameters())
target = {"optimizer": get_optimizer_state_dict(again, loaded)}
dcp.load(target, checkpoint_id=FOLDER + "/ddp")
set_optimizer_state_dict(again, loaded, target["optimizer"])
for p, q in zip(single.parameters(), again.parameters()):
    assert torch.equal(pair[0].state[p]["state1"], loaded.state[q]["state1"])
    assert loaded.state[q]["step"] == 3
"""
    run(tmp_path, 2, code, where)


def test_fsdp1_with_original_parameters(tmp_path, where):
    code = """
def wrapped(record=""):
    model = network()
    if record == "before":
        optim.record_sizes(model)
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device(DEVICE))

for record in ("", "before", "after"):
    model = wrapped(record)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if record == "after":
            optim.record_sizes(model)
        optimizer = optim.AdamW8bit(model.parameters(), lr=1e-2)
        train(model, optimizer)
    assert any("record_sizes" in str(w.message) for w in caught) != bool(record)
    for name, p in model.named_parameters():
        if p in optimizer.state and optimizer.state[p]:
            wide = not record or "weight" in name
            assert optimizer.state[p]["state1"].dtype == (torch.uint8 if wide else torch.float32), name

single = network()
plain = optim.AdamW8bit(single.parameters(), lr=1e-2)
train(single, plain)
with FullyShardedDataParallel.summon_full_params(model):
    for ours, theirs in zip(model.parameters(), single.parameters()):
        assert (ours - theirs).norm() <= 0.1 * theirs.norm()

saved = get_optimizer_state_dict(model, optimizer)
dcp.save({"optimizer": saved}, checkpoint_id=FOLDER + "/fsdp1")
again = wrapped()
optim.record_sizes(again)
loaded = optim.AdamW8bit(again.parameters())
target = {"optimizer": get_optimizer_state_dict(again, loaded)}
dcp.load(target, checkpoint_id=FOLDER + "/fsdp1")
set_optimizer_state_dict(again, loaded, target["optimizer"])
for p, q in zip(model.parameters(), again.parameters()):
    if optimizer.state.get(p):
        for key, value in optimizer.state[p].items():
            other = loaded.state[q][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key
"""
    run(tmp_path, 2, code, where)
