"""Keep a frozen backbone frozen in CI: a test of the training step, and an audit of what it saves.

    python recipes/audit_in_ci.py
    python recipes/audit_in_ci.py --steps 2        # just a look
    python recipes/audit_in_ci.py --keep example   # keep the files, to copy from

Makes a small repository, at first with the mistake that everybody makes, and runs in it what CI would run, by
the real command line. README has the audit as a hook of pre-commit and as a GitHub workflow, under "In CI".
Needs: pip install 'freezekit[demo]' pytest
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console

console = Console(highlight=False)
console.width = max(console.width, 100)

TRAIN = '''\
"""Train a network on digits, then a new head on them upside down, over the frozen backbone."""

import sys
from collections import OrderedDict

import freezekit
import torch
import torch.nn.functional as F
from torch import nn


def network():
    layers = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict(backbone=backbone, head=nn.Linear(32, 10)))


def freeze(model):
    model.backbone.requires_grad_(False)


def train(model, images, labels, steps):
    optimizer = torch.optim.AdamW(freezekit.trainable_parameters(model), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (16,))
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()


if __name__ == "__main__":
    from sklearn.datasets import load_digits

    steps, out = int(sys.argv[1]), sys.argv[2]
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    model = network()
    train(model, images, labels, steps)
    torch.save(model.state_dict(), "base.pth")
    model.head.reset_parameters()
    freeze(model)
    train(model, images.flip(2), labels, steps)
    torch.save(model.state_dict(), out)
'''
FREEZE = "freezekit.freeze_backbone(model)"
NAIVE = "model.backbone.requires_grad_(False)"

TEST = """\
import torch
from freezekit import DriftAuditor

from train import freeze, network, train


def test_the_backbone_stays_frozen():
    torch.manual_seed(0)
    model = network()
    freeze(model)
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    with DriftAuditor(model, frozen="backbone", probe=1):  # raises what moved, and why
        train(model, images, labels, steps=2)
"""


def run(command: str, folder: Path, expected: int) -> str:
    """Run a command as a shell would, show it, and hold it to its exit code."""
    console.print(f"$ {command}", style="bold", markup=False, soft_wrap=True)
    program, *arguments = shlex.split(command)
    module = [] if program == "python" else ["-m", program]
    done = subprocess.run(
        [sys.executable, *module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**os.environ, "COLUMNS": "100", "PYTEST_ADDOPTS": "-p no:cacheprovider"},
        timeout=300,
    )
    console.print(done.stdout, markup=False, soft_wrap=True, end="")
    console.print(f"exit code {done.returncode}\n", style="green" if done.returncode == 0 else "red")
    assert done.returncode == expected, f"{command}: {done.returncode}, not {expected}"
    return done.stdout


def tour(folder: Path, steps: int) -> None:
    """Make the repository, and go through what its CI says."""
    (folder / "train.py").write_text(TRAIN)
    (folder / "test_train.py").write_text(TEST)

    console.rule("1. frozen by requires_grad=False alone: the test of the training step is red")
    said = run("pytest -q --tb=short test_train.py", folder, 1)
    assert "DriftError: FK101 backbone.1 at step 1" in said

    console.rule("2. merged all the same: so is the audit of what it saved")
    run(f"python train.py {steps} finetuned.pth", folder, 0)
    run("freezekit audit finetuned.pth --against base.pth --frozen backbone -o drift.json", folder, 1)

    console.rule("3. the saved report as a comment and as a page")
    said = run("freezekit audit drift.json --format markdown", folder, 1)
    assert said.startswith("**DRIFT: 6 of 12 frozen tensors changed")
    run("freezekit audit drift.json -o drift.html --quiet", folder, 1)
    assert (folder / "drift.html").read_text(encoding="utf-8").startswith("<!doctype html>")

    console.rule("4. the checkpoint repaired")
    run("freezekit restore finetuned.pth --from base.pth --frozen backbone -o repaired.pth", folder, 0)
    run("freezekit audit repaired.pth --against base.pth --frozen backbone", folder, 0)

    console.rule("5. the code repaired, in one line of train.py")
    console.print(f"-    {NAIVE}\n+    {FREEZE}\n", markup=False)
    (folder / "train.py").write_text(TRAIN.replace(NAIVE, FREEZE))
    run("pytest -q --tb=short test_train.py", folder, 0)
    run(f"python train.py {steps} finetuned.pth", folder, 0)
    run("freezekit audit finetuned.pth --against base.pth --frozen backbone", folder, 0)

    console.rule("6. what is neither clean nor drift")
    run("freezekit audit finetuned.pth --against base.pth --frozen bakcbone", folder, 2)
    whole = (folder / "finetuned.pth").read_bytes()
    (folder / "finetuned.pth").write_bytes(whole[: len(whole) // 2])  # the disk was full
    run("freezekit audit finetuned.pth --against base.pth --frozen backbone", folder, 3)


@click.command()
@click.option("--steps", default=100, show_default=True, help="Steps of each training.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Work in this new folder.")
def main(steps: int, keep: Path | None) -> None:
    """Show how a test and an audit keep a backbone frozen, and what each exit code means."""
    if keep is not None:
        keep.mkdir(parents=True)
        tour(keep, steps)
        return
    with tempfile.TemporaryDirectory(prefix="freezekit-recipe-") as folder:
        tour(Path(folder), steps)


if __name__ == "__main__":
    main()
