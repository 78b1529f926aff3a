"""What counts as frozen: as given, by a manifest, by an optimizer inside, or inferred."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from freezekit.audit.aligning import align
from freezekit.audit.frozen_set import frozen_names
from freezekit.audit.held import placed
from freezekit.audit.state import OptimizerState, StateTable, TensorState, Training, role_of
from freezekit.manifest import FrozenTensor, Manifest

Parameters = Iterable[Any]


class Net(nn.Module):
    """A backbone with norm layers, two of them alike, and a head with one too."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        )
        self.neck = nn.BatchNorm2d(4, affine=False)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.neck(self.backbone(x)))
        return out


BACKBONE = {
    f"backbone.{n}.{own}"
    for n, owns in (
        (0, ("weight", "bias")),
        (1, ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        (2, ("weight", "bias")),
        (3, ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    )
    for own in owns
}
HEAD = 6  # parameters


def table(state: dict[str, Tensor], *optimizers: OptimizerState, source: str = "model") -> StateTable:
    tensors = [
        TensorState(
            name,
            role_of(name, str(t.dtype).removeprefix("torch.")),
            str(t.dtype).removeprefix("torch."),
            tuple(t.shape),
            t.detach().clone().contiguous().numpy().tobytes,
        )
        for name, t in state.items()
    ]
    return StateTable(tensors, source, training=Training(optimizers=optimizers))


def described(state: dict[str, Any], path: str = "optimizer") -> OptimizerState:
    """What the readers make of an optimizer's ``state_dict()``."""
    shapes, steps, names = {}, {}, {}
    for key, own in state["state"].items():
        for what in ("exp_avg", "momentum_buffer", "sum", "square_avg"):
            if isinstance(own.get(what), Tensor):
                shapes[key] = tuple(own[what].shape)
        if "step" in own:
            step = own["step"]
            steps[key] = table({"step": step})["step"] if isinstance(step, Tensor) else step
    for group in state["param_groups"]:
        names.update(zip(group["params"], group.get("param_names", ()), strict=False))
    groups = tuple(tuple(group["params"]) for group in state["param_groups"])
    return OptimizerState(path, groups, names, shapes, steps)


def tuned(make: Callable[[Net], torch.optim.Optimizer]) -> tuple[StateTable, StateTable]:
    """Fine-tune the head with the backbone frozen by requires_grad; return the base and the checkpoint."""
    model = Net()
    base = table(model.state_dict(), source="base")
    model.backbone.requires_grad_(False)
    optimizer = make(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    return base, table(model.state_dict(), described(optimizer.state_dict()), source="checkpoint")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def by_decay(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def trainable_by_decay(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in trainable(model) if p.ndim > 1]},
        {"params": [p for p in trainable(model) if p.ndim < 2]},
    ]


OPTIMIZERS: dict[str, tuple[str, Callable[[Net], torch.optim.Optimizer]]] = {
    "adam, filtered": ("held", lambda m: torch.optim.Adam(trainable(m), 0.01)),
    "adamw, all": ("stepped", lambda m: torch.optim.AdamW(m.parameters(), 0.01)),
    "adamw, by decay": ("held", lambda m: torch.optim.AdamW(trainable_by_decay(m), 0.01)),
    "adamw, all by decay": ("stepped", lambda m: torch.optim.AdamW(by_decay(m), 0.01)),
    "sgd, momentum": ("held", lambda m: torch.optim.SGD(trainable(m), 0.01, momentum=0.9)),
    "sgd, momentum, all": ("stepped", lambda m: torch.optim.SGD(m.parameters(), 0.01, momentum=0.9)),
    "sgd": ("held", lambda m: torch.optim.SGD(trainable(m), 0.01)),
    "rmsprop": ("held", lambda m: torch.optim.RMSprop(trainable(m), 0.01)),
    "adagrad, all": ("stepped", lambda m: torch.optim.Adagrad(m.parameters(), 0.01)),
    "named": ("held", lambda m: torch.optim.Adam(
        [(n, p) for n, p in m.named_parameters() if p.requires_grad], 0.01)),
    "all named": ("stepped", lambda m: torch.optim.Adam(m.named_parameters(), 0.01)),
    "head first": ("held", lambda m: torch.optim.Adam(
        [{"params": m.head[3].parameters()}, {"params": m.head[:3].parameters()}], 0.01)),
}  # fmt: skip


@pytest.mark.parametrize("how", OPTIMIZERS)
def test_torch_optimizers(how: str) -> None:
    did, make = OPTIMIZERS[how]
    base, after = tuned(make)
    names, scope, notes = frozen_names(after, base)
    assert scope == f"the optimizer in it never {did} them: 8 of 14 parameters"
    assert notes == ()
    assert names == BACKBONE


@pytest.mark.parametrize("make", [
    lambda m: torch.optim.Adam(list(m.parameters())[::-1], 0.01),  # the numbers are in no order
    lambda m: torch.optim.SGD(m.parameters(), 0.01),  # nothing tells what was stepped
])  # fmt: skip
def test_what_cannot_be_told_is_inferred(make: Callable[[Net], torch.optim.Optimizer]) -> None:
    base, after = tuned(make)
    names, scope, notes = frozen_names(after, base)
    assert scope == "inferred: 2 of 4 BN layers kept their parameters bit for bit"
    assert names == {name for name in BACKBONE if name[9] in "13"}
    assert len(notes) == 1


def test_what_was_stepped_is_not_frozen_though_it_did_not_move() -> None:
    """Without a base that differs inference would take all for frozen; the optimizer knows better."""
    model = Net()
    base = table(model.state_dict())
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.0)
    model(torch.randn(8, 3, 6, 6)).sum().backward()
    optimizer.step()
    after = table(model.state_dict(), described(optimizer.state_dict()))
    names, scope, _ = frozen_names(after, base)
    assert scope.startswith("the optimizer in it never held them")
    assert "head.2.running_mean" not in names
    assert names <= BACKBONE


def test_all_held_and_stepped() -> None:
    model = Net()
    base = table(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    after = table(model.state_dict(), described(optimizer.state_dict()))
    names, scope, notes = frozen_names(after, base)
    assert scope.startswith("inferred: 0 of 4 BN layers")
    assert names == set()
    assert notes == (
        "the optimizer in it held and stepped all 14 parameters, so what was frozen is inferred",
    )


def test_two_optimizers_of_two_models() -> None:
    base, after = tuned(OPTIMIZERS["adam, filtered"][1])
    other = nn.Sequential(nn.Linear(31, 7), nn.Linear(7, 1))
    critic = torch.optim.Adam(other.parameters())
    other(torch.randn(2, 31)).sum().backward()
    critic.step()
    both = table({n: torch.zeros(0) for n in ()}, *after.training.optimizers)
    both.training = Training(
        optimizers=(*after.training.optimizers, described(critic.state_dict(), "optimizer_d"))
    )
    after.training = both.training
    names, scope, notes = frozen_names(after, base)
    assert names == BACKBONE
    assert scope == "the optimizer in it never held them: 8 of 14 parameters"
    assert notes == ("the optimizer state in 'optimizer_d' does not fit the model's parameters: not used",)


def test_a_momentum_copy_that_the_base_has_not_is_not_part_of_what_was_frozen() -> None:
    """As MoCo saves them: of the two encoders one is trained, and the other no optimizer ever held."""
    base, after = tuned(OPTIMIZERS["adam, filtered"][1])
    for frozen in (True, False):
        # what the copy has that the base has not cannot have drifted
        copies = {f"encoder_k.{n}": t for n, t in Net().state_dict().items()}
        own = {f"encoder_q.{n}": t for n, t in after.items()}
        both = after.with_tensors([*(replace(t, name=n) for n, t in own.items()), *table(copies).values()])
        both.training = after.training if frozen else stepped_all()
        aligned = align(both, base)
        assert any(name.startswith("encoder_k.") for name in aligned.outside)
        names, scope, _ = frozen_names(
            aligned.table, aligned.base, given=aligned.given, outside=aligned.outside
        )
        assert not {name for name in names if name.startswith("encoder_k.")}
        if frozen:
            assert names == BACKBONE
            assert scope == "the optimizer in it never held them: 8 of 14 parameters"
        else:
            assert scope.startswith("inferred: ")


def stepped_all() -> Training:
    """What a file tells of an optimizer that held and stepped a whole model."""
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 3, 6, 6)).sum().backward()
    optimizer.step()
    return Training(optimizers=(described(optimizer.state_dict()),))


