"""Run a piece of Python in several processes that know each other, over gloo or NCCL.

A server imports torch once and forks the processes, so starting them costs next to nothing. Beside a GPU they are
spawned instead: CUDA cannot be used in a process whose parent has asked for it.
"""

from __future__ import annotations

import multiprocessing
import textwrap
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The server knows no paths of pytest's, so only what is installed; this is most of the time an import takes.
PRELOADED = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    "bitsandbytes",
]
LIMIT_S = 240


def run_ranks(folder: Path, world: int, code: str, device: str = "cpu") -> None:
    """Run ``code`` in ``world`` processes, with ``RANK``, ``WORLD``, ``FOLDER`` and ``DEVICE`` defined.

    On ``"cuda"`` each has a GPU of its own. The first failure of any of them is raised with its traceback.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    meeting = folder / f"meeting{len(list(folder.glob('meeting*')))}"
    names = {"WORLD": world, "FOLDER": str(folder), "DEVICE": device}
    processes = [
        context.Process(
            target=_rank, args=(meeting, textwrap.dedent(code), {**names, "RANK": rank}), daemon=True
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    failures = []
    for process in processes:
        process.join(LIMIT_S if not failures else 5)
        if process.exitcode != 0:
            failures.append(process)
            process.kill()
    reports = [file.read_text() for file in sorted(folder.glob(f"{meeting.name}-failure*"))]
    if failures:
        raise AssertionError("\n".join(reports) or f"exit codes {[p.exitcode for p in failures]}")


def _rank(meeting: Path, code: str, names: dict[str, Any]) -> None:
    rank, world = names["RANK"], names["WORLD"]
    torch.set_num_threads(1)
    try:
        if names["DEVICE"] == "cuda":
            torch.cuda.set_device(rank)
        backend = "nccl" if names["DEVICE"] == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world)
        exec(code, names)
        dist.destroy_process_group()
    except BaseException:
        meeting.with_name(f"{meeting.name}-failure{rank}").write_text(
            f"[rank {rank}] {traceback.format_exc()}"
        )
        raise
