"""What optimizers did to frozen parameters, seen from just before a step to just after it."""

from __future__ import annotations

import operator
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from freezekit.audit.live.columns import Column, Views, row_of
from freezekit.audit.live.region import Region, places
from freezekit.audit.live.tensors import bits, version
from freezekit.audit.live.wrapping import Line, user_line

if TYPE_CHECKING:
    from freezekit.audit.live.evidence import Recorder

__all__ = ["Step", "Steps", "Touch"]

_SAMPLE = 64
"""How many values of each parameter, of its gradient and of its momentum are looked at around a step."""

_GRAD = operator.attrgetter("grad")

_MOMENTA = ("momentum_buffer", "exp_avg", "grad_avg", "momentum")
"""What optimizers call the state that goes on moving a parameter without a gradient."""


class _Member(NamedTuple):
    parameter: Tensor
    group: int
    names: tuple[str, ...]


@dataclass(slots=True)
class _Risky:
    """The frozen parameters that a step may move; as a rule the same from step to step."""

    members: list[_Member]
    parameters: list[Tensor] = field(default_factory=list)
    at: dict[str, int] = field(default_factory=dict)
    values: Views = field(default_factory=lambda: Views(_some_bits))
    grads: Views = field(default_factory=lambda: Views(_some))
    momenta: Views = field(default_factory=lambda: Views(_some))

    def __post_init__(self) -> None:
        self.parameters = [member.parameter for member in self.members]
        self.at = {name: i for i, member in enumerate(self.members) for name in member.names}


@dataclass(slots=True)
class _Members:
    groups: list[list[Tensor]]
    """Everything an optimizer holds."""
    frozen: list[_Member] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    reached: list[bool] = field(default_factory=list)
    risky: _Risky | None = None

    def that(self, reached: list[bool]) -> _Risky:
        """Return those of the frozen parameters that are marked."""
        if self.risky is None or reached != self.reached:
            self.reached = reached
            self.risky = _Risky([member for member, one in zip(self.frozen, reached, strict=True) if one])
        return self.risky


@dataclass(slots=True)
class Touch:
    """One frozen parameter in one step of an optimizer.

    Args:
        parameter: the parameter.
        group: the parameter group that holds it.
        requires_grad: whether it did.
        lr: of the group.
        weight_decay: of the group.
        writes: how many writes torch counted during the step.
        whole: whether all its values were compared.
        grad: whether anything but zero was seen in its ``.grad``, ``None`` without one.
        momentum: whether anything but zero was seen in its momentum, ``None`` without one.
        moved: whether one of the compared values moved, ``None`` if that could not be seen.
    """

    parameter: Tensor
    group: int
    requires_grad: bool
    lr: Any
    weight_decay: Any
    writes: int
    whole: bool
    grad: Tensor | None
    momentum: Tensor | None
    moved: Tensor | None = None

    def has_moved(self) -> bool:
        """Tell whether the step moved it; this waits for the device."""
        if self.moved is not None and bool(self.moved):
            return True
        # what was written to in part, as the rows of an embedding are, may have moved between the samples
        return self.may_have_moved and self.by_gradient()

    @property
    def may_have_moved(self) -> bool:
        """Whether it was written to where nobody looked."""
        return not self.whole and self.writes > 0

    def by_gradient(self) -> bool:
        """Tell whether there was a gradient that was not zero."""
        if self.grad is None or bool(self.grad):
            return self.grad is not None
        left = self.parameter.grad  # as a rule nobody has emptied it yet
        return not self.whole and left is not None and bool((left != 0).any())

    def by_momentum(self) -> bool:
        """Tell whether there was momentum that was not zero."""
        return self.momentum is not None and bool(self.momentum)


