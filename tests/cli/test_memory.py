"""Peak memory of ``quantize`` does not grow with the model: measured in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

# Whatever the process holds resident at its peak, mapped files included.
REPORT = """
import atexit
def report():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            print("peak", line.split()[1], file=sys.stderr)
atexit.register(report)

from bitsandbytes._cli import main
main([*sys.argv[1:3], sys.argv[3] + "-int8", "--format", "int8"])
"""
BOUND = 150e6


def write_model(folder: Path, layers: int, hidden: int, vocabulary: int) -> int:
    """A bfloat16 Llama in shards of a quarter each; only their first megabytes are written, the rest are holes."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=vocabulary,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: list(v.shape) for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    noise = torch.randn(1 << 20).bfloat16().view(torch.uint8)
    noise = bytes(noise.tolist())
    names, weight_map, total = list(shapes), {}, 0
    for first in range(0, len(names), len(names) // 4 + 1):
        held = names[first : first + len(names) // 4 + 1]
        header, position = {}, 0
        for name in held:
            begin, position = position, position + 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, position]}
        text = json.dumps(header).encode()
        file = f"model-{first}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text + noise[: min(len(noise), position)])
            out.truncate(8 + len(text) + position)
        weight_map |= dict.fromkeys(held, file)
        total += position
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_peak_memory_stays_far_below_the_model(start, tmp_path):
    """A model of 1.1 GB against the same commands on one of 100 kB; int8 and nf4 run in one process."""
    size = write_model(tmp_path / "large", layers=7, hidden=2048, vocabulary=16000)
    write_model(tmp_path / "small", layers=1, hidden=64, vocabulary=100)
    assert size > 5 * BOUND
    peaks: dict[str, int] = {}
    for name in ("small", "large"):
        arguments = ("quantize", tmp_path / name, tmp_path / f"{name}-q", "--format", "nf4", "--double-quant")
        process = start(*arguments, code=REPORT)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        peaks[name] = (
            next(int(line.split()[1]) for line in err.splitlines() if line.startswith("peak")) * 1024
        )
    assert peaks["large"] - peaks["small"] < BOUND, (
        f"{(peaks['large'] - peaks['small']) / 1e6:.0f} MB above a tiny model"
    )
