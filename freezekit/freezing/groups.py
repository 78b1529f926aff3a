"""Parameter groups: what is in an optimizer's groups and what is not, and groups for what is to come."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from freezekit.errors import FreezekitError, OptimizerWarning
from freezekit.freezing.optim import ids_of, is_lbfgs, parked_ids, root_of

__all__ = [
    "check_number",
    "extend",
    "new_group",
    "orphans_of",
    "outsiders",
    "set_rate",
    "training_group",
    "warn_of_orphans",
]


def outsiders(optimizers: Iterable[Any], named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return those parameters that are in no group of the optimizers, nor parked from one; each once."""
    known = {one for optimizer in optimizers for one in ids_of(optimizer) | parked_ids(optimizer)}
    return list({id(p): (name, p) for name, p in reversed(list(named)) if id(p) not in known}.values())[::-1]


def orphans_of(model: nn.Module, optimizers: Sequence[Any]) -> list[str]:
    """Return the names of the model's parameters that train and that no optimizer has; none without one."""
    if not optimizers:
        return []
    members = set().union(*(ids_of(optimizer) for optimizer in optimizers))
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in members]


def warn_of_orphans(model: nn.Module, optimizers: Sequence[Any], stacklevel: int) -> None:
    """Warn of parameters that train but that no step will move: a new head, put in after the optimizer."""
    orphans = orphans_of(model, optimizers)
    if not orphans:
        return
    own = {id(p) for p in model.parameters()}
    strangers = set().union(*(ids_of(optimizer) for optimizer in optimizers)) - own
    shown = ", ".join(orphans[:4]) + (f" and {len(orphans) - 4} more" if len(orphans) > 4 else "")
    text = f"no optimizer given has these parameters, so no step will move them: {shown}"
    if strangers:
        text += f" (but it has {len(strangers)} that are not the model's: of a part that was replaced?)"
    text += ". Remedy: make the optimizer after changing the model, or call optimizer.add_param_group"
    warnings.warn(text, OptimizerWarning, stacklevel=stacklevel + 1)


def training_group(optimizer: Any) -> dict[str, Any]:
    """Return the group that new ones are made like: the first that has parameters."""
    groups: list[dict[str, Any]] = root_of(optimizer).param_groups
    return next((group for group in groups if group["params"]), groups[0])


def new_group(optimizer: Any, lr: float | None) -> dict[str, Any]:
    """Return a group without parameters, made like the one that trains, with learning rate ``lr``.

    Raises:
        FreezekitError: the optimizer cannot take a group.
    """
    like = training_group(optimizer)
    if is_lbfgs(root_of(optimizer)):
        raise FreezekitError(
            "LBFGS has one group only, so what it does not have yet cannot be added",
            where="optimizer=",
            got=type(optimizer).__name__,
            remedy="make it with all parameters and freeze with optimizer=: they then come back to it",
        )
    if not hasattr(optimizer, "add_param_group"):
        raise FreezekitError(
            "this optimizer takes no parameters later",
            where="optimizer=",
            got=f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
            remedy="make it with all parameters of the model: those that are frozen wait in it",
        )
    if "initial_lr" in like:
        raise FreezekitError(
            "a learning-rate scheduler was made on this optimizer, and most fail on a group added later, or "
            "leave it out",
            where="optimizer=",
            got=f"param_groups with a scheduler: {len(root_of(optimizer).param_groups)}",
            remedy="make an UnfreezeSchedule before the scheduler; or make the optimizer with all "
            "parameters and freeze with optimizer=: they then come back to their own group",
        )
    own = ("params", "param_names", "name")
    group = {key: deepcopy(value) for key, value in like.items() if key not in own}
    if lr is not None:
        set_rate(group, lr)
    if "param_names" in like:
        group["param_names"] = []
    return {"params": [], **group}


def set_rate(group: dict[str, Any], lr: float) -> None:
    """Set a group's learning rate; one that is a tensor stays one."""
    group["lr"] = torch.full_like(group["lr"], lr) if isinstance(group.get("lr"), Tensor) else lr


def check_number(value: Any, where: str) -> None:
    """Refuse what is no learning rate, nor a factor for one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise FreezekitError(
            "not a finite number from 0 on",
            where=where,
            got=repr(value),
            remedy="give a number like 1e-4",
        )


def extend(group: dict[str, Any], named: Iterable[tuple[str, Tensor]]) -> None:
    """Put parameters into a group."""
    for name, parameter in named:
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(name)
