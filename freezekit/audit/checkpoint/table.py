"""Makes the StateTable from what the pickle describes and where the container keeps the storages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from freezekit.audit.checkpoint.choosing import choose_network, others_note
from freezekit.audit.checkpoint.container import SourceFile, printable
from freezekit.audit.checkpoint.inert import StorageRef
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.pickle_machine import Unpickled
from freezekit.audit.checkpoint.roots import find_state, find_texts, model_names
from freezekit.audit.checkpoint.tensors import StoredBytes, check_amount, make_tensor
from freezekit.audit.checkpoint.training import find_training
from freezekit.audit.state import StateTable, TensorState

__all__ = ["flat_table", "make_table"]


def make_table(
    file: SourceFile,
    pickled: Unpickled,
    find: Callable[[StorageRef], StoredBytes],
    late_notes: Callable[[], list[str]] = list,
    root: str | None = None,
    limits: Limits = Limits.DEFAULT,
) -> StateTable:
    """Find the state dict, check each of its tensors, and make them readable.

    Args:
        file: the file.
        pickled: its inert object.
        find: finds a storage's bytes.
        late_notes: what the container has to say once all storages were found.
        root: which of the states in it to take; the model's if not given.
        limits: caps on what it may hold.

    Raises:
        CheckpointError: there is no state dict, or a tensor in it is impossible.
    """
    state = find_state(pickled.root, root, limits)
    names, notes = model_names(state.tensors)
    tensors = [
        make_tensor(name, ref, find, file, state.roles.get(original))
        for name, (original, ref) in zip(names, state.tensors.items(), strict=True)
    ]
    check_amount(tensors, file)
    if pickled.foreign:
        notes.append(_foreign_note(pickled.foreign))
    manifest, report, said = find_texts(pickled.root, state.path)
    training, untold = find_training(
        pickled.root, lambda name, ref: make_tensor(name, ref, find, file, "attribute")
    )
    notes = [*state.notes(), *notes, *said, *untold, *late_notes()]
    return StateTable(tensors, file.source, tuple(notes), manifest, report, state.path, state.roots, training)


def _foreign_note(names: Sequence[str]) -> str:
    """Name the code that a pickle asks for: of a package that makes the model, the first will do."""
    packages: dict[str, list[str]] = {}
    for name in names:
        top = name.partition(".")[0]
        # what the standard library has to offer is worth a look
        packages.setdefault(name if top in sys.stdlib_module_names else top, []).append(name)
    told = [
        printable(own[0]) + (f" and {len(own) - 1} more of {printable(top)}" if len(own) > 1 else "")
        for top, own in packages.items()
    ]
    more = f" and of {len(told) - 5} more packages" if len(told) > 5 else ""
    shown = ", ".join(told[:5])
    return f"the pickle names code outside torch: {shown}{more}; nothing of it was imported or run"


def flat_table(
    file: SourceFile, tensors: list[TensorState], root: str | None = None, notes: Sequence[str] = ()
) -> StateTable:
    """Return the table of a file that holds one flat state, which may be that of several networks.

    Args:
        file: the file.
        tensors: all of them, by the file's own names.
        root: which of the networks to take; all of it if not given.
        notes: what else is to be said.

    Raises:
        SelectionError: there is no such network.
    """
    own = {tensor.name: tensor for tensor in tensors}
    read, path, roots = choose_network({name: tensor.shape for name, tensor in own.items()}, root)
    names, said = model_names(read.values())
    renamed = [replace(own[name], name=new) for name, new in zip(read, names, strict=True)]
    check_amount(renamed, file)
    said = [*others_note(roots, path), *said, *notes]
    return StateTable(renamed, file.source, tuple(said), root=path, roots=roots)
