"""The native rules and the plain-torch ones are one arithmetic: same order, same roundings.

torch's vectorised square root may be off by a last place, so rules that take one are compared with a tolerance; all
others bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsandbytes._formats.codebooks import create_dynamic_map
from bitsandbytes._formats.rules import RULES, StepScalars
from bitsandbytes._native import ABI, RULE_ID, has_native, lib
from bitsandbytes._ops import OPERATORS

pytestmark = pytest.mark.skipif(
    not has_native("bnb_cpu_optimizer_update_32bit"), reason="needs the native library"
)

BLOCK = 256
LENGTHS = [1, 7, 255, 256, 257, 17_001]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WITHOUT_ROOT = ("momentum", "lion")
BETAS = {"beta1": 0.9, "beta2": 0.99, "beta3": 0.999}
STEPS = 4


def gradients(n: int, dtype: torch.dtype) -> list[Tensor]:
    """Over many decades, with exact zeros, an element that is not finite, and one whose square is not."""
    result = []
    for _ in range(STEPS):
        g = torch.randn(n) * torch.logspace(-6, 2, n)[torch.randperm(n)]
        g[::5] = 0.0
        if n > 300:
            g[270], g[271] = float("inf"), float("nan")
            g[272] = 1e30
        result.append(g.to(dtype))
    return result


def run_32bit(
    kernel: str, name: str, start: Tensor, grads: list[Tensor], **settings
) -> dict[str, Tensor | None]:
    rule, n = RULES[name], start.numel()
    p, state1 = start.clone(), torch.zeros(rule.averages, n)
    state2 = torch.zeros(n) if rule.states == 2 else None
    unorm = torch.zeros(1)
    options = {"max_unorm": 0.0, "param_norm": 0.0, "skip_zeros": False, "gnorm_scale": 0.5, **settings}
    for step, g in enumerate(grads, start=1):
        OPERATORS["optimizer_update_32bit"].run_with(
            kernel, name, g, p, state1, state2, unorm, options["max_unorm"], options["param_norm"], *BETAS.values(),
            2.0, 1e-8, 0.1, step, 1e-2, options["gnorm_scale"], options["skip_zeros"],
        )  # fmt: skip
    return {"p": p, "state1": state1, "state2": state2, "unorm": unorm}


def run_8bit(
    kernel: str, name: str, start: Tensor, grads: list[Tensor], skip_zeros: bool
) -> dict[str, Tensor | None]:
    rule, n = RULES[name], start.numel()
    two, blocks = rule.states == 2, -(n // -BLOCK)
    p, state1 = start.clone(), torch.zeros(rule.averages, n, dtype=torch.uint8)
    state2 = torch.zeros(n, dtype=torch.uint8) if two else None
    absmax1, absmax2 = torch.zeros(rule.averages, blocks), torch.zeros(blocks) if two else None
    maps = create_dynamic_map(True), create_dynamic_map(False) if two else None
    for step, g in enumerate(grads, start=1):
        OPERATORS["optimizer_update_8bit_blockwise"].run_with(
            kernel, name, g, p, state1, state2, *BETAS.values(), 2.0, 1e-8, step, 1e-2, *maps, absmax1, absmax2,
            0.1, 0.5, skip_zeros,
        )  # fmt: skip
    return {"p": p, "state1": state1, "state2": state2, "absmax1": absmax1, "absmax2": absmax2}


def assert_agree(name: str, ours: dict[str, Tensor | None], oracle: dict[str, Tensor | None]) -> None:
    # A code on the other side of a threshold moves its element at the steps after it, by less than the learning rate.
    coded = oracle["state1"].dtype == torch.uint8
    for key, value in oracle.items():
        if value is None:
            assert ours[key] is None
        elif name in WITHOUT_ROOT:
            torch.testing.assert_close(ours[key], value, atol=0.0, rtol=0.0, equal_nan=True)
        elif value.dtype == torch.uint8:
            differing = (ours[key].int() - value.int()).abs()
            assert differing.max() <= 1
            assert (differing > 0).float().mean() <= 1e-3
        else:
            close = {torch.float32: (1e-6, 2e-6), torch.float16: (1e-4, 2e-3), torch.bfloat16: (1e-3, 1.6e-2)}
            atol, rtol = close[value.dtype]
            near = torch.isclose(ours[key], value, atol=atol, rtol=rtol, equal_nan=True)
            assert (~near).float().mean() <= (1e-3 if coded and key == "p" else 0.0)
            torch.testing.assert_close(ours[key][~near], value[~near], atol=1e-2, rtol=rtol)


@pytest.mark.parametrize("skip_zeros", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", RULES)
def test_32bit_agrees(name, n, dtype, skip_zeros):
    start, grads = torch.randn(n).to(dtype), gradients(n, dtype)

    ours, oracle = (run_32bit(k, name, start, grads, skip_zeros=skip_zeros) for k in ("cpu", "default"))

    assert_agree(name, ours, oracle)


@pytest.mark.parametrize("skip_zeros", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", RULES)
def test_8bit_agrees(name, n, dtype, skip_zeros):
    start, grads = torch.randn(n).to(dtype), gradients(n, dtype)

    ours, oracle = (run_8bit(k, name, start, grads, skip_zeros) for k in ("cpu", "default"))

    assert_agree(name, ours, oracle)


@pytest.mark.parametrize("param_norm", [0.0, 1e-3, 1e9])
@pytest.mark.parametrize("name", RULES)
def test_norm_limit_agrees(name, param_norm):
    start, grads = torch.randn(17_001), gradients(17_001, torch.float32)

    ours, oracle = (
        run_32bit(k, name, start, grads, max_unorm=0.5, param_norm=param_norm) for k in ("cpu", "default")
    )

    assert ours["unorm"].item() == pytest.approx(oracle["unorm"].item(), rel=1e-5)
    torch.testing.assert_close(ours["p"], oracle["p"], atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", RULES)
def test_threads_change_nothing(name):
    start, grads = torch.randn(100_003).bfloat16(), gradients(100_003, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            exact = run_32bit("cpu", name, start, grads, max_unorm=0.5, param_norm=1.0)
            coded = run_8bit("cpu", name, start, grads, False)
            results.append([*exact.values(), *coded.values()])
    finally:
        torch.set_num_threads(before)

    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert a is b is None or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_scalars_are_the_fields_of_the_native_config():
    fields = [name for name, _ in ABI.structs["bnb_optimizer_config"]._fields_]

    assert sorted(fields) == sorted([*StepScalars._fields, "limit"])


def test_every_rule_has_an_id():
    assert {rule.name for rule in RULES.values()} == set(RULE_ID)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"rule": 99}, "unknown optimizer rule 99"),
        ({"n": -1}, "n must not be negative"),
        ({"state2": None}, "state2 does not fit rule"),
        ({"g": None}, "null pointer"),
        ({"g_dtype": 1}, "g and p must have one dtype"),
        ({"p_dtype": 77, "g_dtype": 77}, "unknown dtype 77"),
    ],
)
def test_native_update_checks_its_arguments(change, error):
    tensor = torch.zeros(4)
    address = tensor.data_ptr()
    arguments = {
        "g": address, "g_dtype": 0, "p": address, "p_dtype": 0, "state1": address, "state2": address,
        "unorm": None, "n": 4, "rule": RULE_ID["adam"], "config": bytes(ABI.structs["bnb_optimizer_config"]()),
        "threads": 1, **change,
    }  # fmt: skip

    with pytest.raises(ValueError, match=error):
        lib.bnb_cpu_optimizer_update_32bit(*arguments.values())
