"""Which formats exist, and where their decision thresholds lie: the same on every device."""

from __future__ import annotations

import pytest
import torch

from bitsandbytes import functional as F
from bitsandbytes._formats import table
from bitsandbytes.backends.utils import CODE
from oracles import (
    BLOCKSIZES,
    FLOAT_DTYPES,
    QUANT_TYPES,
    STORAGE_DTYPES,
    assert_same_codes,
    encode_4bit,
    golden,
    pack,
)


def test_the_list_of_formats_is_the_published_one():
    assert set(table.FORMATS) == {"nf4", "fp4"}
    assert tuple(table.BLOCKSIZES) == BLOCKSIZES
    assert set(table.FLOAT_DTYPES) == set(FLOAT_DTYPES)
    assert set(table.STORAGE_DTYPES) == set(STORAGE_DTYPES)
    assert table.NESTED_BLOCKSIZE == 256
    assert table.OPTIMIZER_BLOCKSIZE == 256


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_format_values_are_the_codebook(quant_type):
    values = torch.tensor(table.FORMATS[quant_type].values, dtype=torch.float32)

    assert torch.equal(values, golden("codebooks")[quant_type])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_backends_share_the_exact_tables(quant_type):
    assert torch.equal(CODE[quant_type].cpu(), golden("codebooks")[quant_type])


def _thresholds(quant_type: str) -> torch.Tensor:
    return golden("codebooks")["nf4_bounds" if quant_type == "nf4" else "fp4_bounds_signed"]


@pytest.mark.parametrize("side", ["below", "at", "above"])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_a_value_on_a_threshold_takes_the_lower_code(device, quant_type, side):
    bounds = _thresholds(quant_type)
    direction = {"below": -torch.inf, "at": 0.0, "above": torch.inf}[side]
    moved = bounds if side == "at" else torch.nextafter(bounds, torch.full_like(bounds, direction))
    values = torch.cat([torch.ones(1), moved])  # the leading one makes absmax exactly 1

    packed, state = F.quantize_4bit(values.to(device), blocksize=32, quant_type=quant_type)

    assert state.absmax.tolist() == [1.0]
    assert_same_codes(packed.cpu(), pack(encode_4bit(values.double(), quant_type), quant_type))


@pytest.mark.parametrize("side", ["at", "above", "below"])
def test_nf4_thresholds_match_published_codes(device, side):
    arrays = golden("quant4bit_odd_edge")

    packed, state = F.quantize_4bit(arrays[f"nf4_ties_{side}.x"].to(device), quant_type="nf4")

    assert_same_codes(packed.cpu(), arrays[f"nf4_ties_{side}.packed"])
    assert torch.equal(state.absmax.cpu(), arrays[f"nf4_ties_{side}.absmax"])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_code_decodes_to_its_value_and_encodes_to_itself(device, quant_type):
    codes = torch.arange(16, dtype=torch.uint8)
    packed = pack(codes, quant_type).to(device)
    absmax = torch.ones(1, device=device)

    values = F.dequantize_4bit(
        packed, absmax=absmax, out=torch.empty(16, device=device), quant_type=quant_type
    )
    again, _ = F.quantize_4bit(values, quant_type=quant_type)

    assert torch.equal(values.cpu(), golden("codebooks")[quant_type])
    expected = codes.clone()
    if quant_type == "fp4":
        expected[8] = 0  # two codes mean zero
    assert_same_codes(again.cpu(), pack(expected, quant_type))
