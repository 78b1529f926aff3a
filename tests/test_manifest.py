"""Manifest as plain data: its JSON, its file, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from damaged_json import JSON, with_another_value, with_other_text
from hypothesis import given, settings
from hypothesis import strategies as st

from freezekit import CheckpointError, FreezekitError, Manifest
from freezekit.manifest import FORMAT, MAX_BYTES, FrozenTensor, bare_name

RELAXED = settings(deadline=None, database=None)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = st.lists(TEXT, max_size=4, unique=True).map(tuple)


STATS = ("running_mean", "running_var", "num_batches_tracked")


@st.composite
def tensors(draw: st.DrawFn) -> tuple[FrozenTensor, ...]:
    stats = st.sampled_from(["bn.running_mean", "a.b.running_var", "num_batches_tracked"])
    names = draw(st.lists(TEXT.filter(bool) | stats, max_size=4, unique=True))
    made = []
    for name in names:
        own = name.rpartition(".")[2]
        role = draw(st.sampled_from(["parameter", "buffer", *([own] if own in STATS else [])]))
        digest = draw(st.none() | st.from_regex(r"[0-9a-f]{64}", fullmatch=True))
        made.append(
            FrozenTensor(
                name,
                role,
                draw(st.sampled_from(["float32", "bfloat16", "int64", "quint8"])),
                tuple(draw(st.lists(st.integers(0, 2**40), max_size=4))),
                digest,
                None if digest else draw(TEXT),
                draw(st.booleans()),
                draw(st.none() | st.sampled_from(names)),
            )
        )
    return tuple(made)


MANIFESTS = st.builds(
    Manifest,
    TEXT,
    tensors(),
    NAMES,
    st.dictionaries(st.sampled_from(["bn", "convert", "hold"]), st.none() | TEXT),
    NAMES,
    NAMES,
    st.none() | TEXT,
    TEXT,
    TEXT,
)
WEIGHT = FrozenTensor("fc.weight", "parameter", "float32", (3, 4), "0123456789abcdef" * 4)
GOOD = Manifest(
    "Net",
    (WEIGHT,),
    ("fc",),
    {"bn": "freeze", "convert": None},
    ("fc",),
    ("head",),
    "as told",
    "0.1.0",
    "2.6",
)


@RELAXED
@given(manifest=MANIFESTS)
def test_json_there_and_back(manifest: Manifest) -> None:
    text = manifest.to_json()
    assert text.isascii()
    assert Manifest.from_json(text) == manifest


@settings(RELAXED, max_examples=30)
@given(manifest=MANIFESTS)
def test_file_there_and_back(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("m") / "frozen.json"
    manifest.save(path)
    assert Manifest.load(path) == manifest
    assert Manifest.load(str(path)) == manifest


def test_json_is_what_the_format_says() -> None:
    content = json.loads(GOOD.to_json())
    assert content == {
        "freezekit_manifest": 1, "freezekit": "0.1.0", "torch": "2.6", "model": "Net",
        "choices": {"bn": "freeze", "convert": None}, "names": ["fc"], "head": ["head"], "rule": "as told",
        "layers": ["fc"],
        "tensors": [
            {
                "name": "fc.weight", "role": "parameter", "dtype": "float32", "shape": [3, 4],
                "sha256": "0123456789abcdef" * 4,
            }
        ],
    }  # fmt: skip
    assert GOOD.to_json().count("\n") == 12  # one tensor a line, so that two of them can be compared
    assert (str(GOOD), repr(GOOD)) == (
        "manifest of a Net: 1 tensor and 1 layer frozen",
        "<manifest of a Net: 1 tensor and 1 layer frozen>",
    )


@settings(RELAXED, max_examples=300)
@given(data=st.data())
def test_changed_json_is_read_or_refused(data: st.DataObject) -> None:
    read_or_refused(with_another_value(GOOD.to_json(), data))


@settings(RELAXED, max_examples=300)
@given(data=st.data())
def test_changed_text_is_read_or_refused(data: st.DataObject) -> None:
    read_or_refused(with_other_text(GOOD.to_json(), data))


@RELAXED
@given(text=st.text() | JSON.map(json.dumps))
def test_any_text_is_read_or_refused(text: str) -> None:
    read_or_refused(text)


def read_or_refused(text: str) -> None:
    try:
        manifest = Manifest.from_json(text)
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
        assert Manifest.from_json(manifest.to_json()) == manifest
    assert message.isprintable()
    assert len(message) < 600


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(GOOD.to_json()), **fields})


def with_tensor(**fields: Any) -> str:
    return changed(tensors=[{**json.loads(GOOD.to_json())["tensors"][0], **fields}])


def without(key: str) -> str:
    content = json.loads(GOOD.to_json())
    del content[key]
    return json.dumps(content)


REFUSED = [
    ("", "not JSON"),
    ("[]", "it is an object"),
    ("{}", "no 'freezekit_manifest' in it"),
    ('{"weight_map": {}}', "no 'freezekit_manifest' in it"),
    (GOOD.to_json()[:-40], "not JSON"),
    (changed(freezekit_manifest=FORMAT + 1), r"newer format \(got 2, 1 is known\). Remedy: update freezekit"),
    (changed(freezekit_manifest=0), "its format is 1"),
    (changed(freezekit_manifest=True), r"its format is 1 \(got a bool\)"),
    (changed(freezekit_manifest="1"), "its format is 1"),
    (without("layers"), "it has 'layers'"),
    (changed(extra=1), r"nothing that is not known \(got .*extra"),
    (changed(layers="fc"), "layers is a list"),
    (changed(layers=[1]), "an entry of layers is text"),
    (changed(layers=["a", "a"]), "no entry of layers is in it twice"),
    (changed(model="x" * 1001), "model is text of at most 1000"),
    (changed(model="\ud800"), "model is text"),
    (changed(choices={"speed": "fast"}), "choices has nothing that is not known"),
    (changed(choices={"bn": 3}), "bn is text"),
    (changed(tensors={}), "tensors is a list"),
    (changed(tensors=[1]), "tensor 0 is an object"),
    (changed(tensors=json.loads(GOOD.to_json())["tensors"] * 2), "no tensor is in it twice"),
    (with_tensor(name=""), "tensor 0 has a name"),
    (with_tensor(role="running_mean"), "a role that fits its name"),
    (with_tensor(role="running"), "a role that fits its name"),
    (with_tensor(dtype="float 32"), ", and a dtype"),
    (with_tensor(shape=[3, -4]), "shape is sizes"),
    (with_tensor(shape=[True]), "shape is sizes"),
    (with_tensor(shape=[2**62 + 1]), "shape is sizes"),
    (with_tensor(shape=[1] * 65), "shape is sizes"),
    (with_tensor(sha256="AB" * 32), "has a SHA-256"),
    (with_tensor(sha256=""), "has a SHA-256"),
    (with_tensor(sha256=None), "or a reason why it has none"),
    (with_tensor(reason="because"), "or a reason why it has none"),
    (with_tensor(persistent=1), "'persistent' is true or false"),
    (changed(border="yes"), "its 'border' is true or false"),
    (with_tensor(shape=[3.0]), "its numbers are whole"),
    (GOOD.to_json().replace("[3, 4]", "[NaN]"), "its numbers are whole"),
    (GOOD.to_json().replace("[3, 4]", "[-Infinity]"), "its numbers are whole"),
    (GOOD.to_json().replace("[3, 4]", f"[{'9' * 5000}]"), "its numbers are sizes"),
    (GOOD.to_json().replace('"torch"', '"model"'), "no key is in it twice"),
    ("[" * 100_000, "not JSON|it is an object"),
    ('{"freezekit_manifest": ' * 50_000, "not JSON"),
    (" " * (MAX_BYTES + 1), "too long for a manifest"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_refused(text: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        Manifest.from_json(text)
    assert caught.value.exit_code == 3


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"it is text \(got a bytes\)"):
        Manifest.from_json(GOOD.to_json().encode())  # type: ignore[arg-type]


def test_errors_show_nothing_that_acts_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(changed(**{"\x1b[31m\u202e": 1}))
    with pytest.raises(CheckpointError, match="nothing that is not known") as caught:
        Manifest.load(tmp_path / "a.json")
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: ")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (b"{\xff}", "not UTF-8"),
        (GOOD.to_json().encode("utf-16"), "a text in UTF-16, not a checkpoint"),
        (b"hello", "neither a manifest nor a checkpoint"),
        (b"<html>", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer"),
        (b"{" + b" " * MAX_BYTES + b"}", "too long for a manifest"),
        (b"[1]", "JSON, not a checkpoint"),
    ],
)
def test_files_refused(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "frozen.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        Manifest.load(path)
    assert str(caught.value).startswith(str(path))


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        Manifest.load(tmp_path / "none.json")
    with pytest.raises(CheckpointError, match="a folder in which no checkpoint was found"):
        Manifest.load(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="a FIFO"):
        Manifest.load(tmp_path / "fifo")


def test_a_byte_order_mark_is_forgiven(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(GOOD.to_json(), encoding="utf-8-sig")
    assert Manifest.load(tmp_path / "a.json") == GOOD


def test_save_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "frozen.json"
    path.write_text("old")
    GOOD.save(path)
    assert Manifest.load(path) == GOOD
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask  # as any file, for who else is to read it


def test_save_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frozen.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FreezekitError, match=r"frozen.json: cannot write .*No space left") as caught:
        GOOD.save(path)
    assert not isinstance(caught.value, CheckpointError)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_save_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FreezekitError, match="cannot write the manifest .*Remedy: give the path of a file"):
        GOOD.save(tmp_path / "none" / "frozen.json")
    with pytest.raises(FreezekitError, match="cannot write the manifest"):
        GOOD.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_save_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    GOOD.save("frozen.json")
    assert Manifest.load("frozen.json") == GOOD


def test_copies() -> None:
    assert copy.deepcopy(GOOD) == GOOD


@pytest.mark.parametrize(
    ("name", "wrapper", "bare"),
    [
        ("fc.weight", "", "fc.weight"),
        ("_orig_mod.fc.weight", "", "fc.weight"),
        ("layer1._orig_mod.weight", "", "layer1.weight"),
        ("_orig_mod", "", ""),
        ("module.fc", "", "module.fc"),
        ("module.fc", "module", "fc"),
        ("module", "module", ""),
        ("modules.fc", "module", "modules.fc"),
        ("_orig_mod.module.fc", "module", "fc"),
    ],
)
def test_bare_name(name: str, wrapper: str, bare: str) -> None:
    assert bare_name(name, wrapper) == bare
