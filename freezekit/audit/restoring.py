"""Repairs a checkpoint: a copy in which what was frozen has the base's bits again. Never imports torch."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from freezekit.audit import drift
from freezekit.audit import manifest as manifests
from freezekit.audit.aligning import Aligned, align
from freezekit.audit.bits import same_bits
from freezekit.audit.checkpoint import read_checkpoint
from freezekit.audit.checkpoint.container import SourceFile, guarded, printable
from freezekit.audit.checkpoint.patching import Copy, Region, copy_bytes
from freezekit.audit.checkpoint.tensors import ValueReader
from freezekit.audit.files import read_base
from freezekit.audit.findings import DriftReport, Finding
from freezekit.audit.frozen_set import check_asked, frozen_names
from freezekit.audit.recasting import FLOATS, fits, recast
from freezekit.audit.state import StateTable, TensorState
from freezekit.errors import CheckpointError, FreezekitError
from freezekit.jsonfile import whole
from freezekit.manifest import Manifest

__all__ = ["RestoreReport", "restore_checkpoint"]

#: model-00002-of-00005.safetensors
_SHARD = re.compile(r"-\d+-of-\d+\.")


@dataclass(frozen=True)
class RestoreReport:
    """What was restored; ``str()`` of it is a table.

    Args:
        out: the repaired copy.
        restored: names of the tensors that were put back.
        before: the audit of the frozen tensors before.
        findings: what an audit of the repaired copy finds still.
        notes: what else a reader should know.
    """

    out: str
    restored: tuple[str, ...]
    before: DriftReport
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        from freezekit.report.restored import render

        return render(self)


def restore_checkpoint(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    frozen: str | Iterable[str] | None = None,
    manifest: Manifest | str | os.PathLike[str] | None = None,
    root: str | None = None,
) -> RestoreReport:
    """Write a copy of a checkpoint in which every frozen tensor has the base's bits, without torch.

    What is frozen is told as for :func:`freezekit.audit_checkpoint`. The values are put where the tensors lie
    in a copy of the file, so that whatever else is in it (optimizer, hyperparameters, code) stays as it is.
    The copy is read again and compared before it gets its name: every frozen tensor with the base, every
    other byte with the file. Where the file has another float dtype than the base, the base's values are
    rounded to it, as casting the frozen model does. Nothing is written unless everything frozen can be put
    back.

    Args:
        path: the checkpoint whose frozen tensors moved: one file, zip or legacy or ``.safetensors``.
        base: the checkpoint that has their values, or published weights (``"torchvision:NAME"``).
        out: the file to write; it must not be there yet.
        frozen: names or globs of the frozen layers and tensors.
        manifest: what was frozen: a :class:`freezekit.Manifest`, its file, or a checkpoint that holds one.
        root: which of the states in the file to restore, where it holds several (``"ema"``); without it, the
            model's own.

    Returns:
        What was restored.

    Raises:
        CheckpointError: a file is missing, damaged, unsupported or hostile.
        SelectionError: a pattern matches nothing.
        FreezekitError: something frozen cannot be put back, or ``out`` is there already or cannot be written.

    >>> import os, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> header = b'{"bn.running_mean":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    >>> for name, values in ("base", bytes(8)), ("drifted", bytes(7) + b"@"):
    ...     with open(os.path.join(folder, name), "wb") as file:
    ...         _ = file.write(len(header).to_bytes(8, "little") + header + values)
    >>> paths = [os.path.join(folder, name) for name in ("drifted", "base", "restored")]
    >>> restore_checkpoint(*paths, frozen="bn").restored
    ('bn.running_mean',)
    """
    source, target = os.fsdecode(path), os.fsdecode(out)
    if os.path.isdir(source):
        raise CheckpointError(
            "a folder: one file at a time can be restored",
            where=printable(source, 1000),
            remedy="give the shard that holds the layers; a torch.distributed.checkpoint folder is made one "
            "file by torch.distributed.checkpoint.format_utils.dcp_to_torch_save(FOLDER, FILE)",
        )
    _check_target(target, source, os.fsdecode(base))
    with guarded(printable(source, 1000)):
        file = SourceFile.at(source)  # from here on it must not change
    given = read_base(base, root)
    aligned = align(read_checkpoint(source, root), given)
    names, scope, notes = _frozen(aligned, frozen, manifest)
    if not names:
        what = "nothing counts as frozen, so there is nothing to put back"
        raise FreezekitError(what, where=file.shown, got=scope, remedy="say what was frozen with --frozen")
    table, origin = aligned.table, aligned.base
    plan = _Plan(table, origin, names, file)
    plan.look_beside(source, given)
    layers, findings, changed = drift.compare(plan.due, table, plan.names)
    before = DriftReport(
        table.source, origin.source, scope, len(plan.names),
        tuple(changed), tuple(layers), tuple(findings), notes,
    )  # fmt: skip
    with whole(target, "restored checkpoint") as partial:
        _write(plan, file, partial)
        fresh = align(read_checkpoint(partial, root), given).table
        plan.verify(fresh)
        left = drift.compare(origin, fresh, plan.names)[1]
        _check_target(target, source, os.fsdecode(base))  # it took a while
    _sync_folder(target)
    return RestoreReport(target, tuple(plan.moved), before, tuple(left), (*notes, *plan.notes))


class _Plan:
    """What to put back where.

    Args:
        table: the file's tensors.
        origin: the base's, under the same names.
        frozen: names of those that are frozen.
        file: the file.

    Raises:
        FreezekitError: some of them cannot be put back.
    """

    def __init__(self, table: StateTable, origin: StateTable, frozen: set[str], file: SourceFile) -> None:
        self.table = table
        self.names = [name for name in dict.fromkeys([*origin, *table]) if name in frozen]
        self.moved: list[str] = []
        self._others: list[tuple[str, TensorState]] = []
        self.notes: list[str] = []
        due = dict(origin)
        if _SHARD.search(os.path.basename(file.path)):
            here = [name for name in self.names if name in table]
            if len(here) < len(self.names):
                left = _count(len(self.names) - len(here), "frozen tensor")
                self.notes.append(f"not in this shard, so not put back: {left}")
            self.names = here
        problems: dict[str, str] = {}
        rounded: Counter[str] = Counter()
        for name in self.names:
            why = _obstacle(origin.get(name), table.get(name))
            if why is None:
                due[name] = recast(origin[name], table[name].dtype)
                if due[name].read() != table[name].read():
                    self.moved.append(name)
                    why = _unwritable(table[name], file)
                    rounded[table[name].dtype] += origin[name].dtype != table[name].dtype in FLOATS
            if why is not None:
                problems[name] = why
        if problems:
            listed = "; ".join(f"{printable(name)}: {why}" for name, why in list(problems.items())[:3])
            raise FreezekitError(
                f"{_count(len(problems), 'frozen tensor')} cannot be put back, so nothing was written",
                where=file.shown,
                got=listed + (f"; and {len(problems) - 3} more" if len(problems) > 3 else ""),
                remedy="name with --frozen only what can be",
            )
        self.due = origin.with_tensors(list(due.values()))
        for dtype in filter(rounded.get, rounded):
            self.notes.append(
                f"the file has {dtype}: {_count(rounded[dtype], 'tensor')} of the base were cast to it"
            )

    def look_beside(self, source: str, base: StateTable) -> None:
        """Look at the other states in the file: their tensors must stay, and what drifted there is noted."""
        places = {_place(_reader(self.table[name])) for name in self.moved}
        for root in self.table.roots:
            if root.path == self.table.root:
                continue
            other = read_checkpoint(source, root.path)
            inside = [t for t in other.values() if isinstance(t.read, ValueReader)]
            apart = [t for t in inside if _place(_reader(t)) not in places]
            self._others += [(f"{root.path}: {t.name}", t) for t in apart]
            with contextlib.suppress(FreezekitError):  # another kind of model has no name in common
                other = align(other.with_tensors(apart), base).table
                here = [n for n in self.moved if n in other and other[n].unsupported is None]
                left = [n for n in here if not same_bits(self.due[n], other[n])]
                if left:
                    self.notes.append(
                        f"'{printable(root.path)}' in the file has {_count(len(left), 'tensor')} of the same "
                        "names that differ from the base, and stays as it is; --root restores it"
                    )

    def regions(self) -> Iterator[Region]:
        """Yield the parts of the file that change, one at a time, since they may be big.

        Raises:
            FreezekitError: a tensor that must stay as it is shares its memory with one that must not.
        """
        moved: dict[tuple[int, int], list[str]] = {}
        for name in self.moved:
            moved.setdefault(_storage(_reader(self.table[name])), []).append(name)
        beside: dict[tuple[int, int], list[tuple[str, TensorState]]] = {storage: [] for storage in moved}
        for name, tensor in [*self.table.items(), *self._others]:
            if isinstance(tensor.read, ValueReader) and (storage := _storage(tensor.read)) in moved:
                beside[storage].append((name, tensor))
        for storage, names in moved.items():
            region = Region([_reader(self.table[name]) for name in names])
            for name in names:
                region.put(_reader(self.table[name]), self.due[name].read())
            for name, tensor in beside[storage]:
                reader, value = _reader(tensor), (self.due[name] if name in names else tensor).read
                if region.meets(reader) and region.values(reader) != value():
                    raise self._conflict(name, reader, names)
            yield region

    def verify(self, fresh: StateTable) -> None:
        """Compare what was frozen with the copy as it was read again.

        Raises:
            CheckpointError: a tensor of it is not as it should be.
        """
        wrong = [name for name in self.names if fresh[name].read() != self.due[name].read()]
        if wrong:
            raise CheckpointError(
                "the copy was read again, and has not what was written to it",
                where=self.table.source,
                got=printable(wrong[0]),
                remedy="check the disk; the copy was removed",
            )

    def _conflict(self, name: str, reader: ValueReader, moved: list[str]) -> FreezekitError:
        """Say which tensors cannot both have the values that they should."""
        others = (other for other in moved if other != name and _overlap(_reader(self.table[other]), reader))
        pair = (
            f"{printable(other)} and {printable(name)}" if (other := next(others, None)) else printable(name)
        )
        what = "a frozen tensor shares its memory with one that is not frozen, and would change it"
        if name in self.names:
            what = "frozen tensors share memory in the file, but have different values in the base"
        return FreezekitError(
            f"{what}; nothing was written",
            where=self.table.source,
            got=pair,
            remedy="save the file again with a clone of each tensor, or leave these out of --frozen",
        )


def _write(plan: _Plan, file: SourceFile, partial: str) -> None:
    """Write the copy, with all its bytes and the file's permissions."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(partial, flags, 0o600), "r+b") as out:
        with file.open() as stream:
            copy_bytes(stream, out, file.size)
            mode = os.fstat(stream.fileno()).st_mode & 0o777
        copy = Copy(file, out)
        for region in plan.regions():
            copy.write(region)
        copy.mend()
        copy.check()
        os.fsync(out.fileno())
    os.chmod(partial, mode)


