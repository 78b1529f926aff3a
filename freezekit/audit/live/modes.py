"""Modes: which modules the next ``model.train()`` leaves in train mode, found out without calling it."""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["keeps_itself", "modes_after_train"]


def keeps_itself(module: nn.Module) -> bool:
    """Tell whether the module's class decides its mode, so that no assignment reaches it.

    >>> keeps_itself(nn.Dropout())
    False
    """
    return isinstance(getattr(type(module), "training", None), property)


def modes_after_train(model: nn.Module) -> dict[int, bool]:
    """Return, by ``id`` of the module, the mode that each would be in after ``model.train()``.

    Many a model overrides ``train`` to keep its backbone in eval mode. What such a method does is found by
    running it on twins of the modules, which share no tensor with them. Where it fails on these, everything
    counts as put into train mode.

    Args:
        model: the model, which stays as it is.

    >>> class Kept(nn.Sequential):
    ...     def train(self, mode=True):
    ...         super().train(mode)
    ...         return self[0].eval() and self
    >>> model = Kept(nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> [modes_after_train(model)[id(layer)] for layer in model]
    [False, True]
    """
    modules = list(model.modules())
    plain = {id(m): not keeps_itself(m) or bool(m.training) for m in modules}
    if not any(_has_train_of_its_own(m) for m in modules):
        return plain
    # Through a global or a weak reference the method may still find the real modules.
    before = [m.__dict__.get("training") for m in modules]
    asked = [(p, p.requires_grad) for p in model.parameters()]
    twins = _Twins()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            twins.of(model).train()
        after = [m.__dict__.get("training") for m in modules]
        return {
            id(m): bool(twins.of(m).training) or (now != was and bool(now))
            for m, was, now in zip(modules, before, after, strict=True)
        }
    except Exception:  # it is the user's code, on objects it was not written for
        return plain
    finally:
        for m, was in zip(modules, before, strict=True):
            if was is not None and m.__dict__.get("training") != was:
                m.__dict__["training"] = was
        for parameter, required in asked:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)


def _has_train_of_its_own(module: nn.Module) -> bool:
    if "train" in module.__dict__:
        return True
    return type(module).train is not nn.Module.train and not keeps_itself(module)


class _Twins:
    """Modules of the same classes and attributes, with tensors that have no values."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Any]] = {}  # with the original, whose id must stay taken

    def of(self, value: Any) -> Any:
        """Return the twin of a module, or a value that refers to twins where it referred to modules."""
        if id(value) in self._made:
            return self._made[id(value)][1]
        if isinstance(value, nn.Module):
            twin = object.__new__(type(value))
            self._made[id(value)] = value, twin
            twin.__dict__.update({key: self.of(part) for key, part in value.__dict__.items()})
            return twin
        if isinstance(value, Tensor):
            made: Any = _without_values(value)
        elif isinstance(value, types.MethodType):
            made = types.MethodType(value.__func__, self.of(value.__self__))
        elif isinstance(value, types.FunctionType) and (value.__closure__ or value.__defaults__):
            return self._function(value)
        elif isinstance(value, functools.partial):
            made = functools.partial(self.of(value.func), *map(self.of, value.args), **value.keywords)
        elif type(value) in (list, tuple):
            made = type(value)(map(self.of, value))
        elif isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
            made = dict(zip(value, map(self.of, value.values()), strict=True))
        else:
            return value
        self._made[id(value)] = value, made
        return made

    def _function(self, function: types.FunctionType) -> Any:
        """Return the function with the twins in its closure: ``bn.train = lambda mode=True: bn``."""
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        self._made[id(function)] = function, made
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell
                cell.cell_contents = self.of(original.cell_contents)
        made.__defaults__ = self.of(function.__defaults__)
        made.__kwdefaults__ = self.of(function.__kwdefaults__)
        return made


def _without_values(tensor: Tensor) -> Tensor:
    try:
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    except (RuntimeError, NotImplementedError):  # not even a shape yet
        made = torch.empty(0, device="meta")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
