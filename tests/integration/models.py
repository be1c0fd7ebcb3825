"""The ways users ask transformers for quantized weights, and loading a model that way."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

QUANTIZATIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-bf16-storage": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "int8-no-outliers": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}


def load(folder: Path, device: str, quantization: str | None = None, **kwargs) -> PreTrainedModel:
    """The model in ``folder``; without ``quantization`` as it was saved."""
    if quantization is not None:
        kwargs["quantization_config"] = BitsAndBytesConfig(**QUANTIZATIONS[quantization])
    kwargs.setdefault("dtype", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": device}, local_files_only=True, **kwargs
    )
    return model.eval()
