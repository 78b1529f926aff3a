"""Rules for models that a framework made: it says itself which part is the body and which the task's.

No framework is imported: a model is recognised by the names of its classes, and taken apart by the
attributes the framework documents. Each rule returns a :class:`Selection`, or ``None`` where it does not
apply, and raises where it applies but cannot be certain. What cannot be told to be pretrained is head:
training a pretrained layer costs little, freezing a new one costs the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from freezekit.errors import SelectionError
from freezekit.freezing.base_models import has_task, transformers_model
from freezekit.freezing.recognition import (
    SKIPPED,
    answer_of,
    as_inside,
    children_of,
    derives,
    few_of,
    find_inside,
    found_by_others,
    is_below,
    parameters_of,
)
from freezekit.freezing.selection import Selection, everything_but, has_parameters, parametrised

__all__ = ["RULES", "adapted_model", "lightning_module", "segmentation_model"]


# ------------------------------------------------------------------------------- segmentation_models_pytorch


def segmentation_model(model: nn.Module) -> Selection | None:
    """Tell the encoder of a ``segmentation_models_pytorch`` model from its decoder and heads.

    Args:
        model: any module; ``None`` is returned unless it derives from the library's ``SegmentationModel``.

    >>> print(segmentation_model(nn.Linear(2, 2)))
    None

    Source: segmentation_models_pytorch documentation: only the encoder comes with pretrained weights.
    """
    encoder = getattr(model, "encoder", None)
    if encoder is None or not derives(model, "SegmentationModel", "segmentation_models_pytorch"):
        return None
    head = everything_but(["encoder"], model, "").backbone
    return everything_but(head, model, "segmentation_models_pytorch: 'encoder' is the backbone")


# ------------------------------------------------------------------------------------------------------ PEFT


def adapted_model(model: nn.Module) -> Selection | None:
    """Tell what PEFT has put into a model, to be trained, from the model itself.

    The head is the adapters (in each layer PEFT has wrapped, everything but the layer itself), the copies
    made for ``modules_to_save`` and the prompt encoder. The backbone is everything else; PEFT has taken its
    gradients already, and freezing holds its running statistics and dropout too.

    Args:
        model: any module; ``None`` is returned unless there is a layer of PEFT's in it.

    Raises:
        SelectionError: more than the adapters trains, or a head is neither trained nor pretrained.

    >>> print(adapted_model(nn.Linear(2, 2)))
    None

    Source: PEFT documentation, "Adapter injection" and ``modules_to_save``.
    """
    kinds = {type(module): module for module in model.modules()}
    if ("adapted", id(model)) in SKIPPED.get() or not any(
        derives(example, name, "peft") for example in kinds.values() for name in _PEFT
    ):
        return None
    head = _adapters(model)
    if not any(is_below(name, head) for name, _ in parameters_of(model)):
        raise SelectionError(
            "a model of PEFT's, with no adapter of a known form in it",
            where="model",
            got=type(model).__name__,
            remedy="add an adapter first, or name what is to freeze, for example "
            "freezekit.freeze(model, 'base_model')",
        )
    training = [name for name, p in parameters_of(model) if p.requires_grad and not is_below(name, head)]
    if training:
        raise SelectionError(
            "parameters that are no adapter train as well",
            where="model",
            got=few_of(training),
            remedy="stop them with requires_grad_(False) if they are to be frozen; else name all that is to "
            f"train, for example freezekit.freeze_backbone(model, head={_globs([*training, *head])!r})",
        )
    _refuse_untrained_head(model, head)
    return everything_but(head, model, "PEFT: the adapters train, all else is the backbone")


_PEFT = ("PeftModel", "PeftMixedModel", "BaseTunerLayer", "ModulesToSaveWrapper")


def _adapters(model: nn.Module) -> list[str]:
    """Return the names of what PEFT has added, the topmost only."""
    found: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if derives(module, "BaseTunerLayer", "peft"):
            kept = {"base_layer"}
        elif derives(module, "BaseTuner", "peft"):
            kept = {"model"}
        elif derives(module, "ModulesToSaveWrapper", "peft"):
            found.append(path)  # the original too, which its copy stands in for
            continue
        elif derives(module, "PeftModel", "peft") or derives(module, "PeftMixedModel", "peft"):
            # what it keeps a second reference to is the model's, too
            own = {id(p) for p in module.get_submodule("base_model").parameters()}
            children = dict(module.named_children())
            kept = {name for name, child in children.items() if {id(p) for p in child.parameters()} <= own}
        else:
            continue
        names = [*module._modules, *(n for n, p in module._parameters.items() if p is not None)]
        names = [f"{path}.{name}" if path else name for name in names if name not in kept]
        found += [name for name in names if not is_below(name, found)]
    return found


def _adapted_inside(model: nn.Module) -> str:
    """Return the name of the model PEFT was given; ``""`` if it was changed in place."""
    path: list[str] = []
    while True:
        if derives(model, "PeftModel", "peft") or derives(model, "PeftMixedModel", "peft"):
            path.append("base_model")
        elif derives(model, "BaseTuner", "peft"):
            path.append("model")
        else:
            return ".".join(path)
        model = model.get_submodule(path[-1])


def _refuse_untrained_head(model: nn.Module, adapters: Sequence[str]) -> None:
    """Refuse a head, by the other rules, that PEFT neither trains nor trains a copy of.

    What a language model's output is made by is pretrained, and stays as PEFT leaves it.
    """
    path = _adapted_inside(model)
    inner = model.get_submodule(path)
    output = getattr(inner, "get_output_embeddings", lambda: None)()
    answer = answer_of(found_by_others, "adapted", inner)
    if isinstance(answer, SelectionError):
        if derives(inner, "PreTrainedModel", "transformers") and has_task(inner) and output is None:
            raise as_inside(path, answer)
        return  # no head is known: then all that is new is what PEFT has added
    pretrained = {id(p) for p in output.parameters()} if isinstance(output, nn.Module) else set()
    new = [
        part
        for part in (f"{path}.{name}" if path else name for name in answer.head)
        if "pooler" not in part
        and any(
            is_below(name, [part]) and not is_below(name, adapters) and id(p) not in pretrained
            for name, p in parameters_of(model)
        )
    ]
    if new:
        raise SelectionError(
            "PEFT freezes this head, which is new unless its checkpoint had the same classes",
            where="model",
            got=", ".join(new),
            remedy=f"name it in the configuration, modules_to_save={[n.rpartition('.')[2] for n in new]!r}; "
            f"or, if it is pretrained, freezekit.freeze_backbone(model, head={_globs(adapters)!r})",
        )


# ------------------------------------------------------------------------------------------------- Lightning


def lightning_module(model: nn.Module) -> Selection | None:
    """Look into a Lightning module for the one model it holds.

    Metrics, losses without parameters and whatever else has none are part of neither side. Other children
    with parameters, a loss's say, are head.

    Args:
        model: any module; ``None`` is returned unless it derives from ``LightningModule``.

    Raises:
        SelectionError: more than one child has a backbone, as a teacher and a student; or none.

    >>> print(lightning_module(nn.Linear(2, 2)))
    None

    Source: Lightning documentation, "Transfer learning".
    """
    if ("lightning", id(model)) in SKIPPED.get() or not derives(
        model, "LightningModule", "lightning", "pytorch_lightning"
    ):
        return None
    held = list(parametrised(model))
    answers = {name: answer_of(find_inside, model, name) for name in held}
    if len(held) > 1:
        answers[""] = answer_of(found_by_others, "lightning", model)
    found = {name: answer for name, answer in answers.items() if isinstance(answer, Selection)}
    if len(found) > 1:
        calls = [f"freezekit.freeze_backbone(model, head={list(s.head)!r})" for s in found.values()]
        raise SelectionError(
            "cannot tell which backbone of this Lightning module is meant: there is more than one reading",
            where="model",
            got=children_of(model),
            remedy="say what is to train, for example " + " or ".join(calls[:3]),
        )
    if not found:
        # the reason of the one child there is, or, of several, that of the rules for any module
        reasons = [(name, reason) for name, reason in answers.items() if isinstance(reason, SelectionError)]
        if not reasons:
            return None
        raise as_inside(*reasons[-1])
    ((name, selection),) = found.items()
    empty = {child_name for child_name, child in model.named_children() if not has_parameters(child)}
    backbone = [n for n in selection.backbone if n not in empty]
    head = everything_but(backbone, model, "").backbone if name else selection.head
    head = tuple(n for n in head if n not in empty)
    return Selection(tuple(backbone), head, f"Lightning module: {selection.rule}")


def _globs(names: Sequence[str]) -> list[str]:
    """Return globs of the last parts of the names."""
    return list(dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in names))


RULES: tuple[Callable[[nn.Module], Selection | None], ...] = (
    lightning_module,
    adapted_model,
    transformers_model,
    segmentation_model,
)
"""In the order to be asked: what holds another model comes first."""
