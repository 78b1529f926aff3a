"""The few kinds of error freezekit raises: each says what, where, what was given, and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from freezekit.audit.findings import DriftReport

__all__ = [
    "CheckpointError",
    "DriftError",
    "DriftWarning",
    "FreezekitError",
    "OptimizerWarning",
    "SelectionError",
]


class FreezekitError(Exception):
    """Base of every error that freezekit raises on purpose.

    Args:
        what: what went wrong, as a sentence without its full stop.
        where: the file, layer or argument concerned.
        got: what was given.
        remedy: what to do about it.

    >>> print(FreezekitError("no such layer", where="head=", got="'fcc'", remedy="did you mean 'fc'?"))
    head=: no such layer (got 'fcc'). Remedy: did you mean 'fc'?
    """

    exit_code = 2
    """What the command line exits with: 2 wrong usage, 3 an unreadable, unsupported or hostile file."""

    def __init__(
        self, what: str, *, where: str | None = None, got: str | None = None, remedy: str | None = None
    ) -> None:
        self.what, self.where, self.got, self.remedy = what, where, got, remedy
        message = what if where is None else f"{where}: {what}"
        if got is not None:
            message += f" (got {got})"
        if remedy is not None:
            message += f". Remedy: {remedy}"
        super().__init__(message)


class SelectionError(FreezekitError, ValueError):
    """Names or patterns match nothing, or it cannot be told which part of a model is meant."""


class CheckpointError(FreezekitError):
    """A file cannot be read: it is missing, damaged, unsupported or hostile."""

    exit_code = 3


class DriftError(FreezekitError):
    """Something frozen has moved; ``report`` holds the findings."""

    exit_code = 1

    def __init__(self, what: str, report: DriftReport, *, remedy: str | None = None) -> None:
        super().__init__(what, remedy=remedy)
        self.report = report

    def __reduce__(self) -> tuple[type[DriftError], tuple[str, DriftReport], dict[str, str | None]]:
        # an exception is pickled with its message alone, which a worker process could not make it from
        return type(self), (self.what, self.report), {"remedy": self.remedy, "args": self.args}  # type: ignore[dict-item]


class DriftWarning(UserWarning):
    """Something frozen has moved, and the auditor was asked to warn (``on_drift="warn"``)."""


class OptimizerWarning(UserWarning):
    """Parameters train but no optimizer given has them, so no step moves them: a new head, most often."""