def test_state_without_the_shape_of_its_parameter() -> None:
    """Adafactor keeps factors; what is counted and what moved tells all the same."""
    base, after = tuned(OPTIMIZERS["adam, filtered"][1])
    (adam,) = after.training.optimizers
    after.training = Training(optimizers=(OptimizerState("optimizer", adam.groups, steps=adam.steps),))
    names, scope, _ = frozen_names(after, base)
    assert scope == "the optimizer in it never held them: 8 of 14 parameters"
    assert names == BACKBONE


def test_an_isolated_change_of_what_was_never_held_is_frozen_all_the_same() -> None:
    base, after = tuned(OPTIMIZERS["adam, filtered"][1])
    moved = table({"backbone.0.weight": torch.randn(4, 3, 3, 3)})["backbone.0.weight"]
    after = after.with_tensors([moved if n == moved.name else t for n, t in after.items()])
    names, _, notes = frozen_names(after, base)
    assert names == BACKBONE
    assert notes == ()


def test_a_base_of_another_phase_claims_nothing() -> None:
    _, after = tuned(OPTIMIZERS["adam, filtered"][1])
    torch.manual_seed(5)
    base = table(
        {n: t + torch.rand_like(t) if t.is_floating_point() else t for n, t in Net().state_dict().items()}
    )
    names, scope, notes = frozen_names(after, base)
    assert names == set()
    assert scope.startswith("inferred: 0 of 4")
    assert "most of these differ from the base" in notes[0]


