"""A run that is stopped leaves nothing that looks like a model."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

# Stops in the middle of writing, until a signal comes.
STALL = """
import signal
import time
from bitsandbytes._cli import quantize
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
copy, seen = quantize._copy_values, []
def stall(*arguments):
    copy(*arguments)
    seen.append(1)
    if len(seen) == 3:
        print("writing", flush=True)
        time.sleep(120)
quantize._copy_values = stall
"""


def interrupted(start, models: dict[str, Path], target: Path, number: signal.Signals) -> tuple[int, str]:
    process = start("quantize", models["llama"], target, "--format", "nf4", "--overwrite", code=STALL)
    assert process.stdout.readline() == "writing\n", process.stderr.read()
    partial = list(target.parent.glob(f".{target.name}.bnb-partial-*"))
    assert len(partial) == 1 and not (partial[0] / "config.json").exists()
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_cleans_up(start, models, tmp_path, number, code):
    returned, err = interrupted(start, models, tmp_path / "out", number)
    assert returned == code and "Traceback" not in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overwrite_keeps_the_old_result(start, cli, models, tmp_path):
    assert cli("quantize", models["llama"], tmp_path / "out", "--format", "int8").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert interrupted(start, models, tmp_path / "out", signal.SIGINT)[0] == 130
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_killed_run_leaves_a_folder_that_says_so(start, cli, models, tmp_path):
    assert interrupted(start, models, tmp_path / "out", signal.SIGKILL)[0] == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.bnb-partial-")
    for path in left.glob("*.safetensors"):
        assert path.read_bytes()[:8] == bytes(8)
    assert cli("inspect", left).code == 1
    ran = cli("quantize", models["llama"], tmp_path / "out", "--format", "nf4")
    assert ran.code == 0 and str(left) in ran.err and "left over" in ran.err
    assert left.exists()
