# ruff: noqa: E501  # tables and messages
"""Every hostile file through the command line, each in a process of its own: watched, timed and weighed."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import build_attacks
import build_hostile as build
import pytest

_ZIP = "the reader of zip directories that branch scripted brings refuses it"
_ARCHIVE = "archive.py: not refused yet"
_LIMITS = "the caps of branch pickles refuse it"
#: what is known to be wrong, and where the fix lies
KNOWN = {
    **dict.fromkeys(
        (
            "zip_count_too_small", "zip_count_too_big", "zip_name_length", "zip_extra_length", "zip_end_in_comment",
            "zip_local_extra", "zip_local_extra_of_last", "zip_of_many_members",
        ),
        _ZIP,
    ),
    "zip_marked_as_folder": f"{_ARCHIVE}: torch reads no values of a member that is marked as a folder",
    "zip_names_that_differ_by_case": f"{_ARCHIVE}: torch finds names whatever their case",
    "zip_sparse_pickle": _LIMITS,
    "zip_sparse_byte_order": f"{_ARCHIVE}: it is read whole before it is compared",
    "wrong_storage_of_two_dtypes": "pickle_machine.py: torch takes the dtype of a storage's first mention for all",
    **{name: _LIMITS for name in (*build_attacks.BUILDERS, *build_attacks.AUDITED) if name.startswith("costly")},
}  # fmt: skip
SECONDS, BYTES = 2, 200 * 2**20


class Runner:
    """Sends command lines to ``guarded_audit.py``."""

    def __init__(self):
        script = Path(__file__).with_name("guarded_audit.py")
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, *arguments):
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


def cases(names):
    return [
        pytest.param(n, marks=pytest.mark.xfail(reason=KNOWN[n], run=False) if n in KNOWN else ())
        for n in names
    ]


BUILDERS, SAYS = build.BUILDERS | build_attacks.BUILDERS, build.SAYS | build_attacks.SAYS


# its values are not looked at by an audit: they are no statistics (``zip_statistics_flipped`` is)
del BUILDERS["zip_values_flipped"]


@pytest.mark.parametrize("name", cases(BUILDERS))
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


@pytest.mark.parametrize("name", cases(build_attacks.AUDITED))
def test_audited_without_harm(run, name, tmp_path):
    path = tmp_path / "ckpt.pt"
    build_attacks.AUDITED[name](path)
    for more in ([], ["--format", "json"], ["--against", path]):
        answer = run("audit", path, *more)
        assert answer["code"] in ((0, 1, 3) if name.startswith("costly") else (0, 1)), answer
        for text in (answer["out"], answer["err"]):
            assert all(line.isprintable() for line in text.split("\n"))
        assert (answer["err"] == "") == (answer["code"] != 3)
        check_cost(answer)
        if "json" in more and answer["code"] != 3:
            assert json.loads(answer["out"])["clean"] is (answer["code"] == 0)


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
