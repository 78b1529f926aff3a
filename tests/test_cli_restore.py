"""`freezekit restore` as a user meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import freezekit


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "freezekit", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def model(fine_tune: bool) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    made.eval()(torch.zeros(1, 3, 8, 8))
    made.train()(torch.randn(8, 3, 8, 8))
    if fine_tune:
        made[:2].requires_grad_(False)
        made(torch.randn(8, 3, 8, 8) + 1).sum().backward()
        torch.optim.SGD(made[3].parameters(), lr=0.1).step()
    return made


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    monkeypatch.chdir(tmp_path)
    states = {"base": model(False).state_dict(), "drifted": model(True).state_dict()}
    for name, state in states.items():
        torch.save(state, f"{name}.pth")
    return states


def error(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert not Path("out.pth").exists()
    return line


def test_a_repaired_copy(files: dict[str, dict[str, Tensor]]) -> None:
    done = run("restore", "drifted.pth", "--from", "base.pth", "-o", "out.pth")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:5] == [
        "RESTORED: 3 of 5 frozen tensors (1 of 1 layer with running statistics)",
        "out.pth is drifted.pth with them as in base.pth",
        "frozen: inferred: 1 of 1 BN layer kept their parameters bit for bit",
        "",
        "until then:",
    ]
    assert lines[5].startswith("  1: running mean moved by up to ")
    assert lines[6:] == [
        "",
        "verified: read again and compared bit for bit; an audit of it against base.pth: clean",
    ]
    out = torch.load("out.pth", weights_only=True)
    for name, tensor in files["drifted"].items():
        assert torch.equal(out[name], files["base"][name] if name.startswith("1.") else tensor)
    assert run("audit", "drifted.pth", "--against", "base.pth").returncode == 1
    assert run("audit", "out.pth", "--against", "base.pth").returncode == 0


def test_globs_and_manifest(files: dict[str, dict[str, Tensor]]) -> None:
    done = run("restore", "drifted.pth", "--from", "base.pth", "--frozen", "1.running_*", "-o", "out.pth")
    assert done.stdout.startswith("RESTORED: 2 of 2 frozen tensors (1 of 1 layer with running statistics)\n")
    assert int(torch.load("out.pth")["1.num_batches_tracked"]) == 2
    base = model(False)
    handle = freezekit.freeze(base, "1")
    handle.manifest().save("frozen.json")
    by = ("--manifest", "frozen.json")
    done = run("restore", "drifted.pth", "--from", "base.pth", *by, "-o", "by_manifest.pth")
    assert done.returncode == 0
    assert done.stdout.startswith("RESTORED: 3 of 5 frozen tensors (1 of 1 layer with running statistics)\n")
    assert run("audit", "by_manifest.pth", *by).returncode == 0
    Path("out.pth").unlink()
    line = error(run("restore", "base.pth", "--from", "drifted.pth", *by, "-o", "out.pth"), 2)
    assert line == (
        "freezekit: drifted.pth: the base is not what was frozen, by the manifest (got 3 tensors with other "
        "values, 1.running_mean first). Remedy: give the checkpoint that the model was frozen with"
    )
    line = error(
        run("restore", "drifted.pth", "--from", "base.pth", *by, "--frozen", "1", "-o", "out.pth"), 2
    )
    assert line.startswith("freezekit: frozen: a manifest says by itself what was frozen (got both)")


def test_a_manifest_inside_tells(files: dict[str, dict[str, Tensor]]) -> None:
    manifest = freezekit.freeze(model(False), "1").manifest().to_json()
    torch.save({"state_dict": files["drifted"], "freezekit_manifest": manifest}, "drifted.ckpt")
    done = run("restore", "drifted.ckpt", "--from", "base.pth", "-o", "out.ckpt")
    assert done.returncode == 0
    assert "\nfrozen: as the manifest inside it says\n" in done.stdout
    assert run("audit", "out.ckpt").returncode == 0
    assert torch.load("out.ckpt", weights_only=True)["freezekit_manifest"] == manifest


def test_wrong_usage_exits_2(files: dict[str, dict[str, Tensor]]) -> None:
    assert "Missing option '--from'" in run("restore", "drifted.pth", "-o", "out.pth").stderr
    assert "Missing option '-o' / '--output'" in run("restore", "drifted.pth", "--from", "base.pth").stderr
    common = ("restore", "drifted.pth", "--from", "base.pth")
    line = error(run(*common, "--frozen", "2", "-o", "out.pth"), 2)
    assert line.startswith("freezekit: frozen: no layer or tensor matches (got '2'). Remedy: ")
    line = error(run(*common, "-o", "drifted.pth"), 2)
    assert line == (
        "freezekit: drifted.pth: would write over the checkpoint itself. "
        "Remedy: give the repaired copy a name of its own"
    )
    line = error(run(*common, "-o", "missing/out.pth"), 2)
    assert line == (
        "freezekit: missing/out.pth: cannot write the restored checkpoint (got No such file or directory). "
        "Remedy: give the path of a file in a folder that exists and can be written to"
    )


def test_files_that_cannot_be_read_exit_3(files: dict[str, dict[str, Tensor]]) -> None:
    raw = Path("drifted.pth").read_bytes()
    Path("cut.pth").write_bytes(raw[: len(raw) // 2])
    line = error(run("restore", "cut.pth", "--from", "base.pth", "-o", "out.pth"), 3)
    assert line.startswith("freezekit: cut.pth: truncated or damaged: ")
    line = error(run("restore", "drifted.pth", "--from", "none.pth", "-o", "out.pth"), 3)
    assert line == "freezekit: none.pth: no such file. Remedy: check the path"
    line = error(run("restore", ".", "--from", "base.pth", "-o", "out.pth"), 3)
    assert line.startswith("freezekit: .: a folder: one file at a time can be restored. Remedy: ")


def test_help() -> None:
    out = run("restore", "--help").stdout
    assert "freezekit restore finetuned.pth --from pretrained.pth -o repaired.pth" in out
    assert "Unless it is 0, nothing was" in out


def test_torch_is_not_imported(files: dict[str, dict[str, Tensor]]) -> None:
    code = (
        "import sys; from freezekit.cli import main\n"
        "main(['restore', 'drifted.pth', '--from', 'base.pth', '-o', 'out.pth'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
