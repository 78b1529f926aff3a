"""Optimizers: frozen parameters leave their groups, and come back to their place with their state.

What is taken out of an optimizer is parked here, by optimizer and not by freeze: it goes back when nothing
holds the parameter any more, whoever ends the last freeze. The optimizer is only referred to weakly.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from freezekit.errors import FreezekitError
from freezekit.freezing import holding
from freezekit.freezing.selection import tensors_of

__all__ = [
    "check_optimizer",
    "check_optimizers",
    "ids_of",
    "is_lbfgs",
    "park",
    "parked_ids",
    "put_back",
    "root_of",
]

KEY = "freezekit_parked"
"""Where an optimizer's ``state_dict`` has the state of what is frozen."""

_Member = tuple[Tensor, Any]
"""A parameter in a group and its name, if the optimizer was made with names."""


@dataclass
class _Parked:
    parameter: Tensor
    group: int
    states: list[tuple[weakref.ref[Any], Any]]
    """What the optimizer, and each wrapper around it, knew about the parameter."""


@dataclass
class _Park:
    parked: dict[int, _Parked] = field(default_factory=dict)
    order: dict[int, list[_Member]] = field(default_factory=dict)
    """For each group with something parked: its members and the parked ones, in the order they had."""
    history: tuple[list[Tensor], Any] | None = None
    """What LBFGS knew about all of its members together, and which these were."""
    incoming: list[Any] | None = None


_parks: weakref.WeakKeyDictionary[Any, _Park] = weakref.WeakKeyDictionary()


def check_optimizers(given: Any) -> list[Any]:
    """Return the optimizers given as ``optimizer=``, one or several.

    Raises:
        FreezekitError: something given is no optimizer.
    """
    optimizers = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    for optimizer in optimizers:
        if isinstance(optimizer, type) or not all(hasattr(optimizer, a) for a in ("param_groups", "state")):
            name = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
            raise FreezekitError(
                "not an optimizer", where="optimizer=", got=name, remedy="give a torch.optim.Optimizer"
            )
    return optimizers


def check_optimizer(given: Any) -> Any:
    """Return the optimizer given, or ``None``, where one is wanted.

    Raises:
        FreezekitError: several are given, or something that is none.
    """
    optimizers = check_optimizers(given)
    if len(optimizers) > 1:
        raise FreezekitError(
            "one optimizer is wanted here",
            where="optimizer=",
            got=f"{len(given)} of them",
            remedy="give the one that is to train what is unfrozen",
        )
    return optimizers[0] if optimizers else None


def _chain(optimizer: Any) -> list[Any]:
    """Return the optimizer, what it wraps (as Lookahead and Accelerate do), and so on to the innermost."""
    chain = [optimizer]
    while True:
        inside = list(getattr(chain[-1], "__dict__", {}).values())
        inner = [value for value in inside if isinstance(value, torch.optim.Optimizer)]
        inner = [value for value in inner if value not in chain and _share_groups(value, chain[-1])]
        if not inner:
            return chain
        chain.append(inner[0])


def _share_groups(one: Any, other: Any) -> bool:
    lists = [[id(group["params"]) for group in each.param_groups] for each in (one, other)]
    return lists[0] == lists[1]


def root_of(optimizer: Any) -> Any:
    """Return the innermost of an optimizer and those it wraps: the one whose groups all of them share."""
    return _chain(optimizer)[-1]


def park(optimizer: Any, parameters: Iterable[Tensor]) -> None:
    """Take parameters out of the optimizer's groups, where they are in one, and keep their state."""
    chain = _chain(optimizer)
    root = chain[-1]
    ids = {id(p) for p in parameters}
    leaving = [(k, p) for k, g in enumerate(root.param_groups) for p in g["params"] if id(p) in ids]
    if not leaving:
        return
    lot = _parks.get(root)
    if lot is None:
        lot = _parks[root] = _Park()
        if isinstance(root, torch.optim.Optimizer):
            root.register_state_dict_post_hook(_save)
            root.register_load_state_dict_pre_hook(_check_saved)
            root.register_load_state_dict_post_hook(_load)
    _take_history(root, lot)
    groups = {k for k, _ in leaving}
    order = {k: _complete(root.param_groups[k], k, lot) for k in groups}
    for k, parameter in leaving:
        if id(parameter) not in lot.parked:  # twice in its group
            lot.parked[id(parameter)] = _Parked(parameter, k, _take_state(chain, parameter))
    for k in groups:
        _arrange(root.param_groups[k], k, lot, order[k])
    _give_history(root, lot)


