"""What happened to a frozen region between two looks: who wrote to it, from which line, in which mode."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from freezekit.audit.live.calls import callees, recorders, wrap_call, wrap_setattr, wrappers
from freezekit.audit.live.collectives import Collectives, Reach, Sent
from freezekit.audit.live.region import Place, Region
from freezekit.audit.live.steps import Steps
from freezekit.audit.live.tensors import bits, differ, pointer, sample, version
from freezekit.audit.live.wrapping import Line, user_line, wrap

__all__ = ["KEEP", "Event", "Mode", "Pass", "Recorder"]

KEEP = 24
"""How many intervals are remembered: parameters are compared once in 20 looks."""

_QUIET = 3
"""After so many intervals in which its forward moved nothing, a layer's calls are no longer watched."""

_WHOLE = 4096
"""Up to how many values a tensor is compared whole around a call."""


class Trace(NamedTuple):
    """What a call did to one tensor: the writes that torch counted, and whether it is another value since."""

    writes: int
    moved: bool


@dataclass(slots=True)
class Event:
    """A call that reached frozen tensors.

    Args:
        kind: one of :data:`~freezekit.audit.findings.CAUSES`.
        interval: when.
        where: the user's line.
        what: the call, in words.
        names: what it did, by name of the tensor.
        sent: what it did, if it is a collective.
    """

    kind: str
    interval: int
    where: Line | None
    what: str
    names: dict[str, Trace] = field(default_factory=dict)
    sent: Sent | None = None

    def reaches(self, name: str) -> bool:
        """Tell whether the call reached a tensor."""
        return name in self.names or (self.sent is not None and name in self.sent.writes)

    def writes(self, name: str) -> int:
        """Return how many writes torch counted."""
        return self.names[name].writes if self.sent is None else self.sent.writes[name]

    def has_moved(self, name: str) -> bool:
        """Tell whether a tensor has another value since; this may wait for the device."""
        return self.names[name].moved if self.sent is None else self.sent.has_moved(name)


@dataclass(slots=True)
class Mode:
    """When a layer was put into train mode, and from which line, as far as that was seen."""

    on: bool
    where: Line | None = None
    off: int = -1
    """The interval in which it was last put into eval mode."""


@dataclass(slots=True)
class Pass:
    """The forwards of one layer in one interval."""

    interval: int
    calls: int = 0
    moving: list[tuple[bool, bool, bool]] = field(default_factory=list)
    writes: dict[str, int] = field(default_factory=dict)
    moved: dict[str, list[Tensor | bool]] = field(default_factory=dict)
    train: int = 0
    again: int = 0
    no_grad: int = 0

    def has_moved(self, name: str) -> bool:
        """Tell whether a tensor had another value after a forward; this waits for the device."""
        return any(bool(flag) for flag in self.moved.get(name, ()))


