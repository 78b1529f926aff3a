"""The report as a page: what is in it, and what a browser makes of it where there is one."""

from __future__ import annotations

import base64
import hashlib
import html as entities
import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sample_reports import EVERY, alone, clean, drift, hostile, layer, live, trend

from freezekit.audit.findings import DriftReport, LayerDrift, Moment
from freezekit.report.html import render
from freezekit.report.summary import verdict

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Checks that what is opened is closed, and keeps the tags, their attributes and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text.append(data)

    def cells(self, name: str) -> list[dict[str, str | None]]:
        """Return the cells of the heat maps of a layer."""
        title = f"{name}"
        return [a for tag, a in self.tags if tag == "td" and (a.get("title") or "").startswith(title)]


@pytest.mark.parametrize("kind", EVERY)
def test_it_needs_nothing_from_outside(kind: str) -> None:
    page = Page(render(EVERY[kind]()))
    assert ("html", {"lang": "en"}) in page.tags
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "form")
        assert not {"src", "style", "srcdoc", "action"} & attributes.keys()
        assert not any(key.startswith("on") for key in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"url\(|@import|https?:(?!//www\.w3\.org/2000/svg|//evil)", render(EVERY[kind]()))


def test_the_policy_lets_only_its_own_style_and_script_run() -> None:
    text = render(live())
    page = Page(text)
    (policy,) = [a["content"] for tag, a in page.tags if "http-equiv" in a]
    digest = re.search(r"script-src '(sha256-[^']+)'", str(policy))
    assert digest is not None
    script = page.scripts[-1]
    assert digest[1] == f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
    assert str(policy).startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in str(policy)


@pytest.mark.parametrize("kind", EVERY)
def test_the_verdict_comes_first(kind: str) -> None:
    report = EVERY[kind]()
    words = " ".join(" ".join(Page(render(report)).text).split())
    start = words.index("freezekit audit ") + len("freezekit audit ")
    assert words[start:].casefold().startswith(verdict(report).text.replace(":", "", 1).casefold())


def test_hostile_names_are_text() -> None:
    text = render(hostile())
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 2
    data = json.loads(page.scripts[0])
    assert [entry["n"][:17] for entry in data] == ["</script><script>"] * 3
    assert "alert(1)" not in page.scripts[1]
    assert not re.search("[<>&\u2028\u2029]", page.scripts[0])
    assert "<!--" not in text
    assert "\u202e" not in text


def test_the_heat_map_of_a_run() -> None:
    report = trend()
    page = Page(render(report))
    cells = page.cells("stage5.norm")
    moments = next(one for one in report.layers if one.name == "stage5.norm").timeline
    numbers = [
        f"{m.mean_shift_sigma:.3g} sigma, spread x{m.var_ratio:.3g}, {m.num_batches_tracked} batches tracked"
        for m in moments
    ]
    numbers[:2] = ["0 sigma, spread x1"] * 2  # it was not seen to move before step 300
    steps = (100, 200, 300, 400, 500)
    expected = [f"stage5.norm, step {step}: {said}" for step, said in zip(steps, numbers, strict=True)]
    assert [cell["title"] for cell in cells] == expected
    assert page.cells("stage0.norm") == []  # it did not move


def test_colours_are_half_decades() -> None:
    values = [0.0, 0.0029, 0.003, 0.05, 0.1, 0.9, 1.0, 2.9, 3.0, 1e300, None]
    moments = tuple(Moment(k, value, None, None) for k, value in enumerate(values))
    one = LayerDrift("bn", "BatchNorm", 4, None, None, 1.0, None, True, 0, moments)
    page = Page(render(replace(drift(), layers=(one,))))
    assert [cell["class"] for cell in page.cells("bn")] == [
        "h0", "h1", "h2", "h4", "h5", "h6", "h7", "h7", "h8", "h8", "hx",
    ]  # fmt: skip
    assert "not known" in page.text
    assert "not known" not in Page(render(trend())).text


