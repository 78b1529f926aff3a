# ruff: noqa: E501  # tables and messages
"""Reads what ``corpus.py`` wrote with freezekit, without torch, and compares every value.

python tests/hostile/check_corpus.py FOLDER...
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from freezekit.audit.checkpoint import read_checkpoint
from freezekit.audit.checkpoint.roots import model_names
from freezekit.errors import CheckpointError


def check(folder: Path) -> tuple[Counter[str], list[str]]:
    """Return how many tensors are equal, unsupported, different; and what is wrong or not read, one line each."""
    expected = json.loads((folder / "expected.json").read_text())["files"]
    counts: Counter[str] = Counter(files=len(expected))
    problems = []
    for file, tensors in expected.items():
        counts["tensors"] += len(tensors)
        try:
            table = read_checkpoint(folder / file)
        except CheckpointError as error:
            counts["refused files"] += 1
            counts["refused"] += len(tensors)
            problems.append(f"{file}: refused: {error.what} (got {error.got})")
            continue
        names, _ = model_names(tensors)
        if set(names) != set(table):
            problems.append(f"{file}: other names: {sorted(set(names) ^ set(table))[:6]}")
        for name, (dtype, shape, content) in zip(names, tensors.values(), strict=True):
            ours = table.get(name)
            if ours is None:
                counts["different"] += 1
            elif ours.unsupported:
                counts["unsupported"] += 1
                if content != "unsupported":
                    problems.append(
                        f"{file}: {name}: {dtype} has values that are not read: {ours.unsupported}"
                    )
            elif content == "unsupported":
                counts["different"] += 1
                problems.append(f"{file}: {name}: values where torch has none")
            else:
                own = [ours.dtype, list(ours.shape), hashlib.sha256(ours.read()).hexdigest()]
                same = own == [dtype, shape, content]
                counts["equal" if same else "different"] += 1
                if not same:
                    problems.append(f"{file}: {name}: {own} instead of {[dtype, shape, content]}")
    assert "torch" not in sys.modules or __name__ != "__main__"
    return counts, problems


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        found, wrong = check(Path(argument))
        print(argument, ", ".join(f"{found[what]} {what}" for what in
              ("files", "tensors", "equal", "unsupported", "different", "refused files")))  # fmt: skip
        for line in wrong:
            print("  " + line)
