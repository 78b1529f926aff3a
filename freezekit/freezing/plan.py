"""Plans: what would be frozen, found out on a model without memory, weights or network."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from freezekit.errors import FreezekitError
from freezekit.freezing.freeze import freeze_backbone

__all__ = ["build_without_memory", "plan"]


class _NoMemory(TorchFunctionMode):
    """Layers make their parameters with ``torch.empty``; all else a constructor computes stays real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_without_memory(factory: Callable[[], Any]) -> Any:
    """Call a factory of a model with its parameters on the meta device, where they take no memory.

    Args:
        factory: takes no arguments. One that computes with tensors, which the meta device refuses, is called
            again with its parameters alone on that device.

    >>> build_without_memory(lambda: nn.Linear(10**6, 10**6)).weight.device
    device(type='meta')

    Source: PyTorch documentation, "Meta device".
    """
    try:
        with torch.device("meta"):
            return factory()
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():
            raise
    with _NoMemory():
        return factory()


def plan(name: str) -> str:
    """Say what ``freeze_backbone`` would freeze of a model, and give the call.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME``, or ``package.module:factory``, a class or function that
            makes the model when called without arguments.

    Raises:
        FreezekitError: there is no such model, or it cannot be built.
        SelectionError: backbone and head cannot be told.

    >>> print(plan("torchvision:resnet18").partition("layer4")[0])  # doctest: +ELLIPSIS
    backbone: conv1, bn1, relu, maxpool, layer1, layer2, layer3,...

    Source: PyTorch documentation, "Meta device".
    """
    source, _, rest = name.partition(":")
    if not source or not rest:
        raise FreezekitError(
            "this names no model",
            where="MODEL",
            got=repr(name),
            remedy="give torchvision:NAME, timm:NAME or package.module:factory",
        )
    make, code = _SOURCES.get(source, _factory)(name, rest)
    handle = freeze_backbone(_build(name, make))
    table = str(handle).rpartition("\nrule: ")[0]
    call = "\n".join(f"  {line}" for line in ["import freezekit", *code, "freezekit.freeze_backbone(model)"])
    return f"{handle.selection}\n\n{table}\n\ncall:\n{call}"


def _torchvision(name: str, model: str) -> tuple[Callable[[], Any], list[str]]:
    models = _import("torchvision.models", name)
    _refuse_unknown(name, model, models.list_models(), "model in torchvision")
    # with None for these too, or a backbone would be downloaded
    taken = inspect.signature(models.get_model_builder(model)).parameters
    weights = {given: None for given in ("weights", "weights_backbone") if given in taken}
    code = ["import torchvision", f'model = torchvision.models.get_model({model!r}, weights="DEFAULT")']
    return lambda: models.get_model(model, **weights), code


def _timm(name: str, model: str) -> tuple[Callable[[], Any], list[str]]:
    timm = _import("timm", name)
    architecture = model.partition(".")[0]  # a name may go on to say which weights
    _refuse_unknown(name, architecture, timm.list_models(), "model in timm")
    if model != architecture:
        _refuse_unknown(name, model, timm.list_pretrained(f"{architecture}.*"), "weights in timm")
    given = ", pretrained=True" if timm.is_model_pretrained(model) else ""
    code = ["import timm", f"model = timm.create_model({model!r}{given}, num_classes=10)"]
    return lambda: timm.create_model(architecture, num_classes=10), code


def _factory(name: str, path: str) -> tuple[Callable[[], Any], list[str]]:
    here = os.getcwd()
    if here not in sys.path:  # as with python -m
        sys.path.insert(0, here)
    source = name.partition(":")[0]
    if {"/", "\\"} & {*source} or source.endswith((".py", ".")) or source.startswith("."):
        stem = source.replace("\\", "/").rpartition("/")[2].removesuffix(".py").strip(".")
        raise FreezekitError(
            "this is no module's name",
            where="MODEL",
            got=repr(name),
            remedy=f"run this in the folder that holds it, as {stem or 'module'}:{path}",
        )
    found: Any = _import(source, name)
    for part in path.split("."):
        if not hasattr(found, part):
            _refuse_unknown(
                name, part, [n for n in dir(found) if not n.startswith("__")], f"name in {source}"
            )
        found = getattr(found, part)
    top = path.partition(".")[0]
    if isinstance(found, nn.Module):
        return lambda: found, [f"from {source} import {top}", f"model = {path}"]
    if not callable(found):
        raise FreezekitError(
            "this is neither a model nor makes one",
            where=name,
            got=type(found).__name__,
            remedy="name a class or function that makes the model when called without arguments",
        )
    return found, [f"from {source} import {top}", f"model = {path}()"]


_SOURCES = {"torchvision": _torchvision, "timm": _timm}


def _import(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        ours = module.partition(".")[0] in _SOURCES
        raise FreezekitError(
            "a package is not installed" if ours or missing != module.partition(".")[0] else "no such module",
            where=name,
            got=missing,
            remedy=f"pip install {missing.partition('.')[0]}"
            + ("" if ours else ", or run this in the folder that holds it"),
        ) from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise FreezekitError(
            "the module cannot be imported",
            where=name,
            got=_one_line(error),
            remedy=f'see python -c "import {module}"',
        ) from error


def _build(name: str, make: Callable[[], Any]) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, about weights that are not wanted here
            model = build_without_memory(make)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        on_meta = "meta" in str(error).lower()
        raise FreezekitError(
            "the model cannot be built without memory, on the meta device" if on_meta else "making it fails",
            where=name,
            got=_one_line(error),
            remedy="its constructor reads values or loads weights; make the model yourself and "
            "print(freezekit.find_backbone(model))"
            if on_meta
            else "name a class or function that makes the model when called without arguments",
        ) from error
    if not isinstance(model, nn.Module):
        raise FreezekitError(
            "this makes no model",
            where=name,
            got=type(model).__name__,
            remedy="name a class or function that returns a torch.nn.Module",
        )
    return model


def _refuse_unknown(name: str, given: str, known: Iterable[str], kind: str) -> None:
    every = list(known)
    if given in every:
        return
    close = difflib.get_close_matches(given, every, n=3, cutoff=0.5)
    raise FreezekitError(
        f"no such {kind}",
        where=name,
        got=repr(given),
        remedy=f"did you mean {' or '.join(map(repr, close))}?" if close else "check the name",
    )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
