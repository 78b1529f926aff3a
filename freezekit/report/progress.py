"""A progress bar on stderr for reads that take long; rich is imported only when it is shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from freezekit.audit.progress import listening

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["progress_bar"]

_PATIENCE = 1.0
"""Seconds until it is shown."""


class _Bar:
    def __init__(self) -> None:
        self.start, self.read = time.monotonic(), 0
        self.shown: Progress | None = None

    def advance(self, nbytes: int) -> None:
        """Count, and show the bar when it is time to."""
        self.read += nbytes
        if self.shown is None and time.monotonic() - self.start > _PATIENCE:
            self.shown = _made()
            self.shown.start()
        if self.shown is not None:
            self.shown.update(self.shown.task_ids[0], completed=self.read)

    def stop(self) -> None:
        """Take it off the terminal."""
        if self.shown is not None:
            self.shown.stop()


def _made() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, FileSizeColumn, Progress, TimeElapsedColumn, TransferSpeedColumn

    # how much will be read is not known: it depends on what turns out to have changed
    columns = ("reading", BarColumn(), FileSizeColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    progress.add_task("reading", total=None)
    return progress


@contextmanager
def progress_bar() -> Iterator[None]:
    """Show how much has been read inside the block, if it takes long and stderr is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    bar = _Bar()
    try:
        with listening(bar.advance):
            yield
    finally:
        bar.stop()
