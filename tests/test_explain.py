"""freezekit explain: every code has its text, and it reads well on any terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import freezekit
from freezekit.audit.codes import EXPLANATIONS
from freezekit.audit.explanation import Explanation
from freezekit.audit.findings import CODES
from freezekit.report.explain import render, render_list


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "freezekit", "explain", *arguments],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "80", **env}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_explained(code: str) -> None:
    text = EXPLANATIONS[code]
    for part in (text.means, text.how, text.fix):
        assert part == " ".join(part.split())
        assert part.endswith((".", ")."))
        assert part[0].isupper() or re.match(r"torch's |\w+[._(=]", part), part
    assert len(text.how) > 30
    assert text.sources
    assert all(re.fullmatch(r"https://[\w./#-]+[\w]", url) for url in text.sources)


def test_nothing_is_explained_that_is_no_code() -> None:
    assert list(EXPLANATIONS) == list(CODES)


def test_every_code_the_package_gives_is_a_code() -> None:
    package = Path(freezekit.__file__).parent
    given = {c for path in package.rglob("*.py") for c in re.findall(r'"(FK\d{3})"', path.read_text())}
    assert given <= set(CODES)


def test_what_is_named_in_the_texts_exists() -> None:
    for text in EXPLANATIONS.values():
        for part in (text.means, text.how, text.fix):
            for name in re.findall(r"freezekit\.(\w+)", part):
                assert hasattr(freezekit, name), name


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_width_is_kept(width: int) -> None:
    for line in (render(CODES, width=width) + "\n" + render_list(width=width)).splitlines():
        assert len(line) <= width or "https://" in line or line.startswith("FK")
        assert line == line.rstrip()


def test_one_code() -> None:
    done = run("fk102")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == """\
FK102  only num_batches_tracked moved  (error)

  num_batches_tracked of a frozen layer has moved, the mean and the variance
  have not. The output is the same, but the layer is in train mode, or something
  counts for it.

  how: A layer with momentum=0.0 in train mode: the statistics stay, the counter
       goes on.

  fix: freezekit.freeze_backbone(model): a layer in eval mode does not count.

  see: https://github.com/pytorch/pytorch/blob/main/torch/nn/modules/batchnorm.py
"""
    )


def test_several_codes_in_the_order_given() -> None:
    lines = run("FK305", "FK101", COLUMNS="100").stdout.splitlines()
    assert [line[:5] for line in lines if line.startswith("FK")] == ["FK305", "FK101"]
    assert max(len(line) for line in lines) > 80


def test_without_a_code_all_are_listed() -> None:
    done = run()
    assert done.returncode == 0
    assert [line.split(None, 2) for line in done.stdout.splitlines()] == [
        [code, level, meaning] for code, (meaning, level) in CODES.items()
    ]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("FK3O1", "did you mean FK301"),
        ("FK31", "did you mean FK310"),
        ("301", "did you mean FK301"),
        ("batchnorm", "freezekit explain lists them all"),
        ("\x1b[31mFK", "freezekit explain lists them all"),
    ],
)
def test_an_unknown_code(code: str, remedy: str) -> None:
    done = run("FK101", code)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("freezekit: CODE: no such code (got ")
    assert remedy in line
    assert "\x1b" not in line


def test_no_torch_is_imported() -> None:
    script = "import sys; from freezekit.cli import main\n"
    script += "main(['explain', 'FK301'], standalone_mode=False); print('LOADED', *sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "rich"} & set(out.rpartition("LOADED")[2].split())


def test_help() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_an_explanation_is_plain_data() -> None:
    assert Explanation("a", "b", "c", ("d",)) == Explanation("a", "b", "c", ("d",))
