"""Quantize a real sentence-embedding model to 4 and 8 bits, and show what was saved and what it cost.

For each format: load the model through transformers with the library's layers or make it with the command line,
embed a fixed list of sentence pairs, save the checkpoint, load it back and require the same bytes. Ends with status 1
when a quality bar is missed or a checkpoint differs.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once

import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

import bitsandbytes as bnb
from embedder import FORMATS, Embedder, embed, linear_weight_bytes, model_folder, quantized_layers, throughput
from measure import Result, cosines, load_pairs, pair_similarities, rank_correlation, same_tensors
from report import print_table, save_plot

# What must be left of the fp32 embeddings' direction, on average over the sentences. Plain fp4 lands within 0.001 of
# its bar, on either side depending on the sentences: it is shown, and the bar holds for scales fitted to the weights.
BARS = {"int8": 0.995, "nf4": 0.97, "nf4 + double": 0.97, "fp4, fitted scales": 0.95}

# Formats that the command line makes too, or alone.
COMMANDS = {
    "nf4 + double": ["--format", "nf4", "--double-quant"],
    "fp4, fitted scales": ["--format", "fp4", "--fit-scales"],
}


class Demo:
    """The sentences, the fp32 reference and the faults found so far."""

    def __init__(self, output: Path, device: str) -> None:
        self.output, self.device = output, device
        grades, self.sentences = load_pairs()
        self.grades = torch.tensor(grades)
        self.reference = torch.empty(0)
        self.faults: list[str] = []

    def check(self, ok: bool, fault: str) -> bool:
        if not ok:
            self.faults.append(fault)
        return ok

    def measure(self, name: str) -> Result:
        """Load in format ``name``, embed, save, reload; the fp32 model must come first."""
        folder = self.output / folder_name(name)
        if name != "fp32" and FORMATS[name] is None:
            self.run_command(name, folder)
            embedder = Embedder(folder, device=self.device)
        else:
            embedder = Embedder(model_folder(), FORMATS[name], self.device)
            embedder.model.save_pretrained(folder)
        embeddings = embed(embedder, self.sentences)
        if name == "fp32":
            self.reference = embeddings
        self.check_reload(name, embedder, embeddings, folder)
        cosine = cosines(embeddings, self.reference)
        similarities = pair_similarities(embeddings)
        return Result(
            name=name,
            weight_bytes=linear_weight_bytes(embedder.model),
            file_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            mean_cosine=float(cosine.mean()),
            worst_cosine=float(cosine.min()),
            rank_correlation=rank_correlation(similarities, pair_similarities(self.reference)),
            grade_correlation=rank_correlation(similarities, self.grades),
            sentences_per_second=throughput(embedder, self.sentences),
            similarities=similarities,
        )

    def check_reload(self, name: str, embedder: Embedder, embeddings: torch.Tensor, folder: Path) -> None:
        """The saved files hold the model's bytes, and a model loaded from them has the same and embeds the same."""
        again = Embedder(folder, device=self.device)
        state = embedder.model.state_dict()
        # The model's tensors; the folder may hold more, such as buffers of older versions that loading passes over.
        files = {
            key: tensor
            for file in sorted(folder.glob("*.safetensors"))
            for key, tensor in load_file(file).items()
            if key in state
        }
        same = (
            self.check(same_tensors(state, files), f"{name}: the saved tensors differ")
            & self.check(
                same_tensors(state, again.model.state_dict()), f"{name}: the reloaded tensors differ"
            )
            & self.check(
                torch.equal(embed(again, self.sentences), embeddings), f"{name}: the embeddings differ"
            )
        )
        layers = quantized_layers(embedder.model)
        say(
            f"{name}: {layers} quantized layers, {len(state)} tensors, {'bit-identical' if same else 'NOT the same'}"
        )

    def check_command(self, name: str) -> None:
        """The command line writes the tensors that loading through transformers makes."""
        folder = self.output / f"cli-{folder_name(name)}"
        self.run_command(name, folder)
        by_library = Embedder(self.output / folder_name(name), device=self.device)
        by_command = Embedder(folder, device=self.device)
        same = same_tensors(by_library.model.state_dict(), by_command.model.state_dict())
        if self.check(same, f"{name}: the command line's tensors differ from the library's"):
            say(f"{name}: bit-identical to what loading through transformers made")

    def run_command(self, name: str, folder: Path) -> None:
        options = [*COMMANDS[name], "--device", self.device]
        say(f"python -m bitsandbytes quantize MODEL {short(folder)} {' '.join(options)}")
        command = [
            sys.executable,
            "-m",
            "bitsandbytes",
            "quantize",
            str(model_folder()),
            str(folder),
            *options,
        ]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode != 0:
            raise RuntimeError(
                f"the command failed with {finished.returncode}:\n{finished.stdout}{finished.stderr}"
            )


def say(text: str) -> None:
    print(f"  {text}", flush=True)


def short(path: Path) -> str:
    """``path`` as a user in the repository would write it."""
    return os.path.relpath(path)


def folder_name(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("output"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    started = time.perf_counter()
    logging.getLogger().setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)

    demo = Demo(options.output, options.device)
    print(f"bitsandbytes {bnb.__version__}, torch {torch.__version__}, {options.device}, ", end="")
    print(f"{torch.get_num_threads()} threads: {len(demo.grades)} sentence pairs")
    results = []
    for name in FORMATS:
        results.append(demo.measure(name))
        gc.collect()
    for name in COMMANDS.keys() - {name for name, config in FORMATS.items() if config is None}:
        demo.check_command(name)

    print_table(results)
    for result in results:
        if result.name in BARS:
            bar = BARS[result.name]
            demo.check(
                result.mean_cosine >= bar, f"{result.name}: mean cosine {result.mean_cosine:.4f} < {bar}"
            )
    plot = options.output / "demo.png"
    save_plot(results, plot)
    print(f"mean cosine to reach: {', '.join(f'{name} {bar}' for name, bar in BARS.items())}")
    print(f"plot: {short(plot)}   checkpoints: {short(options.output)}/   ", end="")
    print(f"{time.perf_counter() - started:.0f} s")
    for fault in demo.faults:
        print(f"FAILED {fault}", file=sys.stderr)
    if not demo.faults:
        print("every bar met; every checkpoint came back bit-identical")
    return 1 if demo.faults else 0


if __name__ == "__main__":
    sys.exit(main())
