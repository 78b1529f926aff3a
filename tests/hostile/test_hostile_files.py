"""Every hostile file is refused with a telling error, quickly, and nothing of it runs."""

import os
import struct
import subprocess
import sys
import time
import tracemalloc

import build_hostile as build
import pytest

from freezekit.audit.checkpoint import read_checkpoint
from freezekit.audit.checkpoint.limits import Limits
from freezekit.errors import CheckpointError


def read_all(path):
    table = read_checkpoint(path)
    for tensor in table.values():
        tensor.read()
    return table


@pytest.mark.parametrize("name", build.BUILDERS)
def test_is_refused(name, tmp_path):
    path = tmp_path / "ckpt.pt"
    build.BUILDERS[name](path)
    wall, cpu = time.perf_counter(), time.process_time()
    with pytest.raises(CheckpointError, match=build.SAYS[name]) as caught:
        read_all(path)
    assert time.process_time() - cpu < 2
    assert time.perf_counter() - wall < 10  # other tests share the cores
    assert not build.canary(path).exists()
    message = str(caught.value)
    assert message.startswith((f"{path}: ", f"{path}{os.sep}"))  # a file in a folder
    assert message.isprintable()
    assert len(message) < len(str(path)) + 600
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["reduce", "inst", "obj", "memoised_names", "getattr_of_object"])
def test_the_payloads_are_live(name, tmp_path):
    """What must not run here does run where a pickle is loaded; else an absent canary would prove nothing."""
    path = tmp_path / "a"
    if name == "getattr_of_object":
        module = build.call(build.glob("builtins", "__import__"), build.text("os"))
        system = build.call(build.glob("builtins", "getattr"), module, build.text("system"))
        path.write_bytes(build.pickled(build.call(system, build.text(f"touch '{build.canary(path)}'"))))
    else:
        build.BUILDERS[f"pickle_runs_{name}"](path)
    with pytest.raises(CheckpointError, match="nothing was executed"):
        read_all(path)
    assert not build.canary(path).exists()
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", code, path], check=False, capture_output=True, timeout=60)
    assert build.canary(path).exists()


def test_the_good_files_are_read(tmp_path):
    """Else the refusals above could have any reason."""
    good = build.mapping(weight=build.tensor())
    build.write_zip(tmp_path / "zip", good, struct.pack("<3f", 1, 2, 3))
    legacy = build.mapping(weight=build.tensor(of=build.legacy_storage()))
    (tmp_path / "legacy").write_bytes(build.legacy_bytes(legacy, data=struct.pack("<q3f", 3, 1, 2, 3)))
    safe = build.safetensors_bytes({"weight": build.entry()}, struct.pack("<3f", 1, 2, 3))
    (tmp_path / "safetensors").write_bytes(safe)
    for name in ("zip", "legacy", "safetensors"):
        assert read_checkpoint(tmp_path / name)["weight"].values().tolist() == [1, 2, 3]


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "nothing.pt")


def test_path_with_control_characters(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\\x1b\[31m\\n: no such file"):
        read_checkpoint(f"{tmp_path}/a\x1b[31m\n")


def test_path_with_nul():
    with pytest.raises(CheckpointError):
        read_checkpoint("a\0b")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = tmp_path / "secret.pt"
    build.write_zip(path, build.mapping(weight=build.tensor()))
    path.chmod(0)
    with pytest.raises(CheckpointError, match="no permission"):
        read_checkpoint(path)


def test_too_many_keys(tmp_path):
    build.write_zip(tmp_path / "a", build.mapping(**{f"k{i}": build.tensor() for i in range(101)}))
    with pytest.raises(CheckpointError, match=r"too many keys.*101, more than 100.*--no-limits reads it"):
        read_checkpoint(tmp_path / "a", limits=Limits(keys=100))
    assert len(read_checkpoint(tmp_path / "a", limits=Limits.NONE)) == 101


@pytest.mark.parametrize(
    "extra",
    [
        build.call(build.glob("builtins", "bytearray"), build.number(2**31 - 1)) * 20,
        b"Nr\x00\x00\x00\x08" * 20,
        build.call(
            build.glob("builtins", "list"), build.call(build.glob("builtins", "range"), build.number(2**40))
        ),
        build.call(build.glob("itertools", "repeat"), build.number(0), build.number(2**40)),
    ],
    ids=["bytearray", "memo index", "range", "repeat"],
)
def test_small_file_takes_little_memory(extra, tmp_path):
    body = build.mapping(weight=build.tensor(), bias=build.tensor(), more=b"(" + extra + b"l")
    build.write_zip(tmp_path / "a", body)
    tracemalloc.start()
    try:
        assert list(read_all(tmp_path / "a")) == ["weight", "bias"]
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("change", ["touched", "truncated"])
def test_changed_while_reading(change, tmp_path):
    path = tmp_path / "a"
    build.write_zip(path, build.mapping(weight=build.tensor()))
    table = read_checkpoint(path)
    if change == "touched":
        os.utime(path, ns=(0, 0))
    else:
        os.truncate(path, 100)
    with pytest.raises(CheckpointError, match="changed while reading"):
        table["weight"].read()


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_replaced_while_reading(replaced, closed, tmp_path):
    """What was opened is read to the end; where it had to be closed, nothing else is taken for it."""
    path = tmp_path / "a"
    build.write_zip(path, build.mapping(weight=build.tensor()), b"what it held")
    weight = read_checkpoint(path)["weight"]
    if closed:
        weight.read.stored.file.close()
    path.rename(tmp_path / "old")
    if replaced:
        build.write_zip(path, build.mapping(weight=build.tensor()), b"what it hold")
    if not closed:
        assert weight.read() == b"what it held"
        return
    with pytest.raises(CheckpointError, match="changed while reading" if replaced else "no such file"):
        weight.read()


def test_name_only_is_not_harm(tmp_path):
    """Naming foreign code, or a harmless type of the standard library, stops nothing."""
    more = [
        build.call(build.glob("builtins", "getattr"), build.glob("pkg.config", "Outer"), build.text("Inner")),
        build.call(build.glob("builtins", "type"), build.NONE),
        build.call(
            build.glob("operator", "getitem"), build.glob("typing", "List"), build.glob("builtins", "int")
        ),
        build.call(build.glob("datetime", "datetime"), build.text("x")),
        build.call(build.glob("pathlib", "PosixPath"), build.text("/tmp")),
        build.call(build.glob("numpy", "dtype"), build.text("f8")),
        build.call(build.glob("numpy.core.multiarray", "scalar"), build.NONE, build.NONE),
        build.call(build.glob("torch", "device"), build.text("cuda:0")),
        build.call(build.glob("logging", "getLogger"), build.text("a")),
        build.glob("torch.nn.functional", "relu"),
        build.glob("os.path", "join"),
        build.call(build.glob("pkg", "Config"), build.NONE),
    ]
    body = build.mapping(state_dict=build.mapping(weight=build.tensor()), more=b"(" + b"".join(more) + b"l")
    build.write_zip(tmp_path / "a", body)
    table = read_all(tmp_path / "a")
    assert list(table) == ["weight"]
    assert table.notes == (
        "the pickle names code outside torch: pkg.config.Outer and 1 more of pkg, os.path.join; "
        "nothing of it was imported or run",
    )
