"""The live auditor: every fault is injected before it is said to be detected."""

from __future__ import annotations

import gc
import json
import pickle
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import freezekit
from freezekit import DriftAuditor, DriftError, DriftWarning, Finding, FreezekitError, SelectionError
from freezekit.audit.findings import CAUSES


class Counting(nn.Module):
    """Has a buffer of its own, moved by its forward in train mode, and a non-persistent one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        return x * self.weight


def model_and_optimizer(freeze: str = "naive") -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    model = nn.ModuleDict(
        {"bn": nn.BatchNorm1d(3), "own": Counting(), "lin": nn.Linear(3, 3), "fc": nn.Linear(3, 2)}
    )
    zoo.scramble(model)
    if freeze == "naive":
        for name in ("bn", "own", "lin"):
            model[name].requires_grad_(False)
    elif freeze == "ours":
        freezekit.freeze(model, ["bn", "own", "lin"])
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def kind(finding: Finding) -> str:
    assert finding.cause is not None
    return finding.cause.kind


def step(model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    optimizer.zero_grad()
    x = torch.randn(8, 3) * 2 + 1
    model["fc"](model["lin"](model["own"](model["bn"](x)))).square().mean().backward()
    optimizer.step()


def test_naive_freezing_is_caught_at_the_first_step_and_explained() -> None:
    model, optimizer = model_and_optimizer()
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        for _ in range(3):
            step(model, optimizer)
    report = auditor.report()
    assert not report.clean
    assert [(f.code, f.name, f.step) for f in report.findings] == [
        ("FK101", "bn", 1),
        ("FK104", "own.seen", 1),
    ]
    assert report.findings[0].message.endswith("over 3 batches")
    assert [kind(f) for f in report.findings] == ["train-mode forward"] * 2
    assert "freeze_backbone" in report.findings[0].fix
    assert report.changed == ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "own.seen")
    (layer,) = report.layers
    assert (layer.name, layer.kind, layer.channels, layer.batches, layer.step) == (
        "bn",
        "BatchNorm1d",
        3,
        3,
        1,
    )


def test_statistics_and_weight_of_one_layer_each_have_their_own_cause() -> None:
    model, _ = model_and_optimizer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        model.train()
        model["fc"](model["lin"](model["own"](model["bn"](torch.randn(8, 3))))).sum().backward()
        for parameter in model["bn"].parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    found = {(f.code, f.name): kind(f) for f in auditor.report().findings}
    assert found == {
        ("FK103", "bn.weight"): "weight decay",
        ("FK103", "bn.bias"): "weight decay",
        ("FK101", "bn"): "train-mode forward",
        ("FK104", "own.seen"): "train-mode forward",
    }


@pytest.mark.parametrize("when", ["before attach", "after detach", "between"])
def test_what_moved_while_nobody_watched_has_no_cause(when: str) -> None:
    model, optimizer = model_and_optimizer()
    auditor = DriftAuditor(model, optimizer, on_drift="record")

    def train() -> None:
        step(model, optimizer)
        with torch.no_grad():
            model["lin"].weight.mul_(1.5)

    if when == "before attach":
        train()
        model.eval()
    with auditor:
        auditor.check()
    if when != "before attach":
        train()
        model.eval()
    if when == "between":
        with auditor:
            auditor.check()
    found = {(f.code, f.name): kind(f) for f in auditor.report().findings}
    assert found == dict.fromkeys(
        [("FK101", "bn"), ("FK104", "own.seen"), ("FK103", "lin.weight")], "unknown"
    )
    if when == "between":
        with auditor:  # what is seen again is told
            step(model, optimizer)
        assert kind(auditor.report().findings[0]) == "train-mode forward"


def test_a_layer_put_in_anothers_place_is_not_said_to_train_for_longer_than_it_is_there() -> None:
    model, optimizer = model_and_optimizer("ours")
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        twin = nn.BatchNorm1d(3).requires_grad_(False)
        twin.load_state_dict(model["bn"].state_dict())
        model["bn"] = twin
        assert auditor.check() == []
        step(model, optimizer)
    (finding,) = auditor.report().findings
    assert str(finding.cause) == "train-mode forward (in train mode)"


@pytest.mark.filterwarnings("ignore:.*torch.jit:")
@pytest.mark.parametrize("options", [{}, {"watch": "all"}, {"watch": "norm"}, {"snapshot": "digest"}])
def test_scripted_layers_are_watched_like_others(options: dict[str, Any]) -> None:
    model, _ = model_and_optimizer()
    model["own"] = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False)).eval())
    for parameter in model["own"].parameters():
        parameter.requires_grad_(False)
    model["bn"].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with DriftAuditor(model, optimizer, on_drift="record", **options) as auditor:
        for training in (False, True):
            model["own"].train(training)
            model["fc"](model["lin"](model["own"](model["bn"](torch.randn(8, 3))))).sum().backward()
            optimizer.step()
        with torch.no_grad():
            getattr(model["own"], "0").weight[1] += 1
    found = {(f.code, f.name, f.step) for f in auditor.report().findings}
    assert found == {("FK101", "own.0", 2), ("FK103", "own.0.weight", 2)}


def test_an_auditor_dropped_with_its_optimizer_lets_go_of_the_model() -> None:
    setter = vars(nn.Module)["load_state_dict"]
    model, optimizer = model_and_optimizer("ours")
    auditor = DriftAuditor(model, optimizer).attach()
    assert vars(nn.Module)["load_state_dict"] is not setter
    gone = weakref.ref(model)
    del model, optimizer, auditor  # as in a notebook's cell that is run again
    gc.collect()  # finds the auditor
    gc.collect()  # and what it held
    assert gone() is None
    assert vars(nn.Module)["load_state_dict"] is setter


def test_the_size_of_the_drift_is_in_sigmas() -> None:
    model, optimizer = model_and_optimizer("ours")
    bn = model["bn"]
    mean, var = bn.running_mean.clone().double(), bn.running_var.clone().double()
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        bn.running_mean[1] += 2
        bn.running_var[2] *= 4
    (layer,) = auditor.report().layers
    sigma = (var + bn.eps).sqrt()
    shift = ((bn.running_mean.double() - mean).abs() / sigma).max()
    assert layer.mean_shift_sigma == pytest.approx(float(shift))
    assert layer.var_ratio == pytest.approx(float(((4 * var[2] + bn.eps).sqrt()) / sigma[2]))


def test_our_freeze_is_clean() -> None:
    model, optimizer = model_and_optimizer("ours")
    with DriftAuditor(model, optimizer) as auditor:
        for _ in range(5):
            step(model, optimizer)
    assert auditor.step == 5
    report = auditor.report()
    assert report.clean
    assert report.compared == 10
    assert report.changed == ()


def _reshape(model: nn.ModuleDict) -> None:
    model["bn"].running_mean = torch.zeros(4)


def _replace(model: nn.ModuleDict) -> None:
    model["lin"].weight = nn.Parameter(model["lin"].weight.detach().clone() + 1e-6, requires_grad=False)


def _remove(model: nn.ModuleDict) -> None:
    del model["own"].hidden


def _drop_variance(model: nn.ModuleDict) -> None:
    model["bn"].running_var = None


FAULTS: dict[str, tuple[Callable[[nn.ModuleDict], object], str, str, str]] = {
    "statistics": (lambda m: m["bn"].running_var.mul_(1.0001), "FK101", "bn", "spread by x1"),
    "counter alone": (lambda m: m["bn"].num_batches_tracked.add_(1), "FK102", "bn", "tracked went from"),
    "one bit of a parameter": (
        lambda m: m["lin"].weight.data.view(torch.int32)[0, 0].bitwise_xor_(1),
        "FK103", "lin.weight", "1 of 9",
    ),
    "sign of a zero": (lambda m: m["lin"].bias.data.neg_(), "FK103", "lin.bias", "3 of 3 values$"),
    "replaced parameter": (_replace, "FK103", "lin.weight", "9 of 9 values by up to"),
    "buffer": (lambda m: m["own"].seen.add_(1), "FK104", "own.seen", "2 of 2 values by up to 1"),
    "non-persistent buffer": (lambda m: m["own"].hidden.zero_(), "FK104", "own.hidden", "buffer changed"),
    "reshaped": (_reshape, "FK105", "bn.running_mean", r"reshaped from \[3\] to \[4\]"),
    "recast": (lambda m: m["lin"].half(), "FK105", "lin.weight", "recast from float32 to float16"),
    "missing": (_remove, "FK105", "own.hidden", "is missing"),
    "missing variance": (_drop_variance, "FK105", "bn.running_var", "missing"),
    "added": (lambda m: m["own"].register_buffer("new", torch.ones(3)), "FK105", "own.new", "was added"),
    "NaN": (lambda m: m["bn"].running_mean.fill_(float("nan")), "FK101", "bn", "changed"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults(fault: str) -> None:
    inject, code, name, message = FAULTS[fault]
    model, optimizer = model_and_optimizer("ours")
    model["lin"].bias.data.zero_()
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        optimizer.step()
        assert auditor.check() == []
        inject(model)
        optimizer.step()
    report = auditor.report()
    found = {(f.code, f.name): f for f in report.findings}
    assert (code, name) in found
    finding = found[code, name]
    assert finding.step == 2
    assert re.search(message, finding.message), finding.message
    json.loads(report.to_json())
    assert finding.code in str(report)


def test_nan_equals_nan() -> None:
    model, optimizer = model_and_optimizer("ours")
    model["bn"].running_mean.fill_(float("nan"))
    with DriftAuditor(model, optimizer) as auditor:
        optimizer.step()
    assert auditor.report().clean


def test_raise_is_the_default_and_stops_the_loop() -> None:
    model, optimizer = model_and_optimizer()
    steps = 0
    with (
        pytest.raises(DriftError, match=r"FK101 bn at step 1: .* \(and 1 more\)\. Remedy: ") as caught,
        DriftAuditor(model, optimizer),
    ):
        for _ in range(3):
            step(model, optimizer)
            steps += 1
    assert steps == 0
    assert caught.value.report.findings[0].name == "bn"


def test_warn_says_each_thing_once() -> None:
    model, optimizer = model_and_optimizer()
    with warnings.catch_warnings(record=True) as caught, DriftAuditor(model, optimizer, on_drift="warn"):
        warnings.simplefilter("always")
        for _ in range(3):
            step(model, optimizer)
        model["lin"].weight.data += 1
        step(model, optimizer)
    assert [w.category for w in caught] == [DriftWarning] * 2
    assert "FK101 bn at step 1" in str(caught[0].message)
    assert "FK103 lin.weight at step 4" in str(caught[1].message)


def test_every_so_many_steps() -> None:
    model, optimizer = model_and_optimizer()
    with DriftAuditor(model, optimizer, every=3, on_drift="record") as auditor:
        for _ in range(4):
            step(model, optimizer)
    assert {f.step for f in auditor.report().findings} == {3}


def test_without_an_optimizer_it_follows_those_of_the_model() -> None:
    model, optimizer = model_and_optimizer()
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with DriftAuditor(model, on_drift="record") as auditor:
        for _ in range(2):
            step(model, optimizer)
            other.step()
    assert auditor.step == 2
    step(model, optimizer)
    assert auditor.step == 2  # detached


def test_attach_needs_no_with() -> None:
    model, optimizer = model_and_optimizer()
    auditor = DriftAuditor(model, optimizer, on_drift="record").attach()
    assert auditor.attach() is auditor  # twice is once
    step(model, optimizer)
    auditor.detach()
    assert auditor.step == 1
    assert not auditor.report().clean


def test_an_exception_in_the_loop_is_not_masked() -> None:
    model, optimizer = model_and_optimizer()
    with pytest.raises(KeyError, match="mine"), DriftAuditor(model, optimizer):
        model["bn"].running_mean.add_(1)
        raise KeyError("mine")


def test_drift_after_the_last_step_is_found_on_leaving() -> None:
    model, optimizer = model_and_optimizer("ours")
    with pytest.raises(DriftError, match="FK101"), DriftAuditor(model, optimizer):
        step(model, optimizer)
        model["bn"].running_mean.add_(1)


def test_frozen_as_globs_or_as_a_handle() -> None:
    model, optimizer = model_and_optimizer("not at all")
    auditor = DriftAuditor(model, optimizer, frozen=["bn"], on_drift="record")
    with auditor:
        step(model, optimizer)
    assert {f.name for f in auditor.report().findings} == {"bn", "bn.weight", "bn.bias"}
    handle = freezekit.freeze(model, "bn")
    assert DriftAuditor(model, frozen=handle.frozen).report().compared == 5


def test_buffers_without_parameters_go_with_their_surroundings() -> None:
    model = nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)),
            "top": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)),
        }
    )
    model["body"].requires_grad_(False)
    names = {layer.name for layer in DriftAuditor(model).report().layers}
    assert names == {"body.1"}


def test_wrong_use() -> None:
    model, optimizer = model_and_optimizer("not at all")
    with pytest.raises(FreezekitError, match=r"nothing in the model is frozen.*freeze_backbone"):
        DriftAuditor(model, optimizer)
    with pytest.raises(SelectionError, match="did you mean 'bn'"):
        DriftAuditor(model, optimizer, frozen="bm")
    with pytest.raises(FreezekitError, match="on_drift=: unknown reaction .got 'panic'"):
        DriftAuditor(model, optimizer, frozen="bn", on_drift="panic")  # type: ignore[arg-type]
    with pytest.raises(FreezekitError, match="every="):
        DriftAuditor(model, optimizer, frozen="bn", every=0)
    with pytest.raises(FreezekitError, match="optimizer=: not an optimizer"):
        DriftAuditor(model, "sgd", frozen="bn")  # type: ignore[arg-type]
    with pytest.raises(FreezekitError, match="model: not a model .got dict"):
        DriftAuditor({})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_real_architectures(name: str) -> None:
    head = zoo.ZOO[name][2]
    for how in ("naive", "ours"):
        model, x = zoo.make(name), zoo.images(name)
        if how == "ours":
            freezekit.freeze_backbone(model)
        else:
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter_name.startswith(head))
        bn = [n for n, m in model.named_modules() if getattr(m, "running_mean", None) is not None]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        with DriftAuditor(model, optimizer, on_drift="record") as auditor:
            zoo.train(model, optimizer, x, steps=2)
        report = auditor.report()
        assert [layer.name for layer in report.layers] == bn
        if how == "ours":
            assert report.clean
        else:
            assert [f.name for f in report.findings] == bn
            assert len(report.changed) == 3 * len(bn)
            assert all(f.step == 1 for f in report.findings)


def test_a_layer_frozen_in_part_is_no_alarm() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with DriftAuditor(model, optimizer):
        model(torch.randn(4, 3)).sum().backward()
    model[0].register_buffer("new", torch.ones(1))
    assert DriftAuditor(model).check() == []


def test_buffers_of_held_layers_are_watched_whatever_is_beside_them() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    auditor = DriftAuditor(model)
    assert auditor.report().layers == ()
    assert (
        "1.running_mean, 1.running_var, 1.num_batches_tracked; name them in frozen="
        in auditor.report().notes[0]
    )
    handle = freezekit.freeze_backbone(model, head="2")
    auditor = DriftAuditor(model, on_drift="record")
    assert auditor.report().compared == len(handle.frozen)
    assert auditor.report().notes == ()
    model[1].running_mean.add_(1)
    assert [f.code for f in auditor.check()] == ["FK101"]


ODD: dict[str, tuple[Callable[[], torch.Tensor], Callable[[nn.Module], object]]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), lambda m: setattr(m, "odd", torch.eye(3).to_sparse() * 2)),
    "csr": (
        lambda: torch.eye(3).to_sparse_csr(),
        lambda m: setattr(m, "odd", torch.eye(3).to_sparse_csr() * 2),
    ),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), lambda m: m.odd.add_(2j)),
    "complex32": (lambda: torch.zeros(3, dtype=torch.complex32), lambda m: m.odd.real.fill_(1)),
    "large int": (lambda: torch.full((3,), 2**62), lambda m: m.odd.add_(1)),
    "float8": (
        lambda: torch.ones(3).to(torch.float8_e4m3fnuz),
        lambda m: setattr(m, "odd", torch.zeros(3).to(torch.float8_e4m3fnuz)),
    ),
    "conjugated": (lambda: torch.ones(3, dtype=torch.complex64).conj(), lambda m: m.odd.add_(2j)),
    "meta": (lambda: torch.ones(3), lambda m: setattr(m, "odd", torch.ones(3, device="meta"))),
    "made on meta": (lambda: torch.ones(3, device="meta"), lambda m: setattr(m, "odd", torch.ones(3))),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # torch's, that some of these are experimental
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors(kind: str) -> None:
    make, change = ODD[kind]
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(1), requires_grad=False)
    model.register_buffer("odd", make())
    auditor = DriftAuditor(model, on_drift="record")
    assert auditor.check() == []
    change(model)
    (finding,) = auditor.check()
    assert (finding.code, finding.name) == ("FK104", "odd")
    assert "buffer changed" in finding.message
    assert "odd" in str(auditor.report())
    json.loads(auditor.report().to_json())


def test_statistics_that_became_nan_are_said_to_be() -> None:
    model, optimizer = model_and_optimizer()
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        model["bn"].train()(torch.full((4, 3), torch.nan))
        optimizer.step()
    found = {f.code: f.message for f in auditor.report().findings}
    assert found["FK101"] == "running statistics changed over 1 batch"
    assert found["FK401"] == "6 of 6 values are NaN or infinite"


def test_the_error_survives_pickling() -> None:
    model, optimizer = model_and_optimizer()
    with pytest.raises(DriftError) as caught, DriftAuditor(model, optimizer):
        step(model, optimizer)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert str(copied) == str(caught.value)
    assert copied.report == caught.value.report


def test_a_nan_that_stays_is_no_change() -> None:
    model, optimizer = model_and_optimizer("ours")
    model["lin"].weight.data[0, 0] = torch.nan
    auditor = DriftAuditor(model, optimizer, on_drift="record")
    model["lin"].weight.data[1, 1] += 1
    (finding,) = auditor.check()
    assert finding.message == "parameter changed: 1 of 9 values by up to 1"


def test_the_size_of_the_drift_uses_the_layers_own_eps() -> None:
    model, optimizer = model_and_optimizer("ours")
    bn = model["bn"]
    bn.eps = 0.5
    bn.running_var.fill_(0.5)
    auditor = DriftAuditor(model, optimizer, on_drift="record")
    bn.running_mean[1] += 2
    auditor.check()
    (layer,) = auditor.report().layers
    assert layer.mean_shift_sigma == pytest.approx(2.0)


def test_eval_mode_is_not_called_train_mode() -> None:
    model, optimizer = model_and_optimizer("ours")
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        model["bn"].running_mean[1] += 2
        (finding,) = auditor.check()
    assert kind(finding) == "write"


def test_the_mode_told_is_that_of_the_layer() -> None:
    model, optimizer = model_and_optimizer()
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        model.eval()
        model["bn"].train()
        model["bn"](torch.randn(4, 3))
        (finding,) = auditor.check()
    assert kind(finding) == "train-mode forward"


@pytest.mark.parametrize("watch", ["rolling", "all", "norm"])
@pytest.mark.parametrize("snapshot", ["copy", "digest"])
@pytest.mark.parametrize("keep", ["device", "host"])
def test_every_way_to_watch_sees_the_naive_freeze(watch: Any, snapshot: Any, keep: Any) -> None:
    for how in ("naive", "ours"):
        model, optimizer = model_and_optimizer(how)
        with DriftAuditor(
            model, optimizer, on_drift="record", watch=watch, snapshot=snapshot, keep=keep
        ) as auditor:
            for _ in range(2):
                step(model, optimizer)
        report = auditor.report()
        assert report.clean == (how == "ours")
        assert report.compared == (5 if watch == "norm" else 10)
        if how == "naive":
            finding = report.findings[0]
            assert (finding.code, finding.name, finding.step) == ("FK101", "bn", 1)
            assert kind(finding) == "train-mode forward"
            assert ("sigma" in finding.message) == (snapshot == "copy")
            moments = report.layers[0].timeline
            assert [moment.step for moment in moments] == [1, 2]
            assert [m.num_batches_tracked for m in moments] == [
                report.layers[0].num_batches_tracked - 1,
                report.layers[0].num_batches_tracked,
            ]
            assert all((m.mean_shift_sigma is None) == (snapshot == "digest") for m in moments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("snapshot", ["copy", "digest"])
def test_a_move_to_another_device_is_a_warning(snapshot: Any) -> None:
    model, optimizer = model_and_optimizer("ours")
    with DriftAuditor(model, optimizer, snapshot=snapshot) as auditor:
        model["bn"].cuda()
        with pytest.warns(DriftWarning, match="FK106 bn.weight at step 0: was moved from cpu to cuda:0"):
            auditor.check()
    report = auditor.report()
    assert report.clean
    assert {f.code for f in report.findings} == {"FK106"}
    assert {kind(f) for f in report.findings} == {"move"}


def test_each_finding_has_the_cause_of_what_it_is_about() -> None:
    model, optimizer = model_and_optimizer()
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        step(model, optimizer)
        model["bn"].load_state_dict({name: t * 2 for name, t in model["bn"].state_dict().items()})
        step(model, optimizer)
    causes = {(f.name, kind(f), f.step) for f in auditor.report().findings}
    assert ("bn", "train-mode forward", 1) in causes
    assert ("bn.weight", "load_state_dict", 2) in causes


def test_the_fix_is_that_of_the_cause() -> None:
    model, optimizer = model_and_optimizer("ours")
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        model["lin"].weight = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        (finding,) = auditor.check()
    assert (finding.code, kind(finding)) == ("FK103", "assignment")
    assert finding.fix == CAUSES["assignment"]
    assert finding.cause is not None
    assert finding.cause.where is not None
    assert "test_monitor.py" in finding.cause.where


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"watch": "some"}, "watch=: unknown way to watch .got 'some'.. Remedy: 'rolling', 'all' or 'norm'"),
        ({"keep": "disk"}, "keep=: unknown place .got 'disk'.. Remedy: 'device' or 'host'"),
        ({"snapshot": True}, "snapshot=: unknown kind of snapshot .got True"),
        ({"probe": 0}, "probe=: not a number of steps .got 0"),
        ({"every": True}, "every=: not a number of steps .got True"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    model, optimizer = model_and_optimizer("ours")
    with pytest.raises(FreezekitError, match=message):
        DriftAuditor(model, optimizer, **options)


def test_no_norm_layer_is_frozen() -> None:
    model, optimizer = model_and_optimizer("not at all")
    model["lin"].requires_grad_(False)
    with pytest.raises(FreezekitError, match=r"no norm layer in the model is frozen.*watch='all'"):
        DriftAuditor(model, optimizer, watch="norm")


def test_tied_tensors_are_watched_under_each_name() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    auditor = DriftAuditor(model, frozen="b", on_drift="record")
    shared.bias.data += 1
    assert [finding.name for finding in auditor.check()] == ["b.bias"]


def test_a_layer_that_trains_in_part_may_move_its_statistics() -> None:
    model, optimizer = model_and_optimizer("not at all")
    model["bn"].weight.requires_grad_(False)
    assert DriftAuditor(model, optimizer).report().compared == 1


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning", "ignore:.*quantized:UserWarning")
def test_quantized_buffers_are_watched() -> None:
    model, optimizer = model_and_optimizer("ours")
    model["own"].seen = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    assert DriftAuditor(model, optimizer).check() == []


def test_the_sign_of_a_complex_zero() -> None:
    model, optimizer = model_and_optimizer("ours")
    model["own"].seen = torch.zeros(2, dtype=torch.complex64)
    auditor = DriftAuditor(model, optimizer, on_drift="record")
    assert auditor.check() == []
    model["own"].seen.neg_()
    assert [finding.name for finding in auditor.check()] == ["own.seen"]


def test_the_step_of_a_counter_alone() -> None:
    model, optimizer = model_and_optimizer("ours")
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        model["bn"].num_batches_tracked += 1
        optimizer.step()
        optimizer.step()
    assert [layer.step for layer in auditor.report().layers] == [1]


def test_a_counter_that_is_no_norms_is_a_buffer() -> None:
    model, optimizer = model_and_optimizer("ours")
    model["own"].register_buffer("num_batches_tracked", torch.tensor(3))
    auditor = DriftAuditor(model, optimizer, on_drift="record")
    model["own"].num_batches_tracked = torch.tensor(3.0)
    assert [(f.code, f.name) for f in auditor.check()] == [("FK105", "own.num_batches_tracked")]


def test_a_counter_counts_by_value() -> None:
    model, optimizer = model_and_optimizer("ours")
    auditor = DriftAuditor(model, optimizer)
    model["bn"].num_batches_tracked = model["bn"].num_batches_tracked.float()
    assert auditor.check() == []


def test_one_step_in_the_source() -> None:
    model, optimizer = model_and_optimizer("ours")
    with DriftAuditor(model, optimizer) as auditor:
        step(model, optimizer)
        assert auditor.report().source == "ModuleDict after 1 step"
        step(model, optimizer)
        assert auditor.report().source == "ModuleDict after 2 steps"


def test_the_report_of_the_error_knows_the_step() -> None:
    model, optimizer = model_and_optimizer()
    with pytest.raises(DriftError) as caught, DriftAuditor(model, optimizer):
        step(model, optimizer)
    assert {finding.step for finding in caught.value.report.findings} == {1}


def test_a_bias_that_trains_beside_a_frozen_weight_is_not_added() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.requires_grad_(False)
    assert DriftAuditor(model).check() == []


def test_what_was_unfrozen_meanwhile_is_said_to_be() -> None:
    model, optimizer = model_and_optimizer("ours")
    auditor = DriftAuditor(model, optimizer, on_drift="record")
    given = DriftAuditor(model, optimizer, frozen=["bn", "lin"], on_drift="record")
    step(model, optimizer)
    assert auditor.report().clean
    freezekit.unfreeze(model, ["bn", "lin"])
    step(model, optimizer)
    report = auditor.report()
    found = {(f.code, f.name) for f in report.findings if "; it requires a gradient by now" in f.message}
    assert found == {
        ("FK101", "bn"),
        *(("FK103", f"{m}.{t}") for m in ("bn", "lin") for t in ("weight", "bias")),
    }
    assert all("auditor.renew()" in f.fix for f in report.findings if (f.code, f.name) in found)
    assert not any("by now" in f.message for f in given.report().findings)  # it was told what must not move
    assert max(str(finding).count("by now") for finding in auditor.check()) == 1
    with DriftAuditor(model, optimizer):
        step(model, optimizer)


def test_a_stale_gradient_of_its_weight_is_not_why_its_statistics_moved() -> None:
    model, optimizer = model_and_optimizer("none")
    step(model, optimizer)
    for name in ("bn", "own", "lin"):
        model[name].requires_grad_(False)
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        model["fc"](model["lin"](model["own"](model["bn"](torch.randn(8, 3))))).square().mean().backward()
        optimizer.step()
    causes = {(f.code, f.name): kind(f) for f in auditor.report().findings}
    assert causes["FK103", "bn.weight"] == "gradient"
    assert causes["FK101", "bn"] == "train-mode forward"


def test_a_weight_that_moved_is_not_why_a_layer_drops_at_random() -> None:
    torch.manual_seed(5)
    attention = nn.MultiheadAttention(4, 2, dropout=0.5).requires_grad_(False)
    head = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    with DriftAuditor(nn.ModuleList([attention, head]), optimizer, on_drift="record", probe=1) as auditor:
        x = torch.randn(3, 4, 4)
        head(attention(x, x, x)[0]).sum().backward()
        attention.in_proj_weight.data.mul_(2)
        optimizer.step()
    found = {f.code: f for f in auditor.report().findings}
    assert kind(found["FK103"]) == "write"
    assert kind(found["FK202"]) == "train-mode forward"
    assert "freeze_backbone" in found["FK202"].fix
    assert "running statistics" not in found["FK202"].fix


class Outermost(nn.Module):
    """Has a buffer beside its layers, and none of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)


