"""Rules: what makes a child of a model backbone or head; each decides, stands aside, or refuses.

No library is imported: torchvision is known by where its classes come from, timm by its methods. What may
be new is never backbone: training a pretrained layer costs a little, freezing a new one costs the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from freezekit.errors import SelectionError
from freezekit.freezing import frameworks
from freezekit.freezing.base_models import has_task
from freezekit.freezing.recognition import LIBRARY_MODELS, derives, home_of, own_tensors
from freezekit.freezing.selection import (
    NoHeadError,
    Selection,
    everything_but,
    has_parameters,
    nothing_but,
    parametrised,
    prefixed,
    size_of,
)
from freezekit.freezing.words import (
    AUXILIARY,
    CONSTANT,
    INPUT,
    ON_NETWORK,
    PIECE,
    all_of,
    is_head,
    is_network,
    words,
)

__all__ = ["CONVENTIONS", "LIBRARIES", "undecided", "wrapped"]

Rule = Callable[[nn.Module], Selection | None]

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_TORCHVISION_HEADS = ("AuxLogits", "aux1", "aux2", "aux_classifier", "classifier", "fc", "head", "heads")
_TIMM_POOLS = ("attn_pool", "fc_norm", "global_pool")


def torchvision_model(model: nn.Module) -> Selection | None:
    """Take the children that torchvision names as heads; all else its constructors made is the backbone."""
    home = home_of(model, "torchvision.models.")
    if home is None:
        return None
    if ".optical_flow." in home:
        raise undecided(model, "in optical flow no part is a head")
    if ".detection." in home and hasattr(model, "backbone"):
        return _detector(model)
    children = dict(model.named_children())
    named = [n for n in children if n in _TORCHVISION_HEADS]
    if not named:
        return None
    named += [n for n in list(children)[list(children).index(named[-1]) + 1 :] if is_head(n)]
    heads = _with_parameters(model, named, f"put the new head in place first (model.{named[0]} = ...)")
    _refuse_later(model, heads)
    # torchvision's pools have no parameters: one that has was put there
    pools = [n for n, child in children.items() if "avgpool" in n and has_parameters(child)]
    rule = f"torchvision calls the head {_quoted(heads)}"
    return everything_but([*heads, *pools, *own_tensors(model)], model, rule)


def _detector(model: nn.Module) -> Selection:
    """Take the body of a detector's backbone: only that comes pretrained for sure."""
    inner = pyramid(model.get_submodule("backbone"))
    if inner is None:
        raise undecided(model, "its backbone may hold new layers, a feature pyramid say")
    found = prefixed(inner, "backbone")
    rule = f"torchvision detector: {_quoted(found.backbone)} is what its feature layers are put on"
    return nothing_but(found.backbone, model, rule)


def pyramid(model: nn.Module) -> Selection | None:
    """Take the body that a feature pyramid, as detectors have it, is put on: the pyramid may be new."""
    children = dict(model.named_children())
    for body, top in (("body", "fpn"), ("features", "extra")):
        if body in children and top in children:
            return nothing_but([body], model, f"{body!r} is the backbone, {top!r} is put on it")
    return None


def timm_model(model: nn.Module) -> Selection | None:
    """Take the children that hold the classifiers timm names, and a pool or norm made for them."""
    if not all(callable(getattr(model, name, None)) for name in ("get_classifier", "reset_classifier")):
        return None
    config = getattr(model, "default_cfg", None)
    given = config.get("classifier") if isinstance(config, dict) else None
    names = [given] if isinstance(given, str) else list(given or ())
    got = model.get_classifier()  # type: ignore[operator]
    ids = {id(m) for m in ([got] if not isinstance(got, (tuple, list, nn.ModuleList)) else [got, *got])}
    names += [name for name, module in model.named_modules() if id(module) in ids]
    every = [name for name, _ in model.named_children()]
    tops = [t for t in dict.fromkeys(n.partition(".")[0] for n in names) if t in every]
    if not tops:
        raise undecided(model, "it is timm's, but names no classifier")
    tops += [n for n in every[max(map(every.index, tops)) + 1 :] if is_head(n) and n not in tops]
    heads = _with_parameters(model, tops, "give it one, model.reset_classifier(num_classes)")
    _refuse_later(model, heads)
    pools = [n for n, c in model.named_children() if n in _TIMM_POOLS and has_parameters(c)]
    named = sorted({n for n in names if n.partition(".")[0] in heads and n.rpartition(".")[0] not in names})
    rule = f"timm calls the classifier {_quoted(named)}"
    rule += f", and {_quoted(pools)} may be made for it" if pools else ""
    return everything_but([*heads, *pools, *own_tensors(model)], model, rule)


