"""Holding: the class swap in place, what is needed to reverse it, and who asked for it.

What a freeze changes about a module is noted in the module's own ``__dict__``, so that it travels with
copies and pickles of the model. Several freezes may hold one module: each is a holder, and the module is
released when the last one lets go.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from freezekit.errors import FreezekitError
from freezekit.nn.affine import FrozenAffine, affine_class
from freezekit.nn.folded import FOLDABLE, PAIR, Pair, folded_class, pair_of
from freezekit.nn.frozen import _FrozenBatchNorm, frozen_class
from freezekit.nn.held import PINNED, Held, pinned_class
from freezekit.nn.remembered import forget

__all__ = [
    "check_release",
    "end_lone_pair",
    "fold",
    "hold_module",
    "holders_of",
    "is_batchnorm",
    "is_held",
    "is_pinned",
    "is_sharded",
    "kernel_of",
    "live_class",
    "make_affine",
    "note_tensor",
    "pin_buffers",
    "release_module",
    "release_tensor",
    "stop_gradient",
    "tensors_held",
]

_KEY = "_freezekit_record"


@dataclass(slots=True)
class _Record:
    origin: type[nn.Module] | None = None
    """The module's class before the swap; ``None`` if neither held nor folded, or made as a frozen layer."""
    holders: frozenset[str] = frozenset()
    tensor_holders: dict[str, frozenset[str]] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    """What each frozen parameter had, to be restored."""
    affine: bool = False
    """Whether a held BN is computed by scale and shift (or folded, if it has a pair)."""


def _record(module: nn.Module) -> _Record:
    record: _Record | None = module.__dict__.get(_KEY)
    if record is None:
        record = module.__dict__[_KEY] = _Record()
    return record


@functools.lru_cache(maxsize=8)
def _only(holder: str) -> frozenset[str]:
    """Return the set that all layers of one freeze share: a set for each would keep the collector busy."""
    return frozenset((holder,))


def _forget_if_empty(module: nn.Module, record: _Record) -> None:
    if not record.holders and not record.tensor_holders and record.origin is None:
        module.__dict__.pop(_KEY, None)


def _swapped_class(module: nn.Module, origin: type[nn.Module], record: _Record) -> type[nn.Module]:
    """Return the class a module is to have, by what is noted about it."""
    cls = origin
    if record.holders and record.affine:
        affine = affine_class(cls)
        assert affine is not None
        return folded_class(affine) if PAIR in module.__dict__ else affine
    if PAIR in module.__dict__:
        cls = folded_class(cls)
    if record.holders:
        return frozen_class(cls)
    return pinned_class(cls) if PINNED in module.__dict__ else cls


def is_held(module: nn.Module) -> bool:
    """Tell whether the module is held in eval mode."""
    return isinstance(module, Held) or bool(holders_of(module))


def is_pinned(module: nn.Module) -> bool:
    """Tell whether buffers of the module's own are kept in place around a part that trains."""
    return PINNED in module.__dict__


def holders_of(module: nn.Module, tensor: str | None = None) -> frozenset[str]:
    """Return the freezes that hold the module, or one of its own parameters and buffers."""
    record: _Record | None = module.__dict__.get(_KEY)
    if record is None:
        return frozenset()
    return record.holders if tensor is None else record.tensor_holders.get(tensor, frozenset())


def tensors_held(module: nn.Module) -> list[str]:
    """Return the names under which tensors of the module's own were frozen, also those gone since."""
    record: _Record | None = module.__dict__.get(_KEY)
    return [] if record is None else list(record.tensor_holders)


def hold_module(module: nn.Module, holder: str) -> None:
    """Keep the module in eval mode until ``holder`` releases it."""
    record = _record(module)
    # A traced graph has its modes written into it, and fx makes a class for each instance by itself.
    if not isinstance(module, (Held, GraphModule)):
        before = record.holders
        record.holders = before | {holder} if before else _only(holder)
        try:
            _swap_from(record.origin or _bare_class(module), module, record)
        except FreezekitError:
            record.holders = before
            _forget_if_empty(module, record)
            raise
    else:
        record.holders |= {holder}


def _swap_from(origin: type[nn.Module], module: nn.Module, record: _Record) -> None:
    try:
        _give_class(module, _swapped_class(module, origin, record))
    except Exception as error:  # a metaclass may raise anything
        raise FreezekitError(
            "the class of this module cannot be swapped in place",
            where=origin.__qualname__,
            got=str(error),
            remedy="leave the module out of what is frozen",
        ) from error
    record.origin = origin


def _give_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if _has_front(present := type(module)):
        cls = _with_front(present, cls)
    # Not by a __setattr__ of the module's own, which may hand everything on to a module inside.
    object.__setattr__(module, "__class__", cls)


_fronted: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}


def _has_front(cls: type) -> bool:
    """Tell whether torch.distributed made a module's class, as ``fully_shard`` makes ``FSDPX`` of X."""
    bases = cls.__bases__
    return (
        len(bases) == 2
        and bases[0].__module__.startswith("torch.distributed.")
        and issubclass(bases[1], nn.Module)
        and not issubclass(bases[0], nn.Module)
    )


