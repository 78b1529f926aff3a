"""Layer groups: a model cut from input to head, for freezing by depth and for learning rates by depth."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from freezekit.errors import SelectionError
from freezekit.freezing import holding, optim
from freezekit.freezing.discovery import select_backbone
from freezekit.freezing.distributed import changes_told
from freezekit.freezing.freeze import _freeze
from freezekit.freezing.groups import check_number
from freezekit.freezing.handle import Choices, Freeze
from freezekit.freezing.release import release_all
from freezekit.freezing.selection import Names, Selection, tensors_of

__all__ = ["BORDER", "freeze_to", "layer_groups", "parameter_groups"]

BORDER = "freeze_to:"
"""What the holders that :func:`freeze_to` makes begin with, so that it finds its own, in copies too."""


def layer_groups(model: nn.Module, *, head: Names | None = None) -> list[list[str]]:
    """Cut a model into groups of layers from input to head, in the order they are registered.

    A group is a block of the backbone: a stage of a ResNet, a layer of a transformer, a convolution of a
    VGG. What is smaller goes with the block before it; what comes before the first block (stem, embeddings,
    parameters of the model itself) makes the first group. The last is the head, whole.

    Args:
        model: the model.
        head: as for :func:`freeze_backbone`.

    Returns:
        Names, to be used as patterns; each stands for everything below it.

    Raises:
        SelectionError: the head cannot be told.

    >>> model = nn.Sequential()
    >>> model.add_module("features", nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    >>> model.add_module("head", nn.Linear(4, 2))
    >>> layer_groups(model)
    [['features.0'], ['features.1'], ['features.2'], ['head']]

    Source: Howard & Ruder 2018, section 3.3, gradual unfreezing.
    """
    selection = select_backbone(model, head, None)
    return [*_cut(model, selection), list(selection.head)]


def _cut(model: nn.Module, selection: Selection) -> list[list[str]]:
    """Cut the backbone into blocks, opening containers until blocks are seen: several of one class."""
    modules = dict(model.named_modules(remove_duplicate=False))
    units = [name for name in selection.backbone if name in modules]
    first = [name for name in selection.backbone if name not in modules]  # tensors of the model itself
    weights = {name: _weights(modules[name]) for name in units}
    while (block := _block_class(modules, weights)) is None and weights:
        largest = max(weights, key=lambda name: weights[name])
        inside = modules[largest]
        children = [f"{largest}.{name}" for name, child in inside._modules.items() if child is not None]
        if not children or 2 * weights[largest] <= sum(weights.values()):
            break  # nothing to open, or nothing that stands out
        own = [*inside._parameters.items(), *inside._buffers.items()]
        first += [f"{largest}.{name}" for name, tensor in own if tensor is not None]
        place = units.index(largest)
        units[place : place + 1] = children
        weights = {name: _weights(modules[name]) for name in units}
    alike = [w for n, w in weights.items() if block is None or holding.live_class(modules[n]) is block]
    smallest = min(filter(None, alike), default=1)
    groups: list[list[str]] = [[]]
    begun = False
    for name in units:
        if begun and weights[name] >= smallest:
            groups.append([])
        begun |= weights[name] > 0
        groups[-1].append(name)
    groups[0][:0] = first
    return [group for group in groups if group]


def _weights(module: nn.Module) -> int:
    """Count the weight matrices in a module: what it has of layers, norms and biases left aside."""
    return sum(parameter.ndim > 1 for parameter in module.parameters())


def _block_class(modules: dict[str, nn.Module], weights: dict[str, int]) -> type[nn.Module] | None:
    """Return the class that at least three modules are of, with at least half of the layers in them."""
    count: Counter[type[nn.Module]] = Counter()
    total: Counter[type[nn.Module]] = Counter()
    for name, weight in weights.items():
        count[holding.live_class(modules[name])] += weight > 0
        total[holding.live_class(modules[name])] += weight
    return next((c for c, w in total.most_common(1) if count[c] >= 3 and 2 * w >= total.total()), None)


def freeze_to(
    model: nn.Module,
    n: int,
    *,
    head: Names | None = None,
    bn: str = "freeze",
    convert: str | None = None,
    hold: str = "all",
    optimizer: Any = None,
) -> Freeze:
    """Freeze the first ``n`` layer groups, so that those behind them train.

    Called again it moves the border: its earlier freeze of the model ends, and layers that leave it train
    again as after :func:`unfreeze`. What other freezes hold stays frozen.

    Args:
        model: the model.
        n: how many of ``layer_groups(model)``; a negative number counts from the head: with -1 the head
            trains alone, with -2 the last block too. 0 freezes nothing.
        head: as for :func:`freeze_backbone`.
        bn: as for :func:`freeze_backbone`.
        convert: as for :func:`freeze_backbone`.
        hold: as for :func:`freeze_backbone`.
        optimizer: as for :func:`freeze_backbone`.

    Returns:
        The freeze in force.

    Raises:
        SelectionError: there is no such group, or the head cannot be told.
        FreezekitError: something cannot be frozen; nothing is changed then.

    >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    >>> freeze_to(model, -2, head="3").trainable
    ['2.weight', '2.bias', '3.weight', '3.bias']
    >>> freeze_to(model, -3, head="3").frozen
    ['0.weight', '0.bias']

    Source: Howard & Ruder 2018, section 3.3; the name and the sign of ``n`` are fastai's.
    """
    groups = layer_groups(model, head=head)
    if isinstance(n, bool) or not isinstance(n, int) or not -len(groups) <= n < len(groups):
        raise SelectionError(
            f"{type(model).__name__} has {len(groups)} layer groups, the last of which is the head",
            where="n",
            got=repr(n),
            remedy=f"give a number from {-len(groups)} to {len(groups) - 1}; print(layer_groups(model)) "
            "shows them",
        )
    count = n % len(groups)
    cut = [tuple(name for group in part for name in group) for part in (groups[:count], groups[count:])]
    selection = Selection(cut[0], cut[1], f"the first {count} of {len(groups)} layer groups")
    choices = Choices(bn, convert, hold)
    before = {h for h in _holders(model) if h.startswith(BORDER)}
    if count:
        handle = _freeze(model, cut[0], selection, choices, optimizer, BORDER)
    else:
        handle = Freeze(model, BORDER, selection, (), choices, optimizers=optim.check_optimizers(optimizer))
    try:
        with changes_told(model):
            release_all(model, before, adopt_mode=True)
    except BaseException:
        handle.undo()
        raise
    return handle


def _holders(model: nn.Module) -> set[str]:
    held = (holding.holders_of(module) for module in model.modules())
    return set().union(*held, *(holding.holders_of(owner, own) for _, owner, own, _ in tensors_of(model)))


def parameter_groups(
    model: nn.Module, lr: float, decay: float = 1 / 2.6, *, head: Names | None = None
) -> list[dict[str, Any]]:
    """Return an optimizer's groups, one for each layer group, with learning rates that fall with depth.

    The head has ``lr``, and every group before it ``decay`` times that of the next. Every parameter that
    requires a gradient is in one group, a tied one in the first that has it; a group may be empty, so that
    their number does not depend on what is frozen. Call it before freezing, and give the optimizer to the
    freeze: what is unfrozen later then comes back to its own group and rate.

    Args:
        model: the model.
        lr: the learning rate of the head.
        decay: the ratio of one group's learning rate to the next one's.
        head: as for :func:`freeze_backbone`.

    Raises:
        SelectionError: the head cannot be told.
        FreezekitError: ``lr`` or ``decay`` is no such number.

    >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    >>> groups = parameter_groups(model, lr=1.0, decay=0.5, head="2")
    >>> [(len(group["params"]), group["lr"]) for group in groups]
    [(2, 0.25), (2, 0.5), (2, 1.0)]

    Source: Howard & Ruder 2018, section 3.1, discriminative fine-tuning, where 2.6 comes from.
    """
    check_number(lr, "lr=")
    check_number(decay, "decay=")
    names = layer_groups(model, head=head)
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": lr * decay ** (len(names) - 1 - k)} for k in range(len(names))
    ]
    home = {name: group for own, group in zip(names, groups, strict=True) for name in own}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            above = (".".join(parts[:k]) for k in range(len(parts), 0, -1))
            next(home[path] for path in above if path in home)["params"].append(parameter)
    return groups
