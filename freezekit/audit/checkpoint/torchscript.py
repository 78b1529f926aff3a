"""Reads what ``torch.jit.save`` writes: the module's attributes in ``data.pkl``, its classes in ``code/``.

Which attributes are parameters and which are buffers stands in the code alone, in two lines of each class.
These are searched for; the code is neither run nor parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from freezekit.audit.checkpoint.archive import MAX_UNPACKED_BYTES, Archive
from freezekit.audit.checkpoint.container import printable
from freezekit.audit.checkpoint.inert import GlobalRef, Opaque, StorageRef, TensorRef, describe
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.pickle_machine import Unpickled
from freezekit.audit.checkpoint.roots import State, check_length, too_many_keys
from freezekit.audit.checkpoint.table import flat_table
from freezekit.audit.checkpoint.tensors import StoredBytes, make_tensor
from freezekit.audit.state import StateTable, role_of
from freezekit.errors import CheckpointError

__all__ = ["is_scripted", "read_scripted"]

_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = \[([^\]\n]*)\]\n(?:  __buffers__ = \[([^\]\n]*)\]\n)?",
    re.MULTILINE,
)
_NAME = re.compile(r'"([^"\n]*)"')
#: classes that are written in C++; what is in their objects is known to them only
_TORCHBIND = "__torch__.torch.classes."
_Own = tuple[frozenset[str], frozenset[str] | None]
_MAX_MODULES = 100_000
_MAX_PREFIX = 1_000


def is_scripted(archive: Archive, root: str) -> bool:
    """Tell whether the archive is TorchScript's."""
    return f"{root}constants.pkl" in archive.members or any(
        name.startswith(f"{root}code/") for name in archive.members
    )


def read_scripted(
    archive: Archive,
    folder: str,
    pickled: Unpickled,
    find: Callable[[StorageRef], StoredBytes],
    root: str | None = None,
) -> StateTable:
    """Return the state of a scripted or traced module, as ``torch.jit.load(FILE).state_dict()`` has it.

    Args:
        archive: the zip.
        folder: what comes before its ``data.pkl``.
        pickled: the inert module.
        find: finds a storage's bytes.
        root: which of several networks in it to read.

    Raises:
        CheckpointError: it is damaged or hostile, or has no state.
    """
    classes = _Classes(archive, folder)
    state = _state(pickled.root, classes, archive.limits)
    if not state.tensors:
        raise _without_state(archive, folder)
    tensors = [
        make_tensor(name, ref, find, archive.file, state.roles.get(name))
        for name, ref in state.tensors.items()
    ]
    return flat_table(archive.file, tensors, root, classes.notes())


class _Classes:
    """Which attributes of a class are parameters and buffers, by what its code says."""

    def __init__(self, archive: Archive, root: str) -> None:
        self._archive = archive
        self._root = f"{root}code/"
        self._files: dict[str, dict[str, _Own]] = {}
        # the mobile interpreter needs no code, so that some tools leave it away
        self.without_code = not any(name.startswith(self._root) for name in archive.members)
        self._untold = self.without_code

    def of(self, ref: GlobalRef) -> _Own | None:
        """Return the names of a class's parameters and buffers, or ``None`` if it is no module's.

        In place of the buffers' names stands ``None`` where every other tensor is one.
        """
        if self.without_code:
            return frozenset(), None
        own = self._in_file(ref.module).get(ref.name)
        self._untold |= own is not None and own[1] is None
        return own

    def _in_file(self, module: str) -> dict[str, _Own]:
        if module not in self._files:
            name = f"{self._root}{module.replace('.', '/')}.py"
            if name not in self._archive.members:
                what = "damaged: the code of one of its classes is missing"
                raise CheckpointError(what, got=printable(name), remedy="download or copy the file again")
            code = self._archive.read(name, MAX_UNPACKED_BYTES, unpack=True).decode("utf-8", "replace")
            self._files[module] = {
                # torch 1.4 and before has no line for the buffers
                match[1]: (_names(match[2]), None if match[3] is None else _names(match[3]))
                for match in _CLASS.finditer(code)
            }
        return self._files[module]

    def notes(self) -> list[str]:
        """Say where the file does not tell what is state."""
        told = "it does not say which attributes are buffers: every tensor in it counts as state"
        return [told] if self._untold else []


def _names(listed: str) -> frozenset[str]:
    return frozenset(_NAME.findall(listed))


def _state(module: object, classes: _Classes, limits: Limits) -> State:
    state = State()
    waiting: list[tuple[Any, str]] = [(module, "")]
    visits = 0
    while waiting:
        value, prefix = waiting.pop()
        visits += 1
        # a module inside itself would go on for ever, and so would shared ones nested deep enough
        if visits > _MAX_MODULES or len(prefix) > _MAX_PREFIX:
            raise CheckpointError("its modules are nested without end", remedy="save model.state_dict()")
        if not isinstance(value, Opaque) or value.made_by is None or not isinstance(value.state, dict):
            raise CheckpointError(
                "damaged: a TorchScript file that holds no module",
                got=describe(value),
                remedy="save the model's state_dict() with torch.save",
            )
        own = classes.of(value.made_by)
        if own is not None:
            waiting += reversed(_take(value.state, own, prefix, state, classes.without_code))
        if len(state.tensors) > limits.keys:
            raise too_many_keys(len(state.tensors), limits)
    return state


def _take(
    attributes: dict[Any, Any], own: _Own, prefix: str, state: State, untold: bool
) -> list[tuple[Opaque, str]]:
    """Add a module's own tensors to the state, parameters first, and return the modules inside it."""
    inside: list[tuple[Opaque, str]] = []
    buffers: dict[str, TensorRef] = {}
    for name, item in attributes.items():
        if not isinstance(name, str):
            raise CheckpointError("damaged: an attribute's name is no text", got=describe(name))
        check_length(name)
        full = prefix + name
        if isinstance(item, TensorRef) and name in own[0]:
            state.tensors[full] = item
            state.roles[full] = "parameter"
        elif isinstance(item, TensorRef) and (own[1] is None or name in own[1]):
            buffers[full] = item
            role = role_of(name, item.dtype)
            if not untold:
                state.roles[full] = "buffer" if role == "parameter" else role
        elif isinstance(item, Opaque) and item.made_by is not None:
            made_by = str(item.made_by)
            if made_by.startswith("__torch__.") and isinstance(item.state, dict):
                inside.append((item, f"{full}."))
            elif made_by.startswith("__torch__.") and item.state is not None:
                # packed weights of a quantised layer, most often; what it is only its own code knows
                reason = f"object of the class {printable(made_by.removeprefix(_TORCHBIND))}"
                buffers[full] = TensorRef(None, 0, (), (), "unknown", unsupported=reason)
                state.roles[full] = "attribute"
    state.tensors |= buffers
    return inside


def _without_state(archive: Archive, root: str) -> CheckpointError:
    if any(name.startswith(f"{root}constants/") for name in archive.members):
        return CheckpointError(
            "a frozen TorchScript module (torch.jit.freeze) has no state: its parameters are constants now",
            remedy="give the checkpoint it was made from, or the module as it was before torch.jit.freeze",
        )
    return CheckpointError(
        "a TorchScript module without parameters and buffers",
        remedy="save the state_dict() of the whole model with torch.save",
    )
