"""``freezekit demo``: the trap and the cure, run for real on scikit-learn's handwritten digits."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from freezekit.audit.files import audit_checkpoint
from freezekit.audit.findings import DriftReport
from freezekit.audit.live.monitor import DriftAuditor
from freezekit.errors import FreezekitError
from freezekit.freezing.freeze import freeze_backbone
from freezekit.freezing.handle import trainable_parameters

__all__ = ["Arm", "run"]

_SEED = 0
_BATCH = 2  # what fits for a detector; the smaller the batch, the more its statistics wander


@dataclass(frozen=True)
class Arm:
    """One way of freezing, and what came of it; accuracies are fractions of 1."""

    name: str
    file: Path
    new_task: float
    old_task: float
    live: DriftReport
    disk: DriftReport


@dataclass(frozen=True)
class _Split:
    images: Tensor
    labels: Tensor


def run(keep: str | None = None, console: Console | None = None) -> list[Arm]:
    """Train a small BN network, fine-tune its head on shifted digits in two ways, and audit both.

    Args:
        keep: folder for the three checkpoints; by default they are thrown away.
        console: where to print.

    Returns:
        The two ways, ``requires_grad=False`` first.

    Raises:
        FreezekitError: scikit-learn is not installed, or the folder cannot be used.
    """
    console = console or Console(highlight=False)
    with contextlib.ExitStack() as stack:
        if keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="freezekit-demo-")))
        else:
            folder = _folder(keep)
        # `fork_rng` and not a plain seed: this may run inside somebody's own process
        stack.enter_context(torch.random.fork_rng(devices=[]))
        progress = Progress(
            TextColumn("{task.description:<36}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        stack.enter_context(progress)
        arms = _run(folder, progress)
    console.print(_table(arms))
    for arm in arms:
        console.print(f"{arm.name}, live: {_summary(arm.live)}", markup=False)
        console.print(f"{arm.name}, file: {_summary(arm.disk)}", markup=False)
    if keep is not None:
        base = folder / "base.pth"
        console.print(f"\nfreezekit audit {arms[0].file} --against {base}", markup=False, soft_wrap=True)
    return arms


def _run(folder: Path, progress: Progress) -> list[Arm]:
    torch.manual_seed(_SEED)
    old_train, old_test, new_train, new_test = _digits()
    base = _network()
    _train(base, base.parameters(), old_train, 6, 32, 3e-3, progress, "train on digits")
    base_file = folder / "base.pth"
    torch.save(base.state_dict(), base_file)
    arms = []
    for name, stem in (("requires_grad=False", "naive"), ("freeze_backbone", "frozen")):
        model = copy.deepcopy(base)
        torch.manual_seed(_SEED + 1)  # both heads start alike and see the same batches
        model.get_submodule("classifier").reset_parameters()  # type: ignore[operator]
        if stem == "naive":
            model.get_submodule("features").requires_grad_(False)
        else:
            freeze_backbone(model)
        with DriftAuditor(model, on_drift="record") as auditor:
            _train(model, trainable_parameters(model), new_train, 5, _BATCH, 5e-3, progress, f"head, {name}")
        live = auditor.report()
        file = folder / f"{stem}.pth"
        torch.save(model.state_dict(), file)
        new_task = _accuracy(model, new_test)
        model.get_submodule("classifier").load_state_dict(base.get_submodule("classifier").state_dict())
        arms.append(
            Arm(name, file, new_task, _accuracy(model, old_test), live, audit_checkpoint(file, base_file))
        )
    return arms


def _network() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 1
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    parts: list[tuple[str, nn.Module]] = [
        ("features", nn.Sequential(*layers)),
        ("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())),
        ("classifier", nn.Linear(channels, 10)),
    ]
    return nn.Sequential(OrderedDict(parts))


def _digits() -> Iterator[_Split]:
    """Yield the old task's and the new task's training and test part; the new digits are one pixel off."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise FreezekitError(
            "the demo needs scikit-learn for its digits",
            where="freezekit demo",
            remedy="pip install 'freezekit[demo]'",
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    shifted = F.pad(images, (1, 0, 1, 0))[..., :8, :8]
    for source, part in zip(
        (images, images, shifted, shifted), order.split([900, 300, 300, 297]), strict=True
    ):
        yield _Split(source[part], labels[part])


def _train(
    model: nn.Module,
    parameters: Iterator[nn.Parameter] | list[nn.Parameter],
    data: _Split,
    epochs: int,
    batch: int,
    rate: float,
    progress: Progress,
    description: str,
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    model.train()
    for _ in progress.track(range(epochs), description=description):
        for rows in torch.randperm(len(data.images)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(data.images[rows]), data.labels[rows]).backward()
            optimizer.step()


@torch.no_grad()
def _accuracy(model: nn.Module, data: _Split) -> float:
    model.eval()
    return float((model(data.images).argmax(1) == data.labels).double().mean())


def _folder(keep: str) -> Path:
    folder = Path(keep)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FreezekitError(
            "cannot make the folder",
            where=keep,
            got=error.strerror,
            remedy="give a folder that can be written to",
        ) from error
    taken = [name for name in ("base.pth", "naive.pth", "frozen.pth") if (folder / name).exists()]
    if taken:
        raise FreezekitError(
            "would overwrite files",
            where=keep,
            got=", ".join(taken),
            remedy="give another folder, or move them",
        )
    return folder


def _table(arms: list[Arm]) -> Table:
    title = "heads fine-tuned on shifted digits over a frozen backbone"
    table = Table(box=box.SIMPLE_HEAD, title=title, collapse_padding=True, pad_edge=False)
    table.add_column("backbone\nfrozen by", no_wrap=True)
    for column in (
        "accuracy\nnew task",
        "accuracy\nold task",
        "tensors\nchanged",
        "shift\n(sigma)",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("culprit")
    for arm in arms:
        shift = max((layer.mean_shift_sigma or 0.0 for layer in arm.live.layers), default=0.0)
        first = arm.live.findings[0] if arm.live.findings else None
        table.add_row(
            arm.name,
            f"{arm.new_task:.3f}",
            f"{arm.old_task:.3f}",
            f"{len(arm.live.changed)} of {arm.live.compared}",
            f"{shift:.2f}",
            f"{first.name}, step {first.step}" if first else "none",
        )
    return table


def _summary(report: DriftReport) -> str:
    moved = sum(layer.changed for layer in report.layers)
    first = f"; first {report.findings[0]}" if report.findings else ""
    return f"{'clean' if report.clean else 'DRIFT'}, {moved} of {len(report.layers)} BN layers moved{first}"
