"""Builds hostile, damaged and mistaken files, byte by byte and without torch.

``BUILDERS`` maps a name to a function that writes such a file at the path it is given; ``SAYS`` maps the same
name to a regular expression that the reader's refusal must match. A payload that was executed would create
``canary(path)``.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

Builder = Callable[[Path], None]

BUILDERS: dict[str, Builder] = {}
SAYS: dict[str, str] = {}

NONE, FALSE, TRUE = b"N", b"\x89", b"\x88"
MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def canary(path: Path) -> Path:
    """Return the file that a payload in ``path`` would create."""
    return path.with_name(path.name + ".executed")


def hostile(says: str) -> Callable[[Builder], Builder]:
    """Register a builder under its function's name."""

    def register(builder: Builder) -> Builder:
        add(builder.__name__, says, builder)
        return builder

    return register


def add(name: str, says: str, builder: Builder) -> None:
    """Register a builder."""
    assert name not in BUILDERS
    BUILDERS[name], SAYS[name] = builder, says


def writer(content: bytes) -> Builder:
    """Return a builder that writes the bytes."""

    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


# a pickle, piece by piece


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tup(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(values: Iterable[int]) -> bytes:
    return tup(*map(number, values))


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *args: bytes) -> bytes:
    return function + tup(*args) + b"R"


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(numel: int = 3, key: str = "0", kind: str = "FloatStorage", location: str = "cpu") -> bytes:
    return tup(text("storage"), glob("torch", kind), text(key), text(location), number(numel)) + b"Q"


def legacy_storage(numel: int = 3, key: str = "0") -> bytes:
    return (
        tup(text("storage"), glob("torch", "FloatStorage"), text(key), text("cpu"), number(numel), NONE)
        + b"Q"
    )


def tensor(
    shape: Iterable[int] = (3,),
    stride: Iterable[int] = (1,),
    offset: int = 0,
    of: bytes | None = None,
) -> bytes:
    return call(
        glob("torch._utils", "_rebuild_tensor_v2"),
        storage() if of is None else of,
        number(offset),
        numbers(shape),
        numbers(stride),
        FALSE,
        call(glob("collections", "OrderedDict")),
    )


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


# the containers


