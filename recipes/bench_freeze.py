"""Time freeze_backbone and undo: ResNet-152, and models of 1,000 to 100,000 modules.

    python recipes/bench_freeze.py
    python recipes/bench_freeze.py --steps 2 --modules 1000 --modules 10000

The rival is what freezekit replaces: requires_grad_(False) and eval() on the backbone, which hold nothing.
Freeze, undo and rival take turns in one process; a figure is the median over the rounds.
Needs: pip install 'freezekit[vision]'
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable

import click
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn

import freezekit


def deep(modules: int) -> nn.Module:
    """Return a model of about as many modules: blocks of four layers, and a head."""
    blocks = [nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.ReLU(), nn.Dropout())]
    blocks = [copy.deepcopy(blocks[0]) for _ in range(modules // 5)]
    return nn.Sequential(OrderedDict(features=nn.Sequential(*blocks), fc=nn.Linear(1, 1)))


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def race(model: nn.Module, rounds: int) -> tuple[float, float, float]:
    """Return the seconds of freezing, of undoing, and of the rival."""
    backbone = [child for name, child in model.named_children() if name != "fc"]

    def rival() -> None:
        for child in backbone:
            child.requires_grad_(False).eval()

    times: list[tuple[float, float, float]] = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        handle = freezekit.freeze_backbone(model)
        frozen = time.perf_counter() - began
        times.append((frozen, seconds(handle.undo), seconds(rival)))
        model.requires_grad_(True).train()
    freeze, undo, plain = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return freeze, undo, plain


@click.command()
@click.option("--steps", default=7, show_default=True, help="Rounds, after one that is not counted.")
@click.option("--modules", multiple=True, type=int, default=(1000, 3000, 10_000, 30_000, 100_000))
def main(steps: int, modules: tuple[int, ...]) -> None:
    """Print the table."""
    table = Table(title="freeze_backbone and undo")
    for column in ("model", "modules", "freeze ms", "undo ms", "rival ms", "µs a module"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name, model in [
        ("ResNet-152", torchvision.models.resnet152()),
        *((f"blocks, {n:,}", deep(n)) for n in modules),
    ]:
        size = sum(1 for _ in model.modules())
        freeze, undo, plain = race(model, steps)
        figures = (f"{t * 1e3:.1f}" for t in (freeze, undo, plain))
        table.add_row(name, f"{size:,}", *figures, f"{freeze / size * 1e6:.1f}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
