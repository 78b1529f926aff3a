"""The Trainer's callbacks, in its real loop, beside the Trainer's own ways to freeze."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from click.testing import CliRunner
from torch import nn

from freezekit import DriftError, DriftReport, FreezekitError, freeze_backbone
from freezekit.audit.live.calls import recorders
from freezekit.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from freezekit.hooks.transformers import DriftAudit, FreezeBackbone  # noqa: E402

STAGES = {1: "resnet.encoder.stages.1", 2: "resnet.*"}


@pytest.fixture(autouse=True)
def _nothing_is_left_of_an_audit() -> Iterator[None]:
    before = list(recorders)
    yield
    gc.collect()
    assert recorders == before


def resnet() -> Any:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return zoo.scramble(transformers.ResNetForImageClassification(config))


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8, num_labels=3, hidden_dropout_prob=0.5,
    )  # fmt: skip
    return zoo.scramble(transformers.BertForSequenceClassification(config))


def images() -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=random), "labels": k % 3} for k in range(16)]


def words() -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(20, (6,), generator=random), "labels": k % 3} for k in range(16)]


def trainer_of(model: Any, folder: Path, *callbacks: Any, data: Any = images, **options: Any) -> Any:
    """Make a Trainer of four steps an epoch."""
    defaults = {
        "num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 0.05, "weight_decay": 0.1,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    args = transformers.TrainingArguments(str(folder), **{**defaults, **options})
    made = {"model": model} if isinstance(model, nn.Module) else {"model_init": model}
    trainer = transformers.Trainer(
        args=args, train_dataset=data(), eval_dataset=data(), callbacks=list(callbacks), **made
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    now = model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, now[name])}


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"optim": "sgd", "optim_args": "momentum=0.9"}],
    ids=["adamw", "bf16", "accumulation", "sgd"],
)
def test_nothing_of_the_backbone_moves(options: dict[str, Any], tmp_path: Path) -> None:
    model = resnet()
    before, audit = state(model), DriftAudit(watch="all")
    trainer = trainer_of(model, tmp_path, FreezeBackbone(), audit, **options)
    trainer.evaluate()
    trainer.train()
    assert audit.report is not None
    assert audit.report.clean, str(audit.report)
    assert audit.report.source.endswith(f"after {trainer.state.global_step} steps")
    assert moved(model, before) == {"classifier.1.weight", "classifier.1.bias"}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == 2


def test_the_naive_way_is_found_and_explained(tmp_path: Path) -> None:
    model = resnet()
    model.resnet.requires_grad_(False)
    model.resnet.eval()  # the Trainer calls train() at each step
    with pytest.raises(DriftError, match=r"FK101 resnet\S+ at step 1: running mean moved.*train-mode forwa"):
        trainer_of(model, tmp_path, DriftAudit()).train()


@pytest.mark.parametrize("right", [True, False])
def test_dropout_in_the_frozen_part(right: bool, tmp_path: Path) -> None:
    model = bert()
    model.bert.requires_grad_(right)
    before = state(model)
    audit = DriftAudit(watch="all", probe=1, on_drift="record")
    callbacks = [FreezeBackbone(head=["bert.pooler", "classifier"]), audit] if right else [audit]
    names = transformers.TrainingArguments.__dataclass_fields__
    checkpointing = "activation" if "activation_checkpointing" in names else "gradient"  # its older name
    checkpointing += "_checkpointing"
    trainer_of(model, tmp_path, *callbacks, data=words, **{checkpointing: True}).train()
    assert audit.report is not None
    assert not any(name.startswith(("bert.embeddings", "bert.encoder")) for name in moved(model, before))
    assert {finding.code for finding in audit.report.findings} == (set() if right else {"FK202"})


class Checkpointed(nn.Module):
    """Trains before a frozen part whose activations are not kept, so that its forward runs twice a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3)
        self.backbone = zoo.scramble(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
        self.fc = nn.Linear(4, 3)

    def forward(self, pixel_values: Any, labels: Any = None) -> dict[str, Any]:
        x = torch.utils.checkpoint.checkpoint(self.backbone, self.stem(pixel_values), use_reentrant=False)
        logits = self.fc(x.mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_checkpointed_activations(tmp_path: Path) -> None:
    for right in (True, False):
        model = Checkpointed()
        model.backbone.requires_grad_(right)
        before, audit = state(model), DriftAudit(on_drift="record")
        callbacks = [FreezeBackbone(backbone="backbone"), audit] if right else [audit]
        trainer_of(model, tmp_path, *callbacks).train()
        assert audit.report is not None
        assert audit.report.clean is right
        counted = int(model.backbone[1].num_batches_tracked - before["backbone.1.num_batches_tracked"])
        assert counted == (0 if right else 8)
        assert "stem.weight" in moved(model, before)


def test_what_is_found_is_logged_and_saved(tmp_path: Path) -> None:
    model = resnet()
    model.resnet.requires_grad_(False)
    before = state(model)
    audit = DriftAudit(on_drift="record", save=tmp_path / "drift.json")
    trainer = trainer_of(model, tmp_path / "run", audit, eval_strategy="epoch")
    done = trainer.train()
    report = audit.report
    assert report == DriftReport.load(tmp_path / "drift.json")
    assert report is not None
    assert set(report.changed) == {name for name in moved(model, before) if name.startswith("resnet")}
    history = trainer.state.log_history
    assert [entry.get("freezekit/changed") for entry in history] == [18.0] * 4 + [None, 18.0]
    layer = report.layers[0]
    key = f"freezekit/{layer.name}/mean_shift_sigma"
    assert [history[0][key], history[3][key]] == [
        layer.timeline[0].mean_shift_sigma, layer.timeline[-1].mean_shift_sigma
    ]  # fmt: skip
    assert done.metrics[key] == layer.mean_shift_sigma


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
@pytest.mark.parametrize("attached", [True, False])
def test_loggers_get_it_from_an_audit_that_is_attached(
    attached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model, audit = resnet(), DriftAudit(on_drift="record")
    model.resnet.requires_grad_(False)
    trainer = trainer_of(model, tmp_path, audit, report_to=["tensorboard"])
    if attached:
        assert audit.attach(trainer).attach(trainer) is audit
        assert trainer.callback_handler.callbacks.count(audit) == 1
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "freezekit/" in tag]
    if not attached:
        assert tags == []  # the Trainer calls its loggers first
        return
    assert [event.step for event in events.Scalars("train/freezekit/changed")] == [1, 2, 3, 4, 4]
    assert audit.report is not None
    layer = audit.report.layers[0]
    shifts = events.Scalars(f"train/freezekit/{layer.name}/mean_shift_sigma")
    assert shifts[-1].value == pytest.approx(layer.mean_shift_sigma)


class Look(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Notes what has moved by the end of each epoch, and may stop one early."""

    def __init__(self, stop: int = 0) -> None:
        self.stop, self.seen = stop, list[set[str]]()

    def on_train_begin(self, args: Any, state_: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.before = state(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_epoch_stop = state.global_step == self.stop

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        stages = {name.split(".")[3] for name in moved(model, self.before) if "stages" in name}
        self.seen.append(stages)


@pytest.mark.parametrize("stop", [0, 2])
def test_stages_join_at_their_epochs(stop: int, tmp_path: Path) -> None:
    """Also after an epoch that was stopped early, which the state's own count does not have."""
    look, audit = Look(stop), DriftAudit(watch="all")
    hook = FreezeBackbone(unfreeze=STAGES)
    trainer = trainer_of(resnet(), tmp_path, look, audit, hook, num_train_epochs=3)
    trainer.train()
    assert audit.report is not None
    assert audit.report.clean, str(audit.report)
    assert look.seen == [set(), {"1"}, {"0", "1"}]


def test_momentum_and_weight_decay_cannot_move_what_is_frozen_later(tmp_path: Path) -> None:
    """The optimizer of a Trainer's second run has all parameters, with their state of the first."""
    model = resnet()
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    before = state(model)
    audit, hook = DriftAudit(watch="all"), FreezeBackbone()
    trainer.add_callback(hook)
    trainer.add_callback(audit)
    trainer.train()
    inner = trainer.optimizer.optimizer
    assert any(inner.state[parameter]["exp_avg"].any() for parameter in model.resnet.parameters())
    assert audit.report is not None
    assert audit.report.clean, str(audit.report)
    assert moved(model, before) == {"classifier.1.weight", "classifier.1.bias"}
    assert hook.handle is not None
    hook.handle.undo()
    trainer.remove_callback(FreezeBackbone)
    trainer.remove_callback(DriftAudit)
    trainer.train()
    assert len(moved(model, before)) > 20  # they could have been moved


def test_a_resumed_run_ends_as_the_whole_one(tmp_path: Path) -> None:
    """Also in the middle of an epoch, and from a folder that was moved; without hooks the Trainer can too."""

    def start(folder: str, *hooks: Any) -> Any:
        return trainer_of(
            resnet(), tmp_path / folder, *hooks, num_train_epochs=3, save_strategy="steps", save_steps=2
        )

    plain = start("plain")
    plain.train()
    again = start("plain")
    again.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-6"))
    assert moved(again.model, state(plain.model)) == set()

    whole = start("whole", FreezeBackbone(unfreeze=STAGES), DriftAudit(watch="all"))
    whole.train()
    (tmp_path / "whole").rename(tmp_path / "elsewhere")
    for step in (2, 6, 10):
        hook, audit = FreezeBackbone(unfreeze=STAGES), DriftAudit(watch="all")
        resumed = start(f"from{step}", hook, audit)
        resumed.train(resume_from_checkpoint=str(tmp_path / "elsewhere" / f"checkpoint-{step}"))
        assert moved(resumed.model, state(whole.model)) == set()
        assert audit.report is None if step == 10 else audit.report is not None and audit.report.clean


def test_a_checkpoint_whose_frozen_part_had_drifted(tmp_path: Path) -> None:
    """Told by the real command line, and refused on resuming."""
    from safetensors.torch import load_file, save_file

    options: dict[str, Any] = {"save_strategy": "epoch", "num_train_epochs": 2}
    trainer_of(resnet(), tmp_path, FreezeBackbone(unfreeze={1: STAGES[1]}), **options).train()
    for step, frozen in ((4, 36), (8, 18)):
        folder = tmp_path / f"checkpoint-{step}"
        command = ["audit", str(folder), "--manifest", str(folder / "frozen.json")]
        done = CliRunner().invoke(main, command)
        assert (done.exit_code, done.output[:5]) == (0, "CLEAN"), done.output
        assert f" {frozen} frozen tensors" in done.output.partition("\n")[0]
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["resnet.embedder.embedder.normalization.running_mean"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, done.output[:5]) == (1, "DRIFT")
    resumed = trainer_of(resnet(), tmp_path, FreezeBackbone(unfreeze={1: STAGES[1]}), **options)
    with pytest.raises(
        FreezekitError, match=r"other values in the model.*embedder\.normalization\.running_m"
    ):
        resumed.train(resume_from_checkpoint=str(folder))
    other = trainer_of(resnet(), tmp_path, FreezeBackbone(unfreeze={3: STAGES[1]}), **options)
    with pytest.raises(FreezekitError, match="unfreeze=: the state was saved with other stages"):
        other.train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("unfreeze", [None, STAGES])
def test_to_load_the_best_model_at_the_end_is_no_drift(
    unfreeze: dict[int, str] | None, tmp_path: Path
) -> None:
    audit = DriftAudit(watch="all")
    trainer = trainer_of(
        resnet(), tmp_path, FreezeBackbone(unfreeze=unfreeze), audit, num_train_epochs=2,
        load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch",
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert audit.report is not None
    assert audit.report.clean, str(audit.report)


def test_a_model_made_anew_by_each_run_is_frozen(tmp_path: Path) -> None:
    hook, audit = FreezeBackbone(), DriftAudit(watch="all")
    trainer = trainer_of(resnet, tmp_path, hook, audit)
    for _ in range(2):
        trainer.train()
        assert hook.handle is not None
        assert hook.handle.model is trainer.model
        assert {name.partition(".")[0] for name in moved(trainer.model, state(resnet()))} == {"classifier"}


def test_stages_of_a_model_that_was_frozen_before_are_refused(tmp_path: Path) -> None:
    model = resnet()
    freeze_backbone(model)
    with pytest.raises(FreezekitError) as caught:
        trainer_of(model, tmp_path, FreezeBackbone(unfreeze=STAGES)).train()
    assert str(caught.value) == (
        "unfreeze=: the Trainer's optimizer lacks what is to train later. Remedy: make it of "
        "model.parameters(), or give none; and give a model that nobody has frozen"
    )


def test_stages_in_a_distributed_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(resnet(), tmp_path, FreezeBackbone(unfreeze=STAGES))
    mode = transformers.training_args.ParallelMode.DISTRIBUTED
    monkeypatch.setattr(type(trainer.args), "parallel_mode", mode)
    with pytest.raises(FreezekitError, match="unfreeze=: DistributedDataParallel would leave"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


class Fail(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")


def test_after_a_failed_run_the_audit_ends_with_the_trainer_or_begins_anew(tmp_path: Path) -> None:
    before = list(recorders)
    for again in (True, False):
        audit, model = DriftAudit(watch="all"), resnet()
        trainer = trainer_of(model, tmp_path, FreezeBackbone(), audit, Fail())
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer.train()
        assert audit.auditor is not None
        if again:
            trainer.remove_callback(Fail)
            trainer.train()
            assert audit.report is not None
            assert audit.report.source.endswith("after 4 steps")
        else:
            assert len(recorders) == len(before) + 1
            del audit, trainer
            gc.collect()
        assert recorders == before


# PEFT asks transformers by a name that is on its way out
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_statistics_beside_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["convolution"], r=2, modules_to_save=["classifier"])
    for right in (True, False):
        model = peft.get_peft_model(resnet(), config)
        before, audit = state(model), DriftAudit(watch="all", on_drift="record")
        callbacks = [FreezeBackbone(bn="freeze"), audit] if right else [audit]
        trainer_of(model, tmp_path, *callbacks, label_names=["labels"]).train()
        drifted = {name for name in moved(model, before) if "running" in name}
        assert audit.report is not None
        assert (len(drifted), audit.report.clean) == ((0, True) if right else (12, False))


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "freezekit.hooks.transformers")
    with pytest.raises(
        FreezekitError,
        match=r"cannot be imported.*Remedy: pip install 'freezekit\[transformers\]'$",
    ):
        importlib.import_module("freezekit.hooks.transformers")
