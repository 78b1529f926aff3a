"""Gradual unfreezing: which parts begin to train at which epoch, and in which group of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from freezekit.errors import FreezekitError, SelectionError
from freezekit.freezing import holding, optim
from freezekit.freezing.groups import (
    check_number,
    extend,
    new_group,
    outsiders,
    set_rate,
    training_group,
)
from freezekit.freezing.release import frozen_among, parameters_of, unfreeze
from freezekit.freezing.selection import require_module

__all__ = ["UnfreezeSchedule", "check_epoch"]


@dataclass
class _Stage:
    epoch: int
    names: list[str]
    group: int | None = None
    """Which group of the optimizer waits for what it does not have yet."""


class UnfreezeSchedule:
    """Unfreeze parts of a frozen model at given epochs.

    Make it after freezing and before a learning-rate scheduler. Parameters that the freeze took out of the
    optimizer (``optimizer=``) go back to the group they came from. For those that the optimizer does not
    have, each stage gets a group at once, empty until then: so the number of groups never changes, and
    schedulers and checkpoints go on fitting. Nothing that is unfrozen is ever frozen again.

    To resume, make the model, freeze, make the optimizer, the schedule and the scheduler as before, load
    the schedule's state (or call ``step`` with the epoch reached), and only then the optimizer's. Freeze all
    that was frozen at first: ``Manifest.restore`` leaves out what an earlier stage has unfrozen.

    With ``DistributedDataParallel`` wrap the model anew whenever ``step`` has returned names: see
    :func:`unfreeze`. With ``fully_shard`` make the optimizer and the schedule after sharding.

    Args:
        model: the model, with something frozen.
        optimizer: what trains it, or several; the first takes what none of them has.
        stages: epochs and what begins to train at each: names or globs of what is frozen now.
        lr: the learning rate of the first stage's group; by default that of the group that trains, times
            ``decay``. Groups that parameters come back to keep their own.
        decay: each later stage has this times the learning rate of the one before.
        growth: each epoch after a stage began multiplies its group's learning rate by this, a number or a
            function of the epoch. A scheduler that sets rates anew each time (``LambdaLR``) undoes that.
        align: a rate that has grown to that of the group that trains stays at it.
        bn: ``"train"``: BN layers begin to train with the rest; ``"freeze"``: they stay frozen.

    Raises:
        SelectionError: a pattern matches nothing that is frozen; the error names its epoch.
        FreezekitError: an epoch is no number from 0 on, or the optimizer cannot take a group, or there is
            no group for ``lr`` and ``decay``.

    >>> import torch
    >>> from freezekit import freeze, trainable_parameters
    >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    >>> handle = freeze(model, ["0", "1"])
    >>> optimizer = torch.optim.SGD(trainable_parameters(model), lr=1.0)
    >>> schedule = UnfreezeSchedule(model, optimizer, {2: "1", 4: "0"}, decay=0.5)
    >>> for epoch in range(5):
    ...     print(epoch, schedule.step(epoch))
    0 []
    1 []
    2 ['1.weight', '1.bias']
    3 []
    4 ['0.weight', '0.bias']
    >>> [group["lr"] for group in optimizer.param_groups]
    [1.0, 0.5, 0.25]

    Source: Howard & Ruder 2018, section 3.3, gradual unfreezing.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        stages: Mapping[int, str | Iterable[str]],
        *,
        lr: float | None = None,
        decay: float = 1.0,
        growth: float | Callable[[int], float] = 1.0,
        align: bool = True,
        bn: str = "train",
    ) -> None:
        require_module(model)
        optimizers = optim.check_optimizers(optimizer)
        if not optimizers:
            raise FreezekitError(
                "no optimizer", where="optimizer", got="None", remedy="give what trains the model"
            )
        check_number(0.0 if lr is None else lr, "lr=")
        check_number(decay, "decay=")
        if not callable(growth):
            check_number(growth, "growth=")
        if bn not in ("train", "freeze"):
            raise FreezekitError(
                "no such choice", where="bn=", got=repr(bn), remedy="give 'train' or 'freeze'"
            )
        self.model, self.optimizer, self._growth, self._align = model, optimizers[0], growth, align
        self._optimizers = optimizers
        self.epoch = -1
        """The last epoch that was reached."""
        self._stages = _resolved(model, stages, bn)
        waiting = [s for s in self._stages if outsiders(optimizers, parameters_of(model, s.names))]
        if not waiting and (lr is not None or decay != 1 or growth != 1):
            raise FreezekitError(
                "no stage needs a group of its own, so there is no learning rate to set",
                where="lr=, decay=, growth=",
                got=f"lr={lr!r}, decay={decay!r}, growth={growth!r}",
                remedy="set the rates of the groups that the parameters come back to (parameter_groups)",
            )
        groups = [new_group(self.optimizer, rate) for rate in self._rates(lr, decay, waiting)]
        for stage, group in zip(waiting, groups, strict=True):
            stage.group = len(optim.root_of(self.optimizer).param_groups)
            self.optimizer.add_param_group(group)

    def _rates(self, lr: float | None, decay: float, waiting: list[_Stage]) -> list[float | None]:
        if lr is None and decay == 1:
            return [None for _ in waiting]
        start = decay * float(training_group(self.optimizer)["lr"]) if lr is None else lr
        return [start * decay ** self._stages.index(stage) for stage in waiting]

    def step(self, epoch: int) -> list[str]:
        """Unfreeze what is due by ``epoch``, once; call it at the beginning of each epoch.

        Any epoch will do: what was due at those left out is unfrozen too, and a lower one changes nothing.

        Args:
            epoch: the epoch that begins, counted as in ``stages``.

        Returns:
            Names of the parameters that train from now on.

        Raises:
            FreezekitError: ``epoch`` is no number from 0 on, or a layer was changed while it was frozen.
        """
        check_epoch(epoch, "epoch")
        names: list[str] = []
        ends = max((stage.epoch for stage in self._stages), default=-1)
        last = epoch if self._growth != 1 else min(epoch, ends)
        for now in range(self.epoch + 1, last + 1):
            for stage in self._stages:
                if stage.epoch == now:
                    names += self._unfreeze(stage)
                elif stage.epoch < now:
                    self._grow(stage, now)
            self.epoch = now
        self.epoch = max(self.epoch, epoch)
        return names

    def _grow(self, stage: _Stage, epoch: int) -> None:
        """Raise the learning rate of a stage's group for an epoch."""
        if self._growth == 1 or stage.group is None:
            return
        group = optim.root_of(self.optimizer).param_groups[stage.group]
        factor = self._growth(epoch) if callable(self._growth) else self._growth
        check_number(factor, "growth=")
        rate = float(group["lr"]) * factor
        set_rate(group, min(rate, float(training_group(self.optimizer)["lr"])) if self._align else rate)

    def _unfreeze(self, stage: _Stage) -> list[str]:
        frozen = set(frozen_among(self.model, "*"))
        names = [name for name in stage.names if name in frozen]
        if not names:  # someone has unfrozen it before
            return []
        alone = stage.group is None and len(self._optimizers) == 1
        unfreeze(self.model, names, optimizer=self.optimizer if alone else None)
        training = [(name, p) for name, p in parameters_of(self.model, names) if p.requires_grad]
        if stage.group is not None:
            group = optim.root_of(self.optimizer).param_groups[stage.group]
            extend(group, outsiders(self._optimizers, training))
        return [name for name, _ in training]

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch reached, and the stages to compare when loading, as plain data."""
        return {"epoch": self.epoch, "stages": [[stage.epoch, stage.names] for stage in self._stages]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Unfreeze what had been by then. Call it before the optimizer's ``load_state_dict``.

        Args:
            state: what :meth:`state_dict` returned.

        Raises:
            FreezekitError: the stages were others, or it is the state of something else.
        """
        if not {"epoch", "stages"} <= state.keys():
            raise FreezekitError(
                "not the state of an UnfreezeSchedule",
                where="load_state_dict",
                got=f"a state with {', '.join(map(repr, list(state)[:3])) or 'nothing'} in it",
                remedy="give what schedule.state_dict() returned, not that of an optimizer or its scheduler",
            )
        ours = self.state_dict()["stages"]
        if [list(stage) for stage in state["stages"]] != ours:
            raise FreezekitError(
                "the state is that of a schedule with other stages",
                where="load_state_dict",
                got=f"epochs {[epoch for epoch, _ in state['stages']]}, here {[epoch for epoch, _ in ours]}",
                remedy="freeze the model and make the schedule as they were when the state was saved",
            )
        if state["epoch"] >= 0:
            self.step(state["epoch"])


