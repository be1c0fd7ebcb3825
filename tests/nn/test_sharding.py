"""4-bit layers under torch's sharding: two processes each hold half of the packed bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from processes import run_python

START = """
    import os, sys, torch
    import torch.distributed as dist
    from torch import nn
    import bitsandbytes as bnb

    dist.init_process_group("gloo", init_method=f"file://{os.environ['MEETING']}", rank=int(os.environ["RANK"]),
                            world_size=int(os.environ["WORLD"]))
"""


def run_ranks(tmp_path, world, code):
    def run(rank):
        environment = {"RANK": str(rank), "WORLD": str(world), "MEETING": str(tmp_path / "meeting")}
        return run_python(START + code, env=environment)

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(run, range(world)))


needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


@needs_gloo
def test_full_state_dict_names_every_entry(tmp_path):
    """Checkpoint tools resolve each key of a state dict attribute by attribute, from the module on."""
    code = """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.ModuleDict({"base": bnb.nn.LinearNF4(64, 64), "adapter": nn.Linear(64, 8)}).to("cpu")
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    packed = [p for p in model.parameters() if isinstance(p, bnb.nn.Params4bit)]
    sharded = FullyShardedDataParallel(
        model, ignored_states=packed, use_orig_params=True, device_id=torch.device("cpu")
    )
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert state.keys() == expected.keys(), state.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
    dist.destroy_process_group()
    """
    run_ranks(tmp_path, 1, code)


@needs_gloo
def test_layers_with_float_storage_shard_and_gather(tmp_path):
    code = """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    options = {"compute_dtype": torch.float32, "quant_storage": torch.float32, "bias": False}
    model = nn.Sequential(bnb.nn.LinearNF4(64, 64, **options), bnb.nn.LinearFP4(64, 64, **options)).to("cpu")
    x = torch.randn(3, 64)
    expected = model(x)
    for layer in model:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    assert model[0].weight.to_local().numel() * 2 == 64 * 64 // 8
    assert torch.equal(model(x), expected)
    dist.destroy_process_group()
    """
    run_ranks(tmp_path, 2, code)
