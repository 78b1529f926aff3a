"""The report as text and as JSON."""

from __future__ import annotations

import json

import pytest

from freezekit.audit.findings import DriftReport, Finding, LayerDrift

EVIL = "a\x1b[31m\u202eb\nc"


def moved(name: str, step: int | None = None) -> LayerDrift:
    return LayerDrift(name, "BatchNorm", 4, 9, 3, 0.5, 1.5, changed=True, step=step)


def still(name: str) -> LayerDrift:
    return LayerDrift(name, "BatchNorm", 4, 9, 0, 0.0, 1.0)


def report(
    layers: list[LayerDrift], findings: list[Finding], notes: tuple[str, ...] = (), source: str = "new.pth"
) -> DriftReport:
    return DriftReport(source, "base.pth", "as given", 9, ("x",), tuple(layers), tuple(findings), notes)


def test_layers_that_moved_are_listed_and_the_others_counted() -> None:
    finding = Finding("FK101", "b", "running mean moved", "freeze it")
    lines = str(report([still("a"), moved("b"), still("c")], [finding], ("a note",))).splitlines()
    assert lines[0] == "DRIFT: 1 of 9 frozen tensors changed, 1 of 3 layers with running statistics"
    assert [line.split()[0] for line in lines if "(+" in line or line.startswith(("a ", "c "))] == ["b"]
    assert "2 other layers did not move" in lines
    assert lines[-1] == "note: a note"


def test_nothing_is_said_of_others_where_nothing_moved() -> None:
    clean = DriftReport("new.pth", "base.pth", "as given", 9, (), (still("a"), still("b")), ())
    assert str(clean).splitlines() == [
        "CLEAN: none of 9 frozen tensors changed (2 layers with running statistics)",
        "new.pth against base.pth",
        "frozen: as given (9 tensors)",
    ]


def test_findings_are_grouped_by_code_and_cut_short() -> None:
    codes = ["FK101", "FK103", "FK101", *["FK103"] * 10]
    findings = [Finding(code, f"layer{k}", "moved", f"cure of {code}") for k, code in enumerate(codes)]
    lines = [line.strip() for line in str(report([moved("layer0")], findings)).splitlines()]
    start = lines.index("FK101 running statistics moved (2)")
    assert lines[start + 1 : start + 4] == ["layer0: moved", "and 1 more", "fix: cure of FK101"]
    start = lines.index("FK103 a frozen parameter changed (11)")
    assert lines[start + 1] == "layer1: moved"
    assert lines[start + 10 : start + 13] == ["layer11: moved", "and 1 more", "fix: cure of FK103"]


def test_the_step_has_a_column() -> None:
    finding = Finding("FK101", "a", "moved", "freeze it", step=7)
    text = str(report([moved("a", 7), moved("b")], [finding]))
    rows = [line.split() for line in text.splitlines() if line.startswith(("a ", "b "))]
    assert [row[-1] for row in rows] == ["7", "-"]
    assert "a at step 7: moved" in text


def test_nothing_from_a_file_reaches_the_terminal() -> None:
    text = str(report([moved(EVIL)], [Finding("FK101", EVIL, "moved", "freeze it")], (EVIL,), EVIL))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.count("31m") == 4  # source, table, finding, note: shown, not obeyed


def test_no_line_ends_in_blanks() -> None:
    text = str(report([moved("a"), moved("bb")], [Finding("FK101", "a", "moved", "freeze it")]))
    assert all(line == line.rstrip() for line in text.splitlines())


def test_json_says_everything() -> None:
    made = report([moved("ä", 7)], [Finding("FK404", "ä", "differs", "none", step=7)], ("a note",))
    text = made.to_json()
    assert text.isascii()
    assert json.loads(text) == {
        "schema_version": 1, "clean": True, "source": "new.pth", "against": "base.pth",
        "scope": "as given", "compared": 9, "changed": ["x"], "causes": [],
        "layers": [{
            "name": "ä", "kind": "BatchNorm", "channels": 4, "num_batches_tracked": 9, "batches": 3,
            "mean_shift_sigma": 0.5, "var_ratio": 1.5, "changed": True, "step": 7,
            "timeline": {"step": [], "mean_shift_sigma": [], "var_ratio": [], "num_batches_tracked": []},
        }],
        "findings": [{
            "code": "FK404", "name": "ä", "message": "differs", "fix": "none", "step": 7, "level": "warning",
            "cause": None,
        }],
        "notes": ["a note"],
    }  # fmt: skip


def test_json_is_strict() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        report([LayerDrift("a", "BatchNorm", 4, 9, 3, float("nan"), 1.0)], []).to_json()
