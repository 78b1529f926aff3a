"""Additions: what people have put into a pretrained network to be trained, which freezing would undo."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from torch import nn

from freezekit.errors import SelectionError
from freezekit.freezing.holding import live_class
from freezekit.freezing.recognition import LIBRARY_MODELS, SKIPPED, home_of, is_below
from freezekit.freezing.rules import undecided
from freezekit.freezing.selection import Selection, has_parameters
from freezekit.freezing.words import ADAPTER, ADAPTER_CLASS

__all__ = ["refuse_doubtful"]

_MAKERS = ("torch.", "timm.", "torchvision.", "transformers.", "segmentation_models_pytorch.", "freezekit.")
"""Whose layers inside a library's model are no additions."""


def refuse_doubtful(model: nn.Module, selection: Selection) -> None:
    """Refuse a backbone with nothing in it, or with what is put into networks to be trained."""
    chosen = set(selection.backbone)
    names = [
        name
        for name, _ in model.named_parameters()
        if any(name.rsplit(".", k)[0] in chosen for k in range(name.count(".") + 1))
    ]
    if not names:
        heads = ", ".join(map(repr, selection.head))
        raise undecided(model, f"nothing beside the head {heads} could be frozen")
    if any(rule == "adapted" for rule, _ in SKIPPED.get()):
        return  # the rule for PEFT asks, which knows its adapters and wants to know the head
    named = [_adapter_in(n) for n in names if ADAPTER.search(n) and not _is_transformers_own(model, n)]
    made = [n for n in _put_into_libraries(model) if any(is_below(m, [n]) for m in names)]
    new = list(dict.fromkeys([*named, *(n for n in made if not any(is_below(m, [n]) for m in named))]))
    if new:
        raise SelectionError(
            "the backbone seems to have adapters or other new layers in it, which are to train",
            where="model",
            got=", ".join(new[:3]),
            remedy="name all that is to train, for example freezekit.freeze_backbone(model, "
            f"head={[*selection.head, *_in_every_layer(new)]!r})",
        )


def _adapter_in(name: str) -> str:
    """Return the adapter that a parameter is in, or the parameter."""
    parts = name.split(".")
    return ".".join(parts[: next(k for k, part in enumerate(parts, 1) if ADAPTER.search(part))])


def _in_every_layer(names: Iterable[str]) -> list[str]:
    """Return globs that stand for what is in each of many layers."""
    return list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name) for name in names))


def _is_transformers_own(model: nn.Module, name: str) -> bool:
    """Tell whether a parameter called an adapter's is one that transformers itself made."""
    adapter = _adapter_in(name)
    owner = model.get_submodule(adapter.rpartition(".")[0])
    if home_of(owner, "transformers.") is None:
        return False
    part = None if adapter == name else model.get_submodule(adapter)
    code = inspect.unwrap(type(owner).__init__).__code__
    return (part is not None and home_of(part, "transformers.") is not None) or any(
        ADAPTER_CLASS.search(word) for word in (*code.co_names, *map(str, code.co_consts))
    )


def _put_into_libraries(model: nn.Module) -> list[str]:
    """Return the parts of libraries' models that others made: adapters, and what holds layers.

    A layer in the place of another, such as a norm or a quantized linear, holds none and is left alone.
    """
    found: list[str] = []
    inside: list[str] = []  # the topmost models of a library, in the order of the modules
    for path, module in model.named_modules():
        kind = live_class(module)
        if not (inside and (not inside[-1] or is_below(path, inside[-1:]))):
            if kind.__module__.startswith((*LIBRARY_MODELS, "transformers.")):
                inside.append(path)
            continue
        if kind.__module__.startswith(_MAKERS) or is_below(path, found[-1:]) or not has_parameters(module):
            continue
        if ADAPTER_CLASS.search(kind.__name__) or any(map(has_parameters, module.children())):
            found.append(path)
    return found
