"""README's section on CI: its files are YAML, and what they run does what is said of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

README = (Path(__file__).parent.parent / "README.md").read_text()
HOOKS, WORKFLOW = (yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```$", README, re.M | re.S))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A repository with a checkpoint that drifted, and freezekit on the path."""
    stats = {
        "bn.running_mean": torch.randn(4),
        "bn.running_var": torch.rand(4) + 0.5,
        "bn.weight": torch.ones(4),
    }
    (tmp_path / "checkpoints").mkdir()
    torch.save(stats, tmp_path / "checkpoints" / "base.pth")
    torch.save({**stats, "bn.running_mean": torch.randn(4)}, tmp_path / "checkpoints" / "finetuned.pth")
    program = tmp_path / "bin" / "freezekit"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m freezekit "$@"\n')
    program.chmod(0o755)
    return tmp_path


def shell(script: str, place: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    env |= {"GITHUB_STEP_SUMMARY": str(place / "summary.md")}
    # as GitHub runs it
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, cwd=place, env=env)


def steps() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = WORKFLOW["jobs"]["audit"]["steps"]
    return found


def test_the_hook_fails_where_something_frozen_moved(place: Path) -> None:
    (hook,) = HOOKS["repos"][0]["hooks"]
    assert hook["language"] == "system"
    assert re.search(hook["files"], "checkpoints/finetuned.pth")
    assert shell(hook["entry"], place).returncode == 1
    (place / "checkpoints" / "base.pth").replace(place / "checkpoints" / "finetuned.pth")
    assert shell(hook["entry"], place).returncode == 3  # no base


def test_the_workflow_keeps_the_page_and_shows_the_summary(place: Path) -> None:
    assert WORKFLOW[True] == "pull_request"  # YAML takes "on" for a truth value, GitHub does not
    (script,) = [step["run"] for step in steps() if step.get("name") == "audit"]
    done = shell(script, place)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("DRIFT: 1 of 3 frozen tensors changed")
    assert (place / "summary.md").read_text(encoding="utf-8").startswith("**DRIFT: 1 of 3")
    kept = steps()[-1]
    assert kept["if"] == "always()"
    assert (place / kept["with"]["path"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    base = (place / "checkpoints" / "base.pth").read_bytes()
    (place / "checkpoints" / "finetuned.pth").write_bytes(base)
    assert shell(script, place).returncode == 0
    (place / "checkpoints" / "finetuned.pth").write_bytes(base[:100])
    (place / "drift.html").unlink()
    assert shell(script, place).returncode == 3
    assert not (place / "drift.html").exists()
