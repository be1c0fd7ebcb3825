"""The optimizer classes as the tests see them, and the published trajectories of ``tests/golden/optim``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import bitsandbytes.optim as optim
from bitsandbytes.optim.optimizer import MockArgs

GOLDEN = Path(__file__).parent / "golden" / "optim"
BLOCK = 256

FAMILIES = ("Adam", "AdamW", "AdEMAMix", "LAMB", "LARS", "Lion", "RMSprop", "SGD", "Adagrad")
PAGED = ("Adam", "AdamW", "AdEMAMix", "Lion")
# Settings without a usable default.
NEEDED: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "LARS": {"lr": 0.1, "momentum": 0.9},
}
TWO_STATES = ("Adam", "AdamW", "AdEMAMix", "LAMB")

CLASSES = [
    f"{prefix}{family}{suffix}"
    for prefix, families in (("", FAMILIES), ("Paged", PAGED))
    for family in families
    for suffix in ("", "8bit", "32bit")
]


def family_of(name: str) -> str:
    return name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")


def make(name: str, params: Any, **settings: Any) -> torch.optim.Optimizer:
    """An optimizer by class name, with what its family needs."""
    return getattr(optim, name)(params, **{**NEEDED.get(family_of(name), {}), **settings})


def parameters(
    count: int, dtype: torch.dtype = torch.float32, smallest: int = 0, device: str = "cuda"
) -> list[torch.nn.Parameter]:
    """Of sizes around the borders of blocks and of the 8-bit threshold, one of them empty."""
    sizes = [0, 1, 255, 256, 257, 4095, 4096, 4097, 5000, 65_537]
    sizes = [size for size in sizes if size >= smallest]
    return [
        torch.nn.Parameter((torch.randn(sizes[i % len(sizes)], device=device) * 0.1).to(dtype))
        for i in range(count)
    ]


def give_gradients(*groups: list[torch.nn.Parameter], dtype: torch.dtype | None = None) -> None:
    """The same random gradients to each list of parameters."""
    for same in zip(*groups, strict=True):
        g = torch.randn_like(same[0]) * 0.01
        for p in same:
            if dtype is not None:
                p.grad_dtype = dtype
            p.grad = g.to(dtype or p.dtype)


def one_by_one(name: str, params: list, **settings) -> torch.optim.Optimizer:
    """The optimizer without launches for many tensors."""
    optimizer = make(name, params, **settings)
    update = optimizer.update_step
    optimizer.update_step = lambda *args: update(*args)
    return optimizer


class Case(NamedTuple):
    """One golden file: the family it was made with, and the settings."""

    family: str
    settings: dict[str, Any]


_ADAM = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
_MIX = {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "alpha": 5, "eps": 1e-8, "weight_decay": 0.1}
_LION = {"lr": 1e-3, "betas": (0.9, 0.99)}
_RMS = {"lr": 1e-3, "alpha": 0.9, "eps": 1e-8}
CASES = {
    "adam": Case("Adam", {**_ADAM, "weight_decay": 0}),
    "adamw": Case("AdamW", {**_ADAM, "betas": (0.9, 0.95), "weight_decay": 0.1}),
    "ademamix": Case("AdEMAMix", _MIX),
    "ademamix_sched": Case("AdEMAMix", {**_MIX, "t_alpha": 8, "t_beta3": 8}),
    "lamb": Case("LAMB", {**_ADAM, "weight_decay": 0.1, "max_unorm": 1.0}),
    "lamb_unclipped": Case("LAMB", {**_ADAM, "weight_decay": 0.1, "max_unorm": 1000.0}),
    "lars": Case("LARS", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "max_unorm": 0.02}),
    "sgd": Case("SGD", {"lr": 0.05, "momentum": 0.9}),
    "sgd_wd": Case("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "lion": Case("Lion", {**_LION, "weight_decay": 0}),
    "lion_wd": Case("Lion", {**_LION, "weight_decay": 0.5}),
    "rmsprop": Case("RMSprop", _RMS),
    "rmsprop_wd": Case("RMSprop", {**_RMS, "weight_decay": 0.1}),
    "adagrad": Case("Adagrad", {"lr": 1e-2, "eps": 1e-10}),
    "adagrad_wd": Case("Adagrad", {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.1}),
}


@functools.cache
def golden(name: str) -> dict[str, Tensor]:
    """The arrays of ``<name>.npz``; bf16 stored as raw bits comes back as bfloat16. Shared: do not write to them."""
    arrays = {}
    with np.load(GOLDEN / f"{name}.npz") as file:
        for key in file.files:
            if key.endswith("_bf16bits"):
                arrays[key.removesuffix("_bf16bits")] = torch.from_numpy(file[key].view(np.int16)).view(
                    torch.bfloat16
                )
            else:
                arrays[key] = torch.from_numpy(file[key])
    return arrays


def run_case(case: Case, bits: int, dtype: torch.dtype, device: str) -> tuple[Tensor, dict[str, Any]]:
    """``(parameter, state)`` on the CPU after the five golden steps."""
    inputs, kind = golden("inputs"), "small" if bits == 32 else "large"
    p = torch.nn.Parameter(inputs[f"{kind}_p0"].to(device=device, dtype=dtype, copy=True))
    settings = dict(case.settings)
    if bits == 8 and "max_unorm" in settings:
        # The published 8-bit classes never limited the norm; ours do unless told not to.
        settings["args"] = MockArgs(
            {"optim_bits": 8, "min_8bit_size": 4096, "max_unorm": 0.0, "skip_zeros": False}
        )
    optimizer = make(f"{case.family}{bits}bit", [p], **settings)
    for grad in inputs[f"{kind}_grads"]:
        p.grad = grad.to(device=device, dtype=dtype)
        optimizer.step()
    state = {key: v.cpu() if isinstance(v, Tensor) else v for key, v in optimizer.state[p].items()}
    return p.detach().cpu(), state
