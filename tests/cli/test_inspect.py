"""``inspect``: formats, sizes and errors, also of files that others wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bitsandbytes.functional as F

safetensors = pytest.importorskip("safetensors.torch")

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def inspect(cli, *arguments: object) -> dict:
    ran = cli("inspect", *arguments, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


@pytest.mark.parametrize(
    ("options", "worst"),
    [
        (("nf4",), 0.12),
        (("nf4", "--double-quant"), 0.12),
        (("fp4", "--blocksize", "128"), 0.16),
        (("int8",), 0.01),
    ],
)
@pytest.mark.parametrize("model", ["llama-tied", "gpt2"])
def test_sizes_add_up_and_errors_are_those_of_the_format(cli, models, tmp_path, model, options, worst):
    assert cli("quantize", models[model], tmp_path / "out", "--format", *options).code == 0
    found = inspect(cli, tmp_path / "out", "--source", models[model])
    content = safetensors.load_file(tmp_path / "out/model.safetensors")
    assert found["totals"]["bytes"] == sum(t.numel() * t.element_size() for t in content.values())
    assert sum(row["bytes"] for row in found["tensors"]) == found["totals"]["bytes"]
    for row in found["tensors"]:
        assert row["bits_per_weight"] == pytest.approx(8 * row["bytes"] / torch.Size(row["shape"]).numel())
        if row["format"] == options[0]:
            assert 0 < row["relative_error"] < worst
            assert row["double_quant"] == ("--double-quant" in options)
        else:
            assert row["relative_error"] == 0
    assert sum(row["format"] == options[0] for row in found["tensors"]) >= 8
    assert 0 < found["totals"]["relative_error"] < worst


def test_the_error_is_the_one_of_the_decoded_weight(cli, models, tmp_path):
    assert cli("quantize", models["llama"], tmp_path / "out", "--format", "nf4", "--double-quant").code == 0
    name = "model.layers.0.mlp.down_proj.weight"
    weight = safetensors.load_file(models["llama"] / "model.safetensors")[name]
    packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    expected = (F.dequantize_4bit(packed, state) - weight).norm() / weight.norm()
    rows = inspect(cli, tmp_path / "out", "--source", models["llama"])["tensors"]
    assert next(row for row in rows if row["name"] == name)["relative_error"] == pytest.approx(
        expected.item()
    )


@pytest.mark.parametrize(
    ("file", "kind", "nested"),
    [
        ("linear4bit_nf4_state_dict", "nf4", False),
        ("linear4bit_fp4_state_dict", "fp4", False),
        ("linear4bit_nf4_nested_state_dict", "nf4", True),
        ("linear4bit_nf4_nested_bf16storage_state_dict", "nf4", True),
        ("linear8bitlt_state_dict", "int8", False),
    ],
)
def test_published_layers(cli, file, kind, nested):
    rows = inspect(cli, GOLDEN / f"{file}.safetensors")["tensors"]
    weight = next(row for row in rows if row["name"].endswith("weight"))
    assert (weight["format"], weight["double_quant"]) == (kind, nested)
    assert len(rows) == 2


def test_an_unquantized_model_and_the_table(cli, models):
    ran = cli("inspect", models["llama-tied"], "--source", models["llama-tied"])
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].split() == ["tensor", "format", "shape", "bytes", "bits/weight", "error"]
    assert any(line.split()[:3] == ["model.norm.weight", "bfloat16", "64"] for line in lines)
    assert lines[-1].startswith("total:") and "100.0% of the source" in lines[-1]


def test_bad_input_is_one_line(cli, models, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    for path in (tmp_path / "nothing", tmp_path / "empty", tmp_path / "broken.safetensors"):
        ran = cli("inspect", path)
        assert ran.code == 1 and len(ran.err.splitlines()) == 1 and str(path) in ran.err


@pytest.mark.parametrize("damage", ["blob", "absmax", "short", "shape"])
def test_damaged_statistics_are_one_line(cli, tmp_path, damage):
    tensors = safetensors.load_file(GOLDEN / "linear4bit_nf4_nested_state_dict.safetensors")
    name = next(key for key in tensors if "quant_state" in key)
    base = name.partition(".quant_state.")[0]
    if damage == "blob":
        tensors[name] = tensors[name][:-3].clone()
    elif damage == "absmax":
        del tensors[f"{base}.absmax"]
    elif damage == "short":
        tensors[base] = tensors[base][:-8].clone()
    else:
        text = json.loads(bytes(tensors[name].tolist()))
        text["shape"] = [10**6, 10**6]
        tensors[name] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
    safetensors.save_file(tensors, tmp_path / "a.safetensors")
    ran = cli("inspect", tmp_path / "a.safetensors")
    assert ran.code == 1 and len(ran.err.splitlines()) == 1 and base in ran.err