def zip_bytes(members: Iterable[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def torch_members(body: bytes, *data: bytes) -> list[tuple[str, bytes]]:
    storages = [(f"archive/data/{index}", raw) for index, raw in enumerate(data or (bytes(12),))]
    return [("archive/data.pkl", pickled(body)), ("archive/byteorder", b"little"), *storages]


def write_zip(path: Path, body: bytes, *data: bytes) -> None:
    path.write_bytes(zip_bytes(torch_members(body, *data)))


def legacy_bytes(body: bytes, keys: bytes | None = None, data: bytes | None = None) -> bytes:
    head = MAGIC + pickled(number(1001)) + pickled(mapping(little_endian=TRUE))
    tail = (
        b"](" + text("0") + b"e" if keys is None else keys,
        struct.pack("<q", 3) + bytes(12) if data is None else data,
    )
    return head + pickled(body) + pickled(tail[0]) + tail[1]


def safetensors_bytes(header: object, data: bytes = bytes(12), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin: int = 0, end: int = 12, shape: object = (3,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# pickles that run code

RUNS = "would run {}.*nothing was executed"


def _touch(path: Path) -> bytes:
    return text(f"touch '{canary(path)}'")


_SYSTEM = glob("posix", "system")
#: how a pickle can come to run code; each is tried in a zip, a legacy file and alone
PAYLOADS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "reduce": ("posix.system", lambda path: call(_SYSTEM, _touch(path))),
    "os_alias": ("os.system", lambda path: call(glob("os", "system"), _touch(path))),
    "nt": ("nt.system", lambda path: call(glob("nt", "system"), _touch(path))),
    "inst": ("posix.system", lambda path: b"(" + _touch(path) + b"iposix\nsystem\n"),
    "obj": ("posix.system", lambda path: b"(" + _SYSTEM + _touch(path) + b"o"),
    "newobj": ("subprocess.Popen", lambda path: glob("subprocess", "Popen") + tup(_touch(path)) + b"\x81"),
    "newobj_ex": (
        "subprocess.Popen",
        lambda path: glob("subprocess", "Popen") + tup(_touch(path)) + mapping(shell=TRUE) + b"\x92",
    ),
    "stack_global": (
        "posix.system",
        lambda path: call(text("posix") + text("system") + b"\x93", _touch(path)),
    ),
    "memoised_names": (
        "posix.system",
        lambda path: (
            text("posix") + b"q\x07" + b"0" + text("system") + b"r\x00\x00\x00\x080"
            b"h\x07" + call(b"j\x00\x00\x00\x08\x93", _touch(path))
        ),
    ),
    "extension": ("copyreg.extension 5", lambda path: call(b"\x82\x05", _touch(path))),
    "dotted": (
        "torch.serialization.os.system",
        lambda path: call(glob("torch.serialization", "os.system"), _touch(path)),
    ),
    "foreign_dotted": (
        "friendly.package.os.system",
        lambda path: call(glob("friendly.package", "os.system"), _touch(path)),
    ),
    "getattr": (
        "torch.serialization.os.system",
        lambda path: call(
            call(glob("builtins", "getattr"), glob("torch.serialization", "os"), text("system")), _touch(path)
        ),
    ),
    "getattr_result": (
        "the result of builtins.getattr",
        lambda path: call(
            call(glob("builtins", "getattr"), call(glob("pkg", "Foreign")), text("method")), _touch(path)
        ),
    ),
    "getattr_chain": (
        "builtins.getattr",
        lambda path: (
            glob("builtins", "getattr")
            + b"q\x010"
            + glob("pkg", "a")
            + b"".join(b"q\x00" + b"0" + b"h\x01h\x00" + text("b" * 100) + b"\x86R" for _ in range(20))
        ),
    ),
    "getattr_dunder": (
        "builtins.getattr",
        lambda path: call(glob("builtins", "getattr"), glob("torch", "load"), text("__globals__")),
    ),
    "eval": (
        "builtins.eval",
        lambda path: call(glob("builtins", "eval"), text(f"open({str(canary(path))!r}, 'w')")),
    ),
    "exec_python2": (
        "builtins.exec",
        lambda path: call(glob("__builtin__", "exec"), text(f"open({str(canary(path))!r}, 'w')")),
    ),
    "execfile": ("builtins.execfile", lambda path: call(glob("__builtin__", "execfile"), _touch(path))),
    "apply": ("builtins.apply", lambda path: call(glob("__builtin__", "apply"), NONE, NONE)),
    "open": ("io.open", lambda path: call(glob("io", "open"), text(str(canary(path))), text("w"))),
    "import": ("builtins.__import__", lambda path: call(glob("builtins", "__import__"), text("antigravity"))),
    "compile": (
        "builtins.compile",
        lambda path: call(glob("builtins", "compile"), text("1"), text(""), text("exec")),
    ),
    "map": ("posix.system", lambda path: call(glob("builtins", "map"), _SYSTEM, b"](" + _touch(path) + b"e")),
    "partial": ("posix.system", lambda path: call(glob("functools", "partial"), _SYSTEM, _touch(path))),
    "defaultdict": ("posix.system", lambda path: call(glob("collections", "defaultdict"), _SYSTEM)),
    "new_object": (
        "subprocess.Popen",
        lambda path: call(glob("copy_reg", "__newobj__"), glob("subprocess", "Popen"), _touch(path)),
    ),
    "reconstructor": (
        "subprocess.Popen",
        lambda path: call(
            glob("copy_reg", "_reconstructor"), glob("subprocess", "Popen"), glob("builtins", "object"), NONE
        ),
    ),
    "from_type": (
        "posix.system",
        lambda path: call(
            glob("torch._tensor", "_rebuild_from_type_v2"),
            _SYSTEM,
            glob("torch", "Tensor"),
            tup(_touch(path)),
            NONE,
        ),
    ),
    "commands": ("subprocess.getoutput", lambda path: call(glob("commands", "getoutput"), _touch(path))),
    "runpy": ("runpy.run_path", lambda path: call(glob("runpy", "run_path"), text("/tmp/x.py"))),
    "importlib": (
        "importlib.import_module",
        lambda path: call(glob("importlib", "import_module"), text("this")),
    ),
    "ctypes": ("ctypes.CDLL", lambda path: call(glob("ctypes", "CDLL"), text("libc.so.6"))),
    "socket": (
        "socket.create_connection",
        lambda path: call(glob("socket", "create_connection"), tup(text("a"), number(1))),
    ),
    "pty": ("pty.spawn", lambda path: call(glob("pty", "spawn"), text("/bin/sh"))),
    "shutil": ("shutil.rmtree", lambda path: call(glob("shutil", "rmtree"), text("/nonexistent"))),
    "sys": ("sys.exit", lambda path: call(glob("sys", "exit"), number(0))),
    "pickle_loads": ("_pickle.loads", lambda path: call(glob("_pickle", "loads"), text(""))),
    "code": ("types.CodeType", lambda path: call(glob("types", "CodeType"), NONE)),
    "type": ("builtins.type", lambda path: call(glob("builtins", "type"), text("X"), tup(), b"}")),
    "attrgetter": ("operator.attrgetter", lambda path: call(glob("operator", "attrgetter"), text("system"))),
    "typing_getitem": (
        "typing.sys.modules",
        lambda path: call(glob("operator", "getitem"), glob("typing", "sys.modules"), text("os")),
    ),
    "torch_hub": (
        "torch.hub.load",
        lambda path: call(glob("torch.hub", "load"), text("evil/repo"), text("m")),
    ),
    "torch_load": ("torch.load", lambda path: call(glob("torch", "load"), text("/tmp/evil.pt"))),
    "torch_jit": ("torch.jit.load", lambda path: call(glob("torch.jit", "load"), text("/tmp/evil.pt"))),
    "torch_elastic": (
        "torch.distributed.elastic.*Handler",
        lambda path: call(
            glob("torch.distributed.elastic.multiprocessing.subprocess_handler", "SubprocessHandler"),
            _touch(path),
        ),
    ),
    "torch_function": (
        "torch.utils.data.graph.traverse",
        lambda path: call(glob("torch.utils.data.graph", "traverse"), NONE),
    ),
    "numpy_load": ("numpy.load", lambda path: call(glob("numpy", "load"), text("/tmp/evil.npy"))),
    "numpy_runstring": (
        "numpy.testing._private.utils.runstring",
        lambda path: call(glob("numpy.testing._private.utils", "runstring"), text("1"), b"}"),
    ),
    "cloudpickle": ("cloudpickle.loads", lambda path: call(glob("cloudpickle", "loads"), text("x"))),
}


def _run(name: str, says: str, payload: Callable[[Path], bytes]) -> None:
    says = RUNS.format(says)

    def in_zip(path: Path) -> None:  # beside good tensors, which are no excuse
        write_zip(path, mapping(weight=tensor(), bias=tensor(), more=payload(path)))

    def in_legacy(path: Path) -> None:
        path.write_bytes(legacy_bytes(mapping(weight=tensor(of=legacy_storage()), more=payload(path))))

    def alone(path: Path) -> None:
        path.write_bytes(pickled(payload(path)))

    add(f"zip_runs_{name}", says, in_zip)
    add(f"legacy_runs_{name}", says, in_legacy)
    add(f"pickle_runs_{name}", says, alone)


for _name, (_says, _payload) in PAYLOADS.items():
    _run(_name, _says, _payload)


@hostile(RUNS.format("torch.storage._load_from_bytes"))
def zip_runs_load_from_bytes(path: Path) -> None:
    write_zip(path, mapping(weight=tensor(), more=call(glob("torch.storage", "_load_from_bytes"), text("x"))))


@hostile(RUNS.format("posix.system"))
def legacy_runs_in_facts(path: Path) -> None:
    facts = pickled(call(_SYSTEM, _touch(path)))
    path.write_bytes(MAGIC + pickled(number(1001)) + facts + pickled(mapping(weight=tensor())))


@hostile(RUNS.format("posix.system"))
def legacy_runs_in_keys(path: Path) -> None:
    body = mapping(weight=tensor(of=legacy_storage()))
    path.write_bytes(legacy_bytes(body, keys=call(_SYSTEM, _touch(path))))


@hostile(RUNS.format("posix.system"))
def text_pickle_runs(path: Path) -> None:
    path.write_bytes(f"cposix\nsystem\n(S\"touch '{canary(path)}'\"\ntR.".encode())


@hostile(RUNS.format("posix.system"))
def truncated_pickle_runs(path: Path) -> None:
    path.write_bytes(b"\x80\x04" + call(_SYSTEM, _touch(path)))


@hostile(RUNS.format(r"bad\\x1b\[31m\\u202e\\n.system"))
def escapes_in_global(path: Path) -> None:
    write_zip(path, call(text("bad\x1b[31m\u202e\n") + text("system") + b"\x93", _touch(path)))


# what is no checkpoint


@hostile("not a regular file.*FIFO")
def fifo(path: Path) -> None:
    os.mkfifo(path)


@hostile("not a regular file.*device")
def dev_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


@hostile("a folder in which no checkpoint was found")
def directory(path: Path) -> None:
    path.mkdir()
    (path / "log.txt").touch()


@hostile("nothing was executed")
def dcp_folder(path: Path) -> None:
    path.mkdir()
    (path / ".metadata").write_bytes(pickled(call(_SYSTEM, _touch(path))))
    (path / "__0_0.distcp").touch()


_TEXTS: dict[str, tuple[str, bytes]] = {
    "empty": ("empty file", b""),
    "lfs_pointer": (
        "git-LFS pointer, not the file itself.*git lfs pull",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 13\n",
    ),
    "html": ("HTML or XML page", b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "xml": ("HTML or XML page", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"),
    "json_error": ("JSON, not a checkpoint", b'{"error": "Repository not found"}'),
    "json_brace_at_eight": ("JSON, not a checkpoint", b'{"error"{"code": 404}}'),
    "json_index": (
        "names a file outside its folder",
        b'{"metadata": {}, "weight_map": {"w": "../../../etc/passwd"}}',
    ),
    "plain_text": ("not a checkpoint: neither", b"hello, this is no checkpoint\n"),
    "garbage": ("not a checkpoint: neither", bytes(range(255, 0, -1)) * 8),
    "one_byte": ("not a checkpoint: neither", b"\x00"),
    "gzip": ("gzip.*unpack", gzip.compress(b"x" * 100)),
    "bzip2": ("bzip2", b"BZh91AY&SY" + bytes(40)),
    "xz": ("xz", b"\xfd7zXZ\x00" + bytes(40)),
    "zstd": ("zstd", b"\x28\xb5\x2f\xfd" + bytes(40)),
    "seven_zip": ("7z", b"7z\xbc\xaf\x27\x1c" + bytes(40)),
    "hdf5": ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(40)),
    "gguf": ("GGUF", b"GGUF\x03\x00\x00\x00" + bytes(40)),
    "npy": (r"numpy array \(.npy\)", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}"),
    "onnx": ("protobuf.*ONNX", b"\x08\x07\x12\x07pytorch\x1a\x053.0.0"),
    "plain_pickle": ("plain pickle, not written by torch.save.*'epoch'", pickled(mapping(epoch=number(3)))),
    "plain_pickle_of_tensors": (
        "plain pickle, not written by torch.save",
        pickled(mapping(w=tensor(of=call(glob("torch.storage", "_load_from_bytes"), text("x"))))),
    ),
    "plain_pickle_long_number": ("truncated or damaged.*beyond", b"\x80\x04\x8b\xff\xff\xff\x7f" + bytes(40)),
    "plain_pickle_huge_bytes": (
        "truncated or damaged.*beyond",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + bytes(40),
    ),
    "plain_pickle_of_bytearrays": (
        "plain pickle, not written by torch.save",
        pickled(b"](" + call(glob("builtins", "bytearray"), number(2**31 - 1)) * 50 + b"e"),
    ),
    "plain_pickle_deep": ("plain pickle", pickled(b"N" + b"\x85" * 500_000)),
    "plain_pickle_memo_index": ("plain pickle", pickled(b"N" + b"r\x00\x00\x00\x08")),
    "plain_pickle_marks": ("truncated or damaged", b"\x80\x02" + b"(" * 500_000 + b"."),
}

for _name, (_says, _content) in _TEXTS.items():
    add(_name, _says, writer(_content))


@hostile("tar archive")
def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


# zip files


def zip_of(name: str, says: str, *members: tuple[str, bytes]) -> None:
    add(name, says, writer(zip_bytes(members)))


_GOOD = mapping(weight=tensor())

zip_of("zip_empty", "empty zip")
zip_of("zip_npz", r"numpy arrays \(.npz\)", ("weight.npy", b"\x93NUMPY"))
zip_of("zip_around", "zip archive around checkpoints.*policy.pth", ("data", b"{}"), ("policy.pth", b"x"))
zip_of("zip_other", "torch.save did not write", ("word/document.xml", b"<x/>"))
zip_of("zip_missing_pickle", "no data.pkl", ("archive/data/0", bytes(12)))
zip_of("zip_missing_storage", "storage is missing.*data/0", ("archive/data.pkl", pickled(_GOOD)))
zip_of(
    "zip_two_pickles",
    "more than one data.pkl",
    ("a/data.pkl", pickled(_GOOD)),
    ("b/data.pkl", pickled(_GOOD)),
)
zip_of(
    "zip_torchscript",
    "TorchScript.*state_dict",
    *torch_members(_GOOD),
    ("archive/constants.pkl", b"\x80\x02)."),
)
zip_of("zip_torchscript_code", "TorchScript", *torch_members(_GOOD), ("archive/code/__torch__.py", b""))
zip_of("zip_pt2", ".pt2 archive", ("m/archive_format", b"pt2"), ("m/models/model.json", b"{}"))
zip_of("zip_pt2_old", ".pt2 archive", ("serialized_exported_program.json", b"{}"))
zip_of(
    "zip_leads_out", r"leads out of it.*\.\./\.\./etc/cron", *torch_members(_GOOD), ("../../etc/cron", b"x")
)
zip_of("zip_absolute", "leads out of it", *torch_members(_GOOD), ("/etc/cron", b"x"))
zip_of(
    "zip_byte_order",
    "byte order",
    ("a/data.pkl", pickled(_GOOD)),
    ("a/byteorder", b"pdp11"),
    ("a/data/0", bytes(12)),
)
zip_of(
    "zip_storage_key_leads_out",
    r"storage is missing",
    *torch_members(mapping(w=tensor(of=storage(key="../../etc/passwd")))),
)


@hostile("compressed.*re-save with torch.save")
def zip_deflated(path: Path) -> None:
    path.write_bytes(zip_bytes(torch_members(_GOOD), zipfile.ZIP_DEFLATED))


@hostile("compressed")
def zip_bomb(path: Path) -> None:
    members = [("archive/data.pkl", pickled(_GOOD)), ("archive/data/0", bytes(50_000_000))]
    path.write_bytes(zip_bytes(members, zipfile.ZIP_DEFLATED))


def _changed(path: Path, pattern: bytes, offset: int, new: bytes, which: int = 0) -> None:
    """Write a good zip file with some bytes changed at an offset from a pattern."""
    raw = bytearray(zip_bytes(torch_members(_GOOD)))
    places = [match.start() for match in re.finditer(re.escape(pattern), bytes(raw))]
    start = places[which] + offset
    raw[start : start + len(new)] = new
    path.write_bytes(raw)


@hostile("encrypted")
def zip_encrypted(path: Path) -> None:
    _changed(path, b"PK\x01\x02", 8, b"\x01\x00")


@hostile("in the zip archive twice.*data.pkl")
def zip_duplicate(path: Path) -> None:
    raw = zip_bytes([("archive/data.pkl", pickled(_GOOD)), ("archive/data.pkX", pickled(b"N"))])
    path.write_bytes(raw.replace(b"data.pkX", b"data.pkl"))


@hostile("two sizes|beyond the file's end")
def zip_size_lie(path: Path) -> None:
    _changed(path, b"PK\x01\x02", 20, struct.pack("<II", 2**31, 2**31), which=2)


@hostile("two sizes")
def zip_two_sizes(path: Path) -> None:
    _changed(path, b"PK\x01\x02", 24, struct.pack("<I", 5), which=2)


@hostile("over the next member")
def zip_overlap(path: Path) -> None:
    _changed(path, b"PK\x01\x02", 20, struct.pack("<II", 300, 300), which=0)


@hostile("header does not say")
def zip_local_name(path: Path) -> None:
    _changed(path, b"archive/data/0", 13, b"7")


@hostile("header does not say")
def zip_local_method(path: Path) -> None:
    _changed(path, b"PK\x03\x04", 8, b"\x08\x00", which=2)


@hostile("before the zip archive's first member")
def zip_prefixed(path: Path) -> None:
    raw = zip_bytes(torch_members(_GOOD))
    path.write_bytes(raw[:60] + raw)


@hostile("checksum of archive/data.pkl does not match")
def zip_pickle_flipped(path: Path) -> None:
    _changed(path, b"weight", 0, b"W")


@hostile(r"checksum of storage 0 \(tensor weight\) does not match")
def zip_values_flipped(path: Path) -> None:
    raw = zip_bytes(torch_members(_GOOD, b"flip me, yes"))
    path.write_bytes(raw.replace(b"flip me, yes", b"flip me, yEs"))


@hostile("truncated or damaged: the zip archive's directory")
def zip_truncated(path: Path) -> None:
    raw = zip_bytes(torch_members(_GOOD, bytes(4000)))
    path.write_bytes(raw[: len(raw) // 2])


@hostile("zip directory is too long|truncated or damaged")
def zip_sparse_directory(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(3 * 2**30)
        end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, 3 * 2**30 - 2**20, 2**20, 0)
        file.write(end)


@hostile("truncated or damaged: its pickle cannot be followed")
def zip_pickle_truncated(path: Path) -> None:
    path.write_bytes(zip_bytes([("archive/data.pkl", pickled(_GOOD)[:-30]), ("archive/data/0", bytes(12))]))


# tensors that cannot be

_HUGE = 2**40
_TENSORS: dict[str, tuple[str, bytes, int]] = {
    "numel": (f"tensor weight .*fewer than {_HUGE} elements", tensor((_HUGE,), (0,)), 12),
    "numel_two": ("fewer than", tensor((2**21, 2**21), (0, 0)), 12),
    "numel_bigger": ("fewer than", tensor((2**900, 2**900), (0, 0)), 12),
    "numel_beside_zero": ("fewer than", tensor((0, 2**39, 2**39), (0, 0, 1)), 12),
    "expanded": ("at most 16 times", tensor((2**30,), (0,)), 12),
    "overlapping": ("at most 16 times", tensor((2**14, 2**14), (1, 1), of=storage(2**15)), 2**17),
    "rank": ("at most 64 dimensions", tensor([1] * 100_000, [1] * 100_000), 12),
    "rank_65": ("at most 64 dimensions", tensor([1] * 65, [1] * 65), 12),
    "too_long": ("weight.*ends within its storage's 3 elements.*0 to 4", tensor((4,)), 12),
    "offset": ("ends within its storage.*2 to 5", tensor(offset=2), 12),
    "offset_negative": ("offset of 0 or more.*-1", tensor(offset=-1), 12),
    "offset_huge": ("ends within its storage", tensor(offset=2**900), 12),
    "stride": ("ends within its storage", tensor((2,), (3,)), 12),
    "stride_huge": ("ends within its storage", tensor((2,), (2**900,)), 12),
    "stride_negative": ("strides of 0 or more.*-1", tensor((3,), (-1,), offset=2), 12),
    "size_negative": ("sizes of 0 or more.*-3", tensor((-3,), (1,)), 12),
    "strides_missing": ("as many strides as sizes.*2 sizes and 1", tensor((1, 3), (1,)), 12),
    "storage_numel": (
        "storage as long as its bytes in the file.*400 bytes instead of 12",
        tensor(of=storage(100)),
        12,
    ),
    "storage_short": ("storage as long as", tensor(of=storage(3)), 8),
    "size_text": (
        "sizes of 0 or more.*str",
        call(
            glob("torch._utils", "_rebuild_tensor_v2"),
            storage(),
            number(0),
            tup(text("3")),
            numbers([1]),
            FALSE,
            NONE,
        ),
        12,
    ),
    "size_bool": (
        "sizes of 0 or more.*bool",
        call(
            glob("torch._utils", "_rebuild_tensor_v2"),
            storage(),
            number(0),
            tup(TRUE),
            numbers([1]),
            FALSE,
            NONE,
        ),
        12,
    ),
    "shape_none": (
        "tuple of sizes",
        call(glob("torch._utils", "_rebuild_tensor_v2"), storage(), number(0), NONE, NONE, FALSE, NONE),
        12,
    ),
    "arguments": (
        "its pickle cannot be followed",
        call(glob("torch._utils", "_rebuild_tensor_v2"), storage()),
        12,
    ),
    "storage_negative": ("its pickle cannot be followed.*storage", tensor(of=storage(-3)), 12),
}
for _name, (_says, _body, _length) in _TENSORS.items():
    add(
        f"tensor_{_name}",
        _says,
        lambda path, body=_body, length=_length: write_zip(path, mapping(weight=body), bytes(length)),
    )


@hostile(r"tensor bad\\x1b\[31m\\n\\u202ekey\\ud800 must")
def escapes_in_key(path: Path) -> None:
    write_zip(path, b"}" + text("bad\x1b[31m\n\u202ekey\ud800") + tensor((4,)) + b"s")


@hostile("a key is too long.*100000 characters")
def long_key(path: Path) -> None:
    write_zip(path, b"}" + text("x" * 100_000) + tensor((4,)) + b"s")


# objects that hold no state dict

_OBJECTS: dict[str, tuple[str, bytes]] = {
    "no_tensors": ("holds no tensors.*dict with 'epoch', 'name'", mapping(epoch=number(3), name=text("x"))),
    "bare_tensor": ("holds no tensors.*one tensor without a name", tensor()),
    "tensor_list": ("holds no tensors.*list", b"](" + tensor() * 3 + b"e"),
    "only_optimizer": (
        "holds no tensors.*'optimizer'",
        mapping(
            optimizer=mapping(state=b"}" + number(0) + mapping(exp_avg=tensor()) + b"s", param_groups=b"]")
        ),
    ),
    "empty_dict": ("holds no tensors.*dict of 0", b"}"),
    "number_keys": ("holds no tensors", b"}(" + number(0) + tensor() + number(1) + tensor() + b"u"),
    "number_key": ("key is not a string", b"}(" + text("w") + tensor() + number(1) + tensor() + b"u"),
    "tuple_key": ("key is not a string.*tuple", b"}(" + text("w") + tensor() + tup(NONE) + tensor() + b"u"),
    "deep_key": (
        "key is not a string",
        b"}(" + text("w") + tensor() + b"N" + b"\x85" * 300_000 + tensor() + b"u",
    ),
    "deep": ("holds no tensors", b"]" * 300_000 + b"a" * 299_999),
    "deep_dicts": ("holds no tensors", b"}" + (text("a") + b"}") * 200_000 + b"s" * 200_000),
    "cycle": ("holds no tensors", b"}q\x00" + text("model") + b"h\x00s"),
    "billion_laughs": (
        "holds no tensors",
        b"]q\x00"
        + b"".join(
            b"](" + b"h" + bytes([i]) * 1 + (b"h" + bytes([i])) * 9 + b"eq" + bytes([i + 1])
            for i in range(200)
        ),
    ),
    "module_cycle": (
        "nested without end",
        glob("pkg", "Net")
        + b")\x81q\x00"
        + mapping(_parameters=mapping(w=tensor()), _buffers=b"}", _modules=mapping(a=b"h\x00"))
        + b"b",
    ),
    "module_laughs": (
        "nested without end",
        glob("pkg", "Net")
        + b")\x81q\x00"
        + mapping(_parameters=b"}", _buffers=b"}", _modules=b"}")
        + b"b"
        + b"".join(
            glob("pkg", "Net")
            + b")\x81q"
            + bytes([i + 1])
            + mapping(
                _parameters=b"}", _buffers=b"}", _modules=mapping(a=b"h" + bytes([i]), b=b"h" + bytes([i]))
            )
            + b"b"
            for i in range(40)
        ),
    ),
    "same_name_twice": (
        "same name",
        b"}(" + text("a.w") + tensor() + text("_orig_mod.a.w") + tensor() + b"u",
    ),
    "colliding_numbers": (
        "holds no tensors",
        b"}(" + b"".join(number(i * (2**61 - 1)) + NONE for i in range(1, 50_000)) + b"u",
    ),
}
for _name, (_says, _body) in _OBJECTS.items():
    add(f"object_{_name}", _says, lambda path, body=_body: write_zip(path, body))


# legacy files

_LEGACY = mapping(weight=tensor(of=legacy_storage()))
_LEGACY_FILES: dict[str, tuple[str, bytes]] = {
    "truncated_values": ("storage 0 ends beyond the file's end", legacy_bytes(_LEGACY)[:-5]),
    "truncated_sizes": ("storage 0 ends beyond", legacy_bytes(_LEGACY)[:-16]),
    "truncated_pickle": ("truncated or damaged: its pickle", legacy_bytes(_LEGACY)[:150]),
    "truncated_magic": ("truncated or damaged: its pickle", MAGIC),
    "protocol": (
        "magic number and protocol version",
        MAGIC + pickled(number(7)) + legacy_bytes(_LEGACY)[30:],
    ),
    "negative": ("ends beyond", legacy_bytes(_LEGACY, data=struct.pack("<q", -3) + bytes(12))),
    "huge": ("ends beyond", legacy_bytes(_LEGACY, data=struct.pack("<q", 2**60) + bytes(12))),
    "two_sizes": (
        "two sizes.*2 elements instead of 3",
        legacy_bytes(_LEGACY, data=struct.pack("<q", 2) + bytes(12)),
    ),
    "listed_twice": ("listed twice", legacy_bytes(_LEGACY, b"](" + text("0") + text("0") + b"e")),
    "not_listed": ("storage is missing", legacy_bytes(_LEGACY, b"]", b"")),
    "listed_for_nothing": ("belongs to no tensor", legacy_bytes(_LEGACY, b"](" + text("9") + b"e")),
    "keys": ("no list of names", legacy_bytes(_LEGACY, b"](" + number(0) + b"e")),
    "long_string": (
        "truncated or damaged.*beyond",
        MAGIC + pickled(number(1001)) + b"\x80\x02X\xff\xff\xff\xf0" + bytes(100),
    ),
}
for _name, (_says, _content) in _LEGACY_FILES.items():
    add(f"legacy_{_name}", _says, writer(_content))


# safetensors files

_W = {"w": entry()}
_SAFETENSORS: dict[str, tuple[str, bytes]] = {
    "header_beyond": ("header is longer", safetensors_bytes(_W, length=5000)),
    "header_huge": ("header is longer", safetensors_bytes(_W, length=2**63)),
    "header_all_ones": ("header is longer", b"\xff" * 8 + b"{}"),
    "header_truncated": ("header is longer", safetensors_bytes(_W)[:30]),
    "no_json": ("header is not JSON", safetensors_bytes(b"{w: 1}")),
    "not_utf8": ("header is not JSON", safetensors_bytes(b'{"\xff": 1}')),
    "deep_json": ("header is not JSON", safetensors_bytes(b'{"a":' + b"[" * 100_000)),
    "nan": ("header is not JSON", safetensors_bytes(b'{"w": NaN}')),
    "long_number": ("header is not JSON", safetensors_bytes(b'{"w": ' + b"9" * 10_000 + b"}")),
    "no_entry": ("dtype, a shape and data_offsets", safetensors_bytes({"w": 3})),
    "duplicate": (
        "key is in its header twice",
        safetensors_bytes(
            b'{"w":' + json.dumps(entry()).encode() + b',"w":' + json.dumps(entry()).encode() + b"}"
        ),
    ),
    "duplicate_inside": (
        "key is in its header twice",
        safetensors_bytes(b'{"w":{"dtype":"F32","dtype":"F16","shape":[3],"data_offsets":[0,12]}}'),
    ),
    "empty": ("holds no tensors", safetensors_bytes({}, b"")),
    "metadata_only": ("holds no tensors", safetensors_bytes({"__metadata__": {"format": "pt"}}, b"")),
    "beyond": (
        "truncated or hostile: tensor w .*ends within the file's 12",
        safetensors_bytes({"w": entry(0, 16, [4])}),
    ),
    "truncated": ("truncated or hostile: tensor w", safetensors_bytes(_W)[:-3]),
    "backwards": ("data_offsets in order", safetensors_bytes({"w": entry(12, 0)})),
    "negative": ("data_offsets in order", safetensors_bytes({"w": entry(-12, 0)})),
    "size": (
        "as many bytes as its shape and dtype.*12 bytes for 4",
        safetensors_bytes({"w": entry(0, 12, [4])}),
    ),
    "overlap": ("overlap", safetensors_bytes({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])})),
    "hole": ("leave a gap", safetensors_bytes({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])})),
    "hole_in_front": ("leave a gap", safetensors_bytes({"a": entry(4, 12, [2])})),
    "trailing": ("follows the last tensor.*3 bytes", safetensors_bytes(_W, bytes(15))),
    "shape_float": ("shape of at most", safetensors_bytes({"w": entry(shape=[3.0])})),
    "shape_bool": ("shape of at most", safetensors_bytes({"w": entry(shape=[True, 3])})),
    "shape_negative": ("shape of at most", safetensors_bytes({"w": entry(shape=[-3])})),
    "shape_huge": ("fewer than", safetensors_bytes({"w": entry(shape=[2**40])})),
    "shape_huge_beside_zero": ("fewer than", safetensors_bytes({"w": entry(0, 0, [0, 2**30, 2**30])}, b"")),
    "rank": ("at most 64", safetensors_bytes({"w": entry(shape=[1] * 65)})),
    "dtype": ("dtype that is text", safetensors_bytes({"w": entry(dtype=3)})),
    "escapes": (
        r"tensor a\\x1b\[31m\\u202e\\n\\ud800 must",
        safetensors_bytes({"a\x1b[31m\u202e\n\ud800": 1}),
    ),
    "same_name_twice": (
        "same name",
        safetensors_bytes({"a": entry(0, 4, [1]), "_orig_mod.a": entry(4, 12, [2])}),
    ),
}
for _name, (_says, _content) in _SAFETENSORS.items():
    add(f"safetensors_{_name}", _says, writer(_content))
