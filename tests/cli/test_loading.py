"""transformers loads what ``quantize`` wrote, and gets what it would have made itself in memory."""

from __future__ import annotations

import importlib.metadata
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers loads quantized models with accelerate")


def installed() -> bool:
    try:
        importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


pytestmark = pytest.mark.skipif(not installed(), reason="transformers asks for an installed bitsandbytes")

OPTIONS = [
    ("nf4",),
    ("nf4", "--double-quant"),
    ("fp4",),
    ("fp4", "--double-quant"),
    ("int8",),
]
LOADED_AS = {
    "llama": ["AutoModelForCausalLM", "AutoModel"],
    "llama-tied": ["AutoModelForCausalLM", "AutoModel"],
    "bert": ["AutoModel"],
    "bert-masked-lm": ["AutoModelForMaskedLM"],
    "gpt2": ["AutoModelForCausalLM", "AutoModel"],
}


def settings(options: tuple[str, ...]) -> object:
    if options[0] == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options[0],
        bnb_4bit_use_double_quant="--double-quant" in options,
    )


def load(kind: str, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, kind).from_pretrained(folder, device_map="cpu", **options)


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("model", LOADED_AS)
def test_a_loaded_model_equals_one_quantized_in_memory(cli, models, tmp_path, model, options):
    ran = cli("quantize", models[model], tmp_path / "out", "--format", *options, "--dtype", "float32") if (
        options[0] != "int8"
    ) else cli("quantize", models[model], tmp_path / "out", "--format", *options)  # fmt: skip
    assert ran.code == 0, ran.err
    for kind in LOADED_AS[model]:
        loaded, report = load(kind, tmp_path / "out", output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"] and not report["error_msgs"]
        in_memory = load(kind, models[model], quantization_config=settings(options))

        ours, theirs = loaded.state_dict(), in_memory.state_dict()
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype, name
            assert torch.equal(ours[name], theirs[name]), name
        kinds = {name: type(module).__name__ for name, module in loaded.named_modules()}
        assert kinds == {name: type(module).__name__ for name, module in in_memory.named_modules()}

        tokens = torch.arange(20).reshape(2, 10) % 96
        with torch.no_grad():
            result, reference = loaded(tokens)[0], in_memory(tokens)[0]
        assert result.isfinite().all() and torch.equal(result, reference)


def test_the_bare_model_of_a_checkpoint_without_its_pooler(cli, models, tmp_path):
    """The layer that only the bare model has is not quantized, and its loader must not think so."""
    assert cli("quantize", models["bert-masked-lm"], tmp_path / "out", "--format", "nf4").code == 0
    model = load("AutoModel", tmp_path / "out")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["pooler.dense"] == "Linear"
    assert kinds["encoder.layer.1.output.dense"] == "Linear4bit"
    with torch.no_grad():
        assert model(torch.arange(10).view(1, 10))[0].isfinite().all()


@pytest.mark.parametrize("blocksize", [32, 4096])
def test_any_block_size_loads(cli, models, tmp_path, blocksize):
    """transformers has no setting for it: the size travels with each weight."""
    options = ("--format", "nf4", "--double-quant", "--blocksize", blocksize)
    assert cli("quantize", models["llama"], tmp_path / "out", *options).code == 0
    model = load("AutoModelForCausalLM", tmp_path / "out")
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.blocksize == blocksize
    with torch.no_grad():
        assert model(torch.arange(10).view(1, 10))[0].isfinite().all()


def test_skipped_modules_stay_plain_in_every_class(cli, models, tmp_path):
    ran = cli(
        "quantize",
        models["llama"],
        tmp_path / "out",
        "--format",
        "nf4",
        "--skip",
        "model.layers.0.mlp",
        "nix",
    )
    assert ran.code == 0 and "--skip nix matches no layer" in ran.err
    for kind, prefix in (("AutoModelForCausalLM", "model."), ("AutoModel", "")):
        model, report = load(kind, tmp_path / "out", output_loading_info=True)
        assert not report["missing_keys"]
        assert type(model.get_submodule(f"{prefix}layers.0.mlp.up_proj")) is torch.nn.Linear
        assert type(model.get_submodule(f"{prefix}layers.1.mlp.up_proj")) is not torch.nn.Linear


def test_fused_weights_are_split_as_the_loader_splits_them(cli, tmp_path):
    """A checkpoint may hold several layers in one tensor; the layers are what gets quantized."""
    mapping = pytest.importorskip("transformers.conversion_mapping")
    loading = pytest.importorskip("transformers.core_model_loading")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "plain")
    tensors = model.state_dict()
    parts = ("q_proj", "k_proj", "v_proj")
    fused = torch.cat([tensors.pop(f"model.layers.0.self_attn.{part}.weight") for part in parts])
    tensors["model.layers.0.self_attn.qkv.weight"] = fused
    safetensors = pytest.importorskip("safetensors.torch")
    (tmp_path / "fused").mkdir()
    safetensors.save_file(tensors, tmp_path / "fused/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "fused/config.json").write_bytes((tmp_path / "plain/config.json").read_bytes())

    before = mapping.get_checkpoint_conversion_mapping("llama")
    converter = loading.WeightConverter(
        source_patterns="self_attn.qkv.weight",
        target_patterns=[f"self_attn.{part}.weight" for part in parts],
        operations=[loading.Chunk(dim=0)],
    )
    mapping.register_checkpoint_conversion_mapping("llama", [converter], overwrite=True)
    try:
        assert cli("quantize", tmp_path / "fused", tmp_path / "out", "--format", "nf4").code == 0
    finally:
        mapping.register_checkpoint_conversion_mapping("llama", before or [], overwrite=True)
    assert cli("quantize", tmp_path / "plain", tmp_path / "reference", "--format", "nf4").code == 0
    result = safetensors.load_file(tmp_path / "out/model.safetensors")
    reference = safetensors.load_file(tmp_path / "reference/model.safetensors")
    assert result.keys() == reference.keys()
    assert all(torch.equal(result[name], reference[name]) for name in reference)
