"""4-bit optimizer state: the native kernel and the plain-torch one are one arithmetic, dice included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsandbytes import optim
from bitsandbytes._formats.rules import RULES
from bitsandbytes._native import has_native
from bitsandbytes._ops import OPERATORS

pytestmark = pytest.mark.skipif(
    not has_native("bnb_cpu_optimizer_update_4bit_blockwise"), reason="needs the native library"
)

MAPS = optim.AdamW4bit([torch.nn.Parameter(torch.ones(1))]).name2qmap
UPDATE = OPERATORS["optimizer_update_4bit_blockwise"]
BLOCK = 128


def updated(kernel: str, name: str, start: Tensor, steps: int = 4) -> dict[str, Tensor | None]:
    n, two = start.numel(), RULES[name].states == 2
    generator = torch.Generator().manual_seed(0)
    p, blocks = start.clone(), -(n // -BLOCK)
    state1, absmax1 = torch.zeros(-(n // -2), dtype=torch.uint8), torch.zeros(blocks)
    state2, absmax2 = (state1.clone(), absmax1.clone()) if two else (None, None)
    for step in range(1, steps + 1):
        g = (
            torch.randn(n, generator=generator)
            * torch.logspace(-5, 1, n)[torch.randperm(n, generator=generator)]
        )
        g[::5] = 0.0
        if n > 300:
            g[270], g[271], g[272] = float("inf"), float("nan"), 1e30
        UPDATE.run_with(
            kernel, name, g.to(p.dtype), p, state1, state2, 0.9, 0.99, 0.0, 0.0, 1e-8, step, 1e-2, MAPS["dynamic"],
            MAPS["udynamic"] if two else None, absmax1, absmax2, 0.1, 0.5, 2**50 + step,
        )  # fmt: skip
    return {"p": p, "state1": state1, "state2": state2, "absmax1": absmax1, "absmax2": absmax2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 7, 127, 128, 129, 17_001])
@pytest.mark.parametrize("name", ["momentum", "lion"])
def test_rules_without_a_root_agree_bit_for_bit(name, n, dtype):
    start = torch.randn(n).to(dtype)

    plain, native = (updated(kernel, name, start) for kernel in ("default", "cpu"))

    for key, value in plain.items():
        assert value is None or torch.equal(value, native[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 129, 17_001])
@pytest.mark.parametrize("name", ["adam", "lamb", "rmsprop", "adagrad"])
def test_rules_with_a_root_have_the_same_state(name, n, dtype):
    """State takes no root, so its codes agree; the parameter to a last place of float32 or its dtype."""
    start = torch.randn(n).to(dtype)
    coupled = RULES[name].coupled_decay  # then state sees the parameter

    plain, native = (updated(kernel, name, start, 1 if coupled else 4) for kernel in ("default", "cpu"))

    for key in ("state1", "state2", "absmax1", "absmax2"):
        assert plain[key] is None or torch.equal(plain[key], native[key]), key
    torch.testing.assert_close(
        plain["p"], native["p"], rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6
    )


@pytest.mark.parametrize("name", ["ademamix", "adamz"])
def test_rules_without_4bit_state_are_refused(name):
    with pytest.raises(ValueError, match="Unsupported optimizer name with 4-bit state"):
        p, codes = torch.ones(2), torch.zeros(1, dtype=torch.uint8)
        torch.ops.bitsandbytes.optimizer_update_4bit_blockwise(
            name, p, p, codes, codes, 0.9, 0.99, 0.0, 0.0, 1e-8, 1, 1e-2, MAPS["dynamic"], MAPS["udynamic"],
            torch.zeros(1), torch.zeros(1), 0.0, 1.0, 0,
        )  # fmt: skip


def test_any_rule_learns_with_4bit_state():
    """A rule that the table of rules gains gets 4-bit state for nothing."""
    start = torch.randn(1000)

    for name, rule in RULES.items():
        if rule.averages == 1:
            assert not torch.equal(updated("cpu", name, start)["p"], start)
