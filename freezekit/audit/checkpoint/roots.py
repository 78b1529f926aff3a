"""Finds the state dict in what a checkpoint holds, and the names its tensors have in the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from freezekit.audit.checkpoint.choosing import choose, named, networks, norms_of, others_note
from freezekit.audit.checkpoint.container import printable
from freezekit.audit.checkpoint.inert import (
    Opaque,
    StorageRef,
    TensorRef,
    as_mapping,
    children,
    describe,
    held_by,
)
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.rebuild import holds_tensor
from freezekit.audit.findings import REPORT_KEY
from freezekit.audit.state import Role, Root, role_of
from freezekit.errors import CheckpointError
from freezekit.manifest import KEY

__all__ = ["State", "check_length", "find_state", "find_texts", "model_names", "too_many_keys"]

_TEXTS = {KEY: "handle.manifest()", REPORT_KEY: "auditor.report()"}
#: what the state of a hook that freezes has in it
_OF_A_HOOK = {"epoch", "stages", "manifest"}
#: characters; what looks at all that is above a name costs the square of its length
_MAX_KEY_LENGTH = 1_000

#: where training code puts a model's state, in order of preference
_WELL_KNOWN = (
    "state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights",
    "ema", "model_ema", "state_dict_ema", "ema_state_dict", "student", "teacher",
    "generator", "discriminator", "backbone", "encoder",
)  # fmt: skip
#: what is beside the models, and may hold tensors under names too
_BESIDE = frozenset(
    ("opt", "scaler", "grad_scaler", "amp", "rng_state", "rng_states", "callbacks", "loops", "message_hub")
)
#: how classes of settings are called
_SETTINGS = ("Arguments", "Config", "Namespace")
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
        roots: all the places in the file that hold a model's state, this one included.
        fault: why it cannot be read, or ``None``.
        deepest: how deep the file was searched, where there is something deeper in it.
    """

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    path: str = ""
    roots: tuple[Root, ...] = ()
    fault: CheckpointError | None = None
    deepest: int | None = None

    def notes(self) -> list[str]:
        """Say what was chosen and what was left out."""
        notes = others_note(self.roots, self.path)
        if self.skipped:
            notes.append(f"skipped entries that are not tensors: {_listed(self.skipped)}")
        if self.deepest is not None:
            notes.append(
                f"what is nested deeper than {self.deepest} was not searched; --no-limits searches it"
            )
        return notes

    @property
    def is_model(self) -> bool:
        """Whether it looks like a model's state, and not like a few tensors beside others."""
        mostly = 2 * len(self.tensors) >= len(self.tensors) + len(self.skipped)
        return bool(self.tensors) and (mostly or bool(norms_of(self.tensors)))

    def network(self, prefix: str) -> State:
        """Return the state of one of the networks in it."""
        start = f"{prefix}."
        inside = {name: tensor for name, tensor in self.tensors.items() if name.startswith(start)}
        return State(
            {name.removeprefix(start): tensor for name, tensor in inside.items()},
            {name.removeprefix(start): self.roles[name] for name in inside if name in self.roles},
            path=named(self.path, prefix),
        )


