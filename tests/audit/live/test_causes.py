"""Causes: each kind of fault is made in each place it can strike, and told by the evidence alone."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import freezekit
from freezekit.audit.findings import CAUSES, Cause
from freezekit.audit.live import wrapping
from freezekit.audit.live.causes import Change, Witness
from freezekit.audit.live.region import Place, Region


class Eye:
    """Looks as the auditor does: compares every frozen tensor and asks about what newly moved."""

    def __init__(self, model: nn.Module, frozen: list[str] | None = None) -> None:
        self.region = Region(model, frozen)
        self.witness = Witness(self.region)
        self.seen: dict[str, tuple[Tensor, int, int, int]] = {}
        self.frozen = {}
        for name, place in self.region.places.items():
            tensor = place.tensor()
            assert tensor is not None
            self.frozen[name] = tensor.detach().clone()
            self._saw(name, tensor)
        self.told: set[str] = set()
        self.witness.attach()

    def _saw(self, name: str, tensor: Tensor) -> None:
        self.seen[name] = tensor, tensor._version, tensor.data_ptr(), self.witness.now

    def look(self) -> dict[str, Cause]:
        changes = []
        for name, place in self.region.places.items():
            if name in self.told:
                continue
            change = self._change(name, place)
            if change is None:
                self._saw(name, place.tensor())
            else:
                changes.append(change)
                self.told.add(name)
        causes = self.witness.explain(changes)
        assert set(causes) == {change.place.name for change in changes}
        assert all(cause.kind in CAUSES for cause in causes.values())
        self.witness.tick()
        return causes

    def _change(self, name: str, place: Place) -> Change | None:
        now, before = place.tensor(), self.frozen[name]
        tensor, version, pointer, since = self.seen[name]
        if now is None:
            return Change(place, None, before, "missing", False, False, 0, since)
        what = None
        for part in ("shape", "dtype"):
            if getattr(now, part) != getattr(before, part):
                what = what or part
        if what is None and not torch.equal(_bits(now), _bits(before)):
            what = "value"
        if what is None:
            return None
        replaced = now is not tensor
        rebased = not replaced and now.data_ptr() != pointer
        return Change(
            place, now, before, what, replaced, rebased, 0 if replaced else now._version - version, since
        )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8) if tensor.ndim else tensor.detach()


@contextmanager
def eye(model: nn.Module, frozen: list[str] | None = None) -> Iterator[Eye]:
    found = Eye(model, frozen)
    try:
        yield found
    finally:
        found.witness.detach()


def kinds(causes: dict[str, Cause]) -> dict[str, str]:
    return {name: cause.kind for name, cause in causes.items()}


class Counting(nn.Module):
    """Moves a buffer of its own in place, replaces another, and keeps a third past torch's counter."""

    def __init__(self, in_eval: bool = False) -> None:
        super().__init__()
        self.in_eval = in_eval
        self.weight = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("inplace", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("behind", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.in_eval:
            self.inplace += 1
            self.replaced = self.replaced + 1
            self.behind.data += 1
        return x * self.weight


def net(*parts: nn.Module) -> nn.Sequential:
    """Frozen parts and a head that trains."""
    torch.manual_seed(0)
    model = nn.Sequential(*parts, nn.Flatten(), nn.LazyLinear(2))
    for part in parts:
        part.requires_grad_(False)
    return model


STATS = {"0.running_mean", "0.running_var", "0.num_batches_tracked"}


def _timm_bn() -> nn.Module:
    return pytest.importorskip("timm").layers.BatchNormAct2d(3)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "1d": (lambda: nn.BatchNorm1d(3), (4, 3), STATS),
    "2d": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2), STATS),
    "3d": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 2), STATS),
    "cumulative": (lambda: nn.BatchNorm1d(3, momentum=None), (4, 3), STATS),
    "instance": (
        lambda: nn.InstanceNorm2d(3, track_running_stats=True),
        (4, 3, 2, 2),
        {"0.running_mean", "0.running_var"},
    ),
    "ours": (lambda: freezekit.nn.BatchNorm2d(3), (4, 3, 2, 2), STATS),
    "timm": (_timm_bn, (4, 3, 2, 2), STATS),
    "home-made": (Counting, (4, 3), {"0.inplace", "0.replaced", "0.behind"}),
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_a_forward_in_train_mode_with_the_line_that_set_it(layer: str) -> None:
    make, shape, names = LAYERS[layer]
    model = net(make())
    model(torch.randn(shape))
    model.eval()
    with eye(model, ["0"]) as watched:
        assert watched.look() == {}
        model.train()
        assert watched.look() == {}
        model(torch.randn(shape))
        causes = watched.look()
    assert kinds(causes) == dict.fromkeys(names, "train-mode forward")
    for cause in causes.values():
        assert cause.where is not None
        assert cause.where.endswith("in test_a_forward_in_train_mode_with_the_line_that_set_it")
        assert "test_causes.py:" in cause.where
        assert cause.detail == f"in train mode since {cause.where}"