class _Touches(Mapping[str, Touch]):
    """What a step did to each frozen parameter, by name; put together when it is asked for."""

    def __init__(self, risky: _Risky, groups: list[dict[str, Any]], momenta: list[Tensor | None]) -> None:
        self.members, self.at, self.parameters = risky.members, risky.at, risky.parameters
        self.groups = [(group.get("lr", 1.0), group.get("weight_decay", 0)) for group in groups]
        self.requires_grad = [parameter.requires_grad for parameter in risky.parameters]
        self.versions = [*map(version, risky.parameters)]
        self.writes = [0] * len(risky.parameters)
        self.grads = _other_than_zero(risky.grads, [*map(_GRAD, risky.parameters)])
        self.momenta = _other_than_zero(risky.momenta, momenta)
        self.before = risky.values.look(risky.parameters)
        self.moved: Column | None = None

    def finish(self, values: Views) -> None:
        """Look at the parameters after the step."""
        self.writes = [version(p) - n for p, n in zip(self.parameters, self.versions, strict=True)]
        (before, spans), (now, spans_now) = self.before, values.look(self.parameters)
        if spans == spans_now and [(r.dtype, r.device) for r in before] == [(r.dtype, r.device) for r in now]:
            self.moved = Column([one != other for one, other in zip(before, now, strict=True)], spans)
        self.before = [], []

    def __len__(self) -> int:
        return len(self.at)

    def __iter__(self) -> Iterator[str]:
        return iter(self.at)

    def __getitem__(self, name: str) -> Touch:
        at = self.at[name]
        parameter, group, _ = self.members[at]
        moved = None if self.moved is None else self.moved.any(at)
        return Touch(
            parameter, group, self.requires_grad[at], *self.groups[group], self.writes[at],
            parameter.numel() <= _SAMPLE, self.grads.any(at), self.momenta.any(at), moved,
        )  # fmt: skip


@dataclass(slots=True)
class Step:
    """One step of one optimizer that could reach frozen parameters."""

    interval: int
    optimizer: str
    known: bool
    """Whether it is torch's own, which leaves alone what has no ``.grad``."""
    where: Line | None
    touches: _Touches


