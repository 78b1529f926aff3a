"""The command line as a user meets it: a process, its two streams and its exit code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
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


def test_alone_lists_layers_and_counters(checkpoints: tuple[Path, Path]) -> None:
    done = run("audit", checkpoints[1])
    assert done.returncode == 0
    assert done.stdout.startswith("OK: 20 layers with running statistics")
    counter = int(torch.load(checkpoints[1])["bn1.num_batches_tracked"])
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("bn1 ")]
    assert line.split() == ["bn1", "64", str(counter)]


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
        ("directory", "not a regular file"),
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
    stats = {"running_mean": torch.zeros(2), "running_var": torch.full((2,), 2.0)}
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
    assert run("audit", tmp_path / "odd.pth").returncode == 0
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
