"""Zip archives that other tools wrote again are read right, as torch reads them; odd ones are refused."""

import io
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hostile import build_hostile as build

from freezekit.audit.checkpoint import archive, read_checkpoint, zip_directory
from freezekit.audit.checkpoint.container import SourceFile
from freezekit.errors import CheckpointError

STATE = {"weight": torch.randn(5, 3).t(), "bias": torch.randn(7).half(), "n": torch.tensor(3)}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_read(path, by_torch=True):
    table = read_checkpoint(path)
    assert list(table) == list(STATE)
    for name, tensor in STATE.items():
        assert table[name].read() == bits(tensor)
    if by_torch:
        assert {name: bits(t) for name, t in torch.load(path).items()} == {
            name: bits(t) for name, t in STATE.items()
        }


def saved(path):
    torch.save(STATE, path)
    return path


def zip_of(members, change=lambda info: None, comment=b"", force_zip64=False, unseekable=False):
    buffer = io.BytesIO()
    target = Unseekable(buffer) if unseekable else buffer
    with zipfile.ZipFile(target, "w") as out:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            change(info)
            with out.open(info, "w", force_zip64=force_zip64) as member:
                member.write(data)
        out.comment = comment
    return buffer.getvalue()


class Unseekable:
    """A pipe: what is written to it is followed by data descriptors."""

    def __init__(self, target):
        self.target = target

    def write(self, data):
        return self.target.write(data)

    def flush(self):
        pass


@pytest.fixture
def members(tmp_path):
    with zipfile.ZipFile(saved(tmp_path / "original.pt")) as original:
        return {name: original.read(name) for name in original.namelist()}


def extra(info):
    info.extra = struct.pack("<HH4s", 0x5455, 4, b"time")


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"force_zip64": True},
        {"unseekable": True},
        {"unseekable": True, "force_zip64": True},
        {"change": extra},
        {"comment": b"from another tool"},
        {"comment": b"x" * 65535},
    ],
    ids=["stored", "zip64", "descriptors", "descriptors, zip64", "extra fields", "comment", "long comment"],
)
def test_written_again(how, members, tmp_path):
    (tmp_path / "a").write_bytes(zip_of(members, **how))
    # torch itself looks for a comment's end in the last 64 KB and finds nothing behind the longest ones
    assert_read(tmp_path / "a", by_torch=len(how.get("comment", b"")) < 1000)


@pytest.mark.parametrize("trailing", [b"\0" * 16, b"-----BEGIN SIGNATURE-----" + b"x" * 300])
def test_a_signature_behind_it(trailing, tmp_path):
    path = saved(tmp_path / "a")
    path.write_bytes(path.read_bytes() + trailing)
    assert_read(path)


def test_in_another_order_and_with_folders(members, tmp_path):
    turned = {"original/": b"", "original/data/": b"", **dict(reversed(members.items()))}
    (tmp_path / "a").write_bytes(zip_of(turned))
    assert_read(tmp_path / "a")


@pytest.mark.parametrize("name", ["größe.pt", "模型.pt", "a b.pt", "ü" * 60 + ".pt"])
def test_names_that_are_not_ascii(name, tmp_path):
    assert_read(saved(tmp_path / name))


@pytest.mark.parametrize("flag", [0, 0x800])
def test_names_are_bytes_whatever_the_flag_says(flag, members, tmp_path):
    raw = zip_of({name.replace("original", "größe"): data for name, data in members.items()})
    assert raw.count("größe".encode()) == 2 * len(members)
    if not flag:
        # as tools write them that know no flags: the names' bytes are the same
        at = [i for i in range(len(raw)) if raw.startswith((b"PK\x01\x02", b"PK\x03\x04"), i)]
        raw = bytearray(raw)
        for i in at:
            raw[i + (9 if raw[i + 2] == 1 else 7)] &= ~0x08
    (tmp_path / "a").write_bytes(raw)
    assert_read(tmp_path / "a")


@pytest.mark.skipif(shutil.which("zip") is None, reason="no zip here")
def test_by_info_zip(tmp_path):
    with zipfile.ZipFile(saved(tmp_path / "a.pt")) as original:
        original.extractall(tmp_path / "unpacked")
    (tmp_path / "unpacked" / "a").rename(tmp_path / "unpacked" / "größe")
    command = ["zip", "-q", "-0", "-r", tmp_path / "again.zip", "größe"]
    subprocess.run(command, cwd=tmp_path / "unpacked", check=True, timeout=60)
    assert_read(tmp_path / "again.zip")


def patched(members, pattern, offset, new, which=0):
    raw = bytearray(zip_of(members))
    at = -1
    for _ in range(which + 1):
        at = raw.index(pattern, at + 1)
    raw[at + offset : at + offset + len(new)] = new
    return bytes(raw)