def test_a_comparison_of_two_files_has_one_column() -> None:
    page = Page(render(drift(40)))
    assert [len(page.cells(f"layer{k}.bn:")) for k in (0, 1, 39)] == [0, 1, 1]
    assert sum(a.get("class") == "map wide" for tag, a in page.tags if tag == "table") == 3


def test_alone_is_judged_by_its_health() -> None:
    page = Page(render(alone()))
    assert not any(tag == "svg" or a.get("class") in ("map", "map wide") for tag, a in page.tags)
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links == ["#FK401", "#FK404"]
    assert {a["id"] for tag, a in page.tags if tag == "h3"} == {"FK401", "FK404"}


def test_clean_says_so_and_no_more() -> None:
    page = Page(render(clean()))
    assert "Clean" in page.text
    heads = [tag for tag, _ in page.tags if tag == "h2"]
    assert len(heads) == 1  # Layers


def test_many_layers_are_cut_to_those_that_moved_furthest() -> None:
    report = trend(10_000, 20, channels=16)
    start = time.monotonic()
    text = render(report)
    assert time.monotonic() - start < 20
    assert len(text) < 4_000_000
    moved = sum(one.changed for one in report.layers)
    assert f"The 200 layers that moved furthest; {moved - 200} more moved less." in text
    assert "The 1000 that moved furthest; 9000 more are left out, the JSON has them." in text
    assert sum(tag == "td" and "title" in a for tag, a in Page(text).tags) == 200 * 20
    data = json.loads(Page(text).scripts[0])
    assert sum(len(entry["s"]) for entry in data) <= 100_000


# --- in a browser ----------------------------------------------------------------------------------------

browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


def browse(tmp_path: Path, text: str, *more: str) -> tuple[str, str]:
    """Return what a browser made of a page, and what it and the page complained of."""
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={tmp_path / 'net.json'}", "--enable-logging=stderr", "--virtual-time-budget=5000",
            *more, "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@browser
@pytest.mark.parametrize("kind", ["trend", "hostile", "alone"])
def test_the_script_runs_and_nothing_is_fetched(kind: str, tmp_path: Path) -> None:
    dom, complaints = browse(tmp_path, render(EVERY[kind]()))
    assert complaints == ""
    assert '<html lang="en" class="js">' in dom
    assert dom.count('aria-sort="none"><button type="button">') >= 4
    if kind != "alone":
        large = dom[dom.index("<svg role=") : dom.index("</svg>")]
        assert large.count("<circle") == 8
        assert large.count("<title>channel ") == 8
    asked = re.findall(r'"url":"(http[^"]+)"', (tmp_path / "net.json").read_text())
    assert [url for url in asked if "evil" in url] == []


@browser
def test_a_browser_s_complaints_are_heard(tmp_path: Path) -> None:
    page = render(live()).replace("</body>", '<script>alert(1)</script><img src="//evil.test/x"></body>')
    _, complaints = browse(tmp_path, page)
    assert complaints.count("Content Security Policy") == 2


def act(tmp_path: Path, report: DriftReport, script: str) -> Any:
    """Return what a script says that is added to a page, which its policy forbids; so that goes."""
    text = re.sub(r"<meta http-equiv[^\n]*\n", "", render(report))
    added = f"<script>document.title = JSON.stringify((() => {{{script}}})());</script></body>"
    dom, complaints = browse(tmp_path, text.replace("</body>", added))
    assert complaints == ""
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    return json.loads(entities.unescape(title[1]))


