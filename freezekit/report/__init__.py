"""Rendering: a DriftReport in, text out."""

from __future__ import annotations

import os

__all__ = ["part"]


def part(name: str) -> str:
    """Return a file of this package: the schema, a page's style or script."""
    with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as file:
        return file.read()
