# ruff: noqa: E501  # tables and messages
"""More hostile files, by someone who has read the readers' code: time, memory, lies, races of two readers.

``BUILDERS`` and ``SAYS`` are as in ``build_hostile``. ``AUDITED`` holds files that are no reason to
refuse: they are audited, with findings (exit 1) or without (exit 0), and nothing in them reaches the terminal.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import build_hostile as build
from build_hostile import (
    FALSE,
    NONE,
    TRUE,
    Builder,
    call,
    entry,
    glob,
    mapping,
    number,
    numbers,
    pickled,
    safetensors_bytes,
    storage,
    tensor,
    text,
    torch_members,
    tup,
    write_zip,
    writer,
    zip_bytes,
)  # fmt: skip

BUILDERS: dict[str, Builder] = {}
SAYS: dict[str, str] = {}
AUDITED: dict[str, Builder] = {}

_GOOD = mapping(weight=tensor())
_END = struct.Struct("<4s4H2IH")
MEGABYTE = 2**20


def add(name: str, says: str, builder: Builder) -> None:
    """Register a file that is refused."""
    assert name not in BUILDERS
    assert name not in build.BUILDERS
    BUILDERS[name], SAYS[name] = builder, says


def hostile(says: str) -> Callable[[Builder], Builder]:
    """Register a file that is refused under its builder's name."""

    def register(builder: Builder) -> Builder:
        add(builder.__name__, says, builder)
        return builder

    return register


def audited(builder: Builder) -> Builder:
    """Register a file that is audited."""
    AUDITED[builder.__name__] = builder
    return builder


# zip archives


def _zip(change: Callable[[bytearray], bytes | bytearray]) -> Builder:
    """Return a builder that changes the bytes of a good file."""

    def write(path: Path) -> None:
        path.write_bytes(change(bytearray(zip_bytes(torch_members(_GOOD)))))

    return write


def _patch(pattern: bytes, offset: int, new: bytes, which: int = 0) -> Callable[[bytearray], bytearray]:
    def change(raw: bytearray) -> bytearray:
        at = -1
        for _ in range(which + 1):
            at = raw.index(pattern, at + 1)
        raw[at + offset : at + offset + len(new)] = new
        return raw

    return change


_DIRECTORY = "directory at its end cannot be read|before the zip archive's first member"
_CD, _LOCAL, _EOCD = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"
_ZIPS: dict[str, tuple[str, Callable[[bytearray], bytes | bytearray]]] = {
    # torch takes the archive's size from the count, and finds names whatever their case
    "count_too_small": ("directory", _patch(_EOCD, 8, struct.pack("<2H", 1, 1))),
    "count_too_big": ("directory|several parts", _patch(_EOCD, 8, struct.pack("<2H", 9, 9))),
    "directory_beyond": (_DIRECTORY, _patch(_EOCD, 16, struct.pack("<I", 2**31))),
    "directory_all_ones": (_DIRECTORY + "|too long|several parts", _patch(_EOCD, 12, b"\xff" * 8)),
    "directory_shifted": (_DIRECTORY, _patch(_EOCD, 16, b"\x00\x00\x00\x00")),
    "marked_as_folder": ("folder|directory", _patch(_CD, 38, struct.pack("<I", 0x10), which=2)),
    "header_offset": ("before|header|over the next", _patch(_CD, 42, struct.pack("<I", 4), which=0)),
    "same_place": ("over the next member", _patch(_CD, 42, struct.pack("<I", 0), which=2)),
    "offset_beyond": ("beyond the file's end", _patch(_CD, 42, struct.pack("<I", 2**31), which=2)),
    "name_length": (_DIRECTORY, _patch(_CD, 28, struct.pack("<H", 0xFFFF), which=2)),
    "extra_length": (_DIRECTORY, _patch(_CD, 30, struct.pack("<H", 0xFFFF), which=2)),
    "strong_encryption": ("encrypted", _patch(_CD, 8, struct.pack("<H", 0x40), which=2)),
    "method": ("compressed", _patch(_CD, 10, struct.pack("<H", 99), which=2)),
    "name_with_nul": (
        "leads out|twice|damaged|truncated|storage is missing",
        lambda raw: raw.replace(b"archive/data/0", b"archive/data/\0"),
    ),
    "second_archive": (_DIRECTORY, lambda raw: raw + raw),
    "end_in_comment": (
        _DIRECTORY + "|storage is missing|no data.pkl|torch.save did not write|empty",
        lambda raw: (
            raw[:-2] + struct.pack("<H", _END.size) + _END.pack(_EOCD, 0, 0, 0, 0, 0, len(raw) + 22 - 22, 0)
        ),
    ),
    "zip64_beyond": (
        _DIRECTORY + "|several parts",
        lambda raw: raw[:-22] + struct.pack("<IIQI", 0x07064B50, 0, 2**60, 1) + b"PK\x05\x06" + b"\xff" * 18,
    ),
    "zip64_size": (
        "two sizes|beyond the file's end|directory at its end",
        _patch(_CD, 20, b"\xff" * 8, which=2),
    ),
    # no checksum, so that only the bounds can tell that the data lie in the next member's header
    "local_extra": (
        "over the next member|beyond",
        lambda raw: _patch(_CD, 16, bytes(4), which=0)(
            _patch(_LOCAL, 28, struct.pack("<H", 40), which=0)(raw)
        ),
    ),
    "local_extra_of_last": (
        "over the next member|beyond",
        lambda raw: _patch(_CD, 16, bytes(4), which=2)(_patch(_LOCAL, 28, b"\xff\x00", which=2)(raw)),
    ),
    "local_signature": ("header does not say", _patch(_LOCAL, 0, b"PK\x03\x05", which=2)),
}
for _name, (_says, _change) in _ZIPS.items():
    add(f"zip_{_name}", _says, _zip(_change))


