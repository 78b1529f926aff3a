# tables and messages
"""Every hostile file through the command line, each in a process of its own: watched, timed and weighed."""

import json
import pickle
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import build_attacks
import build_hostile as build
import pytest
import torch
from torch.distributed import checkpoint

#: a layer's values, without which nothing can be said of it against another checkpoint
UNREADABLE = ("scattered_statistics", "statistics_of_odd_dtypes")
#: two checkpoints of a terabyte take what reading two terabytes takes, also where both are holes
NOT_COMPARED = ("sparse_tensor_of_a_terabyte",)
SECONDS, BYTES = 2, 200 * 2**20


class Runner:
    """Sends command lines to ``guarded_audit.py``."""

    def __init__(self):
        script = Path(__file__).with_name("guarded_audit.py")
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, *arguments):
        """Return the answer; of three where it takes too long, since other programs slow this one down."""
        for _ in range(3):
            answer = self.once(*arguments)
            if answer["cpu"] < SECONDS:
                break
        return answer

    def once(self, *arguments):
        self.process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self.process.stdin.flush()
        timer = threading.Timer(120, self.process.kill)
        timer.start()
        try:
            return json.loads(self.process.stdout.readline())
        finally:
            timer.cancel()

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(60)


@pytest.fixture(scope="module")
def run():
    runner = Runner()
    yield runner
    runner.close()


def check_cost(answer):
    assert answer["faults"] == []
    assert answer["cpu"] < SECONDS
    assert answer["peak"] < BYTES


BUILDERS, SAYS = build.BUILDERS | build_attacks.BUILDERS, build.SAYS | build_attacks.SAYS


# its values are not looked at by an audit: they are no statistics (``zip_statistics_flipped`` is)
del BUILDERS["zip_values_flipped"]


@pytest.mark.parametrize("name", BUILDERS)
def test_one_line_and_exit_3(run, name, tmp_path):
    path = tmp_path / "ckpt.pt"
    BUILDERS[name](path)
    for more in ([], ["--against", path, "--format", "json"]):
        answer = run("audit", path, *more)
        assert answer["code"] == 3, answer
        assert answer["out"] == ""
        line = answer["err"].removesuffix("\n")
        assert line.isprintable()
        assert line.startswith(f"freezekit: {path}")
        assert re.search(SAYS[name], line.removeprefix(f"freezekit: {path}"))
        assert len(line) < len(str(path)) + 700
        check_cost(answer)
    assert not build.canary(path).exists()


@pytest.mark.parametrize("name", build_attacks.AUDITED)
def test_audited_without_harm(run, name, tmp_path):
    path = tmp_path / "ckpt.pt"
    build_attacks.AUDITED[name](path)
    compared = [["--against", path]] if name not in NOT_COMPARED else []
    for more in ([], ["--format", "json"], *compared):
        answer = run("audit", path, *more)
        refused = name.startswith("costly") or (name in UNREADABLE and "--against" in more)
        assert answer["code"] in ((0, 1, 3) if refused else (0, 1)), answer
        for text in (answer["out"], answer["err"]):
            assert all(line.isprintable() for line in text.split("\n"))
        assert (answer["err"] == "") == (answer["code"] != 3)
        check_cost(answer)
        if "json" in more and answer["code"] != 3:
            assert json.loads(answer["out"])["clean"] is (answer["code"] == 0)


@pytest.mark.parametrize("form", ["html", "markdown", "json", "table"])
def test_names_reach_no_terminal_and_no_browser(run, form, tmp_path):
    path = tmp_path / "ckpt.pt"
    build_attacks.names_for_the_terminal(path)
    answer = run("audit", path, "--format", form)
    assert answer["code"] == 1
    assert answer["err"] == ""
    if form != "table":  # which names the first few layers of a finding
        assert "alert(1)" in answer["out"]
    assert all(line.isprintable() for line in answer["out"].split("\n"))
    if form == "html":
        assert "<script>alert" not in answer["out"]
    if form == "markdown":  # in a code span it is text
        assert "<script>alert" not in re.sub("`[^`]*`", "", answer["out"])
    check_cost(answer)


@pytest.mark.parametrize("place", ["metadata", "item"])
def test_a_folder_that_runs_code(run, place, tmp_path):
    """torch's own reader unpickles both."""
    (folder := tmp_path / "dcp").mkdir()
    build.BUILDERS["pickle_runs_reduce" if place == "metadata" else "zip_runs_reduce"](tmp_path / "bad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        checkpoint.save({"weight": torch.randn(3), "step": 7}, checkpoint_id=folder, no_dist=True)
    if place == "metadata":
        (folder / ".metadata").write_bytes((tmp_path / "bad").read_bytes())
    else:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        item = next(info for index, info in metadata.storage_data.items() if index.fqn == "step")
        item.offset, item.length = 0, (tmp_path / "bad").stat().st_size
        item.relative_path = "__1_0.distcp"
        (folder / item.relative_path).write_bytes((tmp_path / "bad").read_bytes())
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    answer = run("audit", folder)
    assert answer["code"] == 3
    assert answer["err"].count("\n") == 1
    assert re.search("would run posix.system.*nothing was executed", answer["err"])
    check_cost(answer)
    assert not build.canary(tmp_path / "bad").exists()


def test_the_watch_sees(run, tmp_path):
    """Else the lists without faults would prove nothing."""
    code = (
        "import guarded_audit as g, sys, os; w = g.Watch(['/a/b']); sys.addaudithook(w)\n"
        "open('/etc/hostname'); os.system('true'); import pickle; pickle.loads(pickle.dumps(w.__class__))\n"
        "print(len(w.faults), *w.faults)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert "/etc/hostname" in done.stdout
    assert "os.system" in done.stdout
    assert "pickle.find_class" in done.stdout


@pytest.mark.parametrize("name", ["zip_runs_reduce", "legacy_runs_reduce", "safetensors_escapes", "fifo"])
def test_the_installed_command(name, tmp_path):
    path = tmp_path / "ckpt.pt"
    build.BUILDERS[name](path)
    command = [sys.executable, "-m", "freezekit", "audit", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr[:-1].isprintable()
    assert not build.canary(path).exists()