def _obstacle(before: TensorState | None, after: TensorState | None) -> str | None:
    """Say why a tensor of the file cannot get the base's values, or ``None``."""
    if after is None:
        return "the file does not have it"
    if before is None:
        return "the base does not have it"
    if before.shape != after.shape:
        return f"its shape is {list(before.shape)} in the base and {list(after.shape)} in the file"
    unreadable = before.unsupported or after.unsupported
    if unreadable is not None:
        return f"unsupported {unreadable}"
    if not fits(before, after.dtype):
        return f"it is {before.dtype} in the base and {after.dtype} in the file, which cannot hold its values"
    return None


def _unwritable(tensor: TensorState, file: SourceFile) -> str | None:
    """Say why a tensor's values cannot be written where they are, or ``None``."""
    if not isinstance(tensor.read, ValueReader):
        return "its values are not in a storage of the file"
    other = tensor.read.stored.file
    return None if other.path == file.path else f"it is in another file: restore {other.shown}"


def _frozen(
    aligned: Aligned,
    frozen: str | Iterable[str] | None,
    manifest: Manifest | str | os.PathLike[str] | None,
) -> tuple[set[str], str, tuple[str, ...]]:
    """Tell what is frozen, how that was told, and notes.

    Raises:
        FreezekitError: the base does not have the values that a manifest says were frozen.
    """
    table, base = aligned.table, aligned.base
    check_asked(frozen, manifest)
    if manifest is not None and not isinstance(manifest, Manifest):
        manifest = manifests.load_manifest(manifest)
    names, scope, said = frozen_names(
        table, base, frozen, manifest, given=aligned.given, outside=aligned.outside
    )
    own = manifest or (manifests.manifest_of(table) if frozen is None else None)
    if own is not None and own.tensors:
        known, _ = manifests.known_in(own, scope, table)
        # where there is no digest, or no such tensor, that is for the plan to say
        wrong = [n for n in base if n in names and known[n].sha256 and not same_bits(known[n], base[n])]
        if wrong:
            raise FreezekitError(
                "the base is not what was frozen, by the manifest",
                where=base.source,
                got=f"{_count(len(wrong), 'tensor')} with other values, {printable(wrong[0])} first",
                remedy="give the checkpoint that the model was frozen with",
            )
    # files from before torch 0.4.1 have no counters, which moves nothing
    absent = {
        name
        for name in names
        if (name in table) != (name in base) and (table.get(name) or base[name]).role == "num_batches_tracked"
    }
    if absent:
        said += (f"{len(absent)} num_batches_tracked are in one of the files only, and stay as they are",)
    return names - absent, scope, (*aligned.notes, *said)


def _check_target(target: str, source: str, base: str) -> None:
    """Refuse to write over anything, before anything is read."""
    if not os.path.lexists(target):
        return
    for path, what in ((source, "the checkpoint itself"), (base, "the base")):
        if os.path.exists(path) and os.path.exists(target) and os.path.samefile(path, target):
            raise FreezekitError(
                f"would write over {what}",
                where=printable(target, 1000),
                remedy="give the repaired copy a name of its own",
            )
    raise FreezekitError(
        "is there already, and nothing is written over",
        where=printable(target, 1000),
        remedy="give another name, or move it away",
    )


def _sync_folder(path: str) -> None:
    """Have the new name written to the disk, where the system can do that for a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reader(tensor: TensorState) -> ValueReader:
    assert isinstance(tensor.read, ValueReader)
    return tensor.read


def _storage(reader: ValueReader) -> tuple[int, int]:
    return reader.stored.offset, reader.stored.nbytes


def _place(reader: ValueReader) -> tuple[object, ...]:
    return reader.stored.offset, reader.start, reader.shape, reader.stride, reader.dtype


def _overlap(one: ValueReader, other: ValueReader) -> bool:
    return one.start < other.start + other.length and other.start < one.start + one.length


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
