"""What a fault is made of: a tiny model frozen properly by hand, a loop, and the step that goes wrong."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from zoo import scramble

GUILTY = 3
"""The step of the loop in which every fault strikes; the two before it are clean."""

Strike = Callable[["Scene"], object]


def nothing(scene: Scene) -> None:
    """Leave the loop as it is."""


@dataclass
class Scene:
    """A loop that keeps the frozen part in eval mode, and where the fault enters in the guilty step.

    `before` strikes between ``model.train()`` and the forward, `midway` between forward and backward,
    `between` after the backward, `after` behind ``optimizer.step()``: the next check is then the next step's.
    """

    model: nn.Module
    x: Tensor
    optimizer: Optimizer
    before: Strike = nothing
    midway: Strike = nothing
    between: Strike = nothing
    after: Strike = nothing
    forward: Callable[[Scene], Tensor] | None = None
    backward: Callable[[Tensor], object] = Tensor.backward
    update: Callable[[Scene, bool], object] | None = None
    audited: nn.Module | None = None
    frozen: list[str] | None = None
    follow: Optimizer | None = None
    follow_all: bool = False
    clear: bool = True

    def step(self, guilty: bool) -> None:
        """Train one step."""
        self.model.train()
        for part in frozen_parts(self.model):
            part.eval()
        if guilty:
            self.before(self)
        if self.clear:
            self.optimizer.zero_grad()
        out = self.forward(self) if self.forward else self.model(self.x)
        if guilty:
            self.midway(self)
        self.backward(out.float().square().mean())
        if guilty:
            self.between(self)
        if self.update:
            self.update(self, guilty)
        else:
            self.optimizer.step()
        if guilty:
            self.after(self)


@dataclass(frozen=True)
class Fault:
    """A fault that is injected on purpose, and what an audit must say of it.

    `finds` are the findings that must come (``"FK101 body.bn"``), `causes` the kinds that are true of what
    happened, the best first, and `why` says why they are. `hint` tells whether a moved parameter shows it
    without a look at its values (another object, another address, a higher ``_version``); other tensors need
    none, as they are compared at every check. `late`: the fault strikes after ``optimizer.step()``. `norm`: a
    norm layer is hit.
    """

    name: str
    build: Callable[[], Scene]
    finds: str | tuple[str, ...]
    causes: str | tuple[str, ...]
    why: str
    hint: bool = True
    late: bool = False
    norm: bool = False
    needs: str | None = None

    @property
    def at(self) -> int:
        """The step at whose check it must be seen."""
        return GUILTY + self.late


def frozen_parts(model: nn.Module) -> list[nn.Module]:
    """Return the parts that are frozen in every scene."""
    return [part for name, part in model.named_modules() if name.rpartition(".")[2] in ("body", "teacher")]


def net(width: int = 4, out: int | None = None, **layers: nn.Module) -> nn.Module:
    """Make a model of a frozen ``body`` of these layers and a ``head`` that trains."""
    body = nn.Sequential(OrderedDict(layers))
    model = nn.Sequential(OrderedDict(body=body, head=nn.Linear(out or width, 2)))
    return freeze_by_hand(scramble(model))


def freeze_by_hand(model: nn.Module) -> nn.Module:
    """Freeze the frozen parts properly, without freezekit."""
    for part in frozen_parts(model):
        part.requires_grad_(False).eval()
    return model


def scene(
    model: nn.Module | None = None,
    x: Tensor | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = lambda p: SGD(p, lr=0.1),
    **how: object,
) -> Scene:
    """Make a scene; by default a linear layer and a BatchNorm1d are frozen."""
    model = plain() if model is None else model
    x = torch.randn(8, 4) * 2 + 1 if x is None else x
    return Scene(model, x, optimizer(model.parameters()), **how)  # type: ignore[arg-type]


def plain() -> nn.Module:
    """Make the smallest model: a linear layer and a BatchNorm1d before the head."""
    return net(lin=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))


def train_body(s: Scene) -> None:
    """Put the frozen part in train mode, which is how most drift begins."""
    s.model.body.train()


def norm2d(layer: nn.Module, *, spread: tuple[int, ...] = (5, 5)) -> Scene:
    """Put a norm layer of four channels into the body, before a global pool, and train it by accident."""
    model = net(norm=layer, pool=Pool())
    # four, as torch 2.6's InstanceNorm rewrites its statistics in eval mode, and rounds for other sizes
    return scene(model, torch.randn(4, 4, *spread) + 1, before=train_body)


class Pool(nn.Module):
    """The mean over whatever follows the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)
