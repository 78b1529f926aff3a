"""Releasing: how frozen layers and parameters are let go."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from freezekit.errors import SelectionError
from freezekit.freezing import holding
from freezekit.freezing.selection import require_module, tensors_of
from freezekit.patterns import select

__all__ = ["release_all", "unfreeze"]


def unfreeze(model: nn.Module, patterns: str | Iterable[str] = "*") -> None:
    """Let frozen layers train again, whichever freeze holds them.

    They get back the ``requires_grad`` they had before, and the mode that was last asked of the model.

    Args:
        model: the model.
        patterns: names or globs of frozen modules or parameters; everything by default.

    Raises:
        SelectionError: a pattern names nothing that is frozen.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> from freezekit import freeze, is_frozen
    >>> handle = freeze(model, ["0", "1"])
    >>> unfreeze(model, "1")
    >>> is_frozen(model, "0"), is_frozen(model, "1")
    (True, False)

    Source: PyTorch documentation, torch.nn.Module.train and torch.nn.Module.requires_grad_.
    """
    require_module(model)
    if patterns == "*":  # also where nothing is frozen
        release_all(model, None, adopt_mode=True)
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    held = [name for name, module in modules.items() if name and holding.is_held(module)]
    tensors = {
        name: (owner, own, t) for name, owner, own, t in tensors_of(model) if holding.holders_of(owner, own)
    }
    if not held and not tensors:
        raise SelectionError("nothing in the model is frozen", where="patterns", got=repr(patterns))
    chosen = select(patterns, [*held, *tensors], where="patterns", kind="frozen layer or parameter")
    tied = {id(tensors[name][2]) for name in chosen if name in tensors}
    released = [name for name, (_, _, t) in tensors.items() if id(t) in tied]
    # What holds something that trains is not frozen itself: the modules above follow train() again.
    paths = [name if name in modules else name.rpartition(".")[0] for name in (*chosen, *released)]
    above = {path.rsplit(".", k)[0] for path in paths for k in range(path.count(".") + 1)} | {""}
    for path in above:
        holding.check_release(modules[path], path)
    for name in released:
        owner, own, _ = tensors[name]
        holding.release_tensor(owner, own, holding.holders_of(owner, own))
    owners = {id(tensors[name][0]) for name in released}
    for module in {id(modules[path]): modules[path] for path in above}.values():
        if holding.is_held(module):
            holding.release_module(module, holding.holders_of(module), adopt_mode=True)
            # The buffers beside a parameter that trains move with it; those further up stay where they are.
            for own in module._buffers if id(module) in owners else ():
                holding.release_tensor(module, own, holding.holders_of(module, own))
            holding.pin_buffers(module)


def release_all(model: nn.Module, holders: set[str] | None, *, adopt_mode: bool) -> None:
    """Let go of everything that ``holders`` hold, or that anyone does (``None``)."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if holders is None or holding.holders_of(module) == holders:
            holding.check_release(module, name)
    for module in modules.values():
        for own in (*module._parameters, *module._buffers):
            leaving = holding.holders_of(module, own) if holders is None else holders
            holding.release_tensor(module, own, leaving)
        leaving = holding.holders_of(module) if holders is None else holders
        holding.release_module(module, leaving, adopt_mode=adopt_mode)
    ids = {id(module) for module in modules.values()}
    for module in modules.values():
        holding.end_lone_pair(module, ids)
