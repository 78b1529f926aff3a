"""Held: what makes a module stay in eval mode whatever is asked of it.

``model.train()`` and ``m.training = True`` both assign to the attribute ``training``. A held module's
class has a property of that name that is always ``False``, so neither can reach it; and since this is a
matter of class and not of the instance, it survives copies, pickles and compilation.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

__all__ = ["Held", "held_class"]


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


class _HeldSubclass(Held):
    """A class made at run time for a module class that has no frozen counterpart of its own."""

    _freezekit_base: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Stops here on purpose: the module's own __init_subclass__ is for classes its authors write.
        pass

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class cannot be found by name, so a pickle (or a copy) makes it again from its base.
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple):
            return reduced
        if reduced[1][:1] == (type(self),):
            return (_new_held, (self._freezekit_base,), *reduced[2:])
        return (_hold_again, reduced[:2], *reduced[2:])  # the class has its own way


class _BatchNormTwin(_NormBase):
    """Stands in for torch's ``_BatchNorm`` among the ancestors of a held BN subclass."""

    forward = _BatchNorm.forward


class _HeldMeta(type):
    """Orders the ancestors of a held class: what holds it first, and no ``_BatchNorm``.

    The base comes first among the bases, for the layout that a swap in place requires, but must come
    second when a method is looked up. And whatever moves running statistics in the ecosystem finds BN by
    ``_BatchNorm`` (``update_bn`` resets them, ``convert_sync_batchnorm`` puts a live layer in its place), so
    a twin takes its place: ``super().forward()`` in a BN subclass still arrives at the same function.
    """

    def mro(cls) -> list[type]:
        holding = [_HeldSubclass, Held]
        rest = [ancestor for ancestor in super().mro()[1:] if ancestor not in holding]
        return [cls, *holding, *(_BatchNormTwin if ancestor is _BatchNorm else ancestor for ancestor in rest)]


_held_classes: dict[type[nn.Module], type[nn.Module]] = {}


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
    if base not in _held_classes:

        def body(namespace: dict[str, Any]) -> None:
            # `__module__` stays the base's: tracers tell torch's own leaf modules by it.
            namespace.update(_freezekit_base=base, __module__=base.__module__, __doc__=base.__doc__)

        meta = _HeldMeta if type(base) is type else type("_HeldMeta", (_HeldMeta, type(base)), {})
        bases = (base, _HeldSubclass)
        _held_classes[base] = types.new_class(f"Frozen{base.__name__}", bases, {"metaclass": meta}, body)
    return _held_classes[base]


def _new_held(base: type[nn.Module]) -> nn.Module:
    cls = held_class(base)
    return cls.__new__(cls)


def _hold_again(make: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    module = make(*args)
    module.__class__ = held_class(type(module))
    return module
