"""Ignite's handlers in real trainers, beside what people do without them."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, EMAHandler
from ignite.handlers.param_scheduler import PiecewiseLinear
from ignite.handlers.tensorboard_logger import TensorboardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from freezekit import AveragedModel, DriftError, FreezekitError, freeze_backbone
from freezekit.hooks.ignite import DriftAudit, FreezeBackbone

STAGES = {1: "layer2*", 2: ["layer1", "layer1_bn"]}


def watched() -> bool:
    """Tell whether an auditor looks at who sets the mode of a BN layer."""
    return "__setattr__" in vars(nn.BatchNorm1d)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in ("layer1", "layer2"):
        model.add_module(name, nn.Linear(4, 4))
        model.add_module(f"{name}_bn", nn.BatchNorm1d(4))
    model.add_module("fc", nn.Linear(4, 2))
    return zoo.scramble(model)  # type: ignore[return-value]


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 4, generator=generator), torch.randint(2, (8,), generator=generator)) for _ in "1234"
    ]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.1)


def trainer_of(model: nn.Module, optimizer: Any, **options: Any) -> Engine:
    return create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss(), **options)


def naive() -> tuple[nn.Sequential, Any]:
    model = net()
    model[:4].requires_grad_(False)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}])
def test_nothing_frozen_moves(options: dict[str, Any]) -> None:
    model = net()
    before = state_of(model)
    optimizer = adam(model.parameters())
    trainer = trainer_of(model, optimizer, **options)
    hook, audit = FreezeBackbone(), DriftAudit(watch="all")
    audit.attach(trainer, model, optimizer)
    hook.attach(trainer, model, optimizer)
    trainer.run(batches(), max_epochs=2)
    assert moved(model, before) == ["fc.weight", "fc.bias"]
    assert audit.report is not None
    assert audit.report.clean
    assert audit.report.source.endswith(f"after {4 if options else 8} steps")
    assert trainer.state.metrics == {"freezekit/changed": 0.0}
    assert not watched()


def test_nothing_frozen_moves_under_autocast() -> None:
    model = net()
    before = state_of(model)
    optimizer = adam(model.parameters())

    def step(engine: Engine, batch: Any) -> float:
        model.train()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch[0])
            assert output.dtype == torch.bfloat16
            loss = nn.functional.cross_entropy(output, batch[1])
        loss.backward()
        optimizer.step()
        return loss.item()

    trainer, audit = Engine(step), DriftAudit(watch="all", probe=2)
    FreezeBackbone().attach(trainer, model, optimizer)
    audit.attach(trainer, model, optimizer)
    trainer.run(batches(), max_epochs=2)
    assert moved(model, before) == ["fc.weight", "fc.bias"]
    assert audit.report is not None
    assert audit.report.clean


def test_requires_grad_alone_is_found_at_the_first_step_and_explained() -> None:
    model, optimizer = naive()
    trainer, audit = trainer_of(model, optimizer), DriftAudit()
    audit.attach(trainer, model, optimizer)
    with pytest.raises(DriftError, match=r"FK101 layer1_bn at step 1: .*; cause: train-mode forward"):
        trainer.run(batches(), max_epochs=2)
    assert audit.report is not None
    assert {finding.name for finding in audit.report.findings} == {"layer1_bn", "layer2_bn"}
    assert audit.auditor is None
    assert not watched()


def test_drift_goes_to_ignites_logger(tmp_path: Path) -> None:
    model, optimizer = naive()
    trainer, audit = trainer_of(model, optimizer), DriftAudit(on_drift="record")
    audit.attach(trainer, model, optimizer)
    with TensorboardLogger(log_dir=tmp_path) as logger:
        logger.attach_output_handler(trainer, Events.EPOCH_COMPLETED, tag="train", metric_names="all")
        trainer.run(batches(), max_epochs=2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    layers = [
        f"train/freezekit/{k}_bn/{v}" for k in ("layer1", "layer2") for v in ("mean_shift_sigma", "var_ratio")
    ]
    assert sorted(events.Tags()["scalars"]) == ["train/freezekit/changed", *layers]
    assert [event.value for event in events.Scalars("train/freezekit/changed")] == [6.0, 6.0]
    assert audit.report is not None
    shift = audit.report.layers[0].mean_shift_sigma
    assert events.Scalars(layers[0])[-1].value == pytest.approx(shift)


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resumed_run_ends_as_the_whole_one(tmp_path: Path, everything: bool, at: int) -> None:
    """The optimizer has all parameters, or those that train at first and groups for the others."""

    def setup() -> tuple[nn.Module, Engine, DriftAudit, dict[str, Any]]:
        model, hook = (
            net(),
            FreezeBackbone(unfreeze=STAGES, **({} if everything else {"decay": 0.5, "growth": 1.5})),
        )
        if not everything:
            hook.freeze(model)
        optimizer = adam(model.parameters())
        trainer, audit = trainer_of(model, optimizer), DriftAudit(watch="all")
        audit.attach(trainer, model, optimizer)
        hook.attach(trainer, model, optimizer)
        return (
            model,
            trainer,
            audit,
            {"freeze": hook, "model": model, "optimizer": optimizer, "trainer": trainer},
        )

    model, trainer, audit, objects = setup()
    saver = Checkpoint(
        objects, DiskSaver(tmp_path), n_saved=None, global_step_transform=lambda e, _: e.state.epoch
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    trainer.run(batches(), max_epochs=4)
    assert audit.report is not None
    assert audit.report.clean
    again, resumed, watch, objects = setup()
    Checkpoint.load_objects(objects, tmp_path / f"checkpoint_{at}.pt")
    assert [n for n, p in again.named_parameters() if not p.requires_grad] == [
        n for n, _ in net().named_parameters() if n.startswith({1: "layer", 2: "layer1", 3: "none"}[at])
    ]
    resumed.run(batches(), max_epochs=4)
    assert moved(again, state_of(model)) == []
    assert watch.report.clean if watch.report is not None else at == 3  # all of it trains by then


def test_a_resume_with_values_that_had_drifted_is_refused() -> None:
    model, hook = net(), FreezeBackbone(unfreeze=STAGES)
    optimizer = adam(model.parameters())
    trainer = trainer_of(model, optimizer)
    hook.attach(trainer, model, optimizer)
    trainer.run(batches(), max_epochs=1)
    saved = {"model": state_of(model), "freeze": hook.state_dict()}
    saved["model"]["layer1_bn.running_mean"] += 1
    again, other = net(), FreezeBackbone(unfreeze=STAGES)
    optimizer = adam(again.parameters())
    trainer = trainer_of(again, optimizer)
    other.attach(trainer, again, optimizer)
    Checkpoint.load_objects({"model": again, "freeze": other}, saved)
    with pytest.raises(FreezekitError, match=r"other values in the model.*layer1_bn\.running_mean"):
        trainer.run(batches(), max_epochs=2)


def test_the_same_trainer_can_go_back_to_an_earlier_checkpoint() -> None:
    model, hook = net(), FreezeBackbone(unfreeze=STAGES)
    optimizer = adam(model.parameters())
    trainer = trainer_of(model, optimizer)
    hook.attach(trainer, model, optimizer)
    trainer.run(batches(), max_epochs=2)
    saved = {"model": state_of(model), "freeze": copy.deepcopy(hook.state_dict())}
    trainer.run(batches(), max_epochs=4)
    assert hook.handle is not None
    assert hook.handle.frozen == []
    Checkpoint.load_objects({"model": model, "freeze": hook}, saved)
    assert {name.partition(".")[0] for name in hook.handle.frozen} == {"layer1", "layer1_bn"}


def test_a_scheduler_moves_the_rates_of_what_is_unfrozen_later() -> None:
    model, hook = net(), FreezeBackbone(unfreeze={1: "layer2*"})
    hook.freeze(model)
    optimizer = adam(model.parameters())
    trainer, audit = trainer_of(model, optimizer), DriftAudit(watch="all")
    hook.attach(trainer, model, optimizer)
    audit.attach(trainer, model, optimizer)
    rates = PiecewiseLinear(optimizer, "lr", [(0, 0.1), (12, 0.02)])
    trainer.add_event_handler(Events.ITERATION_STARTED, rates)
    before = state_of(model)
    trainer.run(batches(), max_epochs=3)
    assert [group["lr"] for group in optimizer.param_groups] == [optimizer.param_groups[0]["lr"]] * 2
    assert optimizer.param_groups[0]["lr"] < 0.03
    assert len(optimizer.param_groups[1]["params"]) == 4
    assert {name.partition(".")[0] for name in moved(model, before)} == {"layer2", "layer2_bn", "fc"}


def test_ignites_ema_drifts_and_ours_does_not() -> None:
    model = net()
    optimizer = adam(model.parameters())
    trainer, hook = trainer_of(model, optimizer), FreezeBackbone()
    hook.attach(trainer, model, optimizer)
    assert hook.handle is not None
    ema, average = EMAHandler(model, momentum=0.001), AveragedModel(model)
    ema.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: average.update_parameters(model))
    audit, of_theirs = DriftAudit(), DriftAudit(on_drift="record", frozen=hook.handle.frozen)
    of_ours = DriftAudit(frozen=hook.handle.frozen)
    audit.attach(trainer, model, optimizer)
    of_theirs.attach(trainer, ema.ema_model)
    of_ours.attach(trainer, average.module)
    trainer.run(batches(), max_epochs=2)
    for watch, clean in ((audit, True), (of_theirs, False), (of_ours, True)):
        assert watch.report is not None
        assert watch.report.clean is clean
    found = of_theirs.report
    assert found is not None
    assert {finding.code for finding in found.findings} == {"FK103"}
    assert {f.cause.kind for f in found.findings if f.cause} == {"write"}
    # what to do about an average made already
    frozen = {name: tensor for name, tensor in model.state_dict().items() if name in hook.handle.frozen}
    ema.ema_model.load_state_dict(frozen, strict=False)
    for name, tensor in frozen.items():
        assert torch.equal(ema.ema_model.state_dict()[name], tensor)


@pytest.mark.parametrize("skip", [True, False])
def test_a_terminated_run_is_audited_to_its_end(skip: bool) -> None:
    model = net()
    optimizer = adam(model.parameters())
    trainer, audit = trainer_of(model, optimizer), DriftAudit()
    FreezeBackbone().attach(trainer, model, optimizer)
    audit.attach(trainer, model, optimizer)

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    def end() -> None:
        model.layer1.weight.data += 1  # type: ignore[union-attr, operator]
        trainer.terminate(skip_completed=skip)

    with pytest.raises(DriftError, match=r"FK103 layer1\.weight"):
        trainer.run(batches(), max_epochs=2)
    assert not watched()


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("handled", [True, False])
def test_an_error_leaves_no_hook_behind_and_goes_where_it_would(error: BaseException, handled: bool) -> None:
    model, optimizer = naive()
    trainer, audit, told = trainer_of(model, optimizer), DriftAudit(on_drift="record"), []
    audit.attach(trainer, model, optimizer)

    @trainer.on(Events.ITERATION_STARTED(once=3))
    def fail() -> None:
        assert watched()
        raise error

    if handled:

        @trainer.on(Events.EXCEPTION_RAISED)
        def tell(raised: BaseException) -> None:
            told.append(raised)
            raise raised

    with pytest.raises(type(error)):
        trainer.run(batches(), max_epochs=1)
    assert set(told) == ({error} if handled else set())
    assert not watched()
    assert audit.auditor is None
    assert audit.report is not None


def test_a_wrapped_model_is_audited_by_the_names_of_what_is_in_it() -> None:
    model = net()
    wrapped = nn.DataParallel(model)
    optimizer = adam(model.parameters())
    trainer, hook, audit = trainer_of(wrapped, optimizer), FreezeBackbone(), DriftAudit()
    hook.attach(trainer, wrapped, optimizer)
    audit.attach(trainer, wrapped, optimizer)
    trainer.run(batches(), max_epochs=1)
    assert hook.handle is not None
    assert hook.handle.model is model
    assert audit.report is not None
    assert audit.report.layers[0].name == "layer1_bn"


def test_what_is_frozen_may_also_be_frozen_before() -> None:
    model = net()
    freeze_backbone(model)
    optimizer = adam(model.parameters())
    trainer, audit = trainer_of(model, optimizer), DriftAudit()
    audit.attach(trainer, model)
    trainer.run(batches(), max_epochs=1)
    assert audit.report is not None
    assert audit.report.clean


def test_without_ignite_the_error_has_the_command() -> None:
    code = "import sys; sys.modules['ignite'] = None; import freezekit.hooks.ignite"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "FreezekitError: freezekit.hooks.ignite: ignite cannot be imported" in done.stderr
    assert done.stderr.rstrip().endswith("Remedy: pip install 'freezekit[ignite]'")
