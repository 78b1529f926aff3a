"""Lightning's callbacks in its real Trainer, beside Lightning's own ways to freeze."""

from __future__ import annotations

import copy
import csv
import importlib.util
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import freezekit
from freezekit import DriftError, DriftReport, FreezekitError, audit_checkpoint, is_frozen
from freezekit.hooks.lightning import DriftAudit, FreezeBackbone

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
]

SETATTR = nn.Module.__setattr__
STAGES = {1: "backbone.layer2*", 3: ["backbone.layer1", "backbone.layer1_bn"]}


class Net(pl.LightningModule):
    """Two layers with BN, and a head; ``optimizers`` makes what ``configure_optimizers`` returns."""

    def __init__(self, optimizers: Callable[[Net], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for name in ("layer1", "layer2"):
            layers[name] = nn.Linear(4, 4)
            layers[f"{name}_bn"] = nn.BatchNorm1d(4)
        self.backbone = nn.Sequential(layers)
        self.head = nn.Linear(4, 2)
        zoo.scramble(self)
        self.optimizers_of = optimizers or everything

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


def everything(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def trainable(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


def trainer(folder: Path, *callbacks: pl.Callback, epochs: int = 2, lightning: Any = pl, **options: Any) -> Any:
    options = {"logger": False, "enable_checkpointing": False, **options}
    if any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        options["enable_checkpointing"] = True
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def scheduled(model: nn.Module) -> Any:
    optimizer = everything(model)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Manual(Net):
    """Two optimizers, stepped by hand."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__(lambda m: [torch.optim.Adam(m.head.parameters()), torch.optim.SGD(m.parameters(), lr=0.1)])

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, _))
            optimizer.step()


# --------------------------------------------------------------------------------------- frozen means frozen


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Net, {}),
        (lambda: Net(trainable), {}),
        (Net, {"precision": "bf16-mixed"}),
        (Net, {"accumulate_grad_batches": 2}),
        (Net, {"gradient_clip_val": 0.1}),
        (Net, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
        (lambda: Net(scheduled), {}),
        (Manual, {}),
    ],
    ids=["all", "trainable", "bf16", "accumulate", "norm", "value", "scheduler", "manual"],
)
@pytest.mark.parametrize("trains", [False, True], ids=["preserved", "train()"])
def test_what_is_frozen_keeps_every_bit(
    make: Callable[[], Net], options: dict[str, Any], trains: bool, tmp_path: Path
) -> None:
    """Also when the module calls ``train()`` at each epoch, as Lightning's own loop did before 2.2."""
    model = make()
    if trains:
        model.on_train_epoch_start = model.train  # type: ignore[method-assign, assignment]
    before = zoo.snapshot(model)
    freeze, audit = FreezeBackbone(), DriftAudit(watch="all", probe=1)
    trainer(tmp_path, freeze, audit, **options).fit(model, data(), data())
    assert audit.report is not None
    assert audit.report.clean
    assert audit.report.compared == 14
    moved = [name for name, bits in zoo.snapshot(model).items() if bits != before[name]]
    assert moved == ["head.weight", "head.bias"]
    assert nn.Module.__setattr__ is SETATTR
