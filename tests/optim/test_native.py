"""The native rules and the plain-torch ones are one arithmetic: same order, same roundings.

torch's vectorised square root may be off by a last place, so parameters whose step takes one are compared with a
tolerance; all else bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsandbytes._formats.rules import RULES, StepScalars
from bitsandbytes._native import ABI, RULE_ID, has_native, lib
from optim_updates import (
    WITHOUT_ROOT,
    State,
    each_step,
    fresh_8bit,
    fresh_32bit,
    gradients,
    run,
    step_8bit,
    step_32bit,
)

pytestmark = pytest.mark.skipif(
    not has_native("bnb_cpu_optimizer_update_32bit"), reason="needs the native library"
)

LENGTHS = [1, 7, 255, 256, 257, 17_001]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_agree(name: str, before: State, ours: State, oracle: State) -> None:
    """No state takes a root; a parameter's step may."""
    for key, value in oracle.items():
        if key == "p" and name not in WITHOUT_ROOT:
            assert_moved_alike(before[key], ours[key], value)
        else:
            assert (ours[key] is None) == (value is None)
            if value is not None:
                torch.testing.assert_close(ours[key], value, atol=0.0, rtol=0.0, equal_nan=True)


def assert_moved_alike(before: Tensor, ours: Tensor, value: Tensor) -> None:
    """To a last place of the step's root, its two quotients, their sum and product, then one of the parameter."""
    finite, format = value.isfinite(), torch.finfo(value.dtype)
    torch.testing.assert_close(ours[~finite], value[~finite], atol=0.0, rtol=0.0, equal_nan=True)
    before, ours, value = (x[finite].double() for x in (before, ours, value))
    of_step = 5 * torch.finfo(torch.float32).eps * (value - before).abs()
    assert ((ours - value).abs() <= of_step + format.eps * value.abs().clamp(min=format.tiny)).all()


@pytest.mark.parametrize("skip_zeros", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", RULES)
def test_32bit_agrees(name, n, dtype, skip_zeros):
    start, grads = torch.randn(n).to(dtype), gradients(n, dtype)

    for states in each_step(step_32bit, "cpu", name, fresh_32bit(name, start), grads, skip_zeros=skip_zeros):
        assert_agree(name, *states)


@pytest.mark.parametrize("skip_zeros", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", RULES)
def test_8bit_agrees(name, n, dtype, skip_zeros):
    start, grads = torch.randn(n).to(dtype), gradients(n, dtype)

    for states in each_step(step_8bit, "cpu", name, fresh_8bit(name, start), grads, skip_zeros=skip_zeros):
        assert_agree(name, *states)


@pytest.mark.parametrize("param_norm", [0.0, 1e-3, 1e9])
@pytest.mark.parametrize("name", RULES)
def test_norm_limit_agrees(name, param_norm):
    start, grads = torch.randn(17_001), gradients(17_001, torch.float32)

    ours, oracle = (
        run(step_32bit, k, name, fresh_32bit(name, start), grads, max_unorm=0.5, param_norm=param_norm)
        for k in ("cpu", "default")
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
            limited = {"max_unorm": 0.5, "param_norm": 1.0}
            exact = run(step_32bit, "cpu", name, fresh_32bit(name, start), grads, **limited)
            coded = run(step_8bit, "cpu", name, fresh_8bit(name, start), grads)
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
