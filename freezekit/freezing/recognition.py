"""What the rules for frameworks share: by what a model is recognised, and how it is passed on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import replace

from torch import nn
from torch.nn.parameter import is_lazy

from freezekit.errors import SelectionError
from freezekit.freezing.selection import Selection, prefixed
from freezekit.freezing.words import CONSTANT, TOKEN

__all__ = [
    "LIBRARY_MODELS",
    "SKIPPED",
    "answer_of",
    "as_inside",
    "children_of",
    "derives",
    "few_of",
    "find_inside",
    "found_by_others",
    "home_of",
    "is_below",
    "own_tensors",
    "parameters_of",
]

SKIPPED: ContextVar[frozenset[tuple[str, int]]] = ContextVar("SKIPPED", default=frozenset())
"""The rules that have passed a model on to the others, with its id, so that they are not asked again."""


LIBRARY_MODELS = ("timm.models.", "torchvision.models.")
"""Where the classes come from of which libraries of image models make theirs."""


def home_of(module: nn.Module, *packages: str) -> str | None:
    """Return the module that the class, or one it derives from, comes from, if it is in the packages."""
    homes = (kind.__module__ for kind in type(module).__mro__)
    return next((home for home in homes if home.startswith(packages)), None)


def derives(module: nn.Module | None, name: str, *packages: str) -> bool:
    """Tell whether a class of that name, from one of the packages, is among the module's classes."""
    return any(
        kind.__name__ == name and kind.__module__.partition(".")[0] in packages
        for kind in type(module).__mro__
    )


def own_tensors(model: nn.Module, heads: Iterable[nn.Module] = ()) -> list[str]:
    """Return the model's own parameters and buffers that may be new: those that are no token or position.

    Beside heads, buffers belong to the layers before, unless they are as long as something in a head is.
    """
    own = [name for name, p in model._parameters.items() if p is not None and not TOKEN.fullmatch(name)]
    buffers = {n: b for n, b in model._buffers.items() if b is not None and not CONSTANT.fullmatch(n)}
    lengths = {p.shape[0] for head in heads for p in head.parameters() if not is_lazy(p) and p.dim()}
    return own + [n for n, b in buffers.items() if not lengths or (b.dim() and b.shape[0] in lengths)]


def parameters_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return every parameter with its name, tied ones each time."""
    return list(model.named_parameters(remove_duplicate=False))


def is_below(name: str, scopes: Iterable[str]) -> bool:
    """Tell whether the name is one of the scopes or below one."""
    return any(name == scope or name.startswith(f"{scope}.") for scope in scopes)


def found_by_others(rule: str, model: nn.Module) -> Selection:
    """Find the backbone of the model itself, without the rule that asks."""
    from freezekit.freezing.discovery import find_backbone

    token = SKIPPED.set(SKIPPED.get() | {(rule, id(model))})
    try:
        return find_backbone(model)
    finally:
        SKIPPED.reset(token)


def find_inside(model: nn.Module, name: str) -> Selection:
    """Find the backbone of a child, in the names of the model."""
    from freezekit.freezing.discovery import find_backbone

    inner = prefixed(find_backbone(model.get_submodule(name)), name)
    return replace(inner, rule=f"{name}: {inner.rule}")


def answer_of(find: Callable[..., Selection], *arguments: object) -> Selection | SelectionError:
    """Return what a finder finds, or why it does not."""
    try:
        return find(*arguments)
    except SelectionError as error:
        return error


def as_inside(name: str, error: SelectionError) -> SelectionError:
    """Return the refusal of a module inside the model, with calls on it; ``""`` is the model itself."""
    if not name:
        return error
    where, remedy = (
        text and re.sub(r"\bmodel\b(?=[.,]|$)", f"model.{name}", text) for text in (error.where, error.remedy)
    )
    return type(error)(error.what, where=where, got=error.got, remedy=remedy)


def children_of(model: nn.Module) -> str:
    """Describe the children, for an error."""
    return "; ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children())


def few_of(names: Sequence[str]) -> str:
    """Return the first names, for an error, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