def put_back(model: nn.Module) -> None:
    """Give the optimizers back what is parked of the model and what no freeze holds any more."""
    if not any(lot.parked for lot in _parks.values()):
        return
    held: set[int] = set()
    loose: set[int] = set()
    for _, owner, own, tensor in tensors_of(model):
        (held if holding.holders_of(owner, own) else loose).add(id(tensor))
    loose -= held  # of a parameter that was tied while it was frozen
    for root, lot in list(_parks.items()):
        returning = [entry for key, entry in lot.parked.items() if key in loose]
        if returning:
            _return(root, lot, returning)


def _return(root: Any, lot: _Park, returning: Sequence[_Parked]) -> None:
    _take_history(root, lot)
    members, count = ids_of(root), len(root.param_groups)
    home = []
    for entry in returning:
        if id(entry.parameter) not in members and entry.group < count:
            home.append(entry)
        else:  # put into a group by hand meanwhile, or its group is gone
            del lot.parked[id(entry.parameter)]
    order = {k: _complete(root.param_groups[k], k, lot) for k in {entry.group for entry in home}}
    for entry in home:
        del lot.parked[id(entry.parameter)]
        for layer, state in entry.states:
            if (live := layer()) is not None:
                live.state[entry.parameter] = state
    for k, complete in order.items():
        _arrange(root.param_groups[k], k, lot, complete)
        _start_momentum(root, root.param_groups[k])
    _give_history(root, lot)


def _start_momentum(root: Any, group: dict[str, Any]) -> None:
    """Begin with a momentum of zero where torch's fused SGD fails on none beside those that have one."""
    if not isinstance(root, torch.optim.SGD) or not (group.get("fused") and group["momentum"]):
        return
    without = [p for p in group["params"] if root.state.get(p, {}).get("momentum_buffer") is None]
    # with dampening the first step is another one than from zero
    if len(without) < len(group["params"]) and not group["dampening"]:
        for parameter in without:
            root.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _members(group: dict[str, Any]) -> list[_Member]:
    names = group.get("param_names", [None] * len(group["params"]))
    return list(zip(group["params"], names, strict=True))


def _complete(group: dict[str, Any], index: int, lot: _Park) -> list[_Member]:
    """Return the members of a group with the parked ones in their places: each after who was before it."""
    members = _members(group)
    present = {id(p) for p, _ in members}
    behind: dict[int, list[_Member]] = {}
    last = 0
    for member in lot.order.get(index, []):
        key = id(member[0])
        if key in present:
            last = key
        elif key in lot.parked:
            behind.setdefault(last, []).append(member)
    complete = behind.get(0, [])
    for member in members:
        complete += [member, *behind.pop(id(member[0]), [])]
    return complete


def _arrange(group: dict[str, Any], index: int, lot: _Park, complete: list[_Member]) -> None:
    """Leave in a group what is not parked; its lists stay the objects they are, which others refer to."""
    present = [member for member in complete if id(member[0]) not in lot.parked]
    group["params"][:] = [p for p, _ in present]
    if "param_names" in group:
        group["param_names"][:] = [name for _, name in present]
    lot.order[index] = complete
    if len(present) == len(complete):
        del lot.order[index]


def _take_state(chain: Sequence[Any], parameter: Tensor) -> list[tuple[weakref.ref[Any], Any]]:
    # the innermost first: a wrapper may show the same state as its own, and then has nothing left
    return [
        (weakref.ref(layer), layer.state.pop(parameter))
        for layer in reversed(chain)
        if parameter in layer.state
    ]


def _take_history(root: Any, lot: _Park) -> None:
    """Take out what LBFGS keeps at its first parameter: curvature of all its members as one vector.

    It fits those members only, and only as long as no step is made without one of them.
    """
    members = root.param_groups[0]["params"]
    if is_lbfgs(root) and members:
        history = root.state.pop(members[0], None)
        if history:
            lot.history = list(members), history


