"""README.md's code and transcripts are run, and their output compared but for the numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from freezekit.audit.findings import CODES

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [(code, BLOCKS[k + 1][1]) for k, (language, code) in enumerate(BLOCKS) if language == "python"]
CONSOLE = [text for language, text in BLOCKS if language == "console"]


def gist(output: str) -> list[str]:
    """Lines without what differs from machine to machine: numbers, and the widths that follow them."""
    lines = []
    for line in output.splitlines():
        if "━" in line:  # a progress bar
            continue
        line = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "N", line)
        lines.append(re.sub(r"[\s─]+", " ", line).strip())
    return [line for line in lines if line]


@pytest.mark.parametrize(("code", "expected"), PYTHON)
def test_python(code: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(code)
    done = subprocess.run([sys.executable, "train.py"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert gist(done.stdout) == gist(expected)


def test_console(tmp_path: Path) -> None:
    commands = [part for text in CONSOLE for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]
    ran = 0
    for part in commands:
        command, _, expected = part.partition("\n")
        if command.startswith("pip "):
            continue  # .ci/run does this, in a fresh environment
        program, *arguments = command.split()
        assert program == "freezekit"
        done = subprocess.run(
            [sys.executable, "-m", "freezekit", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": "100"},
        )  # fmt: skip
        assert gist(done.stdout) == gist(expected), command
        ran += 1
    assert ran == 7


def test_every_code_is_explained() -> None:
    for code, (meaning, level) in CODES.items():
        row = f"| {code} | {meaning}{' (warning)' if level == 'warning' else ''} |"
        assert row in README


def test_the_two_commands() -> None:
    assert "$ pip install '.[demo]' && freezekit demo\n" in README
    assert "$ pip install '.[test]' && pytest\n" in README
