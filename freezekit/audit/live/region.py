"""The frozen region of a model: which tensors count as frozen, whose they are, and how that was told."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from freezekit.audit.state import STATS, Role
from freezekit.errors import FreezekitError
from freezekit.patterns import select

__all__ = ["Place", "Region", "held_in", "is_norm", "layer_of", "places"]


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a model keeps a tensor; which tensor that is may change.

    Args:
        name: dotted name; a tensor in a list or dict that is an attribute is named by its position or key.
        owner: the module that has it.
        key: its name there.
        role: what it is for; ``"attribute"`` where it is neither parameter nor buffer.
        item: position or key in the list, tuple or dict that the attribute is, or ``None``.
        shards: what ``fully_shard`` has of it, or ``None``: around a forward the module holds a copy of the
            whole parameter, which is dropped again.
    """

    name: str
    owner: nn.Module
    key: str
    role: Role
    item: int | str | None = None
    shards: Any = None

    def tensor(self) -> Tensor | None:
        """Return the tensor that is there now, or ``None``."""
        owner = self.owner
        held: object
        if self.role == "parameter":
            held = held_in(owner._parameters, self.key)
            if self.shards is not None and held is getattr(self.shards, "_unsharded_param", None):
                held = self.shards.sharded_param
        elif self.role == "attribute":
            held = owner.__dict__.get(self.key)
            if self.item is not None:
                try:
                    held = held[self.item]  # type: ignore[index]
                except (KeyError, IndexError, TypeError):
                    return None
        else:
            held = held_in(owner._buffers, self.key)
        return held if isinstance(held, Tensor) else None


def held_in(book: Mapping[str, Tensor | None], key: str) -> Tensor | None:
    """Return what a module keeps under a name, or ``None``; the books of TorchScript's have no ``get``."""
    return book[key] if key in book else None  # noqa: SIM401


def places(model: nn.Module) -> dict[str, Place]:
    """Return where every tensor of a model is, by name, tied and non-persistent ones included.

    >>> list(places(nn.Linear(1, 1)))
    ['weight', 'bias']
    """
    found: dict[str, Place] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    shards = _shards(module for _, module in modules)
    for path, module in modules:
        prefix = f"{path}." if path else ""
        keeps_stats = held_in(module._buffers, "running_mean") is not None
        for key, parameter in module._parameters.items():
            if parameter is not None:
                part = shards.get((id(module), key))
                found[prefix + key] = Place(prefix + key, module, key, "parameter", shards=part)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                role: Role = key if keeps_stats and key in STATS else "buffer"
                found[prefix + key] = Place(prefix + key, module, key, role)
    registered = {id(place.tensor()) for place in found.values()}
    for path, module in modules:
        for place in _attributes(f"{path}." if path else "", module):
            if id(place.tensor()) not in registered:  # as the flat list of weights of an LSTM is
                found.setdefault(place.name, place)
    return found


