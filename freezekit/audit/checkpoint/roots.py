"""Finds the state dict in what a checkpoint holds, and the names its tensors have in the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.checkpoint.inert import Opaque, StorageRef, TensorRef, children, describe
from freezekit.audit.checkpoint.rebuild import holds_tensor
from freezekit.audit.findings import REPORT_KEY
from freezekit.audit.state import Role, role_of
from freezekit.errors import CheckpointError
from freezekit.manifest import KEY

__all__ = ["MAX_KEYS", "State", "find_state", "find_texts", "model_names", "too_many_keys"]

MAX_KEYS = 1_000_000
#: characters; what looks at all that is above a name costs the square of its length
_TEXTS = {KEY: "handle.manifest()", REPORT_KEY: "auditor.report()"}
_MAX_KEY_LENGTH = 1_000

#: where training code puts a model's state, in order of preference
_WELL_KNOWN = (
    "state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights",
    "ema", "model_ema", "state_dict_ema", "ema_state_dict", "student", "teacher",
    "generator", "discriminator", "backbone", "encoder",
)  # fmt: skip
_MAX_NESTING = 12
_MAX_MODULES = 100_000


@dataclass(slots=True)
class State:
    """A state dict.

    Args:
        tensors: by the file's own names, in order.
        roles: of those tensors whose role the file tells.
        skipped: names of the entries that are no tensors.
        path: where in the file's object it was found.
        others: where else something of the kind was found.
    """

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    path: str = ""
    others: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Say what was chosen and what was left out."""
        notes = []
        if self.others:
            notes.append(f"also holds: {_listed(self.others)}; read '{printable(self.path)}'")
        if self.skipped:
            notes.append(f"skipped entries that are not tensors: {_listed(self.skipped)}")
        return notes


def find_state(root: object) -> State:
    """Find the state dict in a checkpoint's object.

    It is the object itself if that maps names to tensors or is a whole module; else what a well-known key
    holds, nested ones included; else the mapping with the most tensors that does not belong to an optimizer.

    Args:
        root: the inert object.

    Raises:
        CheckpointError: there is none, or a tensor's key is no string.
    """
    state = _resolve(root, (), set()) or _search(root)
    if state is None:
        raise CheckpointError(
            "holds no tensors that have a name",
            got=describe(root),
            remedy="save model.state_dict() with torch.save or safetensors",
        )
    return state


def find_texts(root: object) -> tuple[str | None, str | None, list[str]]:
    """Return the texts of the manifest and of the report beside the state dict, and notes.

    A note tells of something else in the place of either.
    """
    mapping = _as_mapping(root) or {}
    found = {key: mapping.get(key) for key in _TEXTS}
    notes = [
        f"its '{key}' is not text, and was not used: save {_TEXTS[key]}.to_json() there"
        for key, value in found.items()
        if value is not None and not isinstance(value, str)
    ]
    manifest, report = (value if isinstance(value, str) else None for value in found.values())
    return manifest, report, notes


