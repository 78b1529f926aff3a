"""The rule for transformers: the base model is the body, what a task adds to it the head."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from types import CodeType

from torch import nn

from freezekit.errors import SelectionError
from freezekit.freezing.recognition import (
    children_of,
    derives,
    find_inside,
    is_below,
)
from freezekit.freezing.selection import Selection, everything_but, has_parameters, parametrised, tensors_of

__all__ = ["has_task", "release_poolers", "transformers_model"]


def transformers_model(model: nn.Module) -> Selection | None:
    """Tell a transformers model's base model from what its task adds.

    The body is the base model, the child named by ``base_model_prefix``. The head is everything else, and
    of the base model the pooler, which many checkpoints do not have, so that it is new in the model. Where
    there is no such child, the body is the first child, if that alone is a transformers model itself.

    Args:
        model: any module; ``None`` is returned unless it derives from transformers' ``PreTrainedModel``.

    Raises:
        SelectionError: no head outside the base model; a base model made for a number of classes; an
            adapter in it; tied embeddings; several bodies.

    >>> print(transformers_model(nn.Linear(2, 2)))
    None

    Source: transformers documentation, ``PreTrainedModel.base_model_prefix`` and ``.base_model``.
    """
    if not derives(model, "PreTrainedModel", "transformers"):
        return None
    prefix = _prefix(model)
    if prefix is not None and not derives(model._modules[prefix], "PreTrainedModel", "transformers"):
        # a model of another library inside (timm): as wrapped, if there is nothing else
        return find_inside(model, prefix) if list(parametrised(model)) == [prefix] else None
    bodies = _bodies(model)
    modules = {name: model.get_submodule(name) for name in bodies}
    for name, body in modules.items():
        _refuse_classes_inside(model, name, body)
        _refuse_adapter(model, name, body)
    outside = everything_but(bodies, model, "").backbone
    if not any(is_below(name, outside) for name, _ in model.named_parameters(remove_duplicate=False)):
        raise SelectionError(
            f"{type(model).__name__} has no head with parameters beside its base model",
            where="model",
            got=children_of(model),
            remedy="put the new head in place first, or freeze a part by name, for example "
            f"freezekit.freeze(model, {bodies[0]!r})",
        )
    _refuse_tied(model, bodies, outside)
    rule = f"transformers: {' and '.join(map(repr, bodies))} is the base model, all else the head"
    return release_poolers(model, everything_but(outside, model, rule))


def release_poolers(model: nn.Module, selection: Selection) -> Selection:
    """Give the head the poolers of transformers models in the backbone, since they are often new.

    Args:
        model: any module; without such a pooler the selection is returned as it is.
        selection: backbone and head of the model.

    >>> selection = Selection(("0",), ("1",), "by hand")
    >>> release_poolers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), selection) is selection
    True

    Source: transformers' warning that ``roberta.pooler`` is newly initialised from ``roberta-base``.
    """
    poolers = [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if derives(module, "PreTrainedModel", "transformers")
        for name, child in module.named_children()
        if "pooler" in name and has_parameters(child)
    ]
    poolers = [name for name in poolers if is_below(name, selection.backbone)]
    if not poolers:
        return selection
    rule = (
        f"{selection.rule}, with the pooler {', '.join(map(repr, poolers))}, which not every checkpoint has"
    )
    return everything_but([*selection.head, *poolers], model, rule)


def _prefix(model: nn.Module) -> str | None:
    """Return ``base_model_prefix`` if there is a child of that name."""
    prefix = getattr(model, "base_model_prefix", None)
    return prefix if prefix and model._modules.get(prefix) is not None else None


def _bodies(model: nn.Module) -> list[str]:
    """Return the names of the base model, or of the two halves that share their embeddings (T5)."""
    prefix = _prefix(model)
    if prefix is not None:
        return _bare(model, prefix)
    kind = type(model)
    if kind.__module__.startswith("transformers.") and not has_task(model):
        raise SelectionError(
            f"{kind.__name__} is not made for a task, so it has no head",
            where="model",
            got=children_of(model),
            remedy="load it with a head (a class named ...For...), or freeze all of it with "
            'freezekit.freeze(model, "*")',
        )
    children, order = dict(model.named_children()), list(parametrised(model))
    found = [
        name
        for name in order
        # CLIP's and its kin's became one in the course of transformers 5
        if name == "vision_model" or derives(children[name], "PreTrainedModel", "transformers")
    ]
    owned = [{id(p) for p in children[name].parameters()} for name in found]
    halves: set[int] = set().union(*owned)
    # the embedding that both halves use may be a child of its own, before them
    bodies = (
        [n for n in order[: order.index(found[-1]) + 1] if n in found or _within(children[n], halves)]
        if found
        else []
    )
    if not found or bodies != order[: len(bodies)] or not all(own & owned[0] for own in owned):
        raise SelectionError(
            f"cannot tell the base model of {kind.__name__}: "
            + (f"{' and '.join(found)} could be, or a part of it" if found else "no child is a model itself"),
            where="model",
            got=children_of(model),
            remedy=_call_to_make(order, found),
        )
    return _bare(model, found[0]) if len(found) == 1 else bodies


def has_task(model: nn.Module) -> bool:
    """Tell whether a transformers class is one made for a task, by its name."""
    return re.search("For[A-Z]", type(model).__name__) is not None


def _within(child: nn.Module, owned: set[int]) -> bool:
    return {id(p) for p in child.parameters()} <= owned


def _bare(model: nn.Module, name: str) -> list[str]:
    """Return the base model in the child: the child, or, where that has a head of its own, what is in it."""
    child = model.get_submodule(name)
    prefix = _prefix(child)
    if has_task(child) or (prefix is not None and list(parametrised(child))[:1] == [prefix]):
        return [f"{name}.{inner}" for inner in _bodies(child)]
    return [name]


def _call_to_make(order: Sequence[str], found: Sequence[str]) -> str:
    """Offer the calls for what is likely: what is called a head, else each model found."""
    heads = [name for name in order if re.search("class|head$|heads$|fc$|score|predictor|output", name)]
    call = "freezekit.freeze_backbone(model, "
    if heads and not found:
        return f"say what is to train, for example {call}head={heads!r})"
    return "say what to freeze, for example " + " or ".join(
        f"{call}backbone={n!r})" for n in found or order[:1]
    )


def _refuse_classes_inside(model: nn.Module, name: str, body: nn.Module) -> None:
    """Refuse a base model that holds layers made for the classes, as those of some detectors do.

    Whether a class makes such layers its constructor tells: it speaks of ``num_labels``.
    """
    kinds = {type(module) for module in body.modules()}
    makers = sorted(kind.__name__ for kind in kinds if _speaks_of(kind.__init__, "num_labels"))
    if makers:
        parts = [f"{name}.{child}" for child in list(parametrised(body))]
        likely = [p for p in parts if p.rpartition(".")[2] in ("backbone", "encoder")] or parts[:1]
        raise SelectionError(
            f"the base model of {type(model).__name__} holds layers made for the number of classes, which "
            "are part of the head",
            where=name,
            got=", ".join(makers),
            remedy="say what to freeze, for example "
            + " or ".join(f"freezekit.freeze_backbone(model, backbone={part!r})" for part in likely),
        )


def _refuse_adapter(model: nn.Module, name: str, body: nn.Module) -> None:
    """Refuse a base model with an adapter, which some checkpoints have and others leave new."""
    if has_parameters(body._modules.get("adapter")):
        outside = everything_but([name], model, "").backbone
        raise SelectionError(
            f"cannot tell whether the adapter of {type(model).__name__} is pretrained",
            where=f"{name}.adapter",
            got=type(body._modules["adapter"]).__name__,
            remedy=f"if it is new, freezekit.freeze_backbone(model, head={[f'{name}.adapter', *outside]!r}); "
            f"if it is not, freezekit.freeze_backbone(model, backbone={name!r})",
        )


def _refuse_tied(model: nn.Module, bodies: Sequence[str], outside: Sequence[str]) -> None:
    """Refuse a head that uses a parameter of the body, such as an embedding that also makes the output."""
    inside = {id(t): name for name, _, _, t in tensors_of(model) if is_below(name, bodies)}
    for name, _, _, tensor in tensors_of(model):
        if is_below(name, outside) and id(tensor) in inside and isinstance(tensor, nn.Parameter):
            given = repr(bodies[0]) if len(bodies) == 1 else repr(list(bodies))
            raise SelectionError(
                "base model and head share a parameter: it cannot be frozen in one and train in the other",
                where="model",
                got=f"{inside[id(tensor)]} is {name}",
                remedy=f"freezekit.freeze(model, {given}) freezes it in both and leaves the rest of the head "
                "to train; or untie them first (embeddings by tie_word_embeddings=False in the config)",
            )


def _speaks_of(function: object, word: str) -> bool:
    """Tell whether a function's code uses a name or attribute, what is nested in it included."""
    codes = [getattr(inspect.unwrap(function), "__code__", None)]  # type: ignore[arg-type]
    while codes:
        code = codes.pop()
        if isinstance(code, CodeType):
            if word in code.co_names or word in code.co_varnames:
                return True
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return False
