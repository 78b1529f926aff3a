"""Held and pinned: what keeps a module in eval mode, or its own buffers in place, whatever is asked of it.

``model.train()`` and ``m.training = True`` both assign to the attribute ``training``. A held module's
class has a property of that name that is always ``False``, so neither can reach it; and since this is a
matter of class and not of the instance, it survives copies, pickles and compilation.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase, ObserverBase
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["PINNED", "Held", "held_class", "pinned_class"]

_Maker: TypeAlias = Callable[[type[nn.Module]], type[nn.Module]]

PINNED = "_freezekit_pinned"
"""Where a pinned module notes the names of its buffers that stay in place."""


class Held:
    """Mixin of every module class that is frozen: ``training`` is always ``False``.

    The mode the module had when it was frozen stays untouched in its ``__dict__``, where ``undo()`` finds
    it; the mode last asked for meanwhile is kept beside it, for ``unfreeze``.
    """

    _asked_training: bool

    @property
    def training(self) -> bool:
        """Always ``False``; assigning to it has no effect until the module is unfrozen."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["_asked_training"] = mode

    def train(self, mode: bool = True) -> Any:
        """Note the mode and pass it on; a ``train`` of the module's own class is not run: it may do more."""
        self.training = mode
        for child in cast("nn.Module", self).children():
            child.train(mode)
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; in the place of one that does not train, it does not train either.

        Tensor parallelism puts a sharded parameter in the place of each, which in torch 2.6 would train.
        """
        module = cast("nn.Module", super())
        old = self.__dict__["_parameters"].get(name)
        module.register_parameter(name, param)
        if old is not None and param is not None and not old.requires_grad:
            param.requires_grad_(False)


class _Made:
    """A module class made at run time from another."""

    _freezekit_base: type[nn.Module]
    _freezekit_make: _Maker

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Stops here on purpose: the module's own __init_subclass__ is for classes its authors write.
        pass

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class cannot be found by name, so a pickle (or a copy) makes it again from its base.
        cls = type(self)
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple):
            return reduced
        # Its class's own way, or copyreg's, with the base wherever the class made here would be named.
        remake, *args = (cls._freezekit_base if part is cls else part for part in (reduced[0], *reduced[1]))
        return (_make_again, (cls._freezekit_make, remake, tuple(args)), *reduced[2:])


class _BatchNormTwin(_NormBase):
    """Stands in for torch's ``_BatchNorm`` among the ancestors of a held BN subclass."""

    forward = _BatchNorm.forward


class _SparingInstanceNorm(_InstanceNorm):
    """Stands before torch's ``_InstanceNorm`` among the ancestors of a held one.

    torch's kernel has a row of statistics for each item of the batch, and writes their mean back in eval mode
    too (torch 2.6), or moves them by the batch if ``track_running_stats`` was switched off later: so it is
    given copies.
    """

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.instance_norm(
            input,
            None if mean is None else mean.clone(),
            None if var is None else var.clone(),
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
        )


class _HeldObserver(Held):
    """A quantization observer records what it sees in eval mode too; a held one records nothing."""

    def forward(self, x_orig: Tensor) -> Tensor:
        return x_orig


class _HeldFakeQuantize(Held):
    """Quantises by the scale it has: its observer, which works in eval mode too, looks switched off."""

    @property
    def observer_enabled(self) -> Tensor:
        return torch.zeros_like(cast("Tensor", cast("nn.Module", self)._buffers["observer_enabled"]))


class _Pinned:
    """Keeps buffers in place around a part that trains: the forward has copies to write to."""


_MIXINS = (Held, _HeldObserver, _HeldFakeQuantize, _Pinned)


class _MadeMeta(type):
    """Orders the ancestors of a class made at run time: what holds it first, and no ``_BatchNorm``.

    The base comes first among the bases, for the layout that a swap in place requires, but must come
    second when a method is looked up. And whatever moves running statistics in the ecosystem finds BN by
    ``_BatchNorm`` (``update_bn`` resets them, ``convert_sync_batchnorm`` puts a live layer in its place), so
    a twin takes its place: ``super().forward()`` in a BN subclass still arrives at the same function.
    An instance norm has one more ancestor, which spares its statistics.
    """

    def mro(cls) -> list[type]:
        if _Made not in cls.__bases__:  # made of one that is held, by fully_shard for one
            return super().mro()
        found = super().mro()[1:]
        first = [ancestor for ancestor in found if ancestor is _Made or ancestor in _MIXINS]
        rest = [ancestor for ancestor in found if ancestor not in first]
        rest = [_BatchNormTwin if ancestor is _BatchNorm else ancestor for ancestor in rest]
        if _InstanceNorm in rest and Held in first:
            rest.insert(rest.index(_InstanceNorm), _SparingInstanceNorm)
        return [cls, *first, *rest]


_made: dict[tuple[_Maker, type[nn.Module]], type[nn.Module]] = {}


def _make(maker: _Maker, base: type[nn.Module], name: str, mixin: type, **namespace: Any) -> type[nn.Module]:
    def body(into: dict[str, Any]) -> None:
        # `__module__` stays the base's: tracers tell torch's own leaf modules by it.
        into.update(
            _freezekit_make=staticmethod(maker),
            _freezekit_base=base,
            __module__=base.__module__,
            __doc__=base.__doc__,
            **namespace,
        )

    meta = _MadeMeta if type(base) is type else type("_MadeMeta", (_MadeMeta, type(base)), {})
    made = types.new_class(name, (base, _Made, mixin), {"metaclass": meta}, body)
    return _made.setdefault((maker, base), made)


def held_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the held subclass of a module class: its own forward, always in eval mode.

    Args:
        base: any module class.

    Returns:
        One and the same class for each ``base``, named ``Frozen<base>``.

    >>> dropout = held_class(nn.Dropout)()
    >>> dropout.train().training, isinstance(dropout, nn.Dropout), type(dropout).__name__
    (False, True, 'FrozenDropout')
    """
    if (held_class, base) in _made:
        return _made[held_class, base]
    mixin: type = Held
    if issubclass(base, ObserverBase):
        mixin = _HeldObserver
    elif issubclass(base, FakeQuantizeBase):
        mixin = _HeldFakeQuantize
    return _make(held_class, base, f"Frozen{base.__name__}", mixin)


def pinned_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a module class that keeps those buffers in place that :data:`PINNED` names.

    Args:
        base: any module class; the class made has its name, since it behaves as it does but for that.

    >>> pinned_class(nn.Linear).__name__
    'Linear'
    """
    if (pinned_class, base) in _made:
        return _made[pinned_class, base]

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kept = {name: self._buffers[name] for name in self.__dict__.get(PINNED, ()) if name in self._buffers}
        try:
            # The forward has copies to write to: what it saves for backward must not be put back under it.
            for name, buffer in kept.items():
                self._buffers[name] = None if buffer is None else buffer.clone()
            # Looked up anew: forward may be a static method, or be replaced in the class later.
            return super(made, self).forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._buffers.update(kept)

    made = _make(pinned_class, base, base.__name__, _Pinned, forward=forward)
    return made


def _make_again(
    make: _Maker,
    remake: Callable[..., nn.Module],
    args: tuple[Any, ...],
) -> nn.Module:
    module = remake(*args)
    # Not by a __setattr__ of the module's own, which may hand everything on to a module inside.
    object.__setattr__(module, "__class__", make(type(module)))
    return module
