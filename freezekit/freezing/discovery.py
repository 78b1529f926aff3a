"""Discovery: which part of a model is the backbone and which the head, found out by rules in order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from freezekit.errors import SelectionError
from freezekit.freezing import frameworks
from freezekit.freezing.base_models import release_poolers
from freezekit.freezing.selection import Names, Selection, everything_but, names_of, require_module, resolve
from freezekit.patterns import select

__all__ = ["find_backbone", "select_backbone"]

_HEADS = ("fc", "classifier", "head", "heads")
_AUXILIARY = ("aux1", "aux2", "AuxLogits", "aux_classifier", "head_dist")
_WRAPPERS = ("_orig_mod", "module")  # torch.compile, DataParallel


def find_backbone(model: nn.Module) -> Selection:
    """Tell a classification model's backbone from its head.

    The head is the child with a conventional name (``fc``, ``classifier``, ``head``, ``heads``), all of it,
    together with auxiliary heads; everything else is the backbone. A classifier of several layers counts
    whole, since nobody can tell a pretrained layer inside it from one just put there, and freezing the
    latter would be the worse mistake; name a part of it with ``head="classifier.6"`` to freeze more.

    Args:
        model: every classification model of ``torchvision.models``, or one named after the same fashion.

    Raises:
        SelectionError: no child, or more than one, has such a name; the error lists the candidates.

    >>> model = nn.Sequential()
    >>> model.add_module("features", nn.Linear(4, 4)); model.add_module("classifier", nn.Linear(4, 2))
    >>> print(find_backbone(model))
    backbone: features
    head:     classifier
    rule:     the child named 'classifier' is the head

    Source: the names in ``torchvision.models``; its tutorial on fine-tuning replaces these children.
    """
    require_module(model)
    children = dict(model.named_children())
    if len(children) == 1 and next(iter(children)) in _WRAPPERS:
        ((wrapper, inner),) = children.items()
        inside = find_backbone(inner)
        backbone, inner_head = (
            tuple(f"{wrapper}.{n}" for n in names) for names in (inside.backbone, inside.head)
        )
        return Selection(backbone, inner_head, inside.rule)
    for rule_of in frameworks.RULES:
        selection = rule_of(model)
        if selection is not None:
            return selection
    heads = [name for name in _HEADS if name in children]
    if len(heads) != 1:
        found = f"{len(heads)} children are named like a head" if heads else "no child is named like a head"
        raise SelectionError(
            f"cannot tell the head of {type(model).__name__}: {found} ({', '.join(heads or _HEADS)})",
            where="model",
            got=_candidates(model),
            remedy=_call_to_make(model, heads),
        )
    (head,) = heads
    if not any(True for _ in children[head].parameters()):
        raise SelectionError(
            f"the head {head!r} has no parameters, so nothing would be left to train",
            where="model",
            got=f"{head}: {type(children[head]).__name__}",
            remedy=f"put the new head in place first (model.{head} = ...), or freeze everything with "
            'freezekit.freeze(model, "*")',
        )
    auxiliary = [name for name in _AUXILIARY if children.get(name) is not None]
    later = list(children)[list(children).index(head) + 1 :]
    later = [n for n in later if n not in auxiliary and any(True for _ in children[n].parameters())]
    if later:
        raise SelectionError(
            f"cannot tell the head of {type(model).__name__}: {head!r} is named like one but not the last",
            where="model",
            got=_candidates(model),
            remedy=_call_to_make(model, [*later, head]),
        )
    rule = f"the child named {head!r} is the head" + (
        f", with the auxiliary {', '.join(map(repr, auxiliary))}" if auxiliary else ""
    )
    return release_poolers(model, everything_but([head, *auxiliary], model, rule))


def select_backbone(model: nn.Module, head: Names | None, backbone: Names | None) -> Selection:
    """Resolve ``head=`` and ``backbone=`` to a :class:`Selection`; with neither, find them."""
    require_module(model)
    if head is None and backbone is None:
        return find_backbone(model)
    if backbone is None:
        assert head is not None
        heads = resolve(model, head, "head=")
        return everything_but(heads, model, "head= was given")
    backbones = resolve(model, backbone, "backbone=")
    if head is None:
        rest = everything_but(backbones, model, "").backbone
        return Selection(tuple(backbones), rest, "backbone= was given")
    heads = resolve(model, head, "head=")
    names = names_of(model)
    both = set(select(backbones, names, where="backbone=")) & set(select(heads, names, where="head="))
    if both:
        raise SelectionError(
            "a layer cannot be in the backbone and in the head",
            where="backbone=, head=",
            got=", ".join(sorted(both)[:3]),
            remedy="give one of the two; the other is everything else",
        )
    return Selection(tuple(backbones), tuple(heads), "backbone= and head= were given")


def _candidates(model: nn.Module) -> str:
    """Describe the children, since one of them must be the head."""
    rows = [
        f"{name} ({type(child).__name__}, {sum(p.numel() for p in child.parameters()):,} parameters)"
        for name, child in model.named_children()
    ]
    shown = rows if len(rows) <= 12 else [*rows[:5], "...", *rows[-6:]]
    return "; ".join(shown) or f"{type(model).__name__}, which has no children"


def _call_to_make(model: nn.Module, heads: Sequence[str]) -> str:
    with_parameters = [n for n, child in model.named_children() if any(True for _ in child.parameters())]
    nested = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in _HEADS]
    shallowest = min((n.count(".") for n in nested), default=0)
    likely = list(heads) or [n for n in nested if n.count(".") == shallowest][:3] or with_parameters[-1:]
    if not likely:
        return 'freezekit.freeze(model, "*") freezes all of a model'
    calls = " or ".join(f"freezekit.freeze_backbone(model, head={name!r})" for name in likely)
    if "backbone" in with_parameters:
        calls = "freezekit.freeze_backbone(model, backbone='backbone')"
    return f"say which it is, for example {calls}"