def _zip_of(name: str, says: str, *members: tuple[str, bytes]) -> None:
    add(f"zip_{name}", says, writer(zip_bytes(members)))


# two readers would take two different storages
_zip_of(
    "names_that_differ_by_case",
    "twice|case",
    *torch_members(_GOOD),
    ("archive/DATA/0", b"\x01" * 12),
)
_zip_of("backslash", "leads out of it", *torch_members(_GOOD), ("..\\evil", b"x"))
_zip_of("dots_inside", "leads out of it", *torch_members(_GOOD), ("archive/../../x", b"x"))
_zip_of("empty_pickle", "pickle cannot be followed", ("archive/data.pkl", b""), ("archive/data/0", bytes(12)))
_zip_of("folder_pickle", "no data.pkl", ("archive/data.pkl/", b""))


@hostile("its zip directory is too long|no data.pkl")
def zip_of_many_members(path: Path) -> None:
    count = 300_000
    locals_ = bytearray()
    directory = bytearray()
    for index in range(count):
        name = b"%06d" % index
        directory += struct.pack(
            "<4s6H3I5H2I", _CD, 20, 20, 0, 0, 0, 33, 0, 0, 0, 6, 0, 0, 0, 0, 0, len(locals_)
        )
        directory += name
        locals_ += struct.pack("<4s5H3I2H", _LOCAL, 20, 0, 0, 0, 33, 0, 0, 0, 6, 0) + name
    end = struct.pack(
        "<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), len(locals_)
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(locals_) + len(directory), 1)
    tail = _END.pack(_EOCD, 0, 0, 0xFFFF, 0xFFFF, len(directory), len(locals_), 0)
    path.write_bytes(locals_ + directory + end + locator + tail)


@hostile("no data.pkl|torch.save did not write")
def zip_of_long_names(path: Path) -> None:
    names = (f"archive/{index:04d}" + "a/" * 30_000 for index in range(100))
    path.write_bytes(zip_bytes((name, b"") for name in names))