def test_a_float_buffer_that_moves_is_no_frozen_parameter() -> None:
    base, after = tuned(OPTIMIZERS["adam, filtered"][1])
    extra = [table({"quantiser.ema_code": torch.full((3,), float(n))})["quantiser.ema_code"] for n in (0, 1)]
    base = base.with_tensors([*base.values(), extra[0]])
    after = after.with_tensors([*after.values(), extra[1]])
    names, _, notes = frozen_names(after, base)
    assert names == BACKBONE
    assert notes == (
        "1 not held by the optimizer differ and may be buffers; name them if frozen: quantiser.ema_code",
    )


def test_the_order_of_what_tells() -> None:
    base, after = tuned(OPTIMIZERS["adam, filtered"][1])
    manifest = Manifest(
        "Net", (FrozenTensor("neck.running_mean", "running_mean", "float32", (4,), "0" * 64),)
    )
    assert frozen_names(after, base, "head", manifest)[1] == "as given"
    assert frozen_names(after, base, None, manifest)[:2] == (
        {"neck.running_mean"},
        "as the manifest given says",
    )
    after.manifest = manifest.to_json()
    assert frozen_names(after, base)[:2] == ({"neck.running_mean"}, "as the manifest inside it says")


def test_patterns_may_have_the_names_of_either_file() -> None:
    state = Net().state_dict()
    aligned = align(table({f"model.{n}": t for n, t in state.items()}), table(state))
    for pattern in ("neck", "model.neck"):
        names, _, _ = frozen_names(aligned.table, aligned.base, pattern, given=aligned.given)
        assert names == {"neck.running_mean", "neck.running_var", "neck.num_batches_tracked"}


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(3, 3)
        self.enc.register_buffer("calls", torch.tensor(0))
        self.norm = nn.utils.spectral_norm(nn.Linear(3, 3))
        self.head = nn.Linear(3, 2)


@pytest.mark.parametrize("trained", [True, False])
def test_other_buffers_go_with_layers_that_stayed(trained: bool) -> None:
    state = Quantised().state_dict()
    after = {n: t.clone() for n, t in state.items()}
    if trained:
        after["head.weight"] += 1
    after["norm.weight_u"] += 1
    after["enc.calls"] += 1
    names, scope, _ = frozen_names(table(after), table(state))
    if trained:
        assert (
            scope
            == "inferred: 0 of 0 BN layers and 2 other layers with buffers kept their parameters bit for bit"
        )
        assert names == {n for n in state if not n.startswith("head")}
    else:  # nothing trained, so nothing tells what was frozen
        assert names == set()
    after["norm.weight_orig"] += 1
    after["enc.weight"] += 1
    assert frozen_names(table(after), table(state))[0] == set()


@settings(max_examples=300, deadline=None, database=None)
@given(st.data())
def test_places_are_those_of_all_embeddings(data: st.DataObject) -> None:
    """Against trying every choice of places."""
    shape = st.sampled_from([(1,), (2,), (3, 3)])
    shapes = data.draw(st.lists(shape, min_size=1, max_size=7))
    wanted = data.draw(st.lists(st.one_of(shape, st.none()), min_size=1, max_size=4))
    free = data.draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))
    steps = data.draw(st.lists(st.booleans(), min_size=len(wanted), max_size=len(wanted)))
    ways = [
        way
        for way in combinations([j for j in range(len(shapes)) if free[j]], len(wanted))
        if all(want in (None, shapes[j]) for want, j in zip(wanted, way, strict=True))
    ]
    places = placed(wanted, shapes, free, steps)
    assert (places is None) == (not ways)
    if places is not None:
        assert places.certain == set.intersection(*map(set, ways))
        assert places.possible == {
            j for way in ways for j, stepped in zip(way, steps, strict=True) if stepped
        }
