# ruff: noqa: E501  # tables and messages
"""Fuzzes the readers: mutated files are refused in one line, or read as torch and safetensors read them.

    python tests/hostile/fuzz.py --format zip --count 200000 --seed 0 --jobs 2

Each mutation has a number and depends on nothing but that and the seed: ``--only 1234 --keep DIR`` makes one
again and keeps its file. A format is one entry of ``FORMATS``. torch and safetensors run in processes of their
own, since a mutated file may crash them: that is not our failure.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import pickletools
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import build_hostile as build

warnings.filterwarnings("ignore", "Duplicate name")  # made on purpose

LIMIT_SECONDS = 2
LIMIT_BYTES = 200 * 2**20

Sample = dict[str, bytes]
"""A checkpoint's files by their place in its folder."""
Mutator = Callable[[Random, bytes, list[bytes]], bytes]
"""Makes a changed file of a file, beside all seeds of the format."""


@dataclass(frozen=True)
class Format:
    """What is fuzzed.

    Args:
        seeds: writes small good checkpoints into a folder, each in a folder of its own; may use torch.
        oracle: loads a checkpoint in another way; returns the object.
        mutators: those of the format, tried more often than the plain ones on bytes; for each of the files by
            the ending of its name, where the files of a checkpoint differ.
        entry: which of the files is opened; ``"."`` for the folder itself.
        every: of how many that are read one is compared, where the oracle is slow.
    """

    seeds: Callable[[Path], None]
    oracle: Callable[[str], Any]
    mutators: dict[str, tuple[Mutator, ...]]
    entry: str = "file"
    every: int = 1


# mutations of bytes

_NUMBERS = [
    0, 1, 2, 3, 4, 7, 8, 12, 15, 16, 63, 64, 65, 127, 128, 255, 256, 1000, 4095, 4096, 2**15, 2**16 - 1, 2**16,
    2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
]  # fmt: skip
INTERESTING = [*_NUMBERS, *(-number for number in _NUMBERS)]