def _sparse_zip(path: Path, name: str, length: int, body: bytes = _GOOD) -> None:
    """Write a zip whose first member is a hole of ``length`` bytes."""
    rest = [(member, data) for member, data in torch_members(body) if member != name]
    raw = zip_bytes([(name, b""), *rest])
    start = raw.index(_LOCAL, 4)
    with open(path, "wb") as file:
        file.write(raw[:start])
        file.seek(start + length)
        tail = bytearray(raw[start:])
        first = tail.index(_CD)
        tail[first + 20 : first + 28] = struct.pack("<II", length, length)
        at = tail.index(_CD, first + 1)
        while at > 0:
            old = int.from_bytes(tail[at + 42 : at + 46], "little")
            tail[at + 42 : at + 46] = struct.pack("<I", old + length)
            at = tail.find(_CD, at + 1)
        old = int.from_bytes(tail[-6:-2], "little")
        tail[-6:-2] = struct.pack("<I", old + length)
        file.write(tail)


@hostile("data.pkl is too long|pickle is too long|cannot be followed")
def zip_sparse_pickle(path: Path) -> None:
    _sparse_zip(path, "archive/data.pkl", 250 * MEGABYTE)


@hostile("byteorder is too long|byte order")
def zip_sparse_byte_order(path: Path) -> None:
    _sparse_zip(path, "archive/byteorder", 250 * MEGABYTE)


# pickles that cost time or memory, each in a zip with a good tensor beside

_BIG_LIST = b"](" + b"N" * 200_000 + b"e"
_LIST, _DICT = glob("builtins", "list"), glob("collections", "OrderedDict")
_TOO_MUCH = "its pickle|too many|too long|more than|hostile|no tensors"
#: (what it says, the body); those that may also be read as if nothing was there say ``None``
_COSTLY: dict[str, Callable[[], bytes]] = {
    "list_copies": lambda: _BIG_LIST + b"q\x000" + _LIST + b"q\x010](" + b"h\x01h\x00\x85R" * 20_000 + b"e",
    "dict_copies": lambda: (
        mapping(**{f"k{index}": NONE for index in range(50_000)})
        + b"q\x000" + _DICT + b"q\x010](" + b"h\x01h\x00\x85R" * 20_000 + b"e"
    ),
    "pair_copies": lambda: (
        b"](" + (text("a") + NONE + b"\x86") * 50_000 + b"e"
        + b"q\x000" + _DICT + b"q\x010](" + b"h\x01h\x00\x85R" * 20_000 + b"e"
    ),
    "tuple_copies": lambda: (
        b"(" + b"N" * 200_000 + b"tq\x000" + glob("pkg", "Thing") + b"q\x010]("
        + b"h\x01h\x00}" + text("a") + b"Ns\x92" * 20_000 + b"e"
    ).replace(b"\x92" * 2, b"\x92"),
    "newobj_ex_copies": lambda: (
        b"(" + b"N" * 200_000 + b"tq\x000" + glob("pkg", "Thing") + b"q\x010"
        + b"}" + text("a") + b"Nsq\x020](" + b"h\x01h\x00h\x02\x92" * 20_000 + b"e"
    ),
    "reconstructor_copies": lambda: (
        b"(" + glob("pkg", "Thing") + b"N" * 200_000 + b"tq\x000" + glob("copyreg", "__newobj__") + b"q\x010]("
        + b"h\x01h\x00R" * 20_000 + b"e"
    ),
    "name_of_dots": lambda: text("." * 16 * MEGABYTE) + text("." * 16 * MEGABYTE) + b"\x93",
    "long_name_called": lambda: call(text("pkg") + text("x" * 16 * MEGABYTE) + b"\x93"),
    "names_of_dots": lambda: b"](" + (text("pkg") + text("a." * 20_000) + b"\x93") * 500 + b"e",
    "lists": lambda: b"](" + b"]" * 8_000_000 + b"e",
    "dicts": lambda: b"](" + b"}" * 8_000_000 + b"e",
    "marks": lambda: b"(" * 8_000_000 + b"1" * 8_000_000 + NONE,
    "memo": lambda: NONE + b"".join(b"r" + struct.pack("<I", 7 * index) for index in range(3_000_000)),
    "memoize": lambda: NONE + b"\x94" * 8_000_000,
    "globals": lambda: b"](" + b"".join(b"cpkg\nn%d\n" % index for index in range(600_000)) + b"e",
    "calls": lambda: b"](" + (glob("pkg", "A") + b")R") * 1_500_000 + b"e",
    "floats": lambda: b"](" + (b"G" + b"\x40" + bytes(7)) * 6_000_000 + b"e",
    "storages": lambda: (
        b"](" + b"".join(storage(key=str(index)) for index in range(150_000)) + b"e"
    ),
    "tuples": lambda: b"](" + b"N\x85" * 5_000_000 + b"e",
    "text_escapes": lambda: b"V" + b"\\u0041" * 2_000_000 + b"\n",
    "long_int": lambda: b"\x8b" + struct.pack("<i", 30 * MEGABYTE) + b"\x01" * (30 * MEGABYTE),
    "long_int_of_digits": lambda: b"L" + b"9" * (10 * MEGABYTE) + b"L\n",
    "tensors_of_one_storage": lambda: (
        b"}(" + text("x") + tensor() + b"q\x00" + b"".join(text(f"y{i}") + b"h\x00" for i in range(1_200_000)) + b"u"
    ),
}  # fmt: skip
COSTLY = tuple(f"costly_{name}" for name in _COSTLY)
for _name, _body in _COSTLY.items():
    add(
        f"costly_{_name}",
        _TOO_MUCH,
        lambda path, body=_body: write_zip(path, body()),
    )
    # and beside a tensor, where only what it costs can be held against it
    AUDITED[f"costly_{_name}_beside"] = lambda path, body=_body: write_zip(
        path, b"}(" + text("weight") + tensor() + text("more") + body() + b"u"
    )