class Recorder:
    """Keeps the evidence while attached: a few wrapped functions, and nothing in the model.

    Args:
        region: what is frozen.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.now = 0
        self.events: deque[Event] = deque(maxlen=4096)
        self.owners: dict[int, nn.Module] = {}
        self.places: dict[int, list[Place]] = {}
        for place in region.places.values():
            self.owners[id(place.owner)] = place.owner
            self.places.setdefault(id(place.owner), []).append(place)
        self._forms = {key: _form(owner, self.places[key]) for key, owner in self.owners.items()}
        self.modes: dict[int, Mode] = {}
        self.passes: dict[int, deque[Pass]] = {}
        self.steps = Steps(region)
        self.collectives = Collectives(region)
        self._quiet: dict[int, int] = {}
        self._armed: set[int] = set()
        self._wrapped: dict[type[nn.Module], Callable[[], None]] = {}
        self._suspects: set[int] = set()
        self._explained: set[int] = set()
        self._known: set[str] = set()
        self._undo: list[Callable[[], None]] = []

    @property
    def attached(self) -> bool:
        """Whether it watches."""
        return bool(self._undo)

    def attach(self) -> None:
        """Start to watch."""
        if self.attached:
            return
        self.now += 1
        self._undo = [wrap(owner, name, make) for owner, name, make in wrappers()]
        hooks = register_module_parameter_registration_hook, register_module_buffer_registration_hook
        self._undo += [register(self._registered).remove for register in hooks]
        self.steps.attach(self)
        self._quiet.clear()
        for key, owner in self.owners.items():
            if any(place.role != "parameter" for place in self.places[key]):
                if not isinstance(getattr(type(owner), "training", None), property):
                    self.modes[key] = Mode(owner.training)
                    kind = type(owner)
                    self._undo.append(wrap(kind, "__setattr__", functools.partial(wrap_setattr, kind)))
                self._arm_if_it_may_write(key)
        recorders.append(self)

    def detach(self) -> None:
        """Stop, and put everything back."""
        if not self.attached:
            return
        recorders.remove(self)
        for key in list(self._armed):
            self._disarm(key)
        self.steps.detach()
        for undo in (*self._wrapped.values(), *reversed(self._undo)):
            undo()
        self._wrapped.clear()
        self._undo.clear()

    def tick(self) -> None:
        """Begin the next interval."""
        self.steps.settle()
        for key in list(self._armed):
            self._rest(key)
        self.now += 1
        while self.events and self.events[0].interval < self.now - KEEP:
            self.events.popleft()
        self.steps.forget(self.now - KEEP)

    def suspect(self, owner: nn.Module) -> None:
        """Watch the calls of a layer from now on, whatever its mode."""
        key = id(owner)
        if key not in self.owners or key in self._explained:
            return  # it was put in place of a layer, or there is nothing to ask
        self._suspects.add(key)
        self._quiet.pop(key, None)
        if self.attached:
            self._arm(key)

    def settled(self, place: Place) -> None:
        """Note that it is known why a tensor moved: nobody asks again, so its layer may need no watching."""
        self._known.add(place.name)
        key = id(place.owner)
        held = [other for other in self.places.get(key, ()) if other.role != "parameter"]
        if held and not _is_home_made(place.owner) and self._known.issuperset(p.name for p in held):
            self._explained.add(key)
            self._suspects.discard(key)
            self._disarm(key)

    def set(self, module: nn.Module, name: str, value: object) -> None:
        """Note what an attribute of a watched layer is about to be set to."""
        state = self.modes.get(id(module))
        if state is None:
            return
        if name != "training":
            if any(place.key == name and place.role == "attribute" for place in self.places[id(module)]):
                self._assigned(module, name, value)
            return
        if value and not (state.on and state.where):
            state.where = user_line()
        elif not value and state.on:
            state.off = self.now
        if bool(value) != state.on:
            state.on = bool(value)
            self._arm_if_it_may_write(id(module))

    def _registered(self, module: nn.Module, name: str, value: object) -> None:
        """Note that a parameter or buffer is about to be assigned: every way to do so ends there."""
        if not torch.compiler.is_compiling() and id(module) in self.owners:
            self._assigned(module, name, value)

    def _assigned(self, module: nn.Module, key: str, value: object) -> None:
        names = {
            place.name: Trace(0, not _is_the_same(place.tensor(), value))
            for place in self.places[id(module)]
            if place.key == key
        }
        if names:
            self.collectives.clear()
            self.events.append(Event("assignment", self.now, user_line(), "", names))

    def before(self, module: nn.Module) -> list[tuple[Place, Tensor | None, int, int, Tensor | None]]:
        """Return the frozen tensors in a part of the model, with what tells whether they are written to."""
        inside = {id(part) for part in module.modules()} & self.places.keys()
        found: list[tuple[Place, Tensor | None, int, int, Tensor | None]] = []
        for key in inside:
            for place in self.places[key]:
                tensor = place.tensor()
                if tensor is None:
                    found.append((place, None, 0, 0, None))
                    continue
                seen = sample(tensor, _WHOLE)
                copy = None if seen is None else seen.clone()
                found.append((place, tensor, version(tensor), pointer(tensor), copy))
        return found

    def after(self, kind: str, what: str, before: Iterable[Any]) -> None:
        """Note what has changed since :meth:`before`."""
        names = {}
        for place, tensor, count, where, copy in before:
            now = place.tensor()
            if now is not tensor or now is None:
                if now is not tensor:
                    names[place.name] = Trace(0, True)
                continue
            writes = version(now) - count
            seen = sample(now, _WHOLE)
            unlike = differ(copy, seen) if copy is not None and seen is not None else None
            moved = pointer(now) != where or unlike is None or bool(unlike)
            if writes or moved:
                names[place.name] = Trace(writes, moved or (writes > 0 and now.numel() > _WHOLE))
        if names:
            self.collectives.clear()
            self.events.append(Event(kind, self.now, user_line(), what, names))

    def sent(self, what: str, before: tuple[Reach, list[Tensor], dict[str, int]], waited: bool) -> None:
        """Note that a collective was given frozen tensors to write to, and maybe not waited for."""
        sent = self.collectives.after(before)
        if not waited:
            sent.unlike = [torch.ones_like(unlike) for unlike in sent.unlike]
        for event in reversed(self.events):
            if event.interval != self.now:
                break
            if event.sent is not None and event.sent.reach is sent.reach and event.what == what:
                event.sent.join(sent)
                return
        self.events.append(Event("broadcast", self.now, user_line(), what, sent=sent))

    def watched_call(self, module: nn.Module, call: Callable[[], Any]) -> Any:
        """Run a layer's forward and note what it did to the layer's own tensors."""
        held = []
        for place in self.places[id(module)]:
            if (tensor := place.tensor()) is not None:
                seen = bits(tensor) if place.role != "parameter" or tensor.numel() <= _WHOLE else None
                held.append((place, tensor, version(tensor), None if seen is None else seen.clone()))
        try:
            return call()
        finally:
            self._passed(module, held)

    def _passed(self, module: nn.Module, held: list[tuple[Place, Tensor, int, Tensor | None]]) -> None:
        rounds = self.passes.setdefault(id(module), deque(maxlen=KEEP))
        if not rounds or rounds[-1].interval != self.now:
            rounds.append(Pass(self.now))
        record = rounds[-1]
        record.calls += 1
        record.train += module.training
        record.again += torch._C._current_graph_task_id() != -1
        record.no_grad += not torch.is_grad_enabled()
        for place, tensor, count, copy in held:
            now = place.tensor()
            flag: Tensor | bool | None = now is not tensor
            if now is tensor:
                writes = version(tensor) - count
                record.writes[place.name] = record.writes.get(place.name, 0) + writes
                seen = None if copy is None else bits(tensor)
                flag = writes > 0 if seen is None or copy is None else differ(copy, seen)
            if flag is not False:
                _add_flag(record.moved.setdefault(place.name, []), True if flag is None else flag)

    def _arm_if_it_may_write(self, key: int) -> None:
        """Watch a layer's calls if its forward can move what it holds: in train mode, or home-made."""
        mode = self.modes.get(key)
        writes, home_made = self._forms[key]
        active = (mode is not None and mode.on) or home_made
        awake = key not in self._explained and self._quiet.get(key, 0) < _QUIET
        if key in self._suspects or (writes and active and awake):
            self._arm(key)
        else:
            self._disarm(key)

    def _arm(self, key: int) -> None:
        if key not in self._armed:
            kind = type(self.owners[key])
            if kind not in self._wrapped:
                self._wrapped[kind] = wrap(kind, "__call__", functools.partial(wrap_call, kind))
            self._armed.add(key)
            callees[key] = (*callees.get(key, ()), self)

    def _disarm(self, key: int) -> None:
        """Let a layer's calls pass; its class stays wrapped, as loops switch modes back and forth."""
        if key in self._armed:
            self._armed.remove(key)
            rest = tuple(other for other in callees.pop(key) if other is not self)
            if rest:
                callees[key] = rest

    def _rest(self, key: int) -> None:
        """Stop to watch the calls of a layer that has moved nothing for some time."""
        rounds = self.passes.get(key)
        if not rounds or rounds[-1].interval != self.now:
            return
        self._quiet[key] = self._quiet.get(key, 0) + 1
        if self._quiet[key] < _QUIET:
            return
        if any(record.has_moved(name) for record in rounds for name in record.moved):
            self._quiet[key] = 0
        else:
            self._suspects.discard(key)
            self._disarm(key)
            kind = type(self.owners[key])
            if kind in self._wrapped and not any(type(self.owners[other]) is kind for other in self._armed):
                self._wrapped.pop(kind)()


def _add_flag(flags: list[Tensor | bool], flag: Tensor | bool) -> None:
    """Join flags of one device, so that a hundred forwards between two looks cost one."""
    last = flags[-1] if flags else None
    if isinstance(last, Tensor) and isinstance(flag, Tensor) and last.device == flag.device:
        flags[-1] = last | flag
    elif last is not True:
        flags.append(flag)


def _is_the_same(old: Tensor | None, new: object) -> bool:
    """Tell whether a tensor that takes the place of another has its values; this may wait for the device."""
    if old is None or not isinstance(new, Tensor) or old.numel() > _WHOLE:
        return new is old
    seen = bits(old), bits(new)
    unlike = None if seen[0] is None or seen[1] is None else differ(seen[0], seen[1])
    return unlike is not None and not bool(unlike)


def _form(module: nn.Module, held: list[Place]) -> tuple[bool, bool]:
    """Tell whether a layer's forward has something to write to, and whether it is home-made."""
    return any(place.role != "parameter" for place in held), _is_home_made(module)


def _is_home_made(module: nn.Module) -> bool:
    return not type(module).__module__.startswith(("torch.nn.", "freezekit.nn."))
