"""The auditor's arguments, checked as they are given."""

from __future__ import annotations

from typing import Any

from torch import nn

from freezekit.errors import FreezekitError

__all__ = ["check_options"]


def check_options(
    model: object,
    optimizer: object,
    steps: dict[str, Any],
    *,
    on_drift: str,
    watch: str,
    keep: str,
    snapshot: str,
    timeout: object,
) -> None:
    """Refuse what :class:`freezekit.DriftAuditor` cannot take.

    Args:
        model: what is to be audited.
        optimizer: whose steps to follow, or ``None``.
        steps: the arguments that count steps, by name, ``None`` where they were not given.
        on_drift: as for the auditor, as are the rest.
        watch: likewise.
        keep: likewise.
        snapshot: likewise.
        timeout: likewise.

    Raises:
        FreezekitError: an argument is wrong.
    """
    _one_of("on_drift=", on_drift, "unknown reaction", "raise", "warn", "record")
    _one_of("watch=", watch, "unknown way to watch", "rolling", "all", "norm")
    _one_of("keep=", keep, "unknown place", "device", "host")
    _one_of("snapshot=", snapshot, "unknown kind of snapshot", "copy", "digest")
    for name, given in steps.items():
        if given is not None:
            _steps(f"{name}=", given)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise FreezekitError(
            "not a number of seconds", where="timeout=", got=repr(timeout), remedy="give a number above 0"
        )
    if not isinstance(model, nn.Module):
        raise FreezekitError(
            "not a model", where="model", got=type(model).__name__, remedy="give a torch.nn.Module"
        )
    if optimizer is not None and not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise FreezekitError(
            "not an optimizer of torch's kind",  # Accelerate's is one by its class alone
            where="optimizer=",
            got=type(optimizer).__name__,
            remedy="leave it out: torch's that hold parameters of the model are followed; with another "
            "kind, call .check() after each step inside `with auditor:`",
        )


def _one_of(where: str, given: object, what: str, *known: str) -> None:
    if given not in known:
        listed = ", ".join(repr(word) for word in known[:-1])
        raise FreezekitError(what, where=where, got=repr(given), remedy=f"{listed} or {known[-1]!r}")


def _steps(where: str, given: object) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise FreezekitError(
            "not a number of steps", where=where, got=repr(given), remedy="give a whole number from 1"
        )
