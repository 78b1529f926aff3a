"""Finds the checkpoints in a folder: the one that it is, or those that a training run left in it, in order.

Only names are looked at, and of the copies that runs keep beside (``last``, ``best``) the checksums. Nothing
that is no regular file is opened, no linked folder is entered.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from freezekit.audit.checkpoint.archive import Archive
from freezekit.audit.checkpoint.container import SourceFile, guarded, printable, refused
from freezekit.audit.checkpoint.other_formats import other_folder
from freezekit.errors import CheckpointError

__all__ = ["Found", "Run", "RunCheckpoint", "checkpoints_in", "find_run", "found_in", "natural", "place_of"]

#: names in a folder and those below it; a run of years has some thousand
MAX_ENTRIES = 20_000
#: ``project/lightning_logs/version_0/checkpoints/last.ckpt/checkpoint`` is the deepest of the known layouts
_MAX_DEPTH = 5
#: bytes that are compared to tell a copy, where no checksums tell
_MAX_COMPARED = 256 * 2**20

#: the names that transformers, diffusers and peft give to a model's file or to the index of its shards
_MODEL = re.compile(
    r"(?P<stem>model|pytorch_model|diffusion_pytorch_model|adapter_model)"
    r"(?:(?P<variant>\.\w+)?\.(?:safetensors|bin)|\.(?:safetensors|bin)\.index(?P<variant2>\.\w+)?\.json)"
)
_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "adapter_model")
_SHARD = re.compile(r"-\d+-of-\d+(?:\.\w+)?\.(?:safetensors|bin)$")
_DEEPSPEED = re.compile(r"\w+(?:-model|_model)_states\.pt")
_LOOSE = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pth.tar", ".pt.tar", ".ckpt.tar")
#: what lies beside a model and has the same endings
_BESIDE = re.compile(
    r"(optimizer|optim|scheduler|lr_scheduler|rng_states?|random_states|scaler|training_args|sampler|dataloader"
    r"|dl_state|custom_checkpoint)([._-].*)?|.*_optim_states\.pt"
)

_STEP = re.compile(
    r"(?<![a-z])(?:global[_-]?step|steps?|iter(?:ation)?s?|itr)[=_-]?(\d{1,15})(?!\d)", re.IGNORECASE
)
_EPOCH = re.compile(r"(?<![a-z])(?:epochs?|ep)[=_-]?(\d{1,15})(?!\d)", re.I)
#: as transformers' Trainer calls its folders
_STEP_FOLDER = re.compile(r"checkpoint-(\d{1,15})")
_BEST = re.compile(r"(?<![a-z])best(?![a-z])", re.I)
_LAST = re.compile(r"(?<![a-z])(last|latest|final)(?![a-z])", re.I)


@dataclass(frozen=True, slots=True)
class RunCheckpoint:
    """One checkpoint of a run.

    Args:
        path: the file, or the folder of one that is several files.
        step: the optimizer step that its name tells, or ``None``.
        epoch: the epoch that its name tells, or ``None``.
    """

    path: str
    step: int | None = None
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """The checkpoints of a folder.

    Args:
        checkpoints: in the order of training.
        notes: what was left out, one line each.
    """

    checkpoints: tuple[RunCheckpoint, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoint that a folder is.

    Args:
        kind: how it is written: one file or an index, ``torch.distributed.checkpoint``, DeepSpeed.
        names: the file and those that would do too; the ``.metadata`` files; the files with model states.
    """

    kind: Literal["file", "distributed", "deepspeed"]
    names: tuple[str, ...]


def checkpoints_in(path: str | os.PathLike[str]) -> list[str]:
    """Return a run folder's checkpoints in the order of training; of a checkpoint itself, that one.

    Args:
        path: a folder or a file.

    Raises:
        CheckpointError: there is none, or it holds more than a run's folder can.

    >>> import os, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> for name in ("epoch_10.pth", "epoch_9.pth", "log.txt"):
    ...     open(os.path.join(folder, name), "w").close()
    >>> [os.path.basename(path) for path in checkpoints_in(folder)]
    ['epoch_9.pth', 'epoch_10.pth']
    """
    return [checkpoint.path for checkpoint in find_run(path).checkpoints]


def find_run(path: str | os.PathLike[str]) -> Run:
    """Find what :func:`checkpoints_in` returns, with the steps that the names tell, and notes."""
    source = os.fsdecode(path)
    with guarded(printable(source, 1000)):
        if not os.path.isdir(source):
            return Run((RunCheckpoint(source, *place_of(source)),))
        names, _ = _listing(source, _Budget())
        own = _found(names)
        if own is not None and own.kind != "file":
            return Run((RunCheckpoint(source, *place_of(source)),))
        if "model_index.json" in names:
            raise CheckpointError(
                "a diffusers pipeline: several models, not one",
                remedy="give the folder of one of them inside it, such as unet",
            )
        items = list(_walk(source))
        if not items:
            raise _nothing(names)
        if own is not None and len(items) == 1:
            return Run((RunCheckpoint(source, *place_of(source)),))
        return _without_copies(sorted(items, key=_Order(items)))


