"""The Trainer's callbacks, in its real loop, beside the Trainer's own ways to freeze."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn

from freezekit import DriftError, DriftReport, FreezekitError, audit_checkpoint
from freezekit.hooks.transformers import MANIFEST, DriftAudit, FreezeBackbone

transformers = pytest.importorskip("transformers")

STAGES = {1: "resnet.encoder.stages.1", 2: "resnet.*"}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The Trainer sets its own library's verbosity, and leaves torch's wrappers as they were."""
    ours = nn.Module.__setattr__
    yield
    gc.collect()
    assert nn.Module.__setattr__ is ours


def net() -> Any:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return zoo.scramble(transformers.ResNetForImageClassification(config))


def data() -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=random), "labels": k % 3} for k in range(16)]


def trainer_of(model: Any, folder: Path, callbacks: list[Any], **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "save_strategy": "epoch",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    args = transformers.TrainingArguments(str(folder), **{**defaults, **options})
    trainer = transformers.Trainer(
        model, args, train_dataset=data(), eval_dataset=data(), callbacks=callbacks
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def backbone(model: Any) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if name.startswith("resnet")}


def differing(model: Any, before: dict[str, torch.Tensor]) -> list[str]:
    after = model.state_dict()
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    ],
    ids=["plain", "bf16", "accumulation", "sgd", "cosine"],
)
def test_nothing_of_the_backbone_moves(options: dict[str, Any], tmp_path: Path) -> None:
    model = net()
    before = backbone(model)
    audit = DriftAudit(watch="all", probe=4)
    trainer_of(model, tmp_path, [FreezeBackbone(), audit], **options).train()
    assert audit.report is not None
    assert audit.report.clean, str(audit.report)
    assert differing(model, before) == []
    assert not torch.equal(model.classifier[1].weight, net().classifier[1].weight)


def test_the_naive_way_is_found_and_explained(tmp_path: Path) -> None:
    model = net()
    model.resnet.requires_grad_(False)
    model.resnet.eval()  # the Trainer calls train() at each step
    with pytest.raises(DriftError, match="FK101 resnet.*at step 1: running mean moved.*train-mode forward"):
        trainer_of(model, tmp_path, [DriftAudit()]).train()


def test_the_report_of_the_naive_way_goes_to_the_logs_and_to_a_file(tmp_path: Path) -> None:
    model = net()
    model.resnet.requires_grad_(False)
    before = backbone(model)
    audit = DriftAudit(on_drift="record", save=tmp_path / "drift.json")
    trainer = trainer_of(model, tmp_path / "run", [audit])
    trainer.train()
    assert audit.report == DriftReport.load(tmp_path / "drift.json")
    assert audit.report is not None
    assert set(audit.report.changed) == set(differing(model, before))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 12
    assert all(entry["freezekit/changed"] == len(audit.report.changed) for entry in logged)
    layer = audit.report.layers[0]
    assert logged[-1][f"freezekit/{layer.name}/mean_shift_sigma"] == layer.mean_shift_sigma
    assert logged[0][f"freezekit/{layer.name}/mean_shift_sigma"] == layer.timeline[0].mean_shift_sigma


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_it_once_the_audit_is_in_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model = net()
    model.resnet.requires_grad_(False)
    trainer = trainer_of(model, tmp_path, [], report_to=["tensorboard"], num_train_epochs=1)
    audit = DriftAudit(on_drift="record").attach(trainer).attach(trainer)
    assert trainer.callback_handler.callbacks.count(audit) == 1
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    assert audit.report is not None
    layer = audit.report.layers[0]
    shifts = events.Scalars(f"train/freezekit/{layer.name}/mean_shift_sigma")
    assert [event.step for event in shifts] == [1, 2, 3, 4]
    assert shifts[-1].value == pytest.approx(layer.mean_shift_sigma)


def test_stages_join_at_their_epochs_under_the_trainers_scheduler(tmp_path: Path) -> None:
    model = net()
    seen: list[list[str]] = []

    class Look(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            seen.append(sorted({n.split(".")[3] for n in differing(model, before) if "stages" in n}))

    before = backbone(model)
    audit = DriftAudit(watch="all")
    trainer = trainer_of(model, tmp_path, [FreezeBackbone(unfreeze=STAGES), audit, Look()])
    trainer.train()
    assert audit.report is not None
    assert audit.report.clean, str(audit.report)
    assert seen == [[], ["1"], ["0", "1"]]


@pytest.mark.parametrize("step", [2, 4, 6, 8, 10])
def test_a_resumed_run_ends_as_the_whole_one(step: int, tmp_path: Path) -> None:
    """Also in the middle of an epoch; the Trainer itself puts the data and the random state back."""

    def start() -> Any:
        hooks = [FreezeBackbone(unfreeze=STAGES), DriftAudit(watch="all")]
        return trainer_of(net(), tmp_path, hooks, save_strategy="steps", save_steps=2)

    whole = start()
    whole.train()
    resumed = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_resume_whose_frozen_part_had_drifted_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trainer_of(net(), tmp_path, [FreezeBackbone()], num_train_epochs=1).train()
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("running_mean"))
    tensors[name] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    trainer = trainer_of(net(), tmp_path, [FreezeBackbone()])
    with pytest.raises(FreezekitError, match=f"other values in the model.*{name}"):
        trainer.train(resume_from_checkpoint=str(file.parent))


