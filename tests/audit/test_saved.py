"""Reports that were saved: there and back, refused where they are damaged, shown by ``freezekit audit``."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_json import with_another_value, with_other_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import freezekit
from freezekit import CheckpointError, DriftReport, Finding, FreezekitError, audit_checkpoint
from freezekit.audit.findings import CAUSES, CODES, Cause, LayerDrift, Moment

RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck))
TEXT = st.text(st.characters(), max_size=12)  # lone surrogates and control characters too
SIZE = st.integers(0, 2**63 - 1)
WHOLE = st.integers(-(10**300), 10**300) | SIZE
NUMBER = st.none() | st.floats(allow_nan=False, allow_infinity=False)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


MOMENT = st.builds(Moment, SIZE, NUMBER, NUMBER, maybe(WHOLE))
LAYER = st.builds(
    LayerDrift, TEXT, TEXT, SIZE, maybe(WHOLE), maybe(WHOLE), NUMBER, NUMBER, st.booleans(), maybe(SIZE),
    st.lists(MOMENT, max_size=3).map(tuple),
)  # fmt: skip
CAUSE = st.builds(Cause, st.sampled_from(sorted(CAUSES)), TEXT, maybe(TEXT))
FINDING = st.builds(
    Finding, st.sampled_from(sorted(CODES)), TEXT, TEXT, TEXT, maybe(SIZE), maybe(CAUSE)
)  # fmt: skip
REPORT = st.builds(
    DriftReport, TEXT, maybe(TEXT), TEXT, SIZE, st.lists(TEXT, max_size=3).map(tuple),
    st.lists(LAYER, max_size=3).map(tuple), st.lists(FINDING, max_size=4).map(tuple),
    st.lists(TEXT, max_size=2).map(tuple),
)  # fmt: skip

WHY = Cause("train-mode forward", "in train mode since train.py:31 in fit", "train.py:31 in fit")
LIVE = DriftReport(
    "Net after 9 steps", "its state when the auditor was made", "what does not require a gradient", 7,
    ("bn.running_mean", "bn.num_batches_tracked"),
    (
        LayerDrift("bn", "BatchNorm2d", 4, 16, 9, 0.25, 1.125, True, 1, (
            Moment(1, 0.03, 1.01, 8), Moment(9, 0.25, 1.125, 16),
        )),
    ),
    (Finding("FK101", "bn", "running mean moved by up to 0.25 sigma", CAUSES[WHY.kind], 1, WHY),),
    ("a note",),
)  # fmt: skip
CLEAN = replace(LIVE, changed=(), findings=(), layers=(LayerDrift("bn", "BatchNorm2d", 4, 7, 0, 0.0, 1.0),))


@RELAXED
@given(REPORT)
def test_there_and_back(report: DriftReport) -> None:
    text = report.to_json()
    assert text.isascii()
    again = DriftReport.from_json(text)
    assert again == report
    assert again.to_json() == text
    assert str(again) == str(report)
    assert all(line.isprintable() for line in str(report).splitlines())


@settings(RELAXED, max_examples=300)
@given(data=st.data())
def test_changed_json_is_read_or_refused(data: st.DataObject) -> None:
    read_or_refused(with_another_value(LIVE.to_json(), data))


@settings(RELAXED, max_examples=300)
@given(data=st.data())
def test_changed_text_is_read_or_refused(data: st.DataObject) -> None:
    read_or_refused(with_other_text(LIVE.to_json(), data))


def read_or_refused(text: str) -> None:
    try:
        report = DriftReport.from_json(text)
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
        assert DriftReport.from_json(report.to_json()) == report
        assert all(line.isprintable() for line in str(report).splitlines())
    assert message.isprintable()
    assert len(message) < 600


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(LIVE.to_json()), **fields})


def within(key: str, **fields: Any) -> str:
    return changed(**{key: [{**json.loads(LIVE.to_json())[key][0], **fields}]})


def timeline(**columns: Any) -> str:
    return within("layers", timeline={**json.loads(LIVE.to_json())["layers"][0]["timeline"], **columns})


REFUSED = [
    ("", "not a report, or a damaged one: it is not JSON"),
    ("[]", "hostile report: it must be such that it is an object"),
    ("{}", "not a freezekit report: no 'schema_version' and 'findings' in it"),
    (LIVE.to_json()[:-40], "not JSON"),
    (changed(schema_version=2), r"^made by a newer freezekit \(got schema_version 2, 1 is known\)"),
    (changed(schema_version=10**300), r"^made by a newer freezekit"),
    (changed(schema_version=0), "its schema_version is 1"),
    (changed(schema_version=True), r"its schema_version is 1 \(got a bool\)"),
    (changed(extra=1), "nothing that is not known"),
    (changed(source=None), "source is text"),
    (changed(source="x" * 100_001), "source is text of at most 100000"),
    (changed(compared=-1), "compared is a whole number from 0"),
    (changed(compared=True), "compared is a whole number from 0"),
    (changed(compared=2**63), "compared is a whole number from 0"),
    (changed(compared=1.0), "compared is a whole number from 0"),
    (changed(changed="bn"), "changed is a list"),
    (changed(notes=[1]), "an entry of notes is text"),
    (changed(clean=True), "'clean' is what its findings say"),
    (changed(clean=0), "'clean' is what its findings say"),
    (changed(causes=[]), "its causes are those of its findings"),
    (changed(findings=[1]), "finding 0 is an object"),
    (within("findings", code="FK999"), r"a code that this freezekit does not know \(got FK999\).*update"),
    (within("findings", code="nonsense"), "finding 0's code is one of freezekit's"),
    (within("findings", level="warning"), "finding 0's level is that of FK101"),
    (within("findings", step=-1), "finding 0's step is a whole number from 0"),
    (within("findings", cause="me"), "finding 0's cause is an object"),
    (within("findings", cause={"kind": "moon", "detail": "", "where": None}), "a kind that this freezekit"),
    (within("findings", cause={"kind": "write"}), "finding 0's cause has 'detail'"),
    (within("layers", changed=1), "layer 0's 'changed' is true or false"),
    (within("layers", channels=None), "layer 0's channels is a whole number"),
    (within("layers", batches=1.5), "layer 0's batches is a whole number or null"),
    (within("layers", var_ratio="1"), "layer 0's var_ratio is a number or null"),
    (within("layers", var_ratio=10**300), "layer 0's var_ratio is a number or null"),
    (within("layers", timeline=[]), "layer 0's timeline is an object"),
    (timeline(step=[1]), "the lists of layer 0's timeline are of the same length"),
    (timeline(step=[1, None]), "layer 0's timeline's step is a whole number from 0"),
    (timeline(var_ratio=3), "layer 0's timeline's var_ratio is a list"),
    (LIVE.to_json().replace("1.125", "NaN"), "its numbers are finite"),
    (LIVE.to_json().replace("1.125", "1e999"), "its numbers are finite"),
    (LIVE.to_json().replace("1.125", "1." + "0" * 500), "its numbers are finite"),
    (LIVE.to_json().replace('"compared": 7', f'"compared": {"9" * 5000}'), "its numbers are sizes"),
    (LIVE.to_json().replace('"against"', '"source"'), "no key is in it twice"),
    ("[" * 100_000, "not JSON|it is an object"),
    ('{"schema_version": ' * 50_000, "not JSON"),
    (" " * (32 * 2**20 + 1), "too long for a report"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_refused(text: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        DriftReport.from_json(text)


def test_what_cannot_be_json_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(LIVE, layers=(LayerDrift("a", "B", 1, 1, 1, math.inf, 1.0),)).to_json()


def test_save_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "drift.json"
    CLEAN.save(path)
    assert DriftReport.load(path) == CLEAN
    LIVE.save(path)
    assert DriftReport.load(path) == LIVE

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FreezekitError, match=r"drift.json: cannot write the report .*No space left"):
        CLEAN.save(path)

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CLEAN.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert DriftReport.load(path) == LIVE


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    with pytest.raises(CheckpointError, match="drift.json: no such file"):
        DriftReport.load(path)
    path.write_text('{"error": "not found"}')
    with pytest.raises(CheckpointError, match=r"drift.json: not a saved report.*report\.save\(path\)"):
        DriftReport.load(path)
    path.write_bytes(LIVE.to_json().encode() + b"\xff")
    with pytest.raises(CheckpointError, match="drift.json: not a report, or a damaged one: it is not UTF-8"):
        DriftReport.load(path)
    path.write_text(LIVE.to_json() + " " * 2**25)
    with pytest.raises(CheckpointError, match="drift.json: too long for a report"):
        DriftReport.load(path)
    path.write_text(LIVE.to_json(), encoding="utf-8-sig")
    assert DriftReport.load(path) == LIVE


# --- freezekit audit -------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "freezekit", "audit", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_a_saved_report_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    LIVE.save(path)
    done = run(path)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"{LIVE}\n"
    assert run(path, "--format", "json").stdout == LIVE.to_json()
    CLEAN.save(path)
    assert (run(path).returncode, audit_checkpoint(path)) == (0, CLEAN)
    # whatever another program did to its layout
    path.write_text(json.dumps(json.loads(LIVE.to_json()), sort_keys=True, indent=8))
    assert audit_checkpoint(path) == LIVE


@pytest.mark.parametrize("option", ["against", "frozen", "manifest"])
def test_a_saved_report_goes_alone(tmp_path: Path, option: str) -> None:
    path = tmp_path / "drift.json"
    LIVE.save(path)
    done = run(path, f"--{option}", path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line == (
        f"freezekit: {option}: a saved report is shown as it is: it has no tensors to compare. "
        "Remedy: give the report alone, or the checkpoint in its place"
    )


def test_a_report_is_no_base(tmp_path: Path) -> None:
    LIVE.save(tmp_path / "drift.json")
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pth")
    done = run(tmp_path / "a.pth", "--against", tmp_path / "drift.json")
    assert done.returncode == 3
    assert "drift.json: a saved report, not a checkpoint. Remedy: give a checkpoint here" in done.stderr


def test_a_damaged_report_exits_3(tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    path.write_text(LIVE.to_json()[:700])
    done = run(path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"freezekit: {path}: not a report, or a damaged one: it is not JSON")


def weights(**values: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = {"bn.weight": torch.rand(4), "bn.running_mean": torch.rand(4), "bn.running_var": torch.rand(4)}
    state["bn.num_batches_tracked"] = torch.tensor(16)
    return {name: tensor * values.get(name.rpartition(".")[2], 1) for name, tensor in state.items()}


@pytest.mark.parametrize("form", ["zip", "legacy", "flat", "safetensors"])
def test_a_report_inside_a_checkpoint_is_shown(tmp_path: Path, form: str) -> None:
    path = tmp_path / "ckpt"

    def write(report: DriftReport, state: dict[str, torch.Tensor]) -> None:
        text = report.to_json()
        if form == "safetensors":
            save_file(state, path, metadata={"freezekit_report": text})
        elif form == "flat":
            torch.save({**state, "freezekit_report": text}, path)
        else:
            content = {"state_dict": state, "freezekit_report": text}
            torch.save(content, path, _use_new_zipfile_serialization=form == "zip")

    write(LIVE, weights())
    report = audit_checkpoint(path)
    assert (report.findings, report.layers, report.notes) == (LIVE.findings, LIVE.layers, LIVE.notes)
    assert str(report).splitlines()[:3] == [
        "DRIFT: 2 of 7 frozen tensors changed, 1 of 1 layer with running statistics",
        f"{path} against the report inside it (Net after 9 steps)",
        "frozen: what does not require a gradient (7 tensors)",
    ]
    assert not report.clean
    # what is wrong with the file itself is told as well, whatever the run says
    write(CLEAN, weights(running_var=-1.0))
    report = audit_checkpoint(path)
    assert [finding.code for finding in report.findings] == ["FK402"]
    assert str(report).startswith("BAD: 1 finding in 1 layer with running statistics; none of 7 frozen")
    write(CLEAN, weights())
    assert run(path).returncode == 0
    # beside a question about something else it is not used, and that is said
    report = audit_checkpoint(path, against=path)
    assert report.clean
    assert any("the report of its training inside it was not used" in note for note in report.notes)


def test_a_report_and_a_manifest_inside(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    model[0].running_mean.uniform_()  # type: ignore[union-attr, operator]
    manifest = freezekit.freeze(model, "0").manifest()
    live = replace(
        LIVE,
        changed=("0.running_mean",),
        layers=(replace(LIVE.layers[0], name="0"),),
        findings=(replace(LIVE.findings[0], name="0"),),
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["0.running_mean"] += 1
    content = {
        "state_dict": state,
        "freezekit_manifest": manifest.to_json(),
        "freezekit_report": live.to_json(),
    }
    torch.save(content, tmp_path / "a.pth")
    report = audit_checkpoint(tmp_path / "a.pth")
    assert report.findings == live.findings  # the run's, which says when and why, in place of the manifest's
    assert report.changed == ("0.running_mean",)
    assert report.layers == live.layers
    assert report.against == "the manifest inside it and the report inside it (Net after 9 steps)"
    assert report.scope == "as the manifest inside it says"


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        ("{", "a.pth, the report inside it: not a report, or a damaged one"),
        (changed(schema_version=7), "a.pth, the report inside it: made by a newer freezekit"),
    ],
)
def test_a_bad_report_inside(tmp_path: Path, inside: str, says: str) -> None:
    torch.save({"state_dict": weights(), "freezekit_report": inside}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=says):
        audit_checkpoint(tmp_path / "a.pth")


def test_something_else_in_its_place(tmp_path: Path) -> None:
    torch.save({"state_dict": weights(), "freezekit_report": {"a": 1}}, tmp_path / "a.pth")
    (note,) = audit_checkpoint(tmp_path / "a.pth").notes
    assert (
        note == "its 'freezekit_report' is not text, and was not used: save auditor.report().to_json() there"
    )


def test_hostile_texts_do_not_reach_the_terminal(tmp_path: Path) -> None:
    evil = "a\x1b[31m\u202eb\nc\ud800"
    cause = Cause("write", evil, evil)
    report = DriftReport(
        evil, evil, evil, 3, (evil,),
        tuple(replace(LIVE.layers[0], name=evil * n, kind=evil * n) for n in (1, 2)),
        (Finding("FK101", evil, evil, evil, 1, cause),), (evil,),
    )  # fmt: skip
    report.save(tmp_path / "drift.json")
    done = run(tmp_path / "drift.json")
    assert done.returncode == 1
    assert all(line.isprintable() for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) < 60


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    LIVE.save(tmp_path / "drift.json")
    script = (
        "import sys; from freezekit import DriftReport; "
        f"DriftReport.load({str(tmp_path / 'drift.json')!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
