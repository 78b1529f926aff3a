"""Tensors of the frozen part that something else can reach: memory shared, broadcast, or not there yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from freezekit.audit.findings import Finding
from freezekit.audit.live.region import Region

__all__ = ["grouped", "plural", "tensor_risks"]


def grouped(names: Collection[str], among: Iterable[str]) -> dict[str, list[str]]:
    """Return the names by the largest module that holds no other of those they are among.

    >>> grouped(["a.0.weight", "a.1.weight", "b.bias"], ["a.0.weight", "a.1.weight", "b.weight", "b.bias"])
    {'a': ['a.0.weight', 'a.1.weight'], 'b.bias': ['b.bias']}
    """
    chosen = set(names)
    others = {above for name in among if name not in chosen for above in _above(name)}
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(next((a for a in _above(name) if a not in others), name), []).append(name)
    return found


def _above(name: str) -> Iterator[str]:
    """Yield ``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)
    yield name


def plural(count: int, what: str) -> str:
    """Return ``1 parameter`` or ``2 parameters``.

    >>> plural(2, "parameter")
    '2 parameters'
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def tensor_risks(region: Region, optimizers: list[Any]) -> Iterator[Finding]:
    """Yield what will happen to tensors of the frozen part from outside their layers."""
    tensors = {
        name: tensor for name, place in region.places.items() if (tensor := place.tensor()) is not None
    }
    members = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    yield from _not_frozen(region, tensors, members if optimizers else None)
    yield from _without_values(region, tensors)
    yield from _shared(region, tensors, members if optimizers else None)
    yield from _broadcast(region, tensors)


def _not_frozen(region: Region, tensors: dict[str, Tensor], members: set[int] | None) -> Iterator[Finding]:
    names = [n for n, t in tensors.items() if t.requires_grad and (members is None or id(t) in members)]
    for name, those in grouped(names, region.known).items():
        count = plural(len(those), "tensor")
        given = (
            ""
            if members is None
            else " and is in an optimizer"
            if len(those) == 1
            else " and are in an optimizer"
        )
        verb = "requires" if len(those) == 1 else "require"
        message = f"{count} named in frozen= still {verb} a gradient{given}, which moves what it has one for"
        call = f"freezekit.freeze(model, {name!r}{'' if members is None else ', optimizer=optimizer'})"
        yield Finding("FK311", name, message, call)


def _without_values(region: Region, tensors: dict[str, Tensor]) -> Iterator[Finding]:
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    for name, those in grouped(lazy, region.known).items():
        message = f"{plural(len(those), 'tensor')} without a shape yet: the first batch makes the values"
        yield Finding("FK318", name, message, "model.eval()(batch) once, then freeze")
    meta = [name for name, tensor in tensors.items() if not is_lazy(tensor) and tensor.is_meta]
    for name, those in grouped(meta, region.known).items():
        message = f"{plural(len(those), 'tensor')} on the meta device: whatever gives them values comes later"
        fix = "model.to_empty(device='cpu') and model.load_state_dict(...), then freeze"
        yield Finding("FK318", name, message, fix)


def _shared(region: Region, tensors: dict[str, Tensor], members: set[int] | None) -> Iterator[Finding]:
    mine = {id(tensor) for tensor in tensors.values()}
    trained: dict[Any, list[tuple[int, int, str]]] = defaultdict(list)
    for name, parameter in region.model.named_parameters():
        if not parameter.requires_grad or id(parameter) in mine:
            continue
        if (members is None or id(parameter) in members) and (lies := _memory(parameter)) is not None:
            trained[lies[0]].append((*lies[1:], name))
    for name, tensor in tensors.items():
        if trained and (lies := _memory(tensor)) is not None:
            storage, start, end = lies
            with_ = [other for low, high, other in trained[storage] if low < end and start < high]
            if with_:
                message = f"shares its memory with {with_[0]}, which trains: a step moves both"
                owner, _, key = name.rpartition(".")
                where = f"model.get_submodule({owner!r})" if owner else "model"
                cut = f"{where}.{key}.data = {where}.{key}.data.clone()"
                yield Finding(
                    "FK310", name, message, f"{cut}, or freeze both: freezekit.freeze(model, {with_[0]!r})"
                )


def _memory(tensor: Tensor) -> tuple[Any, int, int] | None:
    """Return the storage that a tensor lies in, and from which byte to which."""
    try:
        storage, start = tensor.untyped_storage().data_ptr(), tensor.data_ptr()
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        if not storage or not tensor.numel():
            return None
        return (tensor.device, storage), start, start + (last + 1) * tensor.element_size()
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, fake or not there yet
        return None


def _broadcast(region: Region, tensors: dict[str, Tensor]) -> Iterator[Finding]:
    buffers = {id(t): name for name, t in tensors.items() if not isinstance(t, nn.Parameter)}
    for name, module in region.model.named_modules():
        if not isinstance(module, DistributedDataParallel) or not module.broadcast_buffers:
            continue
        sent = [buffers[id(b)] for b in module.modules_buffers if id(b) in buffers]
        if sent and module.process_group.size() > 1:
            message = (
                f"each forward overwrites {plural(len(sent), 'frozen buffer')} with those of rank 0 "
                f"({sent[0]}{', ...' if len(sent) > 1 else ''}): they move where a rank has others"
            )
            where = f"model.get_submodule({name!r})" if name else "model"
            yield Finding("FK317", name or "module", message, f"{where}.broadcast_buffers = False")
