"""The report as Markdown: short enough for GitHub, and nothing in a name works."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt
from sample_reports import EVERY, EVIL, alone, clean, drift, hostile, trend

from freezekit.audit.findings import Finding
from freezekit.report.markdown import MOST_CHARACTERS, render
from freezekit.report.summary import verdict


def html(text: str) -> str:
    rendered: str = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    return rendered


def test_a_run_reads_as_it_should() -> None:
    lines = render(trend()).splitlines()
    assert lines[0] == (
        "**DRIFT: 12 of 30 frozen tensors changed, 4 of 6 layers with running statistics, "
        "since step 300 (3 of 5 checkpoints)**"
    )
    assert lines[2:4] == ["`run/step-500.ckpt` against `base.pth`  ", "frozen: as given (30 tensors)"]
    assert "| `step-200.ckpt` | 200 | 0 | 0 | 0 | x1 |" in lines
    assert "Drift began between step 200 and step 300." in lines
    start = lines.index("| layer | channels | batches tracked | mean shift (sigma) | spread | since step |")
    names = [line.split("`")[1] for line in lines[start + 2 : start + 6]]
    assert sorted(names) == ["stage1.norm", "stage2.norm", "stage4.norm", "stage5.norm"]
    shifts = [float(line.split("|")[4]) for line in lines[start + 2 : start + 6]]
    assert shifts == sorted(shifts, reverse=True)
    assert "2 other layers did not move" in lines
    assert "<details><summary>FK101 running statistics moved (4) (error)</summary>" in lines


@pytest.mark.parametrize("kind", EVERY)
def test_the_verdict_comes_first(kind: str) -> None:
    report = EVERY[kind]()
    first = render(report).splitlines()[0]
    assert html(first) == f"<p><strong>{verdict(report).text}</strong></p>\n"


def test_a_clean_report_is_short() -> None:
    assert render(clean()) == (
        "**CLEAN: none of 10 frozen tensors changed (2 layers with running statistics)**\n\n"
        "`new.pth` against `base.pth`  \nfrozen: as given (10 tensors)\n"
    )


def test_alone_lists_the_layers_with_findings() -> None:
    text = render(alone())
    assert re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|$", text, re.M) == [
        ("bn2", "16", "40"),
        ("bn3", "24", "7"),
    ]
    assert "2 other layers have no finding of their own" in text
    assert "(warning)</summary>" in text


def test_names_are_only_names() -> None:
    text = render(hostile())
    shown = html(text)
    allowed = {"p", "strong", "code", "br", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
    allowed |= {"details", "summary"}
    assert set(re.findall(r"<\s*([\w!]+)", shown)) == allowed
    assert not re.search(r"<[^>]*(on\w+|src|href)=", shown)
    # a cell that a bar in a name had split would be one more
    for row in re.findall(r"<tr>(.*?)</tr>", shown, re.DOTALL):
        assert len(re.findall(r"<t[hd]", row)) == 6
    outside = re.sub(r"`[^`\n]*`", "", text)
    assert not re.search("[@#](?!\u200b|\\d)", outside)
    assert "@" not in re.sub(r"<code>.*?</code>", "", shown).replace("@\u200b", "")
    assert "\u202e" not in text
    assert "\u2028" not in text


@pytest.mark.parametrize(
    "name", ["a|b", "`a`", "a`|`b", "<b>", "&amp;", "*a*", "[a](b)", " a ", "\\|", "a\nb", "$x$"]
)
def test_odd_names_are_shown_as_they_are(name: str) -> None:
    report = drift(2)
    moved = replace(report.layers[1], name=name)
    shown = html(render(replace(report, layers=(report.layers[0], moved))))
    cell = re.findall(r"<tbody>\s*<tr>\s*<td[^>]*><code>(.*?)</code></td>", shown, re.DOTALL)
    expected = name.replace("\n", "\\n").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert [one.strip() for one in cell] == [expected.strip()]


@pytest.mark.parametrize("count", [50, 2000])
def test_it_fits(count: int) -> None:
    report = drift(count)
    text = render(report)
    assert len(text) < MOST_CHARACTERS
    moved = sum(layer.changed for layer in report.layers)
    assert text.count("| x") == 20
    assert f"and {moved - 20} more; {count - moved} other layer" in text


def test_even_with_names_made_to_grow_it_fits() -> None:
    evil = "|`<@" * 300
    codes = ["FK101", "FK103", "FK104", "FK105", "FK201", "FK203", "FK401", "FK402"]
    findings = tuple(Finding(code, evil, evil, evil) for code in codes for _ in range(30))
    layers = tuple(replace(layer, name=evil) for layer in drift(60).layers)
    text = render(
        replace(drift(), source=evil, scope=evil, layers=layers, findings=findings, notes=(evil,) * 50)
    )
    assert 30_000 < len(text) <= MOST_CHARACTERS
    assert re.search(r"\d+ parts left out, since GitHub takes no more; the JSON has all of it.\n$", text)
    assert text.count("<details>") == text.count("</details>")
    assert EVIL not in text
