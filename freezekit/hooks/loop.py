"""Freezing and auditing in a loop of one's own; the other hooks translate a framework's events to these."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freezekit.audit.findings import DriftReport
from freezekit.audit.live.monitor import DriftAuditor
from freezekit.errors import FreezekitError
from freezekit.freezing.freeze import freeze_backbone
from freezekit.freezing.handle import Freeze
from freezekit.freezing.optim import check_optimizers, root_of
from freezekit.freezing.release import frozen_among
from freezekit.freezing.schedule import UnfreezeSchedule, check_epoch
from freezekit.manifest import Manifest

__all__ = ["DriftAudit", "FreezeBackbone"]

log = logging.getLogger("freezekit")

_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that a hook has frozen: to find all of one trained by now is no mistake."""


class FreezeBackbone:
    """Freeze a backbone for a training run, and unfreeze parts of it as the epochs go.

    Call :meth:`freeze` before the optimizer is made (or wrapped, or given to DDP), :meth:`start` when it has
    been, :meth:`start_epoch` at each epoch; save :meth:`state_dict` with a checkpoint, and on resuming load
    it between the first two, before the optimizer's own state; after them will do for an optimizer that has
    all parameters.

    Args:
        head: as for :func:`freezekit.freeze_backbone`, as are ``backbone``, ``bn``, ``convert`` and ``hold``.
        unfreeze: epochs, counted from 0, and what begins to train at each: names or globs.
        lr: as for :class:`freezekit.UnfreezeSchedule`, as are ``decay``, ``growth`` and ``align``. An
            optimizer made with all parameters needs none of these: frozen ones wait in their groups.
        unfreeze_bn: the schedule's ``bn``: ``"freeze"`` leaves BN frozen when what is around it trains.

    >>> import torch
    >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    >>> hook = FreezeBackbone(head="2", unfreeze={1: "1"})
    >>> handle = hook.freeze(model)
    >>> hook.start(torch.optim.SGD(model.parameters(), lr=0.1))
    >>> for epoch in range(2):
    ...     print(epoch, hook.start_epoch(epoch))
    0 []
    1 ['1.weight', '1.bias']
    """

    def __init__(
        self,
        *,
        head: Any = None,
        backbone: Any = None,
        bn: str = "freeze",
        convert: str | None = None,
        hold: str = "all",
        unfreeze: Mapping[int, str | Iterable[str]] | None = None,
        lr: float | None = None,
        decay: float = 1.0,
        growth: float | Callable[[int], float] = 1.0,
        align: bool = True,
        unfreeze_bn: str = "train",
    ) -> None:
        self._how = {"head": head, "backbone": backbone, "bn": bn, "convert": convert, "hold": hold}
        if not isinstance(unfreeze or {}, Mapping):
            fix = 'give epochs and what begins to train at each, as in {1: "layer4"}'
            raise FreezekitError("not a mapping", where="unfreeze=", got=repr(unfreeze), remedy=fix)
        for epoch in unfreeze or {}:
            check_epoch(epoch, "unfreeze=")
        self._stages = {
            epoch: [p] if isinstance(p, str) else list(p) for epoch, p in (unfreeze or {}).items()
        }
        self._options: dict[str, Any] = {
            "lr": lr,
            "decay": decay,
            "growth": growth,
            "align": align,
            "bn": unfreeze_bn,
        }
        self._reached = -1
        self._resumed: Mapping[str, Any] | None = None
        self._made: Manifest | None = None
        self._optimizer: Any = None
        self.handle: Freeze | None = None
        """The freeze in force."""
        self.schedule: UnfreezeSchedule | None = None
        """What unfreezes, once :meth:`start` has been called, if there is more to come."""

    def freeze(self, model: nn.Module) -> Freeze:
        """Freeze the model's backbone for a run; the same model again changes nothing about it."""
        self._optimizer = None  # until start: one of an earlier run is none of this one's
        if self.handle is None or self.handle.model is not model:
            self.handle = freeze_backbone(model, **self._how)
            self._reached, self._made, self.schedule = -1, None, None
            _seen.add(model)
            log.info("froze %d tensors of a %s", len(self.handle.frozen), type(model).__name__)
        return self.handle

    def start(self, optimizer: Any, model: nn.Module | None = None) -> None:
        """Take up the optimizer, or several; when resumed, unfreeze what had been.

        Args:
            optimizer: what trains the model.
            model: what is run, if that is a wrapper by now.

        Raises:
            FreezekitError: nothing was frozen before, or a stage does not fit the model or the optimizer.
        """
        if self.handle is None:
            raise FreezekitError("nothing is frozen yet", where="start", remedy="call .freeze(model) first")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            self.refuse_stages_in_ddp()
        self._optimizer = optimizer
        stages = {epoch: names for epoch, names in self._stages.items() if epoch > self._reached}
        if not stages:
            self.schedule = None
        elif self.schedule is None or self.schedule._optimizers != check_optimizers(optimizer):
            try:
                self.schedule = UnfreezeSchedule(self.handle.model, optimizer, stages, **self._options)
            except FreezekitError as error:
                if error.where != "optimizer=":
                    raise
                fix = "make the optimizer of model.parameters(), in groups or not: what is frozen waits in it"
                raise FreezekitError(error.what, where=error.where, got=error.got, remedy=fix) from None
        if self._resumed is not None:
            self._advance(self._resumed["epoch"])

    def refuse_stages_in_ddp(self) -> None:
        """Refuse to unfreeze in a model that ``DistributedDataParallel`` has wrapped.

        Raises:
            FreezekitError: there are stages.
        """
        if self._stages:
            raise FreezekitError(
                "DistributedDataParallel would leave what is unfrozen later unsynchronised",
                where="unfreeze=",
                got=f"stages at epochs {sorted(self._stages)}",
                remedy="train each stage in a run of its own, unfrozen before it is wrapped",
            )

    def start_epoch(self, epoch: int) -> list[str]:
        """Unfreeze what is due, and return the names of the parameters that train from now on.

        Raises:
            FreezekitError: there are stages and no optimizer yet; or in a resumed run, what was frozen has
                other values than the checkpoint says.
        """
        check_epoch(epoch, "epoch")
        if self._stages and self._optimizer is None:
            fault, fix = "no optimizer was given, so nothing can be unfrozen", "call .start(optimizer) before"
            raise FreezekitError(fault, where="start_epoch", remedy=fix)
        self.verify()
        self.manifest()  # has the digests of now, so that the first epoch's drift is found too
        names = self._advance(epoch)
        self.manifest()  # on every rank, as it gathers shards; state_dict() may be for the first alone
        return names

    def verify(self) -> None:
        """Check in a resumed run, whose model is loaded by now, what was frozen; later calls do nothing.

        Raises:
            FreezekitError: it has other values than the checkpoint says.
        """
        if (state := self._resumed) is not None and self.handle is not None:
            self._resumed = None
            self._made = Manifest.from_json(state["manifest"])
            self._made.verify(self.handle.model)

    def _advance(self, epoch: int) -> list[str]:
        names = [] if self.schedule is None or epoch < 0 else self.schedule.step(epoch)
        self._reached = max(self._reached, epoch)
        if names:
            log.info("epoch %d: %d more parameters train, from %s", epoch, len(names), names[0])
        return names

    def follow(self, but: Iterable[nn.Parameter] = ()) -> None:
        """Unfreeze what somebody has set to require a gradient since, and what is in layers that only train.

        Args:
            but: parameters that are to stay frozen, whatever was set.
        """
        if self.handle is None:
            return
        model, frozen, kept = self.handle.model, set(self.handle.frozen), {id(p) for p in but}
        for name, parameter in model.named_parameters():
            if name in frozen and id(parameter) in kept:
                parameter.requires_grad_(False)
        trains = {name: p.requires_grad for name, p in model.named_parameters() if name in frozen}
        due = [name for name, trains_now in trains.items() if trains_now]
        if not due:
            return
        if len(due) == len(trains):
            self.handle.unfreeze()
            self._reached = max(self._stages, default=-1)  # there is no more to come
        else:
            held = set(frozen_among(model, "*"))
            whole = [name for name, module in model.named_modules() if _all_train(module)]
            self.handle.unfreeze([name for name in (*whole, *due) if name in held])
        for name in due:  # they get back what they had before the freeze, which may be another freeze's
            model.get_parameter(name).requires_grad_(True)

    def manifest(self) -> Manifest:
        """Return what is frozen now, each tensor with the digest it had when this was first called."""
        if self.handle is None:
            fix = "call .freeze(model) first"
            raise FreezekitError("nothing is frozen yet", where="manifest", remedy=fix)
        if self._made is None:
            self._made = self.handle.manifest()
        elif self._made.frozen != self.handle.frozen:
            first = {tensor.name: tensor for tensor in self._made.tensors}
            now = self.handle.manifest()
            self._made = replace(now, tensors=tuple(first.get(t.name, t) for t in now.tensors))
        return self._made

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch reached, the stages and the manifest, as plain data."""
        return {"epoch": self._reached, "stages": self._plain(), "manifest": self.manifest().to_json()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state: :meth:`start`, or the run that has started, then goes on from there.

        Raises:
            FreezekitError: it was saved with other stages.
        """
        if state["stages"] != self._plain():
            raise FreezekitError(
                "the state was saved with other stages",
                where="unfreeze=",
                got=f"{self._plain()}, saved {state['stages']}",
                remedy="give the same unfreeze= as then",
            )
        self._resumed, optimizer = state, self._optimizer
        if self.handle is not None and self._reached >= 0:  # this run went on, and is to go on from before
            model = self.handle.model
            self.handle.undo()
            self.handle = None
            self.freeze(model)
            if optimizer is not None:
                self.start(optimizer)
        elif optimizer is not None:
            self._advance(state["epoch"])

    def _plain(self) -> list[list[Any]]:
        return [[epoch, self._stages[epoch]] for epoch in sorted(self._stages)]


