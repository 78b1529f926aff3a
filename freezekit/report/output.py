"""Where a report goes and in which form: text for stdout, or a file that is written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import import_module

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.findings import DriftReport
from freezekit.errors import FreezekitError

__all__ = ["FORMS", "check_output", "form_of", "render"]

FORMS = ("table", "json", "markdown", "html")

_ENDINGS = {".txt": "table", ".json": "json", ".md": "markdown", ".html": "html"}


def form_of(output: str | None, form: str | None) -> str:
    """Return the form of a report: the one asked for, or the one that the file's ending tells.

    Args:
        output: the file, or ``None`` for stdout.
        form: one of :data:`FORMS`, or ``None``.

    Raises:
        FreezekitError: the ending tells none.

    >>> form_of("drift.md", None), form_of("drift.md", "json"), form_of(None, None)
    ('markdown', 'json', 'table')
    """
    if form is not None or output is None:
        return form or "table"
    ending = os.path.splitext(output)[1].lower()
    if ending not in _ENDINGS:
        raise FreezekitError(
            "cannot tell the format of the report by its file's ending",
            where=f"-o {printable(output, 200)}",
            got=printable(repr(ending)),
            remedy=f"let it end in {', '.join(_ENDINGS)}, or give --format",
        )
    return _ENDINGS[ending]


def check_output(output: str, inputs: Iterable[str | None]) -> None:
    """Refuse, before anything is read, a file that cannot be written or is one of those to be read.

    Args:
        output: the file.
        inputs: what is read; what is no file is passed over.

    Raises:
        FreezekitError: there is no folder for it, or it is an input.
    """
    folder = os.path.dirname(output) or "."
    if not os.path.isdir(folder):
        raise FreezekitError(
            "cannot write the report: there is no such folder",
            where=f"-o {printable(output, 200)}",
            got=printable(folder, 200),
            remedy="make the folder first, or give the path of a file in one that exists",
        )
    for path in inputs:
        if path is not None and all(map(os.path.exists, (path, output))) and os.path.samefile(path, output):
            raise FreezekitError(
                "the report would overwrite what is audited",
                where=f"-o {printable(output, 200)}",
                got=printable(path, 200),
                remedy="give the report a name of its own",
            )


def render(report: DriftReport, form: str, *, terminal: bool = False) -> str:
    """Return the report in a form; only what that form needs is imported.

    Args:
        report: the report.
        form: one of :data:`FORMS`.
        terminal: whether the text is for a terminal, which tells its width and colours.
    """
    if form == "table":
        from freezekit.report.text import render as as_table

        return as_table(report, terminal=terminal)
    text: str = import_module(f"freezekit.report.{form}").render(report)
    return text
