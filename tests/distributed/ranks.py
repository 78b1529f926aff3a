"""Runs a function on several processes that talk to each other (gloo), and brings back what each returned.

The processes are forked from a server that has torch imported, which takes a tenth of a second for each.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 240
"""Seconds for all of it; far more than it takes, as the machine may be busy."""


class Dead:
    """What :func:`run` returns for a rank that was to die, and did."""


def run(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    dying: Collection[int] = (),
    patience: float = PATIENCE,
) -> list[Any]:
    """Call ``function(rank, *args)`` on each of so many ranks of a new process group.

    Args:
        function: at the top of a test module, as the processes import it by name.
        world_size: how many.
        args: further arguments; tensors go by pickle.
        dying: the ranks that must not return: they are to kill themselves, or to be killed.
        patience: seconds until all are killed, and the test fails.

    Returns:
        What it returned, by rank; :class:`Dead` for those of ``dying``.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed.checkpoint", "torch._dynamo", "pytest", "freezekit.hooks.loop"]
    )
    with tempfile.TemporaryDirectory(prefix="freezekit-ranks-") as folder:
        processes = [
            context.Process(target=_work, args=(function, rank, world_size, folder, args), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, set(dying), Path(folder), patience)
            return [
                Dead if rank in dying else torch.load(Path(folder, f"{rank}.pt"), weights_only=False)
                for rank in range(world_size)
            ]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _wait(processes: list[Any], dying: set[int], folder: Path, patience: float) -> None:
    end = time.monotonic() + patience
    while any(process.is_alive() for process in processes):
        assert time.monotonic() < end, f"not done after {patience} s\n{_said(folder)}"
        failed = [r for r, p in enumerate(processes) if p.exitcode and r not in dying]
        if failed:
            time.sleep(1)  # what the others say may be the cause
            raise AssertionError(f"rank {failed} failed\n{_said(folder)}")
        time.sleep(0.02)
    codes = {rank: process.exitcode for rank, process in enumerate(processes)}
    wrong = {rank: code for rank, code in codes.items() if (code != 0) != (rank in dying)}
    assert not wrong, f"exit codes by rank: {codes}\n{_said(folder)}"


def _said(folder: Path) -> str:
    return "\n".join(f"{path.stem}: {path.read_text()}" for path in sorted(folder.glob("*.error")))


def _work(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        store = f"file://{folder}/store"
        patience = timedelta(seconds=PATIENCE)
        dist.init_process_group("gloo", store, patience, world_size, rank)
        torch.manual_seed(0)
        torch.save(function(rank, *args), Path(folder, f"{rank}.pt"))
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise


def die() -> None:
    """End this process as the machine's death would: at once, without a word."""
    os.kill(os.getpid(), signal.SIGKILL)
