"""README's reference is what the docstrings say: ``python tests/test_readme_reference.py`` prints it anew."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import freezekit

README = Path(__file__).parent.parent / "README.md"
HOOKS = Path(freezekit.__file__).parent / "hooks"
TOPICS = {
    "freeze": [
        "freeze_backbone", "freeze", "freeze_to", "unfreeze", "Freeze", "is_frozen", "find_backbone",
        "Selection", "layer_groups", "convert_batchnorm", "nn", "Manifest",
    ],
    "train": ["trainable_parameters", "parameter_groups", "UnfreezeSchedule", "update_bn", "AveragedModel"],
    "audit": [
        "check", "DriftAuditor", "audit_checkpoint", "DriftReport", "Finding", "restore_checkpoint",
        "RestoreReport",
    ],
    "errors": [
        "FreezekitError", "SelectionError", "CheckpointError", "DriftError", "DriftWarning",
        "OptimizerWarning",
    ],
}  # fmt: skip


def summary(docstring: str) -> str:
    """The first sentence of a docstring, in Markdown."""
    text = docstring.split("\n\n")[0].replace("\n", " ")
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return text.removesuffix(".").replace("|", "\\|")


def hooks() -> dict[str, str]:
    """The hooks' public classes and functions; read and not imported, since each needs its framework."""
    found = {}
    for path in sorted(HOOKS.glob("*.py"), key=lambda path: (path.stem != "loop", path.stem)):
        body = ast.parse(path.read_text()).body
        public = [ast.literal_eval(node.value) for node in body if ast.unparse(node).startswith("__all__ = ")]
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in public[0]:
                found[f"hooks.{path.stem}.{node.name}"] = ast.get_docstring(node) or ""
    return found


def reference() -> str:
    """The table as README has it."""
    topics = {
        topic: {name: inspect.getdoc(getattr(freezekit, name)) or "" for name in names}
        for topic, names in TOPICS.items()
    }
    rows = ["| | | |", "|---|---|---|"]
    for topic, names in {**topics, "hooks": hooks()}.items():
        for k, (name, docstring) in enumerate(names.items()):
            rows.append(f"| {'' if k else topic} | `{name}` | {summary(docstring)} |")
    return "\n".join(rows) + "\n"


def test_every_public_name_has_its_topic() -> None:
    assert sorted(name for names in TOPICS.values() for name in names) == freezekit.__all__
    assert all(hooks().values())


def test_readme_has_the_reference() -> None:
    assert reference() in README.read_text()


def test_a_summary_is_markdown() -> None:
    assert summary("As :class:`~a.B` does, ``x | y``\nor not.\n\nMore.") == "As `a.B` does, `x \\| y` or not"


if __name__ == "__main__":
    print(reference(), end="")
