"""Freezing and unfreezing: the calls a user makes, and the handle they return."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from freezekit.errors import FreezekitError, SelectionError
from freezekit.freezing import holding
from freezekit.freezing.selection import Names, Selection, select_backbone, tensors_of
from freezekit.patterns import select

__all__ = ["Freeze", "freeze", "freeze_backbone", "is_frozen", "trainable_parameters", "unfreeze"]


class Freeze:
    """A freeze in force: what it covers, and how to end it.

    Returned by :func:`freeze_backbone` and :func:`freeze`. ``str()`` of it is a table. As a context manager
    it undoes itself at the end of the block.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> with freeze(model, ["0", "1"]) as handle:
    ...     handle.trainable
    ['2.weight', '2.bias']
    >>> model[1].training, model[1].weight.requires_grad
    (True, True)
    """

    def __init__(self, model: nn.Module, holder: str, selection: Selection | None) -> None:
        self.model = model
        self.selection = selection
        """Which part was taken for backbone and head and why; ``None`` for :func:`freeze`."""
        self._holder = holder

    @property
    def frozen(self) -> list[str]:
        """Names of the parameters and buffers this freeze holds, tied ones under each of their names."""
        return [
            name
            for name, owner, own, _ in tensors_of(self.model)
            if self._holder in holding.holders_of(owner, own)
        ]

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters of the model that still train."""
        frozen = set(self.frozen)
        return [
            name
            for name, _, _, tensor in tensors_of(self.model)
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and name not in frozen
        ]

    def undo(self) -> None:
        """Restore classes, modes and ``requires_grad`` as they were at the freeze, bit for bit.

        Layers another freeze still holds stay frozen until that one is undone too.
        """
        _release(self.model, self.model.modules(), {self._holder}, adopt_mode=False)

    def unfreeze(self, patterns: str | Iterable[str] = "*") -> None:
        """As :func:`unfreeze`, for this model."""
        unfreeze(self.model, patterns)

    def __enter__(self) -> Freeze:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<Freeze of {type(self.model).__name__}: {len(self.frozen)} tensors frozen>"

    def __str__(self) -> str:
        frozen = set(self.frozen)
        rows: list[tuple[str, ...]] = [("layer", "type", "frozen", "trainable", "held norms")]
        total = [0, 0, 0]
        for child_name, child in [*self.model.named_children(), ("", self.model)]:
            tensors = [
                (name, t)
                for name, owner, _, t in tensors_of(child, child_name)
                if child_name or owner is self.model
            ]
            counts = [
                sum(t.numel() for n, t in tensors if n in frozen and isinstance(t, nn.Parameter)),
                sum(t.numel() for n, t in tensors if isinstance(t, nn.Parameter) and t.requires_grad),
                sum(holding.is_held(m) and _is_norm(m) for m in child.modules()) if child_name else 0,
            ]
            if tensors and (child_name or any(counts)):
                total = [a + b for a, b in zip(total, counts, strict=True)]
                rows.append((child_name or "(own)", type(child).__name__, *(f"{n:,}" for n in counts)))
        rows.append(("total", type(self.model).__name__, *(f"{n:,}" for n in total)))
        widths = [max(len(row[k]) for row in rows) for k in range(5)]
        lines = [
            "  ".join(
                cell.ljust(w) if k < 2 else cell.rjust(w)
                for k, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        rule = f"\nrule: {self.selection.rule}" if self.selection else ""
        return "\n".join(line.rstrip() for line in lines) + rule


def freeze_backbone(model: nn.Module, *, head: Names | None = None, backbone: Names | None = None) -> Freeze:
    """Freeze a model's backbone, so that only its head trains.

    Everything in the backbone keeps its value and behaves as in eval mode, whatever ``model.train()`` or an
    optimizer does: parameters and running statistics stay bit-identical, dropout is off, and no gradient is
    computed for its parameters. No module or parameter object is replaced, and ``state_dict()`` keeps its
    keys and values.

    Args:
        model: the model; found out by itself for every ``torchvision.models`` classification model.
        head: what is to train, if that cannot be told: names (``"classifier.6"``), globs or modules.
        backbone: what is to freeze, likewise; by default everything but the head.

    Returns:
        The freeze in force; ``.undo()`` ends it.

    Raises:
        SelectionError: head or backbone cannot be told, or a name matches nothing.
        FreezekitError: something in the backbone cannot be frozen (a BN without running statistics, a lazily
            initialised or scripted module); nothing is changed then.

    >>> from collections import OrderedDict
    >>> model = nn.Sequential(OrderedDict(stem=nn.Linear(4, 8), bn=nn.BatchNorm1d(8), fc=nn.Linear(8, 2)))
    >>> handle = freeze_backbone(model)
    >>> model.train().bn.training, handle.trainable
    (False, ['fc.weight', 'fc.bias'])

    Source: PyTorch documentation, torch.nn.Module.train; batch statistics: Ioffe & Szegedy 2015, section 3.1.
    """
    selection = select_backbone(model, head, backbone)
    return _freeze(model, selection.backbone, "backbone=", selection)


def freeze(model: nn.Module, patterns: str | Iterable[str]) -> Freeze:
    """Freeze the layers and parameters that patterns name.

    A layer's name stands for everything below it. A layer is held in eval mode when all of it is frozen; a
    parameter frozen alone just stops training.

    Args:
        model: the model.
        patterns: names or globs of modules and parameters: ``"layer1"``, ``"layer[12].*"``, ``"*.bn?"``.

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
    return _freeze(model, patterns, "patterns", None)


def unfreeze(model: nn.Module, patterns: str | Iterable[str] = "*") -> None:
    """Let frozen layers train again, whichever freeze holds them.

    They get back the ``requires_grad`` they had before, and the mode that was last asked of the model.

    Args:
        model: the model.
        patterns: names or globs of frozen modules or parameters; everything by default.

    Raises:
        SelectionError: a pattern names nothing that is frozen.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> handle = freeze(model, ["0", "1"])
    >>> unfreeze(model, "1")
    >>> is_frozen(model, "0"), is_frozen(model, "1")
    (True, False)

    Source: PyTorch documentation, torch.nn.Module.train and torch.nn.Module.requires_grad_.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    held = [name for name, module in modules.items() if name and holding.is_held(module)]
    tensors = {
        name: (owner, own) for name, owner, own, _ in tensors_of(model) if holding.holders_of(owner, own)
    }
    if patterns == "*":  # also where nothing is frozen
        _release(model, modules.values(), None, adopt_mode=True)
        return
    chosen = select(patterns, [*held, *tensors], where="patterns", kind="frozen layer or parameter")
    for name in chosen:
        if name in tensors:
            owner, own = tensors[name]
            holding.release_tensor(owner, own, holding.holders_of(owner, own))
        # What holds something that trains is not frozen itself: let the modules above follow train() again.
        path = name if name in modules else name.rpartition(".")[0]
        while True:
            holding.release_module(modules[path], holding.holders_of(modules[path]), adopt_mode=True)
            if not path:
                break
            path = path.rpartition(".")[0]


def is_frozen(model: nn.Module, name: str) -> bool:
    """Tell whether freezekit has frozen the layer, parameter or buffer called ``name``.

    Args:
        model: the model.
        name: dotted name of a module, parameter or buffer; ``""`` is the model itself.

    Raises:
        SelectionError: the model has nothing of that name.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    >>> handle = freeze(model, "1")
    >>> is_frozen(model, "1.running_mean"), is_frozen(model, "0")
    (True, False)
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name in modules:
        return holding.is_held(modules[name])
    for full, owner, own, _ in tensors_of(model):
        if full == name:
            return bool(holding.holders_of(owner, own))
    select([name], [*(n for n in modules if n), *(n for n, *_ in tensors_of(model))], where="name")
    raise SelectionError(
        "a glob names more than one thing", where="name", got=repr(name), remedy="give one name"
    )


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that train, for the optimizer.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> handle = freeze(model, "0")
    >>> [tuple(p.shape) for p in trainable_parameters(model)]
    [(2, 4), (2,)]
    """
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _freeze(
    model: nn.Module, patterns: str | Iterable[str], where: str, selection: Selection | None
) -> Freeze:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise FreezekitError(
            "DistributedDataParallel waits for a gradient of every parameter that had one when it was made",
            where="model",
            got="a model wrapped already",
            remedy="freeze the model first, then wrap it",
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = list(tensors_of(model))
    names = [*(name for name in modules if name), *(name for name, *_ in tensors)]
    chosen = set(select(patterns, list(dict.fromkeys(names)), where=where, kind="layer or parameter"))
    held = _whole_modules(model, chosen)
    frozen = [(name, owner, own, t) for name, owner, own, t in tensors if name in chosen or id(owner) in held]
    _refuse_impossible(modules, held)
    if selection is not None:
        _refuse_shared(frozen, tensors)
    else:
        _refuse_lone_buffers(frozen, held)
    handle = Freeze(model, secrets.token_hex(8), selection)
    try:
        for _, owner, own, _ in frozen:
            holding.freeze_tensor(owner, own, handle._holder)
        for module in held.values():
            holding.hold_module(module, handle._holder)
    except BaseException:
        handle.undo()  # all or nothing
        raise
    return handle


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


def _refuse_impossible(modules: dict[str, nn.Module], held: dict[int, nn.Module]) -> None:
    for name, module in modules.items():
        if id(module) not in held:
            continue
        kind = type(module).__name__
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise FreezekitError(
                "a BN layer without running statistics normalises by the batch even in eval mode, so it "
                "cannot be frozen",
                where=name,
                got=f"{kind}(track_running_stats=False)",
                remedy="leave it out, or give it statistics (track_running_stats=True) and calibrate them",
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise FreezekitError(
                "a scripted module has its mode compiled in and cannot be held in eval mode",
                where=name,
                got=kind,
                remedy="freeze the model before torch.jit.script, or leave this layer out",
            )
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise FreezekitError(
                "a lazily initialised layer has no values to freeze yet",
                where=name,
                got=kind,
                remedy="run one batch through the model first",
            )


def _refuse_shared(
    frozen: list[tuple[str, nn.Module, str, Tensor]], tensors: list[tuple[str, nn.Module, str, Tensor]]
) -> None:
    frozen_names, by_id = {name for name, *_ in frozen}, {id(t): name for name, _, _, t in frozen}
    for name, _, _, tensor in tensors:
        if name not in frozen_names and id(tensor) in by_id:
            raise SelectionError(
                "backbone and head share a parameter: it cannot be frozen in one and train in the other",
                where="model",
                got=f"{by_id[id(tensor)]} is {name}",
                remedy="decide with freezekit.freeze(model, [...]), which freezes the parameter everywhere",
            )


def _refuse_lone_buffers(
    frozen: list[tuple[str, nn.Module, str, Tensor]], held: dict[int, nn.Module]
) -> None:
    for name, owner, own, _ in frozen:
        if own in owner._buffers and id(owner) not in held:
            raise SelectionError(
                "a buffer moves with its layer and cannot be frozen without it",
                where="patterns",
                got=repr(name),
                remedy=f"name the layer, {name.rpartition('.')[0]!r}, or both it and its parameters",
            )


def _release(
    model: nn.Module, modules: Iterable[nn.Module], holders: set[str] | None, *, adopt_mode: bool
) -> None:
    for module in modules:
        for own in (*module._parameters, *module._buffers):
            leaving = holding.holders_of(module, own) if holders is None else holders
            holding.release_tensor(module, own, leaving)
        leaving = holding.holders_of(module) if holders is None else holders
        holding.release_module(module, leaving, adopt_mode=adopt_mode)


def _is_norm(module: nn.Module) -> bool:
    return hasattr(module, "running_mean")
