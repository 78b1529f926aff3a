"""Optimizers: what is frozen leaves them, and comes back to its place with its state."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler

from freezekit import (
    FreezekitError,
    OptimizerWarning,
    freeze,
    freeze_backbone,
    is_frozen,
    trainable_parameters,
    unfreeze,
)

TORCH = torch.optim
Maker = Callable[[Any], Any]


def net(sparse: bool = False) -> nn.Module:
    """Three layers of matrices only, so that every optimizer takes them."""
    torch.manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, width in (("layer1", 5), ("layer2", 5), ("fc", 3)):
        layers[name] = nn.Embedding(6, width, sparse=True) if sparse else nn.Linear(5, width, bias=False)
    return nn.ModuleDict(layers) if sparse else nn.Sequential(layers)


def mlp() -> nn.Sequential:
    layers = OrderedDict(
        layer1=nn.Linear(4, 6), bn=nn.BatchNorm1d(6), layer2=nn.Linear(6, 6), fc=nn.Linear(6, 2)
    )
    torch.manual_seed(0)
    return zoo.scramble(nn.Sequential(layers))  # type: ignore[return-value]


def loss_of(model: nn.Module) -> Tensor:
    if isinstance(model, nn.ModuleDict):
        return sum((layer(torch.arange(6)) * 2 - 1).square().mean() for layer in model.values())  # type: ignore[return-value]
    first = next(model.parameters())
    x = torch.linspace(-1, 2, 7 * first.shape[1]).reshape(7, -1)
    return (model(x) - x[:, :1]).square().mean()


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    model.train()
    for _ in range(steps):
        optimizer.step(closure)


def bits(value: Any) -> Any:
    """A state of any nesting, comparable with ``==``."""
    if isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.is_sparse else value.detach()
        return str(value.dtype), tuple(value.shape), dense.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(inner) for inner in value]
    return value


def members(optimizer: Any) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


OPTIMIZERS: dict[str, Maker] = {
    "SGD": lambda p: TORCH.SGD(p, lr=0.1, weight_decay=0.1),
    "SGD momentum": lambda p: TORCH.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD nesterov foreach": lambda p: TORCH.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True
    ),
    "SGD fused": lambda p: TORCH.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "Adam": lambda p: TORCH.Adam(p, lr=0.1, weight_decay=0.1),
    "Adam amsgrad": lambda p: TORCH.Adam(p, lr=0.1, amsgrad=True, foreach=False),
    "Adam foreach": lambda p: TORCH.Adam(p, lr=0.1, foreach=True),
    "Adam fused": lambda p: TORCH.Adam(p, lr=0.1, fused=True),
    "AdamW": lambda p: TORCH.AdamW(p, lr=0.1, weight_decay=0.5),
    "AdamW foreach": lambda p: TORCH.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "AdamW fused": lambda p: TORCH.AdamW(p, lr=0.1, weight_decay=0.5, amsgrad=True, fused=True),
    "NAdam": lambda p: TORCH.NAdam(p, lr=0.1, weight_decay=0.1),
    "NAdam foreach": lambda p: TORCH.NAdam(p, lr=0.1, decoupled_weight_decay=True, foreach=True),
    "RAdam": lambda p: TORCH.RAdam(p, lr=0.1, weight_decay=0.1),
    "RAdam foreach": lambda p: TORCH.RAdam(p, lr=0.1, foreach=True),
    "Adamax": lambda p: TORCH.Adamax(p, lr=0.1, weight_decay=0.1),
    "Adamax foreach": lambda p: TORCH.Adamax(p, lr=0.1, foreach=True),
    "Adadelta": lambda p: TORCH.Adadelta(p, lr=0.1, weight_decay=0.1),
    "Adadelta foreach": lambda p: TORCH.Adadelta(p, lr=0.1, foreach=True),
    "Adagrad": lambda p: TORCH.Adagrad(p, lr=0.1, initial_accumulator_value=0.3, weight_decay=0.1),
    "Adagrad foreach": lambda p: TORCH.Adagrad(p, lr=0.1, foreach=True),
    "Adagrad fused": lambda p: TORCH.Adagrad(p, lr=0.1, fused=True),
    "ASGD": lambda p: TORCH.ASGD(p, lr=0.1, t0=2, weight_decay=0.1),
    "ASGD foreach": lambda p: TORCH.ASGD(p, lr=0.1, t0=2, foreach=True),
    "RMSprop": lambda p: TORCH.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "RMSprop foreach": lambda p: TORCH.RMSprop(p, lr=0.01, momentum=0.9, foreach=True),
    "Rprop": lambda p: TORCH.Rprop(p, lr=0.1),
    "Rprop foreach": lambda p: TORCH.Rprop(p, lr=0.1, foreach=True),
    "Adafactor": lambda p: TORCH.Adafactor(p, lr=0.1, weight_decay=0.1),
    "Adafactor foreach": lambda p: TORCH.Adafactor(p, lr=0.1, foreach=True),
    "SparseAdam": lambda p: TORCH.SparseAdam(p, lr=0.1),
    "LBFGS": lambda p: TORCH.LBFGS(p, lr=0.5, max_iter=3),
    "LBFGS line search": lambda p: TORCH.LBFGS(p, lr=0.5, max_iter=3, line_search_fn="strong_wolfe"),
}
if hasattr(TORCH, "Muon"):
    OPTIMIZERS["Muon"] = lambda p: TORCH.Muon(p, lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "a group each"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch(name: str, grouped: bool) -> None:
    model = net(sparse=name == "SparseAdam")
    if grouped and "LBFGS" in name:
        pytest.skip("LBFGS has one group")
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS[name]([{"params": [p]} for p in parameters] if grouped else parameters)
    train(model, optimizer)
    who, before, weights = members(optimizer), bits(optimizer.state_dict()), zoo.snapshot(model)

    handle = freeze(model, ["layer1", "layer2"], optimizer=optimizer)
    gone = {id(p) for p in parameters[:2]}
    assert not gone & {key for group in members(optimizer) for key in group}
    assert not gone & {id(p) for p in optimizer.state}
    assert len(optimizer.param_groups) == len(who)  # a scheduler counts them
    handle.undo()
    assert members(optimizer) == who
    assert bits(optimizer.state_dict()) == before

    handle = freeze(model, ["layer1", "layer2"], optimizer=optimizer)
    parked = bits([optimizer.state_dict()["freezekit_parked"]])
    train(model, optimizer)
    optimizer.zero_grad(set_to_none=False)
    train(model, optimizer, steps=1)
    assert bits([optimizer.state_dict()["freezekit_parked"]]) == parked
    after = zoo.snapshot(model)
    assert {n for n in weights if after[n] != weights[n]} == {"fc.weight"}
    handle.undo()
    assert members(optimizer) == who
    now = bits(optimizer.state_dict()["state"])
    if "LBFGS" not in name:  # which has one state for all of them, and begins anew
        assert {k: v for k, v in now.items() if k < 2} == {k: v for k, v in before["state"].items() if k < 2}
    train(model, optimizer)
    assert not any(zoo.snapshot(model)[n] == after[n] for n in after)


def test_lbfgs_made_before_the_freeze_moves_what_it_is_not_told_of() -> None:
    model = net()
    optimizer = TORCH.LBFGS(model.parameters(), lr=0.5, max_iter=3)
    train(model, optimizer)
    before = zoo.snapshot(model)
    freeze(model, ["layer1", "layer2"])
    train(model, optimizer)
    assert zoo.snapshot(model)["layer1.weight"] != before["layer1.weight"]


def test_lbfgs_keeps_its_history_until_a_step_is_made_without_it() -> None:
    model = net()
    optimizer = TORCH.LBFGS(model.parameters(), lr=0.5, max_iter=3)
    train(model, optimizer)
    full = bits(optimizer.state_dict())
    outer = freeze(model, "layer1", optimizer=optimizer)
    train(model, optimizer, steps=1)
    partial = bits(optimizer.state_dict())
    inner = freeze(model, "layer2", optimizer=optimizer)
    inner.undo()
    assert bits(optimizer.state_dict()) == partial
    outer.undo()
    assert optimizer.state_dict()["state"] == {}
    twin = net()
    again = TORCH.LBFGS(twin.parameters(), lr=0.5, max_iter=3)
    train(twin, again)
    first, second = freeze(twin, "layer1", optimizer=again), freeze(twin, "layer2", optimizer=again)
    first.undo()
    second.undo()
    assert bits(again.state_dict()) == full
    third = freeze(twin, "layer1", optimizer=again)
    again.load_state_dict(saved(again))  # another run's, for all it knows
    third.undo()
    assert again.state_dict()["state"] == {}


# -- optimizers of others that move what has no gradient ----------------------------------------------------


class Lookahead(torch.optim.Optimizer):
    """That of torch_optimizer 0.3: it pulls every parameter towards slow weights, gradient or not."""

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        self.optimizer, self.k, self.alpha, self.counter = optimizer, k, alpha, 0
        self.param_groups = optimizer.param_groups
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        self.defaults = optimizer.defaults
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            state = self.state[parameter]
            slow = state.setdefault("slow", parameter.detach().clone())
            if self.counter % self.k == 0:
                parameter.mul_(self.alpha).add_(slow, alpha=1 - self.alpha)
                slow.copy_(parameter)
        self.counter += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()


class DecayAll(torch.optim.SGD):
    """Decay written the short way, over all parameters, as it is in many a home-made optimizer."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            torch._foreach_mul_(group["params"], 1 - group["lr"] * 0.1) if group["params"] else None
        return super().step(closure)


