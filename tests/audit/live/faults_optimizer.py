"""Faults by which an optimizer, an average, or another process moves what is frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from fault_scene import Fault, Scene, net, plain, scene
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

GRADIENT, MOMENTUM, DECAY, OPTIMIZER = "gradient", "momentum", "weight decay", "optimizer"
AVERAGING, WRITE, TRAIN = "averaging", "write", "train-mode forward"
LIN = "FK103 body.lin.weight"


def stale(s: Scene) -> None:
    """Leave a gradient behind on the frozen layer, as a backward before freezing does."""
    for parameter in s.model.body.lin.parameters():
        parameter.grad = torch.randn_like(parameter)


def zeros(s: Scene) -> None:
    """Leave a gradient of zeros, as zero_grad(set_to_none=False) does."""
    for parameter in s.model.body.lin.parameters():
        parameter.grad = torch.zeros_like(parameter)


def trained_before(optimizer: Callable[[Any], Optimizer]) -> Scene:
    """Train everything for two steps, then freeze, so that the optimizer has state of what is frozen."""
    s = scene(optimizer=optimizer, between=zeros)
    s.model.body.requires_grad_(True)
    for _ in range(2):
        s.model(s.x).square().mean().backward()
        s.optimizer.step()
        s.optimizer.zero_grad()
    s.model.body.requires_grad_(False)
    return s


class DecaysAll(Optimizer):
    """Decays every parameter, whether it has a gradient or not."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])