def find_state(root: object, wanted: str | None = None, limits: Limits = Limits.DEFAULT) -> State:
    """Find the state dict in a checkpoint's object.

    It is the object itself if that maps names to tensors or is a whole module; else what a well-known key
    holds, nested ones included; else the mapping with the most tensors that does not belong to an optimizer.

    Args:
        root: the inert object.
        wanted: which one to take instead, see :func:`choosing.choose`.
        limits: caps on what it may hold.

    Raises:
        CheckpointError: there is none, or a tensor's key is no string.
        SelectionError: it has no such root as ``wanted``.
    """
    states, whole = _all_states(root, limits)
    best = _resolve(root, states, 0, set())
    if best is None:  # the first of the longest
        best = max(states.values(), key=lambda state: len(state.tensors), default=None)
    if best is None or not best.tensors:
        if not whole:
            got = f"nothing to a depth of {limits.nesting}"
            raise Limits.hit("holds no tensors that have a name, as far as it was searched", got)
        maker = root.made_by.name if isinstance(root, Opaque) and root.made_by else ""
        remedy = "save model.state_dict() with torch.save or safetensors"
        if maker.endswith(_SETTINGS):  # such as the training_args.bin that transformers saves
            what = "holds the settings of a training, and no tensors"
            remedy = "give the model's file, such as the model.safetensors beside it"
            raise CheckpointError(what, got=describe(root), remedy=remedy)
        raise CheckpointError("holds no tensors that have a name", got=describe(root), remedy=remedy)
    roots: list[Root] = []
    places: dict[str, tuple[State, str | None]] = {}
    for state in {id(state): state for state in states.values()}.values():
        if not state.tensors or (state is not best and not state.is_model):
            continue
        inside = networks({name: tensor.shape for name, tensor in state.tensors.items()})
        for prefix in (None, *inside):
            made = state if prefix is None else state.network(prefix)
            if made.path not in places:
                places[made.path] = state, prefix
                roots.append(Root(made.path, len(made.tensors), len(norms_of(made.tensors))))
    if wanted is not None:
        state, prefix = places[choose(roots, wanted).path]
        best = state if prefix is None else state.network(prefix)
        best.fault = state.fault
    if best.fault is not None:
        raise best.fault
    best.roots = tuple(roots)
    best.deepest = None if whole else limits.nesting
    return best


def find_texts(root: object, path: str = "") -> tuple[str | None, str | None, list[str]]:
    """Return the texts of the manifest and of the report beside the state dict, and notes.

    A manifest may also be in the state of a hook. A note tells of something else in the place of either.

    Args:
        root: the inert object.
        path: where in it the state dict is. What is around that is looked at, from the top inwards.
    """
    found: dict[str, object] = dict.fromkeys(_TEXTS)
    mapping = as_mapping(root)
    for part in (*path.partition(":")[0].split("."), ""):
        if mapping is None:
            break
        for key in _TEXTS:
            found[key] = mapping.get(key) if found[key] is None else found[key]
        states = [v for v in mapping.values() if isinstance(v, dict) and v.keys() == _OF_A_HOOK]
        if found[KEY] is None and len(states) == 1:
            found[KEY] = states[0]["manifest"]
        mapping = as_mapping(mapping.get(part))
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
    check_length(max(original, key=len, default=""))
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


def check_length(name: str) -> None:
    """Refuse a name that is no layer's."""
    if len(name) > _MAX_KEY_LENGTH:
        raise CheckpointError(
            "a key is too long to be a layer's name",
            got=f"{len(name)} characters, more than {_MAX_KEY_LENGTH}: {printable(name)}",
        )


def too_many_keys(count: int, limits: Limits = Limits.DEFAULT) -> CheckpointError:
    """Return the error for a state dict bigger than any real one."""
    return Limits.hit("holds too many keys", f"{count}, more than {limits.keys}")


def _resolve(value: object, states: dict[int, State], depth: int, seen: set[int]) -> State | None:
    """Return the state dict that a value is or leads to by well-known keys."""
    if id(value) in seen or depth > _MAX_NESTING:
        return None
    seen.add(id(value))
    own = states.get(id(value))
    mapping = as_mapping(value)
    if mapping is None or _is_module(value):
        return own
    nested = [_resolve(mapping[key], states, depth + 1, seen) for key in _WELL_KNOWN if key in mapping]
    held = 0 if own is None else len(own.tensors)
    best = next((state for state in nested if state is not None and len(state.tensors) > held), None)
    return best or (own if held and 2 * held >= len(mapping) else None)