# persistent ids and tensors of wrong types

_PID = "pickle cannot be followed|no tensors|storage is missing|storage as long|two|damaged"


def _rebuilt(*arguments: bytes) -> bytes:
    return mapping(weight=call(glob("torch._utils", "_rebuild_tensor_v2"), *arguments))


def _stored(*items: bytes) -> bytes:
    return mapping(weight=tensor(of=tup(*items) + b"Q"))


_S, _F, _CPU = text("storage"), glob("torch", "FloatStorage"), text("cpu")
_WRONG: dict[str, bytes] = {
    "pid_text": mapping(weight=tensor(of=text("storage") + b"Q")),
    "pid_none": mapping(weight=tensor(of=NONE + b"Q")),
    "pid_empty": mapping(weight=tensor(of=b")Q")),
    "pid_unknown": _stored(text("file"), text("/etc/passwd")),
    "pid_short": _stored(_S, _F),
    "pid_long": _stored(_S, _F, text("0"), _CPU, number(3), NONE, NONE),
    "pid_key_number": _stored(_S, _F, number(0), _CPU, number(3)),
    "pid_key_none": _stored(_S, _F, NONE, _CPU, number(3)),
    "pid_key_list": _stored(_S, _F, b"]", _CPU, number(3)),
    "pid_location_none": _stored(_S, _F, text("0"), NONE, number(3)),
    "pid_kind_text": _stored(_S, text("FloatStorage"), text("0"), _CPU, number(3)),
    "pid_numel_float": _stored(_S, _F, text("0"), _CPU, b"G" + struct.pack(">d", 3.0)),
    "pid_numel_bool": _stored(_S, _F, text("0"), _CPU, TRUE),
    "pid_numel_text": _stored(_S, _F, text("0"), _CPU, text("3")),
    "pid_numel_huge": _stored(_S, _F, text("0"), _CPU, number(2**900)),
    "pid_view_negative": _stored(_S, _F, text("0"), _CPU, number(3), tup(text("0"), number(-1), number(3))),
    "pid_view_huge": _stored(_S, _F, text("0"), _CPU, number(3), tup(text("0"), number(2**80), number(3))),
    "pid_view_text": _stored(_S, _F, text("0"), _CPU, number(3), tup(text("0"), text("1"), number(3))),
    "offset_bool": _rebuilt(storage(), TRUE, numbers([1]), numbers([1]), FALSE, NONE),
    "offset_float": _rebuilt(storage(), b"G" + bytes(8), numbers([1]), numbers([1]), FALSE, NONE),
    "offset_none": _rebuilt(storage(), NONE, numbers([1]), numbers([1]), FALSE, NONE),
    "size_nan": _rebuilt(storage(), number(0), tup(b"G" + b"\x7f\xf8" + bytes(6)), numbers([1]), FALSE, NONE),
    "size_list_in_list": _rebuilt(storage(), number(0), tup(tup(number(3))), numbers([1]), FALSE, NONE),
    "stride_none": _rebuilt(storage(), number(0), numbers([3]), NONE, FALSE, NONE),
    "shape_dict": _rebuilt(storage(), number(0), b"}", b"}", FALSE, NONE),
    # torch.save never writes these, and torch.load takes whichever dtype comes first for both
    "storage_of_two_dtypes": mapping(
        weight=tensor((2,), of=storage(2)), bias=tensor((1,), of=storage(1, kind="LongStorage"))
    ),
}  # fmt: skip
_NO_STORAGE = {name: _WRONG.pop(name) for name in ("pid_text", "pid_none", "pid_empty")}
for _name, _body in _NO_STORAGE.items():  # no values: listed as unsupported
    AUDITED[f"wrong_{_name}"] = lambda path, body=_body: write_zip(path, body)