ENTRY, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"
CANNOT = "directory at its end cannot be read"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((ENTRY, 8, b"\x01\x00"), "not supported: an encrypted zip archive"),
        ((ENTRY, 8, b"\x00\x20"), "not supported: an encrypted zip archive"),
        ((ENTRY, 34, b"\x01\x00"), "a zip archive in several parts.*zip -s 0"),
        ((END, 4, b"\x01\x00"), "a zip archive in several parts"),
        ((END, 6, b"\x01\x00"), "a zip archive in several parts"),
        ((END, 8, b"\x01\x00"), "a zip archive in several parts"),
        ((END, 8, b"\x01\x00\x01\x00"), f"{CANNOT}.*more entries than it counts"),
        ((END, 8, b"\xff\x00\xff\x00"), f"{CANNOT}.*entry of it is missing"),
        ((END, 12, b"\x01\x00\x00\x00"), "something comes before"),
        ((END, 16, b"\x00\x00\x00\x00"), "something comes before"),
        ((END, 16, b"\xff\xff\xff\x7f"), f"{CANNOT}.*beyond its own end"),
        ((ENTRY, 28, b"\xff\xff"), f"{CANNOT}.*cut short"),
        ((ENTRY, 0, b"PK\x01\x03"), f"{CANNOT}.*missing"),
        ((ENTRY, 42, b"\xff\xff\xff\xff"), f"{CANNOT}.*more than 4 GB"),
        ((ENTRY, 20, b"\xff\xff\xff\xff"), f"{CANNOT}.*more than 4 GB"),
        ((ENTRY, 42, b"\x05\x00\x00\x00"), "before the zip archive's first member"),
        ((ENTRY, 46, b"/"), "leads out of it"),
        ((ENTRY, 46, b"\0"), r"leads out of it .got \\x00"),
        ((LOCAL, 0, b"PK\x03\x05"), "is no checkpoint|neither"),
        ((LOCAL, 28, b"\xff\x0f"), "over the next member"),
    ],
)
def test_odd_ones(change, says, members, tmp_path):
    (tmp_path / "a").write_bytes(patched(members, *change))
    with pytest.raises(CheckpointError, match=says) as caught:
        read_checkpoint(tmp_path / "a")
    assert str(caught.value).isprintable()


def test_zip64_record_elsewhere(members, tmp_path):
    """Two readers would find two directories."""
    raw = zip_of(members)
    end = raw.index(END)
    count, size, start = struct.unpack_from("<HII", raw, end + 10)
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
    good = raw[:end] + record + struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1) + raw[end:]
    (tmp_path / "a").write_bytes(good)
    assert_read(tmp_path / "a")
    for place, disks, says in ((end - 1, 1, CANNOT), (2**63, 1, CANNOT), (end, 2, "several parts")):
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, place, disks)
        (tmp_path / "a").write_bytes(raw[:end] + record + locator + raw[end:])
        with pytest.raises(CheckpointError, match=says):
            read_checkpoint(tmp_path / "a")


def directory_of(count):
    """A zip of so many empty members, which are one and the same."""
    local = struct.pack("<4s5H3I2H", LOCAL, 20, 0, 0, 0, 33, 0, 0, 0, 8, 0)
    entry = struct.pack("<4s6H3I5H2I", ENTRY, 20, 20, 0, 0, 0, 33, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0)
    entry = bytearray(entry + bytes(8))
    body, entries = bytearray(), bytearray()
    for index in range(count):
        name = b"%08x" % index
        struct.pack_into("<I8s", entry, 42, len(body), name)
        body += local + name
        entries += entry
    start, size = len(body), len(entries)
    end = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
    end += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
    end += struct.pack("<4s4H2IH", END, 0, 0, 65535, 65535, size, start, 0)
    return bytes(body + entries + end)


MEASURED = """
import sys, time
from freezekit.audit.checkpoint import read_checkpoint
from freezekit.errors import CheckpointError
start = time.process_time()
try:
    read_checkpoint(sys.argv[1])
except CheckpointError as error:
    with open("/proc/self/status") as status:  # the maximum that getrusage tells is the parent's too
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(time.process_time() - start, peak / 1024, error)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
@pytest.mark.parametrize(
    ("count", "says"),
    [
        (1_000_000, f"zip directory is too long (got 1000000 members in 54000000 bytes, more than "
                    f"{zip_directory.MAX_MEMBERS} in {zip_directory.MAX_DIRECTORY_BYTES})"),
        (zip_directory.MAX_MEMBERS, "no data.pkl in it"),
    ],
)  # fmt: skip
def test_very_many_members(count, says, tmp_path):
    (tmp_path / "a").write_bytes(directory_of(count))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "a")]
    root = str(Path(__file__).parents[3])
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, timeout=120).stdout
    seconds, megabytes, error = out.split(" ", 2)
    assert says in error
    assert float(seconds) < 2
    assert float(megabytes) < 200


def test_what_is_unpacked_is_bounded_in_all(monkeypatch, tmp_path):
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 1000)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        for name in "abc":
            out.writestr(name, name.encode() * 400)
    (tmp_path / "a").write_bytes(buffer.getvalue())
    file = read_file(tmp_path / "a")
    with file.open() as stream:
        zipped = archive.Archive(file, stream)
        assert zipped.read("a", unpack=True) == b"a" * 400
        assert zipped.read("b", unpack=True) == b"b" * 400
        with pytest.raises(CheckpointError, match="unpacks to too much .got more than 1000 bytes"):
            zipped.read("c", unpack=True)
        with pytest.raises(CheckpointError, match="compressed zip archive"):
            zipped.read("a")
        with pytest.raises(CheckpointError, match="its a is too long .got 400 bytes, more than 399"):
            zipped.read("a", 399, unpack=True)


def read_file(path):
    return SourceFile.at(str(path))


def test_an_archive_inside_ends_where_it_ends(tmp_path):
    """A member of the inner one that lies behind its end is in the outer file, and still refused."""
    inner = build.zip_bytes([("a", b"1234")])
    at = inner.index(ENTRY)
    for raw, says in (
        (inner, None),
        (inner[: at + 20] + struct.pack("<II", 400, 400) + inner[at + 28 :], "beyond the file's end"),
        (inner[:-1], CANNOT),
    ):
        (tmp_path / "a").write_bytes(b"before" + raw + b"behind" * 100)
        file = read_file(tmp_path / "a")
        with file.open() as stream:
            if says is None:
                stored = archive.Archive(file, stream, 6, len(raw)).locate("a", "a")
                assert stored.read(0, 4, "a") == b"1234"
            else:
                with pytest.raises(CheckpointError, match=says):
                    archive.Archive(file, stream, 6, len(raw))