def found_in(path: str) -> Found | None:
    """Return the checkpoint that a folder is, or ``None``.

    Args:
        path: the folder.

    Raises:
        CheckpointError: there are too many files in it.
    """
    return _found(_listing(path, _Budget())[0])


def _found(names: set[str]) -> Found | None:
    """As :func:`found_in`, by the names of the files in it."""
    ranks = [name for name in names if re.fullmatch(r"__\d{1,9}\.metadata", name)]
    if ".metadata" in names or ranks or any(name.endswith(".distcp") for name in names):
        return Found(
            "distributed", (".metadata",) if ".metadata" in names else tuple(sorted(ranks, key=natural))
        )
    models = [(match, name) for name in names if (match := _MODEL.fullmatch(name)) is not None]
    if models:
        return Found("file", tuple(name for _, name in sorted(models, key=lambda item: _preference(*item))))
    states = sorted(name for name in names if _DEEPSPEED.fullmatch(name))
    return Found("deepspeed", tuple(states)) if states else None


def place_of(path: str) -> tuple[int | None, int | None]:
    """Return the step and the epoch that the name of a checkpoint tells.

    >>> place_of("run/epoch=3-step=1200-v1.ckpt"), place_of("out/checkpoint-500"), place_of("best.pt")
    ((1200, 3), (500, None), (None, None))
    """
    name = os.path.basename(os.path.normpath(path))
    step, epoch = _STEP.search(name) or _STEP_FOLDER.fullmatch(name), _EPOCH.search(name)
    return int(step[1]) if step else None, int(epoch[1]) if epoch else None


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts names with the numbers in them by their size.

    >>> sorted(["m10", "m9", "m"], key=natural)
    ['m', 'm9', 'm10']
    """
    parts = re.split(r"(\d{1,15})", name)
    return [(0, int(part), "") if index % 2 else (1, 0, part) for index, part in enumerate(parts) if part]


@dataclass(slots=True)
class _Budget:
    """How many names may still be looked at."""

    left: int = field(default_factory=lambda: MAX_ENTRIES)

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise CheckpointError(
                "holds too many files to look through for checkpoints",
                got=f"more than {MAX_ENTRIES}",
                remedy="give the checkpoint itself, or the folder that holds only checkpoints",
            )


@dataclass(frozen=True, slots=True)
class _Item:
    """Something found in a run: its path, the run's folder, its place, and the file that can be compared."""

    path: str
    folder: str
    place: tuple[int | None, int | None]
    file: str | None
    top: bool = False

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def is_copy(self) -> bool:
        """Whether its name says that it may be a copy of another."""
        return self.top or bool(_BEST.search(self.name) or _LAST.search(self.name))


def _listing(path: str, budget: _Budget) -> tuple[set[str], list[str]]:
    """Return the names of a folder's files and of the folders in it that are no links."""
    files: set[str] = set()
    folders: list[str] = []
    # asked for by itself, since a checkpoint may have a file for each tensor
    if os.path.lexists(os.path.join(path, ".metadata")):
        return {".metadata"}, folders
    with os.scandir(path) as entries:
        for entry in entries:
            budget.spend()
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith(".") and entry.name != "__pycache__":
                    folders.append(entry.name)
            elif _is_file(entry):
                files.add(entry.name)
    return files, sorted(folders, key=natural)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()  # a link to a file is followed: caches keep their files so
    except OSError:  # a link to itself
        return False


def _walk(top: str) -> Iterator[_Item]:
    budget = _Budget()
    waiting = [(top, 0)]
    while waiting:
        folder, depth = waiting.pop()
        names, inside = _listing(folder, budget)
        own = _found(names)
        if own is not None:
            file = os.path.join(folder, own.names[0]) if own.kind == "file" else None
            if depth:
                yield _Item(folder, *_run_below(top, folder), file)
                continue
            yield _Item(file or folder, folder, (None, None), file, top=True)
        else:
            for name in names:
                if name.endswith(".bin") and f"{name[:-4]}.xml" in names:
                    continue  # an OpenVINO model
                if name.endswith(_LOOSE) and not _BESIDE.fullmatch(name) and not _SHARD.search(name):
                    path = os.path.join(folder, name)
                    yield _Item(path, *_run_below(top, path), path)
        if depth < _MAX_DEPTH:
            waiting += [
                (os.path.join(folder, name), depth + 1) for name in inside if not _BESIDE.fullmatch(name)
            ]