for _name, _body in _WRONG.items():
    length = 8 if _name == "storage_of_two_dtypes" else 12
    add(
        f"wrong_{_name}",
        f"{_PID}|must be such that",
        lambda path, body=_body, length=length: write_zip(path, body, bytes(length)),
    )


@hostile("same name")
def names_collide_with_a_counter(path: Path) -> None:
    names = {"module.a": tensor(), "module.n_averaged": tensor(), "n_averaged": tensor()}
    write_zip(path, mapping(**names))


# small files that stand for much more than they hold


def _layers(count: int, shape: str, of: Callable[[int], bytes]) -> bytes:
    return b"}(" + b"".join(
        text(f"bn{index}.running_mean") + of(index) + text(f"bn{index}.running_var") + of(index)
        for index in range(count)
    ) + b"u"  # fmt: skip


@hostile("more than|at most")
def expanded_statistics(path: Path) -> None:
    """A thousand layers of 16 million channels each, in twelve bytes."""
    write_zip(path, _layers(1000, "", lambda _: tensor((2**24,), (0,))))


@hostile("more than|at most")
def repeated_statistics(path: Path) -> None:
    """Ten thousand layers whose statistics are the same million."""
    shared = tensor((2**20,), of=storage(2**20))
    write_zip(path, b"}(" + text("x") + shared + b"q\x00" + b"".join(
        text(f"b{index}.running_{stat}") + b"h\x00" for index in range(10_000) for stat in ("mean", "var")
    ) + b"u", bytes(2**22))  # fmt: skip


@audited
def scattered_statistics(path: Path) -> None:
    """Two channels with four gigabytes between them."""
    numel = 2**29
    body = mapping(
        **{f"bn.running_{stat}": tensor((2,), (numel - 1,), of=storage(numel)) for stat in ("mean", "var")}
    )
    _sparse_zip(path, "archive/data/0", 4 * numel, body)


def _sparse_safetensors(path: Path, header: dict[str, object], length: int) -> None:
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for size in (length, 2**40, 2**36):  # what the file system takes
            try:
                file.truncate(8 + len(raw) + size)
                break
            except OSError:
                continue


@hostile("more channels than any layer's|truncated")
def safetensors_sparse_statistics(path: Path) -> None:
    numel = 2**32
    _sparse_safetensors(
        path,
        {
            "bn.running_mean": entry(0, 4 * numel, [numel]),
            "bn.running_var": entry(4 * numel, 8 * numel, [numel]),
        },
        8 * numel,
    )


@hostile("more than|at most|fewer than|truncated")
def safetensors_of_petabytes(path: Path) -> None:
    numel = 2**40 - 1
    header = {f"l{i}.running_{s}": entry((2 * i + j) * numel, (2 * i + j + 1) * numel, [numel], "U8")
              for i in range(500) for j, s in enumerate(("mean", "var"))}  # fmt: skip
    _sparse_safetensors(path, dict(header), 1000 * numel)


