"""Freezing and unfreezing: the calls a user makes, and the handle they return."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from torch import nn

from freezekit.errors import FreezekitError, SelectionError
from freezekit.freezing import holding
from freezekit.freezing.folding import describe, make_plan
from freezekit.freezing.refusals import refuse_impossible, refuse_lone_buffers, refuse_shared, refuse_unknown
from freezekit.freezing.selection import (
    Names,
    Selection,
    names_of,
    require_module,
    resolve,
    select_backbone,
    tensors_of,
)
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

    def __init__(
        self, model: nn.Module, holder: str, selection: Selection | None, kept: dict[str, str] | None = None
    ) -> None:
        self.model = model
        self.selection = selection
        """Which part was taken for backbone and head and why; ``None`` for :func:`freeze`."""
        self._holder = holder
        self._kept = kept

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
        tensors = tensors_of(self.model)
        return [name for name, _, _, t in tensors if isinstance(t, nn.Parameter) and t.requires_grad]

    @property
    def kernels(self) -> dict[str, str]:
        """What each BN layer this freeze holds is computed by: ``"exact"``, ``"affine"`` or ``"fold"``."""
        return {
            name: holding.kernel_of(module)
            for name, module in self.model.named_modules()
            if self._holder in holding.holders_of(module) and holding.is_batchnorm(module)
        }

    @property
    def unfolded(self) -> dict[str, str]:
        """Why those BN layers are not computed in the way that ``convert=`` asked for, by name."""
        kernels = self.kernels
        return {name: why for name, why in (self._kept or {}).items() if name in kernels}

    def undo(self) -> None:
        """Restore classes, modes and ``requires_grad`` as they were at the freeze, bit for bit.

        Layers another freeze still holds stay frozen until that one is undone too.

        Raises:
            FreezekitError: the class of a layer was changed meanwhile; nothing is undone then.
        """
        _release(self.model, {self._holder}, adopt_mode=False)

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
        lines += [f"rule: {self.selection.rule}"] if self.selection else []
        lines += [] if self._kept is None else describe(self.kernels, self.unfolded)
        return "\n".join(line.rstrip() for line in lines)


def freeze_backbone(
    model: nn.Module,
    *,
    head: Names | None = None,
    backbone: Names | None = None,
    bn: str = "freeze",
    convert: str | None = None,
) -> Freeze:
    """Freeze a model's backbone, so that only its head trains.

    Everything in the backbone keeps its value and behaves as in eval mode, whatever ``model.train()`` or an
    optimizer does: parameters and running statistics stay bit-identical, dropout is off, and no gradient is
    computed for its parameters. No module or parameter object is replaced, and ``state_dict()`` keeps its
    keys and values.

    Args:
        model: the model; found out by itself for every ``torchvision.models`` classification model.
        head: what is to train, if that cannot be told: names (``"classifier.6"``), globs or modules.
        backbone: what is to freeze, likewise; by default everything but the head.
        bn: ``"freeze"``, or ``"freeze_stats"``: gamma and beta of the BN layers keep training, if they do.
        convert: what computes the frozen BN layers. ``None``: what torch's eval mode runs, bit-identical to
            it. ``"affine"``: one scale and one shift, faster, and within rounding
            (:class:`freezekit.nn.FrozenAffine` has the tolerance). ``"fold"``: nothing at all, where the
            scale can go into the convolution or linear layer before; elsewhere affine, and ``.unfolded``
            says why. That layer then gives what BN gives, also to someone who calls it by itself: take taps
            of it, or layers out of the model, only after ``undo()``. Python's forwards are traced on a copy.

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
    if not selection.backbone:
        raise SelectionError(
            "nothing is left to freeze: the head is the whole model",
            where="head=",
            got=", ".join(selection.head[:4]),
            remedy="name a smaller head",
        )
    return _freeze(model, selection.backbone, selection, bn, convert)


