"""Selection: which part of a model is the backbone and which the head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from freezekit.errors import FreezekitError, SelectionError
from freezekit.patterns import select

__all__ = [
    "Names",
    "NoHeadError",
    "Selection",
    "everything_but",
    "has_parameters",
    "names_of",
    "nothing_but",
    "parametrised",
    "prefixed",
    "require_module",
    "resolve",
    "size_of",
    "tensors_of",
]

Names: TypeAlias = str | nn.Module | Iterable[str | nn.Module]
"""What ``head=`` and ``backbone=`` take: a name, a glob, a module of the model, or several of these."""


@dataclass(frozen=True)
class Selection:
    """Backbone and head of a model, by name, and the rule that told them apart.

    Args:
        backbone: names of the modules and of tensors outside them (such as ViT's ``class_token``) that
            make up the backbone; each module stands for everything below it.
        head: names of the modules, and of tensors outside them, that make up the head.
        rule: what decided, in words.
    """

    backbone: tuple[str, ...]
    head: tuple[str, ...]
    rule: str

    def __str__(self) -> str:
        return (
            f"backbone: {', '.join(self.backbone)}\nhead:     {', '.join(self.head)}\nrule:     {self.rule}"
        )


class NoHeadError(SelectionError):
    """The model is known, and its head was taken off: what is left is all backbone."""


def tensors_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield ``(full name, owner, own name, tensor)`` for every parameter and buffer, tied ones each time."""
    for path, owner in module.named_modules(prefix=prefix, remove_duplicate=False):
        for own_name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                yield (f"{path}.{own_name}" if path else own_name), owner, own_name, tensor


def has_parameters(module: nn.Module | None) -> bool:
    """Tell whether there is a module, with anything in it that could train."""
    return module is not None and any(True for _ in module.parameters())


def size_of(tensor: Tensor) -> int:
    """Count the elements, of which a parameter not yet initialised has none so far."""
    return 0 if is_lazy(tensor) else tensor.numel()


def parametrised(model: nn.Module) -> dict[str, nn.Module]:
    """Return the children that have parameters, by name."""
    return {name: child for name, child in model.named_children() if has_parameters(child)}


def require_module(model: object) -> None:
    """Refuse what is no model, before it is taken apart as one."""
    if not isinstance(model, nn.Module):
        raise FreezekitError(
            "not a model", where="model", got=type(model).__name__, remedy="give a torch.nn.Module"
        )


def names_of(model: nn.Module) -> list[str]:
    """Return the names of everything in the model: modules, then parameters and buffers."""
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    return list(dict.fromkeys([*modules, *(name for name, *_ in tensors_of(model))]))


def resolve(model: nn.Module, given: Names, where: str) -> list[str]:
    """Turn names, globs and modules into names, the topmost only.

    Raises:
        SelectionError: a pattern matches nothing, a module is not the model's, or something else was given.
    """
    require_module(model)
    names = names_of(model)
    if not isinstance(given, Iterable) and not isinstance(given, nn.Module):
        given = cast("list[str]", [given])  # refused below, with what it is
    items = [given] if isinstance(given, (str, nn.Module)) else list(given)
    patterns: list[str] = []
    for item in items:
        if isinstance(item, nn.Module):
            found = [name for name, m in model.named_modules(remove_duplicate=False) if m is item and name]
            if not found:
                what = "is the whole model" if item is model else "is not part of the model"
                raise SelectionError(
                    f"the module given {what}",
                    where=where,
                    got=type(item).__name__,
                    remedy="give a submodule of the model, or its name",
                )
            patterns += found
        else:
            patterns.append(item)
    chosen = set(select(patterns, names, where=where))
    return [n for n in dict.fromkeys(names) if n in chosen and n.rpartition(".")[0] not in chosen]


def everything_but(excluded: Sequence[str], model: nn.Module, rule: str) -> Selection:
    """Cover what is not excluded by the fewest names: whole modules, and tensors of those split in two."""
    out = set(excluded)
    split = {"", *(name.rsplit(".", k)[0] for name in out for k in range(1, name.count(".") + 1))}
    cover: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if path in split:
            own = [*module._parameters.items(), *module._buffers.items()]
            below = [name for name, tensor in own if tensor is not None]
            below += [name for name, child in module._modules.items() if child is not None]
            full = (f"{path}.{name}" if path else name for name in below)
            cover += [name for name in full if name not in out and name not in split]
    return Selection(tuple(cover), tuple(excluded), rule)


def nothing_but(chosen: Sequence[str], model: nn.Module, rule: str) -> Selection:
    """Take what is chosen for the backbone and the rest for the head, which is named likewise."""
    return Selection(tuple(chosen), everything_but(chosen, model, "").backbone, rule)


def prefixed(selection: Selection, name: str) -> Selection:
    """Give the names of a selection in the child ``name`` as the model above has them."""
    backbone, head = (tuple(f"{name}.{n}" for n in names) for names in (selection.backbone, selection.head))
    return Selection(backbone, head, selection.rule)