@hostile("directory at its end|truncated")
def zip_of_terabytes(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(zip_bytes(torch_members(_GOOD)))
        file.truncate(2**42)


@hostile("truncated|damaged|pickle is too long")
def legacy_of_terabytes(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(build.MAGIC + pickled(number(1001)))
        file.truncate(2**42)


@hostile("not a checkpoint|not JSON|header is longer")
def holes(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**42)


# safetensors headers


def _header(raw: bytes, data: bytes = b"") -> Builder:
    return writer(safetensors_bytes(raw, data))


_ENTRY = json.dumps(entry()).encode()
_HEADERS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "spaces": ("header is longer|more than", lambda: b"{" + b" " * 99_000_000 + b"}"),
    "wide_spaces": (
        "header is longer|more than",
        lambda: b'{"\xf0\x9f\x98\x80":1' + b" " * 90_000_000 + b"}",
    ),
    "lists": ("more than|not JSON|header", lambda: b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"),
    "objects": ("more than|not JSON|header", lambda: b'{"a":[' + b"{}," * 5_000_000 + b"{}]}"),
    "small_objects": ("more than|not JSON|header", lambda: b'{"a":[' + b'{"":0},' * 2_000_000 + b"{}]}"),
    "floats": ("more than|not JSON|header", lambda: b'{"a":[' + b"1e9," * 3_500_000 + b"0]}"),
    "texts": ("more than|not JSON|header", lambda: b'{"a":[' + b'"ab",' * 3_000_000 + b"0]}"),
    "keys": (
        "more than|too many keys",
        lambda: b"{" + b",".join(
            b'"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % index for index in range(280_000)
        ) + b"}",
    ),
    "deep_objects": ("not JSON", lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "utf16": ("not JSON", lambda: b"{" + ('"w":' + _ENTRY.decode() + "}").encode("utf-16-le")),
    "utf16_with_mark": ("not a checkpoint|not JSON", lambda: '{"w":1}'.encode("utf-16")),
    "utf8_mark": ("not a checkpoint|not JSON", lambda: b"\xef\xbb\xbf{}"),
    "surrogate_bytes": ("not JSON", lambda: b'{"\xed\xa0\x80":1}'),
    "float_offsets": (
        "data_offsets", lambda: b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0.0,12.0]}}'
    ),
    "exponent_offsets": (
        "data_offsets", lambda: b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12e0]}}'
    ),
    "text_offsets": (
        "data_offsets", lambda: b'{"w":{"dtype":"F32","shape":[3],"data_offsets":["0","12"]}}'
    ),
    "offsets_object": ("data_offsets", lambda: b'{"w":{"dtype":"F32","shape":[3],"data_offsets":{"0":12}}}'),
    "offsets_three": ("data_offsets", lambda: b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,6,12]}}'),
    "offsets_huge": (
        "data_offsets",
        lambda: b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,%d]}}' % 2**70,
    ),
    "shape_exponent": ("shape of at most", lambda: b'{"w":{"dtype":"F32","shape":[3e0],"data_offsets":[0,12]}}'),
    "shape_null": ("shape of at most", lambda: b'{"w":{"dtype":"F32","shape":[null],"data_offsets":[0,12]}}'),
    "shape_text": ("shape of at most", lambda: b'{"w":{"dtype":"F32","shape":"3","data_offsets":[0,12]}}'),
    "shape_infinity": ("not JSON", lambda: b'{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,12]}}'),
    "dtype_null": ("dtype that is text", lambda: b'{"w":{"dtype":null,"shape":[3],"data_offsets":[0,12]}}'),
    "metadata_twice": (
        "twice", lambda: b'{"__metadata__":{},"__metadata__":{},"w":' + _ENTRY + b"}"
    ),
    "escaped_twin": ("twice", lambda: b'{"w":' + _ENTRY + b',"\\u0077":' + _ENTRY + b"}"),
    "array": ("not a checkpoint|not a JSON object|not JSON", lambda: b"[]"),
    "trailing_text": ("not JSON", lambda: b'{"w":' + _ENTRY + b"} {}"),
    "long_int": ("not JSON", lambda: b'{"w":' + b"9" * 3_000_000 + b"}"),
    "long_name": ("key is too long", lambda: b'{"' + b"x" * 5_000_000 + b'":' + _ENTRY + b"}"),
    "long_dtype": (
        "twice|dtype|bytes more|must be such",
        lambda: b'{"w":{"dtype":"' + b"x" * 5_000_000 + b'","shape":[3],"data_offsets":[0,99]}}',
    ),
}  # fmt: skip
for _name, (_says, _make) in _HEADERS.items():
    add(
        f"safetensors_header_{_name}",
        _says,
        lambda path, make=_make: path.write_bytes(safetensors_bytes(make())),
    )