def _shards(modules: Iterable[nn.Module]) -> dict[tuple[int, str], Any]:
    """Return what ``fully_shard`` keeps of each parameter, by its module and its name there."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    found = {}
    for module in modules:
        if fsdp is None or not isinstance(module, fsdp):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # the first torches
        for part in (part for group in groups if group is not None for part in group.fsdp_params):
            info = part._module_info
            found[id(info.module), info.param_name] = part
            shared = zip(info.shared_modules, info.shared_param_names, strict=True)
            found |= {(id(other), name): part for other, name in shared}
    return found


def _attributes(prefix: str, module: nn.Module) -> Iterator[Place]:
    """Yield the tensors held as plain attributes; a result kept with its graph is no state."""
    for key, value in vars(module).items():
        if f"{key}_orig" in module._parameters or f"{key}_g" in module._parameters:
            continue  # computed anew at each forward, by a hook that torch.nn.utils puts on it
        if isinstance(value, Tensor):
            items: Iterable[tuple[int | str | None, object]] = [(None, value)]
        elif key in _OF_MODULE:
            continue
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        elif isinstance(value, dict):
            items = ((k, v) for k, v in value.items() if isinstance(k, (int, str)))
        else:
            continue
        for item, tensor in items:
            if isinstance(tensor, Tensor) and tensor.grad_fn is None:
                name = f"{prefix}{key}" if item is None else f"{prefix}{key}.{item}"
                yield Place(name, module, key, "attribute", item)


_OF_MODULE = frozenset(vars(nn.Module()))
"""What every module has in its ``__dict__``: its own books."""


class Region:
    """The frozen part of a model, as it is when this is made.

    Args:
        model: the model.
        frozen: names or globs of the frozen layers and tensors; by default what does not require a gradient,
            with the buffers beside it.
        norm: only the norm layers.
        empty: nothing need be frozen.

    Raises:
        FreezekitError: nothing is frozen.
        SelectionError: a pattern in ``frozen`` matches nothing.

    >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> _ = model[0].requires_grad_(False)
    >>> list(Region(model).places)
    ['0.weight', '0.bias', '0.running_mean', '0.running_var', '0.num_batches_tracked']
    """

    def __init__(
        self,
        model: nn.Module,
        frozen: str | Iterable[str] | None = None,
        *,
        norm: bool = False,
        empty: bool = False,
    ) -> None:
        self.model = model
        everything = places(model)
        self.inferred = frozen is None
        """Whether what is frozen was told by ``requires_grad``."""
        self.scope = "what does not require a gradient" if self.inferred else "as given"
        """How that was told, in words."""
        self.notes: tuple[str, ...] = ()
        """What could not be told."""
        if frozen is not None:
            names = select(frozen, list(everything), where="frozen=", kind="layer or tensor")
        else:
            names, self.notes = _inferred(model, everything)
        if norm:
            names = [name for name in names if is_norm(everything[name].owner)]
            self.scope += ", norm layers only"
        if not names and not empty:
            raise FreezekitError(
                "no norm layer in the model is frozen"
                if norm
                else "nothing in the model is frozen: every parameter requires a gradient",
                where="model",
                got=type(model).__name__,
                remedy="watch='all'"
                if norm
                else "freezekit.freeze_backbone(model) first, or say what must not move: frozen=[...]",
            )
        self.places = {name: everything[name] for name in names}
        """Where the frozen tensors are, by name."""
        self.known = frozenset(everything)
        """Names of all tensors that the model had."""
        loose = {layer_of(everything[name]) for name in self.known.difference(names)}
        self.layers = {layer_of(place) for place in self.places.values()} - loose
        """Names of the layers that are frozen whole, to which nothing may be added."""

    @property
    def roots(self) -> dict[str, nn.Module]:
        """The largest modules whose every tensor is frozen, by name, in the model's order."""
        loose = [name for name in self.known if name not in self.places]
        open_ = {"", *(name.rsplit(".", k)[0] for name in loose for k in range(1, name.count(".") + 1))}
        open_ -= set() if loose else {""}
        found: dict[str, nn.Module] = {}
        holds = {name.rsplit(".", k)[0] for name in self.places for k in range(1, name.count(".") + 1)} | {""}
        for path, module in self.model.named_modules():
            above = [path.rsplit(".", k)[0] for k in range(1, path.count(".") + 1)] + ([""] if path else [])
            if path in holds and path not in open_ and not any(parent in found for parent in above):
                found[path] = module
        return found


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm layer, of whichever library."""
    return (
        isinstance(module, _NormBase)
        or held_in(module._buffers, "running_mean") is not None
        or any("Norm" in kind.__name__ for kind in type(module).__mro__ if kind is not nn.Module)
    )


def layer_of(place: Place) -> str:
    """Return the name of the module that has the tensor."""
    own = place.key if place.item is None else f"{place.key}.{place.item}"
    return place.name.removesuffix(own).rstrip(".")


def _inferred(model: nn.Module, everything: dict[str, Place]) -> tuple[list[str], tuple[str, ...]]:
    """Return the names of what does not require a gradient, with the buffers beside it, and a note."""
    modules = dict(model.named_modules(remove_duplicate=False))
    asks: dict[str, set[bool]] = defaultdict(set)
    for path, module in modules.items():
        own = {p.requires_grad for p in module._parameters.values() if p is not None}
        for above in _with_those_above(path) if own else ():
            asks[above] |= own
    layers = {path: _is_frozen(path, modules, asks) for path in modules}
    names, unclear = [], []
    for name, place in everything.items():
        of_frozen_layer = layers[layer_of(place)]
        tensor = place.tensor()
        frozen = of_frozen_layer
        if place.role == "parameter":
            frozen = tensor is not None and not tensor.requires_grad
        elif tensor is not None and tensor.requires_grad:
            frozen = False
        if frozen:
            names.append(name)
        elif frozen is None:
            unclear.append(name)
    if unclear and names:
        shown = ", ".join(unclear[:3]) + (", ..." if len(unclear) > 3 else "")
        note = f"not watched, as frozen and trained parts surround them: {shown}; name them in frozen="
        return names, (note,)
    return names, ()


def _with_those_above(path: str) -> Iterator[str]:
    """Yield ``a.b``, ``a`` and ``""`` for ``a.b``."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def _is_frozen(path: str, modules: dict[str, nn.Module], asks: dict[str, set[bool]]) -> bool | None:
    """Tell whether a module's buffers count as frozen; ``None`` if that cannot be told.

    Args:
        path: the module's name.
        modules: all of them, by name.
        asks: what ``requires_grad`` the parameters in each have; made once, as a search for every module
            took minutes on a model of 10,000 layers.
    """
    module = modules[path]
    if isinstance(getattr(type(module), "training", None), property):
        return True  # a class that keeps itself in one mode, as ours do when frozen
    if own := [p.requires_grad for p in module._parameters.values() if p is not None]:
        return not any(own)
    while True:  # without parameters of its own it goes with what is beside it
        path = path.rpartition(".")[0]
        if beside := asks.get(path):
            return None if len(beside) > 1 else beside == {False}
        if not path:
            return False