def model_names(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names without the prefixes that wrappers put on them, and notes that say so.

    Raises:
        CheckpointError: two names become the same, or one is absurdly long.

    >>> model_names(["module._orig_mod.fc.weight", "module._orig_mod.fc.bias"])[0]
    ['fc.weight', 'fc.bias']
    """
    original = list(names)
    longest = max(original, key=len, default="")
    if len(longest) > _MAX_KEY_LENGTH:
        raise CheckpointError(
            "a key is too long to be a layer's name",
            got=f"{len(longest)} characters, more than {_MAX_KEY_LENGTH}: {printable(longest)}",
        )
    notes = []
    cleaned = [
        ".".join(part for part in name.split(".") if part != "_orig_mod") if "_orig_mod" in name else name
        for name in original
    ]
    if cleaned != original:
        notes.append("stripped '_orig_mod.' (torch.compile) from the names")
    # AveragedModel keeps one counter beside its module
    wrapped = [name for name in cleaned if name != "n_averaged"]
    if wrapped and all(name.startswith("module.") for name in wrapped):
        cleaned = [name.removeprefix("module.") for name in cleaned]
        notes.append("stripped 'module.' (DataParallel) from the names")
    seen: set[str] = set()
    for name in cleaned:
        if name in seen:
            raise CheckpointError(
                "two tensors have the same name once prefixes are gone", got=printable(name)
            )
        seen.add(name)
    return cleaned, notes


def too_many_keys(count: int) -> CheckpointError:
    """Return the error for a state dict bigger than any real one."""
    return CheckpointError("holds too many keys", got=f"{count}, more than {MAX_KEYS}")


def _resolve(value: object, path: tuple[str, ...], seen: set[int]) -> State | None:
    """Return the state dict that a value is or leads to by well-known keys."""
    if id(value) in seen or len(path) > _MAX_NESTING:
        return None
    seen.add(id(value))
    if _is_module(value):
        return _module_state(value, ".".join(path))
    mapping = _as_mapping(value)
    if mapping is None:
        return None
    nested = [_resolve(mapping[key], (*path, key), seen) for key in _WELL_KNOWN if key in mapping]
    found = [state for state in nested if state is not None]
    own = _mapping_state(mapping, ".".join(path))
    best = next((state for state in found if len(state.tensors) > len(own.tensors)), None)
    if best is not None:
        best.others += [state.path for state in found if state is not best]
        return best
    return own if own.tensors and 2 * len(own.tensors) >= len(mapping) else None


def _search(root: object) -> State | None:
    """Return the state with the most tensors anywhere inside, walking without recursion."""
    found: list[State] = []
    seen: set[int] = set()
    waiting: list[tuple[Any, str]] = [(root, "")]
    while waiting:
        value, path = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if _is_module(value):
            found.append(_module_state(value, path))
            continue
        mapping = _as_mapping(value)
        if mapping is not None and "param_groups" in mapping:
            continue
        if mapping is not None and (state := _mapping_state(mapping, path)).tensors:
            found.append(state)
        inside = [
            # paths serve messages only, and would grow as the square of the nesting
            (item, f"{path}.{key}".lstrip(".") if len(path) < 200 else path)
            for key, item in children(value)
            if isinstance(item, dict | list | tuple | Opaque) and not _of_optimizer(key)
        ]
        waiting += reversed(inside)
    best = max(found, key=lambda state: len(state.tensors), default=None)  # the first of the longest
    if best is None or not best.tensors:
        return None
    best.others += [state.path for state in found if state is not best and state.tensors]
    return best


def _of_optimizer(key: str) -> bool:
    key = key.lower()
    return "optim" in key or "scheduler" in key or key in ("opt", "scaler", "rng_state", "rng_states")


def _as_mapping(value: object) -> dict[Any, Any] | None:
    if isinstance(value, dict):
        return value
    if isinstance(value, Opaque):
        if value.mapping is not None:
            return value.mapping
        return value.state if isinstance(value.state, dict) else None
    return None


def _mapping_state(mapping: dict[Any, Any], path: str) -> State:
    state = State(path=path)
    for key, value in mapping.items():
        tensor = _as_tensor(value)
        if isinstance(key, str):
            if tensor is not None:
                state.tensors[key] = tensor
            elif key not in _TEXTS or path:  # at the top it is read, by itself
                state.skipped.append(key)
        elif tensor is None:
            state.skipped.append(f"<{type(key).__name__}>")
        elif state.tensors:  # without one named tensor it is no state dict at all, and stays what it is
            raise CheckpointError(
                "a tensor's key is not a string",
                got=f"{describe(key)} in '{printable(path)}'" if path else describe(key),
                remedy="save model.state_dict()",
            )
    if len(mapping) > MAX_KEYS and state.tensors:
        raise too_many_keys(len(mapping))
    return state


def _as_tensor(value: object) -> TensorRef | None:
    if isinstance(value, TensorRef):
        return value
    if isinstance(value, StorageRef):
        return TensorRef(None, 0, (value.numel,), (1,), value.dtype, unsupported="bare storage")
    if isinstance(value, Opaque) and holds_tensor(value):  # named, so that it is not left out silently
        reason = f"kind of tensor, made by {printable(str(value.made_by))}"
        return TensorRef(None, 0, (), (), "unknown", unsupported=reason)
    return None


def _is_module(value: object) -> bool:
    state = value.state if isinstance(value, Opaque) else None
    return isinstance(state, dict) and all(
        isinstance(state.get(part), dict) for part in ("_parameters", "_buffers", "_modules")
    )


def _module_state(module: object, path: str) -> State:
    """Return what ``state_dict()`` of a whole pickled module would hold."""
    found = State(path=path)
    waiting: list[tuple[Any, str]] = [(module, "")]
    visits = 0
    while waiting:
        value, prefix = waiting.pop()
        visits += 1
        # a module inside itself would go on for ever, and so would shared ones nested deep enough
        if visits > _MAX_MODULES or len(prefix) > 10_000:
            raise CheckpointError("its modules are nested without end", remedy="save model.state_dict()")
        if not _is_module(value):
            continue
        parts = value.state
        passing = parts.get("_non_persistent_buffers_set")
        passing = {name for name in passing if isinstance(name, str)} if isinstance(passing, list) else set()
        for name, tensor in _named_tensors(parts["_parameters"]):
            found.tensors[prefix + name] = tensor
            found.roles[prefix + name] = "parameter"
        for name, tensor in _named_tensors(parts["_buffers"]):
            if name not in passing:
                found.tensors[prefix + name] = tensor
                role = role_of(name, tensor.dtype)
                found.roles[prefix + name] = "buffer" if role == "parameter" else role
        children_ = [(child, f"{prefix}{name}.") for name, child in parts["_modules"].items()]
        waiting += reversed(children_)
        if len(found.tensors) > MAX_KEYS:
            raise too_many_keys(len(found.tensors))
    return found


def _named_tensors(mapping: dict[Any, Any]) -> Iterator[tuple[str, TensorRef]]:
    for name, value in mapping.items():
        tensor = _as_tensor(value)
        if tensor is not None and isinstance(name, str):
            yield name, tensor


def _listed(names: list[str]) -> str:
    shown = ", ".join(printable(name, 40) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
