"""Replacing linear layers in place, and the small helpers beside it in ``bitsandbytes.utils``."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.utils import execute_and_return, replace_linear, sync_gpu


class Tagged(nn.Linear):
    """A linear layer that remembers being post-processed."""

    def finish(self, module) -> None:
        module.finished = True


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = Tagged(8, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
        self.lm_head = nn.Linear(4, 8)


def replacement(in_features: int, out_features: int, bias: bool) -> nn.Module:
    layer = nn.Linear(in_features, out_features, bias)
    layer.is_new = True
    return layer


def is_new(module: nn.Module) -> bool:
    return getattr(module, "is_new", False)


def test_all_linears_but_the_skipped_are_replaced():
    model = Block()
    assert replace_linear(model, replacement) is model
    assert is_new(model.project) and is_new(model.inner[0]) and not is_new(model.lm_head)
    assert model.inner[0].bias is None and model.project.bias is not None
    assert (model.project.in_features, model.project.out_features) == (8, 4)


def test_own_names_are_skipped_not_paths():
    model = replace_linear(nn.Sequential(Block(), Block()), replacement, skip_modules=("project",))
    assert not is_new(model[1].project) and is_new(model[1].lm_head)
    model = replace_linear(Block(), replacement, skip_modules=("inner.0", "inner"))
    assert is_new(model.inner[0]), "a skipped container's children are not skipped"


def test_parameters_move_to_the_new_layers():
    model = Block()
    weight, bias = model.project.weight, model.project.bias
    replace_linear(model, replacement, copy_weights=True)
    assert model.project.weight is weight and model.project.bias is bias
    assert model.inner[0].bias is None


def test_old_layers_are_post_processed():
    model = Block()
    old, plain = model.project, model.inner[0]
    replace_linear(model, replacement, post_processing_function="finish")
    assert old.finished and not hasattr(plain, "finished")


def test_a_root_linear_stays():
    layer = nn.Linear(2, 2)
    assert replace_linear(layer, replacement) is layer


@pytest.mark.parametrize("cls", ["Linear4bit", "Linear8bitLt", "SwitchBackLinear"])
def test_layers_of_this_library_fit_in(device, cls):
    model = replace_linear(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), getattr(bnb.nn, cls)).to(
        device
    )
    assert [type(m).__name__ for m in model] == [cls, cls]
    assert model(torch.randn(3, 64, device=device)).shape == (3, 8)


def test_execute_and_return_runs_without_a_shell():
    code = "import sys; print(' out '); print('err', file=sys.stderr)"
    assert execute_and_return(f'{sys.executable} -c "{code}"') == ("out", "err")
    assert execute_and_return(f"{sys.executable} -c \"print('$HOME | x')\"")[0] == "$HOME | x"


def test_sync_gpu_takes_any_tensor(device):
    assert sync_gpu(torch.zeros(1, device=device)) is None


def test_format_numbers_invert_each_other():
    assert bnb.utils.LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING == {
        "row": 0,
        "col32": 1,
        "col_turing": 2,
        "col_ampere": 3,
    }
    for name, number in bnb.utils.LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items():
        assert bnb.utils.INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING[number] == name
