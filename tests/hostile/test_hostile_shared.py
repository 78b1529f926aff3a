# ruff: noqa: E501  # tables
"""What a file names many times costs as often; and what torch makes of a tensor after it was rebuilt."""

import struct

import build_hostile as build
import numpy as np
import pytest
from build_hostile import (
    call,
    entry,
    glob,
    mapping,
    number,
    numbers,
    safetensors_bytes,
    storage,
    tensor,
    text,
)
from test_hostile_caps import measure

from freezekit import audit_checkpoint
from freezekit.audit.checkpoint import folders, read_checkpoint
from freezekit.errors import CheckpointError

_NONES = b"}(" + b"".join(text(f"p{i}") + b"N" for i in range(40_000)) + b"u"
_LONG = text("k" * 8_000_000)


def _module(parameters, modules):
    return (
        glob("pkg", "Net")
        + b")\x81"
        + mapping(_parameters=parameters, _buffers=b"}", _modules=modules)
        + b"b"
    )


def _many(first, times):
    return (
        b"}(" + text("m") + first + b"q\x01" + b"".join(text(f"m{i}") + b"h\x01" for i in range(times)) + b"u"
    )


SHARED = {
    "one optimizer under many names": lambda: mapping(weight=tensor())[:-1]
    + text("optim")
    + mapping(
        param_groups=b"](" + mapping(params=b"](" + b"".join(map(number, range(100_000))) + b"e") + b"e",
        state=b"}",
    )
    + b"q\x01"
    + b"".join(text(f"optim{i}") + b"h\x01" for i in range(3000))
    + b"u",
    "one module with many parameters": lambda: _module(b"}", _many(_module(_NONES, b"}"), 40_000)),
    "one parameter with a long name": lambda: _module(
        b"}", _many(_module(b"}(" + _LONG + tensor() + b"u", b"}"), 3000)
    ),
    "attributes of many objects": lambda: b"](" + glob("pkg", "A") + b"q\x02)\x81" + _NONES + b"q\x01b"
    + b"h\x02)\x81h\x01b" * 60_000 + b"e",
    "tensors of many objects": lambda: b"](" + tensor() + b"q\x030" + glob("pkg", "A") + b"q\x02)\x81}("
    + b"".join(text(f"k{i}") + b"h\x03" for i in range(20_000)) + b"uq\x01b" + b"h\x02)\x81h\x01b" * 60_000 + b"e",
    "a long key": lambda: b"](" + tensor() + b"q\x030" + b"}(" + _LONG + b"q\x01" + mapping(w=tensor()) + b"u"
    + (b"}(h\x01}(" + text("w") + b"h\x03uu") * 20_000 + b"e",
    "a long shape": lambda: mapping(w=call(
        glob("torch._utils", "_rebuild_sparse_tensor"), b"(" + numbers([0] * 50_000) + b"q\x01" + b"h\x01" * 30_000 + b"t"
    )),
    "a global with many dots": lambda: mapping(w=tensor(), x=glob("pkg", "F") + b"(" + glob("pkg", ".".join("b" * 450)) + b"q\x01"
    + b"h\x01" * 900_000 + b"tR"),
    "many small states": lambda: b"](" + tensor() + b"q\x010" + (b"}(" + text("w") + b"h\x01u") * 140_000 + b"e",
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_what_is_shared_costs_each_time(tmp_path, name):
    build.write_zip(tmp_path / "a", SHARED[name]())
    seconds, megabytes, said = measure(tmp_path / "a")
    assert seconds < 2
    assert megabytes < 200
    assert said is None or "\n" not in said


def _names(count):
    return ",".join(f'"{index:08x}":1.5' for index in range(count))


@pytest.mark.parametrize(
    "content",
    [
        lambda: safetensors_bytes(f'{{"__metadata__":{{{_names(900_000)}}}}}'.encode()),
        lambda: f'{{"weight_map":{{"w":"w"}},{_names(1_400_000)}}}'.encode(),
        lambda: f'{{"weight_map":{{"w":"w"}},"x":"\U0001f600{"a" * 30_000_000}"}}'.encode(),
    ],
    ids=["metadata", "index", "wide"],
)
def test_names_in_json_are_counted(tmp_path, content):
    (tmp_path / "a").write_bytes(content())
    seconds, megabytes, said = measure(tmp_path / "a")
    assert seconds < 2
    assert megabytes < 200
    assert "more than 500000)" in said or said.endswith("Remedy: check the path")


def test_scattered_values_count_with_what_lies_between(tmp_path):
    numel = 2**24
    pair = tensor((2,), (numel - 1,), of=storage(numel))
    body = b"}(" + pair + b"q\x010" + b"".join(
        text(f"l{i}.running_{stat}") + b"h\x01" for i in range(1000) for stat in ("mean", "var")
    ) + b"u"  # fmt: skip
    raw = build.legacy_bytes(body, data=struct.pack("<q", numel))
    with open(tmp_path / "a", "wb") as file:
        file.write(raw)
        file.truncate(len(raw) + 4 * numel)
    with pytest.raises(CheckpointError, match="repeat the file's bytes more than 16 times"):
        read_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("own", ["conv.weight", "bn.weight"])
def test_huge_weights_are_not_taken_whole(tmp_path, own):
    """A sparse file: the variances are 0, so that the filters before are looked at."""
    numel = 2**30
    header = {
        own: entry(0, 4 * numel, [4, numel // 4] if own == "conv.weight" else [numel]),
        "bn.running_mean": entry(4 * numel, 4 * numel + 16, [4]),
        "bn.running_var": entry(4 * numel + 16, 4 * numel + 32, [4]),
    }
    raw = safetensors_bytes(header, b"")
    with open(tmp_path / "a", "wb") as file:
        file.write(raw)
        file.truncate(len(raw) + 4 * numel + 32)
    report = audit_checkpoint(tmp_path / "a")
    assert [finding.code for finding in report.findings] == ["FK405"]


def test_comparing_holes_of_a_terabyte(tmp_path):
    numel = 2**38
    header = {"w": entry(0, 4 * numel, [numel]), "bn.running_mean": entry(4 * numel, 4 * numel + 4, [1])}
    raw = safetensors_bytes(header, b"")
    for name in ("a", "b"):
        with open(tmp_path / name, "wb") as file:
            file.write(raw)
            file.truncate(len(raw) + 4 * numel + 4)
    with pytest.raises(CheckpointError, match="most of it was never written"):
        audit_checkpoint(tmp_path / "a", against=tmp_path / "b", frozen="*")


def test_deep_names_that_disagree(tmp_path):
    prefix = "a." * 460
    header, data = {}, b""
    for index in range(1300):
        for own, value in ("mean", 1.0), ("var", 2.0):
            header[f"{prefix}{index}.running_{own}"] = entry(len(data), len(data) + 4, [1])
            data += struct.pack("<f", value)
        header[f"{prefix}{index}.num_batches_tracked"] = entry(len(data), len(data) + 8, [], "I64")
        data += struct.pack("<q", index)
    (tmp_path / "a").write_bytes(safetensors_bytes(header, data))
    (finding,) = audit_checkpoint(tmp_path / "a").findings
    assert finding.message.startswith(f"{prefix}0: 0; {prefix}1: 1; ")


def test_copies_in_a_run_are_read_once_each(tmp_path, monkeypatch):
    for index in range(30):
        for name in ("best", "epoch"):
            value = struct.pack("<3f", index, len(name), 1)
            build.write_zip(tmp_path / f"{name}_{index}.pt", mapping(w=tensor()), value)
    opened = []
    at = folders.SourceFile.at
    monkeypatch.setattr(folders.SourceFile, "at", lambda path: opened.append(path) or at(path))
    assert len(folders.find_run(tmp_path).checkpoints) == 60
    assert len(opened) == len(set(opened)) == 60


# what torch would make of it

_OTHER = tensor(of=storage(key="1"))
_DICT = mapping(data=_OTHER)
GIVEN = {
    "BUILD": tensor() + build.tup(storage(key="1"), number(0), numbers([3]), numbers([1])) + b"b",
    "BUILD of attributes": tensor() + _DICT + b"b",
    "a parameter's state": call(
        glob("torch._utils", "_rebuild_parameter_with_state"), tensor(), b"\x89", b"}", _DICT
    ),
    "a subclass's state": call(
        glob("torch._tensor", "_rebuild_from_type_v2"),
        glob("torch._utils", "_rebuild_tensor_v2"),
        glob("torch", "Tensor"),
        build.tup(storage(), number(0), numbers([3]), numbers([1]), b"\x89", b"}"),
        _DICT,
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_tensor_that_is_given_other_values_is_not_read(tmp_path, name):
    data = struct.pack("<3f", 1, 2, 3), struct.pack("<3f", 4, 5, 6)
    build.write_zip(tmp_path / "a", mapping(w=GIVEN[name]), *data)
    assert read_checkpoint(tmp_path / "a")["w"].unsupported == "tensor that is given other values once made"


def test_a_state_of_other_attributes_changes_nothing(tmp_path):
    made = call(
        glob("torch._utils", "_rebuild_parameter_with_state"), tensor(), b"\x89", b"}", mapping(tag=b"N")
    )
    build.write_zip(tmp_path / "a", mapping(w=made), struct.pack("<3f", 1, 2, 3))
    assert read_checkpoint(tmp_path / "a")["w"].read() == struct.pack("<3f", 1, 2, 3)


def test_a_storage_of_two_dtypes(tmp_path):
    """Torch gives both the first one's, so the second would be read otherwise."""
    body = mapping(a=tensor(), b=tensor(of=storage(kind="IntStorage")))
    build.write_zip(tmp_path / "a", body)
    with pytest.raises(CheckpointError, match=r"cannot be followed \(got storage 0 has two dtypes\)"):
        read_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("name", ["ARCHIVE/data.pkl", "archive/Data/0"])
def test_members_in_upper_and_lower_case(tmp_path, name):
    """Torch looks for names whatever their case, and may find the other."""
    members = [*build.torch_members(mapping(w=tensor())), (name, bytes(12))]
    (tmp_path / "a").write_bytes(build.zip_bytes(members))
    with pytest.raises(CheckpointError, match="twice, in upper and lower case|more than one data.pkl"):
        read_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    "function",
    [
        "torch.distributed TCPStore",
        "torch._C PyTorchFileWriter",
        "torch.utils.tensorboard SummaryWriter",
        "numpy DataSource",
        "pandas read_pickle",
        "joblib load",
        "requests get",
    ],
)
def test_classes_that_act(tmp_path, function):
    module, name = function.split()
    build.write_zip(tmp_path / "a", mapping(w=tensor(), x=call(glob(module, name), text("there"))))
    with pytest.raises(CheckpointError, match=f"would run {module}.{name}"):
        read_checkpoint(tmp_path / "a")


# numbers


def _bn(path, count=None, mean=(1, 2), var=(3, 4), dtype="F32"):
    tensors = {
        "bn.running_mean": (dtype, np.array(mean, "<f4")),
        "bn.running_var": (dtype, np.array(var, "<f4")),
    }
    if count is not None:
        tensors["bn.num_batches_tracked"] = count
    header, data = {}, b""
    for name, (kind, values) in tensors.items():
        raw = values.tobytes()
        header[name] = entry(len(data), len(data) + len(raw), list(values.shape), kind)
        data += raw
    path.write_bytes(safetensors_bytes(header, data))


@pytest.mark.parametrize(
    ("dtype", "kind", "value", "shown"),
    [
        ("I64", "<i8", 2**53 + 1, 2**53 + 1),
        ("I64", "<i8", 2**63 - 1, 2**63 - 1),
        ("U64", "<u8", 2**64 - 1, 2**64 - 1),
        ("F32", "<f4", 12, 12),
        ("F32", "<f4", 3.7, None),
        ("C64", "<c8", 3 + 1j, None),
    ],
)
def test_counters_are_shown_as_they_are(tmp_path, dtype, kind, value, shown):
    _bn(tmp_path / "a", (dtype, np.array(value, kind)))
    assert audit_checkpoint(tmp_path / "a").layers[0].num_batches_tracked == shown


@pytest.mark.parametrize(
    ("count", "code", "message"),
    [
        (("I64", np.array(-5, "<i8")), "FK402", "num_batches_tracked is -5"),
        (("F32", np.array(np.nan, "<f4")), "FK401", "num_batches_tracked is NaN or infinite"),
    ],
)
def test_counters_that_cannot_be(tmp_path, count, code, message):
    _bn(tmp_path / "a", count)
    report = audit_checkpoint(tmp_path / "a")
    assert [(finding.code, finding.message) for finding in report.findings] == [(code, message)]
    assert not report.clean


def test_statistics_of_two_sizes(tmp_path):
    _bn(tmp_path / "a", var=(3, 4, 5))
    (finding,) = audit_checkpoint(tmp_path / "a").findings
    assert (finding.code, finding.message) == (
        "FK105",
        "running_mean has shape [2] and running_var [3]",
    )


def test_statistics_that_are_not_judged_are_told_of(tmp_path):
    raw = bytes(8)
    header = {
        "a.running_mean": entry(0, 1, [2], "F4"),
        "a.running_var": entry(1, 2, [2], "F4"),
        "b.running_var": entry(2, 10, [2]),
    }
    (tmp_path / "a").write_bytes(safetensors_bytes(header, raw + bytes(2)))
    assert audit_checkpoint(tmp_path / "a").notes == (
        "not judged: a.running_mean (dtype F4) and 1 more",
        "not judged: b.running_var, as a layer has running_mean and running_var or neither",
    )
