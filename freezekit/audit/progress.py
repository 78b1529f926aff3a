"""How far a long read has come: whoever reads says so, whoever shows it listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["advance", "listening"]

_LISTENER: ContextVar[Callable[[int], None] | None] = ContextVar("listener", default=None)


def advance(nbytes: int) -> None:
    """Say that so many more bytes are about to be read; costs next to nothing where nobody listens.

    Args:
        nbytes: how many.
    """
    listener = _LISTENER.get()
    if listener is not None:
        listener(nbytes)


@contextmanager
def listening(listener: Callable[[int], None]) -> Iterator[None]:
    """Hear, inside the block, of the bytes that are read in this thread.

    Args:
        listener: called with the number of bytes of each read.

    >>> heard: list[int] = []
    >>> with listening(heard.append):
    ...     advance(3)
    >>> advance(4)
    >>> heard
    [3]
    """
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)
