"""Time what the auditor adds to a training step, and weigh what it keeps.

    python recipes/bench_audit.py
    python recipes/bench_audit.py --steps 2 --size 64

A head is trained on a frozen backbone, ResNet-50 and MobileNetV2, with eight images a step. Every way of
auditing takes its turn in one process. The auditor works in model.train() and after optimizer.step() only, so
these two are timed, in steps that run whole; what an audit adds is the difference of the medians, with it and
without, and its share is of the whole plain step. The rival is what one would write: a deep copy of the state
dict, and torch.equal over what is frozen after each step.
Needs: pip install 'freezekit[vision]'
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn

import freezekit

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": torchvision.models.resnet50,
    "MobileNetV2": torchvision.models.mobilenet_v2,
}


class Rival:
    """What one would write without freezekit."""

    def __init__(self, model: nn.Module, frozen: list[str]) -> None:
        self.model = model
        self.frozen = frozen
        self.before = copy.deepcopy(model.state_dict())

    def attach(self) -> None:
        """Do nothing: it is called by hand."""

    detach = attach

    def check(self) -> None:
        """Compare."""
        now = self.model.state_dict()
        assert all(torch.equal(self.before[name], now[name]) for name in self.frozen)


@dataclass
class Way:
    """A way of auditing, the steps timed together, and what came of it in each round, in seconds a step."""

    audit: freezekit.DriftAuditor | Rival | None
    steps: int = 1
    around: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


def ways(model: nn.Module, optimizer: torch.optim.Optimizer, frozen: list[str]) -> dict[str, Way]:
    """Return the ways of auditing by name; the first is none."""

    def auditor(**options: Any) -> freezekit.DriftAuditor:
        return freezekit.DriftAuditor(model, optimizer, **options)

    return {
        "none": Way(None),
        "every=1": Way(auditor()),
        "every=10": Way(auditor(every=10), 10),
        "watch='all'": Way(auditor(watch="all")),
        "watch='norm'": Way(auditor(watch="norm")),
        "snapshot='digest'": Way(auditor(snapshot="digest")),
        "torch.equal, deep copy": Way(Rival(model, frozen)),
    }


def race(make: Callable[[], nn.Module], size: int, rounds: int) -> dict[str, Way]:
    """Run every way of auditing in turns."""
    torch.manual_seed(0)
    model = make()
    handle = freezekit.freeze_backbone(model)
    frozen = [name for name in handle.frozen if name in model.state_dict()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images = torch.randn(8, 3, size, size)
    found = ways(model, optimizer, frozen)

    def step(way: Way) -> tuple[float, float]:
        began = time.perf_counter()
        model.train()
        trained = time.perf_counter()
        optimizer.zero_grad()
        model(images).square().mean().backward()
        computed = time.perf_counter()
        optimizer.step()
        if isinstance(way.audit, Rival):
            way.audit.check()
        ended = time.perf_counter()
        return ended - computed + trained - began, ended - began

    for turn in range(rounds + 1):
        for way in found.values():
            if way.audit is not None:
                way.audit.attach()
            # attaching changes a class that every module has: the first step after it is slower
            step(way)
            if isinstance(way.audit, freezekit.DriftAuditor):
                way.audit.step = 0
            times = [step(way) for _ in range(way.steps)]
            if way.audit is not None:
                way.audit.detach()
            if turn:  # the first round warms up
                way.around.append(statistics.mean(around for around, _ in times))
                way.whole.append(statistics.mean(whole for _, whole in times))
    return found


@click.command()
@click.option("--steps", default=30, show_default=True, help="Rounds, after one that is not counted.")
@click.option("--size", default=160, show_default=True, help="Of the images, in pixels.")
def main(steps: int, size: int) -> None:
    """Print the table."""
    table = Table(title=f"what auditing adds to a step, eight images of {size} pixels")
    table.add_column("model", no_wrap=True)
    table.add_column("audit", no_wrap=True)
    for column in ("step ms", "added ms", "share", "against\ntorch.equal", "kept MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, make in MODELS.items():
        found = race(make, size, steps)
        base, plain = (statistics.median(found["none"].around), statistics.median(found["none"].whole))
        rival = statistics.median(found["torch.equal, deep copy"].around) - base
        for audit, way in found.items():
            added = statistics.median(way.around) - base
            row = [name, audit, f"{statistics.median(way.whole) * 1e3:.1f}"]
            if way.audit is not None:
                row += [f"{added * 1e3:.2f}", f"{added / plain:.2%}", f"{added / rival:.2f}", kept(way.audit)]
            table.add_row(*row)
    Console(highlight=False, width=100).print(table)


def kept(audit: freezekit.DriftAuditor | Rival) -> str:
    """Return what an audit keeps in memory, in megabytes."""
    if isinstance(audit, Rival):
        return f"{sum(t.numel() * t.element_size() for t in audit.before.values()) / 1e6:.3f}"
    return f"{audit.kept_bytes / 1e6:.3f}"


if __name__ == "__main__":
    main()
