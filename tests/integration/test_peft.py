"""PEFT trains adapters on our quantized layers and merges them into the weights."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import bitsandbytes as bnb
from integration.models import load

FORMATS = ["nf4", "nf4-double", "fp4", "int8"]


def with_adapter(folder, device: str, quantization: str, **options):
    """The quantized model with an adapter on two projections, ready to train."""
    base = peft.prepare_model_for_kbit_training(load(folder, device, quantization))
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )
    torch.manual_seed(5)
    return peft.get_peft_model(base, config)


def train(model, tokens: torch.Tensor, steps: int = 1) -> list[float]:
    """Loss before each step and after the last."""
    optimizer = bnb.optim.AdamW8bit((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        losses.append(model(tokens, labels=tokens).loss.item())
    return losses


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_step_trains_the_adapter_and_leaves_the_base(quantization, model_folder, tokens, device):
    model = with_adapter(model_folder, device, quantization)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    losses = train(model, tokens)

    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert losses[1] < losses[0]
    assert changed and all("lora_B" in key or "lora_A" in key for key in changed)


@pytest.mark.parametrize("quantization", FORMATS)
def test_training_lowers_the_loss(quantization, model_folder, tokens, device):
    losses = train(with_adapter(model_folder, device, quantization), tokens, steps=8)

    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("quantization", FORMATS)
@torch.no_grad()
def test_merged_weights_hold_base_plus_adapter(quantization, model_folder, tokens, device):
    """Merging requantizes: each weight is the sum's, within the format's own rounding."""
    model = with_adapter(model_folder, device, quantization)
    with torch.enable_grad():
        train(model, tokens, steps=4)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = dequantized(layer.base_layer) + layer.get_delta_weight("default")

    merged = model.merge_and_unload()

    base = merged.model.layers[0].self_attn.q_proj
    assert type(base).__name__ in ("Linear4bit", "Linear8bitLt")
    alone = requantized(expected, base)
    assert torch.equal(dequantized(base), alone)
    assert torch.isfinite(merged(tokens).logits).all()


def dequantized(layer: torch.nn.Module) -> torch.Tensor:
    weight = layer.weight
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    # The first forward moves the scales from the parameter to the layer's state.
    scales = weight.SCB if weight.SCB is not None else layer.state.SCB
    return bnb.functional.int8_vectorwise_dequant(weight.data, scales)


def requantized(values: torch.Tensor, like: torch.nn.Module) -> torch.Tensor:
    """What the format of ``like`` makes of ``values``."""
    fresh = copy.deepcopy(like)
    old = like.weight
    if isinstance(old, bnb.nn.Params4bit):
        fresh.weight = bnb.nn.Params4bit(
            values.cpu(),
            requires_grad=False,
            quant_type=old.quant_type,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_storage=old.quant_storage,
        ).to(values.device)
    else:
        fresh.weight = bnb.nn.Int8Params(values.cpu(), requires_grad=False).to(values.device)
    return dequantized(fresh)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@torch.no_grad()
def test_a_saved_adapter_fits_a_fresh_base(quantization, model_folder, tokens, device, tmp_path):
    model = with_adapter(model_folder, device, quantization)
    with torch.enable_grad():
        train(model, tokens)
    model.save_pretrained(tmp_path)

    fresh = peft.prepare_model_for_kbit_training(load(model_folder, device, quantization))
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()

    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_dora_reads_the_quantized_weight(quantization, model_folder, tokens, device):
    losses = train(with_adapter(model_folder, device, quantization, use_dora=True), tokens, steps=2)

    assert losses[-1] < losses[0]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_gradient_checkpointing_gives_the_same_gradients(quantization, model_folder, tokens, device):
    model = with_adapter(model_folder, device, quantization)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    assert gradients[0].keys() == gradients[1].keys() != set()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name])
