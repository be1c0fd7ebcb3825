"""A tiny randomly initialised causal model on disk; nothing is downloaded.

Sizes are those of a real architecture scaled down: grouped heads, an output layer that stays unquantized, and rows
longer than one quantization block.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

VOCABULARY = 96


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved float32 model of two layers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("tiny-llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tokens(device: str) -> torch.Tensor:
    """Two sequences of ten tokens."""
    return (torch.arange(20, device=device).reshape(2, 10) * 7 + 3) % VOCABULARY
