"""Globs over dotted names."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freezekit import SelectionError
from freezekit.patterns import select

NAMES = ["conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias", "layer10.0.bn1.weight", "fc.weight"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layer1", NAMES[1:3]),
        ("layer1.0.bn1.bias", NAMES[2:3]),
        ("layer1*", NAMES[1:4]),
        ("*.weight", [NAMES[0], NAMES[1], NAMES[3], NAMES[4]]),
        ("layer*.bn1", NAMES[1:4]),
        ("layer[0-9].*", NAMES[1:3]),
        ("f?", NAMES[4:]),
        ("*", NAMES),
        (["fc", "conv1"], [NAMES[0], NAMES[4]]),
    ],
)
def test_what_a_pattern_matches(pattern: str | list[str], expected: list[str]) -> None:
    assert select(pattern, NAMES, where="x") == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer2", "x: no name matches .got 'layer2'.. Remedy: did you mean 'layer1'"),
        ("zzz", "the names begin with: conv1, layer1, layer10, fc"),
        ([], "x: no name is given"),
        ([3], "x: a name must be a string .got 3"),
        (["fc", "Layer1"], "got 'Layer1'"),
    ],
)
def test_what_matches_nothing_is_an_error(pattern: list[str], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select(pattern, NAMES, where="x")


def test_a_name_with_glob_characters_stands_for_itself() -> None:
    names = ["a[0].weight", "a0.weight", "*.bias", "b.bias"]
    assert select("a[0]", names, where="x") == ["a[0].weight"]
    assert select("*.bias", names, where="x") == ["*.bias"]


def test_a_name_with_a_line_break_below() -> None:
    assert select("a", ["a.b\nc", "b"], where="x") == ["a.b\nc"]


def test_a_name_from_inside_another_model() -> None:
    with pytest.raises(SelectionError, match="did you mean 'layer1'"):
        select("backbone.layer1", NAMES, where="x")


parts = st.lists(st.text("ab1*?", min_size=1, max_size=3), min_size=1, max_size=3).map(".".join)
names = st.lists(
    st.lists(st.text("ab1", min_size=1, max_size=3), min_size=1, max_size=4).map(".".join),
    min_size=1, max_size=8, unique=True,
)  # fmt: skip


@given(parts, names)
def test_a_pattern_matches_a_name_or_something_above_it(pattern: str, names: list[str]) -> None:
    prefixes = {name: [name.rsplit(".", k)[0] for k in range(name.count(".") + 1)] for name in names}
    expected = [name for name in names if any(fnmatchcase(prefix, pattern) for prefix in prefixes[name])]
    if expected:
        assert select(pattern, names, where="x") == expected
    else:
        with pytest.raises(SelectionError):
            select(pattern, names, where="x")