class DriftAudit:
    """Audit a training run with :class:`freezekit.DriftAuditor`, for a framework's callbacks and its logger.

    What the run unfreezes between epochs is no longer watched; what stays frozen is, from first to last.

    Args:
        frozen: as for :class:`freezekit.DriftAuditor`, as are ``every``, ``on_drift``, ``watch``, ``keep``,
            ``snapshot``, ``probe`` and ``ranks``.
        save: where to save the report at the end, as JSON for ``freezekit audit``; of several processes the
            first does.

    >>> import torch
    >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> _ = model[0].requires_grad_(False)  # not enough
    >>> optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    >>> audit = DriftAudit(on_drift="record")
    >>> audit.start(model, optimizer)
    >>> model(torch.tensor([[0.0, 1.0], [2.0, 3.0]])).sum().backward()
    >>> optimizer.step()
    >>> sorted(audit.scalars())
    ['freezekit/0/mean_shift_sigma', 'freezekit/0/var_ratio', 'freezekit/changed']
    >>> audit.finish().clean
    False
    """

    def __init__(
        self,
        *,
        frozen: str | Iterable[str] | None = None,
        every: int = 1,
        on_drift: str = "raise",
        watch: str = "rolling",
        keep: str = "device",
        snapshot: str = "copy",
        probe: int | None = None,
        ranks: int | None = None,
        save: str | Path | None = None,
    ) -> None:
        self._how = {"frozen": frozen, "every": every, "on_drift": on_drift, "watch": watch, "keep": keep}
        self._how |= {"snapshot": snapshot, "probe": probe, "ranks": ranks}
        self._save = save
        self._training: frozenset[str] = frozenset()
        self.auditor: DriftAuditor | None = None
        """The auditor of this run."""
        self.report: DriftReport | None = None
        """The report, once the run is over."""

    def start(self, model: nn.Module, optimizer: Any = None) -> None:
        """Watch the model from now on, after each step of the optimizer, or of every one that trains it."""
        self.stop()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._save = self._save if torch.distributed.get_rank() == 0 else None
        self._training = _trains(model)
        all_train = self._how["frozen"] is None and len(self._training) == len([*model.parameters()])
        if all_train and any(m in _seen for m in model.modules()):
            log.info("all of the %s trains by now: there is nothing to audit", type(model).__name__)
            return
        root = None if optimizer is None else root_of(optimizer)
        followed = root if isinstance(root, torch.optim.Optimizer) else None
        if self._save is not None and not (folder := Path(self._save).absolute().parent).is_dir():
            fault = "there is no such folder"
            raise FreezekitError(fault, where="save=", got=str(folder), remedy="make it first")
        try:
            self.auditor = DriftAuditor(model, followed, **self._how).attach()  # type: ignore[arg-type]
        except FreezekitError as error:
            if not error.what.startswith("nothing in the model is frozen"):
                raise
            fix = "add FreezeBackbone too, or say what must not move: DriftAudit(frozen=[...])"
            raise FreezekitError(error.what, where="DriftAudit", got=error.got, remedy=fix) from None

    def stepped(self) -> None:
        """Take note of a step of an optimizer that is not torch's, which nothing else tells of."""
        if self.auditor is not None and self.auditor.optimizer is None:
            self.auditor._after_step()

    def start_epoch(self) -> None:
        """Take note of what was unfrozen, or frozen."""
        if self.auditor is not None and (now := _trains(self.auditor.model)) != self._training:
            self._training = now
            self.auditor.renew()

    def scalars(self) -> dict[str, float]:
        """Return how many frozen tensors have changed, and how far the layers that moved are."""
        if self.auditor is None:
            return {}
        report = self.auditor.report(full=False)
        found = {"freezekit/changed": float(len(report.changed))}
        for layer in report.layers:
            for key in ("mean_shift_sigma", "var_ratio"):
                if layer.changed and (value := getattr(layer, key)) is not None:
                    found[f"freezekit/{layer.name}/{key}"] = value
        return found

    def finish(self) -> DriftReport | None:
        """Compare everything once more, react as ``on_drift`` says, save the report and return it."""
        auditor = self.auditor
        if auditor is None:
            return None
        try:
            self.start_epoch()
            auditor.__exit__(None)
        finally:
            self.auditor = None
            auditor.detach()
            self._take(auditor.report())
        return self.report

    def stop(self) -> None:
        """Stop watching, as after an error; :attr:`report` is what is known by then, and is saved."""
        auditor, self.auditor = self.auditor, None
        if auditor is not None:
            try:
                self._take(auditor.report(full=False))
            finally:
                auditor.detach()

    def _take(self, report: DriftReport) -> None:
        self.report = report
        if self._save is not None:
            report.save(self._save)


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Say how to install a hook's framework if it cannot be imported in the block."""
    try:
        yield
    except ImportError as error:
        fix = f"pip install 'freezekit[{extra}]'"
        where = f"freezekit.hooks.{extra}"
        raise FreezekitError(
            f"{extra} cannot be imported", where=where, got=str(error), remedy=fix
        ) from error


def _all_train(module: nn.Module) -> bool:
    parameters = [*module.parameters()]
    return bool(parameters) and all(parameter.requires_grad for parameter in parameters)


def _trains(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
