"""The README is run: its examples, and the commands and files it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from processes import run_python

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n+```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))

# Row of the support table -> operator; a device has a native kernel if its backend asks the library for one.
SUPPORT = {
    "4-bit quantize": "quantize_4bit",
    "4-bit dequantize": "dequantize_4bit",
    "4-bit matmul": "gemm_4bit",
    "8-bit block-wise quantize": "quantize_blockwise",
    "8-bit block-wise dequantize": "dequantize_blockwise",
    "LLM.int8() quantize": "int8_vectorwise_quant",
    "LLM.int8() matmul": "int8_linear_matmul",
    "embedding look-ups, 4-bit and 8-bit": "embedding_4bit",
    "optimizers, 32-bit state": "optimizer_update_32bit",
    "optimizers, 8-bit state": "optimizer_update_8bit_blockwise",
    "optimizers, 4-bit state": "optimizer_update_4bit_blockwise",
}


def test_each_promised_example_is_there():
    assert EXAMPLES.keys() == {"Linear4bit", "Linear8bitLt", "Saving and loading"}


@pytest.mark.parametrize("title", EXAMPLES)
def test_examples_run_as_printed(title, tmp_path):
    run_python(f"import os\nos.chdir({str(tmp_path)!r})\n{EXAMPLES[title]}")


def test_named_files_exist():
    assert [name for name in re.findall(r"\]\(([^):]+)\)", TEXT) if not (ROOT / name).exists()] == []


def test_named_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z-]+)\b", TEXT))

    assert {name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)} <= {"and"}


@pytest.mark.parametrize("row", SUPPORT)
def test_the_support_table_is_true(row):
    cells = re.search(rf"^\| {re.escape(row)} \| (\w+) \| (\w+) \|$", TEXT, re.MULTILINE)
    assert cells, "the row is missing"

    for device, cell in zip(("cpu", "cuda"), cells.groups(), strict=True):
        files = (ROOT / "bitsandbytes" / "backends" / device).glob("*.py")
        source = "".join(file.read_text(encoding="utf-8") for file in files)
        native = re.search(rf"\bbnb_{device}_{SUPPORT[row]}\b", source) is not None
        assert cell == ("native" if native else "torch"), device