def by_name(model: nn.Module) -> Selection | None:
    """Go by conventional names: something called a head, beside a backbone or after layers of one."""
    children = parametrised(model)
    encodes = any("encoder" in words(name) for name in children)
    heads = [n for n in children if is_head(n) or (not encodes and words(n)[-1:] == ["decoder"])]
    networks = [n for n, c in children.items() if n not in heads and _is_network(n, c)]
    if networks:
        heads += [n for n in children if n not in (*heads, *networks) and ON_NETWORK & {*words(n)[-1:]}]
        return _on_networks(model, networks, heads) if heads else None
    return _in_a_row(model, heads) if heads else None


def _on_networks(model: nn.Module, networks: Sequence[str], heads: Sequence[str]) -> Selection:
    """Take what is called a backbone, without a head of its own inside; the rest is put on it."""
    children, every = parametrised(model), dict(model.named_children())
    order, names = list(children), list(every)
    before = [n for n in order[: order.index(networks[-1])] if n not in (*networks, *heads)]
    pretrained = [n for n in networks if _holds_library(children[n])]
    if len(networks) > 1 and any("student" in words(n) for n in networks):
        raise undecided(model, "it has a student, which is to train, beside others")
    if 0 < len(pretrained) < len(networks):
        raise undecided(model, f"{_quoted([n for n in networks if n not in pretrained])} may be new")
    library = any(_is_library_model(children[n]) for n in networks)
    inputs = [] if library else [n for n in before if all_of(INPUT, n)]
    if before != inputs:
        raise undecided(model, f"{_quoted([n for n in before if n not in inputs])} may be new")
    backbone: list[str] = []
    for name in names[: names.index(networks[-1]) + 1]:
        inner = _inside(children[name]) if name in networks else None
        if inner is not None:
            backbone += prefixed(inner, name).backbone
        elif name in (*networks, *inputs) or isinstance(every[name], _DropoutNd):
            backbone.append(name)
    backbone += [n for n, b in model._buffers.items() if b is not None and CONSTANT.fullmatch(n)]
    selection = nothing_but(backbone, model, "")
    inner_heads = [n for n in selection.head if n.partition(".")[0] in networks]
    like = "is named like a backbone" if all(map(is_network, networks)) else "is a library's model"
    rule = f"{_quoted(networks)} {like}, {_quoted(heads)} is named like a head"
    rule += f", and {_quoted(inner_heads)} may be new" if inner_heads else ""
    return Selection(selection.backbone, selection.head, rule)


def _in_a_row(model: nn.Module, heads: Sequence[str]) -> Selection:
    """Take layers named as convolutional networks and transformers name theirs, and then a head."""
    children, every = list(parametrised(model).items()), [name for name, _ in model.named_children()]
    main = {name for name in heads if not AUXILIARY & {*words(name)}}
    row: list[str] = []
    odd: list[str] = []
    convolved = on_blocks = on_library = headed = False
    for name, child in children:
        new = name in main or _may_be_new(name, child, convolved, on_blocks, on_library)
        headed = headed or new
        if not headed and name not in heads:
            row.append(name)
            odd += [] if all_of(PIECE, name) or _is_norm(child) else [name]
            block = any(has_parameters(part) for part in child.children())
            convolved = convolved or not _is_linear(child)
            on_blocks, on_library = on_blocks or block, on_library or (block and _of_library(child))
        elif not new and name not in heads and not _is_norm(child):
            odd.append(name)
    if odd:
        what = f"{_quoted(odd[:12])} may or may not be of the head, beside {_quoted(heads)}"
        raise undecided(model, what, [*odd[:12], *heads])
    if not row or not main:
        raise undecided(
            model, "all of it is named like a head" if main else "no head is the main one", heads[-1:]
        )
    tail = every[every.index(row[-1]) + 1 :]
    chosen = {*heads, *tail}
    rule = f"{_quoted(heads)} is named like a head and comes last"
    own = own_tensors(model, [child for name, child in children if name in heads])
    return everything_but([*(n for n in every if n in chosen), *own], model, rule)