def _run_below(top: str, path: str) -> tuple[str, tuple[int | None, int | None]]:
    """Return the folder of the run that a checkpoint belongs to, and its place there.

    The place is told by its own name or by that of a folder around it.
    """
    told = path
    while place_of(told) == (None, None):
        told = os.path.dirname(told)
        if len(told) <= len(top):
            return os.path.dirname(path), (None, None)
    return os.path.dirname(told), place_of(told)


def _preference(match: re.Match[str], name: str) -> tuple[int, bool, bool, bool, str]:
    """Return what sorts first the file that transformers would load."""
    variant = bool(match["variant"] or match["variant2"])
    family = 0 if match["stem"] == "pytorch_model" else _STEMS.index(match["stem"])
    return family, variant, ".bin" in name, name.endswith(".json"), name


#: of a file its identity, its size, and a digest of its storages' checksums
Sums = tuple[tuple[int, ...], int, bytes | None]


class _Order:
    """The key that sorts a run's checkpoints: by step, by epoch, or by the numbers in their names."""

    def __init__(self, items: list[_Item]) -> None:
        named = [item.place for item in items if not item.is_copy]
        self._by_step = bool(named) and all(step is not None for step, _ in named)
        self._by_epoch = bool(named) and all(epoch is not None for _, epoch in named)

    def __call__(self, item: _Item) -> tuple[object, ...]:
        step, epoch = item.place
        known = step if self._by_step else epoch if self._by_epoch else None
        when = (-1 if known is None else known, *(-1 if n is None else n for n in (epoch, step)))
        late = 0 if known is not None or not item.is_copy else 1 if _BEST.search(item.name) else 2
        where = [natural(part) for part in item.folder.split(os.sep)]
        if not (self._by_step or self._by_epoch):
            when = (0, 0, 0)
        return item.top, where, late, when, item.is_copy, natural(item.name.rpartition(".")[0] or item.name)


def _without_copies(items: list[_Item]) -> Run:
    """Leave out each ``last`` and ``best`` that is the same as another."""
    kept: list[RunCheckpoint] = []
    notes: list[str] = []
    others = [item for item in items if not item.is_copy]
    room = _MAX_COMPARED
    sums: dict[str, Sums] = {}
    for item in items:
        twin = None
        for other in reversed(others) if item.is_copy else ():
            if item.file is None or other.file is None or not (item.top or item.folder == other.folder):
                continue
            same, read = _same(item.file, other.file, room, sums)
            room -= read
            if same:
                twin = other
                break
        if twin is None:
            kept.append(RunCheckpoint(item.path, *item.place))
            others += [item] * item.is_copy
        else:
            notes.append(f"left out {printable(item.name, 200)}: the same as {printable(twin.name, 200)}")
    return Run(tuple(kept), tuple(notes))


def _same(path: str, other: str, room: int, sums: dict[str, Sums]) -> tuple[bool, int]:
    """Tell whether two files hold the same checkpoint, and how many bytes had to be read for it."""
    try:
        for each in (path, other):
            if each not in sums:
                file = SourceFile.at(each)
                sums[each] = file.identity[:2], file.size, _checksums(file)
        if sums[path][0] == sums[other][0]:
            return True, 0
        if sums[path][2] is not None:
            return sums[path][2] == sums[other][2], 0
        if sums[path][1] != sums[other][1] or sums[path][1] > room:
            return False, 0
        one, two = SourceFile.at(path), SourceFile.at(other)
        with one.open() as first, two.open() as second:
            while chunk := first.read(2**20):
                if chunk != second.read(2**20):
                    return False, first.tell()
        return True, one.size
    except (CheckpointError, OSError):  # whoever reads it will be told why
        return False, 0


def _checksums(file: SourceFile) -> bytes | None:
    """Return a digest of the checksums of a torch zip's storages, or ``None`` where it is none or has none.

    Neither the file's own name nor a path that its pickle keeps tells two checkpoints apart.
    """
    with file.open() as stream:
        if stream.read(4) != b"PK\x03\x04":
            return None
        members = Archive(file, stream).members
    stored = {name.partition("/data/")[2]: member for name, member in members.items() if "/data/" in name}
    if not stored or any(member.size and not member.crc for member in stored.values()):
        return None
    told = sorted((name, member.size, member.crc) for name, member in stored.items())
    return hashlib.sha256(repr(told).encode()).digest()


def _nothing(names: set[str]) -> CheckpointError:
    if (other := other_folder(names)) is not None:
        return refused(other)
    if shards := sorted(name for name in names if _SHARD.search(name)):
        return CheckpointError(
            "shards of a model without their index, so a part of it may be missing",
            got=printable(shards[0]),
            remedy="download or copy the file that ends in .index.json as well",
        )
    return CheckpointError(
        "a folder in which no checkpoint was found",
        remedy="give the checkpoint itself, or a folder with .pt, .pth, .ckpt or .safetensors files",
    )