def test_the_audit_of_a_checkpoint_checks_it_against_its_manifest(tmp_path: Path) -> None:
    model = net()
    trainer_of(model, tmp_path, [FreezeBackbone()], num_train_epochs=1).train()
    folder = tmp_path / "checkpoint-4"
    report = audit_checkpoint(folder / "model.safetensors", manifest=folder / MANIFEST)
    assert report.clean
    assert report.compared == len(backbone(model))
    other = trainer_of(net(), tmp_path / "other", [FreezeBackbone()], num_train_epochs=1)
    other.train()
    zoo.scramble(other.model)
    other.save_model(str(tmp_path / "scrambled"))
    scrambled = tmp_path / "scrambled" / "model.safetensors"
    assert not audit_checkpoint(scrambled, manifest=folder / MANIFEST).clean


@pytest.mark.parametrize("unfreeze", [None, STAGES])
def test_the_best_model_is_loaded_at_the_end_and_that_is_no_drift(
    unfreeze: dict[int, str] | None, tmp_path: Path
) -> None:
    audit = DriftAudit(watch="all")
    trainer = trainer_of(
        net(), tmp_path, [FreezeBackbone(unfreeze=unfreeze), audit], load_best_model_at_end=True,
        eval_strategy="epoch", metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.evaluate()
    trainer.train()
    assert audit.report is not None
    assert audit.report.clean, str(audit.report)


def test_two_runs_of_one_trainer(tmp_path: Path) -> None:
    model = net()
    before = backbone(model)
    hook, audit = FreezeBackbone(), DriftAudit(watch="all")
    trainer = trainer_of(model, tmp_path, [hook, audit], num_train_epochs=1)
    for _ in range(2):
        trainer.train()
        assert audit.report is not None
        assert audit.report.clean
    assert differing(model, before) == []
    assert hook.handle is not None
    hook.handle.undo()
    assert all(p.requires_grad for p in model.parameters())


def test_a_callback_added_later_freezes_when_the_training_begins(tmp_path: Path) -> None:
    model = net()
    before = backbone(model)
    trainer = trainer_of(model, tmp_path, [], num_train_epochs=1)
    trainer.add_callback(FreezeBackbone())
    trainer.add_callback(DriftAudit(watch="all"))
    trainer.train()
    assert differing(model, before) == []


def test_after_a_failed_run_the_next_one_is_audited_anew(tmp_path: Path) -> None:
    class Fail(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("out of memory")

    audit, model = DriftAudit(watch="all"), net()
    trainer = trainer_of(model, tmp_path, [FreezeBackbone(), audit], num_train_epochs=1)
    trainer.add_callback(Fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.remove_callback(Fail)
    trainer.train()
    assert audit.report is not None
    assert audit.report.clean
    assert audit.report.source.endswith("after 4 steps")


def test_stages_in_a_distributed_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(net(), tmp_path, [FreezeBackbone(unfreeze=STAGES)])
    mode = type(trainer.args).parallel_mode.fget  # type: ignore[attr-defined]
    modes = type(mode(trainer.args))
    monkeypatch.setattr(type(trainer.args), "parallel_mode", property(lambda _: modes.DISTRIBUTED))
    hook = trainer.callback_handler.callbacks[-1]
    with pytest.raises(FreezekitError, match="unfreeze=: DistributedDataParallel would leave"):
        hook.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_train_and_statistics_of_the_rest_do_not(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["convolution"], r=2, modules_to_save=["classifier"])
    model = peft.get_peft_model(net(), config)
    before = {
        n: t.clone() for n, t in model.state_dict().items() if "lora" not in n and "classifier" not in n
    }
    audit = DriftAudit(watch="all")
    trainer_of(model, tmp_path, [FreezeBackbone(), audit], num_train_epochs=1, label_names=["labels"]).train()
    assert differing(model, before) == []
    naive = peft.get_peft_model(net(), config)
    with pytest.raises(DriftError, match="FK101"):
        trainer_of(naive, tmp_path, [DriftAudit()], num_train_epochs=1, label_names=["labels"]).train()