class Steps:
    """Watches the optimizers while attached.

    Args:
        region: what is frozen.
    """

    def __init__(self, region: Region) -> None:
        self.done: deque[Step] = deque(maxlen=1024)
        self.twins: dict[str, list[str]] = _twins(region)
        """Names of trained tensors that a frozen one may be an average of."""
        self.sources: dict[str, Tensor] = {}
        """The values of those, as they were when something had written to the frozen one."""
        self._region = region
        self._all = places(region.model) if self.twins else {}
        self._counts: dict[str, int] = {}
        self._names: dict[int, tuple[str, ...]] = {}
        self._members: weakref.WeakKeyDictionary[Optimizer, _Members] = weakref.WeakKeyDictionary()
        self._pending: dict[int, tuple[Step, _Risky, bool]] = {}
        self._hooks: list[Any] = []
        self._recorder: Recorder | None = None

    def attach(self, recorder: Recorder) -> None:
        """Start to watch."""
        self._recorder = recorder
        self._hooks = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        self._members.clear()
        self._names.clear()
        for place in self._region.places.values():
            if (tensor := place.tensor()) is not None:
                self._names[id(tensor)] = (*self._names.get(id(tensor), ()), place.name)
        self._counts = {name: self._count(name) for name in self.twins}

    def detach(self) -> None:
        """Stop."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._pending.clear()
        self._members.clear()

    def settle(self) -> None:
        """Look at what a step that is not quite over has moved: a hook of its own may be asking."""
        for key in list(self._pending):
            self._finish(key)

    def forget(self, before: int) -> None:
        """Forget what is older than this interval."""
        while self.done and self.done[0].interval < before:
            self.done.popleft()

    def _before(self, optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self._keep_sources()
        members = self._members_of(optimizer)
        if not members.frozen:
            return
        known = type(optimizer).__module__.startswith("torch.optim")
        closure = any(callable(given) for given in (*args[1:], *kwargs.values()))
        if closure or not known:  # a closure may give them gradients yet
            self._begin(optimizer, members.that([True] * len(members.frozen)), known, closure)
        elif any(map(operator.is_not, map(_GRAD, members.parameters), repeat(None))):
            reached = [*map(operator.is_not, map(_GRAD, members.parameters), repeat(None))]
            self._begin(optimizer, members.that(reached), known, closure)
        else:
            members.risky = None

    def _members_of(self, optimizer: Optimizer) -> _Members:
        """Return the frozen parameters that an optimizer holds; its groups may have changed since."""
        groups = optimizer.param_groups
        known = self._members.get(optimizer)
        if known is not None and len(known.groups) == len(groups):
            for group, params in zip(groups, known.groups, strict=True):
                if len(params) != len(group["params"]) or not all(map(operator.is_, params, group["params"])):
                    break
            else:
                return known
        found = _Members([list(group["params"]) for group in groups])
        for i, params in enumerate(found.groups):
            found.frozen += [_Member(p, i, self._names[id(p)]) for p in params if id(p) in self._names]
        found.parameters = [member.parameter for member in found.frozen]
        self._members[optimizer] = found
        return found

    def _begin(self, optimizer: Optimizer, risky: _Risky, known: bool, closure: bool) -> None:
        assert self._recorder is not None
        states = getattr(optimizer, "state", {})
        momenta = [_momentum(states.get(parameter)) for parameter in risky.parameters]
        touches = _Touches(risky, optimizer.param_groups, momenta)
        step = Step(self._recorder.now, type(optimizer).__name__, known, user_line(), touches)
        self._pending[id(optimizer)] = step, risky, closure

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if id(optimizer) in self._pending and not torch.compiler.is_compiling():
            self._finish(id(optimizer))

    def _finish(self, key: int) -> None:
        step, risky, closure = self._pending.pop(key)
        if closure:  # what it applied is what the closure left there
            step.touches.grads = _other_than_zero(risky.grads, [*map(_GRAD, risky.parameters)])
        step.touches.finish(risky.values)
        self.done.append(step)

    def _count(self, name: str) -> int:
        tensor = self._region.places[name].tensor()
        return 0 if tensor is None else version(tensor)

    def _keep_sources(self) -> None:
        """Copy what a frozen tensor may just have been averaged from, before the step moves that on."""
        for name, others in self.twins.items():
            count = self._count(name)
            if count != self._counts[name]:
                self._counts[name] = count
                for other in others:
                    if (tensor := self._all[other].tensor()) is not None:
                        self.sources[other] = tensor.detach().clone()


def _momentum(state: Any) -> Tensor | None:
    if not state:
        return None
    found = [state[key] for key in _MOMENTA if isinstance(state.get(key), Tensor)]
    return found[0] if found else None


def _other_than_zero(views: Views, tensors: list[Tensor | None]) -> Column:
    rows, spans = views.look(tensors)
    return Column([row != 0 for row in rows], spans)


def _some(tensor: Tensor) -> Tensor | None:
    return None if is_lazy(tensor) else row_of(tensor, _SAMPLE)


def _some_bits(tensor: Tensor) -> Tensor | None:
    seen = bits(tensor)
    return None if seen is None else row_of(seen, _SAMPLE)


def _twins(region: Region) -> dict[str, list[str]]:
    """Return, by name, the tensors outside the region that have the same name but for one part of it."""
    held = {name: p.tensor() for name, p in places(region.model).items()}
    trained: dict[tuple[str, ...], list[str]] = {}
    for name, tensor in held.items():
        if name not in region.places and tensor is not None and not is_lazy(tensor):
            for form in _forms(name):
                trained.setdefault(form, []).append(name)
    found: dict[str, list[str]] = {}
    for name in region.places:
        tensor = held.get(name)
        if tensor is None or is_lazy(tensor) or not tensor.is_floating_point():
            continue
        others = {other for form in _forms(name) for other in trained.get(form, ())}
        alike = [o for o in sorted(others) if _alike(tensor, held[o])]
        if alike:
            found[name] = alike
    return found


def _forms(name: str) -> list[tuple[str, ...]]:
    parts = name.split(".")
    return [(*parts[:i], "*", *parts[i + 1 :]) for i in range(len(parts) - 1)]


def _alike(one: Tensor, other: Tensor | None) -> bool:
    return (
        other is not None
        and one.shape == other.shape
        and one.dtype == other.dtype
        and one.device == other.device
    )
