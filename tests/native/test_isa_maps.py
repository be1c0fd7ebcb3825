"""Maps of 256 values on every instruction set: codes at every boundary, and the 8-bit optimizer states they hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsandbytes import _native, functional as F
from bitsandbytes._formats.codebooks import midpoints
from bitsandbytes._formats.rules import RULES, step_scalars
from bitsandbytes._formats.table import FLOAT_DTYPES
from bitsandbytes._ops import OPERATORS

MAPS = {
    "signed": F.create_dynamic_map(),
    "unsigned": F.create_dynamic_map(signed=False),
    "six bits": F.create_dynamic_map(total_bits=6),  # most entries are zeros
    "linear": F.create_linear_map(),
    "positive": F.create_linear_map(signed=False),
    "fp8": F.create_fp8_map(),
    "no zero": torch.cat([torch.linspace(-1, -0.5, 100), torch.linspace(0.7, 1, 156)]),
    "wide": torch.linspace(-3.0, 5.0, 256),  # entries that no scaled value reaches
    "crowded": torch.linspace(0.5, 0.501, 256),
    "random": torch.rand(256).mul(2).sub(1).sort().values,
}
BLOCK = 256


def assert_same_bytes(one: Tensor | None, other: Tensor | None, about: object) -> None:
    assert (one is None) == (other is None)
    assert one is None or torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)), about


def boundaries(code: Tensor) -> Tensor:
    """Every midpoint and entry of a map with its neighbours, both zeros, denormals and the edges of binades."""
    points = torch.cat([midpoints(code), code, torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e-12, -1e-12])])
    points = torch.cat([points, torch.exp2(-torch.arange(40.0)), -torch.exp2(-torch.arange(40.0))])
    up, down = (torch.nextafter(points, torch.tensor(end)) for end in (torch.inf, -torch.inf))
    points = torch.cat([points, up, down, torch.rand(5000) * 2 - 1])
    return points[points.abs() <= 1]


@pytest.mark.parametrize("at_once", [1, 1000])  # rows: a table is made for many values alone
@pytest.mark.parametrize("name", MAPS)
def test_boundaries_between_codes(variants, name, at_once):
    """A value on a midpoint takes the lower code, its neighbours theirs; the scale of every block is one."""
    code = MAPS[name]
    points = boundaries(code)
    rows = torch.nn.functional.pad(points, (0, -points.numel() % 255)).view(-1, 255)
    values = torch.cat([rows, torch.ones(len(rows), 1)], dim=1).contiguous()
    expected = torch.searchsorted(midpoints(code).double(), values.double()).to(torch.uint8)

    for isa, library in variants.items():
        codes, absmax = torch.zeros_like(values, dtype=torch.uint8), torch.zeros(len(rows))
        for some, into in zip(values.split(at_once), codes.split(at_once), strict=True):
            library.bnb_cpu_quantize_blockwise(
                code.data_ptr(),
                some.data_ptr(),
                0,
                into.data_ptr(),
                absmax.data_ptr(),
                some.numel(),
                BLOCK,
                1,
            )
        assert torch.equal(codes, expected), isa


@pytest.mark.parametrize("n", [2 * BLOCK, 80 * BLOCK])
@pytest.mark.parametrize("name", MAPS)
def test_nan_takes_the_last_code_in_its_block_alone(variants, name, n):
    values = torch.rand(n // BLOCK, BLOCK) * 2 - 1
    values[:, 0] = 1.0
    expected = torch.searchsorted(midpoints(MAPS[name]).double(), values.double()).to(torch.uint8)
    values[0, 3], values[-1, 5] = torch.nan, -torch.nan
    expected[0], expected[-1] = 255, 255

    for isa, library in variants.items():
        codes, absmax = torch.zeros(n, dtype=torch.uint8), torch.zeros(n // BLOCK)
        library.bnb_cpu_quantize_blockwise(
            MAPS[name].data_ptr(), values.data_ptr(), 0, codes.data_ptr(), absmax.data_ptr(), n, BLOCK, 1
        )
        assert torch.equal(codes.view(-1, BLOCK), expected), isa


def step_8bit(library, name: str, tensors: dict[str, Tensor | None], skip_zeros: bool) -> None:
    scalars = step_scalars(name, 0.9, 0.99, 0.999, 2.0, 1e-8, 0.1, 2, 1e-2, 0.5, skip_zeros)
    config = bytes(_native.ABI.structs["bnb_optimizer_config"](limit=0.0, **scalars._asdict()))
    at = {key: None if t is None else t.data_ptr() for key, t in tensors.items()}
    dtype, n = _native.DTYPE_ID[tensors["p"].dtype], tensors["p"].numel()
    library.bnb_cpu_optimizer_update_8bit_blockwise(
        at["g"], dtype, at["qmap1"], at["qmap2"], at["p"], dtype, at["state1"], at["state2"], at["absmax1"],
        at["absmax2"], n, _native.RULE_ID[RULES[name].name], config, 2,
    )  # fmt: skip


def step_in_torch(name: str, t: dict[str, Tensor | None], skip_zeros: bool) -> None:
    OPERATORS["optimizer_update_8bit_blockwise"].run_with(
        "default", name, t["g"], t["p"], t["state1"], t["state2"], 0.9, 0.99, 0.999, 2.0, 1e-8, 2, 1e-2, t["qmap1"],
        t["qmap2"], t["absmax1"], t["absmax2"], 0.1, 0.5, skip_zeros,
    )  # fmt: skip


@pytest.mark.parametrize("skip_zeros", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_8bit_states_advance_alike(variants, name, dtype, skip_zeros):
    """Bit for bit, with states of any magnitude: also those that scaling rounds to zero but that keep their sign."""
    rule = RULES[name]
    two = rule.states == 2
    for n in (1, 63, 257, 20_000):
        blocks = -(n // -BLOCK)
        g = torch.randn(n) * torch.logspace(-44, 3, n)[torch.randperm(n)]
        g[::7] = 0.0
        g[1::3] = -1e-44 * torch.randint(1, 100, (len(g[1::3]),))
        g[300:303] = torch.tensor([torch.inf, torch.nan, -torch.inf])[: max(0, n - 300)]
        codes = torch.randint(256, (rule.averages, n), dtype=torch.uint8)
        codes[:, ::2] = 127  # zero, so that an average may become as small as its gradient
        start = {
            "g": g.to(dtype),
            "p": torch.randn(n).to(dtype),
            "state1": codes,
            "state2": torch.randint(256, (n,), dtype=torch.uint8) if two else None,
            "absmax1": torch.exp2(torch.randint(-140, 20, (rule.averages, blocks)).float()),
            "absmax2": torch.exp2(torch.randint(-140, 20, (blocks,)).float()) if two else None,
            "qmap1": MAPS["signed"],
            "qmap2": MAPS["unsigned"] if two else None,
        }
        plain = {key: None if t is None else t.clone() for key, t in start.items()}
        step_in_torch(name, plain, skip_zeros)
        results = {}
        for isa, library in variants.items():
            results[isa] = {key: None if t is None else t.clone() for key, t in start.items()}
            step_8bit(library, name, results[isa], skip_zeros)
        for isa, result in results.items():
            for key, value in result.items():
                expected = results["scalar"][key]
                if isa == "neon" and key == "p":  # where a NaN has another sign than on x86
                    value, expected = (torch.where(t.isnan(), torch.nan, t) for t in (value, expected))
                assert_same_bytes(value, expected, (isa, n, key))
                if key != "p":  # which takes a root, that torch may round otherwise
                    assert_same_bytes(value, plain[key], (isa, n, key))
