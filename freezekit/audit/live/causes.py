"""From the evidence to the cause: what is proven, or that it is unknown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from freezekit.audit.findings import Cause
from freezekit.audit.live.change import Change
from freezekit.audit.live.evidence import Event, Pass, Recorder
from freezekit.audit.live.region import Region
from freezekit.audit.live.steps import Step, Touch
from freezekit.audit.state import STATS

__all__ = ["Witness"]


class Witness:
    """Sees what happens to a frozen region, and says why something in it moved.

    Nothing is stored in the model. While attached, a few functions of torch are wrapped in their class or
    module and put back on :meth:`detach`; several may be attached at once.

    Args:
        region: what is frozen.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> _ = model[0].requires_grad_(False)
    >>> region = Region(model)
    >>> witness, place = Witness(region), region.places["0.running_mean"]
    >>> before = place.tensor().clone()
    >>> witness.attach()
    >>> _ = model(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    >>> change = Change(place, place.tensor(), before, "value", False, False, writes=0, since=0)
    >>> print(witness.explain([change])["0.running_mean"])
    train-mode forward (in train mode since before the auditor was attached)
    >>> witness.detach()

    Source: torch.optim.optimizer.register_optimizer_step_pre_hook; torch.nn.Module.
    """

    def __init__(self, region: Region) -> None:
        self._recorder = Recorder(region)
        self._unseen: set[str] = set()
        """What moved while nobody watched: that something else did not move it proves nothing."""

    @property
    def now(self) -> int:
        """The ordinal of the interval; 0 until attached, so that 0 is the frozen state itself."""
        return self._recorder.now

    def attach(self) -> None:
        """Start to watch; again is once."""
        self._recorder.attach()

    def detach(self) -> None:
        """Stop, and put everything back; what was seen is kept."""
        self._recorder.detach()

    def tick(self) -> None:
        """Begin the next interval: everything has been looked at."""
        self._recorder.tick()

    def explain(self, changes: list[Change]) -> dict[str, Cause]:
        """Return why each of these tensors changed, by name.

        Args:
            changes: what was not seen to be changed before; tensors of one layer belong together.
        """
        self._recorder.steps.settle()
        if not self._recorder.attached:
            self._unseen.update(change.place.name for change in changes)
        stats = _by_layer(changes)
        causes = {}
        for change in changes:
            cause = self._cause(change, stats.get(id(change.place.owner), {}))
            causes[change.place.name] = cause
            if cause.kind != "unknown":
                self._recorder.settled(change.place)
            if cause.kind in ("unknown", "write") and change.place.role != "parameter":
                self._recorder.suspect(change.place.owner)  # so that the next time tells
        return causes

    def _cause(self, change: Change, stats: dict[str, Change]) -> Cause:
        found = [*self._proofs(change, stats)]
        if not found:
            return self._last_resort(change, stats)
        others = dict.fromkeys(c.kind for c in found if c.kind != found[0].kind)
        if not others:
            return found[0]
        return replace(found[0], detail=f"{found[0].detail}; also {', '.join(others)}".removeprefix("; "))

    def _proofs(self, change: Change, stats: dict[str, Change]) -> Iterable[Cause]:
        """Yield what is proven to have changed it, the strongest first."""
        name = change.place.name
        events = [e for e in self._recorder.events if e.interval > change.since and e.reaches(name)]
        moving = [e for e in events if e.has_moved(name)]
        yield from (_of_event(e) for e in moving if e.kind in ("load_state_dict", "averaging", "move"))
        passes = self._passes(change)
        forwards = [*self._forwards(change, passes)]
        yield from forwards
        if change.replaced or change.what in ("missing", "added"):
            assigned = [e for e in events if e.kind == "assignment"]
            lines = [e for e in assigned if e.has_moved(name)]
            # a forward may have replaced it, and if it is compiled nobody saw it
            if not forwards and (lines or (not assigned and self._is_from_outside(change, stats, passes))):
                yield _assigned(change, lines)
            return
        if change.what in ("dtype", "device"):
            yield Cause("move", "its .data was replaced" if change.rebased else "")
            return
        steps = [s for s in self._recorder.steps.done if s.interval > change.since and name in s.touches]
        pushed = next((s for s in steps if s.touches[name].has_moved()), None)
        if pushed is not None:
            yield _of_step(pushed, pushed.touches[name], change)
        yield from (_of_event(e) for e in moving if e.kind == "broadcast")
        if change.rebased or change.what == "shape":
            yield Cause("write", "resized in place" if change.writes else "its .data was replaced")
            return
        if (count := self._unaccounted(change)) > 0:
            if (averaged := self._averaged(change)) is not None:
                yield averaged
            elif self._compiled_forward(change, stats, passes):
                yield self._of_mode(change, "train-mode forward")
            elif self._is_from_outside(change, stats, passes):
                yield Cause("write", f"{count} counted write{'' if count == 1 else 's'}")
        elif self._compiled_forward(change, stats, passes):
            yield self._of_mode(change, "train-mode forward")

    def _last_resort(self, change: Change, stats: dict[str, Change]) -> Cause:
        """Say that it was written to behind torch's back where nothing else can have been, or unknown."""
        if change.replaced:
            return Cause("unknown")  # what was put there was the same, and torch's count is another
        passes, name = self._passes(change), change.place.name
        steps = [s for s in self._recorder.steps.done if s.interval > change.since and name in s.touches]
        if any(step.touches[name].may_have_moved for step in steps):
            return Cause("unknown")
        if self._unaccounted(change) <= 0 and self._is_from_outside(change, stats, passes):
            return Cause("write", "past torch's counter of writes: .data, numpy or C++")
        return Cause("unknown")

    def _unaccounted(self, change: Change) -> int:
        """Return how many counted writes were made by nothing that was watched."""
        name, recorder = change.place.name, self._recorder
        known = [e.writes(name) for e in recorder.events if e.interval > change.since and e.reaches(name)]
        known += [
            step.touches[name].writes
            for step in recorder.steps.done
            if step.interval > change.since and name in step.touches
        ]
        known += [record.writes.get(name, 0) for record in self._passes(change)]
        return change.writes - sum(known)

    def _passes(self, change: Change) -> list[Pass]:
        rounds = self._recorder.passes.get(id(change.place.owner), ())
        return [record for record in rounds if record.interval > change.since]

    def _forwards(self, change: Change, passes: list[Pass]) -> Iterable[Cause]:
        name = change.place.name
        moving = [record for record in passes if record.has_moved(name)]
        if not moving:
            return
        if _may_be_a_hook(change, moving):
            yield Cause("write", "during the layer's call, by its forward or by a hook on it")
            return
        calls = sum(record.calls for record in moving)
        notes = [] if calls == 1 else [f"{calls} forwards"]
        if again := sum(record.again for record in moving):
            notes.append(f"{again} of them inside backward" if calls > 1 else "inside backward")
        if all(record.no_grad == record.calls for record in moving) and not again:
            notes.append("under no_grad")
        if not any(record.train for record in moving):
            yield Cause("own forward", ", ".join(notes))
            return
        yield self._of_mode(change, "recompute" if again else "train-mode forward", *notes)

    def _of_mode(self, change: Change, kind: str, *notes: str) -> Cause:
        mode = self._recorder.modes.get(id(change.place.owner))
        where = None if mode is None or mode.where is None else str(mode.where)
        since = f" since {where or 'before the auditor was attached'}"
        if mode is None:
            since = ""  # it was put in place of the layer that was there, or keeps to a mode of its own
        return Cause(kind, ", ".join([f"in train mode{since}", *notes]), where)

    def _was_training(self, change: Change) -> bool:
        mode = self._recorder.modes.get(id(change.place.owner))
        if mode is None:
            return change.place.owner.training  # a class that kept it in eval mode may have been swapped back
        return mode.on or mode.off > change.since

    def _compiled_forward(self, change: Change, stats: dict[str, Change], passes: list[Pass]) -> bool:
        """Tell whether the three statistics moved as only a forward moves them.

        What is compiled cannot be watched. But the counter went up by a number, and torch counted as many
        writes to each of the three, or a multiple of that; or no writes to the first two, as its own kernel
        leaves it.
        """
        layer = change.place.owner
        if not isinstance(layer, _NormBase) or any(record.calls for record in passes):
            return False
        if change.place.name in self._unseen:
            return False
        if not self._was_training(change) or set(stats) != set(STATS):
            return False
        counter = stats["num_batches_tracked"]
        if (
            counter.tensor is None
            or counter.before is None
            or any(c.replaced or c.rebased for c in stats.values())
        ):
            return False
        batches = int(counter.tensor) - int(counter.before)
        if batches < 1 or counter.writes % batches:
            return False
        return counter.writes > 0 and all(stats[s].writes in (0, counter.writes) for s in STATS[:2])

    def _is_from_outside(self, change: Change, stats: dict[str, Change], passes: list[Pass]) -> bool:
        """Tell whether no forward that could not be watched may have written to it."""
        if change.place.name in self._unseen and not (change.replaced or change.what in ("missing", "added")):
            return False
        if change.place.role == "parameter":
            return True
        watched = any(record.calls for record in passes)
        if watched:
            return True
        if isinstance(change.place.owner, _NormBase):
            return not self._was_training(change) or _is_no_forward(change, stats)
        return (change.writes > 0 or change.replaced) and not self._was_training(change)

    def _averaged(self, change: Change) -> Cause | None:
        """Return averaging if the new value lies between the old and a trained tensor, everywhere alike."""
        name = change.place.name
        for other in self._recorder.steps.twins.get(name, ()):
            source = self._recorder.steps.sources.get(other)
            share = None if source is None else _share(change.before, change.tensor, source)
            if share is not None:
                return Cause("averaging", f"moved {share:.3g} of the way to {other}")
        return None


def _share(before: Tensor | None, now: Tensor | None, source: Tensor) -> float | None:
    """Return the ``a`` in (0, 1) with ``now == before + a * (source - before)``, if there is one."""
    if before is None or now is None or not before.shape == now.shape == source.shape:
        return None
    old, new, to = (t.detach().to("cpu", torch.float64) for t in (before, now, source))
    way = to - old
    if way.numel() < 2 or not bool(torch.isfinite(way).all() & torch.isfinite(new).all()):
        return None
    if not float((way * way).sum()) or len(torch.unique(way)) < 2:
        return None
    share = float(((new - old) * way).sum() / (way * way).sum())
    slack = 8 * torch.finfo(now.dtype).eps * torch.maximum(old.abs(), to.abs())
    exact = bool(((new - (old + share * way)).abs() <= slack).all())
    return share if exact and 0 < share < 1 else None


def _shrunk(before: Tensor | None, now: Tensor | None) -> bool:
    """Tell whether every value is the old one times the same factor below 1."""
    if before is None or now is None or before.shape != now.shape:
        return False
    old, new = (t.detach().to("cpu", torch.float64) for t in (before, now))
    size = float((old * old).sum())
    if not size or not bool(torch.isfinite(new).all()):
        return False
    factor = float((old * new).sum()) / size
    slack = 64 * torch.finfo(now.dtype).eps * old.abs()
    return 0 < factor < 1 and bool(((new - factor * old).abs() <= slack).all())


def _is_no_forward(change: Change, stats: dict[str, Change]) -> bool:
    """Tell whether torch's own batch norm cannot have done this in a forward, whatever its mode.

    Its forward adds 1 to the counter, in one counted write, and moves both statistics in writes that nobody
    counts; the same kernel called from elsewhere leaves the counter alone.
    """
    layer = change.place.owner
    if not isinstance(layer, _BatchNorm) or not type(layer).__module__.startswith("torch.nn."):
        return False
    if change.what == "missing":
        return True
    if change.writes < 1 or layer._buffers.get("num_batches_tracked") is None:
        return False
    counter = stats.get("num_batches_tracked")
    if counter is None:
        return True
    if set(stats) == {"num_batches_tracked"}:
        return layer.momentum != 0
    if counter.tensor is None or counter.before is None:
        return False
    return int(counter.tensor) - int(counter.before) != counter.writes


def _by_layer(changes: list[Change]) -> dict[int, dict[str, Change]]:
    layers: dict[int, dict[str, Change]] = {}
    for change in changes:
        if change.what == "value" and change.place.role in STATS:
            layers.setdefault(id(change.place.owner), {})[change.place.role] = change
    return layers


def _may_be_a_hook(change: Change, moving: list[Pass]) -> bool:
    layer = change.place.owner
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    if all(type(hook).__module__.startswith("torch.") for hook in hooks):
        return False  # such as spectral_norm's, which are part of the layer
    if isinstance(layer, _NormBase) and change.place.role in STATS[:2]:
        return any(record.writes.get(change.place.name) for record in moving)  # its kernel counts none
    return not isinstance(layer, _NormBase)


def _of_event(event: Event) -> Cause:
    where = None if event.where is None else str(event.where)
    return Cause(event.kind, event.what if where is None else f"{event.what} at {where}", where)


def _assigned(change: Change, events: list[Event]) -> Cause:
    where = str(events[-1].where) if events and events[-1].where is not None else None
    done = {"missing": "it was taken away", "added": "it was put there"}
    detail = done.get(change.what, "another tensor was put there")
    return Cause("assignment", detail if where is None else f"{detail} at {where}", where)


def _of_step(step: Step, touch: Touch, change: Change) -> Cause:
    """Say what in a step moved it: that which was there and not zero; of several, the gradient."""
    at = f"group {touch.group} of {step.optimizer}"
    where = None if step.where is None else str(step.where)
    decay = touch.weight_decay if isinstance(touch.weight_decay, (int, float)) else 0
    if touch.by_gradient():
        kind = "" if touch.requires_grad else "stale "
        return Cause("gradient", f"a {kind}.grad in {at}", where)
    if decay and (_shrunk(change.before, change.tensor) or (step.known and touch.momentum is None)):
        return Cause("weight decay", f"weight_decay={decay:g} in {at}", where)
    if touch.by_momentum():
        rest = "no .grad" if touch.grad is None else "a .grad of zeros"
        return Cause("momentum", f"momentum and {rest} in {at}", where)
    return Cause("optimizer", f"inside its step, {at}", where)
