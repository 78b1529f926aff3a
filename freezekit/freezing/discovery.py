"""Discovery: which part of a model is the backbone and which the head, found out by rules in order."""

from __future__ import annotations

from torch import nn

from freezekit.errors import SelectionError
from freezekit.freezing import frameworks, rules
from freezekit.freezing.additions import refuse_doubtful
from freezekit.freezing.base_models import release_poolers
from freezekit.freezing.recognition import as_inside
from freezekit.freezing.selection import (
    Names,
    Selection,
    everything_but,
    names_of,
    parametrised,
    prefixed,
    require_module,
    resolve,
)
from freezekit.patterns import select

__all__ = ["find_backbone", "select_backbone"]


def find_backbone(model: nn.Module) -> Selection:
    """Tell a model's backbone from its head.

    Rules are asked in order, and ``.rule`` says which decided: what wraps a model, frameworks
    (transformers, segmentation_models_pytorch, Lightning, PEFT), torchvision, timm, a model that holds one
    other, children with conventional names, ``nn.Sequential``. Where none is certain, the error lists the
    candidates and the call to make.

    The head is whatever may be new, all of it. A classifier of several layers counts whole, since nobody
    can tell a pretrained layer inside it from one just put there; so do pooling and norm within it, a
    pooling with parameters before it (``attn_pool``, ``fc_norm``), auxiliary and further heads, what is put
    on a part called ``backbone``, and parameters of the model itself that are no class token or position.
    The norm that ends a network (``norm``) is of the backbone. To freeze more, name what is to train:
    ``head="classifier.6"``.

    Args:
        model: any model.

    Raises:
        SelectionError: no rule is certain.

    >>> model = nn.Sequential()
    >>> model.add_module("features", nn.Linear(4, 4)); model.add_module("classifier", nn.Linear(4, 2))
    >>> print(find_backbone(model))
    backbone: features
    head:     classifier
    rule:     'features' is named like a backbone, 'classifier' is named like a head

    Source: the names in torchvision and timm, whose fine-tuning guides replace just these children.
    """
    require_module(model)
    for rule in (_wrapper, *frameworks.RULES, *rules.LIBRARIES, _only_child, *rules.CONVENTIONS):
        found = rule(model)
        if found is not None:
            if rule in (frameworks.lightning_module, frameworks.adapted_model):  # which have asked again
                return found
            refuse_doubtful(model, found)
            return release_poolers(model, found)
    raise rules.undecided(model, "no part is named like a head, or too many could be it")


def _wrapper(model: nn.Module) -> Selection | None:
    """Look into what wraps a model: ``torch.compile``, DataParallel, AveragedModel."""
    name = rules.wrapped(model)
    return None if name is None else _within(model, name)


def _only_child(model: nn.Module) -> Selection | None:
    """Look into what holds one model and nothing else that trains."""
    full = list(parametrised(model))
    if len(full) != 1 or any(p is not None for p in model._parameters.values()):
        return None
    return _within(model, full[0]) if any(True for _ in model.get_submodule(full[0]).children()) else None


def _within(model: nn.Module, name: str) -> Selection:
    try:
        return prefixed(find_backbone(model.get_submodule(name)), name)
    except SelectionError as error:
        raise as_inside(name, error) from None


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
