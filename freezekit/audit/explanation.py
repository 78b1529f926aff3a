"""What an explanation of a code is made of."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FREEZE", "Explanation", "torch_issue", "torch_page", "torch_source"]

FREEZE = "freezekit.freeze_backbone(model)"


@dataclass(frozen=True)
class Explanation:
    """A code at length.

    Args:
        means: what was found, and why it matters.
        how: how people get there.
        fix: what to do.
        sources: where it is written: threads and documentation.

    >>> Explanation("What.", "How people get there.", "What to do.", (torch_issue(86590),)).sources[0]
    'https://github.com/pytorch/pytorch/issues/86590'
    """

    means: str
    how: str
    fix: str
    sources: tuple[str, ...]


def torch_issue(number: int) -> str:
    """Return the address of a thread."""
    return f"https://github.com/pytorch/pytorch/issues/{number}"


def torch_page(name: str) -> str:
    """Return the address of a page of the documentation."""
    return f"https://docs.pytorch.org/docs/stable/generated/{name}.html"


def torch_source(path: str) -> str:
    """Return the address of a source file."""
    return f"https://github.com/pytorch/pytorch/blob/main/torch/{path}"
