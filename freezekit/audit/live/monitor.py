"""The live auditor: watches a model's frozen part during training, by value, and says why it moved."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from freezekit.audit.findings import CAUSES, Cause, DriftReport, Finding, LayerDrift, Moment
from freezekit.audit.live.causes import Witness
from freezekit.audit.live.change import Change
from freezekit.audit.live.describe import describe
from freezekit.audit.live.joining import by_owner, continued, is_of
from freezekit.audit.live.options import check_options
from freezekit.audit.live.probe import Probe
from freezekit.audit.live.ranks import Ranks
from freezekit.audit.live.region import Place, Region, layer_of
from freezekit.audit.live.snapshot import Snapshot
from freezekit.audit.state import STATS
from freezekit.audit.timeline import Timeline
from freezekit.errors import DriftError, DriftWarning

__all__ = ["DriftAuditor"]

_ASKED = 3
"""How often a cause is looked for before it stays unknown: what happens again may be seen the next time."""


class DriftAuditor:
    """Compares the frozen part of a model with what it was, bit for bit, while it trains; says why it moved.

    It works on any model, whoever froze it and however: by default whatever does not require a gradient
    counts as frozen, with the buffers beside it and tensors held as plain attributes. What is frozen, and the
    state to compare with, is that at construction; call :meth:`renew` after unfreezing something. As a
    context manager, or between :meth:`attach` and :meth:`detach`, it checks by itself after every optimizer
    step, so the loop needs no change. It writes nothing to the model; while attached it wraps
    ``nn.Module.__setattr__`` and a few other functions of torch to see who moves what, and puts them back.

    Args:
        model: the model.
        optimizer: whose steps to follow; by default every optimizer that holds parameters of the model.
        frozen: names or globs of the frozen layers and tensors, if it cannot be told by ``requires_grad``.
        every: check after every so many steps.
        on_drift: ``"raise"`` :class:`freezekit.DriftError` at the first finding, ``"warn"`` of each new one
            with :class:`freezekit.DriftWarning`, or only ``"record"`` it for :meth:`report`.
        watch: ``"rolling"`` compares every buffer and small parameter at each check, large parameters as soon
            as something hints at a write to them and otherwise in turns, so that 20 checks cover them all;
            ``"all"`` compares everything each time; ``"norm"`` looks at the norm layers alone.
        keep: keep the frozen values on the ``"device"`` they are on, or on the ``"host"``.
        snapshot: keep a ``"copy"`` of each tensor, or a ``"digest"`` of at most 64 bytes, which tells that it
            moved but not how far.
        probe: also run a copy of the frozen part on inputs of the loop after every so many steps: twice on
            the same batch, with other batch-mates, and against what it gave at first.
        ranks: of several processes, also compare the model between them after every so many steps, in one
            small collective; give the same on every rank. ``"raise"`` then raises after these steps, on all
            ranks at once, so that none is left waiting for another.
        timeout: seconds to wait there for a rank that does not come; below the ten minutes after which
            torch's nccl ends the process.

    Raises:
        FreezekitError: nothing in the model is frozen, or an argument is wrong.
        SelectionError: a pattern in ``frozen`` matches nothing.

    >>> import torch
    >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> _ = model[0].requires_grad_(False)  # not enough
    >>> optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    >>> with DriftAuditor(model, optimizer, on_drift="record") as auditor:
    ...     model(torch.tensor([[0.0, 1.0], [2.0, 3.0]])).sum().backward()
    ...     optimizer.step()
    >>> finding = auditor.report().findings[0]
    >>> print(finding.code, finding.name, finding.message, finding.cause.kind, sep="; ")
    FK101; 0; running mean moved by up to 0.2 sigma, spread by x1.05 over 1 batch; train-mode forward

    Source: torch.optim.Optimizer.register_step_post_hook; torch.nn.BatchNorm2d on running statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        frozen: str | Iterable[str] | None = None,
        every: int = 1,
        on_drift: Literal["raise", "warn", "record"] = "raise",
        *,
        watch: Literal["rolling", "all", "norm"] = "rolling",
        keep: Literal["device", "host"] = "device",
        snapshot: Literal["copy", "digest"] = "copy",
        probe: int | None = None,
        ranks: int | None = None,
        timeout: float = 570.0,
    ) -> None:
        counts = {"every": every, "probe": probe, "ranks": ranks}
        check_options(
            model, optimizer, counts,
            on_drift=on_drift, watch=watch, keep=keep, snapshot=snapshot, timeout=timeout,
        )  # fmt: skip
        self.model = model
        self.optimizer = optimizer
        self.every = every
        self.on_drift = on_drift
        self.step = 0
        """Optimizer steps seen while attached."""
        self._asked_for = (frozen, watch, keep, snapshot, probe)
        self._earlier: DriftReport | None = None
        self._watched: frozenset[str] = frozenset()
        self._followed: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._hook: Any = None
        self._ranks = None if ranks is None else Ranks(ranks, timeout)
        self._held: list[Finding] = []
        self._begin()

    def _begin(self) -> None:
        """Take the frozen part as it is now."""
        frozen, watch, keep, snapshot, probe = self._asked_for
        self._region = Region(self.model, frozen, norm=watch == "norm", empty=bool(self._watched))
        self._watched |= self._region.places.keys()
        self._snapshot = Snapshot(
            self._region, turns=watch == "rolling", digest=snapshot == "digest", host=keep == "host"
        )
        if self._ranks is not None:
            self._ranks.take(self._region)
        self._witness = Witness(self._region)
        self._probe = None if probe is None else Probe(self._region)
        self._probed = probe or 0
        self._behaviour: dict[tuple[str, str], Finding] = {}
        self._timeline = Timeline()
        self._first: dict[tuple[str, str], int] = {}
        self._causes: dict[str, Cause] = {}
        self._asked: dict[str, int] = {}
        self._seen: set[tuple[str, str]] = set()
        self._trained: set[tuple[str, str]] = set()

    @property
    def kept_bytes(self) -> int:
        """Bytes of the frozen values, or digests, that are kept to compare with."""
        return self._snapshot.nbytes

    def attach(self) -> DriftAuditor:
        """Check after optimizer steps from now on; returns itself."""
        if self._hook is None:
            self._look()  # nobody saw why that moved which has moved by now
            self._witness.attach()
            # whoever drops it together with its optimizer can no longer call detach
            self._dropped = weakref.finalize(self, self._witness.detach)
            if self.optimizer is not None:
                self._hook = self.optimizer.register_step_post_hook(self._after_step)
            else:
                self._hook = register_optimizer_step_post_hook(self._after_any_step)
            if self._probe is not None:
                self._probe.arm()
        return self

    def detach(self) -> None:
        """Stop checking by itself; :meth:`check` and :meth:`report` still work, without causes."""
        self._unhook()
        if self._ranks is not None:
            self._ranks.leave()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self._dropped()
            if self._probe is not None:
                self._probe.disarm()

    def renew(self) -> None:
        """Watch what is frozen now: call it after something was unfrozen or frozen on purpose.

        What stays frozen is compared first, and goes on being compared with the state it was frozen in;
        what had moved by then stays in the report, and is compared with what it is now. With nothing left
        frozen there is nothing to find.

        Raises:
            DriftError: something moved and ``on_drift`` is ``"raise"``.

        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
        >>> _ = model[:2].requires_grad_(False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with DriftAuditor(model, optimizer) as auditor:
        ...     _ = model[1].requires_grad_(True)
        ...     auditor.renew()
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> auditor.report().clean
        True
        """
        try:
            if self._ranks is None:
                self._react(self._look(full=True))
            else:
                self._wait_for_others(self._look(full=True), meets=False)
        finally:  # whoever goes on after the error goes on with what is frozen now
            self._earlier, attached = self._told(full=True), self._hook is not None
            self._unhook()
            self._begin()
            if attached:
                self.attach()

    def check(self) -> list[Finding]:
        """Compare now, react as ``on_drift`` says, and return the findings that are new.

        Raises:
            DriftError: something moved and ``on_drift`` is ``"raise"``.
        """
        return self._react(self._look())

    def report(self, *, full: bool = True) -> DriftReport:
        """Compare, and return the state of things with the step at which each was first seen.

        Args:
            full: compare everything, and not only what is due at a check.
        """
        report = self._told(full)
        released = len(self._watched - self._region.places.keys())
        note = f"{released} of them were unfrozen meanwhile, and are no longer compared"
        return replace(report, notes=(*report.notes, note)) if released else report

    def _told(self, full: bool) -> DriftReport:
        changes = self._look(full=full)
        layers, findings, changed = describe(self._snapshot, changes, only=False)
        self._note(layers, last=True)
        owners = by_owner(changes)
        across = () if self._ranks is None else self._ranks.found.values()
        steps = {name: step for (code, name), step in self._first.items() if code in ("FK101", "FK102")}
        notes = self._region.notes + (() if self._probe is None else tuple(self._probe.notes))
        notes += () if self._ranks is None else self._ranks.notes
        report = DriftReport(
            f"{type(self.model).__name__} after {self.step} step{'' if self.step == 1 else 's'}",
            "its state when the auditor was made",
            self._region.scope,
            len(self._watched | set(changed)),  # with what was added
            tuple(changed),
            tuple(
                replace(layer, step=steps.get(layer.name), timeline=self._timeline.of(layer.name))
                for layer in layers
            ),
            (*(self._completed(one, owners) for one in (*findings, *self._behaviour.values())), *across),
            notes,
        )
        return report if self._earlier is None else continued(self._earlier, report)

    def __enter__(self) -> DriftAuditor:
        return self.attach()

    def __exit__(self, exc_type: type[BaseException] | None, *_: Any) -> None:
        changes = self._look(full=True) if exc_type is None else []  # what moved after the last step
        if self._ranks is not None:
            self._ranks.leave(None if exc_type is None else exc_type.__name__)
        self.detach()
        self._tell([*self._held, *self._news(changes)] if exc_type is None else self._news(changes))

    def _after_step(self, *_: Any) -> None:
        self.step += 1
        if self._probe is not None:
            if (self.step - 1) % self._probed == 0:
                for finding in self._probe.run():
                    self._behaviour.setdefault((finding.code, finding.name), finding)
            if self.step % self._probed == 0:
                self._probe.arm()
        due = self.step % self.every == 0
        if self._ranks is None:
            if due:
                self.check()
            return
        meets = self.step % self._ranks.every == 0
        if due or meets:
            self._wait_for_others(self._look(full=meets), meets=meets)

    def _wait_for_others(self, changes: list[Change], *, meets: bool) -> None:
        """React, but raise only where all ranks do: whoever raised alone would leave the others waiting."""
        assert self._ranks is not None
        new = self._news(changes)
        self._ranks.hear(new)
        if meets:
            new += self._ranks.compare(self.step, changes, self._causes)
        if self.on_drift == "raise" and not meets:
            self._held += new
        else:
            held, self._held = self._held, []
            self._tell([*held, *new])

    def _after_any_step(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer not in self._followed:
            # asked once: going through the whole model takes as long as a check
            ours = {id(parameter) for parameter in self.model.parameters()}
            if not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
                return
            self._followed.add(optimizer)
        self._after_step()

    def _look(self, *, full: bool = False) -> list[Change]:
        """Compare, and look for the causes of what moved."""
        changes = self._snapshot.look(self._witness.now, full=full)
        unexplained = [
            change
            for change in changes
            if self._causes.get(change.place.name, _UNKNOWN).kind == "unknown"
            and self._asked.get(change.place.name, 0) < _ASKED
        ]
        if unexplained:
            self._causes.update(self._witness.explain(unexplained))
            for change in unexplained if self._hook is not None else ():
                self._asked[change.place.name] = self._asked.get(change.place.name, 0) + 1
        self._witness.tick()
        return changes

    def _react(self, changes: list[Change]) -> list[Finding]:
        """Raise, warn of, or record what is new."""
        return self._tell(self._news(changes))

    def _news(self, changes: list[Change]) -> list[Finding]:
        """Return what is new, and take note of it."""
        findings = list(self._behaviour.values())
        if changes and self._is_news(changes):
            layers, moved, _ = describe(self._snapshot, changes, only=True)
            findings = [*moved, *findings]
            self._note(layers)
        new = []
        owners = by_owner(changes)
        for finding in findings:
            key = (finding.code, finding.name)
            if key not in self._first:
                self._first[key] = self.step
                if self._trains_now(finding.name):
                    self._trained.add(key)
                new.append(self._completed(finding, owners))
        return new

    def _tell(self, new: list[Finding]) -> list[Finding]:
        if not new or self.on_drift == "record":
            return new
        worst = next((finding for finding in new if finding.level == "error"), new[0])
        more = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
        if self.on_drift == "raise" and worst.level == "error":
            raise DriftError(f"{worst}{more}", self.report(), remedy=worst.fix)
        warnings.warn(f"{worst}{more}. Remedy: {worst.fix}", DriftWarning, stacklevel=3)
        return new

    def _is_news(self, changes: list[Change]) -> bool:
        """Tell whether something else moved than at the last look, or a layer's course is to be noted."""
        before, self._seen = self._seen, {(change.place.name, change.what) for change in changes}
        layers = {layer_of(change.place) for change in changes if change.place.role in STATS}
        return self._seen != before or any(self._timeline.due(layer, self.step) for layer in layers)

    def _note(self, layers: list[LayerDrift], *, last: bool = False) -> None:
        """Record how far each layer is, at the steps that are kept, and at the last."""
        for layer in layers:
            if layer.changed and (last or self._timeline.due(layer.name, self.step)):
                moment = Moment(self.step, layer.mean_shift_sigma, layer.var_ratio, layer.num_batches_tracked)
                self._timeline.record(layer.name, moment)

    def _completed(self, finding: Finding, changed: dict[str, list[Place]]) -> Finding:
        """Add when it was first seen, why it moved, and the fix for that.

        Args:
            finding: as :func:`describe` or the probe has it.
            changed: as :func:`_by_owner` returns it.
        """
        fix, message, cause = finding.fix, finding.message, finding.cause
        if cause is None and finding.code not in _OF_THEIR_OWN:
            names = [place.name for place in changed.get(finding.name, ()) if is_of(finding, place)]
            known = [self._causes[name] for name in names if name in self._causes]
            cause = next((one for one in known if one.kind != "unknown"), known[0] if known else None)
            if cause is not None and cause.kind != "unknown":
                fix = CAUSES[cause.kind]
        key = (finding.code, finding.name)
        if key in self._trained or (key not in self._first and self._trains_now(finding.name)):
            message += "; it requires a gradient by now"
            fix = "call auditor.renew() after unfreezing; if nothing was to be unfrozen, freeze it again"
        step = self._first.get(key)
        return replace(finding, message=message, fix=fix, step=step, cause=cause)

    def _trains_now(self, name: str) -> bool:
        """Tell whether a parameter, or one of a layer, was frozen but requires a gradient now."""
        watched = self._region.places
        owner, _, own = name.rpartition(".") if name in watched else (name, "", "")
        try:
            parameters = self.model.get_submodule(owner)._parameters
        except AttributeError:
            return False  # the layer is gone
        prefix = f"{owner}." if owner else ""
        concerned = [p for key, p in parameters.items() if prefix + key in watched and own in ("", key)]
        return self._region.inferred and any(p is not None and p.requires_grad for p in concerned)


_UNKNOWN = Cause("unknown")
_OF_THEIR_OWN = ("FK201", "FK202")
"""Findings of what a layer does, which no tensor that moved explains."""
