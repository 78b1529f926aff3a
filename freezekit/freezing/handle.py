"""The handle of a freeze in force, and what can be asked of a model about freezing."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from freezekit.errors import SelectionError
from freezekit.freezing import holding, optim
from freezekit.freezing.distributed import changes_told, reshard
from freezekit.freezing.folding import describe
from freezekit.freezing.groups import orphans_of
from freezekit.freezing.release import release_all, unfreeze
from freezekit.freezing.selection import Selection, names_of, require_module, size_of, tensors_of
from freezekit.patterns import select

if TYPE_CHECKING:
    from freezekit.manifest import Manifest

__all__ = ["Choices", "Freeze", "is_frozen", "trainable_parameters"]


class Choices(NamedTuple):
    """What a freeze does with BN, by what it is computed, and what it keeps in eval mode."""

    bn: str = "freeze"
    convert: str | None = None
    hold: str = "all"


class Freeze:
    """A freeze in force: what it covers, and how to end it.

    Returned by :func:`freeze_backbone` and :func:`freeze`. ``str()`` of it is a table. As a context manager
    it undoes itself at the end of the block.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> from freezekit import freeze
    >>> with freeze(model, ["0", "1"]) as handle:
    ...     handle.trainable
    ['2.weight', '2.bias']
    >>> model[1].training, model[1].weight.requires_grad
    (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        holder: str,
        selection: Selection | None,
        names: tuple[str, ...],
        choices: Choices,
        kept: dict[str, str] | None = None,
        optimizers: Sequence[Any] = (),
    ) -> None:
        self.model = model
        self.selection = selection
        """Which part was taken for backbone and head and why; ``None`` for :func:`freeze`."""
        self.names = names
        """What was to be frozen: the backbone, or what :func:`freeze` was given, by name."""
        self.choices = choices
        """The ``bn=``, ``convert=`` and ``hold=`` that were given."""
        self._holder = holder
        self._kept = kept
        self._optimizers = [weakref.ref(optim.root_of(each)) for each in optimizers]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizers": []}  # a copy is of another model

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
    def orphans(self) -> list[str]:
        """Names of the parameters that train but that no optimizer given as ``optimizer=`` has."""
        return orphans_of(self.model, [o for ref in self._optimizers if (o := ref()) is not None])

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

    def manifest(self) -> Manifest:
        """Return what this freeze holds now, with a digest of every tensor, to be saved with a checkpoint.

        Of a sharded model every rank has to call it, as each tensor is gathered for its digest: all get the
        manifest that the model in one piece has.

        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> from freezekit import freeze
        >>> print(freeze(model, ["0", "1"]).manifest())
        manifest of a Sequential: 7 tensors and 2 layers frozen
        """
        from freezekit.freezing.manifest import make_manifest

        return make_manifest(self)

    def undo(self) -> None:
        """Restore classes, modes and ``requires_grad`` as they were at the freeze, bit for bit.

        What ``optimizer=`` took out of an optimizer is put back in its place, with its state.

        Layers another freeze still holds stay frozen until that one is undone too.

        Raises:
            FreezekitError: the class of a layer was changed meanwhile; nothing is undone then.
        """
        with changes_told(self.model):
            release_all(self.model, {self._holder}, adopt_mode=False)

    def unfreeze(
        self, patterns: str | Iterable[str] = "*", *, optimizer: Any = None, lr: float | None = None
    ) -> None:
        """As :func:`unfreeze`, for this model."""
        unfreeze(self.model, patterns, optimizer=optimizer, lr=lr)

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
                sum(size_of(t) for n, t in tensors if n in frozen and isinstance(t, nn.Parameter)),
                sum(size_of(t) for n, t in tensors if isinstance(t, nn.Parameter) and t.requires_grad),
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
        if orphans := self.orphans:
            lines.append(f"in no group of the optimizer: {', '.join(orphans)}")
        lines += [] if self._kept is None else describe(self.kernels, self.unfolded)
        return "\n".join(line.rstrip() for line in lines)


def is_frozen(model: nn.Module, name: str) -> bool:
    """Tell whether freezekit has frozen the layer, parameter or buffer called ``name``.

    Args:
        model: the model.
        name: dotted name of a module, parameter or buffer; ``""`` is the model itself.

    Raises:
        SelectionError: the model has nothing of that name.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    >>> from freezekit import freeze
    >>> handle = freeze(model, "1")
    >>> is_frozen(model, "1.running_mean"), is_frozen(model, "0")
    (True, False)
    """
    require_module(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    if name in modules:
        inside = [holding.holders_of(owner, own) for _, owner, own, _ in tensors_of(modules[name])]
        return holding.is_held(modules[name]) or (bool(inside) and all(inside))
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
    >>> from freezekit import freeze
    >>> handle = freeze(model, "0")
    >>> [tuple(p.shape) for p in trainable_parameters(model)]
    [(2, 4), (2,)]
    """
    require_module(model)
    reshard(model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _is_norm(module: nn.Module) -> bool:
    return hasattr(module, "running_mean")