def _may_be_new(name: str, layer: nn.Module, convolved: bool, on_blocks: bool, on_library: bool) -> bool:
    """Tell whether a layer may be put on those before: a pool, a linear on others, a lone one on blocks."""
    lone = not any(True for _ in layer.children()) and not _is_norm(layer)
    lone = lone or "BatchNorm1d" in type(layer).__name__
    linear = convolved and isinstance(layer, nn.Linear)
    return "pool" in name or linear or (on_blocks and lone) or (on_library and not _of_library(layer))


def by_order(model: nn.Module) -> Selection | None:
    """Go by the order in ``nn.Sequential``: a network, blocks or convolutions, then linear layers."""
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        return None
    layers = list(model.named_children())
    full = [k for k, (_, layer) in enumerate(layers) if has_parameters(layer)]
    blocks = [k for k in full[:-1] if any(has_parameters(part) for part in layers[k][1].children())]
    if len(full) < 2 or not _ends_linearly(layers[full[-1]][1]):
        return None
    kinds = {type(layers[k][1]) for k in blocks}
    inner = None
    if not blocks:
        others = [k for k in full[:-1] if not _is_linear(layers[k][1])]
        if not others or not _is_all_linear(layers[full[-1]][1]):
            return None
        end = others[-1] + 1
        end += _is_norm(layers[end][1])
        rule = "the linear layers at the end are the head"
    elif blocks[0] == full[0] and (
        _is_library_model(layers[full[0]][1])
        or (len(blocks) == 1 and all(_is_linear(layers[k][1]) for k in full[1:-1]))
    ):
        end = full[0] + 1
        inner = _inside(layers[full[0]][1])
        rule = "a network comes first and the head after it"
    elif (
        len(blocks) > 1
        and not any(_is_library_model(layers[k][1]) for k in blocks)
        and (
            all(_of_library(layers[k][1]) for k in blocks) or (len(kinds) == 1 and nn.Sequential not in kinds)
        )
    ):
        end = blocks[-1] + 1
        rule = "what comes after the last block is the head"
    else:
        return None
    heads = [name for name, _ in layers[end:]]
    inside = prefixed(inner, layers[full[0]][0]).head if inner else ()
    own = own_tensors(model, [layer for _, layer in layers[end:]])
    return everything_but([*inside, *heads, *own], model, rule)


LIBRARIES: tuple[Rule, ...] = (torchvision_model, timm_model, pyramid)
"""Rules for what a library made, wherever in a model it is."""

CONVENTIONS: tuple[Rule, ...] = (by_name, by_order)
"""Rules for what people write themselves."""


def wrapped(model: nn.Module) -> str | None:
    """Return the name under which ``torch.compile``, DataParallel and the like hold a model."""
    names = [name for name, _ in model.named_children()]
    own = any(True for _ in model.named_parameters(recurse=False))
    return names[0] if len(names) == 1 and names[0] in _WRAPPERS and not own else None


def undecided(model: nn.Module, why: str, heads: Iterable[str] = ()) -> SelectionError:
    """Make the error for a model that cannot be told apart: the candidates, and the call to make."""
    rows = [
        f"{name} ({type(child).__name__}, {sum(map(size_of, child.parameters())):,} parameters)"
        for name, child in model.named_children()
    ]
    shown = rows if len(rows) <= 12 else [*rows[:5], "...", *rows[-6:]]
    return SelectionError(
        f"cannot tell the head of {type(model).__name__}: {why}",
        where="model",
        got="; ".join(shown) or f"{type(model).__name__}, which has no children",
        remedy=_call_to_make(model, list(heads)),
    )


def _call_to_make(model: nn.Module, heads: list[str]) -> str:
    children = parametrised(model)
    networks = [n for n, c in children.items() if _is_network(n, c) and "student" not in words(n)]
    networks = [n for n in networks if _holds_library(children[n])] or networks
    nested = [n for n, _ in model.named_modules() if is_head(n.rpartition(".")[2]) and n not in heads]
    shallowest = min((n.count(".") for n in nested), default=0)
    likely = heads or [n for n in nested if n.count(".") == shallowest][:3] or list(children)[-1:]
    side, names = ("backbone", networks) if networks and not heads else ("head", likely)
    if not names:
        return 'freezekit.freeze(model, "*") freezes all of a model'
    given = repr(names[0] if len(names) == 1 else names)
    return f"say which it is, for example freezekit.freeze_backbone(model, {side}={given})"


