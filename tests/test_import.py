"""What `import bitsandbytes` costs and touches. Each test looks at a process of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os

import pytest
import torch

import bitsandbytes
from processes import run_python

BUDGET_MS = 120


def test_import_adds_little_to_torch():
    """Processor time, the best of several runs: other work on the machine only ever adds to it."""
    best = float("inf")
    for _ in range(8):
        done = run_python(
            """
            import time
            import torch
            start = time.process_time()
            import bitsandbytes
            print(1e3 * (time.process_time() - start))
            """
        )
        best = min(best, float(done.stdout))
        if best <= BUDGET_MS:
            break

    assert best <= BUDGET_MS


def test_import_prints_nothing():
    done = run_python("import bitsandbytes")

    assert (done.stdout, done.stderr) == ("", "")


def test_import_loads_nothing_heavy():
    """Compilers, other libraries and our own tools wait until they are used."""
    done = run_python(
        """
        import sys
        import torch
        before = set(sys.modules)
        import bitsandbytes
        print("\\n".join(sorted(set(sys.modules) - before)))
        """
    )
    added = done.stdout.split()
    roots = {name.split(".")[0] for name in added}

    heavy = {"accelerate", "numpy", "packaging", "peft", "safetensors", "scipy", "transformers", "triton"}
    assert roots & heavy == set()
    assert [name for name in added if name.startswith(("torch._dynamo", "torch._inductor"))] == []
    assert [
        name for name in added if name.startswith(("bitsandbytes._cli", "bitsandbytes.diagnostics"))
    ] == []


def test_import_opens_no_cuda_context():
    done = run_python(
        """
        import torch
        import bitsandbytes
        print(torch.cuda.is_initialized())
        """
    )

    assert done.stdout.strip() == "False"


def test_import_runs_no_process_opens_no_socket_and_writes_no_file():
    done = run_python(
        """
        import json
        import sys
        import torch

        seen = []

        def watch(event, arguments):
            if event in {"socket.connect", "socket.bind", "subprocess.Popen", "os.system", "os.fork", "os.posix_spawn"}:
                seen.append(event)
            if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
                seen.append(f"open {arguments[0]}")

        sys.dont_write_bytecode = True
        sys.addaudithook(watch)
        import bitsandbytes
        print(json.dumps(seen))
        """
    )

    assert json.loads(done.stdout) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_import_survives_a_fork():
    """A child quantizes with what its parent imported and had used."""
    done = run_python(
        """
        import os
        import signal
        import torch
        import bitsandbytes.functional as F

        values = torch.linspace(-1, 1, 1 << 16)
        packed, state = F.quantize_4bit(values)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            torch.set_num_threads(1)
            again, _ = F.quantize_4bit(values)
            os._exit(0 if torch.equal(again, packed) else 1)
        _, status = os.waitpid(child, 0)
        print(status)
        """
    )

    assert done.stdout.strip() == "0"


@pytest.mark.skipif(
    not (hasattr(os, "fork") and torch.cuda.device_count()), reason="needs fork and a CUDA device"
)
def test_a_forked_child_may_use_the_gpu():
    """As data loaders and process pools do: the parent only imported."""
    done = run_python(
        """
        import os
        import signal
        import torch
        import bitsandbytes.functional as F

        child = os.fork()
        if child == 0:
            signal.alarm(120)
            F.quantize_4bit(torch.ones(64, device="cuda"))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(status)
        """
    )

    assert done.stdout.strip() == "0"


def test_optimizers_can_be_imported_alone():
    run_python("import bitsandbytes.optim as bnb_optim; bnb_optim.Adam8bit")


def test_version_is_the_distributions():
    """Consumers ask the installed distribution, others the module."""
    assert importlib.metadata.version("bitsandbytes") == bitsandbytes.__version__
