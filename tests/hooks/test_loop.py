"""The plain loop's hooks: a schedule, a resume in the middle of it, and an audit that follows it."""

from __future__ import annotations

import copy
import io
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn

from freezekit import DriftError, DriftReport, FreezekitError, audit_checkpoint, unfreeze
from freezekit.hooks.loop import DriftAudit, FreezeBackbone

STAGES = {1: "layer2*", 3: ["layer1", "layer1_bn"]}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name in ("layer1", "layer2"):
        layers[name] = nn.Linear(4, 4)
        layers[f"{name}_bn"] = nn.BatchNorm1d(4)
    layers["fc"] = nn.Linear(4, 2)
    return zoo.scramble(nn.Sequential(layers))  # type: ignore[return-value]


def train(
    model: nn.Module, optimizer: Any, hook: FreezeBackbone, audit: DriftAudit, epochs: range
) -> dict[int, dict[str, Any]]:
    """Train, and return what would be saved after each epoch."""
    saved = {}
    for epoch in epochs:
        hook.start_epoch(epoch)
        audit.start_epoch()
        for step in range(2):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * epoch + step))
            optimizer.zero_grad()
            model.train()(x).square().mean().backward()
            optimizer.step()
        file = io.BytesIO()
        torch.save(
            {"model": model.state_dict(), "hook": hook.state_dict(), "optimizer": optimizer.state_dict()},
            file,
        )
        saved[epoch] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return saved


@pytest.mark.parametrize("everything", [True, False])
def test_a_resumed_run_ends_as_the_whole_one(everything: bool) -> None:
    """The optimizer has all parameters, or only those that train at first."""
    options: dict[str, Any] = {} if everything else {"decay": 0.5, "growth": 1.5}

    def start() -> tuple[nn.Module, FreezeBackbone]:
        model, hook = net(), FreezeBackbone(unfreeze=STAGES, **options)
        hook.freeze(model)
        return model, hook

    def adam(model: nn.Module) -> Any:
        return torch.optim.AdamW([p for p in model.parameters() if everything or p.requires_grad], lr=0.1)

    model, hook = start()
    optimizer = adam(model)
    hook.start(optimizer)
    audit = DriftAudit(watch="all")
    audit.start(model, optimizer)
    saved = train(model, optimizer, hook, audit, range(5))
    assert audit.finish() is not None
    for epoch in range(4):
        again, other = start()
        state = copy.deepcopy(saved[epoch])
        again.load_state_dict(state["model"])
        other.load_state_dict(state["hook"])
        resumed = adam(again)
        other.start(resumed)
        resumed.load_state_dict(state["optimizer"])
        watch = DriftAudit(watch="all")
        watch.start(again, resumed)
        train(again, resumed, other, watch, range(epoch + 1, 5))
        report = watch.finish()
        assert report.clean if report is not None else epoch == 3  # all of it trains by then
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), (epoch, name)


def test_a_resume_with_values_that_had_drifted_is_refused() -> None:
    model, hook = net(), FreezeBackbone(unfreeze={1: "layer2"})
    hook.freeze(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook.start(optimizer)
    saved = train(model, optimizer, hook, DriftAudit(), range(2))[1]
    saved["model"]["layer1_bn.running_mean"] += 1
    again, other = net(), FreezeBackbone(unfreeze={1: "layer2"})
    other.freeze(again)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["hook"])
    other.start(torch.optim.SGD(again.parameters(), lr=0.1))
    with pytest.raises(FreezekitError, match="other values in the model.*layer1_bn.running_mean"):
        other.start_epoch(2)


def test_other_stages_than_those_saved_are_refused() -> None:
    hook = FreezeBackbone(unfreeze=STAGES)
    hook.freeze(net())
    other = FreezeBackbone(unfreeze={2: "layer2"})
    with pytest.raises(FreezekitError, match=r"unfreeze=: the state was saved with other stages"):
        other.load_state_dict(hook.state_dict())


