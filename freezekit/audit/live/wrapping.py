"""What is wrapped in torch while somebody watches, and put back when nobody does.

Nothing is stored in a model: what must be seen is wrapped in its class or module. A wrapper that finds no
watcher only passes the call on, so one that somebody else has wrapped again can stay where it is.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["Line", "user_line", "wrap"]

_MISSING = object()
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
_TRAIN = nn.Module.train.__code__
_PLUMBING = (_TORCH, *(_OURS + room + os.sep for room in ("audit", "nn", "freezing")))


class Line(NamedTuple):
    """A line of code; it is put into words only when it is asked for.

    >>> print(Line("/somewhere/else/train.py", 31, "fit"))
    else/train.py:31 in fit
    """

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        path = self.file
        if os.path.isabs(path):
            here = os.getcwd() + os.sep
            path = path[len(here) :] if path.startswith(here) else os.sep.join(path.split(os.sep)[-2:])
        inside = "" if self.function == "<module>" else f" in {self.function}"
        return f"{path}:{self.number}{inside}"


_lines: dict[tuple[int, int], tuple[CodeType, Line | None]] = {}
"""The line of the user's that a place in a code object is, or none: the same ones are asked for again."""


def user_line() -> Line | None:
    """Return the line that called into torch: not torch's own, nor a module's ``train`` that passes it on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is not _TRAIN:
            found = _lines.get((id(code), frame.f_lasti))
            line = _line_of(frame) if found is None else found[1]
            if line is not None:
                return line
        frame = frame.f_back
    return None


def _line_of(frame: FrameType) -> Line | None:
    code, line = frame.f_code, None
    if not code.co_filename.startswith(_PLUMBING) and not _passes_mode_on(frame):
        line = Line(code.co_filename, frame.f_lineno, code.co_name)
    if len(_lines) > 1000:
        _lines.clear()
    _lines[id(code), frame.f_lasti] = code, line  # with the code itself, so that its id stays its own
    return line


def _passes_mode_on(frame: FrameType) -> bool:
    code = frame.f_code
    if code.co_name not in ("train", "eval") or not code.co_argcount:
        return False
    return isinstance(frame.f_locals.get(code.co_varnames[0]), nn.Module) and code.co_varnames[0] == "self"


class _Wrap:
    def __init__(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        self.owner, self.name, self.users = owner, name, 0
        self.original = vars(owner).get(name, _MISSING)
        self.wrapper = make(None if self.original is _MISSING else self.original)
        setattr(owner, name, self.wrapper)

    def remove(self) -> None:
        if vars(self.owner).get(self.name) is not self.wrapper:
            return  # somebody wrapped it after us: theirs stays, and calls ours, which passes the call on
        if self.original is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)


_wraps: dict[tuple[int, str], _Wrap] = {}


def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], None]:
    """Wrap an attribute of a class or module, once however many ask; returns what undoes this request.

    Args:
        owner: the class or module.
        name: the attribute.
        make: takes what is there, ``None`` where the class only inherits it, and returns what replaces it.
    """
    key = (id(owner), name)
    found = _wraps.get(key) or _wraps.setdefault(key, _Wrap(owner, name, make))
    found.users += 1
    return functools.partial(_release, key, found)


def _release(key: tuple[int, str], wrapped: _Wrap) -> None:
    wrapped.users -= 1
    if not wrapped.users:
        del _wraps[key]
        wrapped.remove()
