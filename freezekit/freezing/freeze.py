"""Freezing: the calls a user makes."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from torch import nn

from freezekit.errors import FreezekitError, SelectionError
from freezekit.freezing import holding, optim
from freezekit.freezing.discovery import select_backbone
from freezekit.freezing.distributed import changes_told, reshard
from freezekit.freezing.folding import make_plan
from freezekit.freezing.groups import warn_of_orphans
from freezekit.freezing.handle import Choices, Freeze
from freezekit.freezing.refusals import refuse_impossible, refuse_lone_buffers, refuse_shared, refuse_unknown
from freezekit.freezing.selection import Names, Selection, names_of, resolve, tensors_of
from freezekit.patterns import select

__all__ = ["freeze", "freeze_backbone"]


def freeze_backbone(
    model: nn.Module,
    *,
    head: Names | None = None,
    backbone: Names | None = None,
    bn: str = "freeze",
    convert: str | None = None,
    hold: str = "all",
    optimizer: Any = None,
) -> Freeze:
    """Freeze a model's backbone, so that only its head trains.

    Everything in the backbone keeps its value and behaves as in eval mode, whatever ``model.train()`` or an
    optimizer does: parameters and running statistics stay bit-identical, dropout is off, and no gradient is
    computed for its parameters. No module or parameter object is replaced, and ``state_dict()`` keeps its
    keys and values.

    Args:
        model: the model; :func:`find_backbone` says which part of it is meant.
        head: what is to train, if that cannot be told or is to be something else: names
            (``"classifier.6"``), globs or modules.
        backbone: what is to freeze, likewise; by default everything but the head.
        bn: what becomes of the BN layers. ``"freeze"``; ``"freeze_stats"``: gamma and beta keep training, if
            they do; ``"train"``: they stay as they are, statistics and all.
        convert: what computes the frozen BN layers. ``None``: what torch's eval mode runs, bit-identical to
            it. ``"affine"``: one scale and one shift, faster, and within rounding
            (:class:`freezekit.nn.FrozenAffine` has the tolerance). ``"fold"``: nothing at all, where the
            scale can go into the convolution or linear layer before; elsewhere affine, and ``.unfolded``
            says why. That layer then gives what BN gives, also to someone who calls it by itself: take taps
            of it, or layers out of the model, only after ``undo()``. Python's forwards are traced on a copy.
        hold: what is kept in eval mode. ``"all"``; ``"norm"``: only what keeps state beside its parameters,
            such as norm layers, so that dropout and stochastic depth stay alive and follow ``train()``.
        optimizer: an optimizer that has the model's parameters already, or several: what is frozen is taken
            out of its groups, and goes back to its place with its momentum when it is unfrozen. Its
            ``state_dict()`` keeps the state of what is frozen, and loads into an optimizer with the same
            parts frozen. ``copy.deepcopy`` and pickle of the optimizer itself have what trains only.

    Returns:
        The freeze in force; ``.undo()`` ends it.

    Raises:
        SelectionError: head or backbone cannot be told, or a name matches nothing.
        FreezekitError: something in the backbone cannot be frozen (a BN without running statistics, a lazily
            initialised or scripted module); nothing is changed then.

    Warns:
        OptimizerWarning: something that trains is in no group of the optimizers given.

    >>> from collections import OrderedDict
    >>> model = nn.Sequential(OrderedDict(stem=nn.Linear(4, 8), bn=nn.BatchNorm1d(8), fc=nn.Linear(8, 2)))
    >>> handle = freeze_backbone(model)
    >>> model.train().bn.training, handle.trainable
    (False, ['fc.weight', 'fc.bias'])

    Source: PyTorch documentation, torch.nn.Module.train; batch statistics: Ioffe & Szegedy 2015, section 3.1.
    """
    selection = select_backbone(model, head, backbone)
    if not selection.backbone:
        raise SelectionError(
            "nothing is left to freeze: the head is the whole model",
            where="head=",
            got=", ".join(selection.head[:4]),
            remedy="name a smaller head",
        )
    return _freeze(model, selection.backbone, selection, Choices(bn, convert, hold), optimizer)


def freeze(
    model: nn.Module,
    patterns: Names,
    *,
    bn: str = "freeze",
    convert: str | None = None,
    hold: str = "all",
    optimizer: Any = None,
) -> Freeze:
    """Freeze the layers and parameters that patterns name.

    A layer's name stands for everything below it. A layer is held in eval mode when all of it is frozen; a
    parameter frozen alone just stops training.

    Args:
        model: the model.
        patterns: names or globs of modules and parameters (``"layer1"``, ``"layer[12].*"``, ``"*.bn?"``), or
            modules of the model. A tied parameter is frozen under all its names.
        bn: as for :func:`freeze_backbone`.
        convert: as for :func:`freeze_backbone`.
        hold: as for :func:`freeze_backbone`.
        optimizer: as for :func:`freeze_backbone`.

    Returns:
        The freeze in force; ``.undo()`` ends it.

    Raises:
        SelectionError: a pattern matches nothing, or a buffer without its layer.
        FreezekitError: something named cannot be frozen; nothing is changed then.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> freeze(model, "[01]").frozen[:3]
    ['0.weight', '0.bias', '1.weight']

    Source: PyTorch documentation, "Locally disabling gradient computation", on ``requires_grad`` and on
    evaluation mode, which it calls orthogonal to it.
    """
    return _freeze(model, resolve(model, patterns, "patterns"), None, Choices(bn, convert, hold), optimizer)


def _freeze(
    model: nn.Module,
    names: Iterable[str],
    selection: Selection | None,
    choices: Choices,
    optimizer: Any = None,
    kind: str = "",
    stacklevel: int = 3,
) -> Freeze:
    refuse_unknown(*choices)
    optimizers = optim.check_optimizers(optimizer)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise FreezekitError(
            "DistributedDataParallel waits for a gradient of every parameter that had one when it was made",
            where="model",
            got="a model wrapped already",
            remedy="freeze the model first, then wrap it",
        )
    reshard(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = list(tensors_of(model))
    chosen = set(select(names, names_of(model), where="names"))
    whole = _whole_modules(model, chosen)
    refuse_lone_buffers(tensors, chosen, whole, complement=selection is not None)
    batchnorms = {id(m) for m in whole.values() if holding.is_batchnorm(m)}
    live = batchnorms if choices.bn == "train" else set()
    held = {
        key: m for key, m in whole.items() if key not in live and (choices.hold == "all" or _has_state(m))
    }
    train = batchnorms if choices.bn != "freeze" else set()
    tied = {
        id(t)
        for name, owner, own, t in tensors
        if (name in chosen or id(owner) in whole)
        and not (id(owner) in live or (id(owner) in train and own in owner._parameters))
    }
    frozen = [(owner, own) for _, owner, own, t in tensors if id(t) in tied]
    refuse_impossible(modules, {*held, *(id(owner) for owner, _ in frozen)}, held)
    if selection is not None:
        refuse_shared(modules, tensors, chosen, held)
    norms = {name: m for name, m in model.named_modules() if id(m) in held and id(m) in batchnorms}
    plan = make_plan(model, norms, choices.convert)
    if not frozen and not held:
        raise SelectionError(
            "nothing is left to freeze",
            where="bn=, hold=",
            got=f"{choices.bn!r}, {choices.hold!r}",
            remedy='name more layers, or freeze these with bn="freeze", hold="all"',
        )
    handle = Freeze(
        model,
        kind + secrets.token_hex(8),
        selection,
        tuple(names),
        choices,
        None if plan is None else plan.kept,
        optimizers,
    )
    try:
        with changes_told(model):
            for owner, own in frozen:
                holding.note_tensor(owner, own, handle._holder)
            for owner, own in frozen:
                holding.stop_gradient(owner, own)
            for module in held.values():
                holding.hold_module(module, handle._holder)
            for owner, own in frozen:
                if own in owner._buffers and id(owner) not in held:
                    holding.pin_buffers(owner)
            if plan is not None:
                plan.carry_out(norms)
            for each in optimizers:
                optim.park(each, [t for *_, t in tensors if id(t) in tied])
            warn_of_orphans(model, optimizers, stacklevel=stacklevel)
    except BaseException:
        handle.undo()  # all or nothing
        raise
    return handle


def _has_state(module: nn.Module) -> bool:
    """Tell whether the module keeps state beside parameters, as norm layers with statistics do."""
    return bool(module._buffers) or holding.is_batchnorm(module)


def _whole_modules(model: nn.Module, chosen: set[str]) -> dict[int, nn.Module]:
    """Return the modules that are frozen entirely: named, or everything in them is."""
    held: dict[int, nn.Module] = {}
    for path, module in reversed(list(model.named_modules(remove_duplicate=False))):
        children = [child for child in module._modules.values() if child is not None]
        own = [n for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]
        whole = all(id(child) in held for child in children) and all(
            (f"{path}.{name}" if path else name) in chosen for name in own
        )
        if path in chosen or (whole and (children or own)):
            held[id(module)] = module
    return held
