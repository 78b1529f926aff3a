"""Where the ranks of a run meet for the audit: a process group of its own, and who did not come."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from freezekit.errors import FreezekitError

__all__ = ["Meeting", "MissedError", "is_shared"]

T = TypeVar("T")

_GRACE = 30.0
"""Seconds that the others are waited for once a connection has broken: they may only be slower."""

_opened = 0
"""Meetings of this process; every rank opens as many, so this tells them apart in the store."""


def is_shared() -> bool:
    """Tell whether there are other processes to meet."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class MissedError(Exception):
    """Some ranks did not come, or could not be heard; nobody waits for them again.

    Args:
        ranks: which.
        why: in words, the same on every rank that tells.
        ended: whether they only ended their audit earlier.
    """

    def __init__(self, ranks: tuple[int, ...], why: str, *, ended: bool) -> None:
        super().__init__(why)
        self.ranks, self.why, self.ended = ranks, why, ended


class Meeting:
    """Exchanges small things between all ranks, on the host, apart from what the training sends.

    The group is gloo's whatever trains, and made at the first exchange. Each rank first writes down in the
    store of the default group that it is here: when something breaks, the others read there who is not.

    Args:
        timeout: seconds that a rank waits for the others.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._group: Any = None
        self._sent: list[Tensor] = []
        self._store: Any = None
        self._key = ""
        self._round = self._step = 0

    def gather(self, record: Tensor, step: int) -> list[list[int]]:
        """Return every rank's record, by rank.

        Args:
            record: a row of int64, as long on each rank.
            step: this rank's step, told if somebody is missing.

        Raises:
            MissedError: not all came.
        """
        return [each.tolist() for each in self._exchange(step, record)]

    def share(self, item: Any, step: int) -> list[Any]:
        """Return what every rank gave, by rank: plain data of any size.

        Raises:
            MissedError: not all came.
        """
        mine = torch.frombuffer(bytearray(json.dumps(item).encode()), dtype=torch.uint8)
        sizes = [size for (size,) in self.gather(torch.tensor([mine.numel()]), step)]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: mine.numel()] = mine
        told = zip(self._exchange(step, padded), sizes, strict=True)
        return [json.loads(bytes(each[:size].tolist())) for each, size in told]

    def leave(self, error: str | None = None) -> None:
        """Close this rank's end, waiting for nobody; the others will read that it has left.

        Args:
            error: the class of the exception that ends the audit.
        """
        group, self._group = self._group, None
        if not self._key:
            return
        with contextlib.suppress(Exception):  # the store may be gone, with the whole run
            self._post("left", f" with {_an(error)}" if error else "")
        self._store, self._key = None, ""
        time.sleep(0.05)  # see _exchange
        with contextlib.suppress(Exception):  # the user may have destroyed it with all groups
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)
        del group
        self._sent = []

    def _exchange(self, step: int, mine: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        # until the group is gone: in torch 2.6 its threads, dropping the last of a collective, would wait for
        # the GIL of the one who waits for the threads to end
        self._sent = [mine, *everyone]
        began = time.monotonic()
        self._step = step
        try:
            self._open()
            self._round += 1
            self._post("here")
            if self._group is None:
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
            dist.all_gather(everyone, mine, group=self._group)
        except RuntimeError as error:  # whatever breaks in torch.distributed is one
            raise self._missed(began, error) from error
        return everyone

    def _open(self) -> None:
        global _opened
        if self._key:
            return
        if not dist.is_gloo_available():
            raise FreezekitError(
                "ranks are compared over gloo, which this torch was built without",
                where="ranks=",
                remedy="use another build of torch, or leave ranks= out",
            )
        _opened += 1
        self._store = dist.distributed_c10d._get_default_store()
        self._key, self._round = f"freezekit/{_opened}", 0

    def _post(self, state: str, why: str = "", ranks: tuple[int, ...] = (), ended: bool = False) -> None:
        told = [self._round, self._step, state, why, ranks, ended]
        if self._store is not None:
            self._store.set(f"{self._key}/{dist.get_rank()}", json.dumps(told))

    def _read(self) -> dict[int, list[Any]]:
        """Return what each rank has written down last."""
        found = {}
        for rank in range(dist.get_world_size()):
            key = f"{self._key}/{rank}"
            found[rank] = (
                json.loads(self._store.get(key)) if self._store.check([key]) else [0, 0, "", "", (), 0]
            )
        return found

    def _missed(self, began: float, error: RuntimeError) -> MissedError:
        """Find out who is missing, wait for those who may only be slow, and close this rank's end."""
        now = time.monotonic()
        end = max(now + 0.5, min(began + self.timeout, now + _GRACE))
        missing: MissedError | None = None
        while missing is None:
            try:
                states = _within(self.timeout, self._read)
            except (RuntimeError, TimeoutError):
                self._store = None  # whoever asks it again would wait again
                why = "the store of the process group does not answer; rank 0, which has it, is dead or hangs"
                missing = MissedError((0,), why, ended=False)
                break
            over = time.monotonic() >= end
            missing = self._of(states, error, time.monotonic() - began if over else None)
            if missing is None:
                time.sleep(0.05)
        with contextlib.suppress(RuntimeError):
            self._post("over", missing.why, missing.ranks, missing.ended)
        self._store = None  # what is written there stays for who comes later
        self.leave()
        return missing

    def _of(
        self, states: dict[int, list[Any]], error: RuntimeError, waited: float | None
    ) -> MissedError | None:
        """Return who is missing, ``None`` if that may only seem so.

        Args:
            states: what each rank has written down.
            error: what broke.
            waited: the seconds, ``None`` while they are still waited for.
        """
        for _, _, state, why, ranks, ended in states.values():
            if state == "over":
                return MissedError(tuple(ranks), why, ended=ended)
        absent = {rank: told for rank, told in states.items() if told[0] < self._round}
        left = {rank: told for rank, told in absent.items() if told[2] == "left"}
        if absent and len(left) == len(absent):
            parts = [
                f"rank {rank} ended its audit after step {told[1]}{told[3]}" for rank, told in left.items()
            ]
            ended = not any(told[3] for told in left.values())
            return MissedError(
                tuple(left), f"{', '.join(parts)}; the others went on to {self._step}", ended=ended
            )
        if waited is None:
            return None
        if not absent:
            return MissedError((), f"the connection between the ranks broke: {str(error)[:200]}", ended=False)
        parts = [
            f"rank {rank} ({f'last here at step {told[1]}' if told[0] else 'never here'})"
            for rank, told in absent.items()
        ]
        shown = ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")
        why = f"{shown} did not come to the comparison after step {self._step}, waited for {waited:.0f} s"
        return MissedError(tuple(absent), why, ended=False)


def _an(error: str) -> str:
    return f"a{'n' if error[:1] in 'AEIOU' else ''} {error}"


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what a call returns; torch's stores may wait for a process that is stopped, for ever."""
    found: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:  # for the one who asks
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError
    return found[0]
