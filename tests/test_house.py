"""The house rules: public names, import directions, what must not be imported, the root's contents."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import freezekit

PACKAGE = Path(freezekit.__file__).parent


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def files(folder: str) -> list[Path]:
    found = sorted((PACKAGE / folder).rglob("*.py"))
    assert found
    return found


def test_public_names() -> None:
    assert freezekit.__all__ == [
        "AveragedModel", "CheckpointError", "DriftAuditor", "DriftError", "DriftReport", "DriftWarning",
        "Finding", "Freeze", "FreezekitError", "Manifest", "OptimizerWarning", "RestoreReport", "Selection",
        "SelectionError", "UnfreezeSchedule", "audit_checkpoint", "check", "convert_batchnorm",
        "find_backbone", "freeze", "freeze_backbone", "freeze_to", "is_frozen", "layer_groups", "nn",
        "parameter_groups", "restore_checkpoint", "trainable_parameters", "unfreeze", "update_bn",
    ]  # fmt: skip
    assert freezekit.nn.__all__ == [
        "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "FrozenAffine", "FrozenBatchNorm1d", "FrozenBatchNorm2d",
        "FrozenBatchNorm3d", "FrozenSyncBatchNorm", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d",
        "InstanceNorm3d", "LayerNorm", "SyncBatchNorm",
    ]  # fmt: skip
    for name in freezekit.__all__:
        assert getattr(freezekit, name).__doc__, name
    for name in freezekit.nn.__all__:
        assert getattr(freezekit.nn, name).__doc__, name
    assert set(freezekit.__all__) < set(dir(freezekit))
    with pytest.raises(AttributeError, match="no attribute 'frezze'"):
        _ = freezekit.frezze


def test_the_observing_arm_never_imports_the_acting_arm() -> None:
    for path in [*files("audit"), *files("report")]:
        acting = {name for name in imports(path) if name.startswith(("freezekit.freezing", "freezekit.nn"))}
        assert not acting, f"{path}: {acting}"


def test_the_acting_arm_never_imports_the_observing_arm() -> None:
    for path in [*files("freezing"), *files("nn")]:
        observing = {
            name for name in imports(path) if name.startswith(("freezekit.audit", "freezekit.report"))
        }
        assert not observing, f"{path}: {observing}"


def test_neither_arm_imports_the_hooks_and_each_hook_its_own_framework() -> None:
    for folder in ("audit", "report", "freezing", "nn"):
        for path in files(folder):
            assert not {name for name in imports(path) if name.startswith("freezekit.hooks")}, path
    for path in files("hooks"):
        others = {
            "lightning",
            "pytorch_lightning",
            "transformers",
            "ignite",
            "fastai",
            "accelerate",
            "pytest",
        }
        own = {path.stem} | ({"pytorch_lightning"} if path.stem == "lightning" else set())
        assert not {name.partition(".")[0] for name in imports(path)} & (others - own), path
        if path.stem in others:
            assert path.read_text().count("\n") <= 120, path


def test_the_file_side_never_imports_torch() -> None:
    live = PACKAGE / "audit" / "live"
    # which published weights there are only their libraries know; it imports them where they are asked for
    pretrained = PACKAGE / "audit" / "pretrained.py"
    for path in [*files("audit"), *files("report"), PACKAGE / "cli.py", PACKAGE / "patterns.py"]:
        names = imports(path)
        torch = {name for name in names if name.partition(".")[0] in ("torch", "torchvision", "timm")}
        assert not torch or path.parent == live or path == pretrained, f"{path}: {torch}"
        assert not {"pickle", "marshal", "shelve", "dill"} & names, path


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import freezekit", {"torch", "numpy", "rich", "click"}),
        (
            "from freezekit.cli import main; main(['--help'], standalone_mode=False)",
            {"torch", "numpy", "rich"},
        ),
        ("from freezekit import audit_checkpoint", {"torch", "rich"}),
        ("import freezekit.nn", {"torch._dynamo", "rich"}),
        ("from freezekit import Manifest", {"torch", "numpy", "rich"}),
    ],
)
def test_start_up_imports(code: str, absent: set[str]) -> None:
    script = f"import sys\n{code}\nprint('LOADED', *sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    loaded = set(out.rpartition("LOADED")[2].split())
    assert not absent & loaded


def test_files_stay_rooms() -> None:
    long = {path: n for path in PACKAGE.rglob("*.py") if (n := path.read_text().count("\n")) > 400}
    assert not long