class Noisy(Optimizer):
    """Langevin-like: adds noise to every parameter, once its group is told to."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.1, "noise": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])
                if group["noise"]:
                    p.add_(torch.randn_like(p), alpha=group["noise"])


def turn_up(key: str) -> Callable[[Scene], None]:
    return lambda s: s.optimizer.param_groups[0].__setitem__(key, 0.1)


def with_closure(s: Scene, guilty: bool) -> None:
    def closure() -> Tensor:
        loss = s.model(s.x).square().mean()
        s.model.head.zero_grad()
        loss.backward()
        return loss

    s.optimizer.step(closure)


def step_of_scaler(s: Scene, guilty: bool) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))
    scaler.step(s.optimizer)
    scaler.update()


def live(s: Scene) -> None:
    s.model.body.lin.requires_grad_(True)


def tied() -> Scene:
    """The head shares the weight of a frozen embedding, and asks for its gradient."""
    model = net(emb=nn.Embedding(6, 4), out=4)
    model.head = nn.Linear(4, 6)
    model.head.weight = model.body.emb.weight
    x = torch.randint(0, 6, (8,))
    return scene(model, x, before=lambda s: s.model.head.requires_grad_(True))


def tied_given() -> Scene:
    """The same, with what is frozen given by name while the gradient is switched on late."""
    made = tied()
    made.frozen = ["body"]
    return made


def two_optimizers(follow_all: bool) -> Scene:
    """The second optimizer holds the frozen layer; the auditor follows the first, or all."""
    s = scene(between=stale)
    first, second = SGD(s.model.head.parameters(), lr=0.1), AdamW(s.model.body.parameters(), lr=0.1)

    def both(s: Scene, guilty: bool) -> None:
        first.step()
        second.step()

    s.update, s.follow, s.follow_all = both, first, follow_all
    return s


def group_added() -> Scene:
    s = scene()
    s.optimizer = SGD(s.model.head.parameters(), lr=0.1)

    def add(s: Scene) -> None:
        s.optimizer.add_param_group({"params": list(s.model.body.lin.parameters()), "lr": 0.01})
        stale(s)

    s.between = add
    return s


def schedule_free(where: str) -> Scene:
    from schedulefree import SGDScheduleFree

    def make(params: Any) -> Optimizer:
        optimizer = SGDScheduleFree(params, lr=0.1)
        optimizer.train()
        return optimizer

    if where == "step":
        return scene(optimizer=make, between=stale)
    s = trained_before(make)
    old, s.optimizer = s.optimizer, SGD(s.model.head.parameters(), lr=0.1)
    s.between = lambda s: old.eval()
    return s


def case(name: str, cause: str | tuple[str, ...], why: str, build: Callable[[], Scene], **more: Any) -> Fault:
    return Fault(name, build, more.pop("finds", LIN), cause, why, **more)


_sgd, _adam = partial(SGD, lr=0.1), partial(Adam, lr=0.1)
_adamw = partial(AdamW, lr=0.1, weight_decay=0.1)
_heavy = partial(SGD, lr=0.1, momentum=0.9)

steps = [
    case("SGD applies a stale gradient", GRADIENT, ".grad held a gradient, which the step applied",
         lambda: scene(between=stale)),
    case("stale gradient of a norm's weight", GRADIENT, "the same, in a norm layer",
         lambda: scene(between=lambda s: setattr(s.model.body.bn.weight, "grad", torch.randn(4))),
         finds="FK103 body.bn.weight", norm=True),
    case("AdamW applies a stale gradient, foreach", GRADIENT, "the same, several tensors at once",
         lambda: scene(optimizer=partial(_adamw, foreach=True), between=stale)),
    case("SGD fused applies a stale gradient", GRADIENT, "the same; fused kernels count no write",
         lambda: scene(optimizer=partial(_sgd, fused=True), between=stale), hint=False),
    case("AdamW fused applies a stale gradient", GRADIENT, "the same; fused kernels count no write",
         lambda: scene(optimizer=partial(_adamw, fused=True), between=stale), hint=False),
    case("LBFGS applies a stale gradient", GRADIENT, "its direction is made of the gradients it found",
         lambda: scene(optimizer=partial(LBFGS, lr=0.1, max_iter=2), between=stale, update=with_closure)),
    case("schedule-free SGD applies a stale gradient", GRADIENT, "as plain SGD does",
         lambda: schedule_free("step"), needs="schedulefree"),
    case("GradScaler steps with a stale gradient", GRADIENT, "the scaler calls the optimizer's step",
         lambda: scene(between=stale, update=step_of_scaler)),
    case("requires_grad switched on", GRADIENT, "backward computed a gradient, the step applied it",
         lambda: scene(before=live)),
    case("parameter group added", GRADIENT, "a new group applied a stale gradient", group_added),
    case("second optimizer, all followed", GRADIENT, "the second applied a stale gradient",
         lambda: two_optimizers(True)),
    case("second optimizer, the first followed", GRADIENT, "the same, behind the check of the first",
         lambda: two_optimizers(False), late=True),
    case("tied weight trains with the head", GRADIENT, "one tensor, two names: the head's gradient moved it",
         tied, finds="FK103 body.emb.weight"),
    case("tied weight, frozen as given", GRADIENT, "the same, frozen= says the body must not move",
         tied_given, finds="FK103 body.emb.weight"),
    case("SGD decays on zero gradients", DECAY, "the gradient was zero, there was no momentum: decay is left",
         lambda: scene(optimizer=partial(_sgd, weight_decay=0.1), between=zeros)),
    case("AdamW decays on zero gradients", DECAY, "the gradient was zero and so are both averages of it",
         lambda: scene(optimizer=_adamw, between=zeros)),
    case("Adam with L2 on zero gradients", DECAY, "the decay is what its gradient is made of",
         lambda: scene(optimizer=partial(_adam, weight_decay=0.1), between=zeros)),
    case("AdamW fused decays on zero gradients", DECAY, "as AdamW; fused kernels count no write",
         lambda: scene(optimizer=partial(_adamw, fused=True), between=zeros), hint=False),
    case("an optimizer that decays without gradients", (DECAY, OPTIMIZER),
         "it decayed; that a strange class means decay by weight_decay= need not be believed",
         lambda: scene(optimizer=DecaysAll, between=turn_up("weight_decay"))),
    case("an optimizer that adds noise", OPTIMIZER, "there was no gradient, momentum or decay",
         lambda: scene(optimizer=Noisy, between=turn_up("noise"))),
    case("SGD's momentum left over", MOMENTUM, "zero gradient and no decay: the momentum buffer moved it",
         lambda: trained_before(_heavy)),
    case("Adam's average left over", MOMENTUM, "the gradient was zero, there is no decay: exp_avg moved it",
         lambda: trained_before(_adam)),
    case("Adam's average left over, fused", MOMENTUM, "the same; fused kernels count no write",
         lambda: trained_before(partial(_adam, fused=True)), hint=False),
    case("momentum and decay together", (MOMENTUM, DECAY), "both moved it",
         lambda: trained_before(partial(_heavy, weight_decay=0.1))),
    case("schedule-free switches to its average", (AVERAGING, OPTIMIZER, WRITE),
         "its eval() lerps all it ever trained to the average, outside any step",
         lambda: schedule_free("switch"), needs="schedulefree"),
]  # fmt: skip


# -- averages ----------------------------------------------------------------------------------------------


class StudentTeacher(nn.Module):
    """The teacher is frozen, and somebody averages the student into it."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x) - self.teacher(x)