class Stubborn(nn.Sequential):
    """Overrides train, as many do."""

    def train(self, mode: bool = True) -> Stubborn:
        super().train(mode)
        return self


def fit(model: nn.Module) -> None:
    model.train()


@pytest.mark.parametrize("how", ["method", "assignment", "override"])
def test_whoever_sets_the_mode_is_named(how: str) -> None:
    model = net(nn.BatchNorm1d(3))
    if how == "override":
        model = Stubborn(model)
    bn = model.get_submodule("0.0" if how == "override" else "0")
    model(torch.randn(4, 3))
    model.eval()

    def assign() -> None:
        bn.training = True

    with eye(model) as watched:
        assign() if how == "assignment" else fit(model)
        model(torch.randn(4, 3))
        causes = watched.look()
    assert len(causes) == 3
    for cause in causes.values():
        assert cause.kind == "train-mode forward"
        assert cause.where is not None
        assert cause.where.endswith("in assign" if how == "assignment" else "in fit")


def test_a_pass_under_no_grad_and_how_many() -> None:
    model = net(nn.BatchNorm1d(3))
    model(torch.randn(4, 3))
    with eye(model) as watched:
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(4, 3))
        causes = watched.look()
    expected = "in train mode since before the auditor was attached, 3 forwards, under no_grad"
    assert {cause.detail for cause in causes.values()} == {expected}


def test_update_bn_is_a_forward_in_train_mode_and_a_reset() -> None:
    model = net(nn.BatchNorm1d(3))
    model(torch.randn(4, 3))
    model.eval()
    with eye(model) as watched:
        update_bn([torch.randn(4, 3)], model)
        causes = watched.look()
    assert causes["0.running_mean"].kind == "train-mode forward"
    assert "in test_update_bn" in str(causes["0.running_mean"].where)
    assert "also write" in causes["0.running_mean"].detail


@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute(reentrant: bool) -> None:
    model = net(nn.BatchNorm1d(3), nn.Linear(3, 3))
    model(torch.randn(4, 3))
    with eye(model) as watched:
        x = torch.randn(4, 3, requires_grad=True)
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        causes = watched.look()
    assert kinds(causes) == dict.fromkeys(STATS, "recompute")
    assert "2 forwards, 1 of them inside backward" in causes["0.running_mean"].detail


def test_a_layer_that_writes_in_eval_mode_too() -> None:
    model = net(Counting(in_eval=True))
    model.eval()
    model(torch.randn(4, 3))
    with eye(model) as watched:
        model(torch.randn(4, 3))
        causes = watched.look()
    assert kinds(causes) == dict.fromkeys(["0.inplace", "0.replaced", "0.behind"], "own forward")


def test_a_hook_on_a_layer_is_not_its_forward() -> None:
    model = net(nn.BatchNorm1d(3))
    model(torch.randn(4, 3))
    model.eval()

    def calibrate(layer: nn.Module, *_: object) -> None:
        layer.running_mean.add_(1)

    model[0].register_forward_hook(calibrate)
    with eye(model) as watched:
        watched.witness._recorder.suspect(model[0])
        model(torch.randn(4, 3))
        causes = watched.look()
    assert kinds(causes) == {"0.running_mean": "write"}


# -- optimizers


class Decaying(torch.optim.Optimizer):
    """Decays what has no gradient too, as some do."""

    def __init__(self, params: object, wd: float = 0.0, shift: float = 0.0) -> None:
        super().__init__(params, {"lr": 0.1, "weight_decay": wd, "shift": shift})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1 - group["lr"] * group["weight_decay"]).add_(group["shift"])