def flip_bits(random: Random, data: bytes, _: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def set_bytes(random: Random, data: bytes, _: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        changed[random.randrange(len(changed))] = random.choice(
            (0, 1, 0x7F, 0x80, 0xFF, random.randrange(256))
        )
    return bytes(changed)


def set_number(random: Random, data: bytes, _: list[bytes]) -> bytes:
    size = random.choice((1, 2, 4, 8))
    value = (random.choice(INTERESTING) % 2 ** (8 * size)).to_bytes(size, random.choice(("little", "big")))
    at = random.randrange(max(1, len(data) - size))
    return data[:at] + value + data[at + size :]


def _block(random: Random, data: bytes) -> tuple[int, int]:
    start = random.randrange(len(data))
    return start, min(len(data), start + random.choice((1, 2, 4, 8, 30, 100, 1000)))


def delete_block(random: Random, data: bytes, _: list[bytes]) -> bytes:
    start, end = _block(random, data)
    return data[:start] + data[end:]


def repeat_block(random: Random, data: bytes, _: list[bytes]) -> bytes:
    start, end = _block(random, data)
    return data[:end] + data[start:end] * random.choice((1, 1, 2, 50)) + data[end:]


def insert_block(random: Random, data: bytes, seeds: list[bytes]) -> bytes:
    at = random.randrange(len(data))
    start, end = _block(random, other := random.choice(seeds))
    new = random.choice((other[start:end], random.randbytes(end - start), bytes(end - start)))
    return data[:at] + new + data[at:]


def swap_blocks(random: Random, data: bytes, _: list[bytes]) -> bytes:
    (a, b), (c, d) = sorted((_block(random, data), _block(random, data)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def splice(random: Random, data: bytes, seeds: list[bytes]) -> bytes:
    other = random.choice(seeds)
    return data[: random.randrange(len(data))] + other[random.randrange(len(other)) :]


def truncate(random: Random, data: bytes, _: list[bytes]) -> bytes:
    return data[: random.randrange(len(data))]


def same_length(random: Random, data: bytes, seeds: list[bytes]) -> bytes:
    return random.choice((flip_bits, set_bytes))(random, data, seeds)


PLAIN: tuple[Mutator, ...] = (
    flip_bits, set_bytes, set_number, delete_block, repeat_block, insert_block, swap_blocks, splice, truncate,
)  # fmt: skip


# mutations of pickles, opcode by opcode

_OPERANDS: dict[str, Callable[[Random], bytes]] = {
    "BININT": lambda random: b"J" + struct.pack("<I", random.choice(INTERESTING) % 2**32),
    "BININT1": lambda random: b"K" + bytes([random.choice(INTERESTING) % 256]),
    "BININT2": lambda random: b"M" + struct.pack("<H", random.choice(INTERESTING) % 2**16),
    "LONG1": lambda random: build.number(random.choice(INTERESTING)),
}
_INSERTED = (
    b"N", b"\x88", b"\x89", b")", b"]", b"}", b"(", b"0", b"1", b"2", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b",
    b"\x81", b"\x92", b"Q", b"s", b"u", b"a", b"e", b".", b"h\x00", b"h\x01", b"h\x05", b"q\x00", b"\x94", b"\x90",
    b"\x93", b"X\x01\x00\x00\x000", b"X\x03\x00\x00\x00cpu", b"K\x00", b"K\x03", b"J\xff\xff\xff\xff", b"G" + bytes(8),
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n",
    b"ctorch\nSize\n", b"ctorch\nLongStorage\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nfloat16\n",
    b"ctorch._utils\n_rebuild_tensor_v3\n",
)  # fmt: skip


def opcodes(data: bytes) -> list[bytes]:
    """Return a list of its own of what was split before, most often: the seeds."""
    return list(_opcodes(data))


@lru_cache(32)
def _opcodes(data: bytes) -> list[bytes]:
    """Split pickles that follow each other into their opcodes; what comes after them is the last item."""
    stream, found = BytesIO(data), []
    while True:
        base = stream.tell()
        try:
            places = [place or 0 for _, _, place in pickletools.genops(stream)]
        except ValueError:
            return [*found, data[base:]]
        ends = [*places[1:], stream.tell()]
        found += [data[start:end] for start, end in zip(places, ends, strict=True)]


def change_opcodes(random: Random, data: bytes, _: list[bytes]) -> bytes:
    codes = opcodes(data)
    for _ in range(random.choice((1, 1, 1, 1, 2))):
        at, other = random.randrange(len(codes)), random.randrange(len(codes))
        what = random.randrange(14)
        if what == 0:
            codes[at] = b""
        elif what == 1:
            codes.insert(at, random.choice(_INSERTED))
        elif what == 2:
            codes[at], codes[other] = codes[other], codes[at]
        elif what == 3:
            codes.insert(at, codes[other])
        elif what == 4:
            codes[at] = random.choice(_INSERTED)
        else:  # an operand in the place of one of its kind, which most often still makes a tensor
            alike = [i for i, code in enumerate(codes) if code[:1] in b"JKM\x8aXcBU\x8chjGN\x88\x89"]
            if not alike:
                continue
            at = random.choice(alike)
            if codes[at][:1] in b"JKM\x8a" and what < 10:
                codes[at] = random.choice(list(_OPERANDS.values()))(random)
            else:
                codes[at] = codes[random.choice([i for i in alike if codes[i][:1] == codes[at][:1]])]
    return b"".join(codes)


# mutations of zip files


def _members(data: bytes) -> list[tuple[str, bytes]]:
    return list(_read_members(data))


@lru_cache(32)
def _read_members(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def _zipped(members: list[tuple[str, bytes]]) -> bytes:
    """Return an archive, as ``build.zip_bytes`` makes it, in a tenth of the time."""
    pieces, directory, place = [], [], 0
    for name, content in members:
        raw = name.encode("utf-8", "surrogateescape")
        fields = (zlib.crc32(content), len(content), len(content), len(raw))
        header = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0x800, 0, 0, 33, *fields, 0)
        entry = (b"PK\x01\x02", 20, 20, 0x800, 0, 0, 33, *fields, 0, 0, 0, 0, 0, place)
        directory.append(struct.pack("<4s6H3I5H2I", *entry) + raw)
        pieces += [header, raw, content]
        place += len(header) + len(raw) + len(content)
    tail = b"".join(directory)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, len(members), len(members), len(tail), place, 0)
    return b"".join((*pieces, tail, end))


def change_member(random: Random, data: bytes, seeds: list[bytes]) -> bytes:
    """Change what is in a member, with its sizes and checksum made right again."""
    members = _members(data)
    told = (".pkl", "weights_config.json")
    at = next((i for i, (name, _) in enumerate(members) if name.endswith(told)), 0)
    if random.random() < 0.2:
        at = random.randrange(len(members))
    name, content = members[at]
    change: Mutator = random.choice(PLAIN)
    if random.random() < 0.8:
        change = (
            change_opcodes
            if name.endswith(".pkl")
            else change_json
            if name.endswith(".json")
            else same_length
        )
    members[at] = name, change(random, content, seeds) if content else b"x"
    return _zipped(members)


def change_members(random: Random, data: bytes, seeds: list[bytes]) -> bytes:
    """Drop, double, rename, reorder members, or take one of another file."""
    members = _members(data)
    at, other = random.randrange(len(members)), random.randrange(len(members))
    what = random.randrange(6)
    if what == 0:
        del members[at]
    elif what == 1:
        members[at], members[other] = members[other], members[at]
    elif what == 2:
        members[at] = members[at][0], members[other][1]
    elif what == 3:
        name = members[at][0]
        name = random.choice(
            (name.upper(), f"{name}/", name.replace("archive", "x"), members[other][0], f"x/{name}")
        )
        members[at] = name, members[at][1]
    elif what == 4:
        members.insert(other, random.choice(_members(random.choice(seeds))))
    else:
        members.insert(other, (members[at][0].swapcase(), members[other][1]))
    return _zipped(members)


_RECORDS = re.compile(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07|\x07\x08)")


def change_record(random: Random, data: bytes, _: list[bytes]) -> bytes:
    """Change a field in one of the zip archive's own records."""
    start = random.choice([match.start() for match in _RECORDS.finditer(data)])
    size = random.choice((1, 2, 4, 8))
    at = min(len(data) - size, start + random.randrange(4, 46))
    old = int.from_bytes(data[at : at + size], "little")
    new = random.choice((random.choice(INTERESTING), old + 1, old - 1, old + len(data), 2 * old))
    return data[:at] + (new % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]


# mutations of safetensors files

_JSON_VALUES: list[object] = [
    None, True, False, 0.0, 1.0, -0.0, 1e2, 1e400, float("nan"), "", "F32", "F16", "BF16", "I64", "U8", "BOOL", "C64",
    "F8_E4M3", "F8_E5M2", "F4", "f32", "0", "4", [], {}, [0, 4], [4, 8], [1], [0], [2, 2], [2**32, 2**32], "\ud800",
    "a.b", "\x1b[31m", {"format": "pt"},
]  # fmt: skip


def change_header(random: Random, data: bytes, seeds: list[bytes]) -> bytes:
    """Change the header as JSON or as text, with its length made right again."""
    length = int.from_bytes(data[:8], "little")
    raw, rest = data[8 : 8 + length], data[8 + length :]
    raw = change_json(random, raw, seeds)
    return struct.pack("<Q", len(raw)) + raw + rest


def change_json(random: Random, data: bytes, seeds: list[bytes]) -> bytes:
    """Change JSON as what it means, or else as text."""
    if random.random() < 0.2:
        return random.choice(PLAIN)(random, data, seeds)
    header = json.loads(data)
    places = list(_json_places(header))
    for _ in range(random.choice((1, 1, 2))):
        inside, key = random.choice(places)
        what = random.randrange(5)
        if what == 0 and isinstance(inside, dict):
            inside.pop(key, None)
        elif what == 1 and isinstance(inside, dict):
            inside[str(random.choice(_JSON_VALUES))] = inside.get(key)
        elif what == 2 and isinstance(inside, list):
            inside.insert(0, random.choice(INTERESTING))
        elif what == 3:
            other, other_key = random.choice(places)
            if (value := _at(other, other_key)) is not inside:
                inside[key] = json.loads(json.dumps(value))
        else:
            inside[key] = random.choice((*_JSON_VALUES, *INTERESTING))
    return json.dumps(header).encode()


def rearrange(random: Random, data: bytes, _: list[bytes]) -> bytes:
    """Change what a header says into what it may say as well, and the values: this most often is still read."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    entry = header[name := random.choice(names)]
    what = random.randrange(8)
    if what == 0:
        alike = [d for d, size in _SIZES.items() if size == _SIZES.get(entry["dtype"])]
        entry["dtype"] = random.choice(alike or ["U8"])
    elif what == 1:
        other = random.choice(list(_SIZES))
        numel, odd = divmod(entry["data_offsets"][1] - entry["data_offsets"][0], _SIZES[other])
        if not odd:
            entry |= {"dtype": other, "shape": [numel]}
    elif what == 2:
        entry["shape"] = random.choice((entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 1]))
    elif what == 3:
        order = list(header)
        random.shuffle(order)
        header = {key: header[key] for key in order}
    elif what == 4:
        new = random.choice(
            ("module.w", "running_mean", "\u00e9", "a\nb", "\x1b[31m", "", "a..b", "0", "model.w")
        )
        header = {new if key == name else key: value for key, value in header.items()}
    elif what == 5:
        header["__metadata__"] = {random.choice("abc"): random.choice(("", "pt", "\x1b[31m", "{}"))}
    elif what == 6:
        end = max(header[key]["data_offsets"][1] for key in names)
        header["new"] = {"dtype": "F32", "shape": random.choice(([0], [0, 3])), "data_offsets": [end, end]}
    else:
        rest = same_length(random, rest, [])
    raw = json.dumps(header, ensure_ascii=random.random() < 0.5, indent=random.choice((None, 1))).encode()
    return struct.pack("<Q", len(raw)) + raw + rest


_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


def _json_places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list):
            yield from _json_places(item)


def _at(value: Any, key: Any) -> Any:
    return value[key] if not isinstance(value, list) or key < len(value) else None


# the formats: what they start from, and who reads them otherwise


def _states() -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2), torch.nn.BatchNorm2d(2))
    net(torch.randn(2, 1, 4, 4))
    shared = torch.arange(12.0)
    return {
        "net": net.state_dict(),
        "lightning": {"epoch": 3, "state_dict": net.state_dict(), "hyper_parameters": {"lr": 0.1}},
        "dtypes": {
            name: torch.arange(6).to(getattr(torch, name)).reshape(2, 3)
            for name in ("float64", "float16", "bfloat16", "int64", "int16", "uint8", "bool", "complex64")
        },
        "views": {
            "a": shared[2:5],
            "b": shared.view(3, 4).t(),
            "c": shared[0],
            "d": shared[:1].expand(3, 2),
            "e": torch.empty(0, 3),
            "f": torch.nn.Parameter(shared[::5]),
        },
    }


def _zip_seeds(folder: Path) -> None:
    import torch

    for name, state in _states().items():
        (folder / name).mkdir()
        buffer = BytesIO()
        torch.save(state, buffer)
        (folder / name / "file").write_bytes(
            build.zip_bytes(_members(buffer.getvalue()))
        )  # without the padding
    (folder / "padded").mkdir()
    torch.save(_states()["views"], folder / "padded" / "file")


def _legacy_seeds(folder: Path) -> None:
    import torch

    for protocol, (name, state) in zip((2, 2, 3, 4), _states().items(), strict=True):
        (folder / name).mkdir()
        path = folder / name / "file"
        torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


def _safetensors_seeds(folder: Path) -> None:
    import torch
    from safetensors.torch import save

    states = {**_states(), "metadata": {"w": torch.arange(3.0)}}
    for name in ("net", "dtypes", "metadata"):
        (folder / name).mkdir()
        metadata = {"format": "pt"} if name == "metadata" else None
        (folder / name / "file").write_bytes(save(dict(states[name]), metadata))


def _net() -> Any:
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2), torch.nn.BatchNorm2d(2))
    net(torch.randn(2, 1, 4, 4))
    return net


def _scripted_seeds(folder: Path) -> None:
    import torch

    net = _net()
    half = torch.nn.Sequential(net[1], torch.nn.Linear(2, 1)).half()
    made = {
        "scripted": torch.jit.script(_net()),
        "traced": torch.jit.trace(_net().eval(), torch.randn(2, 1, 4, 4)),
        "half": torch.jit.script(half),
    }
    for name, module in made.items():
        (folder / name).mkdir()
        module.save(str(folder / name / "file"))
        (folder / f"{name}-lean").mkdir()
        members = _members((folder / name / "file").read_bytes())
        lean = [(m, c) for m, c in members if not m.endswith(".debug_pkl")]
        (folder / f"{name}-lean" / "file").write_bytes(_zipped(lean))


def _exported_seeds(folder: Path) -> None:
    import torch

    (folder / "net").mkdir()
    program = torch.export.export(_net().eval(), (torch.randn(2, 1, 4, 4),))
    torch.export.save(program, buffer := BytesIO())
    (folder / "net" / "file").write_bytes(_zipped(_members(buffer.getvalue())))


def _distributed_seeds(folder: Path) -> None:
    import torch
    from torch.distributed import checkpoint

    states = _states()
    training = {"model": states["net"], "step": 3}
    for name, state in {"net": states["net"], "views": states["views"], "training": training}.items():
        own = {key: value.contiguous() if torch.is_tensor(value) else value for key, value in state.items()}
        checkpoint.save(own, checkpoint_id=folder / name, no_dist=True)


def _index_seeds(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    def save_bin(state: Any, path: Path) -> None:
        torch.save(state, path)

    for ending, save in (("safetensors", save_file), ("bin", save_bin)):
        (inside := folder / ending).mkdir()
        state, places = dict(_states()["net"]), {}
        for number, names in enumerate((list(state)[:4], list(state)[4:])):
            save({name: state[name] for name in names}, inside / f"shard{number}.{ending}")
            places |= dict.fromkeys(names, f"shard{number}.{ending}")
        content = {"metadata": {"total_size": 100}, "weight_map": places}
        (inside / "index.json").write_text(json.dumps(content))


def _torch_load(path: str) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _load_file(path: str) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _load_scripted(path: str) -> Any:
    import torch

    return dict(torch.jit.load(path, map_location="cpu").state_dict())


def _load_exported(path: str) -> Any:
    import torch

    return dict(torch.export.load(path).state_dict)


def _load_distributed(path: str) -> Any:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state


def _load_index(path: str) -> Any:
    places = json.loads(Path(path).read_bytes())["weight_map"]
    found: dict[str, Any] = {}
    for shard in dict.fromkeys(places.values()):
        file = str(Path(path).parent / shard)
        state = _load_file(file) if shard.endswith(".safetensors") else _torch_load(file)
        for name in (name for name, place in places.items() if place == shard):
            state[name]
        found |= state
    return found


_ZIP = (change_member, change_member, change_member, change_members, change_record)
_SAFETENSORS = (change_header, rearrange, rearrange, rearrange)
FORMATS: dict[str, Format] = {
    "zip": Format(_zip_seeds, _torch_load, {"": _ZIP}),
    "legacy": Format(_legacy_seeds, _torch_load, {"": (change_opcodes,)}),
    "safetensors": Format(_safetensors_seeds, _load_file, {"": _SAFETENSORS}),
    "torchscript": Format(_scripted_seeds, _load_scripted, {"": _ZIP}),
    "pt2": Format(_exported_seeds, _load_exported, {"": _ZIP}, every=25),
    "dcp": Format(
        _distributed_seeds, _load_distributed, {"metadata": (change_opcodes,), "distcp": (same_length,)}, "."
    ),
    "hf-index": Format(
        _index_seeds,
        _load_index,
        {"json": (change_json,), "safetensors": _SAFETENSORS, "bin": _ZIP},
        "index.json",
    ),
}


def mutated(form: Format, seeds: list[Sample], seed: int, number: int) -> Sample:
    """Make mutation ``number``."""
    random = Random(f"{seed} {number}")
    sample = dict(random.choice(seeds))
    name = random.choice(list(sample))
    alike = [other[name] for other in seeds if other.get(name)]
    data = sample[name]
    own = next(kind for ending, kind in form.mutators.items() if name.endswith(ending))
    for _ in range(random.choice((1, 1, 1, 1, 2, 4))):
        mutators = own if random.random() < 0.7 else PLAIN
        try:
            data = random.choice(mutators)(random, data, alike) or b"\0"
        except Exception:  # what is damaged already cannot be taken apart by its structure
            data = random.choice(PLAIN)(random, data, alike) or b"\0"
    sample[name] = data
    return sample


# the oracle, in a process of its own


def mappings(loaded: Any) -> list[dict[str, list[Any]]]:
    """Return the digests of all tensors that have a name, of each dict in what was loaded."""
    import torch
    from corpus import digest

    found, seen, waiting = [], set(), [loaded]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            own = {
                k: digest(t) for k, t in value.items() if isinstance(k, str) and isinstance(t, torch.Tensor)
            }
            if own:
                found.append(own)
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return found


def serve_oracle(form: Format, folder: str) -> NoReturn:
    """Write the seeds; then answer each path on stdin with a line of JSON. A crash is an answer, too."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    form.seeds(Path(folder))
    os.write(1, b"ready\n")
    while True:  # a child answers until it crashes: starting torch again would take seconds
        child = os.fork()
        if child == 0:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, used + 2**32))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            while line := _line(0):
                signal.alarm(10)
                try:
                    answer = {"mappings": mappings(form.oracle(os.fsdecode(line)))}
                except BaseException as error:
                    lines = str(error).strip().splitlines() or [""]
                    told = lines[-1 if "Traceback" in str(error) else 0]  # one that quotes another's
                    told = re.sub(r"0x\w+|[\d.]+|'[^']*'|\"[^\"]*\"|/\S+", "#", told)
                    answer = {"refused": f"{type(error).__name__}: {ascii(told[:70])[1:-1]}"}
                signal.alarm(0)
                os.write(1, json.dumps(answer).encode() + b"\n")
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            os._exit(0)
        os.write(1, b'{"refused": "crash"}\n')


def _line(descriptor: int) -> bytes:
    return os.read(descriptor, 4096).removesuffix(b"\n")  # they come one at a time


class Oracle:
    """Asks that process."""

    def __init__(self, name: str, folder: Path) -> None:
        command = [sys.executable, __file__, "--format", name, "--oracle", str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        if self._answer(180) != b"ready\n":
            raise RuntimeError("the oracle did not start")

    def _answer(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else b""

    def ask(self, path: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(os.fsencode(path) + b"\n")
        answer: dict[str, Any] = json.loads(self._answer(60))
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


# the reader under test


class HangError(BaseException):
    """Comes out of the reader after a minute; nothing in it catches that."""


def _hang(*_: object) -> NoReturn:
    raise HangError


@dataclass
class Outcome:
    """What came of the mutations."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.counts += other.counts
        self.failures += other.failures

    def __str__(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))


def read_ours(path: str) -> dict[str, list[Any]] | str:
    """Return each tensor's dtype, shape and digest; or a refusal, checked to be as it must.

    Raises:
        AssertionError: the refusal is not one printable line.
    """
    from freezekit.audit.checkpoint import read_checkpoint
    from freezekit.errors import CheckpointError

    try:
        table = read_checkpoint(path)
        return {
            name: [
                t.dtype,
                list(t.shape),
                "unsupported" if t.unsupported else hashlib.sha256(t.read()).hexdigest(),
            ]
            for name, t in table.items()
        }
    except CheckpointError as error:
        message = str(error)
        assert message.isprintable(), f"not one printable line: {message!a}"
        # a shard's fault is told by the shard
        assert message.startswith((path, str(Path(path).parent))), f"it does not say which file: {message}"
        assert len(message) < len(path) + 1000, f"{len(message)} characters of message"
        assert "not enough memory" not in message, message
        return message


def differs(ours: dict[str, list[Any]], theirs: list[dict[str, list[Any]]]) -> str | None:
    """Say how our tensors differ from those of every dict that the oracle found, or ``None``."""
    from freezekit.audit.checkpoint.roots import model_names

    closest = "the oracle has no tensors at all"
    for mapping in theirs:
        names, _ = model_names(mapping)
        known = dict(zip(names, mapping.values(), strict=True))
        if known.keys() != ours.keys():
            closest = f"names: ours {list(ours)[:5]}, the oracle's {list(known)[:5]}"
            continue
        wrong = [
            name
            for name, (dtype, shape, content) in ours.items()
            # what we do not read, and say so, is no difference; what the oracle cannot show is none either
            if "unsupported" not in (content, known[name][2]) and known[name] != [dtype, shape, content]
        ]
        if not wrong:
            return None
        closest = f"{wrong[0]}: ours {ours[wrong[0]]}, the oracle's {known[wrong[0]]}"
    return closest


def run(
    name: str,
    numbers: range,
    seed: int = 0,
    keep: Path | None = None,
    tell: Callable[[Outcome], None] | None = None,
) -> Outcome:
    """Read the mutations with these numbers, and compare what is read.

    Args:
        name: the format.
        numbers: the mutations.
        seed: of all of them.
        keep: where files go that fail.
        tell: is told of every 2,000, with the outcome so far.
    """
    form, outcome = FORMATS[name], Outcome()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=memory) as temporary:
        start = Path(temporary) / "seeds"
        start.mkdir()
        oracle = Oracle(name, start)
        seeds = [
            {
                str(file.relative_to(one)): file.read_bytes()
                for file in sorted(one.rglob("*"))
                if file.is_file()
            }
            for one in sorted(start.iterdir())
        ]
        case = Case(Path(temporary) / "case")
        before = signal.signal(signal.SIGALRM, _hang)
        try:
            for sample in seeds:  # unchanged, they must be read and equal
                problem = _one(form, oracle, case, sample, outcome)
                if problem or outcome.counts["refused"]:
                    raise AssertionError(f"a seed of {name} is not read: {problem}")
            outcome.counts.clear()
            gc.collect()
            gc.freeze()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for number in numbers:
                sample = mutated(form, seeds, seed, number)
                problem = _one(form, oracle, case, sample, outcome)
                if number % 50 == 0:  # asking costs as much as reading
                    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
                    if problem is None and grown > LIMIT_BYTES // 1024:
                        peak += grown
                        problem = "this one, or one of the 49 before, takes too much memory"
                if tell is not None and outcome.counts["mutations"] % 2000 == 0:
                    tell(outcome)
                if problem is not None:
                    outcome.failures.append((number, problem))
                    print(f"{name} {seed} {number}: {problem}", flush=True)
                if keep is not None and (problem is not None or len(numbers) == 1):
                    Case(keep / f"{name}-{seed}-{number}").write(sample)
        finally:
            signal.signal(signal.SIGALRM, before)
            gc.unfreeze()
            oracle.close()
    return outcome


class Case:
    """The folder of the checkpoint that is read, in which as few files as possible are written each time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._there: Sample = {}

    def write(self, sample: Sample) -> None:
        """Make the folder hold this checkpoint, and nothing else."""
        for place in self._there.keys() - sample:
            (self.folder / place).unlink()
        for place, content in sample.items():
            if self._there.get(place) is not content:
                with open(self.folder / place, "wb", buffering=0) as file:
                    file.write(content)
        self._there = sample


def _one(form: Format, oracle: Oracle, case: Case, sample: Sample, outcome: Outcome) -> str | None:
    """Read one checkpoint; say what is wrong with how that went, or ``None``."""
    case.write(sample)
    path = str(case.folder / form.entry)
    outcome.counts["mutations"] += 1
    # of the clock, since others share the cores; its own time is below
    signal.setitimer(signal.ITIMER_REAL, 60)
    begin = time.perf_counter()
    try:
        ours = read_ours(path)
        if time.perf_counter() - begin > LIMIT_SECONDS:
            own = time.process_time()
            read_ours(path)
            if (own := time.process_time() - own) > LIMIT_SECONDS:
                return f"takes {own:.1f} s"
    except HangError:
        return "hangs for a minute"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(ours, str):
        outcome.counts["refused"] += 1
        return None
    outcome.counts["read"] += 1
    if outcome.counts["read"] % form.every:
        return None
    theirs = oracle.ask(path)
    if "refused" in theirs:
        outcome.counts[f"read, the oracle refuses ({theirs['refused']})"] += 1
        return None
    outcome.counts["compared"] += 1
    return differs(ours, theirs["mappings"])


def _job(arguments: tuple[str, range, int, Path | None]) -> Outcome:
    name, begin = arguments[0], time.perf_counter()

    def tell(outcome: Outcome) -> None:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own = sum(part.ru_utime + part.ru_stime for part in used)
        rate = outcome.counts["mutations"] / (time.perf_counter() - begin)
        print(
            f"{name}: {outcome}; {len(outcome.failures)} failures; {rate:.0f}/s, {own:.0f} s of CPU",
            flush=True,
        )

    return run(*arguments, tell)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--only", type=int, help="make this mutation alone")
    parser.add_argument("--keep", type=Path, help="keep the files that fail in this folder")
    parser.add_argument("--oracle", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.oracle:
        serve_oracle(FORMATS[given.format], given.oracle)
    start, count = (given.start, given.count) if given.only is None else (given.only, 1)
    numbers = range(start, start + count)
    parts = [(given.format, numbers[job :: given.jobs], given.seed, given.keep) for job in range(given.jobs)]
    total, begin = Outcome(), time.perf_counter()
    if given.jobs == 1:
        total = _job(parts[0])
    else:
        with multiprocessing.Pool(given.jobs, maxtasksperchild=1) as pool:
            for outcome in pool.imap_unordered(_job, parts):
                total.add(outcome)
    rate = total.counts["mutations"] / (time.perf_counter() - begin)
    print(f"{given.format}: {total}; {len(total.failures)} failures; {rate:.0f}/s", flush=True)
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