def schedule_free(parameters: Iterable[Tensor]) -> Any:
    """Moves every parameter it has stepped when it is set to eval, gradient or not."""
    schedulefree = pytest.importorskip("schedulefree")
    optimizer = schedulefree.AdamWScheduleFree(parameters, lr=0.1, weight_decay=0.1)
    optimizer.train()
    return optimizer


OTHERS: dict[str, Maker] = {
    "Lookahead": lambda p: Lookahead(TORCH.SGD(p, lr=0.1, momentum=0.9)),
    "DecayAll": lambda p: DecayAll(p, lr=0.1, momentum=0.9),
    "schedule-free": schedule_free,
}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_optimizers_that_move_parameters_without_a_gradient(name: str, told: bool) -> None:
    model = net()
    optimizer = OTHERS[name](model.parameters())
    train(model, optimizer, steps=4)
    state = bits(list(optimizer.state.values()))
    who, before = members(optimizer), zoo.snapshot(model)
    handle = freeze(model, ["layer1", "layer2"], optimizer=optimizer if told else None)
    train(model, optimizer, steps=4)
    if hasattr(optimizer, "eval"):
        optimizer.eval()
        optimizer.train()
        train(model, optimizer, steps=1)
        optimizer.eval()
    after = zoo.snapshot(model)
    frozen = [name for name in after if name != "fc.weight"]
    known = {id(p) for p in optimizer.state}
    assert bool({id(model.layer1.weight), id(model.layer2.weight)} & known) != told
    assert all((after[n] == before[n]) == told for n in frozen)  # not told, it moves them
    assert after["fc.weight"] != before["fc.weight"]
    handle.undo()
    assert members(optimizer) == who
    if told and name == "Lookahead":
        states = {id(p): value for p, value in optimizer.state.items()}
        assert bits([states[id(p)] for p in (model.layer1.weight, model.layer2.weight)]) == state[:2]


