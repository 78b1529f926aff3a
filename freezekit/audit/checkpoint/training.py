"""What a checkpoint tells of its training: steps, epochs, and what its optimizers held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.checkpoint.inert import Opaque, TensorRef, as_mapping, describe
from freezekit.audit.checkpoint.tensors import sane_shape
from freezekit.audit.state import OptimizerState, TensorState, Training

__all__ = ["find_training"]

_STEPS = (
    "global_step", "global_steps", "step", "steps", "iteration", "iter", "n_iter", "num_iter", "num_updates",
    "it",
)  # fmt: skip
_EPOCHS = ("epoch", "current_epoch", "epochs", "last_epoch")
#: mappings of a checkpoint that hold such numbers
_INSIDE = ("meta", "trainer_state", "training_state", "trainer", "state", "progress", "info", "extra_state")
#: an optimizer's tensors of its parameter's own shape
_MOMENTA = (
    "exp_avg", "momentum_buffer", "exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta", "grad_avg",
    "prev", "ax", "z", "exp_avg_diff", "max_exp_avg_sq", "momentum", "moment1", "moment2",
)  # fmt: skip
_MAX_NESTING = 3
_MAX_NUMBER = 2**53
#: parameters of all the optimizers in a file together, which may be one that is named many times
_MAX_HELD = 300_000

Make = Callable[[str, TensorRef], TensorState]


def find_training(root: object, make: Make) -> tuple[Training, list[str]]:
    """Find what a checkpoint tells of its training, and notes on what of it is not understood.

    Args:
        root: the checkpoint's object, inert.
        make: makes a tensor readable; it is not called before the tensor is read.
    """
    mapping = as_mapping(root) or {}
    numbers = [mapping, *(as_mapping(mapping.get(key)) or {} for key in _INSIDE)]
    optimizers: list[OptimizerState] = []
    notes: list[str] = []
    room = _Room(_MAX_HELD)
    for path, value in _candidates(mapping):
        found = _optimizer(path, value, make, room)
        if isinstance(found, OptimizerState):
            optimizers.append(found)
        else:
            notes.append(f"the optimizer state at '{printable(path)}' was left out: {found}")
    training = Training(_first(numbers, _STEPS), _first(numbers, _EPOCHS), tuple(optimizers))
    return training, notes[:5]


@dataclass(slots=True)
class _Room:
    """How many parameters may still be looked at."""

    left: int


def _first(mappings: list[dict[Any, Any]], names: tuple[str, ...]) -> int | None:
    """Return the first number under one of the names."""
    for mapping in mappings:
        for name in names:
            value = mapping.get(name)
            if type(value) is float and value.is_integer():
                value = int(value)
            if type(value) is int and 0 <= value < _MAX_NUMBER:
                return value
    return None


def _candidates(root: dict[Any, Any]) -> Iterator[tuple[str, object]]:
    """Yield what lies where an optimizer's state does, with its path."""
    seen: set[int] = set()
    waiting: list[tuple[dict[Any, Any], str, int, bool]] = [(root, "", 0, False)]
    while waiting:
        mapping, path, depth, is_optimizers = waiting.pop()
        if id(mapping) in seen:
            continue
        seen.add(id(mapping))
        inside = []
        for key, value in mapping.items():
            if not isinstance(key, str) or not isinstance(value, dict | list | Opaque):
                continue
            lowered = key[:200].lower()
            if "progress" in lowered:  # how far Lightning's loops are, and no optimizer's state
                continue
            here = f"{path}.{key[:200]}" if path else key[:200]
            told = "optim" in lowered or lowered == "opt"
            beside = (
                "scheduler" in lowered or "history" in lowered or "config" in lowered or "args" in lowered
            )
            items = value if isinstance(value, list) else None
            if items is not None and told and not beside:
                yield from (
                    (f"{here}.{i}", item) for i, item in enumerate(items) if isinstance(item, dict | Opaque)
                )
            inner = as_mapping(value)
            if inner is None:
                continue
            if "param_groups" in inner:
                if told or is_optimizers:
                    yield here, value
            elif told and not beside and inner and not any(_holds_groups(item) for item in inner.values()):
                yield here, value  # which is not understood, and that is told
            elif depth < _MAX_NESTING:
                inside.append((inner, here, depth + 1, told))
        waiting += reversed(inside)


def _holds_groups(value: object) -> bool:
    mapping = as_mapping(value)
    return mapping is not None and "param_groups" in mapping


def _optimizer(path: str, value: object, make: Make, room: _Room) -> OptimizerState | str:
    """Describe one optimizer's state, or say why it is none that torch's optimizers write."""
    mapping = _nested(as_mapping(value))
    groups = None if mapping is None else mapping.get("param_groups")
    if mapping is None or not isinstance(groups, list) or not groups:
        return f"{describe(value)}, not what torch's optimizers write"
    keys: list[tuple[int | str, ...]] = []
    names: dict[int | str, str] = {}
    steps: dict[int | str, TensorState | int] = {}
    for each in groups:
        group = as_mapping(each)
        held = None if group is None else group.get("params")
        if group is None or not isinstance(held, list | tuple):
            return "a group of it has no list of parameters"
        room.left -= len(held) + 1
        if room.left < 0:
            return f"the file names more than {_MAX_HELD} parameters in its optimizers"
        if any(type(key) not in (int, str) for key in held):
            return "it holds its parameters themselves, and not their numbers or names"
        keys.append(tuple(held))
        names.update((key, key) for key in held if isinstance(key, str))
        told = group.get("param_names")
        if isinstance(told, list | tuple) and len(told) == len(held):
            names.update((k, name) for k, name in zip(held, told, strict=True) if isinstance(name, str))
        if _is_count(group.get("step")):  # as apex's optimizers count
            steps.update(dict.fromkeys(held, group["step"]))
    shapes: dict[int | str, tuple[int, ...]] = {}
    state = as_mapping(mapping.get("state")) or {}
    for key in (key for group in keys for key in group):
        entry = as_mapping(state.get(key)) or {}
        momentum = next((entry[m] for m in _MOMENTA if isinstance(entry.get(m), TensorRef)), None)
        if momentum is not None and (shape := sane_shape(momentum.shape)) is not None:
            shapes[key] = shape
        step = entry.get("step")
        if isinstance(step, TensorRef):
            steps[key] = _lazy(f"{path}.state.{key}.step", step, make)
        elif type(step) is int and _is_count(step):
            steps[key] = step
    return OptimizerState(path, tuple(keys), names, shapes, steps)


def _nested(mapping: dict[Any, Any] | None) -> dict[Any, Any] | None:
    """Undo torch's ``flatten_optimizer_state_dict``: ``"state.NAME.step"``, ``"param_groups.NAME.lr"``."""
    state: dict[str, dict[str, Any]] = {}
    held: dict[str, None] = {}
    for key, value in (mapping or {}).items():
        kind, _, rest = key.partition(".") if isinstance(key, str) else ("", "", "")
        name, _, last = rest.rpartition(".")
        if kind == "state" and name:
            state.setdefault(name, {})[last] = value
        elif kind == "param_groups" and name:
            held[name] = None
        else:
            return mapping
    if not held or state.keys() - held.keys():  # what is nested deeper has other names
        return mapping
    return {"state": state, "param_groups": [{"params": list(held)}]}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _lazy(name: str, ref: TensorRef, make: Make) -> TensorState:
    """Return a tensor that is looked for in the file when its values are asked for, and checked then."""
    shape = sane_shape(ref.shape) or ()
    return TensorState(name, "attribute", printable(ref.dtype), shape, lambda: make(name, ref).read())