@browser
def test_columns_sort_both_ways_and_unknown_comes_last(tmp_path: Path) -> None:
    layers = tuple(
        replace(one, mean_shift_sigma=shift)
        for one, shift in zip(trend(4).layers, (0.5, None, 1e-9, 12.0), strict=True)
    )
    script = """
        const table = document.querySelector("table.sortable"), said = [];
        const names = () => [...table.tBodies[0].rows].map((row) => row.cells[1].textContent);
        const heads = [...table.tHead.rows[0].cells];
        const at = heads.findIndex((head) => head.textContent.startsWith("Mean shift"));
        for (let k = 0; k < 2; k++) {
          heads[at].querySelector("button").click();
          said.push([heads[at].getAttribute("aria-sort"), names()]);
        }
        heads[0].querySelector("button").click();
        said.push([heads[at].getAttribute("aria-sort"), names()]);
        return said;
    """
    names = [f"stage{k}.norm" for k in range(4)]
    assert act(tmp_path, replace(trend(4), layers=layers), script) == [
        ["descending", [names[3], names[0], names[2], names[1]]],
        ["ascending", [names[2], names[0], names[3], names[1]]],
        ["none", names],
    ]


@browser
def test_layers_are_chosen_and_cells_are_reached_by_the_keyboard(tmp_path: Path) -> None:
    script = """
        const select = document.querySelector("select"), said = [select.options.length];
        select.value = "2";
        select.dispatchEvent(new Event("change"));
        said.push(document.querySelector("svg[role=img]").getAttribute("aria-label"));
        const thumbs = [...document.querySelectorAll(".thumbs button")];
        said.push(thumbs.map((one) => one.getAttribute("aria-pressed")));
        const first = document.querySelector("table.map td");
        first.focus();
        for (const key of ["ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowUp"])
          document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        said.push(document.activeElement.title === document.getElementById("readout").textContent);
        said.push(document.activeElement.title, document.querySelectorAll("table.map td[tabindex]").length);
        return said;
    """
    report = trend()
    said = act(tmp_path, report, script)
    third = sorted(report.layers, key=lambda one: one.mean_shift_sigma or 0, reverse=True)[2]
    assert said[0] == 4
    assert said[1].startswith(
        f"{third.name}: 8 channels, mean shift up to {third.mean_shift_sigma:.3g} sigma"
    )
    assert said[2] == ["false", "false", "true", "false"]
    assert said[3] is True
    assert said[4].startswith("stage1.norm, step 300: ")
    assert said[5] == 1


@browser
def test_extreme_numbers_are_drawn(tmp_path: Path) -> None:
    largest = 1.7976931348623157e308
    dots = ((-largest, largest), (0.0, 5e-324), (largest, 1.0), (1e-12, 1e-300))
    wide = replace(layer("wide", 1.0), scatter=dots, channels=4)
    still = replace(layer("still", 1.0), scatter=((0.0, 1.0),) * 3, channels=9)
    for one in (wide, still):
        script = """
            return [...document.querySelectorAll("svg[role=img] circle")].map(
                (dot) => [Number(dot.getAttribute("cx")), Number(dot.getAttribute("cy"))]);
        """
        spots = act(tmp_path, replace(drift(), layers=(one,)), script)
        assert len(spots) == len(one.scatter)
        assert all(64 <= x <= 544 and 16 <= y <= 368 for x, y in spots)


@browser
@pytest.mark.parametrize("kind", ["trend", "live", "alone", "hostile"])
def test_a_narrow_screen_scrolls_tables_alone(kind: str, tmp_path: Path) -> None:
    inner = entities.escape(re.sub(r"<meta http-equiv[^\n]*\n", "", render(EVERY[kind]())))
    outer = f"""<!doctype html><title>none</title>
    <iframe width=400 height=800 srcdoc="{inner}"></iframe>
    <script>
        const frame = document.querySelector("iframe");
        frame.onload = () => {{
            const root = frame.contentDocument.documentElement;
            document.title = `${{root.scrollWidth}} in ${{root.clientWidth}}`;
        }};
    </script>"""
    dom, _ = browse(tmp_path, outer)
    widths = re.search(r"<title>(\d+) in (\d+)</title>", dom)
    assert widths is not None
    assert 380 <= int(widths[1]) == int(widths[2]) <= 400