def _resolved(model: nn.Module, stages: Mapping[int, str | Iterable[str]], bn: str) -> list[_Stage]:
    """Turn patterns into names of what is frozen, each in the first stage that has it."""
    for epoch in stages:
        check_epoch(epoch, "stages")
    resolved: list[_Stage] = []
    seen: set[str] = set()
    for epoch in sorted(stages):
        patterns = stages[epoch]
        names = frozen_among(model, patterns, where=f"epoch {epoch}")
        names = [
            name for name in (_without_bn(model, names) if bn == "freeze" else names) if name not in seen
        ]
        if not names:
            raise SelectionError(
                "nothing is left to unfreeze",
                where=f"epoch {epoch}",
                got=repr(patterns),
                remedy="leave this epoch out, or give it what no earlier one has",
            )
        resolved.append(_Stage(epoch, names))
        seen.update(names)
    return resolved


def _without_bn(model: nn.Module, names: list[str]) -> list[str]:
    """Leave out BN layers, what is in them, and the modules around them, which stand for them too."""
    norms = [n for n, m in model.named_modules(remove_duplicate=False) if holding.is_batchnorm(m)]
    inside = tuple(f"{name}." for name in norms)
    around = {name.rsplit(".", k)[0] for name in norms for k in range(name.count(".") + 1)}
    return [name for name in names if name not in around and not name.startswith(inside)]


def check_epoch(epoch: object, where: str) -> None:
    """Refuse what is no epoch."""
    if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
        raise FreezekitError(
            "not an epoch", where=where, got=repr(epoch), remedy="give a whole number from 0 on"
        )
