"""The report as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from sample_reports import EVERY, trend

from freezekit.audit.findings import CAUSES, Cause, CheckpointDrift, DriftReport, Finding, LayerDrift, Moment
from freezekit.report import markdown
from freezekit.report.text import render

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
    findings = [Finding(code, f"layer{k}", f"by {k}", f"cure of {code}") for k, code in enumerate(codes)]
    lines = [line.strip() for line in str(report([moved("layer0")], findings)).splitlines()]
    start = lines.index("FK101 running statistics moved (2)")
    assert lines[start + 1 : start + 4] == ["layer0: by 0", "and 1 more", "fix: cure of FK101"]
    start = lines.index("FK103 a frozen parameter changed (11)")
    assert lines[start + 1] == "layer1: by 1"
    assert lines[start + 10 : start + 13] == ["layer11: by 11", "and 1 more", "fix: cure of FK103"]


def test_what_is_said_of_many_is_said_once() -> None:
    findings = [Finding("FK403", f"block.{k}.bn", "all 0 and 1", "calibrate") for k in range(56)]
    findings.append(Finding("FK403", "head.bn", "all 0 and 1, twice", "calibrate"))
    alone = DriftReport("a.pth", None, "statistics only", 0, (), (), tuple(findings))
    lines = str(alone).splitlines()
    start = lines.index("FK403 running statistics were never trained (57)")
    assert lines[start + 1 :] == [
        "  block.0.bn, block.1.bn, block.2.bn, block.3.bn, block.4.bn, block.5.bn and 50 more: all 0 and 1",
        "  head.bn: all 0 and 1, twice",
        "  fix: calibrate",
    ]
    listed = "`, `".join(f"block.{k}.bn" for k in range(10))
    assert f"\n- `{listed}` and 46 more: all 0 and 1\n- `head.bn`: all 0" in markdown.render(alone)


def test_a_healthy_file_alone_takes_three_lines() -> None:
    layers = [replace(moved(f"layer{k}"), num_batches_tracked=9 + k % 2, changed=False) for k in range(52)]
    alone = DriftReport("a.pth", None, "statistics only", 0, (), tuple(layers), ())
    assert str(alone) == "OK: 52 layers with running statistics\na.pth\nbatches tracked: 9 to 10"
    none = replace(alone, layers=tuple(replace(layer, num_batches_tracked=None) for layer in layers))
    assert str(none) == "OK: 52 layers with running statistics\na.pth"
    few = replace(alone, layers=(layers[0], none.layers[0], layers[2]))
    assert str(few).endswith("\nbatches tracked: 9 (2 of 3 layers)")


def test_a_long_name_is_parted_after_its_dots() -> None:
    name = "resnet.encoder.stages.0.layers.0.layer.1.normalization"
    rows = render(report([moved(name)], []), width=80).splitlines()
    start = next(k for k, row in enumerate(rows) if row.startswith("resnet"))
    assert rows[start].split()[0] == "resnet.encoder.stages.0.layers.0."
    assert rows[start + 1] == "layer.1.normalization"
    assert all(len(row) <= 80 for row in rows[4:])
    assert name in render(report([moved(name)], []), width=120)


def test_the_step_has_a_column() -> None:
    finding = Finding("FK101", "a", "moved", "freeze it", step=7)
    text = str(report([moved("a", 7), moved("b")], [finding]))
    rows = [line.split() for line in text.splitlines() if line.startswith(("a ", "b "))]
    assert [row[-1] for row in rows] == ["7", "-"]
    assert "a since step 7: moved" in text


def test_nothing_from_a_file_reaches_the_terminal() -> None:
    text = str(report([moved(EVIL)], [Finding("FK101", EVIL, "moved", "freeze it")], (EVIL,), EVIL))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.count("31m") == 4  # source, table, finding, note: shown, not obeyed


def test_no_line_ends_in_blanks() -> None:
    text = str(report([moved("a"), moved("bb")], [Finding("FK101", "a", "moved", "freeze it")]))
    assert all(line == line.rstrip() for line in text.splitlines())


def test_json_says_everything() -> None:
    layer = replace(moved("ä", 7), scatter=((-0.5, 1.5), (0.25, 1.0)))
    made = report([layer], [Finding("FK404", "ä", "differs", "none", step=7, ranks=(1,))], ("a note",))
    made = replace(made, checkpoints=(CheckpointDrift("new.pth", 7, 1, 1, 0.5, None),), unit="epoch")
    assert DriftReport.from_json(made.to_json()) == made
    text = made.to_json()
    assert text.isascii()
    assert json.loads(text) == {
        "schema_version": 1, "clean": True, "source": "new.pth", "against": "base.pth",
        "scope": "as given", "compared": 9, "changed": ["x"], "causes": [],
        "layers": [{
            "name": "ä", "kind": "BatchNorm", "channels": 4, "num_batches_tracked": 9, "batches": 3,
            "mean_shift_sigma": 0.5, "var_ratio": 1.5, "changed": True, "step": 7,
            "timeline": {"step": [], "mean_shift_sigma": [], "var_ratio": [], "num_batches_tracked": []},
            "scatter": {"mean_shift_sigma": [-0.5, 0.25], "var_ratio": [1.5, 1.0]},
        }],
        "findings": [{
            "code": "FK404", "name": "ä", "message": "differs", "fix": "none", "step": 7, "level": "warning",
            "cause": None, "ranks": [1],
        }],
        "checkpoints": [{
            "source": "new.pth", "step": 7, "changed": 1, "layers": 1, "mean_shift_sigma": 0.5,
            "var_ratio": None,
        }],
        "notes": ["a note"], "unit": "epoch",
    }  # fmt: skip


def test_json_is_strict() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        report([LayerDrift("a", "BatchNorm", 4, 9, 3, float("nan"), 1.0)], []).to_json()


# --- live audits -----------------------------------------------------------------------------------------

TRAIN = Cause("train-mode forward", "in train mode since train.py:31 in fit", "train.py:31 in fit")
DECAY = Cause("weight decay", "AdamW, group 0, weight_decay=0.01", "train.py:9 in make")


def drifted(name: str, speed: float) -> LayerDrift:
    steps = range(1, 102, 10)
    moments = tuple(Moment(step, speed * step, 1 + speed * step / 10, 50 + step) for step in steps)
    return LayerDrift(name, "BatchNorm2d", 64, 151, 101, speed * 101, 1 + speed * 10.1, True, 1, moments)


def live(
    layers: list[LayerDrift], findings: list[Finding], changed: tuple[str, ...] = ("a.running_mean",)
) -> DriftReport:
    where = ("Net after 101 steps", "its state when the auditor was made", "what does not require a gradient")
    return DriftReport(*where, 9, changed, tuple(layers), tuple(findings))


def moved_by(name: str, cause: Cause, code: str = "FK101", step: int = 1) -> Finding:
    return Finding(code, name, "moved", CAUSES[cause.kind], step, cause)


def test_a_live_audit_tells_causes_and_the_course() -> None:
    layers = [
        drifted(name, speed) for name, speed in (("a", 0.003), ("b", 0.001), ("c", 0.002), ("d", 0.004))
    ]
    findings = [moved_by(layer.name, TRAIN) for layer in layers]
    findings += [moved_by(f"{name}.weight", DECAY, "FK103", step) for name, step in (("e", 7), ("f", 3))]
    report = live(layers, findings)
    assert str(report).splitlines() == [
        "DRIFT: 1 of 9 frozen tensors changed, 4 of 4 layers with running statistics",
        "Net after 101 steps against its state when the auditor was made",
        "frozen: what does not require a gradient (9 tensors)",
        "",
        "causes",
        "  train-mode forward: 4 layers since step 1",
        "    a: in train mode since train.py:31 in fit",
        "    fix: requires_grad=False does not stop running statistics; freezekit.freeze_backbone(model), or",
        "    freezekit.freeze(model, NAMES) for a part, keeps the layer in eval mode whatever model.train()",
        "    does",
        "  weight decay: 2 tensors since step 3",
        "    f.weight: AdamW, group 0, weight_decay=0.01",
        "    at train.py:9 in make",
        "    fix: freezekit.freeze_backbone(model, optimizer=optimizer) takes what is frozen out of the",
        "    optimizer; or make it from freezekit.trainable_parameters(model)",
        "",
        "layer                                     mean shift          since",
        "(BatchNorm2d)  channels  batches tracked     (sigma)  spread   step",
        "───────────────────────────────────────────────────────────────────",
        "a                    64       151 (+101)       0.303   x1.03      1",
        "b                    64       151 (+101)       0.101   x1.01      1",
        "c                    64       151 (+101)       0.202   x1.02      1",
        "d                    64       151 (+101)       0.404   x1.04      1",
        "",
        "moved furthest  at step         1     21     41     61     81    101",
        "────────────────────────────────────────────────────────────────────",
        "a               mean shift  0.003  0.063  0.123  0.183  0.243  0.303",
        "                spread         x1  x1.01  x1.01  x1.02  x1.02  x1.03",
        "                batches        +1    +21    +41    +61    +81   +101",
        "c               mean shift  0.002  0.042  0.082  0.122  0.162  0.202",
        "                spread         x1     x1  x1.01  x1.01  x1.02  x1.02",
        "                batches        +1    +21    +41    +61    +81   +101",
        "d               mean shift  0.004  0.084  0.164  0.244  0.324  0.404",
        "                spread         x1  x1.01  x1.02  x1.02  x1.03  x1.04",
        "                batches        +1    +21    +41    +61    +81   +101",
        "",
        "FK101 running statistics moved (4)",
        "  a, b, c, d since step 1: moved; cause: train-mode forward",
        "",
        "FK103 a frozen parameter changed (2)",
        "  e.weight since step 7: moved; cause: weight decay",
        "  f.weight since step 3: moved; cause: weight decay",
    ]
    assert all(len(line) <= 80 for line in render(report, width=80).splitlines()[3:])


def test_a_resnet_50_is_a_page() -> None:
    names = [
        f"layer{stage}.{block}.downsample.{n}"
        for stage in range(1, 5)
        for block in range(4)
        for n in range(3)
    ]
    report = live([drifted(name, 0.001) for name in names], [moved_by(name, TRAIN) for name in names])
    for width in (80, 100):
        lines = render(report, width=width).splitlines()
        assert len(lines) < len(names) + 35
        assert all(len(line) <= width for line in lines)
        # each layer on a line of its own
        assert [line.split()[0] for line in lines if "(+101)" in line] == names


def test_a_hostile_number_of_layers_is_cut() -> None:
    lines = str(report([moved(f"n{k}") for k in range(503)], [])).splitlines()
    assert sum("(+3)" in line for line in lines) == 500
    assert "and 3 more: the JSON lists them" in lines


def test_a_fix_that_is_no_cause_s_is_told_under_its_code() -> None:
    unfreeze = Finding("FK103", "w", "changed", "make a new DriftAuditor", 2, DECAY)
    lines = [line.strip() for line in str(live([], [unfreeze, moved_by("v", DECAY, "FK103")])).splitlines()]
    assert lines.count("fix: make a new DriftAuditor") == 1
    assert sum(line.startswith("fix: ") for line in lines) == 2


def test_layers_that_did_not_move_or_only_once_have_no_course() -> None:
    once = LayerDrift("a", "BatchNorm", 4, 9, 1, 0.1, 1.0, True, 1, (Moment(1, 0.1, 1.0, 9),))
    assert "at step  " not in str(live([once], [moved_by("a", TRAIN)]))
    alone = str(live([drifted("a", 0.1)], [moved_by("a", TRAIN)])).splitlines()
    assert any(line.startswith("timeline  at step") for line in alone)


def test_a_layer_without_a_counter_that_moved_later() -> None:
    moments = tuple(Moment(step, None, 0.5, None) for step in (40, 80))
    late = LayerDrift("a", "Custom", 4, None, None, None, 0.5, True, 40, moments)
    lines = str(live([late, drifted("b", 0.001)], [moved_by("a", TRAIN)])).splitlines()
    row = next(k for k, line in enumerate(lines) if line.startswith("a ") and "mean shift" in line)
    assert lines[row].split() == ["a", "mean", "shift", *"------"]
    assert lines[row + 1].split() == ["spread", "-", "-", "x0.5", "x0.5", "x0.5", "x0.5"]
    assert lines[row + 2].startswith("b ")


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        (["FK106"], "CLEAN: none of 9 frozen tensors changed (1 layer with running statistics), 1 warning"),
        (
            ["FK202"] * 2,
            "CLEAN: none of 9 frozen tensors changed (1 layer with running statistics), 2 warnings",
        ),
        (["FK203"], "BAD: 1 finding; none of 9 frozen tensors changed"),
        (
            ["FK106", "FK201", "FK203"],
            "BAD: 2 findings and 1 warning; none of 9 frozen tensors changed",
        ),
        (
            ["FK103", "FK106"],
            "DRIFT: 1 of 9 frozen tensors changed, 0 of 1 layer with running statistics, 1 warning",
        ),
    ],
)
def test_verdicts_with_warnings(codes: list[str], says: str) -> None:
    findings = [Finding(code, f"t{n}", "seen", "fix it", 1) for n, code in enumerate(codes)]
    changed = tuple(finding.name for finding in findings if finding.code.startswith("FK1"))
    assert str(live([still("a")], findings, changed)).splitlines()[0] == says


def test_verdicts_of_files_with_warnings() -> None:
    odd = Finding("FK404", "a", "differs", "none")
    alone = DriftReport("a.pth", None, "", 0, (), (still("a"),), (odd,))
    assert str(alone).startswith("OK: 1 layer with running statistics, 1 warning\n")
    bad = DriftReport(
        "a.pth", None, "", 0, (), (still("a"),), (odd, Finding("FK402", "a", "negative", "fix"))
    )
    assert str(bad).startswith("BAD: 1 finding and 1 warning in 1 layer with running statistics\n")


def test_a_finding_tells_its_cause_once() -> None:
    finding = moved_by("a", DECAY)
    assert str(finding) == (
        "FK101 a at step 1: moved; "
        "cause: weight decay (AdamW, group 0, weight_decay=0.01, train.py:9 in make)"
    )
    told = Finding("FK101", "a", f"moved; cause: {TRAIN}", "", 1, TRAIN)
    assert (
        str(told)
        == "FK101 a at step 1: moved; cause: train-mode forward (in train mode since train.py:31 in fit)"
    )
    assert str(Finding("FK101", "a", "moved", "")) == "FK101 a: moved"


def test_by_cause_counts_layers_tensors_steps_and_places() -> None:
    other = Cause("weight decay", "SGD, group 1", "train.py:12 in make")
    findings = [
        Finding("FK101", "bn", "moved", "", 4, TRAIN),
        Finding("FK103", "w", "changed", "", 9, DECAY),
        Finding("FK103", "v", "changed", "", 2, other),
        Finding("FK203", "", "differs", "", 9, DECAY),
        Finding("FK401", "bn", "NaN", ""),
        Finding("FK105", "u", "gone", "", None, Cause("unknown")),
    ]
    report = live([], findings)
    assert list(report.by_cause) == ["weight decay", "train-mode forward", "unknown"]
    decay = report.by_cause["weight decay"]
    assert (decay.findings, decay.layers, decay.tensors, decay.step) == (3, 1, 2, 2)
    assert decay.places == ("train.py:9 in make", "train.py:12 in make")
    assert decay.example is findings[2]
    assert decay.fix == CAUSES["weight decay"]
    assert report.by_cause["unknown"].step is None
    assert live([], findings[4:5]).by_cause == {}
    lines = [line.strip() for line in str(report).splitlines()]
    assert "weight decay: 1 layer and 2 tensors since step 2" in lines
    assert "at train.py:9 in make, train.py:12 in make" in lines
    assert "unknown: 1 tensor" in lines


def test_json_says_causes_and_the_course() -> None:
    content = json.loads(live([drifted("a", 0.1)], [moved_by("a", TRAIN)]).to_json())
    assert content["causes"] == [{
        "kind": "train-mode forward", "findings": 1, "layers": 1, "tensors": 0, "step": 1,
        "places": ["train.py:31 in fit"],
        "example": {"name": "a", "detail": TRAIN.detail, "where": TRAIN.where},
        "fix": CAUSES["train-mode forward"],
    }]  # fmt: skip
    assert content["findings"][0]["cause"] == {
        "kind": TRAIN.kind,
        "detail": TRAIN.detail,
        "where": TRAIN.where,
    }
    course = content["layers"][0]["timeline"]
    assert course["step"] == list(range(1, 102, 10))
    assert course["num_batches_tracked"] == [50 + step for step in course["step"]]
    assert course["mean_shift_sigma"][-1] == pytest.approx(10.1)


# --- a run of checkpoints --------------------------------------------------------------------------------


def test_a_run_is_told_checkpoint_by_checkpoint() -> None:
    lines = render(trend(3)).splitlines()
    assert lines[:14] == [
        "DRIFT: 6 of 15 frozen tensors changed, 2 of 3 layers with running statistics, "
        "since step 300 (3 of 5 checkpoints)",
        "run/step-500.ckpt against base.pth",
        "frozen: as given (15 tensors)",
        "",
        "                     tensors  layers  mean shift",
        "checkpoint     step  changed   moved     (sigma)  spread",
        "────────────────────────────────────────────────────────",
        "step-100.ckpt   100        0       0           0      x1",
        "step-200.ckpt   200        0       0           0      x1",
        *lines[9:12],
        "drift began between step 200 and step 300",
        "",
    ]
    shifts = [layer.timeline[-1].mean_shift_sigma for layer in trend(3).layers if layer.changed]
    assert lines[11].split() == [
        "step-500.ckpt",
        "500",
        "6",
        "2",
        f"{max(filter(None, shifts)):.3g}",
        "x1.25",
    ]
    head = next(line for line in lines if line.startswith("moved furthest"))
    assert head.split() == ["moved", "furthest", "at", "step", "100", "200", "300", "400", "500"]


@pytest.mark.parametrize(
    ("unit", "first", "says", "since"),
    [
        (
            "step",
            0,
            "drift began at or before step 100, the first of these checkpoints",
            "since step 100 (5 of 5",
        ),
        ("epoch", 3, "drift began between epoch 300 and epoch 400", "since epoch 400 (2 of 5"),
        ("checkpoint", 4, "drift began between checkpoint 4 and checkpoint 5", "since checkpoint 5 (1 of 5"),
    ],
)
def test_when_drift_began(unit: str, first: int, says: str, since: str) -> None:
    lines = render(trend(unit=unit, first=first)).splitlines()
    assert says in lines
    assert since in lines[0]
    assert any(f"since\n{unit}".split()[1] in line.split() for line in lines)


def test_a_clean_run() -> None:
    run = tuple(CheckpointDrift(f"run/{k}.pth", k, 0, 0, 0.0, 1.0) for k in (1, 2, 3))
    clean = DriftReport("run/3.pth", "b.pth", "as given", 9, (), (still("a"),), (), (), run, "epoch")
    lines = str(clean).splitlines()
    assert (
        lines[0]
        == "CLEAN: none of 9 frozen tensors changed in 3 checkpoints (1 layer with running statistics)"
    )
    assert not any("began" in line for line in lines)
    assert [line.split()[0] for line in lines[-3:]] == ["1.pth", "2.pth", "3.pth"]


def test_a_long_run_is_thinned() -> None:
    lines = render(trend(checkpoints=100)).splitlines()
    rows = [line for line in lines if line.startswith("step-")]
    assert len(rows) == 30
    assert rows[0].split()[1] == "100"
    assert rows[-1].split()[1] == "10000"
    assert "and 70 between them: the JSON lists them" in lines


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("kind", ["alone", "drift", "live", "trend"])
def test_tables_fit_and_no_number_is_cut(width: int, kind: str) -> None:
    text = render(EVERY[kind](), width=width)
    body = text.split("\n\n", 1)[1]
    assert all(len(line) <= width for line in body.splitlines())
    assert "…" not in body