def pairs(s: Scene) -> list[tuple[Tensor, Tensor]]:
    return list(zip(s.model.teacher.parameters(), s.model.student.parameters(), strict=True))


@torch.no_grad()
def mul_add(s: Scene) -> None:
    for t, p in pairs(s):
        t.mul_(0.9).add_(p, alpha=0.1)


@torch.no_grad()
def lerp(s: Scene) -> None:
    for t, p in pairs(s):
        t.lerp_(p, 0.1)


def through_data(s: Scene) -> None:
    for t, p in pairs(s):
        t.data.mul_(0.9).add_(p.data, alpha=0.1)


def new_data(s: Scene) -> None:
    for t, p in pairs(s):
        t.data = t.data * 0.9 + p.data * 0.1


def copy_buffers(s: Scene) -> None:
    for t, b in zip(s.model.teacher.buffers(), s.model.student.buffers(), strict=True):
        t.copy_(b)


def averaged(**how: Any) -> Scene:
    """Audit torch's AveragedModel itself."""
    s = scene()
    s.audited = AveragedModel(plain(), **how).requires_grad_(False).eval()
    s.audited.update_parameters(plain())
    s.after = lambda s: s.audited.update_parameters(plain())
    return s


def timm_ema() -> Scene:
    from timm.utils import ModelEmaV3

    s = scene()
    ema = ModelEmaV3(plain(), decay=0.9)
    s.audited = ema.module.requires_grad_(False)
    s.after = lambda s: ema.update(plain())
    return s


def update_statistics(s: Scene) -> None:
    update_bn([s.x, s.x * 2], s.model)


def teacher(name: str, strike: Callable[[Scene], None], why: str, **more: Any) -> Fault:
    finds = more.pop("finds", "FK103 teacher.0.weight")
    return case(name, (AVERAGING, WRITE), why, lambda: scene(StudentTeacher(), after=strike), late=True,
                finds=finds, **more)  # fmt: skip


averages = [
    teacher("EMA by hand, mul_ and add_", mul_add, "an average, written in place"),
    teacher("EMA by hand, lerp_", lerp, "an average, written in place"),
    teacher("EMA by hand through .data", through_data, "an average, written through .data", hint=False),
    teacher("EMA by hand into new .data", new_data, "an average, put in through .data"),
    teacher("EMA by hand, buffers copied", copy_buffers, "an average whose buffers are copied in place",
            finds="FK101 teacher.1", norm=True),
    case("AveragedModel", AVERAGING, "update_parameters averaged it", averaged,
         finds="FK103 module.body.lin.weight", late=True),
    case("AveragedModel with buffers", AVERAGING, "update_parameters averaged its statistics too",
         partial(averaged, use_buffers=True), finds="FK101 module.body.bn", late=True, norm=True),
    case("AveragedModel, foreach EMA", AVERAGING, "update_parameters averaged it, all at once",
         partial(averaged, multi_avg_fn=get_ema_multi_avg_fn(0.9)), finds="FK103 module.body.lin.weight",
         late=True),
    case("timm ModelEmaV3", AVERAGING, "its update averaged it", timm_ema,
         finds="FK103 body.lin.weight", late=True, needs="timm"),
    case("swa_utils.update_bn", (TRAIN, AVERAGING), "it resets the statistics and runs train-mode forwards",
         lambda: scene(after=update_statistics), finds="FK101 body.bn", late=True, norm=True),
]  # fmt: skip

FAULTS = [*steps, *averages]
