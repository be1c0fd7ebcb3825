"""Programs as a user would write them. Nothing runs this file; mypy reads it, so the public types must hold."""

from __future__ import annotations

import torch
from torch import Tensor

import bitsandbytes as bnb
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit


def four_bit(weight: Tensor) -> Tensor:
    packed: Tensor
    state: QuantState
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    values: Tensor = dequantize_4bit(packed, state)
    return values


def layers() -> torch.nn.Module:
    first: torch.nn.Linear = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
    second: torch.nn.Linear = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0)
    table: torch.nn.Embedding = bnb.nn.StableEmbedding(10, 64)
    return torch.nn.Sequential(table, first, second)


def training(model: torch.nn.Module) -> float:
    optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-3, weight_decay=0.1)
    bnb.optim.GlobalOptimManager.get_instance().register_parameters(model.parameters())
    loss: Tensor = model(torch.zeros(1, 64)).sum()
    loss.backward()
    optimizer.step()
    return float(loss)


def version() -> str:
    return bnb.__version__
