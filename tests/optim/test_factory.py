"""Optimizers made by name."""

from __future__ import annotations

import warnings

import pytest
import torch

from bitsandbytes import optim


def params():
    return [torch.nn.Parameter(torch.ones(4, 4))]


@pytest.mark.parametrize("name", [n for n in optim.__all__ if n.endswith("bit")])
def test_every_class_can_be_asked_for(name):
    paged, rest = name.startswith("Paged"), name.removeprefix("Paged")
    family, bits = rest.rstrip("0123456789bit"), int("".join(c for c in rest if c.isdigit()))
    settings = {"lr": 0.1, "momentum": 0.9} if family in ("SGD", "LARS") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = optim.create(family.lower(), params(), bits=bits, paged=paged, **settings)

    assert type(made) is getattr(optim, name)
    assert made.is_paged is paged


def test_settings_reach_the_optimizer():
    made = optim.create(
        "AdamW", params(), lr=0.25, betas=(0.5, 0.75), weight_decay=0.125, stochastic_rounding=True
    )

    group = made.param_groups[0]
    assert type(made) is optim.AdamW8bit
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.25, (0.5, 0.75), 0.125)
    assert "rounding_seed" in group
    assert optim.create("adamw", params(), bits=4, paged=True).is_paged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "adamz"}, "no optimizer 'adamz'; choose one of adagrad, adam, "),
        ({"name": None}, "no optimizer None"),
        (
            {"name": "sgd", "paged": True, "lr": 1.0},
            "sgd has no bits=8, paged=True; there are: bits=8, bits=32",
        ),
        ({"name": "lion", "bits": 4}, "lion has no bits=4"),
        ({"name": "adamw", "bits": "8"}, "adamw has no bits='8'"),
        ({"name": "muon", "bits": 32}, "muon has no bits=32"),
        ({"name": "lion", "eps": 1e-8}, "Lion8bit has no setting eps; it takes lr, betas"),
        ({"name": "sgd"}, "SGD8bit needs lr"),
        ({"name": "adam", "lr": -1.0}, "lr must be"),
        ({"name": "adam", "lr": float("nan")}, "lr must be"),
        ({"name": "adam", "betas": (0.9, 1.0)}, r"must be in \[0, 1\)"),
        ({"name": "adamw", "weight_decay": -0.1}, "weight_decay must be"),
        ({"name": "adamw", "eps": -1e-8}, "eps must be"),
        ({"name": "adamw", "min_8bit_size": -1}, "min_8bit_size"),
        ({"name": "lamb", "max_unorm": -1.0}, "max_unorm"),
        ({"name": "ademamix", "alpha": -1.0}, "alpha"),
        ({"name": "adamw", "bits": 4, "amsgrad": True}, "has no setting amsgrad"),
    ],
)
def test_what_makes_no_sense_is_a_value_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.create(arguments.pop("name"), params(), **arguments)