def _give_history(root: Any, lot: _Park) -> None:
    if not is_lbfgs(root):
        return
    root._numel_cache = None
    members = root.param_groups[0]["params"]
    if lot.history is not None and [id(p) for p in lot.history[0]] == [id(p) for p in members]:
        root.state[members[0]] = lot.history[1]
        lot.history = None


def is_lbfgs(root: Any) -> bool:
    """Tell whether the optimizer treats all its parameters as one vector."""
    return "_numel_cache" in getattr(root, "__dict__", {})


# -- in and out of files -------------------------------------------------------------------------------------


def _places(root: Any, lot: _Park) -> list[tuple[int, int, _Parked]]:
    groups = {entry.group for entry in lot.parked.values() if entry.group < len(root.param_groups)}
    return [
        (k, place, lot.parked[id(p)])
        for k in sorted(groups)
        for place, (p, _) in enumerate(_complete(root.param_groups[k], k, lot))
        if id(p) in lot.parked
    ]


def _save(optimizer: Any, state_dict: dict[str, Any]) -> None:
    root = root_of(optimizer)  # Lightning's wrapper shares the hooks of what it wraps
    lot = _parks.get(root)
    if lot is None or not lot.parked:
        return
    state_dict[KEY] = [
        {
            "group": group,
            "place": place,
            "shape": list(entry.parameter.shape),
            "state": next((state for layer, state in entry.states if layer() is root), None),
        }
        for group, place, entry in _places(root, lot)
    ]


def _check_saved(optimizer: Any, state_dict: dict[str, Any]) -> None:
    root = root_of(optimizer)
    lot = _parks[root]
    saved = state_dict.get(KEY)
    if saved is None and _sizes(state_dict.get("param_groups", [])) == _sizes(root.param_groups):
        # saved by an optimizer of what trains, or by torch.distributed.checkpoint, which leaves out our key
        lot.incoming = None
        return
    saved = saved or []
    theirs = [(entry["group"], entry["place"], list(entry["shape"])) for entry in saved]
    ours = [(group, place, list(e.parameter.shape)) for group, place, e in _places(root, lot)]
    if theirs != ours:
        raise FreezekitError(
            "this state was saved with other parameters frozen than are frozen in the optimizer now",
            where="load_state_dict",
            got=f"{len(theirs)} frozen when saved, {len(ours)} now",
            remedy="bring the model to where it was (freeze or unfreeze the same parts, with optimizer=), "
            "then load",
        )
    lot.incoming = saved


def _sizes(groups: Iterable[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _load(optimizer: Any) -> None:
    root = root_of(optimizer)
    lot = _parks[root]
    saved, lot.incoming, lot.history = lot.incoming, None, None
    if saved is None:  # what is parked keeps the state it has
        return
    for (group, _, entry), new in zip(_places(root, lot), saved, strict=True):
        entry.states = [(layer, state) for layer, state in entry.states if layer() is not root]
        if new["state"] is not None:
            state = _like(entry.parameter, new["state"], root.param_groups[group])
            entry.states.insert(0, (weakref.ref(root), state))


def _like(parameter: Tensor, value: Any, group: dict[str, Any], key: Any = None) -> Any:
    """Copy a state to where its parameter is, in its dtype, by the rules of torch's ``load_state_dict``."""
    if isinstance(value, dict):
        return {k: _like(parameter, v, group, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_like(parameter, v, group) for v in value)
    if not isinstance(value, Tensor):
        return deepcopy(value)
    if key == "step":  # a counter, which only these keep beside the parameter
        beside = group.get("capturable") or group.get("fused")
        return value.to(parameter.device, torch.float32, copy=True) if beside else value.clone()
    dtype = parameter.dtype if parameter.is_floating_point() else value.dtype
    return value.to(parameter.device, dtype, copy=True)


def ids_of(optimizer: Any) -> set[int]:
    """Return the ids of the parameters in the optimizer's groups."""
    return {id(p) for group in root_of(optimizer).param_groups for p in group["params"]}


def parked_ids(optimizer: Any) -> set[int]:
    """Return the ids of the parameters that are parked from the optimizer's groups."""
    lot = _parks.get(root_of(optimizer))
    return set() if lot is None else set(lot.parked)
