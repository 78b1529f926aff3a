"""Lightning's callbacks in its real Trainer, beside Lightning's own ways to freeze."""

from __future__ import annotations

import ast
import csv
import importlib.util
import os
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
from freezekit import DriftError, DriftReport, FreezekitError, Manifest, audit_checkpoint, is_frozen
from freezekit.hooks.lightning import DriftAudit, FreezeBackbone

#: what Lightning warns of: two are about itself, the others about what is meant here
LIGHTNINGS = (
    ".isinstance.treespec, LeafSpec.. is deprecated",
    "The '.*' does not have many workers",
    "Found .* module.s. in eval mode at the start of training",
    "Be aware that when using .ckpt_path., callbacks used to create the checkpoint need to be provided",
    "The provided params to be frozen already exist within another group of this optimizer",
)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in LIGHTNINGS]

SETATTR = nn.Module.__setattr__
STAGES = {1: "backbone.layer2*", 3: ["backbone.layer1", "backbone.layer1_bn"]}


class Layers:
    """Two layers with BN, and a head; ``optimizers`` makes what ``configure_optimizers`` returns."""

    log: Any

    def __init__(self, optimizers: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for name in ("layer1", "layer2"):
            layers[name] = nn.Linear(4, 4)
            layers[f"{name}_bn"] = nn.BatchNorm1d(4)
        self.backbone = nn.Sequential(layers)
        self.head = nn.Linear(4, 2)
        zoo.scramble(self)  # type: ignore[arg-type]
        self.optimizers_of = optimizers or everything

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.forward(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("loss", F.cross_entropy(self.forward(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


class Net(Layers, pl.LightningModule):
    pass


def everything(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def trainable(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(freezekit.trainable_parameters(model), lr=0.1)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


def trainer(
    folder: Path, *callbacks: pl.Callback, epochs: int = 2, lightning: Any = pl, **options: Any
) -> Any:
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


def fit(model: Any, folder: Path, *callbacks: pl.Callback, ckpt: Path | None = None, **options: Any) -> Any:
    """Train and validate, and return the trainer."""
    made = trainer(folder, *callbacks, **options)
    made.fit(model, data(), data(), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    return made


def scheduled(model: Any) -> Any:
    optimizer = everything(model)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Manual(Net):
    """Two optimizers, stepped by hand."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__(lambda m: [trainable(m.head), everything(m)])

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
    fit(model, tmp_path, freeze, audit, **options)
    assert audit.report is not None
    assert audit.report.clean
    assert audit.report.compared == 14
    moved = [name for name, bits in zoo.snapshot(model).items() if bits != before[name]]
    assert moved == ["head.weight", "head.bias"]
    assert nn.Module.__setattr__ is SETATTR


@pytest.mark.parametrize("last", [True, False], ids=["last", "first"])
def test_weight_averaging(last: bool, tmp_path: Path) -> None:
    """SWA leaves what is frozen alone. Lightning's EMA rounds it, and writes that to the model at the end."""
    swa = StochasticWeightAveraging(0.1, swa_epoch_start=1)
    model, audit = Net(scheduled), DriftAudit(watch="all", on_drift="record")
    fit(model, tmp_path, FreezeBackbone(), swa, audit, epochs=4)
    assert audit.report is not None
    assert audit.report.clean

    model = Net()
    ema = EMAWeightAveraging(decay=0.9)
    callbacks = [ema, audit] if last else [audit, ema]
    before = zoo.snapshot(model.backbone)
    fit(model, tmp_path, FreezeBackbone(), *callbacks)
    assert zoo.snapshot(model.backbone) != before
    assert audit.report.clean is not last
    assert {f.code for f in audit.report.findings} == ({"FK101", "FK103"} if last else set())


# -------------------------------------------------------------------------------------- Lightning's own ways


class ByHand(Net):
    """As people freeze in ``__init__``."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.backbone.requires_grad_(False)
        if mode != "requires_grad":
            self.backbone.eval()

    def on_train_epoch_start(self) -> None:
        if self.mode == "eval, then train()":
            self.train()  # here


@pytest.mark.parametrize("mode", ["requires_grad", "eval", "eval, then train()"])
def test_freezing_by_hand(mode: str, tmp_path: Path) -> None:
    """Since 2.2 Lightning preserves ``eval()``, until somebody calls ``train()``."""
    model, audit = ByHand(mode), DriftAudit(on_drift="record", probe=1)
    fit(model, tmp_path, audit)
    report = audit.report
    assert report is not None
    layers = [] if mode == "eval" else ["backbone.layer1_bn", "backbone.layer2_bn"]
    assert [(f.code, f.name) for f in report.findings] == [
        (code, layer) for code in ("FK101", "FK201", "FK203") for layer in layers
    ]
    (line,) = (
        n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith("# here")
    )
    since = f"test_lightning.py:{line}" if mode == "eval, then train()" else "before the auditor was attached"
    for finding in report.findings:
        assert finding.cause is not None
        assert finding.cause.kind == "train-mode forward"
        assert finding.code == "FK201" or since in str(finding.cause)


class Lightnings(BaseFinetuning):
    """Freezes the backbone for good, with its BN or without."""

    def __init__(self, train_bn: bool) -> None:
        super().__init__()
        self.train_bn = train_bn

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=self.train_bn)

    def finetune_function(self, *_: Any) -> None:
        pass


def test_lightnings_freeze_leaves_bn_training_by_default(tmp_path: Path) -> None:
    model, audit = Net(), DriftAudit(frozen="backbone", on_drift="record")
    fit(model, tmp_path, Lightnings(train_bn=True), audit)
    assert audit.report is not None
    assert {f.code for f in audit.report.findings} == {"FK101", "FK103"}


def test_lightnings_freeze_by_track_running_stats_normalises_by_the_batch(tmp_path: Path) -> None:
    """Nothing moves, so that only the probe finds that it is not what it was in eval mode."""
    for probe in (None, 1):
        model, audit = Net(), DriftAudit(on_drift="record", probe=probe)
        before = zoo.snapshot(model.backbone)
        fit(model, tmp_path, Lightnings(train_bn=False), audit)
        assert zoo.snapshot(model.backbone) == before
        assert audit.report is not None
        assert [f.code for f in audit.report.findings] == ([] if probe is None else ["FK201", "FK201"])


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "Lightning's"])
def test_bn_that_is_to_stay_frozen(ours: bool, tmp_path: Path) -> None:
    """Lightning's ``train_bn=False`` leaves BN out of the optimizer, but lets its statistics move again."""
    model = Net(trainable)
    before = zoo.snapshot(model.backbone)
    callback = (
        FreezeBackbone(unfreeze={1: "backbone"}, unfreeze_bn="freeze")
        if ours
        else BackboneFinetuning(1, train_bn=False, backbone_initial_lr=0.1)
    )
    fit(model, tmp_path, callback)
    moved = {name for name, bits in zoo.snapshot(model.backbone).items() if bits != before[name]}
    assert {"layer1.weight", "layer2.weight"} <= moved
    assert any("running_mean" in name for name in moved) is not ours
    assert {name.split(".")[0] for name in moved} == {"layer1", "layer2"} | (
        set() if ours else {"layer1_bn", "layer2_bn"}
    )


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "Lightning's"])
def test_parameters_that_equal_those_of_the_head(ours: bool, tmp_path: Path) -> None:
    """Lightning asks by value what the optimizer has: a bias of zeros is taken for that of the head."""
    model = Net(lambda m: torch.optim.SGD(freezekit.trainable_parameters(m), lr=0.0))
    model.head = nn.Linear(4, 4)
    for layer in (model.backbone.layer1, model.head):
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type, union-attr]
    fit(model, tmp_path, FreezeBackbone(unfreeze={1: "backbone"}) if ours else BackboneFinetuning(1))
    groups = model.optimizers(use_pl_optimizer=False).param_groups  # type: ignore[union-attr]
    found = {name for name, p in model.named_parameters() for g in groups if any(p is q for q in g["params"])}
    assert ("backbone.layer1.bias" in found) is ours
    assert "backbone.layer2.bias" in found


class Parent(nn.Module):
    """Has a parameter beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) * self.scale


@pytest.mark.parametrize("epochs", [1, 2])
def test_parameters_beside_layers(epochs: int, tmp_path: Path) -> None:
    model = Net(trainable)
    model.backbone = nn.Sequential(Parent(), Parent())
    before = zoo.snapshot(model.backbone)
    fit(model, tmp_path, FreezeBackbone(unfreeze={1: "backbone"}), epochs=epochs)
    after = zoo.snapshot(model.backbone)
    assert {after[name] != before[name] for name in before} == {epochs == 2}


@pytest.mark.parametrize("align", [True, False])
def test_learning_rates_grow_as_lightnings(align: bool, tmp_path: Path) -> None:
    """The backbone's from a tenth, by 3.5 an epoch, up to the head's."""
    rates: list[list[float]] = []

    class Noted(Net):
        def on_train_epoch_end(self) -> None:
            rates[-1].append(self.optimizers(use_pl_optimizer=False).param_groups[-1]["lr"])  # type: ignore[union-attr]

    for callback in (
        BackboneFinetuning(1, lambda epoch: 3.5, backbone_initial_ratio_lr=0.1, should_align=align),
        FreezeBackbone(unfreeze={1: "backbone"}, decay=0.1, growth=3.5, align=align),
    ):
        rates.append([])
        fit(Noted(trainable), tmp_path, callback, epochs=5)
    expected = [0.01, 0.035, 0.1, 0.1] if align else [0.01, 0.035, 0.1225, 0.42875]
    assert rates[0][1:] == rates[1][1:] == pytest.approx(expected)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "Lightning's"])
def test_several_optimizers(ours: bool, tmp_path: Path) -> None:
    """Lightning gives the backbone to every one of them, so that each step is taken twice."""
    model = Manual()
    model.optimizers_of = lambda m: [trainable(m), trainable(m.head)]
    made = fit(model, tmp_path, FreezeBackbone(unfreeze={1: "backbone"}) if ours else BackboneFinetuning(1))
    weight = model.backbone.layer1.weight
    having = [any(weight is p for g in o.param_groups for p in g["params"]) for o in made.optimizers]
    assert having == [True, not ours]


# ------------------------------------------------------------------------------------------ resume and files


def keep_all(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_last=True)


three_optimizers = pytest.mark.parametrize(
    ("optimizers", "options"),
    [(everything, {}), (trainable, {"decay": 0.5, "growth": 1.5}), (scheduled, {})],
    ids=["all", "trainable", "scheduler"],
)


@three_optimizers
def test_a_resumed_run_ends_as_the_whole_one(
    optimizers: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    """Checkpoints pass ``weights_only=True``; what is unfrozen after a validation is in train mode."""
    model, freeze = Net(optimizers), FreezeBackbone(unfreeze=STAGES, **options)
    fit(model, tmp_path, freeze, DriftAudit(watch="all", probe=1), keep_all(tmp_path), epochs=5)
    assert freeze.handle is not None
    assert freeze.handle.frozen == []
    assert all(module.training for module in model.modules())
    tracked = [int(model.get_buffer(f"backbone.layer{n}_bn.num_batches_tracked")) for n in (1, 2)]
    start = [int(Net().get_buffer(f"backbone.layer{n}_bn.num_batches_tracked")) for n in (1, 2)]
    assert tracked == [start[0] + 2 * 2, start[1] + 4 * 2]
    for epoch in range(4):
        again, other, audit = (
            Net(optimizers),
            FreezeBackbone(unfreeze=STAGES, **options),
            DriftAudit(watch="all"),
        )
        nn.init.zeros_(again.backbone.layer1.weight)  # type: ignore[arg-type, union-attr]
        made = fit(again, tmp_path, other, audit, ckpt=tmp_path / f"epoch={epoch}.ckpt", epochs=5)
        assert zoo.snapshot(again) == zoo.snapshot(model), epoch
        assert all(module.training for module in again.modules())
        assert epoch == 3 or (audit.report is not None and audit.report.clean)
        theirs = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]
        for key, state in made.optimizers[0].state_dict()["state"].items():
            assert all(torch.equal(value, theirs["state"][key][name]) for name, value in state.items())


def test_lightnings_own_is_frozen_again_by_a_resume(tmp_path: Path) -> None:
    """Lightning#21901: the groups come back, ``requires_grad`` does not."""
    fit(Net(trainable), tmp_path, BackboneFinetuning(1), keep_all(tmp_path))
    model = Net(trainable)
    fit(model, tmp_path, BackboneFinetuning(1), ckpt=tmp_path / "last.ckpt", epochs=4)
    assert not model.backbone.layer1.weight.requires_grad  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_resume_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """Lightning does not begin that epoch again, so no event says that it began."""
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(Net(), tmp_path, FreezeBackbone(unfreeze=STAGES), every)
    model, freeze = Net(), FreezeBackbone(unfreeze=STAGES)
    fit(model, tmp_path, freeze, DriftAudit(), ckpt=tmp_path / "step=3.ckpt")
    assert not is_frozen(model, "backbone.layer2")
    assert is_frozen(model, "backbone.layer1")


@three_optimizers
def test_going_on_with_the_same_objects_from_an_earlier_checkpoint(
    optimizers: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    model, freeze = Net(optimizers), FreezeBackbone(unfreeze=STAGES, **options)
    fit(model, tmp_path, freeze, DriftAudit(), keep_all(tmp_path), epochs=5)
    whole = zoo.snapshot(model)
    for epoch in (2, 0):
        fit(model, tmp_path, freeze, DriftAudit(), ckpt=tmp_path / f"epoch={epoch}.ckpt", epochs=5)
        assert zoo.snapshot(model) == whole


class Careless(pl.Callback):
    """Moves a frozen weight in the first epoch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            pl_module.backbone.layer1.weight.data.mul_(2)


@pytest.mark.parametrize("careless", [False, True])
def test_the_checkpoint_is_audited_by_its_manifest(careless: bool, tmp_path: Path) -> None:
    """It has the digests of the start, in the first epoch's file and, of what stays frozen, after a stage."""
    callbacks = [FreezeBackbone(unfreeze={1: "backbone.layer2"}), *([Careless()] if careless else [])]
    fit(Net(), tmp_path, *callbacks, keep_all(tmp_path))
    for file, frozen in (("epoch=0.ckpt", 14), ("last.ckpt", 12)):
        assert len(Manifest.load(tmp_path / file).frozen) == frozen
        report = audit_checkpoint(tmp_path / file)
        assert report.compared == frozen
        assert report.changed == (("backbone.layer1.weight",) if careless else ())
    command = [sys.executable, "-m", "freezekit", "audit", str(tmp_path / "last.ckpt")]
    assert subprocess.run(command, check=False).returncode == careless


def test_the_checkpoint_has_the_report(tmp_path: Path) -> None:
    made = fit(ByHand("requires_grad"), tmp_path, DriftAudit(on_drift="record"), keep_all(tmp_path))
    made.save_checkpoint(tmp_path / "later.ckpt")
    for file in ("epoch=0.ckpt", "last.ckpt", "later.ckpt"):
        text = torch.load(tmp_path / file, weights_only=True)["freezekit_report"]
        (finding, _) = DriftReport.from_json(text).findings
        assert (finding.code, finding.name, finding.step) == ("FK101", "backbone.layer1_bn", 1)
        assert str(finding.cause) in str(audit_checkpoint(tmp_path / file).findings[0])


# ----------------------------------------------------------------------------- what else happens to a trainer


def head_only(model: Any) -> Any:
    optimizer = trainable(model.head)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def test_a_scheduler_with_an_optimizer_of_the_head_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FreezekitError) as caught:
        fit(Net(head_only), tmp_path, FreezeBackbone(unfreeze={1: "backbone"}))
    assert str(caught.value) == (
        "configure_optimizers: a learning-rate scheduler was made on this optimizer, and most fail on a "
        "group added later, or leave it out. Remedy: make the optimizer of "
        "self.parameters(), in groups or not: what is frozen waits in it"
    )
    fit(Net(head_only), tmp_path, FreezeBackbone())  # nothing is to be added


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FreezekitError, match="no stage needs a group of its own"):
        fit(Net(), tmp_path, FreezeBackbone(unfreeze={1: "backbone"}, decay=0.1))
    with pytest.raises(FreezekitError, match="epoch 1.*'backbone.layer3'"):
        fit(Net(), tmp_path, FreezeBackbone(unfreeze={1: "backbone.layer3"}))


def test_a_stage_under_ddp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, FreezeBackbone(unfreeze=STAGES))
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    monkeypatch.setattr(type(made), "model", property(lambda _: wrapped))
    with pytest.raises(FreezekitError, match="unsynchronised.*unfrozen before it is wrapped"):
        made.fit(Net(), data(), data())


def test_to_validate_test_and_predict_freezes_nothing(tmp_path: Path) -> None:
    model, callbacks = Net(), (FreezeBackbone(unfreeze=STAGES), DriftAudit())
    made = trainer(tmp_path, *callbacks)
    made.validate(model, data(), verbose=False)
    made.test(model, data(), verbose=False)
    made.predict(model, DataLoader(torch.zeros(2, 4), 2))
    made.save_checkpoint(tmp_path / "untrained" / "model.ckpt")
    assert "freezekit_manifest" not in torch.load(tmp_path / "untrained" / "model.ckpt", weights_only=True)
    assert not any("backbone" in n and is_frozen(model, n) for n, _ in model.named_modules())
    keep = keep_all(tmp_path / "trained")
    fit(model, tmp_path, *callbacks, keep)
    assert is_frozen(model, "backbone.layer1")
    other = trainer(tmp_path, FreezeBackbone(), DriftAudit())  # with no stages, which only training asks for
    other.test(Net(), data(), ckpt_path=keep.last_model_path, weights_only=True, verbose=False)


def test_to_test_the_best_checkpoint_freezes_nothing_again(tmp_path: Path) -> None:
    model, freeze = Net(), FreezeBackbone(unfreeze=STAGES)
    made = fit(model, tmp_path, freeze, keep_all(tmp_path), epochs=4)
    made.test(model, data(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True, verbose=False)
    assert freeze.handle is not None
    assert freeze.handle.frozen == []


def test_two_runs_of_one_model(tmp_path: Path) -> None:
    model, freeze, audit = Net(), FreezeBackbone(unfreeze={1: "backbone.layer2"}), DriftAudit(watch="all")
    reports = []
    for _ in range(2):
        fit(model, tmp_path, freeze, audit)
        assert audit.report is not None
        assert audit.report.clean
        reports.append(audit.report.compared)
    assert reports == [14, 12]


def test_finding_a_learning_rate_first(tmp_path: Path) -> None:
    """Lightning trains for it, then restores the model, the callbacks and the optimizer."""
    model, freeze, audit = Net(), FreezeBackbone(unfreeze={1: "backbone.layer2"}), DriftAudit(watch="all")
    model.lr = 0.1  # type: ignore[assignment]
    before = zoo.snapshot(model)
    finder = pl.callbacks.LearningRateFinder(num_training_steps=5, update_attr=True)
    fit(model, tmp_path, freeze, audit, finder, log_every_n_steps=1)
    assert audit.report is not None
    assert audit.report.clean
    after = zoo.snapshot(model)
    assert {n for n in after if after[n] != before[n]} == {
        f"{layer}.{kind}" for layer in ("backbone.layer2", "head") for kind in ("weight", "bias")
    }


class Late(Net):
    """Makes its layers in ``configure_model``, and unfreezes by itself."""

    def __init__(self) -> None:
        super().__init__(None)
        del self.backbone, self.head

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            made = Net()
            self.backbone, self.head = made.backbone, made.head

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            freezekit.unfreeze(self, "backbone.layer2")


def test_layers_that_are_made_late_and_unfrozen_by_the_module(tmp_path: Path) -> None:
    model, audit = Late(), DriftAudit(watch="all")
    fit(model, tmp_path, FreezeBackbone(), audit)
    assert audit.report is not None
    assert audit.report.clean
    assert not is_frozen(model, "backbone.layer2")
    assert is_frozen(model, "backbone.layer1")


class Interrupted(Net):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 1:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def test_after_an_error_nothing_is_left_behind(tmp_path: Path) -> None:
    audit = DriftAudit(save=tmp_path / "drift.json")
    with pytest.raises(ZeroDivisionError):
        fit(Interrupted(), tmp_path, FreezeBackbone(), audit)
    assert nn.Module.__setattr__ is SETATTR
    assert audit.auditor is None
    assert DriftReport.load(tmp_path / "drift.json") == audit.report


def test_drift_ends_the_run_and_is_saved(tmp_path: Path) -> None:
    audit = DriftAudit(save=tmp_path / "drift.json")
    with pytest.raises(
        DriftError, match=r"FK101 backbone\.layer1_bn at step 1: .*before the auditor was attached"
    ):
        fit(ByHand("requires_grad"), tmp_path, audit)
    assert nn.Module.__setattr__ is SETATTR
    assert DriftReport.load(tmp_path / "drift.json").changed == (
        *(
            f"backbone.layer{n}_bn.{key}"
            for n in (1, 2)
            for key in ("running_mean", "running_var", "num_batches_tracked")
        ),
    )


# ---------------------------------------------------------------------------------------------------- loggers


def test_the_loggers_get_scalars_per_layer(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tensorboard")]
    stop = pl.callbacks.EarlyStopping("freezekit/changed", stopping_threshold=-1, patience=9)
    audit = DriftAudit(on_drift="record")
    made = fit(ByHand("requires_grad"), tmp_path, audit, stop, logger=loggers, epochs=3, log_every_n_steps=1)
    with (Path(loggers[0].log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["freezekit/changed"]]
    assert [(row["epoch"], row["step"], row["freezekit/changed"]) for row in rows] == [
        ("0", "1", "6.0"), ("1", "3", "6.0"), ("2", "5", "6.0"),
    ]  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(loggers[1].log_dir)).Reload()
    assert audit.report is not None
    for layer in audit.report.layers:
        assert len(layer.timeline) > 1
        for key in ("mean_shift_sigma", "var_ratio"):
            name = f"freezekit/{layer.name}/{key}"
            found = {event.step: event.value for event in events.Scalars(name)}
            assert list(found) == [1, 3, 5]
            assert found[5] == pytest.approx(getattr(layer, key)) == made.callback_metrics[name].item()
            assert [float(row[name]) for row in rows] == pytest.approx(list(found.values()))


# ------------------------------------------------------------------------------------- packages and processes


def load_anew() -> Any:
    spec = importlib.util.find_spec("freezekit.hooks.lightning")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pytorch_lightning(tmp_path: Path) -> None:
    """A class that was made before ``pytorch_lightning`` was imported serves its trainer too, in a list."""
    import pytorch_lightning

    both = load_anew()
    assert issubclass(both.FreezeBackbone, pytorch_lightning.Callback)
    assert issubclass(both.FreezeBackbone, pl.Callback)
    assert not issubclass(FreezeBackbone, pytorch_lightning.Callback)

    class Theirs(Layers, pytorch_lightning.LightningModule):
        pass

    for callbacks in (FreezeBackbone(), DriftAudit()), (both.FreezeBackbone(), both.DriftAudit(watch="all")):
        model = Theirs()
        fit(model, tmp_path, *callbacks, lightning=pytorch_lightning)
        assert is_frozen(model, "backbone")
        assert callbacks[1].report is not None
        assert callbacks[1].report.clean


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "lightning.pytorch", raising=False)
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if "lightning" in n[:18] else find(n))
    with pytest.raises(FreezekitError) as caught:
        load_anew()
    assert str(caught.value) == (
        "freezekit.hooks.lightning: lightning cannot be imported (got No module named 'lightning.pytorch'; "
        "'lightning' is not a package). Remedy: pip install 'freezekit[lightning]'"
    )


class Witness(pl.Callback):
    """Writes down, on each rank, what is known there."""

    def __init__(self, audit: DriftAudit, before: dict[str, bytes]) -> None:
        self.audit, self.before = audit, before

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        report, after = self.audit.report, zoo.snapshot(pl_module)
        assert report is not None
        moved = [name for name in after if after[name] != self.before[name]]
        codes = sorted({finding.code for finding in report.findings})
        path = Path(trainer.default_root_dir) / f"{type(pl_module).__name__} {trainer.global_rank}"
        path.write_text(repr((moved, codes, self.audit._save is not None)))


def train_in_two_processes(folder: Path) -> None:
    for model, freeze in ((Net(), [FreezeBackbone()]), (ByHand("requires_grad"), [])):
        audit = DriftAudit(on_drift="record", save=folder / f"{type(model).__name__}.json")
        callbacks = (*freeze, audit, Witness(audit, zoo.snapshot(model)), keep_all(folder))
        fit(model, folder, *callbacks, strategy="ddp_fork", devices=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_two_processes(tmp_path: Path) -> None:
    code = f"import pathlib, test_lightning as t; t.train_in_two_processes(pathlib.Path({str(tmp_path)!r}))"
    folders = [*map(str, Path(__file__).parents[:3]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert ast.literal_eval((tmp_path / f"Net {rank}").read_text()) == (
            ["head.weight", "head.bias"], [], rank == 0,
        )  # fmt: skip
        moved, codes, _ = ast.literal_eval((tmp_path / f"ByHand {rank}").read_text())
        assert "backbone.layer1_bn.running_mean" in moved
        assert codes == ["FK101"]
    assert DriftReport.load(tmp_path / "Net.json").clean
    assert not DriftReport.load(tmp_path / "ByHand.json").clean