def freeze(model: nn.Module, patterns: Names, *, bn: str = "freeze", convert: str | None = None) -> Freeze:
    """Freeze the layers and parameters that patterns name.

    A layer's name stands for everything below it. A layer is held in eval mode when all of it is frozen; a
    parameter frozen alone just stops training.

    Args:
        model: the model.
        patterns: names or globs of modules and parameters (``"layer1"``, ``"layer[12].*"``, ``"*.bn?"``), or
            modules of the model. A tied parameter is frozen under all its names.
        bn: as for :func:`freeze_backbone`.
        convert: as for :func:`freeze_backbone`.

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
    return _freeze(model, resolve(model, patterns, "patterns"), None, bn, convert)


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
    require_module(model)
    if patterns == "*":  # also where nothing is frozen
        _release(model, None, adopt_mode=True)
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    held = [name for name, module in modules.items() if name and holding.is_held(module)]
    tensors = {
        name: (owner, own, t) for name, owner, own, t in tensors_of(model) if holding.holders_of(owner, own)
    }
    if not held and not tensors:
        raise SelectionError("nothing in the model is frozen", where="patterns", got=repr(patterns))
    chosen = select(patterns, [*held, *tensors], where="patterns", kind="frozen layer or parameter")
    tied = {id(tensors[name][2]) for name in chosen if name in tensors}
    released = [name for name, (_, _, t) in tensors.items() if id(t) in tied]
    # What holds something that trains is not frozen itself: the modules above follow train() again.
    paths = [name if name in modules else name.rpartition(".")[0] for name in (*chosen, *released)]
    above = {path.rsplit(".", k)[0] for path in paths for k in range(path.count(".") + 1)} | {""}
    for path in above:
        holding.check_release(modules[path], path)
    for name in released:
        owner, own, _ = tensors[name]
        holding.release_tensor(owner, own, holding.holders_of(owner, own))
    for module in {id(modules[path]): modules[path] for path in above}.values():
        if holding.is_held(module):
            holding.release_module(module, holding.holders_of(module), adopt_mode=True)
            for own in module._buffers:  # which nothing keeps in place any more
                holding.release_tensor(module, own, holding.holders_of(module, own))


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
    require_module(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    if name in modules:
        return holding.is_held(modules[name])
    for full, owner, own, _ in tensors_of(model):
        if full == name:
            return bool(holding.holders_of(owner, own))
    select([name], names_of(model), where="name")
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
    model: nn.Module, names: Iterable[str], selection: Selection | None, bn: str, convert: str | None
) -> Freeze:
    refuse_unknown(bn, convert)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise FreezekitError(
            "DistributedDataParallel waits for a gradient of every parameter that had one when it was made",
            where="model",
            got="a model wrapped already",
            remedy="freeze the model first, then wrap it",
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = list(tensors_of(model))
    chosen = set(select(names, names_of(model), where="names"))
    held = _whole_modules(model, chosen)
    refuse_impossible(modules, held)
    refuse_lone_buffers(tensors, chosen, held, complement=selection is not None)
    if selection is not None:
        refuse_shared(modules, tensors, chosen)
    norms = {name: m for name, m in model.named_modules() if id(m) in held and holding.is_batchnorm(m)}
    plan = make_plan(model, norms, convert)
    train = {id(m) for m in norms.values()} if bn == "freeze_stats" else set()
    tied = {
        id(t)
        for name, owner, own, t in tensors
        if (name in chosen or id(owner) in held) and not (id(owner) in train and own in owner._parameters)
    }
    frozen = [(owner, own) for _, owner, own, t in tensors if id(t) in tied]
    handle = Freeze(model, secrets.token_hex(8), selection, None if plan is None else plan.kept)
    try:
        for owner, own in frozen:
            holding.note_tensor(owner, own, handle._holder)
        for owner, own in frozen:
            holding.stop_gradient(owner, own)
        for module in held.values():
            holding.hold_module(module, handle._holder)
        if plan is not None:
            plan.carry_out(norms)
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


def _release(model: nn.Module, holders: set[str] | None, *, adopt_mode: bool) -> None:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if holders is None or holding.holders_of(module) == holders:
            holding.check_release(module, name)
    for module in modules.values():
        for own in (*module._parameters, *module._buffers):
            leaving = holding.holders_of(module, own) if holders is None else holders
            holding.release_tensor(module, own, leaving)
        leaving = holding.holders_of(module) if holders is None else holders
        holding.release_module(module, leaving, adopt_mode=adopt_mode)
    ids = {id(module) for module in modules.values()}
    for module in modules.values():
        holding.end_lone_pair(module, ids)


def _is_norm(module: nn.Module) -> bool:
    return hasattr(module, "running_mean")
