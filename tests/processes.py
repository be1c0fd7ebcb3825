"""Run a piece of Python in a process of its own, with this checkout's package: for what happens at import."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import bitsandbytes

PACKAGE_PARENT = Path(bitsandbytes.__file__).parent.parent


def run_python(
    code: str, *, paths: Sequence[Path | str] = (), env: dict[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run ``code``; ``paths`` come first on its module path. A failure shows what the process wrote."""
    search = [str(path) for path in (*paths, PACKAGE_PARENT)] + [os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search)), **(env or {})}
    with tempfile.TemporaryDirectory() as empty:  # what lies in the working directory would be found first
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
    if check and done.returncode != 0:
        raise AssertionError(f"the process failed with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
