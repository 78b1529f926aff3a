# ruff: noqa: E501  # tables and messages
"""All that the installed torch and safetensors write is read as they read it; ``corpus.py`` runs under others."""

import subprocess
import sys
from pathlib import Path

import check_corpus

#: dtypes without arithmetic or with less than a byte, and views that are computed when they are read
NO_VALUES = ("bits", "bcomplex32", "float4", "conj:", "neg:")


def test_all_values_are_equal(tmp_path):
    script = Path(__file__).with_name("corpus.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts, problems = check_corpus.check(tmp_path)
    assert counts["files"] > 95
    assert counts["equal"] > 1400
    assert counts["different"] == counts["refused files"] == 0
    assert [
        problem
        for problem in problems
        if not problem.split(": ")[1].startswith(tuple(n.rstrip(":") for n in NO_VALUES))
    ] == []
