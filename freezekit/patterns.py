"""Globs over dotted names, as used wherever freezekit takes the names of layers or tensors."""

from __future__ import annotations

import difflib
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from fnmatch import translate

from freezekit.errors import SelectionError

__all__ = ["below", "select"]


def select(
    patterns: str | Iterable[str], names: Sequence[str], *, where: str, kind: str = "name"
) -> list[str]:
    """Return the names that a pattern matches, with everything below them, in the order of ``names``.

    ``*`` matches any run of characters, dots included, ``?`` one character and ``[ab]`` one of a set.
    A pattern that is a name stands for that name, whatever characters are in it.

    Args:
        patterns: one pattern or several.
        names: dotted names to choose from.
        where: the argument the patterns came from, for the error.
        kind: what the names name, for the error.

    Raises:
        SelectionError: a pattern matches nothing; the error gives the closest names.

    >>> names = ["conv1.weight", "layer1.0.bn1.weight", "layer10.0.bn1.weight"]
    >>> select("layer1", names, where="frozen=")
    ['layer1.0.bn1.weight']
    >>> select("layer*.bn1", names, where="frozen=")
    ['layer1.0.bn1.weight', 'layer10.0.bn1.weight']
    """
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        patterns = [patterns]  # what is no string is refused below, with what it is
    patterns = list(patterns)
    if not patterns:
        raise SelectionError(f"no {kind} is given", where=where, remedy=f"give at least one {kind} or glob")
    ordered = sorted(names)
    exact = set(names)
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SelectionError(
                f"a {kind} must be a string",
                where=where,
                got=repr(pattern)[:80],
                remedy="give names or globs",
            )
        found = below(pattern, ordered) if pattern else []
        found += [pattern] * (pattern in exact)
        if not found:
            # translate() ends in an anchor; everything below a matched name belongs to it
            matches = re.compile(f"(?:{translate(pattern)[:-2]})(?:\\..*)?", re.DOTALL).fullmatch
            found = [name for name in names if matches(name)]
        if not found:
            raise SelectionError(
                f"no {kind} matches", where=where, got=repr(pattern), remedy=_suggest(pattern, names)
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def below(scope: str, ordered: list[str]) -> list[str]:
    """Return the names below ``scope`` of a sorted list, without looking at the others; all below ``""``.

    >>> below("a", ["a", "a.b", "ab.c"])
    ['a.b']
    """
    if not scope:
        return ordered
    # "/" comes next after "."
    return ordered[bisect_left(ordered, f"{scope}.") : bisect_left(ordered, f"{scope}/")]


def _suggest(pattern: str, names: Sequence[str]) -> str:
    # what is above them too: someone who mistypes "layer4" should not be offered a tensor deep inside it
    some = [name for name in names[:5000] if len(name) <= 200]
    every = list(dict.fromkeys(n.rsplit(".", k)[0] for n in some for k in range(n.count(".") + 1)))
    close = difflib.get_close_matches(pattern, every, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    top = list(dict.fromkeys(name.partition(".")[0] for name in names))
    return "the names begin with: " + ", ".join(top[:12]) + (", ..." if len(top) > 12 else "")
