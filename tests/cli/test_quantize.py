"""``quantize``: what it writes, bit for bit, and what it says to bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes._cli import plan_by_model, plan_by_name, quantize
from bitsandbytes._cli.checkpoint import Checkpoint
from bitsandbytes._cli.tensor_files import SafetensorsWriter
from bitsandbytes._quant.clipping import clip_to_fit

safetensors = pytest.importorskip("safetensors.torch")

FORMATS = [
    ("nf4",),
    ("nf4", "--double-quant"),
    ("fp4", "--blocksize", "128"),
    ("fp4", "--double-quant", "--blocksize", "32"),
    ("nf4", "--fit-scales", "--double-quant"),
    ("int8",),
]


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.load_file(path)
    return tensors


def expected(weight: torch.Tensor, name: str, options: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The checkpoint entries of a weight that is quantized at once."""
    if options[0] == "int8":
        codes, scales, _ = F.int8_vectorwise_quant(weight.half())
        return {
            name: codes,
            name.removesuffix("weight") + "SCB": scales,
            name.removesuffix("weight") + "weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    blocksize = int(options[options.index("--blocksize") + 1]) if "--blocksize" in options else 64
    packed, state = F.quantize_4bit(
        clip_to_fit(weight, blocksize, options[0]) if "--fit-scales" in options else weight,
        quant_type=options[0],
        blocksize=blocksize,
        compress_statistics="--double-quant" in options,
    )
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


@pytest.mark.parametrize("model", ["llama", "llama-tied", "bert", "gpt2"])
@pytest.mark.parametrize("options", FORMATS, ids=" ".join)
def test_every_tensor_is_what_quantizing_it_at_once_gives(
    cli, models, tmp_path, monkeypatch, model: str, options: tuple[str, ...]
):
    """Runs far smaller than a tensor, as with weights of hundreds of megabytes."""
    monkeypatch.setattr(quantize, "_RUN_ELEMENTS", 4096)
    source, target = load(models[model]), tmp_path / "out"
    ran = cli("quantize", models[model], target, "--format", *options)
    assert ran.code == 0, ran.err
    result = load(target)

    quantized = 0
    for name, weight in source.items():
        entries = {name: weight}
        if name not in result or result[name].dtype in (torch.uint8, torch.int8):
            transposed = model == "gpt2" and ".c_" in name
            entries = expected(weight.t() if transposed else weight, name, options)
            quantized += 1
        for key, value in entries.items():
            found = result.pop(key)
            assert found.dtype == value.dtype and found.shape == value.shape, key
            assert torch.equal(found, value), key
    assert not result
    assert quantized == {"llama": 14, "llama-tied": 14, "bert": 13, "gpt2": 8}[model]
    assert (target / "tokenizer.json").read_text() == "{}"


def test_shards_hold_whole_weights_and_the_index_names_them_all(cli, models, tmp_path):
    ran = cli("quantize", models["llama"], tmp_path / "out", "--format", "nf4", "--shard-size", "20kB")
    assert ran.code == 0, ran.err
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    for file in files:
        held = safetensors.load_file(tmp_path / "out" / file)
        assert set(held) == {name for name, where in index["weight_map"].items() if where == file}
        for name in held:
            if ".quant_state." in name:
                assert name.partition(".quant_state.")[0] in held
    one = cli("quantize", models["llama"], tmp_path / "one", "--format", "nf4")
    assert one.code == 0 and sorted(path.name for path in (tmp_path / "one").glob("*model*")) == [
        "model.safetensors"
    ]
    many, single = load(tmp_path / "out"), load(tmp_path / "one")
    assert many.keys() == single.keys() and all(torch.equal(many[name], single[name]) for name in many)


def test_pytorch_checkpoints_give_the_same_result(cli, models, tmp_path):
    for name, shards in (("one", 1), ("two", 2)):
        source = tmp_path / name
        source.mkdir()
        shutil.copy(models["bert"] / "config.json", source)
        tensors = list(load(models["bert"]).items())
        weight_map = {}
        for number in range(shards):
            file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number}.bin"
            torch.save(dict(tensors[number::shards]), source / file)
            weight_map |= dict.fromkeys(dict(tensors[number::shards]), file)
        if shards > 1:
            (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert cli("quantize", source, tmp_path / f"{name}-q", "--format", "nf4", "--double-quant").code == 0
    assert cli("quantize", models["bert"], tmp_path / "ref", "--format", "nf4", "--double-quant").code == 0
    reference = load(tmp_path / "ref")
    for name in ("one", "two"):
        result = load(tmp_path / f"{name}-q")
        assert result.keys() == reference.keys()
        assert all(torch.equal(result[key], reference[key]) for key in reference)
        assert not list((tmp_path / f"{name}-q").glob("pytorch*"))


def test_a_tied_weight_held_twice_is_written_once(cli, models, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(models["llama-tied"] / "config.json", source)
    tensors = load(models["llama-tied"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, source / "pytorch_model.bin")
    assert cli("quantize", source, tmp_path / "out", "--format", "fp4").code == 0
    result = load(tmp_path / "out")
    assert "lm_head.weight" not in result and "model.embed_tokens.weight" in result


def test_weights_are_cast_to_the_model_s_dtype_first(cli, models, tmp_path):
    """A loader does so too: the config says bfloat16, whatever the file holds."""
    source = tmp_path / "source"
    shutil.copytree(models["llama"], source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert cli("quantize", source, tmp_path / "out", "--format", "nf4").code == 0
    name = "model.layers.0.mlp.up_proj.weight"
    result = load(tmp_path / "out")
    for key, value in expected(load(source)[name].bfloat16(), name, ("nf4",)).items():
        assert torch.equal(result[key], value)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"


def test_config_keeps_everything_and_adds_what_a_loader_reads(cli, models, tmp_path):
    transformers = pytest.importorskip("transformers")
    ran = cli(
        "quantize", models["llama"], tmp_path / "out", "--format", "fp4", "--double-quant", "--dtype", "float16",
        "--skip", "o_proj", "model.layers.1",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    before = json.loads((models["llama"] / "config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    quantization = after.pop("quantization_config")
    assert after == before
    config = transformers.BitsAndBytesConfig.from_dict(quantization)
    assert config.load_in_4bit and not config.load_in_8bit and config.quant_method == "bitsandbytes"
    assert config.bnb_4bit_quant_type == "fp4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.float16 and config.bnb_4bit_quant_storage == torch.uint8
    assert {"lm_head", "o_proj", "model.layers.1"} <= set(config.llm_int8_skip_modules)
    kept = load(tmp_path / "out")
    assert kept["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float32
    assert kept["model.layers.1.mlp.up_proj.weight"].dtype == torch.float32
    assert kept["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8


def test_a_config_without_dtype_gets_one(cli, models, tmp_path):
    """Otherwise a loader would take it from the first float tensor, which may now be a statistic."""
    source = tmp_path / "source"
    shutil.copytree(models["llama-tied"], source)
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config))
    assert cli("quantize", source, tmp_path / "out", "--format", "nf4").code == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_without_transformers_names_and_shapes_decide(cli, models, tmp_path, monkeypatch):
    def missing(*arguments: object) -> None:
        raise plan_by_model.Unplannable("transformers is not installed")

    for model in ("llama", "llama-tied", "bert"):
        assert cli("quantize", models[model], tmp_path / f"{model}-asked", "--format", "nf4").code == 0
        with monkeypatch.context() as patch:
            patch.setattr(quantize, "plan_by_model", missing)
            ran = cli("quantize", models[model], tmp_path / f"{model}-guessed", "--format", "nf4")
        assert ran.code == 0 and "names and shapes" in ran.err
        asked, guessed = load(tmp_path / f"{model}-asked"), load(tmp_path / f"{model}-guessed")
        assert asked.keys() == guessed.keys()
        assert all(torch.equal(asked[name], guessed[name]) for name in asked)
        skipped = json.loads((tmp_path / f"{model}-guessed/config.json").read_text())["quantization_config"]
        assert skipped["llm_int8_skip_modules"]
    monkeypatch.setattr(quantize, "plan_by_model", missing)
    ran = cli("quantize", models["gpt2"], tmp_path / "gpt2", "--format", "nf4")
    assert ran.code == 1 and "transposed" in ran.err


def test_the_name_rule_skips_what_a_name_catches_by_accident(tmp_path):
    tensors = {
        "model.a.head.weight": torch.zeros(32, 32),
        "model.b.fc.weight": torch.zeros(32, 32),
        "model.tiny.weight": torch.zeros(32, 4),
        "model.norm.weight": torch.zeros(32),
    }
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    plan = plan_by_name.plan_by_name(Checkpoint(tmp_path), {}, ["c"])
    assert [item.name for item in plan.items if item.module] == []
    plan = plan_by_name.plan_by_name(Checkpoint(tmp_path), {}, ["xyz"])
    assert [item.name for item in plan.items if item.module] == ["model.b.fc.weight"]
    assert {"model.a.head", "a.head", "model.tiny", "xyz"} <= set(plan.skip_modules or ())


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.fixture
def source(models, tmp_path) -> Path:
    """A copy of a model to damage; in three or more shards."""
    folder = tmp_path / "source"
    shutil.copytree(models["llama-tied"], folder)
    return folder


def check_refused(
    cli, source: Path, *message: str, options: tuple[object, ...] = ("--format", "nf4")
) -> None:
    """One line that says what is wrong, a code that says something is, and nothing left on disk."""
    target = source.parent / "out"
    before = sorted(source.parent.iterdir())
    ran = cli("quantize", source, target, *options)
    assert ran.code != 0
    assert "Traceback" not in ran.err
    lines = [line for line in ran.err.splitlines() if line.startswith(("bitsandbytes", "python -m"))]
    assert len(lines) == 1, ran.err
    for part in message:
        assert part in lines[0]
    assert sorted(source.parent.iterdir()) == before


def test_missing_source(cli, tmp_path):
    check_refused(cli, tmp_path / "nothing", "nothing does not exist")


def test_source_is_a_file(cli, tmp_path):
    (tmp_path / "file").write_text("")
    check_refused(cli, tmp_path / "file", "is not a folder")


def test_no_config(cli, source):
    (source / "config.json").unlink()
    check_refused(cli, source, "config.json is missing")


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\x00"])
def test_config_is_not_an_object(cli, source, text):
    (source / "config.json").write_text(text)
    check_refused(cli, source, "config.json")


def test_config_that_transformers_rejects(cli, source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hidden_size": "large"}))
    check_refused(cli, source, "config.json")


def test_no_weights(cli, source):
    for path in source.glob("model*"):
        path.unlink()
    check_refused(cli, source, "no weights", "model.safetensors")


def test_truncated_shard(cli, source):
    path = sorted(source.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size - 1)
    check_refused(cli, source, path.name, "truncated")


def test_damaged_shard(cli, source):
    path = sorted(source.glob("*.safetensors"))[0]
    path.write_bytes(b"\x08" + bytes(7) + b"garbage!" + path.read_bytes()[16:])
    check_refused(cli, source, path.name, "damaged")


def test_missing_shard(cli, source):
    path = sorted(source.glob("*.safetensors"))[0]
    path.unlink()
    check_refused(cli, source, path.name, "missing")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_bad_index(cli, source, text):
    (source / "model.safetensors.index.json").write_text(text)
    check_refused(cli, source, "model.safetensors.index.json")


def test_index_that_points_elsewhere(cli, source):
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    check_refused(cli, source, "not a file beside it")


def test_index_with_a_tensor_that_is_not_there(cli, source):
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost.weight"] = sorted(source.glob("*.safetensors"))[0].name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    check_refused(cli, source, "ghost.weight")


def test_weights_that_do_not_fit_the_config(cli, source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 160}))
    check_refused(cli, source, "has shape", "config.json")


def test_already_quantized(cli, models, tmp_path):
    assert cli("quantize", models["llama"], tmp_path / "q", "--format", "nf4").code == 0
    check_refused(cli, tmp_path / "q", "already quantized")
    config = json.loads((tmp_path / "q/config.json").read_text())
    config.pop("quantization_config")
    (tmp_path / "q/config.json").write_text(json.dumps(config))
    check_refused(cli, tmp_path / "q", "already quantized")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "int4"), "int4"),
        ((), "--format"),
        (("--format", "nf4", "--blocksize", "48"), "48"),
        (("--format", "nf4", "--blocksize", "x"), "x"),
        (("--format", "int8", "--blocksize", "64"), "int8"),
        (("--format", "int8", "--double-quant"), "int8"),
        (("--format", "int8", "--fit-scales"), "int8"),
        (("--format", "nf4", "--device", "warp:0"), "--device"),
        (("--format", "nf4", "--shard-size", "much"), "much"),
        (("--format", "nf4", "--dtype", "int8"), "int8"),
        (("--format", "nf4", "--skip", "model"), "nothing to quantize"),
    ],
)
def test_bad_options(cli, source, options, message):
    check_refused(cli, source, message, options=options)


def test_target_exists(cli, models, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("precious")
    ran = cli("quantize", models["bert"], target, "--format", "nf4")
    assert ran.code == 1 and "--overwrite" in ran.err and (target / "mine").read_text() == "precious"
    ran = cli("quantize", models["bert"], target, "--format", "nf4", "--overwrite")
    assert ran.code == 0 and not (target / "mine").exists() and (target / "model.safetensors").exists()
    assert list(tmp_path.iterdir()) == [target]


def test_target_is_the_source(cli, source):
    ran = cli("quantize", source, source, "--format", "nf4", "--overwrite")
    assert ran.code == 1 and "replace the source" in ran.err
    assert cli("quantize", source, source.parent, "--format", "nf4", "--overwrite").code == 1
    assert (source / "config.json").exists()


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(cli, source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    check_refused(cli, source, "not enough space")


def test_a_disk_that_fills_up_leaves_nothing(cli, models, tmp_path, monkeypatch):
    def full(self: SafetensorsWriter) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "out"
    assert cli("quantize", models["bert"], target, "--format", "int8").code == 0
    content = (target / "model.safetensors").read_bytes()
    monkeypatch.setattr(SafetensorsWriter, "finish", full)
    ran = cli("quantize", models["bert"], target, "--format", "nf4", "--overwrite")
    assert ran.code == 1 and "no space left" in ran.err
    assert (target / "model.safetensors").read_bytes() == content
    assert list(tmp_path.iterdir()) == [target]


def test_debug_shows_the_traceback(cli, tmp_path):
    with pytest.raises(Exception, match="does not exist"):
        cli("quantize", tmp_path / "nothing", tmp_path / "out", "--format", "nf4", "--debug")


def test_values_that_are_not_finite_are_reported(cli, source):
    path = next(
        p
        for p in source.glob("*.safetensors")
        if "model.layers.0.mlp.up_proj.weight" in safetensors.load_file(p)
    )
    tensors = safetensors.load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    safetensors.save_file(tensors, path, metadata={"format": "pt"})
    for name in ("nf4", "int8"):
        ran = cli("quantize", source, source.parent / name, "--format", name)
        assert ran.code == 0 and "warning: model.layers.0.mlp.up_proj.weight" in ran.err
