"""restore_checkpoint: what was frozen has the base's bits, all else the file's, whatever the container."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from freezekit import CheckpointError, FreezekitError, audit_checkpoint, restore_checkpoint
from freezekit.audit import restoring
from freezekit.audit.checkpoint import patching, read_checkpoint
from freezekit.audit.recasting import fits, recast
from freezekit.audit.state import TensorState

State = dict[str, Tensor]
STATS = ("running_mean", "running_var", "num_batches_tracked")


def bits(tensor: Tensor) -> bytes:
    # one element may be contiguous with any stride, but not for view()
    tensor = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape, bits(one)) == (other.dtype, other.shape, bits(other))


class Net(nn.Module):
    """Small, with what a backbone has: convolution, norms, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.bn1 = nn.BatchNorm2d(5)
        self.bn2 = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn2(self.bn1(self.conv(x)).relu()).mean((2, 3)))


def fine_tuned() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """A base, what fine-tuning its head by requires_grad=False makes of it, and the optimizer."""
    torch.manual_seed(3)
    base = zoo.scramble(Net())
    model = Net()
    model.load_state_dict(base.state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc"))
    optimizer = torch.optim.AdamW(model.fc.parameters(), lr=0.1)
    zoo.train(model, optimizer, torch.randn(4, 3, 8, 8))
    return base, model, optimizer


def save_zip(obj: object, path: Path) -> None:
    torch.save(obj, path)


def save_legacy(obj: object, path: Path) -> None:
    torch.save(obj, path, _use_new_zipfile_serialization=False)


def save_without_checksums(obj: object, path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(obj, path)
    finally:
        torch.serialization.set_crc32_options(True)


def save_aligned(obj: object, path: Path) -> None:
    from torch.utils.serialization import config

    with config.patch("save.storage_alignment", 4096):
        torch.save(obj, path)


def save_zipped_again(obj: object, path: Path) -> None:
    """As ``zip -0`` does: checksums in the headers, none behind the data."""
    torch.save(obj, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=name.endswith("0")) as member:
                member.write(data)


def save_streamed(obj: object, path: Path) -> None:
    """As into a pipe: checksums behind the data only."""
    torch.save(obj, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    class Pipe:
        def __init__(self) -> None:
            self.file = open(path, "wb")  # noqa: SIM115

        def write(self, data: bytes) -> int:
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:  # type: ignore[arg-type]
        for name, data in members.items():
            archive.writestr(name, data)
    pipe.file.close()


def save_big_endian(obj: object, path: Path) -> None:
    torch.save(obj, path)
    widths = [t.untyped_storage() and t.element_size() for t in obj.values()]  # type: ignore[attr-defined]
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            folder, _, last = name.rpartition("/")
            if last == "byteorder":
                data = b"big"
            elif folder.endswith("/data"):
                data = np.frombuffer(data, f"u{widths[int(last)]}").byteswap().tobytes()
            archive.writestr(name, data)


ZIPS = [save_zip, save_without_checksums, save_aligned, save_zipped_again, save_streamed, save_big_endian]
SAVERS: list[Callable[[State, Path], None]] = [*ZIPS, save_legacy, save_file]


def load(path: Path) -> State:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("saver", SAVERS)
def test_every_container(tmp_path: Path, saver: Callable[[State, Path], None]) -> None:
    base, model, _ = fine_tuned()
    ending = ".safetensors" if saver is save_file else ".pth"
    paths = [tmp_path / f"{name}{ending}" for name in ("drifted", "base", "out")]
    saver(dict(model.state_dict()), paths[0])
    saver(dict(base.state_dict()), paths[1])
    before = paths[0].read_bytes(), paths[1].read_bytes()
    report = restore_checkpoint(*paths)
    moved = {f"bn{n}.{stat}" for n in (1, 2) for stat in STATS}
    assert set(report.restored) == moved
    assert report.findings == ()
    assert report.before.compared == 10
    out = load(paths[2])
    assert list(out) == list(load(paths[0]))
    for name, tensor in model.state_dict().items():
        assert same(out[name], base.state_dict()[name] if name in moved else tensor), name
    assert audit_checkpoint(paths[2], paths[1]).clean
    assert not audit_checkpoint(paths[0], paths[1]).clean
    assert (paths[0].read_bytes(), paths[1].read_bytes()) == before
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
    if saver in ZIPS:
        check_zip(paths[0], paths[2], 6, checksums=saver is not save_without_checksums)


def check_zip(before: Path, after: Path, changed: int, *, checksums: bool = True) -> None:
    """So many members differ, and of the bytes around the contents only their checksums do."""
    raw = [bytearray(path.read_bytes()) for path in (before, after)]
    with zipfile.ZipFile(before) as one, zipfile.ZipFile(after) as other:
        infos = list(zip(one.infolist(), other.infolist(), strict=True))
        if checksums:
            assert other.testzip() is None
        differ = [a for a, b in infos if raw_content(raw[0], a) != raw_content(raw[1], b)]
        assert len(differ) == changed
        for a, b in infos:
            assert (a.CRC == b.CRC) == (a not in differ or not checksums)
            for data, info in ((raw[0], a), (raw[1], b)):
                blank(data, info)
    assert raw[0] == raw[1]


def start_of(raw: bytes | bytearray, info: zipfile.ZipInfo) -> int:
    return info.header_offset + 30 + sum(struct.unpack_from("<2H", raw, info.header_offset + 26))


def raw_content(raw: bytes | bytearray, info: zipfile.ZipInfo) -> bytes:
    start = start_of(raw, info)
    return bytes(raw[start : start + info.file_size])


def blank(raw: bytearray, info: zipfile.ZipInfo) -> None:
    """Zero a member's content, and its checksum wherever it is."""
    start = start_of(raw, info)
    raw[start : start + info.file_size] = bytes(info.file_size)
    if info.CRC:
        raw[:] = raw.replace(struct.pack("<I", info.CRC), bytes(4))


def test_a_real_model(tmp_path: Path) -> None:
    model = zoo.make("mobilenet_v2")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(base, tmp_path / "base.pth")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    zoo.train(model, torch.optim.SGD(parameters, lr=0.1), zoo.images("mobilenet_v2"), steps=1)
    torch.save(model.state_dict(), tmp_path / "naive.pth")
    report = restore_checkpoint(tmp_path / "naive.pth", tmp_path / "base.pth", tmp_path / "out.pth")
    assert len(report.restored) == 156
    assert str(report).startswith("RESTORED: 156 of 260 frozen tensors (52 of 52 layers with running")
    model.load_state_dict(torch.load(tmp_path / "out.pth"))
    for name, tensor in model.state_dict().items():
        assert name.startswith("classifier") != same(tensor, base[name])
    assert audit_checkpoint(tmp_path / "out.pth", tmp_path / "base.pth").clean


def test_all_else_in_the_file_stays(tmp_path: Path) -> None:
    base, model, optimizer = fine_tuned()
    checkpoint = {
        "epoch": 3,
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"lr": 0.1, "name": "größe"},
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    torch.save(base.state_dict(), tmp_path / "base.pth")
    report = restore_checkpoint(
        tmp_path / "last.ckpt", tmp_path / "base.pth", tmp_path / "out.ckpt", frozen=["bn1"]
    )
    assert set(report.restored) == {f"bn1.{stat}" for stat in STATS}
    check_zip(tmp_path / "last.ckpt", tmp_path / "out.ckpt", 3)
    out = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert list(out) == list(checkpoint)
    assert out["hyper_parameters"] == checkpoint["hyper_parameters"]
    for name, tensor in base.state_dict().items():
        due = tensor if name.startswith("bn1.") else model.state_dict()[name]
        assert same(out["state_dict"][f"model.{name}"], due), name
    assert same(
        out["optimizer_states"][0]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"]
    )


@pytest.mark.parametrize("saver", [save_zip, save_legacy])
def test_whole_modules(tmp_path: Path, saver: Callable[[object, Path], None]) -> None:
    base, model, _ = fine_tuned()
    saver(model, tmp_path / "model.pt")
    torch.save(base.state_dict(), tmp_path / "base.pth")
    restore_checkpoint(tmp_path / "model.pt", tmp_path / "base.pth", tmp_path / "out.pt")
    out = torch.load(tmp_path / "out.pt", weights_only=False)
    assert type(out) is Net
    for name, tensor in out.state_dict().items():
        assert same(tensor, (model if name.startswith("fc") else base).state_dict()[name])


@pytest.mark.parametrize("saver", [save_zip, save_legacy])
def test_parameters_and_odd_memory(tmp_path: Path, saver: Callable[[object, Path], None]) -> None:
    """Any frozen tensor is put back, where it lies in a part of a storage, and in any order."""
    whole = torch.randn(6, 8)
    drifted = {
        "a.last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "a.transposed": torch.randn(4, 6).t(),
        "a.part": whole[1:5:2, 2:7:3],
        "other": whole[0],
        "a.scalar": whole[5, 7],
        "a.none": torch.randn(0, 3),
        "a.complex": torch.randn(3, 4, dtype=torch.complex64).t(),
        "a.half": torch.randn(7).to(torch.bfloat16)[2:5],
    }
    base = {name: torch.randn_like(tensor).contiguous() for name, tensor in drifted.items()}
    saver(drifted, tmp_path / "drifted")
    save_zip(base, tmp_path / "base")
    report = restore_checkpoint(tmp_path / "drifted", tmp_path / "base", tmp_path / "out", frozen="a")
    assert set(report.restored) == {name for name in drifted if name not in ("other", "a.none")}
    out = torch.load(tmp_path / "out")
    for name, tensor in drifted.items():
        assert same(out[name], tensor if name == "other" else base[name]), name
        assert out[name].stride() == tensor.stride()
    expected = whole.clone()  # what lies between is as it was
    expected[1:5:2, 2:7:3] = base["a.part"]
    expected[5, 7] = base["a.scalar"]
    assert out["other"].untyped_storage().tolist() == expected.untyped_storage().tolist()


def tied(tmp_path: Path, base: State, drifted: State, frozen: list[str]) -> State:
    torch.save(base, tmp_path / "base")
    torch.save(drifted, tmp_path / "drifted")
    restore_checkpoint(tmp_path / "drifted", tmp_path / "base", tmp_path / "out", frozen=frozen)
    return dict(torch.load(tmp_path / "out"))


def test_shared_memory(tmp_path: Path) -> None:
    value, wrong, other = torch.randn(4), torch.randn(4), torch.randn(4)
    drifted = {"a": wrong, "b": wrong, "c": torch.randn(4)}
    with pytest.raises(
        FreezekitError,
        match=r"drifted: a frozen tensor shares its memory with one that is not frozen, .* \(got a and b\)",
    ):
        tied(tmp_path, {"a": value, "b": other, "c": drifted["c"]}, drifted, ["a"])
    with pytest.raises(
        FreezekitError, match=r"share memory in the file, but have different .* \(got b and a\)"
    ):
        tied(tmp_path, {"a": value, "b": other, "c": drifted["c"]}, drifted, ["a", "b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "drifted"]
    out = tied(tmp_path, {"a": value, "b": value, "c": drifted["c"]}, drifted, ["a", "b"])
    assert same(out["a"], value)
    assert out["a"].data_ptr() == out["b"].data_ptr()


def test_memory_that_is_only_near(tmp_path: Path) -> None:
    """Views of one storage that do not meet, or meet where nothing changes."""
    flat = torch.randn(6)
    value = torch.cat([torch.randn(2), flat[2:3]])
    drifted = {"a": flat[:3], "b": flat[2:4], "c": flat[4:]}
    out = tied(tmp_path, {**drifted, "a": value}, drifted, ["a"])
    assert same(out["a"], value)
    assert same(out["b"], flat[2:4])
    assert same(out["c"], flat[4:])


def test_an_expanded_tensor_takes_only_what_repeats(tmp_path: Path) -> None:
    drifted = {"a": torch.ones(3).expand(2, 3), "b": torch.ones(1)}
    with pytest.raises(FreezekitError, match=r"share memory in the file.*got a\)"):
        tied(tmp_path, {"a": torch.randn(2, 3), "b": torch.ones(1)}, drifted, ["a"])
    value = torch.randn(3).expand(2, 3)
    assert same(tied(tmp_path, {"a": value, "b": torch.ones(1)}, drifted, ["a"])["a"], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_takes_rounded_values(tmp_path: Path, dtype: torch.dtype) -> None:
    base, model, _ = fine_tuned()
    torch.save(base.state_dict(), tmp_path / "base")
    torch.save(model.to(dtype).state_dict(), tmp_path / "drifted")
    report = restore_checkpoint(tmp_path / "drifted", tmp_path / "base", tmp_path / "out")
    out = torch.load(tmp_path / "out")
    cast = base.to(dtype).state_dict()
    for name, tensor in model.state_dict().items():
        assert same(out[name], tensor if name.startswith("fc") else cast[name]), name
    name = str(dtype).removeprefix("torch.")
    assert f"the file has {name}: 4 tensors of the base were cast to it" in report.notes
    assert "running mean moved by up to" in report.before.findings[0].message
    # which an audit against the base in float32 still tells
    assert {finding.code for finding in report.findings} == {"FK105"}
    assert "\nverified: read again and compared bit for bit; an audit of it against" in str(report)
    assert f": FK105 are left, first FK105 bn1.weight: was recast from float32 to {name}" in str(report)


def as_state(tensor: Tensor, role: str = "parameter") -> TensorState:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorState("a", role, dtype, tuple(tensor.shape), lambda: bits(tensor))  # type: ignore[arg-type]


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_casting_is_torchs(source: torch.dtype, target: torch.dtype) -> None:
    raw = torch.randint(0, 256, (200_000, 8), dtype=torch.uint8)
    wide = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()
    near = torch.cat(
        [wide, (wide + wide.roll(1)) / 2, torch.arange(2**16).to(torch.int16).view(torch.float16)]
    )
    near = torch.cat([near, (near.half().double() + near.half().double().roll(1)) / 2])  # ties of both halves
    values = torch.cat([raw.view(source).reshape(-1), near.to(source)])
    name = str(target).removeprefix("torch.")
    stored = recast(as_state(values), name).read()
    expected = values.to(target)
    got = torch.frombuffer(bytearray(stored), dtype=target)
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert bits(got[numbers]) == bits(expected[numbers])
    assert fits(as_state(values), name) == bool((values.isfinite() == expected.isfinite()).all())


@pytest.mark.parametrize(
    ("count", "stored", "fit"),
    [
        (torch.tensor(1234), torch.float32, True),
        (torch.tensor(2**24 + 1), torch.float32, False),
        (torch.tensor(2**24 + 1), torch.float64, True),
        (torch.tensor(257), torch.bfloat16, False),
        (torch.tensor(300), torch.int8, False),
        (torch.tensor(-3), torch.int32, True),
        (torch.tensor(70_000), torch.float16, False),
        (torch.tensor(12.0), torch.int64, True),
        (torch.tensor(float("nan")), torch.int64, False),
        (torch.tensor(2**60 + 1), torch.float64, False),
    ],
)
def test_a_counter_stays_the_number_it_is(
    tmp_path: Path, count: Tensor, stored: torch.dtype, fit: bool
) -> None:
    name = "bn.num_batches_tracked"
    torch.save({name: count, "w": torch.ones(2)}, tmp_path / "base")
    torch.save({name: torch.tensor(5, dtype=stored), "w": torch.ones(2)}, tmp_path / "drifted")
    paths = tmp_path / "drifted", tmp_path / "base", tmp_path / "out"
    if fit:
        assert restore_checkpoint(*paths, frozen="bn").restored == (name,)
        assert same(torch.load(paths[2])[name], count.to(stored))
    else:
        with pytest.raises(FreezekitError, match="which cannot hold its values"):
            restore_checkpoint(*paths, frozen="bn")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s.pop("bn1.running_mean"), "bn1.running_mean: the file does not have it"),
        (lambda s: s.update({"bn1.more": torch.ones(1)}), "bn1.more: the base does not have it"),
        (
            lambda s: s.update({"bn1.running_var": torch.ones(4)}),
            r"bn1.running_var: its shape is \[5\] in the base and \[4\] in the file",
        ),
        (
            lambda s: s.update({"bn1.running_var": torch.ones(5, dtype=torch.int64)}),
            "bn1.running_var: it is float32 in the base and int64 in the file, which cannot hold",
        ),
        (
            lambda s: s.update({"bn1.running_var": torch.ones(5).to_sparse()}),
            "bn1.running_var: unsupported sparse layout",
        ),
    ],
)
def test_what_cannot_be_put_back(tmp_path: Path, change: Callable[[State], object], why: str) -> None:
    base, model, _ = fine_tuned()
    torch.save(base.state_dict(), tmp_path / "base")
    state = dict(model.state_dict())
    change(state)
    torch.save(state, tmp_path / "drifted")
    with pytest.raises(
        FreezekitError,
        match=rf"drifted: 1 frozen tensor cannot be put back, so nothing was written \(got {why}",
    ) as caught:
        restore_checkpoint(tmp_path / "drifted", tmp_path / "base", tmp_path / "out", frozen="bn*")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    names = ["bn2", "bn1.num_batches_tracked"]
    report = restore_checkpoint(tmp_path / "drifted", tmp_path / "base", tmp_path / "out", frozen=names)
    assert len(report.restored) == 4


def test_a_float_that_would_become_infinite(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([1e6])}, tmp_path / "base")
    torch.save({"a": torch.tensor([1.0], dtype=torch.float16)}, tmp_path / "drifted")
    with pytest.raises(
        FreezekitError, match="a: it is float32 in the base and float16 in the file, which cannot"
    ):
        restore_checkpoint(tmp_path / "drifted", tmp_path / "base", tmp_path / "out", frozen="a")


def test_files_without_counters(tmp_path: Path) -> None:
    """What only the base, or only the file, counts is not put back, as it is not compared."""
    base, model, _ = fine_tuned()
    without = {n: t for n, t in base.state_dict().items() if not n.endswith("tracked")}
    torch.save(without, tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "drifted")
    report = restore_checkpoint(tmp_path / "drifted", tmp_path / "base", tmp_path / "out")
    assert len(report.restored) == 4
    out = torch.load(tmp_path / "out")
    assert same(out["bn1.num_batches_tracked"], model.state_dict()["bn1.num_batches_tracked"])


def test_nothing_had_moved(tmp_path: Path) -> None:
    base, _, _ = fine_tuned()
    torch.save(base.state_dict(), tmp_path / "base")
    report = restore_checkpoint(tmp_path / "base", tmp_path / "base", tmp_path / "out")
    assert report.restored == ()
    assert (tmp_path / "out").read_bytes() == (tmp_path / "base").read_bytes()
    assert str(report).startswith(f"NOTHING HAD MOVED: 10 frozen tensors are as in {tmp_path / 'base'}\n")


def test_no_copy_is_made_where_nothing_looks_frozen(tmp_path: Path) -> None:
    base, _, _ = fine_tuned()
    state = base.state_dict()
    torch.save(state, tmp_path / "base")
    torch.save({n: t + 1 for n, t in state.items()}, tmp_path / "all")
    what = r"all: nothing counts as frozen, .* \(got inferred: 0 of 2 BN layers kept .* say what was frozen"
    with pytest.raises(FreezekitError, match=what):
        restore_checkpoint(tmp_path / "all", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_is_not_blessed(tmp_path: Path) -> None:
    """A new checksum over a storage, of which a part is put back, would hide what is wrong in the rest."""
    flat = torch.randn(5_000_000)
    torch.save({"a": flat[:3], "b": flat[3:]}, tmp_path / "drifted")
    torch.save({"a": torch.randn(3), "b": flat[3:]}, tmp_path / "base")
    raw = bytearray((tmp_path / "drifted").read_bytes())
    raw[raw.index(bits(flat[-4:])) + 3] ^= 1
    (tmp_path / "drifted").write_bytes(raw)
    with pytest.raises(CheckpointError, match="drifted: damaged: checksum of storage 0 does not match"):
        restore_checkpoint(tmp_path / "drifted", tmp_path / "base", tmp_path / "out", frozen="a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "drifted"]


def test_one_shard(tmp_path: Path) -> None:
    base, model, _ = fine_tuned()
    save_file(dict(base.state_dict()), tmp_path / "base.safetensors")
    shard = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("bn1")}
    save_file(shard, tmp_path / "model-00001-of-00002.safetensors")
    out = tmp_path / "out.safetensors"
    report = restore_checkpoint(
        tmp_path / "model-00001-of-00002.safetensors", tmp_path / "base.safetensors", out, frozen="bn*"
    )
    assert all(same(tensor, base.state_dict()[name]) for name, tensor in load_file(out).items())
    assert "not in this shard, so not put back: 4 frozen tensors" in report.notes


def test_folders_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a folder: one file at a time can be restored.*give the shard"):
        restore_checkpoint(tmp_path, tmp_path / "base", tmp_path / "out")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    base, model, _ = fine_tuned()
    torch.save(base.state_dict(), tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "drifted")
    return tmp_path / "drifted", tmp_path / "base", tmp_path / "out"


Pair = tuple[Path, Path, Path]


@pytest.mark.parametrize("how", ["same", "symlink", "hardlink", "base", "other", "folder", "dangling"])
def test_nothing_is_written_over(pair: Pair, how: str) -> None:
    drifted, base, out = pair
    target, what = out, "is there already, and nothing is written over"
    if how == "same":
        target, what = drifted, "would write over the checkpoint itself"
    elif how == "symlink":
        out.symlink_to(drifted)
        what = "would write over the checkpoint itself"
    elif how == "hardlink":
        os.link(drifted, out)
        what = "would write over the checkpoint itself"
    elif how == "base":
        target, what = base, "would write over the base"
    elif how == "folder":
        out.mkdir()
    elif how == "dangling":
        out.symlink_to("nowhere")
    else:
        out.write_bytes(b"precious")
    before = {path: path.read_bytes() for path in (drifted, base)}
    with pytest.raises(FreezekitError, match=rf"{target.name}: {what}\. Remedy: give"):
        restore_checkpoint(drifted, base, target)
    assert {path: path.read_bytes() for path in (drifted, base)} == before
    if how == "other":
        assert out.read_bytes() == b"precious"


def test_a_file_that_appears_meanwhile_is_kept(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    real = restoring._write

    def slow(*args: object) -> None:
        pair[2].write_bytes(b"precious")
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(restoring, "_write", slow)
    with pytest.raises(FreezekitError, match="is there already"):
        restore_checkpoint(*pair)
    assert pair[2].read_bytes() == b"precious"
    assert len(list(pair[2].parent.iterdir())) == 3


def test_permissions_are_kept(pair: Pair) -> None:
    os.chmod(pair[0], 0o440)
    restore_checkpoint(*pair)
    assert pair[2].stat().st_mode & 0o777 == 0o440


def raising(error: BaseException, after: int = 0) -> Callable[..., object]:
    calls = iter(range(after))

    def call(*_: object, **__: object) -> object:
        if next(calls, None) is None:
            raise error
        return None

    return call


STEPS: list[tuple[object, str]] = [
    (restoring, "copy_bytes"),
    (patching.Copy, "write"),
    (patching.Copy, "_put"),
    (patching.Copy, "mend"),
    (patching.Copy, "check"),
    (os, "fsync"),
    (os, "chmod"),
    (restoring._Plan, "verify"),
    (os, "replace"),
]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(("owner", "step"), STEPS)
def test_a_failure_at_any_step_leaves_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, owner: object, step: str, error: BaseException
) -> None:
    monkeypatch.setattr(owner, step, raising(error))
    kind = FreezekitError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind) as caught:
        restore_checkpoint(*pair)
    monkeypatch.undo()
    assert sorted(path.name for path in pair[0].parent.iterdir()) == ["base", "drifted"]
    if isinstance(error, OSError):
        assert str(caught.value) == (
            f"{pair[2]}: cannot write the restored checkpoint (got No space left on device). "
            "Remedy: make room there, or write it elsewhere"
        )
    restore_checkpoint(*pair)


def test_a_full_disk(pair: Pair) -> None:
    code = (
        "import resource, sys; from freezekit.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); main()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "restore",
        str(pair[0]),
        "--from",
        str(pair[1]),
        "-o",
        str(pair[2]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"freezekit: {pair[2]}: cannot write the restored checkpoint (got File too large)"
    )
    assert sorted(path.name for path in pair[0].parent.iterdir()) == ["base", "drifted"]


def test_killed_in_the_middle(pair: Pair) -> None:
    code = (
        "import os, sys, time\nfrom freezekit import restore_checkpoint\n"
        "os.fsync = lambda _: (print('here', flush=True), time.sleep(60))\n"
        "restore_checkpoint(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *map(str, pair)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = {path.name for path in pair[0].parent.iterdir()} - {"base", "drifted"}
    assert len(left) == 1
    assert left.pop().startswith(".out.")
    restore_checkpoint(*pair)


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_changes_meanwhile(pair: Pair, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    real = patching.copy_bytes

    def copy(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        time.sleep(0.01)
        with open(pair[which], "ab") as file:
            file.write(b"x")

    monkeypatch.setattr(restoring, "copy_bytes", copy)
    with pytest.raises(CheckpointError, match=f"{pair[which].name}: changed while reading"):
        restore_checkpoint(*pair)
    assert sorted(path.name for path in pair[0].parent.iterdir()) == ["base", "drifted"]


def test_a_copy_that_went_wrong_is_not_kept(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte anywhere, which no tensor that is compared may hold."""
    size = pair[0].stat().st_size
    real = patching.copy_bytes
    with zipfile.ZipFile(pair[0]) as archive:
        frozen = [info for info in archive.infolist() if info.filename.endswith("data/2")]
    for place in (*range(0, size, size // 20), start_of(pair[0].read_bytes(), frozen[0]) - 1):

        def copy(source: object, out: object, length: int, place: int = place) -> None:
            real(source, out, length)  # type: ignore[arg-type]
            out.seek(place)  # type: ignore[attr-defined]
            byte = out.read(1)[0]  # type: ignore[attr-defined]
            out.seek(place)  # type: ignore[attr-defined]
            out.write(bytes([byte ^ 255]))  # type: ignore[attr-defined]

        monkeypatch.setattr(restoring, "copy_bytes", copy)
        with pytest.raises(CheckpointError, match="the copy is not what was written"):
            restore_checkpoint(*pair)
    assert sorted(path.name for path in pair[0].parent.iterdir()) == ["base", "drifted"]


def test_the_slow_way_to_copy(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", raising(OSError(errno.EXDEV, "no")), raising=False)
    restore_checkpoint(*pair)
    assert audit_checkpoint(pair[2], pair[1]).clean


def test_an_archive_in_an_archive(tmp_path: Path) -> None:
    """As in a .pt2 file: both checksums are right afterwards."""
    base, model, _ = fine_tuned()
    torch.save(model.state_dict(), tmp_path / "inner")
    inner = (tmp_path / "inner").read_bytes()
    with zipfile.ZipFile(tmp_path / "outer", "w") as archive:
        archive.writestr("first", b"first")
        archive.writestr("weights.pt", inner)
        archive.writestr("last", b"last")
    raw = (tmp_path / "outer").read_bytes()
    shift = raw.index(inner)
    file = patching.SourceFile.at(str(tmp_path / "outer"))
    reader = read_checkpoint(tmp_path / "inner")["bn1.running_mean"].read
    reader.stored.file, reader.stored.offset = file, reader.stored.offset + shift  # type: ignore[attr-defined]
    (tmp_path / "out").write_bytes(raw)
    with open(tmp_path / "out", "r+b") as out:
        copy = patching.Copy(file, out)
        region = patching.Region([reader])  # type: ignore[list-item]
        region.put(reader, bits(base.state_dict()["bn1.running_mean"]))  # type: ignore[arg-type]
        copy.write(region)
        copy.mend()
        copy.check()
    with zipfile.ZipFile(tmp_path / "out") as archive:
        assert archive.testzip() is None
        (tmp_path / "new").write_bytes(archive.read("weights.pt"))
    with zipfile.ZipFile(tmp_path / "new") as archive:
        assert archive.testzip() is None
    assert same(torch.load(tmp_path / "new")["bn1.running_mean"], base.state_dict()["bn1.running_mean"])


@pytest.mark.parametrize("saver", [save_zip, save_legacy])
def test_one_of_several_states(tmp_path: Path, saver: Callable[[object, Path], None]) -> None:
    base, model, _ = fine_tuned()
    ema = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(base.state_dict(), tmp_path / "base")
    saver({"model": model.state_dict(), "ema": ema}, tmp_path / "drifted")
    for root, other in (("model", "ema"), ("ema", "model")):
        out = tmp_path / root
        report = restore_checkpoint(tmp_path / "drifted", tmp_path / "base", out, root=root)
        assert len(report.restored) == 6
        note = f"'{other}' in the file has 6 tensors of the same names that differ from the base, and stays"
        assert any(note in line for line in report.notes), report.notes
        states = torch.load(out)
        for name, tensor in model.state_dict().items():
            assert same(states[root][name], (model if name.startswith("fc") else base).state_dict()[name])
            assert same(states[other][name], tensor)
    # the same memory under two names is restored in both
    saver({"model": model.state_dict(), "ema": model.state_dict()}, tmp_path / "shared")
    report = restore_checkpoint(tmp_path / "shared", tmp_path / "base", tmp_path / "both")
    assert not any("same names" in line for line in report.notes)
    both = torch.load(tmp_path / "both")
    assert same(both["ema"]["bn1.running_mean"], base.state_dict()["bn1.running_mean"])
    assert same(both["model"]["bn1.running_mean"], base.state_dict()["bn1.running_mean"])


def test_memory_shared_with_another_state(tmp_path: Path) -> None:
    base, model, _ = fine_tuned()
    part = {"bn.running_mean": model.bn1.running_mean[:3], "bn.running_var": torch.rand(3)}
    torch.save(base.state_dict(), tmp_path / "base")
    torch.save({"model": model.state_dict(), "ema": part}, tmp_path / "drifted")
    with pytest.raises(FreezekitError, match=r"\(got bn1.running_mean and ema: bn.running_mean\)"):
        restore_checkpoint(tmp_path / "drifted", tmp_path / "base", tmp_path / "out")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_and_exported_programs(tmp_path: Path) -> None:
    base, model, _ = fine_tuned()
    torch.save(base.state_dict(), tmp_path / "base")
    torch.jit.script(model.eval()).save(tmp_path / "drifted.ts")  # type: ignore[no-untyped-call]
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, 8, 8),)), tmp_path / "drifted.pt2")
    for end in ("ts", "pt2"):
        report = restore_checkpoint(tmp_path / f"drifted.{end}", tmp_path / "base", tmp_path / f"out.{end}")
        assert len(report.restored) == 6
        with zipfile.ZipFile(tmp_path / f"out.{end}") as archive:
            assert archive.testzip() is None
    states = (
        torch.jit.load(tmp_path / "out.ts").state_dict(),
        torch.export.load(tmp_path / "out.pt2").state_dict,
    )
    for state in states:
        for name, tensor in state.items():
            assert same(tensor, (model if name.startswith("fc") else base).state_dict()[name]), name


DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.complex64,
]


@st.composite
def states(draw: st.DrawFn) -> tuple[State, State, set[str]]:
    """A base, a file whose tensors lie about in its storages, and what is frozen."""
    base: State = {}
    drifted: State = {}
    frozen = set()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    for index in range(draw(st.integers(1, 6))):
        name = f"{draw(st.sampled_from('abc'))}.{index}"
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        raw = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=generator).view(dtype)
        count = int(np.prod(shape, dtype=int))
        made = raw[draw(st.integers(0, 5)) :].clone()[:count].reshape(shape)
        if draw(st.booleans()) and shape:
            made = made.transpose(0, -1).contiguous().transpose(0, -1)
        if draw(st.booleans()):  # in a longer storage, with steps
            made = raw[:: draw(st.integers(1, 3))][:count].reshape(shape)
        drifted[name] = made
        other = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=generator).view(dtype)
        base[name] = made.clone() if draw(st.booleans()) else other[:count].reshape(shape).clone()
        if draw(st.booleans()):
            frozen.add(name)
    frozen.add(name)
    return base, drifted, frozen


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return iter(tmp_path_factory.mktemp("run") for _ in iter(int, 1))


@pytest.mark.parametrize("saver", [save_zip, save_legacy, save_without_checksums, save_file])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=states())
def test_any_state(
    folders: Iterator[Path], saver: Callable[[State, Path], None], case: tuple[State, State, set[str]]
) -> None:
    base, drifted, frozen = case
    folder = next(folders)
    if saver is save_file:
        drifted = {name: tensor.contiguous() for name, tensor in drifted.items()}
    saver(OrderedDict(drifted) if saver is not save_file else drifted, folder / "drifted.safetensors")
    torch.save(base, folder / "base")
    report = restore_checkpoint(
        folder / "drifted.safetensors", folder / "base", folder / "out", frozen=sorted(frozen)
    )
    out = load_file(folder / "out") if saver is save_file else torch.load(folder / "out")
    assert set(report.restored) == {name for name in frozen if not same(base[name], drifted[name])}
    for name, tensor in drifted.items():
        assert same(out[name], base[name] if name in frozen else tensor), name
