"""Time the audit of a checkpoint against torch.load, over sizes and numbers of layers.

    python recipes/bench_checkpoint.py
    python recipes/bench_checkpoint.py --steps 2

Files as torch.save writes them: convolutions that make up the size, and batch norm. Two races, the two taking
turns, medians:

- read: the audit of a file against torch.load(weights_only=True) and a look at the same statistics, in one
  process that has both imported;
- process: `freezekit audit FILE` against a script that imports torch, loads the file and looks, each in a
  process of its own; with the most memory it took.

The files are in the system's cache for both. The rival runs up to --most-mb: it needs as much
memory. 2,000 layers are 10,000 tensors of batch norm.
Needs: pip install freezekit, and twice the largest file free on disk.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import freezekit

OURS = """
import runpy, sys
sys.argv = ["freezekit", "audit", sys.argv[1]]
try:
    runpy.run_module("freezekit", run_name="__main__")
finally:
    tell()
"""
RIVAL = """
import sys, torch
state = torch.load(sys.argv[1], weights_only=True)
names = [name for name in state if name.endswith("running_var")]
print(len(names), all(bool(torch.isfinite(state[name]).all()) for name in names))
tell()
"""
#: asked of the process itself: what its parent is told would count the parent's own memory at the fork
PEAK = """
def tell():
    import sys
    peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print(int(peak[0]) / 1024, file=sys.stderr)
"""


def write(path: Path, megabytes: int, layers: int) -> None:
    """Write a checkpoint: as many BN layers, and convolutions of equal size to fill it up."""
    state: dict[str, torch.Tensor] = {}
    numel = megabytes * 2**20 // 4 // layers
    for layer in range(layers):
        # untouched pages of zeros take no memory, so that 8 GB can be written on a small machine
        state[f"layers.{layer}.conv.weight"] = torch.from_numpy(np.zeros(numel, np.float32))
        state[f"layers.{layer}.bn.weight"] = torch.rand(64) + 0.5
        state[f"layers.{layer}.bn.bias"] = torch.randn(64)
        state[f"layers.{layer}.bn.running_mean"] = torch.randn(64)
        state[f"layers.{layer}.bn.running_var"] = torch.rand(64) + 0.5
        state[f"layers.{layer}.bn.num_batches_tracked"] = torch.tensor(1000)
    torch.save(state, path)


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def look(path: Path) -> bool:
    """Do what RIVAL does, in this process."""
    state = torch.load(path, weights_only=True)
    return all(bool(torch.isfinite(t).all()) for name, t in state.items() if name.endswith("running_var"))


def process(script: str, path: Path) -> tuple[float, float]:
    """Return a process's seconds and the most MB it took."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PEAK + script, path], capture_output=True, text=True)
    took = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return took, float(done.stderr.split()[-1])


def race(path: Path, rounds: int, with_rival: bool) -> list[str]:
    """Return a row of figures."""
    ours: list[tuple[float, float, float]] = []
    theirs: list[tuple[float, float, float]] = []
    for _ in range(rounds):
        read = seconds(lambda: freezekit.audit_checkpoint(path))
        ours.append((read, *process(OURS, path)))
        if with_rival:
            read = seconds(lambda: look(path))
            theirs.append((read, *process(RIVAL, path)))
    read, whole, peak = (statistics.median(column) for column in zip(*ours, strict=True))
    row = [f"{read * 1e3:.1f}", f"{whole:.2f}", f"{peak:.0f}"]
    if not theirs:
        return [*row, *["-"] * 5]
    rival_read, rival_whole, rival_peak = (statistics.median(column) for column in zip(*theirs, strict=True))
    row += [f"{rival_read * 1e3:.0f}", f"{rival_whole:.2f}", f"{rival_peak:.0f}"]
    return [*row, f"1/{rival_read / read:.0f}", f"1/{rival_whole / whole:.1f}"]


@click.command()
@click.option("--steps", default=7, show_default=True, help="Rounds; the table is short with fewer than 3.")
@click.option("--most-mb", default=2048, show_default=True, help="Largest file that torch.load has to read.")
def main(steps: int, most_mb: int) -> None:
    """Print the table."""
    shapes = [(100, 100), (500, 100), (2048, 100), (8192, 100), (100, 2000)]
    if steps < 3:
        shapes = [(1, 100), (10, 100), (1, 200)]
    table = Table(title="the audit of a checkpoint against torch.load(weights_only=True)")
    for column in ("MB", "BN layers", "read ms", "process s", "peak MB"):
        table.add_column(column, justify="right")
    for column in ("torch: read ms", "process s", "peak MB", "read", "process"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for megabytes, layers in shapes:
            path = Path(folder) / "checkpoint.pth"
            write(path, megabytes, layers)
            table.add_row(f"{megabytes:,}", f"{layers:,}", *race(path, steps, megabytes <= most_mb))
            path.unlink()
    Console(highlight=False, width=120).print(table)


if __name__ == "__main__":
    main()