def _with_front(like: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """Return the class that torch.distributed would have made of ``base`` where it made ``like``."""
    front, of = like.__bases__
    if "_freezekit_front" not in like.__dict__:
        _fronted[front, of] = like  # torch's own, for undo() to find
    if (front, base) not in _fronted:
        own = {key: value for key, value in like.__dict__.items() if key not in ("__dict__", "__weakref__")}
        name = like.__name__.removesuffix(of.__name__) + base.__name__
        _fronted[front, base] = type(name, (front, base), own | {"_freezekit_front": front})
    return _fronted[front, base]


def _bare_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class, without what torch.distributed put in front of it, which stays in place."""
    cls = type(module)
    return cls.__bases__[1] if _has_front(cls) else cls


def is_sharded(module: nn.Module) -> bool:
    """Tell whether ``fully_shard`` was applied to the module itself."""
    return _has_front(type(module)) and hasattr(module, "reshard")


def pin_buffers(module: nn.Module) -> None:
    """Keep the frozen buffers of a module that is not held in place whatever its forward does to them."""
    record = _record(module)
    names = tuple(name for name in module._buffers if name in record.tensor_holders)
    if names and not isinstance(module, GraphModule):
        module.__dict__[PINNED] = names
        try:
            _swap_from(record.origin or _bare_class(module), module, record)
        except FreezekitError:
            del module.__dict__[PINNED]
            raise
    elif module.__dict__.pop(PINNED, None):
        _swap(module)


def live_class(module: nn.Module) -> type[nn.Module]:
    """Return the class the module has when it is neither held nor folded."""
    record: _Record | None = module.__dict__.get(_KEY)
    return _bare_class(module) if record is None or record.origin is None else record.origin


def is_batchnorm(module: nn.Module) -> bool:
    """Tell whether the module is a BN layer, live or frozen, a subclass included."""
    return issubclass(live_class(module), (_BatchNorm, _FrozenBatchNorm))


def make_affine(module: nn.Module) -> None:
    """Give a held BN layer, until it is released, the kernel of scale and shift."""
    record = _record(module)
    assert record.origin is not None
    record.affine = True
    _swap(module)


def fold(layer: nn.Module, norm: nn.Module) -> None:
    """Fold an affine BN into the layer before it, until the BN is released."""
    for module in (layer, norm):
        record = _record(module)
        record.origin = record.origin or _bare_class(module)
    pair = Pair(FOLDABLE[live_class(layer)])
    for module in (layer, norm):
        module.__dict__[PAIR] = pair
        _swap(module)
        pair.enter(module)


def _swap(module: nn.Module) -> None:
    """Give the module the class that follows from what is noted about it, and forget what is over."""
    forget(module)
    record = _record(module)
    if record.origin is not None:
        cls = _swapped_class(module, record.origin, record)
        _give_class(module, cls)
        if cls is record.origin:
            record.origin = None
    _forget_if_empty(module, record)


def kernel_of(module: nn.Module) -> str:
    """Return by what a frozen BN layer is computed: ``"exact"``, ``"affine"`` or ``"fold"``."""
    pair = pair_of(module)
    if pair is not None and pair.folds(pair.rank):
        return "fold"
    return "affine" if isinstance(module, FrozenAffine) else "exact"


def check_release(module: nn.Module, name: str) -> None:
    """Refuse to release a module whose class something else has changed since it was frozen.

    Raises:
        FreezekitError: giving it back its old class would break it.
    """
    pair = pair_of(module)
    partner = pair.layer if pair is not None and pair.norm is module else None
    for changed in (module, partner):
        record: _Record | None = None if changed is None else changed.__dict__.get(_KEY)
        if changed is None or record is None or record.origin is None:
            continue
        expected = _swapped_class(changed, record.origin, record)
        if _bare_class(changed) is not expected:
            raise FreezekitError(
                "the class of this layer was changed while it was frozen, so it cannot be unfrozen",
                where=name if changed is module else f"the layer that {name} is folded into",
                got=f"{type(changed).__name__}, frozen as {expected.__name__}",
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
    record.holders = record.holders.difference(holders)
    if record.holders:
        return
    if record.origin is not None:
        record.affine = False
        _unfold(module)
        _swap(module)
        asked = module.__dict__.pop("_asked_training", None)
        if adopt_mode and asked is not None:
            module.training = asked
    _forget_if_empty(module, record)


def _unfold(module: nn.Module) -> None:
    """End the pair of a BN that is released; a layer's only if its BN is gone."""
    pair = module.__dict__.get(PAIR)
    if pair is None:
        return
    layer = pair.layer
    if pair.norm is module and layer is not None and layer.__dict__.get(PAIR) is pair:
        del layer.__dict__[PAIR]
        _swap(layer)
    if pair.norm is module or pair.norm is None or layer is not module:
        module.__dict__.pop(PAIR, None)


def end_lone_pair(module: nn.Module, modules: set[int]) -> None:
    """Unfold a layer whose BN is no longer in the model that ``modules`` are the ids of."""
    pair = pair_of(module)
    if pair is not None and pair.layer is module and id(pair.norm) not in modules:
        del module.__dict__[PAIR]
        _swap(module)


def note_tensor(module: nn.Module, name: str, holder: str) -> None:
    """Mark the module's own parameter or buffer ``name`` as frozen, and note whether it requires a gradient.

    All names of a tied parameter are noted before :func:`stop_gradient` is called on any.
    """
    record = _record(module)
    before = record.tensor_holders.get(name)
    record.tensor_holders[name] = before | {holder} if before else _only(holder)
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
    left = record.tensor_holders[name].difference(holders)
    if left:
        record.tensor_holders[name] = left
        return
    del record.tensor_holders[name]
    if PINNED in module.__dict__:
        pin_buffers(module)
    requires_grad = record.requires_grad.pop(name, None)
    forget(module)
    parameter = module._parameters.get(name)
    if parameter is not None and requires_grad is not None:
        parameter.requires_grad_(requires_grad)
    _forget_if_empty(module, record)
