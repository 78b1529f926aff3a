"""Codes explained, as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from freezekit.audit.codes import EXPLANATIONS
from freezekit.audit.findings import CODES

__all__ = ["render", "render_list"]


def render(codes: Iterable[str], *, width: int = 80) -> str:
    """Return what the codes mean at length.

    Args:
        codes: as in :data:`~freezekit.audit.findings.CODES`.
        width: columns; links are never broken.

    >>> print(render(["FK106"]).splitlines()[0])
    FK106  a frozen tensor moved to another device  (warning)
    """
    return "\n\n".join(_one(code, width) for code in codes)


def _one(code: str, width: int) -> str:
    (title, level), at_length = CODES[code], EXPLANATIONS[code]
    lines = [f"{code}  {title}  ({level})"]
    for label, text in (("", at_length.means), ("how: ", at_length.how), ("fix: ", at_length.fix)):
        lines += ["", *_wrapped(label, text, width)]
    lines += ["", *(f"  {'see:' if not k else '    '} {url}" for k, url in enumerate(at_length.sources))]
    return "\n".join(lines)


def _wrapped(label: str, text: str, width: int) -> list[str]:
    hang = " " * (2 + len(label))
    return textwrap.wrap(
        text, width, initial_indent=f"  {label}", subsequent_indent=hang,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def render_list(*, width: int = 80) -> str:
    """Return all codes with what they mean, a line for each.

    >>> print(render_list().splitlines()[0])
    FK101  error    running statistics moved
    """
    hang = " " * 16
    return "\n".join(
        textwrap.fill(f"{code}  {level:7}  {meaning}", width, subsequent_indent=hang)
        for code, (meaning, level) in CODES.items()
    )
