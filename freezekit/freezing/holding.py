"""Holding: the class swap in place, what is needed to reverse it, and who asked for it.

What a freeze changes about a module is noted in the module's own ``__dict__``, so that it travels with
copies and pickles of the model. Several freezes may hold one module: each is a holder, and the module is
released when the last one lets go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.fx import GraphModule

from freezekit.errors import FreezekitError
from freezekit.nn.frozen import frozen_class
from freezekit.nn.held import Held

__all__ = [
    "check_release",
    "hold_module",
    "holders_of",
    "is_held",
    "note_tensor",
    "release_module",
    "release_tensor",
    "stop_gradient",
]

_KEY = "_freezekit_record"


@dataclass
class _Record:
    origin: type[nn.Module] | None = None
    """The module's class before the swap; ``None`` if not held, or made as a frozen layer."""
    holders: set[str] = field(default_factory=set)
    tensor_holders: dict[str, set[str]] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    """What each frozen parameter had, to be restored."""


def _record(module: nn.Module) -> _Record:
    record: _Record = module.__dict__.setdefault(_KEY, _Record())
    return record


def _forget_if_empty(module: nn.Module, record: _Record) -> None:
    if not record.holders and not record.tensor_holders:
        del module.__dict__[_KEY]


def is_held(module: nn.Module) -> bool:
    """Tell whether the module is held in eval mode."""
    return isinstance(module, Held) or bool(holders_of(module))


def holders_of(module: nn.Module, tensor: str | None = None) -> set[str]:
    """Return the freezes that hold the module, or one of its own parameters and buffers."""
    record: _Record | None = module.__dict__.get(_KEY)
    if record is None:
        return set()
    return set(record.holders if tensor is None else record.tensor_holders.get(tensor, ()))


def hold_module(module: nn.Module, holder: str) -> None:
    """Keep the module in eval mode until ``holder`` releases it."""
    # A traced graph has its modes written into it, and fx makes a class for each instance by itself.
    if not isinstance(module, (Held, GraphModule)):
        origin = type(module)
        try:
            module.__class__ = frozen_class(origin)
        except TypeError as error:
            raise FreezekitError(
                "the class of this module cannot be swapped in place",
                where=origin.__qualname__,
                got=str(error),
                remedy="leave the module out of what is frozen",
            ) from error
        _record(module).origin = origin
    _record(module).holders.add(holder)


def check_release(module: nn.Module, name: str) -> None:
    """Refuse to release a module whose class something else has changed since it was frozen.

    Raises:
        FreezekitError: giving it back its old class would break it.
    """
    record: _Record | None = module.__dict__.get(_KEY)
    if record is None or record.origin is None or type(module) is frozen_class(record.origin):
        return
    raise FreezekitError(
        "the class of this layer was changed while it was frozen, so it cannot be unfrozen",
        where=name,
        got=f"{type(module).__name__}, frozen as {frozen_class(record.origin).__name__}",
        remedy="take back that change first (a parametrization, say)",
    )


def release_module(module: nn.Module, holders: Iterable[str], *, adopt_mode: bool) -> None:
    """Let go of the module; with the last holder gone it gets its class back.

    Args:
        module: a held module; any other is left alone.
        holders: who lets go.
        adopt_mode: take on the mode last asked for while frozen, instead of that at the freeze.
    """
    record: _Record | None = module.__dict__.get(_KEY)
    if record is None:
        return
    record.holders.difference_update(holders)
    if record.origin is not None and not record.holders:
        module.__class__ = record.origin
        record.origin = None
        asked = module.__dict__.pop("_asked_training", None)
        if adopt_mode and asked is not None:
            module.training = asked
    _forget_if_empty(module, record)


def note_tensor(module: nn.Module, name: str, holder: str) -> None:
    """Mark the module's own parameter or buffer ``name`` as frozen, and note whether it requires a gradient.

    All names of a tied parameter are noted before :func:`stop_gradient` is called on any.
    """
    record = _record(module)
    record.tensor_holders.setdefault(name, set()).add(holder)
    parameter = module._parameters.get(name)
    if parameter is not None:
        record.requires_grad.setdefault(name, parameter.requires_grad)


def stop_gradient(module: nn.Module, name: str) -> None:
    """Stop the module's own parameter ``name`` from training, and drop a gradient left from before.

    A buffer of that name is kept in place by holding its module.
    """
    parameter = module._parameters.get(name)
    if parameter is not None:
        parameter.requires_grad_(False)
        # An optimizer moves whatever has a gradient, whether or not it requires one.
        parameter.grad = None


def release_tensor(module: nn.Module, name: str, holders: Iterable[str]) -> None:
    """Let go of a tensor; with the last holder gone it requires a gradient again if it did before."""
    record: _Record | None = module.__dict__.get(_KEY)
    if record is None or name not in record.tensor_holders:
        return
    record.tensor_holders[name].difference_update(holders)
    if record.tensor_holders[name]:
        return
    del record.tensor_holders[name]
    requires_grad = record.requires_grad.pop(name, None)
    parameter = module._parameters.get(name)
    if parameter is not None and requires_grad is not None:
        parameter.requires_grad_(requires_grad)
    _forget_if_empty(module, record)