def test_a_buffer_of_the_model_itself_goes_with_its_layers() -> None:
    model = Outermost().requires_grad_(False)
    auditor = DriftAuditor(model, on_drift="record")
    model.seen.add_(1)
    assert [(f.code, f.name) for f in auditor.report().findings] == [("FK104", "seen")]


def test_a_buffer_of_a_model_that_trains_in_part_is_not_watched_and_that_is_said() -> None:
    model = Outermost()
    model.body.requires_grad_(False)
    auditor = DriftAuditor(model, on_drift="record")
    model.seen.add_(1)
    report = auditor.report()
    assert report.clean
    assert report.notes == (
        "not watched, as frozen and trained parts surround them: seen; name them in frozen=",
    )


def test_what_was_added_is_counted_with_what_was_compared() -> None:
    model, _ = model_and_optimizer("naive")
    auditor = DriftAuditor(model, on_drift="record", frozen="lin")
    with torch.no_grad():
        model["lin"].weight.add_(1)
        model["lin"].bias.add_(1)
    model["lin"].register_buffer("new", torch.ones(2))
    assert str(auditor.report()).startswith("DRIFT: 3 of 3 frozen tensors changed")


def test_a_list_of_optimizers_is_not_needed() -> None:
    model, optimizer = model_and_optimizer("naive")
    with pytest.raises(FreezekitError, match=r"got list.*leave it out: torch's that hold parameters"):
        DriftAuditor(model, [optimizer])  # type: ignore[arg-type]


def test_an_optimizer_that_is_one_by_its_class_alone_is_refused() -> None:
    """As Accelerate's, which has none of torch's hooks."""
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    wrapper = accelerate.Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(FreezekitError, match=r"optimizer=.*AcceleratedOptimizer.*leave it out"):
        DriftAuditor(model, wrapper)