# JSON that is taken for a report

_MARKED = b'{"schema_version":1,"findings":['
_REPORTS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "lists": ("report|too", lambda: _MARKED + b"[]," * 8_000_000 + b"[]]}"),
    "objects": ("report|too", lambda: _MARKED + b'{"":0},' * 4_000_000 + b"{}]}"),
    "floats": ("report|too", lambda: _MARKED + b"1e9," * 7_000_000 + b"0]}"),
    "deep": ("report", lambda: _MARKED + b"[" * 1_000_000),
    "wide": ("report|too", lambda: _MARKED + b'"\xf0\x9f\x98\x80"' + b" " * (30 * MEGABYTE) + b"]}"),
    "long_int": ("report", lambda: _MARKED + b"9" * 5_000_000 + b"]}"),
    "too_long": ("too long|JSON, not a checkpoint", lambda: _MARKED + b" " * (40 * MEGABYTE) + b"]}"),
}
for _name, (_says, _make) in _REPORTS.items():
    add(f"report_{_name}", _says, lambda path, make=_make: path.write_bytes(make()))


# paths


@hostile("too many levels of symbolic links|system cannot read it")
def symlink_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@hostile("no such file")
def symlink_to_nothing(path: Path) -> None:
    path.symlink_to("nothing\x1b[31m\nhere")


@hostile("not a regular file|system cannot read it")
def unix_socket(path: Path) -> None:
    short = os.path.relpath(path)  # a socket's path is 108 bytes at most
    with socket.socket(socket.AF_UNIX) as listening:
        if len(short) < 100:
            listening.bind(short)
        else:
            here = os.open(".", os.O_RDONLY)
            os.chdir(path.parent)
            try:
                listening.bind(path.name)
            finally:
                os.fchdir(here)
                os.close(here)


for _name, _target, _says in (
    ("own_memory", "/proc/self/mem", "empty file|cannot read|permission|regular"),
    ("own_environment", "/proc/self/environ", "empty file|no such file"),
    ("random", "/dev/urandom", "not a regular file"),
    ("full", "/dev/full", "not a regular file"),
    ("own_input", "/dev/stdin", "not a regular file|no such|cannot read|empty|not a checkpoint"),
    ("folder_of_processes", "/proc/self/task", "a folder in which no checkpoint was found"),
):
    add(f"path_to_{_name}", _says, lambda path, target=_target: path.symlink_to(target))


# what is audited

_FLOAT3 = struct.pack("<3f", 1, 2, 3)


def _bn(name: str, mean: bytes, var: bytes, counter: bytes | None = None) -> bytes:
    body = text(f"{name}running_mean") + mean + text(f"{name}running_var") + var
    return body if counter is None else body + text(f"{name}num_batches_tracked") + counter


@audited
def names_for_the_terminal(path: Path) -> None:
    names = ("\x1b[31mred\x1b[0m.", "a\nb.", "\u202egnp.", "[red]markup[/red].", "\ud800.", "nul\0.", "\r\r.",
             "é.", "e\u0301.", "\x9b31m.", "\u2028.", "=cmd|'x'!A0.", "<script>alert(1)</script>.", "`$(id)`.",
             "\x1b]0;title\x07.", "\x1b]8;;http://evil\x1b\\x.", ".", "..", "[link=file:///etc]x[/link].")  # fmt: skip
    nan = struct.pack("<3f", float("nan"), -1, 2)
    body = b"}(" + b"".join(_bn(name, tensor(), tensor()) for name in names) + b"u"
    write_zip(path, body, nan)