def test_the_same_run_can_go_back_to_an_earlier_checkpoint() -> None:
    model, hook = net(), FreezeBackbone(unfreeze=STAGES)
    hook.freeze(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook.start(optimizer)
    saved = train(model, optimizer, hook, DriftAudit(), range(4))
    assert hook.handle is not None
    assert hook.handle.frozen == []
    model.load_state_dict(saved[1]["model"])
    hook.load_state_dict(saved[1]["hook"])
    assert {name.partition(".")[0] for name in hook.handle.frozen} == {"layer1", "layer1_bn"}


def test_a_state_that_is_loaded_after_the_start_counts_too() -> None:
    """As Accelerate loads it: last of all. The optimizer has all parameters, so its own state fits before."""
    model, hook = net(), FreezeBackbone(unfreeze=STAGES)
    hook.freeze(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook.start(optimizer)
    saved = train(model, optimizer, hook, DriftAudit(), range(2))[1]
    again, other = net(), FreezeBackbone(unfreeze=STAGES)
    other.freeze(again)
    resumed = torch.optim.SGD(again.parameters(), lr=0.1)
    other.start(resumed)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    other.load_state_dict(saved["hook"])
    assert [len(group["params"]) for group in resumed.param_groups] == [10]
    assert other.handle is not None
    assert hook.handle is not None
    assert other.handle.frozen == hook.handle.frozen
    assert other.start_epoch(1) == []
    saved["model"]["layer1.weight"] += 1
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["hook"])
    with pytest.raises(FreezekitError, match=r"other values in the model.*layer1\.weight"):
        other.start_epoch(2)


def test_a_second_run_of_the_same_model_resumes_with_its_own_optimizer() -> None:
    """Not with that of the first run, which has by then what is to be unfrozen."""

    def sgd() -> Any:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    model, hook = net(), FreezeBackbone(unfreeze=STAGES, decay=0.5)
    hook.freeze(model)
    optimizer = sgd()
    hook.start(optimizer)
    saved = train(model, optimizer, hook, DriftAudit(), range(4))[1]
    hook.freeze(model)
    model.load_state_dict(saved["model"])
    hook.load_state_dict(saved["hook"])
    again = sgd()
    hook.start(again)
    assert [(len(group["params"]), group["lr"]) for group in again.param_groups] == [
        (2, 0.1),
        (4, 0.1 * 0.5),
        (0, 0.1 * 0.25),
    ]


def test_a_second_run_of_the_same_model_goes_on_with_the_stages_that_are_left() -> None:
    model, hook = net(), FreezeBackbone(unfreeze=STAGES)
    hook.freeze(model)
    hook.start(torch.optim.SGD(model.parameters(), lr=0.1))
    hook.start_epoch(1)
    hook.freeze(model)
    hook.start(torch.optim.SGD(model.parameters(), lr=0.1))
    assert hook.start_epoch(1) == []
    assert hook.start_epoch(3)[0] == "layer1.weight"
    hook.start(torch.optim.SGD(model.parameters(), lr=0.1))
    assert hook.schedule is None
    other = net()
    hook.freeze(other)
    hook.start(torch.optim.SGD(other.parameters(), lr=0.1))
    assert len(hook.start_epoch(3)) == 8


def test_several_optimizers_and_no_parameter_in_two_of_them() -> None:
    model, hook = net(), FreezeBackbone(unfreeze={1: "layer2", 2: "layer1"}, lr=0.5)
    hook.freeze(model)
    one = torch.optim.SGD(model.fc.parameters(), lr=0.1)  # type: ignore[union-attr]
    two = torch.optim.SGD(model.layer2.parameters(), lr=0.2)  # type: ignore[union-attr]
    hook.start([one, two])
    hook.start_epoch(2)
    assert [len(g["params"]) for g in one.param_groups] == [2, 2]
    assert one.param_groups[1]["lr"] == 0.5
    assert [len(g["params"]) for g in two.param_groups] == [2]


def test_a_stage_under_ddp_is_refused_with_the_call_to_make() -> None:
    hook, model = FreezeBackbone(unfreeze=STAGES), net()
    hook.freeze(model)
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    with pytest.raises(FreezekitError, match="unsynchronised.*unfrozen before it is wrapped"):
        hook.start(torch.optim.SGD(model.parameters(), lr=0.1), wrapped)


def test_calls_out_of_turn_say_what_to_call_first() -> None:
    hook = FreezeBackbone()
    for call in (lambda: hook.start(torch.optim.SGD(net().parameters(), lr=0.1)), hook.state_dict):
        with pytest.raises(FreezekitError, match=r"nothing is frozen yet.*call \.freeze\(model\) first"):
            call()


def test_the_manifest_has_the_digests_of_the_start() -> None:
    """What drifts later does not get a manifest that says it had been so from the first."""
    hook, model = FreezeBackbone(), net()
    hook.freeze(model)
    first = hook.manifest()
    model.layer1.weight.data += 1  # type: ignore[union-attr, operator]
    assert hook.manifest() == first


def test_what_stays_frozen_after_a_stage_keeps_its_digests_of_the_start() -> None:
    hook, model = FreezeBackbone(unfreeze={1: "layer2"}), net()
    hook.freeze(model)
    hook.start(torch.optim.SGD(model.parameters(), lr=0.1))
    first = {tensor.name: tensor for tensor in hook.manifest().tensors}
    model.layer1.weight.data += 1  # type: ignore[union-attr, operator]
    hook.start_epoch(1)
    assert hook.manifest().tensors == tuple(
        first[name] for name in first if name not in ("layer2.weight", "layer2.bias")
    )
    assert hook.handle is not None
    assert hook.handle.manifest().tensors != hook.manifest().tensors  # which has those of now


@pytest.mark.parametrize("inside", [True, False])
def test_a_checkpoint_with_the_hooks_manifest_is_audited(inside: bool, tmp_path: Path) -> None:
    hook, model = FreezeBackbone(), net()
    hook.freeze(model)
    for file, clean in (("right.pth", True), ("wrong.pth", False)):
        state = hook.state_dict()
        told = {"freeze": state} if inside else {"freezekit_manifest": state["manifest"]}
        torch.save({"state_dict": model.state_dict(), **told}, tmp_path / file)
        assert audit_checkpoint(tmp_path / file).clean is clean
        model.layer1_bn.running_var.mul_(2)  # type: ignore[union-attr, operator]


def test_the_audit_finds_what_the_naive_way_does_and_saves_it(tmp_path: Path) -> None:
    model = net()
    model[:4].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    audit = DriftAudit(on_drift="record", save=tmp_path / "drift.json")
    assert audit.scalars() == {}
    assert audit.finish() is None
    audit.start(model, optimizer)
    assert audit.scalars() == {"freezekit/changed": 0.0}
    hook = FreezeBackbone()
    hook.freeze(net())
    train(model, optimizer, hook, audit, range(1))
    scalars = audit.scalars()
    report = audit.finish()
    assert report is not None
    assert report == audit.report == DriftReport.load(tmp_path / "drift.json")
    assert [f.name for f in report.findings] == ["layer1_bn", "layer2_bn"]
    assert scalars == {
        "freezekit/changed": 6.0,
        **{
            f"freezekit/{layer.name}/{key}": getattr(layer, key)
            for layer in report.layers
            for key in ("mean_shift_sigma", "var_ratio")
        },
    }


def test_what_the_last_step_left_is_found_at_the_end_and_the_report_is_saved(tmp_path: Path) -> None:
    model, hook = net(), FreezeBackbone()
    hook.freeze(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    audit = DriftAudit(save=tmp_path / "drift.json")
    audit.start(model, optimizer)
    model.layer1.weight.data += 1  # type: ignore[union-attr, operator]
    with pytest.raises(DriftError, match=r"FK103 layer1\.weight"):
        audit.finish()
    assert DriftReport.load(tmp_path / "drift.json").changed == ("layer1.weight",)
    assert audit.auditor is None


def test_after_an_error_nothing_is_watched_and_what_is_known_is_saved(tmp_path: Path) -> None:
    model, hook = net(), FreezeBackbone()
    hook.freeze(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    audit = DriftAudit(save=tmp_path / "drift.json")
    audit.start(model, optimizer)
    audit.stop()
    assert audit.report == DriftReport.load(tmp_path / "drift.json")
    model.layer1.weight.data += 1  # type: ignore[union-attr, operator]
    model.train()(torch.randn(8, 4)).sum().backward()
    optimizer.step()


def test_what_somebody_else_unfreezes_between_epochs_is_not_drift() -> None:
    model, hook = net(), FreezeBackbone()
    hook.freeze(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    audit = DriftAudit(watch="all")
    audit.start(model, optimizer)
    train(model, optimizer, hook, audit, range(1))
    unfreeze(model, "layer2*")
    train(model, optimizer, hook, audit, range(1, 2))
    report = audit.finish()
    assert report is not None
    assert report.clean
    assert report.compared == 14


def test_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="freezekit"):
        hook, model = FreezeBackbone(unfreeze={1: "layer2"}), net()
        hook.freeze(model)
        hook.start(torch.optim.SGD(model.parameters(), lr=0.1))
        hook.start_epoch(1)
    assert caplog.messages == [
        "froze 14 tensors of a Sequential",
        "epoch 1: 2 more parameters train, from layer2.weight",
    ]


def test_to_audit_what_nobody_has_frozen_is_a_mistake() -> None:
    model = net()
    with pytest.raises(FreezekitError, match=r"DriftAudit: nothing in the model is.*add FreezeBackbone too"):
        DriftAudit().start(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_steps_that_torch_does_not_tell_of_are_counted_when_told() -> None:
    """As those of fastai's optimizers; those of torch's are counted once, told or not."""
    for told in (False, True):
        hook, model = FreezeBackbone(), net()
        hook.freeze(model)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        audit = DriftAudit(every=2)
        audit.start(
            model, type("Other", (), {"param_groups": optimizer.param_groups})() if told else optimizer
        )
        for _ in range(3):
            audit.stepped()
            if not told:
                optimizer.step()
        assert audit.auditor is not None
        assert audit.auditor.step == 3
        model.layer1.weight.data += 1  # type: ignore[union-attr, operator]
        with pytest.raises(DriftError, match=r"FK103 layer1\.weight at step 4"):
            audit.stepped() if told else optimizer.step()
        audit.stop()


def test_what_somebody_else_sets_to_require_a_gradient_is_unfrozen_with_its_layers() -> None:
    hook = FreezeBackbone(unfreeze={1: "layer1*"})
    hook.follow()
    model = net()
    model.layer2.requires_grad_(False)  # type: ignore[union-attr]
    handle = hook.freeze(model)
    hook.follow()
    assert len(handle.frozen) == 14
    model[2:4].requires_grad_(True)
    hook.follow(but=model.layer2.parameters())  # type: ignore[union-attr]
    assert {name.partition(".")[0] for name in handle.frozen} == {"layer1", "layer1_bn", "layer2"}
    assert type(model.layer2_bn) is nn.BatchNorm1d
    assert not model.layer2.weight.requires_grad  # type: ignore[union-attr]
    model.requires_grad_(True)
    hook.follow()
    assert handle.frozen == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    hook.start(torch.optim.SGD(model.parameters(), lr=0.1))
    assert hook.schedule is None


def test_the_same_optimizer_again_gets_no_groups_twice() -> None:
    model, hook = net(), FreezeBackbone(head="fc", unfreeze=STAGES)
    hook.freeze(model)
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.1)
    hook.start(optimizer)
    hook.start_epoch(0), hook.start_epoch(1)
    hook.freeze(model)  # a second run
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which refuses a group that is added later
    hook.start(optimizer)
    hook.start_epoch(0), hook.start_epoch(3)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4, 4]
    assert hook.handle is not None
    assert hook.handle.frozen == []


def test_an_audit_that_ends_in_an_error_of_what_was_unfrozen_late_is_over(tmp_path: Path) -> None:
    model = net()
    model.requires_grad_(False)
    untouched = nn.Module.__setattr__
    audit = DriftAudit(save=tmp_path / "drift.json")
    audit.start(model)
    model.fc.requires_grad_(True)
    model.layer1.weight.data += 1
    with pytest.raises(DriftError, match=r"FK103 layer1\.weight"):
        audit.finish()
    assert audit.auditor is None
    assert nn.Module.__setattr__ is untouched  # what the auditor wraps is put back
    assert audit.report is not None
    assert audit.report.changed == ("layer1.weight",)
    assert (tmp_path / "drift.json").is_file()


def test_what_is_named_is_audited_though_all_of_the_model_trains() -> None:
    model, hook = net(), FreezeBackbone(head="fc")
    hook.freeze(model).undo()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    audit = DriftAudit(frozen="layer1", on_drift="record")
    audit.start(model, optimizer)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    report = audit.finish()
    assert report is not None
    assert "layer1.weight" in report.changed


def test_other_values_in_a_resumed_run_are_told_of_without_what_only_restoring_has() -> None:
    model, hook = net(), FreezeBackbone(head="fc")
    hook.freeze(model)
    state = hook.state_dict()
    hook.load_state_dict(state)
    model.layer1.weight.data += 1
    with pytest.raises(FreezekitError) as caught:
        hook.start_epoch(0)
    assert caught.value.remedy == (
        "load the checkpoint that was saved with the manifest before verifying; if that was done, they had "
        "drifted by then"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_saves_the_report(tmp_path: Path, rank: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = net()
    model.layer1.requires_grad_(False)
    audit = DriftAudit(save=tmp_path / "drift.json")
    torch.distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    try:
        audit.start(model)
        assert audit.finish() is not None
    finally:
        torch.distributed.destroy_process_group()
    assert (tmp_path / "drift.json").is_file() == (rank == 0)


def test_the_manifest_has_the_digests_from_before_the_first_epoch() -> None:
    model, hook = net(), FreezeBackbone(head="fc")
    hook.freeze(model)
    hook.start(torch.optim.SGD(model.parameters(), lr=0.1))
    hook.start_epoch(0)
    model.layer1.weight.data += 1
    hook.load_state_dict(hook.state_dict())
    with pytest.raises(FreezekitError, match=r"other values .*'layer1\.weight'"):
        hook.start_epoch(1)


@pytest.mark.parametrize(
    ("unfreeze", "said"),
    [
        ({"1": "layer2"}, r"unfreeze=: not an epoch \(got '1'\)\. Remedy: give a whole number from 0 on"),
        ({-1: "layer2"}, r"unfreeze=: not an epoch \(got -1\)"),
        (["layer2"], r"unfreeze=: not a mapping \(got \['layer2'\]\)\. Remedy: .* as in \{1: \"layer4\"\}"),
    ],
)
def test_stages_that_cannot_be_are_refused_at_once(unfreeze: Any, said: str) -> None:
    with pytest.raises(FreezekitError, match=said):
        FreezeBackbone(unfreeze=unfreeze)


def test_a_forgotten_start_is_told_of() -> None:
    hook = FreezeBackbone(unfreeze={1: "layer2"})
    hook.freeze(net())
    with pytest.raises(
        FreezekitError, match=r"start_epoch: no optimizer was given.*call \.start\(optimizer\)"
    ):
        hook.start_epoch(0)
    with pytest.raises(FreezekitError, match=r"epoch: not an epoch \(got '1'\)"):
        hook.start_epoch("1")  # type: ignore[arg-type]
    other = FreezeBackbone()
    other.freeze(net())
    assert other.start_epoch(0) == []


def test_an_optimizer_that_cannot_take_a_group_is_refused_in_the_hooks_words() -> None:
    hook, model = FreezeBackbone(unfreeze={1: "layer2"}), net()
    hook.freeze(model)
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.1)  # type: ignore[union-attr]
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(
        FreezekitError, match=r"scheduler: 1\)\. Remedy: make the optimizer of model\.parameters"
    ):
        hook.start(optimizer)


def test_a_report_that_could_not_be_saved_is_told_of_before_training(tmp_path: Path) -> None:
    hook, model = FreezeBackbone(), net()
    hook.freeze(model)
    audit = DriftAudit(save=tmp_path / "nowhere" / "drift.json")
    with pytest.raises(FreezekitError, match="save=: there is no such folder .*nowhere.*make it first"):
        audit.start(model)
    assert audit.auditor is None