class Accelerated(torch.optim.Optimizer):
    """A wrapper like Accelerate's: everything is that of the optimizer inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(group)


def test_a_wrapper_may_go_before_the_freeze_ends() -> None:
    model = net()
    inner = TORCH.Adam(model.parameters(), lr=0.1)
    train(model, Accelerated(inner))
    before = bits(inner.state_dict())
    handle = freeze(model, "layer1", optimizer=Accelerated(inner))
    gc.collect()
    assert len(inner.state_dict()["freezekit_parked"]) == 1
    assert handle.orphans == []
    handle.undo()
    assert bits(inner.state_dict()) == before


def test_an_optimizer_that_has_another_one_is_no_wrapper_of_it() -> None:
    model = net()
    optimizer = TORCH.SGD([model.layer1.weight, model.fc.weight], lr=0.1)
    optimizer.beside = TORCH.SGD([model.layer2.weight], lr=0.1)  # type: ignore[attr-defined]
    freeze(model, "layer1", optimizer=[optimizer, optimizer.beside])  # type: ignore[attr-defined]
    assert members(optimizer) == [[id(model.fc.weight)]]


def test_a_freeze_does_not_keep_an_optimizer_alive() -> None:
    model = net()
    optimizer = TORCH.Adam(model.parameters(), lr=0.1)
    train(model, optimizer)
    handle = freeze(model, "layer1", optimizer=optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert handle.orphans == []
    handle.undo()
    assert model.layer1.weight.requires_grad


# -- places ------------------------------------------------------------------------------------------------


def test_what_comes_back_finds_its_place_whatever_was_added() -> None:
    model = mlp()
    named = dict(model.named_parameters())
    optimizer = TORCH.SGD(named.items(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    state = {name: bits(optimizer.state[p]) for name, p in named.items()}
    handles = [freeze(model, part, optimizer=optimizer) for part in ("layer2", "layer1", "bn")]
    extra = nn.Parameter(torch.ones(2))
    optimizer.param_groups[0]["params"].append(extra)
    optimizer.param_groups[0]["param_names"].append("extra")
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(1)))]})
    expected = {
        0: ["layer1.weight", "layer1.bias", "fc.weight", "fc.bias", "extra"],
        1: ["layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias", "fc.weight", "fc.bias", "extra"],
    }
    for k, handle in enumerate((handles[1], handles[0])):
        handle.undo()
        assert optimizer.param_groups[0]["param_names"] == expected[k]
        assert members(optimizer)[0] == [id(named.get(name, extra)) for name in expected[k]]
    handles[2].undo()
    assert optimizer.param_groups[0]["param_names"] == [*named, "extra"]
    assert {name: bits(optimizer.state[p]) for name, p in named.items()} == state
    assert optimizer.param_groups[1]["param_names"] == ["more"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("told", [(True, False), (False, True), (True, True)])
def test_it_comes_back_when_the_last_freeze_ends(order: tuple[int, int], told: tuple[bool, bool]) -> None:
    model = mlp()
    optimizer = TORCH.Adam(model.parameters(), lr=0.1)
    train(model, optimizer)
    who, before = members(optimizer), bits(optimizer.state_dict())
    handles = [freeze(model, "layer1", optimizer=optimizer if given else None) for given in told]
    handles[order[0]].undo()
    assert id(model.layer1.weight) not in members(optimizer)[0]
    handles[order[1]].undo()
    assert members(optimizer) == who
    assert bits(optimizer.state_dict()) == before


def test_what_never_had_momentum_joins_those_that_have_it_in_fused_sgd() -> None:
    """torch raises TypeError, and in groups of their own the same steps show what is right."""
    after = []
    for together in (True, False):
        model = net()
        parts = [*model.parameters()] if together else [{"params": [p]} for p in model.parameters()]
        optimizer = TORCH.SGD(parts, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)
        freeze(model, ["layer1", "layer2"], optimizer=optimizer)
        unfreeze(model, "layer1")  # before anything has momentum
        assert model.layer1.weight not in optimizer.state
        train(model, optimizer)
        unfreeze(model, "layer2")
        train(model, optimizer)
        after.append(zoo.snapshot(model))
    assert after[0] == after[1]


def test_a_context_manager_and_unfreeze_give_back_too() -> None:
    model = mlp()
    optimizer = TORCH.Adam(model.parameters(), lr=0.1)
    train(model, optimizer)
    who, before = members(optimizer), bits(optimizer.state_dict())
    with freeze_backbone(model, optimizer=[optimizer]):
        assert members(optimizer) == [who[0][-2:]]
    assert members(optimizer) == who
    handle = freeze_backbone(model, optimizer=optimizer)
    handle.unfreeze("bn.weight")
    assert members(optimizer) == [[who[0][2], *who[0][-2:]]]
    unfreeze(model)
    assert members(optimizer) == who
    assert bits(optimizer.state_dict()) == before


def test_gamma_and_beta_that_train_stay_in() -> None:
    model = mlp()
    optimizer = TORCH.SGD(model.parameters(), lr=0.1)
    freeze_backbone(model, bn="freeze_stats", optimizer=optimizer)
    trains = [*model.bn.parameters(), *model.fc.parameters()]
    assert members(optimizer) == [[id(p) for p in trains]]


def test_membership_is_by_identity() -> None:
    model = net()
    with torch.no_grad():
        model.layer2.weight.copy_(model.layer1.weight)
    optimizer = TORCH.SGD([model.layer1.weight, model.layer2.weight, model.fc.weight], lr=0.1)
    freeze(model, "layer2", optimizer=optimizer)
    assert members(optimizer) == [[id(model.layer1.weight), id(model.fc.weight)]]


def test_a_tied_parameter_leaves_and_returns_once() -> None:
    model = net()
    model.layer2.weight = model.layer1.weight
    optimizer = TORCH.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    who, before = members(optimizer), bits(optimizer.state_dict())
    handle = freeze(model, "layer2", optimizer=optimizer)
    assert members(optimizer) == [[id(model.fc.weight)]]
    handle.undo()
    assert members(optimizer) == who
    assert bits(optimizer.state_dict()) == before


def test_a_parameter_tied_while_it_is_frozen_stays_out() -> None:
    model = mlp()
    optimizer = TORCH.SGD(model.parameters(), lr=0.1)
    freeze(model, "layer2", optimizer=optimizer)
    other = freeze(model, "layer1", optimizer=optimizer)
    model.add_module("late", nn.Linear(6, 6, bias=False))
    model.late.weight = model.layer2.weight
    other.undo()
    assert id(model.layer2.weight) not in members(optimizer)[0]


def test_what_was_put_back_by_hand_is_not_put_back_twice() -> None:
    model = net()
    optimizer = TORCH.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    handle = freeze(model, ["layer1", "layer2"], optimizer=optimizer)
    optimizer.add_param_group({"params": [model.layer1.weight]})
    handle.undo()
    assert members(optimizer) == [[id(model.layer2.weight), id(model.fc.weight)], [id(model.layer1.weight)]]
    train(model, optimizer)


def test_a_freeze_that_fails_leaves_the_optimizer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    stuck = nn.Linear(2, 2)  # which the optimizer does not have
    model.add_module("new", stuck)
    optimizer = TORCH.SGD([model.layer1.weight, model.layer2.weight, model.fc.weight], lr=0.1, momentum=0.9)
    who = members(optimizer)
    with pytest.raises(OptimizerWarning):  # as errors, here
        freeze(model, "layer1", optimizer=optimizer)
    assert members(optimizer) == who
    assert not is_frozen(model, "layer1")


@pytest.mark.parametrize(
    ("given", "got"), [({}, "dict"), (TORCH.SGD, "SGD"), (["Adam"], "str"), (nn.Linear(1, 1), "Linear")]
)
def test_what_is_no_optimizer_is_refused(given: Any, got: str) -> None:
    model = mlp()
    for call in (freeze, freeze_backbone):
        arguments = (model, "layer1") if call is freeze else (model,)
        with pytest.raises(FreezekitError, match=f"optimizer=: not an optimizer .got {got}"):
            call(*arguments, optimizer=given)  # type: ignore[operator]
    assert not is_frozen(model, "layer1")
    with pytest.raises(FreezekitError, match="not an optimizer"):
        unfreeze(model, optimizer=given)


def test_a_head_that_is_in_no_optimizer_is_reported() -> None:
    model = mlp()
    optimizer = TORCH.SGD(model.parameters(), lr=0.1)
    model.fc = nn.Linear(6, 3)
    with pytest.warns(OptimizerWarning, match=r"fc.weight, fc.bias .but it has 2 that are not the model's"):
        handle = freeze_backbone(model, optimizer=optimizer)
    assert handle.orphans == ["fc.weight", "fc.bias"]
    assert str(handle).endswith("in no group of the optimizer: fc.weight, fc.bias")
    optimizer.add_param_group({"params": model.fc.parameters()})
    assert handle.orphans == []
    assert "in no group" not in str(handle)
    assert freeze(model, "layer1").orphans == []  # none was given
    other = TORCH.SGD(model.fc.parameters(), lr=0.1)
    assert freeze(model, "layer1", optimizer=[optimizer, other]).orphans == []


def test_the_warning_points_at_the_call() -> None:
    model = net()
    optimizer = TORCH.SGD([model.layer1.weight], lr=0.1)
    with pytest.warns(OptimizerWarning, match="move them: fc.weight. Remedy") as caught:
        freeze(model, ["layer1", "layer2"], optimizer=optimizer)
    with pytest.warns(OptimizerWarning) as caught_too:
        freeze_backbone(model, optimizer=optimizer)
    assert {caught[0].filename, caught_too[0].filename} == {__file__}


# -- the rest of the loop ----------------------------------------------------------------------------------


def test_schedulers_scalers_and_clipping_go_on() -> None:
    model = net()
    optimizer = TORCH.SGD([{"params": [p]} for p in model.parameters()], lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda e: 0.5**e, lambda e: 0.9**e, lambda e: 0.8**e])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = zoo.snapshot(model)
    for epoch in range(4):
        if epoch == 1:
            handle = freeze(model, ["layer1", "layer2"], optimizer=optimizer)
            before = zoo.snapshot(model)
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(loss_of(model)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    changed = {name for name, value in zoo.snapshot(model).items() if value != before[name]}
    assert changed == {"fc.weight"}
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.1 * 0.5**4, 0.1 * 0.9**4, 0.1 * 0.8**4])
    handle.undo()
    assert [group["lr"] for group in optimizer.param_groups] == rates


# -- files -------------------------------------------------------------------------------------------------


def saved(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "name", [n for n in OPTIMIZERS if "fused" in n or n in ("Adagrad", "ASGD", "NAdam", "SGD momentum")]
)
def test_parked_state_survives_a_resume(name: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)
    parts = bits(optimizer.state_dict())
    handle = freeze(model, ["layer1", "layer2"], optimizer=optimizer)
    train(model, optimizer)
    file = saved(optimizer)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    handle.undo()
    whole = bits(optimizer.state_dict())
    train(model, optimizer)

    twin = net()
    twin.load_state_dict(weights)
    resumed = OPTIMIZERS[name](twin.parameters())
    again = freeze(twin, ["layer1", "layer2"], optimizer=resumed)
    resumed.load_state_dict(file)
    again.undo()
    assert bits(resumed.state_dict()) == whole
    assert whole["state"][0] == parts["state"][0]
    train(twin, resumed)
    assert zoo.snapshot(twin) == zoo.snapshot(model)  # the run goes on as if it had not been interrupted


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loaded_state_is_a_copy_in_the_dtype_of_its_parameter(dtype: torch.dtype, fused: bool) -> None:
    model = net()
    optimizer = TORCH.Adam(model.parameters(), lr=0.1, fused=fused)
    train(model, optimizer)
    handle = freeze(model, "layer1", optimizer=optimizer)
    file = saved(optimizer)
    twin = net().to(dtype)
    resumed = TORCH.Adam(twin.parameters(), lr=0.1, fused=fused)
    again = freeze(twin, "layer1", optimizer=resumed)
    resumed.load_state_dict(file)
    for tensor in file["freezekit_parked"][0]["state"].values():
        tensor.fill_(float("nan"))
    again.undo()
    handle.undo()
    state, new = optimizer.state[model.layer1.weight], resumed.state[twin.layer1.weight]
    assert new["exp_avg"].dtype == dtype
    assert torch.equal(new["exp_avg"].float(), state["exp_avg"])
    assert new["step"].dtype == torch.float32
    assert new["step"] == state["step"]


def test_a_parameter_that_never_had_a_state_has_none_after_loading() -> None:
    model = net()
    optimizer = TORCH.Adam(model.parameters(), lr=0.1)
    freeze(model, "layer1", optimizer=optimizer)
    file = saved(optimizer)
    train(model, optimizer)
    optimizer.load_state_dict(file)
    unfreeze(model)
    assert model.layer1.weight not in optimizer.state


def test_other_parts_frozen_than_in_the_file_is_an_error() -> None:
    def made(*parts: str) -> tuple[nn.Module, Any]:
        model = net()
        model.fc = nn.Linear(5, 5, bias=False)
        optimizer = TORCH.Adam(model.parameters(), lr=0.1)
        train(model, optimizer)
        for part in parts:
            freeze(model, part, optimizer=optimizer)
        return model, optimizer

    for there, here in (
        (("layer1",), ("layer2",)),
        (("layer1",), ()),
        ((), ("layer1",)),
        (("layer1", "layer2"), ("layer1",)),
    ):
        _, source = made(*there)
        model, target = made(*here)
        before = bits(target.state_dict())
        with pytest.raises(
            (FreezekitError, ValueError), match=r"frozen when saved|doesn't match the size"
        ) as caught:
            target.load_state_dict(saved(source))
        assert isinstance(caught.value, FreezekitError) == bool(here)
        assert bits(target.state_dict()) == before
        unfreeze(model)


@pytest.mark.parametrize("how", ["trainable", "distributed checkpoint"])
def test_a_state_of_what_trains_is_loaded_where_the_rest_is_frozen(how: str) -> None:
    """Neither an optimizer of what trains nor torch.distributed.checkpoint saves what is parked."""
    model = net()
    optimizer = TORCH.Adam(model.parameters(), lr=0.1)
    train(model, optimizer)
    handle = freeze(model, ["layer1", "layer2"], optimizer=optimizer)
    parked = bits([optimizer.state_dict()["freezekit_parked"]])
    twin = copy.deepcopy(model)
    if how == "trainable":
        source = TORCH.Adam(trainable_parameters(twin), lr=0.3)
        train(twin, source)
        optimizer.load_state_dict(saved(source))
    else:
        source = TORCH.Adam(twin.parameters(), lr=0.3)
        freeze(twin, ["layer1", "layer2"], optimizer=source)
        train(twin, source)
        set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(twin, source))
    new, old = optimizer.state[model.fc.weight], source.state[twin.fc.weight]
    assert torch.equal(new["exp_avg"], old["exp_avg"])
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert bits([optimizer.state_dict()["freezekit_parked"]]) == parked
    handle.undo()
    train(model, optimizer)


def test_a_copy_of_the_optimizer_has_what_trains() -> None:
    model = mlp()
    optimizer = TORCH.Adam(model.parameters(), lr=0.1)
    train(model, optimizer)
    handle = freeze_backbone(model, optimizer=optimizer)
    for twin, copied in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        assert members(copied) == [[id(twin.fc.weight), id(twin.fc.bias)]]
        train(twin, copied)
        unfreeze(twin, optimizer=copied)  # which puts the rest into a group of its own
        assert [len(group) for group in members(copied)] == [2, 6]
        train(twin, copied)
    again = pickle.loads(pickle.dumps(handle))
    assert again.orphans == []
    assert copy.deepcopy(handle).frozen == handle.frozen
    handle.undo()
    assert len(members(optimizer)[0]) == 8


# -- unfreezing into an optimizer that was made without ----------------------------------------------------


def test_unfreeze_adds_a_group_for_what_the_optimizer_does_not_have() -> None:
    model = mlp()
    model.layer1.bias.requires_grad_(False)
    freeze_backbone(model)
    optimizer = TORCH.AdamW(
        [{"params": [], "lr": 9.0}, {"params": model.fc.parameters(), "lr": 0.1, "name": "head"}],
        lr=5.0, betas=(0.5, 0.6), weight_decay=0.3,
    )  # fmt: skip
    unfreeze(model, iter(["layer2"]), optimizer=optimizer)
    unfreeze(model, optimizer=[optimizer], lr=1e-3)
    groups = optimizer.param_groups
    assert members(optimizer)[2:] == [
        [id(p) for p in model.layer2.parameters()],
        [id(model.layer1.weight), id(model.bn.weight), id(model.bn.bias)],  # a.bias does not train
    ]
    assert [group["lr"] for group in groups] == [9.0, 0.1, 0.1, 1e-3]
    assert [group["weight_decay"] for group in groups] == [0.3] * 4
    assert "name" not in groups[2]
    before = zoo.snapshot(model)
    train(model, optimizer)
    after = zoo.snapshot(model)
    assert {n for n, _ in model.named_parameters() if after[n] == before[n]} == {"layer1.bias"}


def test_parked_parameters_go_home_and_not_into_a_new_group() -> None:
    model = mlp()
    optimizer = TORCH.SGD([*model.layer1.parameters(), *model.fc.parameters()], lr=0.1, momentum=0.9)
    freeze(model, ["layer1", "layer2", "bn"], optimizer=optimizer)
    with pytest.raises(FreezekitError, match="lr=: there will be no new group.*goes back to the group"):
        unfreeze(model, "layer1", optimizer=optimizer, lr=1e-3)
    assert is_frozen(model, "layer1")
    unfreeze(model, optimizer=optimizer, lr=1e-3)
    assert [len(group) for group in members(optimizer)] == [4, 4]


def test_what_cannot_go_into_an_optimizer_stays_frozen() -> None:
    model = mlp()
    freeze_backbone(model)
    optimizer = TORCH.SGD(trainable_parameters(model), lr=0.1)
    lr_scheduler.StepLR(optimizer, 1)
    lbfgs = TORCH.LBFGS(trainable_parameters(model))
    plain = TORCH.SGD(trainable_parameters(model), lr=0.1)
    for arguments, text in (
        ({"optimizer": optimizer}, "a learning-rate scheduler was made on this optimizer"),
        ({"optimizer": lbfgs}, "LBFGS has one group only"),
        ({"optimizer": [plain, lbfgs]}, "one optimizer is wanted here .got 2 of them"),
        ({"optimizer": plain, "lr": -1.0}, "lr=: not a finite number from 0 on .got -1.0"),
        ({"optimizer": plain, "lr": "0.1x"}, "lr=: not a finite number from 0 on .got '0.1x'"),
        ({"lr": 0.1}, "no new group whose learning rate this could be .* Remedy: give optimizer= too"),
    ):
        with pytest.raises(FreezekitError, match=text):
            unfreeze(model, "layer2", **arguments)  # type: ignore[arg-type]
    assert is_frozen(model, "layer2")
    assert len(plain.param_groups) == 1


def test_a_scheduler_made_earlier_would_fail_on_a_new_group() -> None:
    # why unfreeze refuses: newer versions of torch raise, older ones leave the new group out
    parameter = nn.Parameter(torch.ones(2))
    optimizer = TORCH.SGD([parameter], lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    optimizer.step()
    try:
        scheduler.step()
    except ValueError:
        return
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if "LBFGS" not in n])
def test_every_optimizer_of_torch_takes_a_new_group(name: str) -> None:
    if "Adagrad" in name and torch.__version__ < "2.7":
        pytest.skip("Adagrad of old makes its state when it is made, and fails on groups added later")
    model = net(sparse=name == "SparseAdam")
    freeze(model, ["layer1", "layer2"])
    optimizer = OPTIMIZERS[name](trainable_parameters(model))
    train(model, optimizer)
    unfreeze(model, "layer2", optimizer=optimizer, lr=0.05)
    before = zoo.snapshot(model)
    train(model, optimizer)
    after = zoo.snapshot(model)
    assert {n for n in after if after[n] == before[n]} == {"layer1.weight"}


def test_names_and_tensor_rates_go_along() -> None:
    model = net()
    freeze(model, ["layer1", "layer2"])
    optimizer = TORCH.Adam([("fc.weight", model.fc.weight)], lr=torch.tensor(0.1), foreach=False)
    unfreeze(model, "layer1", optimizer=optimizer)
    unfreeze(model, "layer2", optimizer=optimizer, lr=0.5)
    groups = optimizer.param_groups
    assert [group["param_names"] for group in groups] == [["fc.weight"], ["layer1.weight"], ["layer2.weight"]]
    assert torch.equal(torch.stack([group["lr"] for group in groups]), torch.tensor([0.1, 0.1, 0.5]))
    assert len({id(group["lr"]) for group in groups}) == 3


# -- everything together -----------------------------------------------------------------------------------

PARTS = ["layer1", "bn", "bn.weight", "layer2", "tied", "fc", "layer1.bias", "*.weight", "[ab]*"]
ACTIONS = st.one_of(
    st.tuples(st.just("freeze"), st.sampled_from(PARTS), st.sampled_from([(), (0,), (1,), (0, 1)])),
    st.tuples(st.just("undo"), st.integers(0, 5), st.just(())),
    st.tuples(st.just("unfreeze"), st.sampled_from(PARTS), st.just(())),
)


@settings(max_examples=150, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=1, max_size=9), last=st.permutations(range(9)))
def test_freezes_in_any_order_end_where_they_began(actions: list[Any], last: list[int]) -> None:
    model = mlp()
    model.add_module("tied", nn.Linear(6, 6))
    model.tied.weight = model.layer2.weight
    model.layer1.bias.requires_grad_(False)
    parameters = list(model.parameters())
    optimizers = [
        TORCH.Adam([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.1}], lr=0.2),
        TORCH.SGD(parameters[1:-1][::-1], lr=0.1, momentum=0.9),  # shares most of them
    ]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    homes = [members(optimizer) for optimizer in optimizers]

    def everything() -> Any:
        modules = [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()]
        states = [bits(optimizer.state_dict()) for optimizer in optimizers]
        grads = [p.requires_grad for p in parameters]
        return zoo.snapshot(model), modules, states, grads, [members(o) for o in optimizers]

    before = everything()
    handles: list[Any] = []
    told: dict[int, set[int]] = {0: set(), 1: set()}
    for action, what, given_to in actions:
        if action == "freeze":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OptimizerWarning)  # the second has but some
                handles.append(freeze(model, what, optimizer=[optimizers[k] for k in given_to]))
            for k in given_to:
                told[k] |= {id(p) for p in parameters if _held(model, p, handles[-1])}
        elif action == "undo" and what < len(handles):
            handles[what].undo()
        elif action == "unfreeze" and any(is_frozen(model, n) for n, _ in model.named_parameters()):
            try:
                unfreeze(model, what)
            except FreezekitError as error:
                assert "no frozen layer or parameter matches" in str(error)  # noqa: PT017
        for k, optimizer in enumerate(optimizers):
            frozen = {id(p) for n, p in model.named_parameters() if is_frozen(model, n)}
            told[k] &= frozen
            expected = [[key for key in group if key not in told[k]] for group in homes[k]]
            assert members(optimizer) == expected
            assert {id(p) for p in optimizer.state} == {key for group in expected for key in group}
    for k in last:
        if k < len(handles):
            handles[k].undo()
    unfreeze(model)
    assert everything() == before


def _held(model: nn.Module, parameter: Tensor, handle: Any) -> bool:
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
    return bool(set(names) & set(handle.frozen))