def _all_states(root: object, limits: Limits) -> tuple[dict[int, State], bool]:
    """Return all that could be a state, in order, by its object's id, and whether that is all there is.

    It walks without recursion.
    """
    whole = True
    found: dict[int, State] = {}
    made: dict[int, State] = {}
    seen: set[int] = set()
    waiting: list[tuple[Any, str, int]] = [(root, "", 0)]
    entries = 0
    while waiting:
        value, path, depth = waiting.pop()
        if id(value) in seen:
            continue
        if depth > limits.nesting:
            whole = False
            continue
        seen.add(id(value))
        if len(seen) > limits.containers:
            raise Limits.hit("holds too many containers", f"more than {limits.containers}")
        if _is_module(value):
            found[id(value)] = _module_state(value, path, limits)
            continue
        mapping = as_mapping(value)
        if mapping is not None and "param_groups" in mapping:
            continue
        if mapping is not None:
            if id(mapping) not in made:  # objects may share their attributes
                made[id(mapping)] = _mapping_state(mapping, path, limits)
            if made[id(mapping)].tensors:
                found[id(value)] = made[id(mapping)]
        entries += held_by(value)
        if entries > limits.entries:
            raise Limits.hit("holds too many entries", f"more than {limits.entries}")
        inside = [
            # paths serve messages only, and would grow as the square of the nesting
            (item, f"{path}.{key[:200]}".lstrip(".") if len(path) < 200 else path, depth + 1)
            for key, item in children(value)
            if isinstance(item, dict | list | tuple | Opaque) and not _beside_models(key)
        ]
        waiting += reversed(inside)
    return found, whole


def _beside_models(key: str) -> bool:
    key = key[-1000:].lower()  # of what is longer, no copies
    return key in _BESIDE or "optim" in key or "scheduler" in key or key.endswith("_extra_state")


def _mapping_state(mapping: dict[Any, Any], path: str, limits: Limits) -> State:
    state = State(path=path)
    for key, value in mapping.items():
        tensor = _as_tensor(value)
        if isinstance(key, str):
            if tensor is not None:
                state.tensors[key] = tensor
            elif key not in _TEXTS:  # which are read by themselves
                state.skipped.append(key)
        elif tensor is None:
            state.skipped.append(f"<{type(key).__name__}>")
        elif state.tensors:  # without one named tensor it is no state dict at all, and stays what it is
            state.fault = state.fault or CheckpointError(
                "a tensor's key is not a string",
                got=f"{describe(key)} in '{printable(path)}'" if path else describe(key),
                remedy="save model.state_dict()",
            )
    if len(mapping) > limits.keys and state.tensors:
        raise too_many_keys(len(mapping), limits)
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


def _module_state(module: object, path: str, limits: Limits) -> State:
    """Return what ``state_dict()`` of a whole pickled module would hold."""
    found = State(path=path)
    waiting: list[tuple[Any, str]] = [(module, "")]
    visits = entries = 0
    while waiting:
        value, prefix = waiting.pop()
        visits += 1
        # a module inside itself would go on for ever, and so would shared ones nested deep enough
        if visits > _MAX_MODULES or len(prefix) > 10_000:
            raise CheckpointError("its modules are nested without end", remedy="save model.state_dict()")
        if not _is_module(value):
            if value is not None:
                found.skipped.append(prefix.removesuffix("."))
            continue
        parts = value.state
        entries += sum(len(parts[part]) for part in ("_parameters", "_buffers", "_modules"))
        if entries > limits.entries:
            raise Limits.hit("its modules hold too many entries", f"more than {limits.entries}")
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
        if len(found.tensors) > limits.keys:
            raise too_many_keys(len(found.tensors), limits)
    return found


def _named_tensors(mapping: dict[Any, Any]) -> Iterator[tuple[str, TensorRef]]:
    for name, value in mapping.items():
        tensor = _as_tensor(value)
        if tensor is not None and isinstance(name, str):
            check_length(name)  # before it is put behind the names of the modules around it
            yield name, tensor


def _listed(names: list[str]) -> str:
    shown = ", ".join(printable(name, 40) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
