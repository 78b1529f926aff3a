"""Members of optimizers: which of them moves what is frozen, and how, and what none of them has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from freezekit.audit.findings import Finding
from freezekit.audit.live.region import Region, places
from freezekit.audit.live.sharing import grouped, plural
from freezekit.errors import FreezekitError

__all__ = ["member_risks", "optimizers_of"]

_PASS_ON = ("accelerate", "lightning", "pytorch_lightning")
"""Libraries whose optimizers only hand everything to the one inside."""

_ZERO_GRAD = "optimizer.zero_grad(set_to_none=True)"


def optimizers_of(given: Any) -> list[Any]:
    """Return the optimizers given as ``optimizer=``: none, one or several.

    Raises:
        FreezekitError: something given is no optimizer.

    >>> optimizers_of(None)
    []
    """
    every = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    for optimizer in every:
        if isinstance(optimizer, type) or not all(hasattr(optimizer, a) for a in ("param_groups", "state")):
            kind = (
                f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
            )
            raise FreezekitError(
                "not an optimizer",
                where="optimizer=",
                got=kind,
                remedy="give a torch.optim.Optimizer, or a list of them",
            )
    return every


def member_risks(region: Region, optimizers: list[Any]) -> Iterator[Finding]:
    """Yield what the optimizers will do to frozen parameters, and what they will not train."""
    frozen: dict[int, tuple[str, Tensor]] = {}
    for name, place in region.places.items():
        tensor = place.tensor()
        if tensor is not None and not tensor.requires_grad:
            frozen.setdefault(id(tensor), (name, tensor))
    moved: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    held: set[int] = set()
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            held.update(map(id, group["params"]))
            for position, parameter in enumerate(group["params"]):
                if id(parameter) in frozen:
                    for code, how, fix in _ways(optimizer, group, position, parameter):
                        where = f"group {index} of {type(optimizer).__name__}"
                        moved[code, f"in {where}, {how}", fix].append(frozen[id(parameter)][0])
    for key, (name, tensor) in frozen.items():
        if key not in held and tensor.is_leaf and tensor.grad is not None:
            what = (
                "in no optimizer given: nothing applies it, but gradient clipping counts it"
                if optimizers
                else ("which an optimizer that has it applies at its first step")
            )
            moved["FK315", what, "model.zero_grad(set_to_none=True)"].append(name)
    every = [name for name, _ in region.model.named_parameters(remove_duplicate=False)]
    for (code, how, fix), names in moved.items():
        for name, those in grouped(names, every).items():
            have = "has" if len(those) == 1 else "have"
            stale = f" {have} a gradient from before," if code == "FK315" else ""
            message = f"{plural(len(those), 'parameter')}{stale} {how}"
            yield Finding(code, name, message, fix.format(name=name))
    if optimizers:
        yield from _untrained(region, held, optimizers)


def _ways(
    optimizer: Any, group: dict[str, Any], position: int, parameter: Tensor
) -> Iterator[tuple[str, str, str]]:
    """Yield the code, the way in which a step can move a frozen parameter, and the fix."""
    optimizer = _inside(optimizer)
    out = "freezekit.freeze(model, {name!r}, optimizer=optimizer)"
    gradient = parameter.grad
    if not _is_torchs(optimizer):
        known = sorted(str(key) for key, value in optimizer.state.get(parameter, {}).items() if _moves(value))
        how = f"by what it remembers ({', '.join(known)})" if known else "by a decay of its own, say"
        yield "FK316", f"which is not torch's and may move what has no gradient, {how}", out
    if gradient is not None and _moves(gradient):
        yield (
            "FK303",
            "with a gradient from before, which the next step applies if nothing clears it",
            _ZERO_GRAD,
        )
    elif isinstance(optimizer, torch.optim.LBFGS):
        if _lbfgs_remembers(optimizer, group["params"], position):
            yield "FK302", "which moves it in the directions it remembers", out
    elif gradient is not None:
        pulls = _pulls(optimizer, group, parameter)
        if pulls:
            yield (
                "FK302",
                f"with a gradient of zero, on which it is moved by {' and '.join(pulls)}",
                _ZERO_GRAD,
            )
        else:
            yield "FK315", "of zero: it moves nothing as things are", _ZERO_GRAD


def _inside(optimizer: Any) -> Any:
    while type(optimizer).__module__.partition(".")[0] in _PASS_ON:
        inner = [o for o in vars(optimizer).values() if isinstance(o, torch.optim.Optimizer)]
        if not inner:
            break
        optimizer = inner[0]
    return optimizer


def _is_torchs(optimizer: Any) -> bool:
    """Tell whether its step is one of torch's, which leave alone what has no gradient (LBFGS excepted)."""
    step = getattr(type(optimizer), "step", None)
    return str(getattr(step, "__module__", "")).startswith("torch.")


def _pulls(optimizer: Any, group: dict[str, Any], parameter: Tensor) -> list[str]:
    """Return what moves a parameter whose gradient is zero."""
    found = []
    for key, what in (("weight_decay", "weight decay"), ("lambd", "its decay lambd")):
        if group.get(key):
            found.append(f"{what} {float(group[key]):g}")
    state = optimizer.state.get(parameter, {})
    averages = (state.get(key) for key in ("momentum_buffer", "exp_avg"))
    return [*found, "momentum"] if group.get("momentum", 1) and any(map(_moves, averages)) else found


def _moves(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return False
    if value.is_meta:
        return True
    value = value.detach()
    return bool((value if value.layout is torch.strided else value.to_dense()).count_nonzero())


def _lbfgs_remembers(optimizer: torch.optim.LBFGS, members: list[Tensor], position: int) -> bool:
    state = optimizer.state.get(members[0], {})
    start = sum(p.numel() for p in members[:position])
    end = start + members[position].numel()
    vectors = [
        state.get("d"),
        state.get("prev_flat_grad"),
        *state.get("old_dirs", ()),
        *state.get("old_stps", ()),
    ]
    return any(isinstance(vector, Tensor) and _moves(vector[start:end]) for vector in vectors)


def _untrained(region: Region, held: set[int], optimizers: list[Any]) -> Iterator[Finding]:
    known = places(region.model)
    every = {name: known[name].tensor() for name, _ in region.model.named_parameters()}
    trained = {n: p for n, p in every.items() if p is not None and p.requires_grad and n not in region.places}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    for name, those in grouped(missing, every).items():
        verb = "trains, but is" if len(those) == 1 else "train, but are"
        what = f"[model.get_parameter({name!r})]"
        if those != [name]:
            what = f"freezekit.trainable_parameters(model.get_submodule({name!r}))"
        message = f"{plural(len(those), 'parameter')} {verb} in no optimizer given: no step moves them"
        fix = f"optimizer.add_param_group({{'params': {what}}})"
        yield Finding("FK313", name, message, fix)
    others = (p for o in optimizers for group in o.param_groups for p in group["params"])
    if not trained and not any(p.requires_grad for p in others):
        name = next(iter(region.roots), "")
        message = "nothing requires a gradient, in the model or its optimizers: no step moves anything"
        yield Finding(
            "FK314", name or type(region.model).__name__, message, "freezekit.unfreeze(model, NAMES)"
        )