def _zero(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def _warm(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """One step with gradients everywhere, so that there is momentum."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    _zero(model)


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Make, str, str, str]] = {
    "stale sgd": (lambda p: torch.optim.SGD(p, lr=0.1), "stale", "gradient", "a stale .grad in group 0"),
    "stale fused": (lambda p: torch.optim.SGD(p, lr=0.1, fused=True), "stale", "gradient", "of SGD"),
    "stale adamw fused": (lambda p: torch.optim.AdamW(p, fused=True), "stale", "gradient", "of AdamW"),
    "decay sgd": (
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), "zero", "weight decay", "weight_decay=0.1 in",
    ),
    "decay sgd heavy": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), "zero", "weight decay", "SGD",
    ),
    "decay adamw": (lambda p: torch.optim.AdamW(p, weight_decay=0.1), "zero", "weight decay", "of AdamW"),
    "decay adamw fused": (
        lambda p: torch.optim.AdamW(p, weight_decay=0.1, fused=True), "zero", "weight decay", "of AdamW",
    ),
    "decay adam": (lambda p: torch.optim.Adam(p, weight_decay=0.1), "zero", "weight decay", "of Adam"),
    "decay without grad": (lambda p: Decaying(p, wd=0.1), "none", "weight decay", "weight_decay=0.1 in"),
    "momentum sgd": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "warm", "momentum", "and a .grad of zeros",
    ),
    "momentum adam": (lambda p: torch.optim.Adam(p), "warm", "momentum", "of Adam"),
    "momentum fused": (lambda p: torch.optim.Adam(p, fused=True), "warm", "momentum", "of Adam"),
    "its own way": (lambda p: Decaying(p, shift=0.01), "none", "optimizer", "inside its step, group 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIMIZERS)
@pytest.mark.parametrize("looks", [0, 5])
def test_optimizers(case: str, looks: int) -> None:
    make, state, kind, detail = OPTIMIZERS[case]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 2))
    optimizer = make(list(model.parameters()))
    if state == "warm":
        _warm(optimizer, model)
    model[0].requires_grad_(False)
    if state == "zero":
        _zero(model)
    elif state == "stale":
        model[0].weight.grad = torch.randn(20, 4)
        model[0].bias.grad = torch.randn(20)
    with eye(model) as watched:
        optimizer.step()
        for _ in range(looks):  # parameters are compared on a rolling window
            watched.witness.tick()
        causes = watched.look()
    assert kinds(causes) == {"0.weight": kind, "0.bias": kind}
    assert detail in causes["0.weight"].detail
    assert str(causes["0.weight"].where).endswith("in test_optimizers")


def test_the_group_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(
        [{"params": model[1].parameters()}, {"params": model[0].parameters()}], lr=0.1
    )
    model[0].requires_grad_(False)
    model[0].weight.grad = torch.randn(3, 4)
    with eye(model) as watched:
        optimizer.step()
        causes = watched.look()
    assert kinds(causes) == {"0.weight": "gradient"}
    assert "group 1 of SGD" in causes["0.weight"].detail


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
@pytest.mark.parametrize("given", ["by position", "by name"])
def test_a_gradient_that_the_closure_of_a_step_makes(kind: type[torch.optim.Optimizer], given: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = kind(model.parameters(), lr=0.1)  # as Lightning calls it, the backward is inside the step

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    with eye(model, ["0"]) as seen:
        optimizer.step(closure) if given == "by position" else optimizer.step(closure=closure)
        causes = seen.look()
    assert kinds(causes) == {"0.weight": "gradient", "0.bias": "gradient"}
    assert causes["0.weight"].detail == f"a .grad in group 0 of {kind.__name__}"


def test_rows_of_an_embedding_between_the_samples() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(5000, 8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([1234])).sum().backward()
    model[0].requires_grad_(False)
    with eye(model) as watched:
        optimizer.step()
        causes = watched.look()
    assert kinds(causes) == {"0.weight": "gradient"}


def test_a_look_from_a_hook_of_the_optimizer_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].requires_grad_(False)
    model[0].weight.grad = torch.randn(3, 4)
    found: list[dict[str, Cause]] = []
    with eye(model) as watched:
        optimizer.register_step_post_hook(lambda *_: found.append(watched.look()))
        optimizer.step()
    assert kinds(found[0]) == {"0.weight": "gradient"}


# -- writes, assignments, loads, moves


def _numpy(m: nn.Module) -> None:
    m[0].weight.detach().numpy()[0] += 1


def _twice(m: nn.Module) -> None:
    with torch.no_grad():
        m[0].weight.add_(1)
        m[0].weight.mul_(1.5)


def _assign(m: nn.Module) -> None:
    m[0].weight = nn.Parameter(torch.randn(3), requires_grad=False)


def _assign_buffer(m: nn.Module) -> None:
    m[0].running_mean = torch.randn(3)


def _delete(m: nn.Module) -> None:
    del m[0].weight


def _none(m: nn.Module) -> None:
    m[0].running_var = None


def _data(m: nn.Module) -> None:
    m[0].weight.data = torch.randn(3)


def _resize(m: nn.Module) -> None:
    m[0].running_mean.resize_(5)


def _other(m: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {k: torch.rand_like(v.float()).to(v.dtype) + 3 for k, v in m.state_dict().items()}


def _load(m: nn.Module) -> None:
    m.load_state_dict(_other(m))


def _load_part(m: nn.Module) -> None:
    m[0].load_state_dict(_other(m[0]))


def _load_assign(m: nn.Module) -> None:
    m.load_state_dict(_other(m), assign=True)


def _half(m: nn.Module) -> None:
    m[0].weight.data = m[0].weight.data.half()


WEIGHTS = {"0.weight", "0.bias"}
FLOATS = (STATS | WEIGHTS) - {"0.num_batches_tracked"}
WRITES: dict[str, tuple[Callable[[nn.Module], object], set[str], str, str]] = {
    "in place": (_twice, {"0.weight"}, "write", "2 counted writes"),
    "buffer in place": (lambda m: m[0].running_var.mul_(2), {"0.running_var"}, "write", "1 counted write"),
    "through .data": (lambda m: m[0].weight.data.add_(1), {"0.weight"}, "write", "past torch's counter"),
    "buffer through .data": (lambda m: m[0].running_mean.data.add_(1), {"0.running_mean"}, "write", "past"),
    "numpy": (_numpy, {"0.weight"}, "write", "past torch's counter"),
    ".data replaced": (_data, {"0.weight"}, "write", ".data was replaced"),
    "resized": (_resize, {"0.running_mean"}, "write", "resized"),
    "reset": (lambda m: m[0].reset_running_stats(), STATS, "write", "1 counted write"),
    "assigned": (_assign, {"0.weight"}, "assignment", "in _assign"),
    "buffer assigned": (_assign_buffer, {"0.running_mean"}, "assignment", "in _assign_buffer"),
    "deleted": (_delete, {"0.weight"}, "assignment", "taken away"),
    "set to None": (_none, {"0.running_var"}, "assignment", "taken away at"),
    "loaded": (_load, STATS | WEIGHTS, "load_state_dict", "Sequential.load_state_dict at "),
    "loaded in part": (_load_part, STATS | WEIGHTS, "load_state_dict", "in _load_part"),
    "loaded by assignment": (_load_assign, STATS | WEIGHTS, "load_state_dict", "in _load_assign"),
    "recast": (lambda m: m.half(), FLOATS, "move", "in <lambda>"),
    "recast and back": (lambda m: m.half().float(), FLOATS, "move", "_apply"),
    "recast by hand": (_half, {"0.weight"}, "move", ".data"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITES)
@pytest.mark.parametrize("later", [False, True])
def test_writes(case: str, later: bool) -> None:
    inject, names, kind, detail = WRITES[case]
    model = net(nn.BatchNorm1d(3))
    model(torch.randn(4, 3))
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].bias.normal_()
    model.eval()
    with eye(model) as watched:
        if later:
            for _ in range(4):
                model(torch.randn(4, 3))
                assert watched.look() == {}
        inject(model)
        if later:
            for _ in range(3):
                watched.witness.tick()
        causes = watched.look()
    assert kinds(causes) == dict.fromkeys(names, kind)
    for cause in causes.values():
        assert detail in cause.detail


def test_what_cannot_be_told_is_unknown_and_told_the_next_time() -> None:
    """Its forward has been quiet for so long that nobody watches any more."""
    model = net(Counting())
    model.eval()
    with eye(model) as watched:
        for _ in range(6):
            model(torch.randn(4, 3))
            assert watched.look() == {}
        model[0].in_eval = True
        model(torch.randn(4, 3))
        causes = watched.look()
        assert causes["0.behind"].kind == "unknown"
        watched.told.clear()
        model(torch.randn(4, 3))
        causes = watched.look()
        assert causes["0.behind"].kind == "own forward"


def test_averaged_model() -> None:
    source = net(nn.BatchNorm1d(3))
    source(torch.randn(4, 3))
    average = AveragedModel(source, use_buffers=True)
    average.update_parameters(source)
    with eye(average, ["module.0"]) as watched:
        for p in source.parameters():
            p.data.add_(torch.randn_like(p))
        average.update_parameters(source)
        causes = watched.look()
    assert kinds(causes) == dict.fromkeys(["module.0.weight", "module.0.bias"], "averaging")
    assert "AveragedModel.update_parameters at " in causes["module.0.weight"].detail


def test_timm_ema() -> None:
    model_ema = pytest.importorskip("timm.utils.model_ema")
    source = net(nn.BatchNorm1d(3))
    source(torch.randn(4, 3))
    source.eval()
    for kind in (model_ema.ModelEmaV2, model_ema.ModelEmaV3):
        ema = kind(source)
        with eye(ema.module, ["0"]) as watched:
            for p in source.parameters():
                p.data.add_(torch.randn_like(p))
            ema.update(source)
            causes = watched.look()
        assert causes.keys() >= WEIGHTS
        assert {cause.kind for cause in causes.values()} == {
            "averaging"
        }  # equal statistics drift by rounding


@pytest.mark.parametrize("decay", [0.9, 0.999])
@pytest.mark.parametrize("form", ["lerp", "mul"])
def test_a_teacher_averaged_by_hand(decay: float, form: str) -> None:
    torch.manual_seed(3)
    student, teacher = nn.Linear(6, 5), nn.Linear(6, 5).requires_grad_(False)
    model = nn.ModuleDict({"student": student, "teacher": teacher})
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        student(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()

    with eye(model) as watched:
        step()
        assert watched.look() == {}
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.lerp_(s, 1 - decay) if form == "lerp" else t.mul_(decay).add_(s, alpha=1 - decay)
        step()  # the student moves on before anybody looks
        causes = watched.look()
    assert kinds(causes) == dict.fromkeys(["teacher.weight", "teacher.bias"], "averaging")
    assert causes["teacher.weight"].detail == f"moved {1 - decay:.3g} of the way to student.weight"


def test_compiled_forwards_are_proven_by_the_counter() -> None:
    model = net(nn.BatchNorm1d(3))
    model(torch.randn(4, 3))
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(4, 3))
    with eye(model) as watched:
        compiled(torch.randn(4, 3))
        assert watched.look() == {}
        compiled.train()
        compiled(torch.randn(4, 3))
        causes = watched.look()
        fresh = torch.compile(model, fullgraph=True, backend="aot_eager")
        fresh(torch.randn(4, 3))
    compiled(torch.randn(4, 3))
    assert kinds(causes) == dict.fromkeys(STATS, "train-mode forward")
    assert "in test_compiled" in str(causes["0.running_mean"].where)


def test_a_compiled_forward_that_replaces_a_buffer_is_not_guessed() -> None:
    class Replacing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.seen = self.seen + 1
            return x

    model = net(Replacing(), nn.Linear(3, 3))
    model(torch.randn(4, 3))
    model.eval()
    compiled = torch.compile(model, backend="aot_eager")
    with eye(model, ["0"]) as watched:
        compiled(torch.randn(4, 3))
        assert watched.look() == {}
        compiled.train()
        compiled(torch.randn(4, 3))
        assert kinds(watched.look()) == {"0.seen": "unknown"}


# -- processes


def _rank(rank: int, store: str) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, 2), rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    model.eval()
    parallel = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(4, 3)

    def look(fault: Callable[[], object]) -> dict[str, str]:
        with eye(model) as watched:
            parallel(x)
            assert watched.look() == {}
            fault()
            return kinds(watched.look())

    def one_rank_moves() -> None:
        if rank == 0:
            model[0].running_mean.data.add_(1)
        parallel(x)

    def write_beside() -> None:
        parallel(x)
        model[0].running_mean.add_(1)

    def send() -> None:
        if rank == 0:
            model[0].weight.data.add_(1)
        torch.distributed.broadcast(model[0].weight.data, 0)

    def train() -> None:
        parallel.train()
        parallel(x + rank)
        parallel.eval()

    own = {"0.running_mean": "write"}
    assert look(one_rank_moves) == ({"0.running_mean": "broadcast"} if rank else own)
    assert look(write_beside) == own
    assert look(send) == {"0.weight": "broadcast" if rank else "write"}
    assert look(train) == dict.fromkeys(STATS, "train-mode forward")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_collectives_of_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path / "store"),), nprocs=2)


# -- it leaves nothing behind


def _attributes() -> dict[tuple[str, str], object]:
    owners = [nn.Module, nn.BatchNorm1d, nn.Linear, AveragedModel, torch.distributed]
    found = {(str(owner), name): value for owner in owners for name, value in vars(owner).items()}
    return {
        key: value for key, value in found.items() if callable(value) and "__warningregistry__" not in key
    }


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_everything_is_put_back_whoever_leaves_first(order: tuple[int, ...]) -> None:
    before = _attributes()
    model = net(nn.BatchNorm1d(3))
    model(torch.randn(4, 3))
    eyes = [Eye(model) for _ in range(3)]
    assert "__setattr__" in vars(nn.BatchNorm1d)
    assert nn.Module._apply is not before[str(nn.Module), "_apply"]
    for i in order:
        model(torch.randn(4, 3))
        assert eyes[i].look()
        eyes[i].witness.detach()
        eyes[i].witness.detach()
    after = _attributes()
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    assert not wrapping._wraps
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


def test_what_others_wrapped_after_us_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(nn.BatchNorm1d(3))
    model(torch.randn(4, 3))
    original = nn.Module.load_state_dict
    watched = Eye(model)
    ours = nn.Module.load_state_dict
    calls: list[nn.Module] = []

    def theirs(self: nn.Module, *args: object, **kwargs: object) -> object:
        calls.append(self)
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "load_state_dict", theirs)
    watched.witness.detach()
    assert nn.Module.load_state_dict is theirs
    model.load_state_dict(model.state_dict())
    assert calls == [model]
    with eye(model) as again:
        model.load_state_dict(_other(model))
        assert set(kinds(again.look()).values()) == {"load_state_dict"}
    monkeypatch.setattr(nn.Module, "load_state_dict", original)
    monkeypatch.undo()
    nn.Module.load_state_dict = original


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_nothing_is_kept_in_the_model() -> None:
    model = net(nn.BatchNorm1d(3), Counting())
    model(torch.randn(4, 3))
    kept = {name: set(vars(module)) for name, module in model.named_modules()}
    with eye(model) as watched:
        model(torch.randn(4, 3))
        watched.look()
        assert {name: set(vars(module)) for name, module in model.named_modules()} == kept
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            copied.train()
            copied(torch.randn(4, 3))
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        torch.load(saved, weights_only=False)
        assert torch.jit.trace(model.eval(), torch.randn(4, 3)) is not None
        assert watched.look() == {}


def test_the_model_is_let_go() -> None:
    model = net(nn.BatchNorm1d(3))
    model(torch.randn(4, 3))
    gone = weakref.ref(model)
    with eye(model) as watched:
        model(torch.randn(4, 3))
        watched.look()
    del model, watched
    import gc

    gc.collect()
    assert gone() is None


def test_a_quiet_layer_is_not_watched_for_ever() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.arange(3))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.index]

    model = net(Indexed(), nn.Linear(3, 3))
    with eye(model, ["0", "1"]) as watched:
        assert "__call__" in vars(Indexed)
        for _ in range(5):
            model.train()
            model(torch.randn(4, 3))
            assert watched.look() == {}
        assert "__call__" not in vars(Indexed)


def test_lines_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(wrapping.Line(str(tmp_path / "train.py"), 3, "<module>")) == "train.py:3"
    assert str(wrapping.Line(str(tmp_path / "a" / "b" / "c.py"), 3, "fit")) == "a/b/c.py:3 in fit"
    assert str(wrapping.Line("/far/away/lib/c.py", 3, "fit")) == "lib/c.py:3 in fit"