@hostile(r"checksum of storage 0 \(tensor running_mean\) does not match")
def zip_statistics_flipped(path: Path) -> None:
    body = mapping(running_mean=tensor(), running_var=tensor())
    raw = zip_bytes(torch_members(body, b"flip me, yes"))
    path.write_bytes(raw.replace(b"flip me, yes", b"flip me, yEs"))


@audited
def statistics_of_odd_shapes(path: Path) -> None:
    empty, scalar = tensor((0,), (1,)), tensor((), ())
    body = b"}(" + b"".join((
        _bn("a.", empty, empty), _bn("b.", scalar, tensor()), _bn("c.", tensor(), scalar, tensor()),
        _bn("", tensor(), tensor(), scalar), _bn("d.", tensor((3,), (0,)), tensor((1, 3), (3, 1)), empty),
    )) + b"u"  # fmt: skip
    write_zip(path, body, _FLOAT3)


@audited
def statistics_of_odd_values(path: Path) -> None:
    values = struct.pack("<6d", 1.7e308, -1.7e308, float("inf"), float("nan"), 5e-324, -0.0)
    double = tensor((6,), of=storage(6, kind="DoubleStorage"))
    one = tensor((1,), of=storage(6, kind="DoubleStorage"))
    path.write_bytes(zip_bytes(torch_members(b"}(" + _bn("a.", double, double, one) + b"u", values)))


@audited
def counters_of_odd_values(path: Path) -> None:
    values = [(2**64 - 1, "U64", "<Q"), (-(2**63), "I64", "<q"), (1.7e308, "F64", "<d"), (float("nan"), "F64", "<d"),
              (float("-inf"), "F64", "<d")]  # fmt: skip
    header, data = {}, b""
    for index, (value, dtype, form) in enumerate(values):
        for stat in ("mean", "var"):
            header[f"l{index}.running_{stat}"] = entry(len(data), len(data) + 4, [1])
            data += struct.pack("<f", index + 1)
        header[f"l{index}.num_batches_tracked"] = entry(len(data), len(data) + 8, [], dtype)
        data += struct.pack(form, value)
    path.write_bytes(safetensors_bytes(header, data))


@audited
def statistics_of_odd_dtypes(path: Path) -> None:
    header, data = {}, b""
    for dtype in ("BOOL", "C64", "F8_E4M3", "F8_E5M2", "BF16", "U64", "F8_E8M0", "F4", "X\x1b[31m"):
        for stat in ("mean", "var"):
            header[f"{dtype}.running_{stat}"] = entry(
                len(data), len(data) + 16, [16 // build_size(dtype)], dtype
            )
            data += bytes(range(240, 256))
    path.write_bytes(safetensors_bytes(header, data))


def build_size(dtype: str) -> int:
    """Return an element's bytes."""
    return {"C64": 8, "U64": 8, "BF16": 2}.get(dtype, 1)


@audited
def metadata_of_wrong_types(path: Path) -> None:
    metadata = {"format": ["pt"], "freezekit_report": {"a": 1}, "freezekit_manifest": 3, "\x1b[31m": None}
    path.write_bytes(safetensors_bytes({"__metadata__": metadata, "w": entry()}))


@audited
def metadata_that_is_a_list(path: Path) -> None:
    path.write_bytes(safetensors_bytes({"__metadata__": ["pt"], "w": entry()}))


@audited
def names_that_differ_by_normalisation(path: Path) -> None:
    path.write_bytes(safetensors_bytes({"\u00e9": entry(0, 4, [1]), "e\u0301": entry(4, 12, [2])}))


@audited
def many_bad_layers(path: Path) -> None:
    nan = struct.pack("<3f", float("nan"), -1, 2)
    write_zip(path, b"}(" + text("x") + tensor() + b"q\x00" + b"".join(
        text(f"block{index}.bn.running_{stat}") + b"h\x00" for index in range(3000) for stat in ("mean", "var")
    ) + b"u", nan)  # fmt: skip


@audited
def sparse_tensor_of_a_terabyte(path: Path) -> None:
    """No statistics: nothing of it has to be read."""
    numel = 2**38
    _sparse_safetensors(path, {"embedding": entry(0, 4 * numel, [numel])}, 4 * numel)