def _inside(child: nn.Module) -> Selection | None:
    """Look for a head inside a backbone, which people replace by a new one; ``None`` if it has none."""
    name = wrapped(child)
    if name is not None:
        inner = _inside(child.get_submodule(name))
        return inner and prefixed(inner, name)
    if derives(child, "PreTrainedModel", "transformers") and not has_task(child):
        return None
    for rule in (*frameworks.RULES, *LIBRARIES):
        try:
            found = rule(child)
        except NoHeadError:
            return None
        if found is not None:
            return found
    children = parametrised(child)
    models = [n for n, part in children.items() if _is_library_model(part)]
    if models or (len(children) == 1 and not own_tensors(child)):
        backbone: list[str] = []
        for n in models or children:
            inner = _inside(children[n])
            backbone += prefixed(inner, n).backbone if inner else [n]
        selection = nothing_but(backbone, child, "")
        return selection if any(n.partition(".")[0] in children for n in selection.head) else None
    return everything_but(heads, child, "") if 0 < len(heads := _new_inside(child)) < len(children) else None


def _new_inside(child: nn.Module) -> list[str]:
    """Return what is named like a head, linear layers after it, and what ends a row of a library's layers."""
    children = list(parametrised(child).items())
    named = [k for k, (n, part) in enumerate(children) if is_head(n) and not _is_norm(part)]
    heads = [
        n for k, (n, p) in enumerate(children) if k in named or (named and k > named[0] and _is_linear(p))
    ]
    if isinstance(child, nn.Sequential):
        library = [k for k, (_, part) in enumerate(children) if _of_library(part)]
        later = children[library[-1] + 1 :] if library else []
        heads += [n for n, part in later if not _is_norm(part) or "BatchNorm1d" in type(part).__name__]
    return heads


def _with_parameters(model: nn.Module, names: Sequence[str], remedy: str) -> list[str]:
    """Return the heads that can train, and refuse if none can."""
    heads = [name for name in names if has_parameters(model.get_submodule(name))]
    if not heads:
        raise NoHeadError(
            f"the head {_quoted(names)} has no parameters, so nothing would be left to train",
            where="model",
            got=", ".join(f"{name}: {type(model.get_submodule(name)).__name__}" for name in names),
            remedy=f'{remedy}, or freeze everything with freezekit.freeze(model, "*")',
        )
    return heads


def _refuse_later(model: nn.Module, heads: Sequence[str]) -> None:
    """Refuse layers that come after the heads, which the library did not put there."""
    order = list(parametrised(model))
    later = order[max(map(order.index, heads)) + 1 :]
    if later:
        why = f"{_quoted(later)} comes after the head {_quoted(heads)} and may be new"
        raise undecided(model, why, [*heads, *later])


def _is_network(name: str, module: nn.Module) -> bool:
    return is_network(name) or (not is_head(name) and _is_library_model(module))


def _is_library_model(module: nn.Module) -> bool:
    """Tell whether this is a whole model of a library, with or without its head; not a part of one."""
    home = home_of(module, "torchvision.models.") or ""
    if home and not any(part in home for part in (".detection.", ".optical_flow.", ".segmentation.")):
        headed = any(name in _TORCHVISION_HEADS for name, _ in module.named_children())
        return headed and "Aux" not in type(module).__name__
    return hasattr(module, "reset_classifier") or any(
        kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__
    )


def _holds_library(module: nn.Module) -> bool:
    return any(home_of(part, *LIBRARY_MODELS, "transformers.") is not None for part in module.modules())


def _of_library(module: nn.Module) -> bool:
    """Tell whether a library made this, or all the parts of this sequence."""
    parts = [*module.children()] if isinstance(module, nn.Sequential) else [module]
    return bool(parts) and all(
        home_of(part, *LIBRARY_MODELS) is not None for part in parts if has_parameters(part)
    )


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not any(True for _ in module.children())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_norm(module)


def _is_all_linear(module: nn.Module) -> bool:
    return all(_is_linear(m) for m in module.modules() if any(p is not None for p in m._parameters.values()))


def _ends_linearly(module: nn.Module) -> bool:
    leaves = [m for m in module.modules() if any(p is not None for p in m._parameters.values())]
    return isinstance(leaves[-1], nn.Linear)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
