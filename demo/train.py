"""Train low-rank adapters on the frozen NF4 model, with 8-bit AdamW and with torch's, on the same seeds.

The embeddings of a pair of sentences are to agree as much as people said they do. Both runs see the same batches; their
loss curves go into one plot. Ends with status 1 when the curves part or nothing is learned.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

import bitsandbytes as bnb
from embedder import FORMATS, Embedder, model_folder
from measure import load_pairs
from report import save_training_plot

STEPS = 36
PAIRS_A_BATCH = 10
RANK = 16  # of the adapters: large enough for 8-bit state, which starts at 4096 elements
LEARNING_RATE = 2e-3

# The curves may differ, at any step, by this share of the first loss; at the end this share of it may be left.
LARGEST_GAP = 0.05
LARGEST_REST = 0.5


class Adapter(nn.Module):
    """A frozen layer plus a product of two thin matrices, which starts as zero."""

    def __init__(self, frozen: bnb.nn.Linear4bit) -> None:
        super().__init__()
        self.frozen = frozen
        device = frozen.weight.device
        self.down = nn.Parameter(
            torch.randn(RANK, frozen.in_features, device=device) / frozen.in_features**0.5
        )
        self.up = nn.Parameter(torch.zeros(frozen.out_features, RANK, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + x @ self.down.T @ self.up.T


def adapt(model: nn.Module, layers: int = 2) -> list[nn.Parameter]:
    """Freeze the model and put adapters beside the linear layers of its last layers; returns what is trained."""
    model.requires_grad_(False)
    trained = []
    for block in model.encoder.layer[-layers:]:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, bnb.nn.Linear4bit):
                    adapter = Adapter(child)
                    setattr(parent, name, adapter)
                    trained += [adapter.down, adapter.up]
    return trained


def batches(pairs: int, seed: int = 0) -> Iterator[Tensor]:
    """Indices of pairs, a new order each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(pairs, generator=generator).split(PAIRS_A_BATCH)[: pairs // PAIRS_A_BATCH]


def similarities(embedder: Embedder, sentences: list[str]) -> Tensor:
    """Cosine of each two neighbouring sentences, with gradients."""
    tokens = embedder.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(
        embedder.device
    )
    hidden = embedder.model(**tokens).last_hidden_state.float()
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return nn.functional.cosine_similarity(mean[0::2], mean[1::2])


def train(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], device: str
) -> tuple[list[float], int, int]:
    """``(losses, bytes of optimizer state, trained parameters)`` of one run from the same start."""
    torch.manual_seed(0)
    grades, sentences = load_pairs()
    targets = torch.tensor(grades, dtype=torch.float32)
    targets = ((targets - targets.min()) / (targets.max() - targets.min())).to(device)
    embedder = Embedder(model_folder(), FORMATS["nf4"], device)  # in evaluation mode, hence without dropout
    trained = adapt(embedder.model)
    optimizer, losses = make(trained), []
    for _, batch in zip(range(STEPS), batches(len(grades)), strict=False):
        text = [sentences[2 * int(pair) + side] for pair in batch for side in (0, 1)]
        loss = (similarities(embedder, text) - targets[batch.to(device)]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = {  # one map of codes serves all parameters, so that tensors count once
        id(tensor): tensor.nbytes
        for own in optimizer.state.values()
        for tensor in own.values()
        if isinstance(tensor, Tensor)
    }
    return losses, sum(state.values()), sum(p.numel() for p in trained)


def rounds(losses: list[float], size: int) -> list[float]:
    """Mean loss of each time round the pairs: batches differ more than optimizers do."""
    return [sum(losses[start : start + size]) / size for start in range(0, len(losses) - size + 1, size)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("output"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    started = time.perf_counter()
    logging.getLogger().setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)

    settings = {"lr": LEARNING_RATE, "weight_decay": 0.01}
    runs = {
        "torch.optim.AdamW": lambda params: torch.optim.AdamW(params, **settings),
        "bitsandbytes AdamW8bit": lambda params: bnb.optim.AdamW8bit(params, **settings),
    }
    per_round = len(load_pairs()[0]) // PAIRS_A_BATCH
    curves, faults = {}, []
    for name, make in runs.items():
        losses, state_bytes, numel = train(make, options.device)
        curves[name] = losses
        first, *_, last = rounds(losses, per_round)
        print(
            f"  {name:<24} loss {first:.4f} -> {last:.4f}   state {state_bytes / numel:.2f} bytes a parameter"
        )
        if not last <= LARGEST_REST * first:
            faults.append(f"{name}: the loss fell to {last:.4f} only, from {first:.4f}")
        gc.collect()

    exact, ours = curves.values()
    gap = max(abs(a - b) for a, b in zip(exact, ours, strict=True)) / exact[0]
    if not gap <= LARGEST_GAP:
        faults.append(f"the loss curves part by {gap:.1%} of the first loss, more than {LARGEST_GAP:.0%}")
    plot = options.output / "training.png"
    save_training_plot(curves, plot)
    print(
        f"  {numel} adapter parameters on a frozen NF4 model, {STEPS} steps; the curves part by {gap:.2%} ",
        end="",
    )
    print(f"of the first loss ({LARGEST_GAP:.0%} allowed)")
    print(f"plot: {os.path.relpath(plot)}   {time.perf_counter() - started:.0f} s")
    for fault in faults:
        print(f"FAILED {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
