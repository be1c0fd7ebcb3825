"""transformers loads, runs, saves and reloads models with our layers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import bitsandbytes as bnb
from integration.models import QUANTIZATIONS, load

# Share of the logits' norm that a format may change in the tiny model: half the widest gap between its codes,
# relative to the block's absmax, times the two layers that add up.
LOGIT_ERROR = {"nf4": 0.3, "fp4": 0.4, "int8": 0.05}


def quantized_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes: packed codes stored as floats may be NaN, which equals nothing."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def same_state(first: torch.nn.Module, second: torch.nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(raw(a[key]), raw(b[key])), key


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_every_linear_layer_but_the_head_is_quantized(quantization, model_folder, device):
    model = load(model_folder, device, quantization)

    assert len(quantized_layers(model)) == 2 * 7
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@torch.inference_mode()
def test_logits_stay_within_the_formats_error(quantization, model_folder, tokens, device):
    reference = load(model_folder, device)(tokens).logits.double()
    logits = load(model_folder, device, quantization)(tokens).logits.double()

    error = (logits - reference).norm() / reference.norm()
    assert 0 < error < LOGIT_ERROR[quantization.split("-")[0]]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@torch.inference_mode()
def test_saved_models_come_back_bit_exact(quantization, model_folder, tokens, device, tmp_path):
    model = load(model_folder, device, quantization)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, device)

    assert len(quantized_layers(again)) == len(quantized_layers(model))
    same_state(model, again)
    assert torch.equal(model(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "int8"])
def test_generation_repeats(quantization, model_folder, tokens, device):
    model = load(model_folder, device, quantization)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}

    first = model.generate(tokens, **options)
    second = model.generate(tokens, **options)

    assert first.shape[1] > tokens.shape[1]
    assert torch.equal(first, second)


def test_four_bit_weights_take_an_eighth_of_the_memory(model_folder, device):
    full = load(model_folder, device)
    model = load(model_folder, device, "nf4")

    saved = sum(p.numel() * 4 for name, p in full.named_parameters() if "_proj" in name)
    left = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "_proj" in name)
    assert left * 8 == saved
    assert model.get_memory_footprint() < full.get_memory_footprint()
    assert model.num_parameters() == full.num_parameters()


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "fp4", "int8"])
@torch.inference_mode()
def test_dequantized_models_are_ordinary_again(quantization, model_folder, tokens, device):
    model = load(model_folder, device, quantization)
    expected = model(tokens).logits
    model = model.dequantize().to(torch.float32)

    assert quantized_layers(model) == []
    # The int8 matmul rounds the activations too: half a step of 1/127 of a row's largest, in each of 14 layers.
    error = (model(tokens).logits - expected).norm() / expected.norm()
    assert error < (14 * 0.5 / 127 if quantization == "int8" else 1e-3)


def test_modules_can_be_skipped(model_folder, device):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["q_proj", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, quantization_config=config, device_map={"": device}
    )

    assert len(quantized_layers(model)) == 2 * 6
