"""accelerate quantizes while it loads a checkpoint, and moves quantized parameters between devices."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model, set_module_tensor_to_device
from accelerate.utils.bnb import replace_with_bnb_layers
from transformers import AutoConfig, AutoModelForCausalLM

import bitsandbytes as bnb
from integration.models import load

CPU_NEEDS_GPU = "accelerate quantizes for GPUs only, and this test's device is the CPU"


def quantized(folder, **options):
    """The model on GPU 0, quantized by accelerate while it loads."""
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    config = BnbQuantizationConfig(torch_dtype=torch.float32, **options)
    return load_and_quantize_model(model, config, weights_location=str(folder), device_map={"": 0}).eval()


def linear4bit(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@torch.inference_mode()
def test_it_quantizes_to_4_bits_while_loading(quant_type, model_folder, tokens, device):
    if device == "cpu":
        pytest.skip(CPU_NEEDS_GPU)
    model = quantized(model_folder, load_in_4bit=True, bnb_4bit_quant_type=quant_type)
    expected = load(model_folder, device, quant_type)

    assert len(linear4bit(model)) == 2 * 7
    for name, layer in linear4bit(model).items():
        assert torch.equal(layer.weight.data, expected.get_submodule(name).weight.data), name
    assert torch.isfinite(model(tokens).logits).all()


@torch.inference_mode()
def test_it_quantizes_to_8_bits_while_loading(model_folder, tokens, device):
    if device == "cpu":
        pytest.skip(CPU_NEEDS_GPU)
    model = quantized(model_folder, load_in_8bit=True)

    assert sum(isinstance(m, bnb.nn.Linear8bitLt) for m in model.modules()) == 2 * 7
    assert torch.isfinite(model(tokens).logits).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@torch.inference_mode()
def test_its_layers_quantize_when_their_weights_arrive(quant_type, model_folder, tokens, device):
    """Layers made without memory, weights set one after another: on any device."""
    source = load(model_folder, device)
    config = BnbQuantizationConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_compute_dtype="fp32",
        torch_dtype=torch.float32,
    )
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(source.config)
        model = replace_with_bnb_layers(model, config, modules_to_not_convert=["lm_head"])
    for name, value in source.state_dict().items():
        set_module_tensor_to_device(model, name, device, value=value.clone(), dtype=value.dtype)
    model.model.rotary_emb = source.model.rotary_emb
    expected = load(model_folder, device, quant_type)

    assert len(linear4bit(model)) == 2 * 7
    for name, layer in linear4bit(model).items():
        assert torch.equal(layer.weight.data, expected.get_submodule(name).weight.data), name
    assert torch.equal(model.eval()(tokens).logits, expected(tokens).logits)


def test_weights_can_be_set_by_name(model_folder, device):
    """The way device maps place a weight: rebuild the parameter from its class and its attributes."""
    model = load(model_folder, device, "nf4")
    name = "model.layers.0.self_attn.q_proj.weight"
    layer = model.get_submodule(name.rpartition(".")[0])
    values = load(model_folder, device).get_parameter(name).detach().clone()
    before = layer.weight.data.clone()
    with torch.no_grad():
        layer.weight.data.zero_()

    layer.weight.bnb_quantized = False
    set_module_tensor_to_device(model, name, device, value=values, dtype=values.dtype)

    assert torch.equal(layer.weight.data, before)
