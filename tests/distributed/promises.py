"""What each rank does for the seven promises, and what must come of it; under what, the tests beside say.

Each takes a way to freeze and wrap, so that what freezes naively can be put beside it as the control.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from backbones import batch, bits, gradients, joined, loss, network, reshard, train, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from freezekit import Freeze, freeze_backbone, trainable_parameters

HEAD = {"fc.weight", "fc.bias"}


class Way(NamedTuple):
    """How a model comes to be frozen and wrapped."""

    wrap: Callable[[nn.Module], nn.Module]
    wrap_first: bool = False
    convert: str | None = None
    naive: bool = False

    def freeze(self, model: nn.Module, **how: Any) -> Freeze | None:
        if self.naive:
            model.backbone.requires_grad_(False)
            return None
        return freeze_backbone(model, convert=self.convert, **how)

    def make(self) -> tuple[nn.Module, nn.Module, Freeze | None]:
        """Return the model, what is to be called, and the handle."""
        model = network()
        if self.wrap_first:
            outer = self.wrap(model)
            return model, outer, self.freeze(model)
        handle = self.freeze(model)
        return model, self.wrap(model), handle


def features(model: nn.Module, outer: nn.Module, x: Tensor) -> Tensor:
    """What the backbone gives when the whole model is called."""
    taken: list[Tensor] = []
    with model.fc.register_forward_pre_hook(lambda _, args: taken.append(args[0].detach().clone())):
        outer(x)
    return taken[0]


def moved(model: nn.Module, before: dict[str, str]) -> set[str]:
    after = bits(model)
    assert after.keys() == before.keys()
    return {name for name, was in before.items() if after[name] != was}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable_parameters(model), lr=0.1)


def own_batch() -> Tensor:
    return batch(dist.get_rank())


# -- the promises --------------------------------------------------------------------------------------------


def state(way: Way) -> dict[str, Any]:
    model, outer, _ = way.make()
    before = bits(network())
    start = moved(model, before)
    train(outer, sgd(model), own_batch())
    return {"start": start, "moved": moved(model, before), "bits": bits(model)}


def behaviour(way: Way) -> dict[str, Any]:
    model, outer, _ = way.make()
    plain, x = network().eval(), own_batch()
    expected = features(plain, plain, x)
    outer.train()
    others = torch.cat([x[:1], batch(77) * 5])
    alone, among = features(model, outer, x), features(model, outer, others)
    return {"out": alone, "expected": expected, "mates": torch.equal(alone[0], among[0])}


def gradient(way: Way) -> dict[str, Any]:
    model, outer, _ = way.make()
    plain, x = network().eval(), own_batch().requires_grad_()
    outer.train()
    loss(outer, x).backward()
    found = {"grads": gradients(model), "input": x.grad}
    x.grad = None
    loss(plain, x).backward()
    plain.zero_grad()
    loss(plain, joined(dist.get_world_size())).backward()
    expected = {name: grad for name, grad in gradients(plain).items() if name in HEAD}
    return found | {"expected": expected, "expected_input": x.grad}


def optimizer(way: Way) -> dict[str, set[str]]:
    """One that was at work before, with momentum, weight decay and gradients left over."""
    found = {}
    for kind, build in (
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5)),
    ):
        model, x = network(), own_batch()
        outer = way.wrap(model) if way.wrap_first else model
        at_work = build(model.parameters())
        train(outer, at_work, x, steps=2)
        loss(outer, x).backward()
        way.freeze(model)
        if not way.wrap_first:
            outer = way.wrap(model)
            if any(isinstance(m, FSDPModule) for m in model.modules()):  # has other parameters than before
                at_work = build(model.parameters())
        before = bits(model)
        for _ in range(3):
            at_work.step()
            at_work.zero_grad(set_to_none=False)
            loss(outer.train(), x).backward()
        found[kind] = moved(model, before)
    return found


def handed(way: Way) -> dict[str, Any] | None:
    """Frozen with ``optimizer=``, which has it all in its place again in the end."""
    model, x = network(), own_batch()
    outer = way.wrap(model) if way.wrap_first else model
    if not way.wrap_first and isinstance(way.wrap(network()), FSDPModule):
        return None  # an optimizer is made when all is sharded
    at_work = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    train(outer, at_work, x, steps=2)
    momenta = {n: whole(at_work.state[p]["momentum_buffer"]) for n, p in model.named_parameters()}
    handle = freeze_backbone(model, optimizer=at_work)
    if not way.wrap_first:
        outer = way.wrap(model)
    before, during = bits(model), len(at_work.param_groups[0]["params"])
    train(outer, at_work, x)
    found = {"during": during, "moved": moved(model, before)}
    handle.undo()
    params = at_work.param_groups[0]["params"]
    found["order"] = [id(p) for p in params] == [id(p) for p in model.parameters()]
    found["momenta"] = {
        n: torch.equal(whole(at_work.state[p]["momentum_buffer"]), momenta[n])
        for n, p in model.named_parameters()
    }
    if not way.wrap_first:
        outer = way.wrap(model)
    train(outer, at_work, x, steps=1)
    return found | {"at last": moved(model, before)}


def accumulation(way: Way) -> dict[str, Any]:
    """Two batches whose gradients stay on the rank, a third that brings all together, and a clipped norm."""
    model, outer, _ = way.make()
    before, x = bits(model), own_batch()
    loss(outer.train(), x).backward()  # with a static graph the first has to be for all
    outer.zero_grad()
    for part, last in ((x[:1], False), (x[1:2], False), (x[2:], True)):
        if isinstance(outer, FSDPModule):
            outer.set_requires_gradient_sync(last)
        else:
            outer.require_backward_grad_sync = last  # as no_sync() sets it
        loss(outer, part).backward()
    found: dict[str, Any] = {"grads": gradients(model)}
    found["norm"] = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
    found["clipped"] = gradients(model)
    sgd(model).step()
    plain = network().eval()
    for rank in range(dist.get_world_size()):
        x = batch(rank)
        for part in (x[:1], x[1:2], x[2:]):
            (loss(plain, part) / dist.get_world_size()).backward()
    expected = {name: grad for name, grad in gradients(plain).items() if name in HEAD}
    return found | {"expected": expected, "moved": moved(model, before)}


def _assigned(model: nn.Module, outer: nn.Module, x: Tensor) -> None:
    for module in outer.modules():
        module.training = True
    outer(x)


def _applied(model: nn.Module, outer: nn.Module, x: Tensor) -> None:
    outer.apply(lambda module: module.train())
    outer(x)


def _update_bn(model: nn.Module, outer: nn.Module, x: Tensor) -> None:
    torch.optim.swa_utils.update_bn([x, x], outer)


def _converted(model: nn.Module, outer: nn.Module, x: Tensor) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    outer.train()
    outer(x)


def _checkpointed(model: nn.Module, outer: nn.Module, x: Tensor) -> None:
    outer.train()
    checkpoint(outer, x.clone().requires_grad_(), use_reentrant=False).square().mean().backward()


ORDEALS: dict[str, Callable[[nn.Module, nn.Module, Tensor], None]] = {
    "assigned": _assigned,
    "applied": _applied,
    "update_bn": _update_bn,
    "converted": _converted,
    "checkpointed": _checkpointed,
}


def survival(way: Way) -> dict[str, Any]:
    found = {}
    x = own_batch()
    for ordeal, undergo in ORDEALS.items():
        if way.naive and ordeal == "converted":
            continue  # live SyncBatchNorm does not run on the CPU
        model, outer, _ = way.make()
        before = bits(network())
        exact = features(model, outer, x)
        undergo(model, outer, x)
        outer.train()
        after = features(model, outer, x)
        found[ordeal] = (moved(model, before) - HEAD, torch.equal(after, exact))
    return found


def _described(model: nn.Module) -> list[Any]:
    return [
        (
            path,
            type(module).__name__,
            {k: v for k, v in module.__dict__.items() if not k.startswith("_")},
            sorted(module.__dict__),
            [(k, p is not None and p.requires_grad) for k, p in module._parameters.items()],
            list(module._buffers),
        )
        for path, module in model.named_modules()
    ]


def reloaded(way: Way) -> float:
    """How far the output is from that of another state, loaded once the model has run, in one place only."""

    def wide() -> nn.Module:
        torch.manual_seed(4)
        first = nn.Sequential(nn.Conv2d(40, 40, 3, bias=False), nn.BatchNorm2d(40))
        second = nn.Sequential(nn.Flatten(), nn.Linear(40, 3))
        backbone = nn.Sequential(OrderedDict(first=first, second=second))
        return nn.Sequential(OrderedDict(backbone=backbone, fc=nn.Linear(3, 3))).eval()

    model, plain = wide(), wide()
    with torch.no_grad():
        plain.backbone.first[0].weight[0, 0, 0, 1] += 100
    x = torch.randn(2, 40, 3, 3)
    outer = way.wrap(model) if way.wrap_first else model
    freeze_backbone(model, convert=way.convert)
    outer = outer if way.wrap_first else way.wrap(model)
    with torch.no_grad():
        outer(x)
        reshard(model)  # as torch wants it before a state is loaded
        state = plain.state_dict()
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
        return float((outer(x) - plain(x)).abs().max())


def reversible(way: Way) -> dict[str, Any]:
    """Undone, it is what it is when it was only wrapped, and trains as that does."""

    def mixed() -> nn.Module:
        model = network()
        for k, module in enumerate(model.modules()):
            module.training = k % 3 > 0
        for k, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(k % 4 != 1)
        return model

    model, twin = mixed(), mixed()
    outer = way.wrap(model) if way.wrap_first else model
    objects = [id(t) for t in (*model.parameters(), *model.buffers())]
    handle = freeze_backbone(model, convert=way.convert)
    same = [id(t) for t in (*model.parameters(), *model.buffers())] == objects
    if not way.wrap_first:
        outer = way.wrap(model)
    x = own_batch()
    with torch.no_grad():
        outer(x)
    handle.undo()
    handle.undo()
    before, wrapped = bits(twin), way.wrap(twin)
    with torch.no_grad():
        modes = {module: module.training for module in twin.modules()}
        wrapped.eval()(x)  # so that both have run
        for module, mode in modes.items():
            module.training = mode
    found = {"moved": moved(model, before) | moved(twin, before), "same": same}
    found["described"] = _described(model) == _described(twin)
    if not isinstance(outer, FSDPModule):
        outer = way.wrap(model)
    for each, inner in ((outer, model), (wrapped, twin)):
        torch.manual_seed(5)
        train(each, sgd(inner), x)
    return found | {"trained": bits(model) == bits(twin), "and": moved(model, before) > HEAD}


def interchange(way: Way) -> dict[str, Any]:
    model, outer, _ = way.make()
    plain = network().state_dict()
    options = StateDictOptions(full_state_dict=True)
    full, parts = get_model_state_dict(outer, options=options), get_model_state_dict(outer)
    own = model.state_dict()
    return {
        "names": [list(each) == list(plain) for each in (parts, own)],
        "full": not full or list(full) == list(plain),
        "values": all(torch.equal(whole(each[n]), plain[n]) for each in (parts, own) for n in plain),
        "metadata": own._metadata.keys() == plain._metadata.keys(),
    }


PROMISES: dict[str, Callable[[Way], Any]] = {
    f.__name__: f
    for f in (
        state, behaviour, gradient, optimizer, handed, accumulation, survival, reversible, interchange,
        reloaded,
    )
}  # fmt: skip
CONTROLLED = ("state", "behaviour", "gradient", "optimizer", "survival")


def work(rank: int, ways: dict[str, Way], naive: Way) -> dict[tuple[str, str], Any]:
    found = {(p, name): do(way) for p, do in PROMISES.items() for name, way in ways.items()}
    return found | {(promise, "naive"): PROMISES[promise](naive) for promise in CONTROLLED}


def in_statistics(names: Iterable[str]) -> set[str]:
    return {name for name in names if "running" in name or "tracked" in name}


STATISTICS = in_statistics(network().state_dict())
BACKBONE = set(network().state_dict()) - HEAD


class Promises:
    """The tests of what :func:`work` brought back from each rank, as the fixture ``ranks``."""

    ways: ClassVar[dict[str, Way]]

    def each(self, ranks: list[Any], promise: str) -> Iterator[tuple[Way, Any]]:
        for rank in ranks:
            for name, way in self.ways.items():
                if (promise, name) in rank:  # not all are tried on four
                    yield way, rank[promise, name]

    def test_naive_freezing_moves_the_statistics(self, ranks: list[Any]) -> None:
        for rank in ranks:
            assert rank["state", "naive"]["moved"] == STATISTICS | HEAD

    def test_1_state_is_bit_identical_on_every_rank(self, ranks: list[Any]) -> None:
        for _, found in self.each(ranks, "state"):
            assert found["start"] == set()
            assert found["moved"] == HEAD
        for rank in ranks:
            for name in self.ways:
                one, other = rank.get(("state", name)), ranks[0].get(("state", name))
                assert one is other is None or one["bits"] == other["bits"]

    def test_naive_freezing_computes_by_the_batch(self, ranks: list[Any]) -> None:
        for rank in ranks:
            found = rank["behaviour", "naive"]
            assert not torch.allclose(found["out"], found["expected"], rtol=1e-2)
            assert not found["mates"]

    def test_2_output_is_that_of_eval_mode_for_each_item_alone(self, ranks: list[Any]) -> None:
        for way, found in self.each(ranks, "behaviour"):
            assert found["mates"]
            if way.convert is None:
                assert torch.equal(found["out"], found["expected"])
            else:
                largest = float(found["expected"].abs().max())
                assert 0 < float((found["out"] - found["expected"]).abs().max()) <= 1e-5 * largest

    def test_naive_freezing_has_other_gradients(self, ranks: list[Any]) -> None:
        for rank in ranks:
            found = rank["gradient", "naive"]
            assert not torch.allclose(found["input"], found["expected_input"], rtol=1e-2)
            assert not torch.allclose(found["grads"]["fc.weight"], found["expected"]["fc.weight"], rtol=1e-2)

    def test_3_gradients_are_the_head_s_of_the_joined_batch_and_the_input_s(self, ranks: list[Any]) -> None:
        for _, found in self.each(ranks, "gradient"):
            assert found["grads"].keys() == HEAD
            torch.testing.assert_close(found["grads"], found["expected"], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found["input"], found["expected_input"], rtol=1e-4, atol=1e-7)

    def test_3_gradients_that_gather_over_batches_are_the_head_s_too(self, ranks: list[Any]) -> None:
        for _, found in self.each(ranks, "accumulation"):
            assert found["grads"].keys() == HEAD
            torch.testing.assert_close(found["grads"], found["expected"], rtol=1e-4, atol=1e-6)
            norm = torch.cat([grad.reshape(-1) for grad in found["expected"].values()]).norm()
            torch.testing.assert_close(found["norm"], norm, rtol=1e-4, atol=0.0)
            clipped = torch.cat([grad.reshape(-1) for grad in found["clipped"].values()]).norm()
            torch.testing.assert_close(clipped, torch.tensor(1e-3), rtol=1e-2, atol=0.0)
            assert found["moved"] == HEAD

    def test_an_optimizer_at_work_moves_what_is_frozen_naively(self, ranks: list[Any]) -> None:
        for rank in ranks:
            assert rank["optimizer", "naive"] == {"sgd": BACKBONE | HEAD, "adamw": BACKBONE | HEAD}

    def test_4_an_optimizer_at_work_cannot_move_it(self, ranks: list[Any]) -> None:
        for _, found in self.each(ranks, "optimizer"):
            assert found == {"sgd": HEAD, "adamw": HEAD}

    def test_4_an_optimizer_that_was_handed_over_has_all_back_in_its_place(self, ranks: list[Any]) -> None:
        found = [f for _, f in self.each(ranks, "handed") if f is not None]
        assert found
        for one in found:
            assert (one["during"], one["moved"], one["order"]) == (2, HEAD, True)
            assert {name for name, same in one["momenta"].items() if not same} == HEAD
            assert one["at last"] == BACKBONE | HEAD

    def test_naive_freezing_survives_nothing(self, ranks: list[Any]) -> None:
        for rank in ranks:
            found = rank["survival", "naive"]
            assert {ordeal: moved for ordeal, (moved, _) in found.items()} == {
                ordeal: STATISTICS for ordeal in ORDEALS if ordeal != "converted"
            }

    def test_5_it_survives(self, ranks: list[Any]) -> None:
        for _, found in self.each(ranks, "survival"):
            assert found == {ordeal: (set(), True) for ordeal in ORDEALS}

    def test_6_undone_it_is_what_it_would_be_unfrozen_and_trains_alike(self, ranks: list[Any]) -> None:
        for _, found in self.each(ranks, "reversible"):
            assert found == {"moved": set(), "same": True, "described": True, "trained": True, "and": True}

    def test_7_states_have_the_names_and_values_of_the_unfrozen_model(self, ranks: list[Any]) -> None:
        for _, found in self.each(ranks, "interchange"):
            assert found == {"names": [True, True], "full": True, "values": True, "metadata": True}

    def test_7_another_state_that_is_loaded_is_what_counts(self, ranks: list[Any]) -> None:
        for way, difference in self.each(ranks, "reloaded"):
            assert difference == 0 if way.convert is None else difference < 1e-4
