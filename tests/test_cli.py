"""The command line as a user meets it: a process, its two streams and its exit code."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
import zoo
from click.testing import CliRunner

import freezekit
import freezekit.cli


def run(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "freezekit", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "100", **env}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """A fine-tuned file whose 'frozen' BN layers drifted, and the file it started from."""
    model = zoo.make("resnet18")
    torch.save(model.state_dict(), tmp_path / "base.pth")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc"))
    zoo.train(model, torch.optim.SGD(freezekit.trainable_parameters(model), lr=0.1), zoo.images("resnet18"))
    torch.save(model.state_dict(), tmp_path / "drifted.pth")
    return tmp_path / "drifted.pth", tmp_path / "base.pth"


def test_drift_exits_1_and_lists_the_layers(checkpoints: tuple[Path, Path]) -> None:
    done = run("audit", checkpoints[0], "--against", checkpoints[1])
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "DRIFT: 60 of 100 frozen tensors changed, 20 of 20 layers with running statistics"
    assert (
        sum(bool(re.match(r"(bn1|layer\d.*) +\d+ +\d+ \(\+3\) +[\d.]+ +x[\d.]+$", line)) for line in lines)
        == 20
    )
    assert "layer4.1.bn2" in done.stdout
    assert "fix: requires_grad=False does not stop running statistics" in done.stdout


def test_clean_exits_0(checkpoints: tuple[Path, Path]) -> None:
    done = run("audit", checkpoints[1], "--against", checkpoints[1])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("CLEAN: none of 100 frozen tensors changed")


def test_alone_a_healthy_file_is_told_in_short(checkpoints: tuple[Path, Path]) -> None:
    done = run("audit", checkpoints[1])
    assert done.returncode == 0
    state = torch.load(checkpoints[1])
    counts = [int(t) for name, t in state.items() if name.endswith("num_batches_tracked")]
    first, path, counted, *_ = done.stdout.splitlines()
    assert first.startswith("OK: 20 layers with running statistics")
    assert (path, counted) == (str(checkpoints[1]), f"batches tracked: {min(counts)} to {max(counts)}")
    # nobody reads a list of what is as it should be
    assert not any(line.startswith("layer1.0.bn1") for line in done.stdout.splitlines())
    layers = json.loads(run("audit", checkpoints[1], "--format", "json").stdout)["layers"]
    assert (layers[0]["name"], layers[0]["channels"], layers[0]["num_batches_tracked"]) == (
        "bn1",
        64,
        int(state["bn1.num_batches_tracked"]),
    )


def test_json(checkpoints: tuple[Path, Path]) -> None:
    done = run("audit", checkpoints[0], "--against", checkpoints[1], "--format", "json")
    assert done.returncode == 1
    content = json.loads(done.stdout)
    assert len(content["findings"]) == 20
    assert content["layers"][0]["name"] == "bn1"


def test_frozen_is_repeatable(checkpoints: tuple[Path, Path]) -> None:
    common = ("audit", checkpoints[0], "--against", checkpoints[1], "--format", "json")
    content = json.loads(run(*common, "--frozen", "bn1", "--frozen", "layer1.0.*").stdout)
    assert {f["name"] for f in content["findings"]} == {"bn1", "layer1.0.bn1", "layer1.0.bn2"}
    assert run(*common, "--frozen", "conv1").returncode == 0


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "Traceback" not in line
    return line


def test_wrong_usage_exits_2(checkpoints: tuple[Path, Path]) -> None:
    assert run("audit").returncode == 2
    assert "Missing argument 'CKPT...'" in run("audit").stderr
    line = one_line(run("audit", checkpoints[0], "--frozen", "bn1"), 2)
    assert line.startswith("freezekit: frozen: there is nothing to compare")
    line = one_line(run("audit", checkpoints[0], "--against", checkpoints[1], "--frozen", "layr1"), 2)
    assert line.startswith(
        "freezekit: frozen: no layer or tensor matches (got 'layr1'). Remedy: did you mean 'layer1'"
    )


def hostile() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "build_hostile", Path(__file__).parent / "hostile" / "build_hostile.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("builder", "says"),
    [
        ("zip_runs_load_from_bytes", "nothing was executed"),
        ("legacy_runs_in_facts", "nothing was executed"),
        ("text_pickle_runs", "nothing was executed"),
        ("zip_truncated", "truncated|damaged"),
        ("empty", "empty"),
        ("lfs_pointer", "git-LFS pointer"),
        ("directory", "no checkpoint was found"),
        ("fifo", "not a regular file"),
    ],
)
def test_files_that_cannot_be_read_exit_3(tmp_path: Path, builder: str, says: str) -> None:
    build = hostile()
    path = tmp_path / "file.pth"
    build.BUILDERS[builder](path)
    start = time.monotonic()
    line = one_line(run("audit", path), 3)
    assert time.monotonic() - start < 10
    assert re.search(says, line), line
    assert str(path) in line
    assert "Remedy: " in line
    assert not build.canary(path).exists()


def test_a_missing_file_exits_3(tmp_path: Path) -> None:
    line = one_line(run("audit", tmp_path / "none.pth"), 3)
    assert line == f"freezekit: {tmp_path / 'none.pth'}: no such file. Remedy: check the path"


def test_key_names_cannot_reach_the_terminal(tmp_path: Path) -> None:
    evil = "a\x1b[31m\u202eb\n[bold]c"
    stats = {"running_mean": torch.zeros(2), "running_var": torch.full((2,), -2.0)}
    torch.save({f"{evil}.{name}": value for name, value in stats.items()}, tmp_path / "a.pth")
    out = run("audit", tmp_path / "a.pth", COLUMNS="200").stdout
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[bold]c" in out  # shown, not interpreted
    json.loads(run("audit", tmp_path / "a.pth", "--format", "json").stdout)


@pytest.mark.parametrize("form", ["table", "json"])
@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_a_reader_that_stops_early_does_not_change_the_verdict(
    checkpoints: tuple[Path, Path], form: str, reader: str
) -> None:
    drifted, base = checkpoints
    for path, code in ((base, 0), (drifted, 1)):
        command = f"{sys.executable} -m freezekit audit {path} --against {base} --format {form} | {reader}"
        script = f"{command}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, "")


def test_a_full_disk_is_no_traceback(checkpoints: tuple[Path, Path]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "freezekit", "audit", checkpoints[1]]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("freezekit: stdout: cannot write the report (got No space left on device)")


def test_odd_terminals(tmp_path: Path) -> None:
    stats = {"running_mean": torch.zeros(2), "running_var": torch.full((2,), 2.0)}
    torch.save({f"größe.{name}": value for name, value in stats.items()}, tmp_path / "a.pth")
    for env in ({"COLUMNS": "0"}, {"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "10"}, {"NO_COLOR": "1"}):
        done = run("audit", tmp_path / "a.pth", **env)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("OK: 1 layer with running statistics\n")


def test_statistics_of_odd_shapes(tmp_path: Path) -> None:
    odd = {"bn.running_mean": torch.zeros(3), "bn.running_var": torch.full((2,), 2.0)}
    even = {
        "bn.running_mean": torch.zeros(3),
        "bn.running_var": torch.full((3,), 2.0),
        "bn.weight": torch.ones(3),
    }
    torch.save(odd, tmp_path / "odd.pth")
    torch.save(even, tmp_path / "even.pth")
    alone = run("audit", tmp_path / "odd.pth")
    assert (alone.returncode, alone.stderr) == (1, "")
    assert "bn: running_mean has shape [3] and running_var [2]" in alone.stdout
    assert run("audit", tmp_path / "odd.pth", "--against", tmp_path / "odd.pth").returncode == 0
    torch.save({**odd, "bn.weight": torch.zeros(3)}, tmp_path / "trained.pth")
    done = run("audit", tmp_path / "trained.pth", "--against", tmp_path / "even.pth")
    assert (done.returncode, done.stderr) == (0, "")


def test_no_torch_is_imported(checkpoints: tuple[Path, Path]) -> None:
    for arguments in (["--help"], ["audit", "--help"], ["audit", *checkpoints, "--format", "json"]):
        if len(arguments) > 2:
            arguments.insert(2, "--against")
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "freezekit", *map(str, arguments)],
            capture_output=True, text=True,
        )  # fmt: skip
        modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "freezekit.cli" in modules
        assert not {m for m in modules if m.partition(".")[0] in ("torch", "torchvision")}


def test_version_and_help() -> None:
    assert run("--version").stdout == f"freezekit, version {freezekit.__version__}\n"
    for arguments in (["--help"], ["audit", "--help"], ["plan", "--help"], ["demo", "--help"]):
        done = run(*arguments)
        assert done.returncode == 0
        assert done.stdout.startswith("Usage: ")
        assert max(map(len, done.stdout.splitlines())) <= 80
    assert "0 clean, 1 drift or bad statistics, 2 wrong usage, 3 unreadable" in " ".join(
        run("--help").stdout.split()
    )


@pytest.mark.parametrize("form", ["table", "json"])
def test_a_pipe_closed_from_the_start_is_no_error(checkpoints: tuple[Path, Path], form: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "freezekit", "audit", checkpoints[0], "--format", form],
            stdout=stdout, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_short_help() -> None:
    assert run("audit", "-h").stdout == run("audit", "--help").stdout


def test_a_narrow_terminal_cuts_nothing_off(checkpoints: tuple[Path, Path]) -> None:
    lines = run("audit", checkpoints[1], "--against", checkpoints[1], COLUMNS="30").stdout.splitlines()
    assert lines[0] == "CLEAN: none of 100 frozen tensors changed (20 layers with running statistics)"


def test_keep_reaches_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str | None] = []
    monkeypatch.setattr("freezekit.demo.run", kept.append)
    for arguments in (["demo"], ["demo", "--keep", "here"]):
        assert CliRunner().invoke(freezekit.cli.main, arguments).exit_code == 0
    assert kept == [None, "here"]


# --- formats and files ------------------------------------------------------------------------------------

VERDICT = "DRIFT: 60 of 100 frozen tensors changed, 20 of 20 layers with running statistics\n"


@pytest.mark.parametrize(
    ("form", "ending", "start"),
    [
        ("table", ".txt", VERDICT),
        ("json", ".json", '{\n"schema_version": 1,\n"clean": false,\n'),
        ("markdown", ".md", f"**{VERDICT[:-1]}**\n"),
        ("html", ".html", '<!doctype html>\n<html lang="en">\n'),
    ],
)
def test_the_ending_of_the_file_tells_the_format(
    checkpoints: tuple[Path, Path], tmp_path: Path, form: str, ending: str, start: str
) -> None:
    common = ("audit", checkpoints[0], "--against", checkpoints[1])
    out = tmp_path / f"report{ending}"
    done = run(*common, "-o", out)
    assert (done.returncode, done.stdout, done.stderr) == (1, VERDICT, "")
    assert out.read_text(encoding="utf-8").startswith(start)
    assert run(*common, "--format", form).stdout == out.read_text(encoding="utf-8")
    other = tmp_path / "report.pdf"
    assert run(*common, "-o", other, "--format", form, "--quiet").stdout == ""
    assert other.read_bytes() == out.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".pth") == [
        *sorted([out.name, other.name])
    ]


def test_format_wins_over_the_ending(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    assert run("audit", checkpoints[1], "--output", out, "--format", "json").returncode == 0
    assert freezekit.DriftReport.load(out) == freezekit.audit_checkpoint(checkpoints[1])


def test_a_report_in_a_file_has_no_colour_and_a_width_of_its_own(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "report.txt"
    env = {"FORCE_COLOR": "1", "COLUMNS": "40"}
    run("audit", checkpoints[0], "--against", checkpoints[1], "-o", out, **env)
    wide = out.read_text(encoding="utf-8")
    assert "\x1b" not in wide
    assert "batches tracked" in wide


def test_quiet_prints_errors_only(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    drifted, base = checkpoints
    for arguments, code in (((base,), 0), ((drifted, "--against", base), 1)):
        done = run("audit", *arguments, "-q")
        assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    assert one_line(run("audit", tmp_path / "none.pth", "--quiet"), 3).startswith("freezekit: ")


def test_what_is_audited_is_never_overwritten(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    drifted, base = checkpoints
    manifest = tmp_path / "manifest.json"
    freezekit.freeze_backbone(zoo.make("resnet18")).manifest().save(manifest)
    link = tmp_path / "link.html"
    link.symlink_to(drifted)
    hard = tmp_path / "hard.json"
    os.link(base, hard)
    saved = {path: path.read_bytes() for path in (drifted, base, manifest)}
    for out, arguments in (
        (drifted, ["--against", base]),
        (base, ["--against", base]),
        (link, []),
        (hard, ["--against", base]),
        (manifest, ["--manifest", manifest]),
    ):
        line = one_line(run("audit", drifted, *arguments, "--format", "json", "-o", out), 2)
        assert line.startswith(f"freezekit: -o {out}: the report would overwrite what is audited (got ")
    assert {path: path.read_bytes() for path in saved} == saved


def test_output_that_cannot_be_written_is_refused(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    def refused(out: str | Path, *more: str) -> str:
        return one_line(run("audit", checkpoints[1], "-o", out, *more), 2)

    assert refused(tmp_path / "none" / "a.md") == (
        f"freezekit: -o {tmp_path}/none/a.md: cannot write the report: there is no such folder (got "
        f"{tmp_path}/none). Remedy: make the folder first, or give the path of a file in one that exists"
    )
    for name in ("a.pth", "a", ".json"):
        assert "cannot tell the format of the report by its file's ending" in refused(tmp_path / name)
    (tmp_path / "folder.md").mkdir()
    assert "cannot write the report (got not a regular file)" in refused(tmp_path / "folder.md")
    os.mkfifo(tmp_path / "fifo.md")
    assert "cannot write the report (got not a regular file)" in refused(tmp_path / "fifo.md")
    # before the report, which would take long
    assert "no such folder" in one_line(
        run("audit", tmp_path / "none.pth", "-o", tmp_path / "no" / "a.md"), 2
    )


def test_a_report_replaces_an_older_one_where_a_link_leads(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "reports").mkdir()
    old = tmp_path / "reports" / "old.md"
    old.write_text("old")
    (tmp_path / "latest.md").symlink_to(old)
    assert run("audit", checkpoints[1], "-o", tmp_path / "latest.md").returncode == 0
    assert (tmp_path / "latest.md").is_symlink()
    assert old.read_text().startswith("**OK: 20 layers")


def test_a_write_that_fails_leaves_what_was_there(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = CliRunner().invoke(freezekit.cli.main, ["audit", str(checkpoints[1]), "-o", str(out)])
    assert done.exit_code == 2
    assert f"freezekit: {out}: cannot write the report (got No space left on device)" in done.stderr
    assert done.stdout == ""
    assert out.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"base.pth", "drifted.pth", "report.html"}


def test_the_schema_needs_no_checkpoint() -> None:
    done = run("audit", "--schema")
    assert (done.returncode, done.stderr) == (0, "")
    path = Path(freezekit.__file__).parent / "report" / "schema.json"
    assert done.stdout == path.read_text(encoding="utf-8")


def test_each_format_imports_only_what_it_needs(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    for form, absent in (
        ("table", {"freezekit.report.markdown", "freezekit.report.html"}),
        ("json", {"rich", "freezekit.report.text", "freezekit.report.html"}),
        ("markdown", {"rich", "freezekit.report.text", "freezekit.report.html"}),
        ("html", {"rich", "freezekit.report.text", "freezekit.report.markdown"}),
    ):
        command = [sys.executable, "-X", "importtime", "-m", "freezekit", "audit", checkpoints[1], "--format"]
        done = subprocess.run([*command, form], capture_output=True, text=True)
        modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "freezekit.report.summary" in modules or form == "json"
        assert not absent & modules


def test_several_checkpoints_go_to_the_audit_as_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, dict[str, object]]] = []

    def audited(path: object, **more: object) -> freezekit.DriftReport:
        asked.append((path, more))
        return freezekit.DriftReport("b", None, "statistics only", 0, (), (), ())

    monkeypatch.setattr("freezekit.audit.files.audit_checkpoint", audited)
    for arguments in (["a"], ["a", "b", "--root", "ema", "--no-limits"]):
        assert CliRunner().invoke(freezekit.cli.main, ["audit", *arguments]).exit_code == 0
    none = {"against": None, "frozen": None, "manifest": None, "root": None, "no_limits": False}
    assert asked == [(("a",), none), (("a", "b"), {**none, "root": "ema", "no_limits": True})]


# --- terminals --------------------------------------------------------------------------------------------


def on_a_terminal(program: str, *arguments: str | Path, **env: str) -> tuple[int, str, str]:
    """Run a program with terminals for its two streams; return its exit code and what they show."""
    terminals = [pty.openpty() for _ in range(2)]
    shown = ["", ""]

    def read(k: int) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone with the program
            while part := os.read(terminals[k][0], 65536):
                shown[k] += part.decode()

    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=terminals[0][1], stderr=terminals[1][1],
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **env},
    )  # fmt: skip
    for _, child in terminals:
        os.close(child)
    readers = [threading.Thread(target=read, args=(k,)) for k in range(2)]
    for reader in readers:
        reader.start()
    code = process.wait(60)
    for reader in readers:
        reader.join()
    for parent, _ in terminals:
        os.close(parent)
    return code, shown[0], shown[1]


MAIN = "from freezekit.cli import main; main()"
PATIENT = f"import freezekit.report.progress as p; p._PATIENCE = 60; {MAIN}"
IMPATIENT = f"import freezekit.report.progress as p; p._PATIENCE = 0; {MAIN}"


def test_colour_is_for_terminals_that_want_it(checkpoints: tuple[Path, Path]) -> None:
    arguments = ("audit", checkpoints[0], "--against", checkpoints[1])
    code, out, err = on_a_terminal(PATIENT, *arguments)
    assert (code, err) == (1, "")  # a short read shows no progress
    assert out.startswith("\x1b[1;31mDRIFT: 60 of 100")
    plain = run(*arguments).stdout
    assert "\x1b" not in plain
    code, out, _ = on_a_terminal(PATIENT, *arguments, NO_COLOR="1")
    bare = re.sub(r"\x1b\[[012]?m", "", out)  # bold and dim are no colours
    assert (code, [line.rstrip() for line in bare.splitlines()]) == (1, plain.splitlines())
    assert "\x1b" not in on_a_terminal(PATIENT, *arguments, TERM="dumb")[1]


def test_a_long_read_shows_its_progress_and_takes_it_away(checkpoints: tuple[Path, Path]) -> None:
    arguments = ("audit", checkpoints[0], "--against", checkpoints[1], "--format", "json")
    code, out, err = on_a_terminal(IMPATIENT, *arguments)
    assert code == 1
    assert json.loads(out)["clean"] is False
    assert "reading" in err
    assert re.search(r"\d[\d.]* (kB|MB|bytes)", err)
    assert err.rstrip().endswith("\x1b[2K")  # the line is empty again
    code, out, err = on_a_terminal(IMPATIENT, *arguments, "--quiet")
    assert (code, out, err) == (1, "", "")


def test_no_progress_where_nobody_watches(checkpoints: tuple[Path, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, "audit", checkpoints[0], "--against", checkpoints[1]],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
