"""Makes the StateTable from what the pickle describes and where the container keeps the storages."""

from __future__ import annotations

from collections.abc import Callable

from freezekit.audit.checkpoint.container import SourceFile, printable
from freezekit.audit.checkpoint.inert import StorageRef
from freezekit.audit.checkpoint.pickle_machine import Unpickled
from freezekit.audit.checkpoint.roots import find_state, find_texts, model_names
from freezekit.audit.checkpoint.tensors import StoredBytes, check_amount, make_tensor
from freezekit.audit.state import StateTable

__all__ = ["make_table"]


def make_table(
    file: SourceFile,
    pickled: Unpickled,
    find: Callable[[StorageRef], StoredBytes],
    late_notes: Callable[[], list[str]] = list,
) -> StateTable:
    """Find the state dict, check each of its tensors, and make them readable.

    Args:
        file: the file.
        pickled: its inert object.
        find: finds a storage's bytes.
        late_notes: what the container has to say once all storages were found.

    Raises:
        CheckpointError: there is no state dict, or a tensor in it is impossible.
    """
    state = find_state(pickled.root)
    names, notes = model_names(state.tensors)
    tensors = [
        make_tensor(name, ref, find, file, state.roles.get(original))
        for name, (original, ref) in zip(names, state.tensors.items(), strict=True)
    ]
    check_amount(tensors, file)
    if pickled.foreign:
        shown = ", ".join(printable(name) for name in pickled.foreign[:5])
        more = f" and {len(pickled.foreign) - 5} more" if len(pickled.foreign) > 5 else ""
        notes.append(f"the pickle names code outside torch: {shown}{more}; nothing of it was imported or run")
    manifest, report, said = find_texts(pickled.root)
    return StateTable(tensors, file.source, (*state.notes(), *notes, *said, *late_notes()), manifest, report)
