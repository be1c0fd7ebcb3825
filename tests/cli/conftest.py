"""Tiny randomly initialised models on disk, and ways to run the command line on them. Nothing is downloaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import bitsandbytes
from bitsandbytes._cli import main

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command in this process."""

    def run(*arguments: object) -> Ran:
        handler = signal.getsignal(signal.SIGTERM)
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse leaves this way
            code = int(stop.code or 0)
        assert signal.getsignal(signal.SIGTERM) is handler
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen]:
    """Start ``python -m bitsandbytes`` in a process of its own; ``code`` runs before the command does."""

    def run(*arguments: object, code: str = "") -> subprocess.Popen:
        parent = str(Path(bitsandbytes.__file__).parent.parent)
        search = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH", "")]))
        program = f"import sys\n{code}\nfrom bitsandbytes.__main__ import run\nsys.exit(run())"
        return subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": search},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def _save(folder: Path, model: torch.nn.Module, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name. Some are in several shards, some in bfloat16, one stores its weights transposed."""
    transformers = pytest.importorskip("transformers", reason="building a model needs transformers")
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(7)

    def llama(tied: bool) -> torch.nn.Module:
        config = transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
            tie_word_embeddings=tied,
            max_position_embeddings=64,
        )
        return transformers.LlamaForCausalLM(config)

    bert = transformers.BertConfig(
        hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
    )
    gpt2 = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    return {
        "llama": _save(root / "llama", llama(tied=False)),
        "llama-tied": _save(root / "llama-tied", llama(tied=True).to(torch.bfloat16), max_shard_size="60KB"),
        "bert": _save(root / "bert", transformers.BertModel(bert)),
        "bert-masked-lm": _save(root / "bert-masked-lm", transformers.BertForMaskedLM(bert)),
        "gpt2": _save(root / "gpt2", transformers.GPT2LMHeadModel(gpt2)),
    }
