"""Faults beside which something innocent happens that looks like their cause, and faults of two causes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fault_scene import Fault, Scene, net, plain, scene, train_body
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel

WRITE, GRADIENT, MOMENTUM, DECAY = "write", "gradient", "momentum", "weight decay"
LOAD, TRAIN, OWN, MOVE = "load_state_dict", "train-mode forward", "own forward", "move"
LIN, BN = "FK103 body.lin.weight", "FK101 body.bn"


def by_hand(s: Scene) -> None:
    """Write without a trace to the weight; what moves it is this, and nothing beside it."""
    s.model.body.lin.weight.data.mul_(0.99)


def statistics_by_hand(s: Scene) -> None:
    s.model.body.bn.running_mean.add_(1)


def stale(s: Scene) -> None:
    s.model.body.lin.weight.grad = torch.randn(4, 4)


def beside(
    decoy: Callable[[Scene], object], strike: Callable[[Scene], object] = by_hand, **how: Any
) -> Scene:
    """Let the decoy happen after the backward, and the fault behind it."""

    def both(s: Scene) -> None:
        decoy(s)
        strike(s)

    return scene(between=both, **how)


def load_the_same(s: Scene) -> None:
    s.model.load_state_dict(copy.deepcopy(s.model.state_dict()))


def average_another(s: Scene) -> None:
    AveragedModel(plain()).update_parameters(plain())


def move_the_head(s: Scene) -> None:
    s.model.head.half().float()


def assign_the_same(s: Scene) -> None:
    weight = s.model.body.lin.weight
    s.model.body.lin.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def other_norm() -> Scene:
    """One norm trains by accident; the other, written by hand, does not."""
    model = net(lin=nn.Linear(4, 4), bn=nn.BatchNorm1d(4), second=nn.BatchNorm1d(4))
    return scene(model, before=lambda s: s.model.body.second.train(), between=statistics_by_hand)


def without_momentum() -> Scene:
    model = plain()
    model.body.bn.momentum = 0.0
    return scene(model, before=train_body)


def from_a_hook(before: bool) -> Scene:
    """A forward hook writes to the weight, in one step."""
    s = scene()
    armed: list[bool] = []

    def write(module: nn.Module, *_: object) -> None:
        if armed:
            armed.clear()
            with torch.no_grad():
                module.weight.add_(1)

    lin = s.model.body.lin
    (lin.register_forward_pre_hook if before else lin.register_forward_hook)(write)
    s.before = lambda s: armed.append(True)
    return s


def step_in_backward() -> Scene:
    """The optimizer steps from a hook as soon as the head's gradient is there, as memory-saving loops do."""
    s = scene(update=lambda s, guilty: None, before=stale, clear=False)

    def step(parameter: nn.Parameter) -> None:
        s.optimizer.step()
        s.model.head.zero_grad()

    s.model.head.weight.register_post_accumulate_grad_hook(step)
    return s


def decayed_too() -> Scene:
    return scene(optimizer=partial(AdamW, lr=0.1, weight_decay=0.1), between=stale)


def loaded_and_trained() -> Scene:
    def strike(s: Scene) -> None:
        s.model.body.load_state_dict({name: t + 1 for name, t in s.model.body.state_dict().items()})
        train_body(s)

    return scene(before=strike)


class Numpy(nn.Module):
    """Keeps a buffer by way of numpy, which leaves no trace in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("seen", torch.randn(4))
        self.on = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.on:
            self.seen.numpy()[:] += 1
        return x * self.weight


def numpy_layer() -> Scene:
    return scene(net(own=Numpy()), before=lambda s: setattr(s.model.body.own, "on", True))


_slow = partial(SGD, lr=0.0, momentum=0.9, weight_decay=0.1)

FAULTS = [
    Fault("by hand, beside a norm that trains", other_norm, BN, WRITE, "this norm never ran in train mode",
          norm=True),
    Fault("by hand, beside loading the same", partial(beside, load_the_same), LIN, WRITE,
          "what was loaded is what was there", hint=True),
    Fault("by hand, beside a stale gradient at lr 0", lambda: beside(stale, optimizer=_slow), LIN, WRITE,
          "a step of rate 0 moves nothing", hint=True),
    Fault("by hand as decay would, beside one that skips it",
          lambda: scene(optimizer=partial(AdamW, lr=0.1, weight_decay=0.1), between=by_hand), LIN, WRITE,
          "without a gradient AdamW does not touch it", hint=False),
    Fault("by hand, in train mode", lambda: scene(before=train_body, between=by_hand), LIN, WRITE,
          "a forward does not move weights", hint=False),
    Fault("by hand, beside an average of another model", partial(beside, average_another), LIN, WRITE,
          "another model was averaged", hint=False),
    Fault("by hand, beside a move of the head", partial(beside, move_the_head), LIN, WRITE,
          "the head was moved, this was not", hint=False),
    Fault("by hand, beside the same assigned", partial(beside, assign_the_same), LIN, WRITE,
          "what was assigned is what was there", hint=True),
    Fault("train mode without momentum", without_momentum, "FK102 body.bn", TRAIN,
          "the forward counts, and moves nothing else", norm=True),
    Fault("written by a forward hook", partial(from_a_hook, False), LIN, (WRITE, OWN),
          "a write in place, in a hook of the layer's call"),
    Fault("written by a forward pre-hook", partial(from_a_hook, True), LIN, (WRITE, OWN),
          "a write in place, in a hook of the layer's call"),
    Fault("own forward through numpy", numpy_layer, "FK104 body.own.seen", OWN,
          "its forward writes to it in eval mode"),
    Fault("step inside backward with a stale gradient", step_in_backward, LIN, GRADIENT,
          "the step applied it, wherever it was called"),
    Fault("stale gradient and decay together", decayed_too, LIN, (GRADIENT, DECAY), "both moved it"),
    Fault("loaded, then in train mode", loaded_and_trained, BN, (LOAD, TRAIN), "both moved it", norm=True),
]  # fmt: skip
