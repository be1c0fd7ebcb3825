"""``selftest`` passes on this machine, covers every operator, and fails when a kernel is wrong."""

from __future__ import annotations

import pytest
import torch

from bitsandbytes import _ops
from bitsandbytes._cli import selftest, selftest_cases


def test_every_operator_has_a_case():
    tested = {case.operator for case in selftest_cases.cases(quick=True)}
    assert tested == set(_ops.OPERATORS)


def test_it_passes_and_says_which_kernel_ran(cli):
    ran = cli("selftest", "--quick", "--device", "cpu")
    assert ran.code == 0, ran.out
    lines = ran.out.splitlines()
    assert "all passed" in lines[-1]
    rows = lines[2:-1]
    assert len(rows) == len(selftest_cases.cases(quick=True)) and all(row.endswith("  ok") for row in rows)
    assert all(" default " in row or " cpu " in row for row in rows)


@pytest.mark.parametrize("operator", sorted(_ops.OPERATORS))
def test_a_wrong_kernel_is_found(operator, capsys, monkeypatch):
    """One value of one result is off, as a kernel with a bad tail would have it."""
    right = getattr(torch.ops.bitsandbytes, operator)

    def wrong(*arguments):
        results = right(*arguments)
        spoiled = (
            [arguments[2]] if results is None else [results] if isinstance(results, torch.Tensor) else results
        )
        target = next(tensor for tensor in spoiled if tensor is not None and tensor.numel())
        last = target.view(-1)[-1:]
        last.copy_(last ^ 0x77 if not target.is_floating_point() else last + target.abs().max() * 10)
        return results

    monkeypatch.setattr(torch.ops.bitsandbytes, operator, wrong, raising=False)
    cases = [case for case in selftest_cases.cases(quick=True) if case.operator == operator]
    for case in cases:
        assert not selftest._check(case, torch.device("cpu"), seed=5, repeats=1)
    assert capsys.readouterr().out.count("FAIL") == len(cases)


def test_the_command_fails_with_a_wrong_kernel(start):
    """Overriding the registered kernel itself, in a process of its own."""
    code = """
import torch, warnings, bitsandbytes
warnings.simplefilter("ignore")
library = torch.library.Library("bitsandbytes", "IMPL")
def wrong(A, absmax, blocksize, quant_type, shape, dtype):
    return torch.zeros(shape, dtype=dtype)
library.impl("dequantize_4bit", wrong, "CPU", allow_override=True)
"""
    process = start("selftest", "--quick", code=code)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, out + err
    failed = [line for line in out.splitlines() if "FAIL" in line]
    assert failed and all("dequantize_4bit" in line or "gemm_4bit" in line for line in failed[:-1])


def test_a_kernel_that_raises_is_a_failure_and_not_the_end(monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("no such instruction\nmore")

    monkeypatch.setattr(torch.ops.bitsandbytes, "gemv_4bit", broken, raising=False)
    case = next(case for case in selftest_cases.cases(quick=True) if case.operator == "gemv_4bit")
    assert not selftest._check(case, torch.device("cpu"), seed=1, repeats=1)
    assert "FAIL RuntimeError: no such instruction" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["warp", "cuda:99", "meta"])
def test_a_device_that_is_not_here(cli, device):
    ran = cli("selftest", "--quick", "--device", device)
    assert ran.code == 1 and len(ran.err.splitlines()) == 1 and device in ran.err
