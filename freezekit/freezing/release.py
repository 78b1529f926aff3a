"""Releasing: how frozen layers and parameters are let go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from freezekit.errors import FreezekitError, SelectionError
from freezekit.freezing import holding, optim
from freezekit.freezing.distributed import changes_told, reshard
from freezekit.freezing.groups import check_number, extend, new_group, outsiders
from freezekit.freezing.selection import names_of, require_module, tensors_of
from freezekit.patterns import select

__all__ = ["frozen_among", "parameters_of", "release_all", "unfreeze"]


def unfreeze(
    model: nn.Module,
    patterns: str | Iterable[str] = "*",
    *,
    optimizer: Any = None,
    lr: float | None = None,
) -> None:
    """Let frozen layers train again, whichever freeze holds them.

    They get back the ``requires_grad`` they had before, and the mode that was last asked of the model. What
    ``optimizer=`` took out of an optimizer at the freeze goes back to its place there, with its state.

    ``DistributedDataParallel`` learns what to synchronise when it wraps the model. One that was there before
    raises at its next forward pass, unless without gradients: wrap the model anew, on every rank. With
    ``fully_shard`` there is nothing to do.

    Args:
        model: the model.
        patterns: names or globs of frozen modules or parameters; everything by default.
        optimizer: where what is unfrozen and has no place in it goes: into one new group, made like the
            first of its groups that has parameters. An optimizer with a learning-rate scheduler is refused,
            since most fail on a group added later, or leave it out: see :class:`UnfreezeSchedule`.
        lr: the learning rate of the new group; by default that of the group it is made like.

    Raises:
        SelectionError: a pattern names nothing that is frozen.
        FreezekitError: the optimizer cannot take a group; nothing is changed then.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> from freezekit import freeze, is_frozen
    >>> handle = freeze(model, ["0", "1"])
    >>> unfreeze(model, "1")
    >>> is_frozen(model, "0"), is_frozen(model, "1")
    (True, False)

    Source: PyTorch documentation, torch.nn.Module.train, torch.nn.Module.requires_grad_ and
    torch.optim.Optimizer.add_param_group.
    """
    require_module(model)
    optimizer = optim.check_optimizer(optimizer)
    patterns = list(patterns) if isinstance(patterns, Iterator) else patterns  # read twice below
    reshard(model)
    new = _newcomers(model, patterns, optimizer, lr)
    group = new_group(optimizer, lr) if new else None
    with changes_told(model):
        _release(model, patterns)
    if group is not None:
        extend(group, [(name, parameter) for name, parameter in new if parameter.requires_grad])
        if group["params"]:
            optimizer.add_param_group(group)


def _newcomers(
    model: nn.Module, patterns: str | Iterable[str], optimizer: Any, lr: float | None
) -> list[tuple[str, Tensor]]:
    """Return what will be released and has no place in the optimizer."""
    if lr is not None:
        check_number(lr, "lr=")
    frozen = frozen_among(model, patterns) if optimizer is not None else []
    new = [] if optimizer is None else outsiders([optimizer], parameters_of(model, frozen))
    if lr is not None and not new:
        raise FreezekitError(
            "there will be no new group whose learning rate this could be",
            where="lr=",
            got=repr(lr),
            remedy="give optimizer= too"
            if optimizer is None
            else "leave it out: what is unfrozen goes back to the group it came from",
        )
    return new


def frozen_among(model: nn.Module, patterns: str | Iterable[str], where: str = "patterns") -> list[str]:
    """Return the names of frozen modules and tensors that patterns match, and of all below them.

    Raises:
        SelectionError: a pattern names nothing that is frozen.
    """
    held = [n for n, m in model.named_modules(remove_duplicate=False) if n and holding.is_held(m)]
    tensors = [name for name, owner, own, _ in tensors_of(model) if holding.holders_of(owner, own)]
    if patterns == "*":  # also where nothing is frozen
        return [*held, *tensors]
    if not held and not tensors:
        raise SelectionError("nothing in the model is frozen", where=where, got=repr(patterns))
    try:
        return select(patterns, [*held, *tensors], where=where, kind="frozen layer or parameter")
    except SelectionError as error:
        try:
            select(patterns, names_of(model), where=where)
        except SelectionError:
            raise error from None  # there is nothing of that name, frozen or not
        remedy = "leave it out: it is in the model, but nothing of it is frozen"
        raise SelectionError(error.what, where=where, got=error.got, remedy=remedy) from None


def parameters_of(model: nn.Module, names: Iterable[str]) -> list[tuple[str, Tensor]]:
    """Return the parameters among the names, each with its name."""
    wanted = set(names)
    return [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if n in wanted]


def _release(model: nn.Module, patterns: str | Iterable[str]) -> None:
    if patterns == "*":  # also where nothing is frozen
        release_all(model, None, adopt_mode=True)
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = {
        name: (owner, own, t) for name, owner, own, t in tensors_of(model) if holding.holders_of(owner, own)
    }
    chosen = frozen_among(model, patterns)
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
    owners = {id(tensors[name][0]) for name in released}
    named = {id(modules[name]) for name in chosen if name in modules}
    for module in {id(modules[path]): modules[path] for path in above}.values():
        if holding.is_batchnorm(module) and id(module) not in owners | named:
            continue  # only something inside trains, such as dropout: in train mode it would use the batch
        if holding.is_held(module):
            holding.release_module(module, holding.holders_of(module), adopt_mode=True)
            # The buffers beside a parameter that trains move with it; those further up stay where they are.
            for own in module._buffers if id(module) in owners else ():
                holding.release_tensor(module, own, holding.holders_of(module, own))
            holding.pin_buffers(module)
    optim.put_back(model)


def release_all(model: nn.Module, holders: set[str] | None, *, adopt_mode: bool) -> None:
    """Let go of everything that ``holders`` hold, or that anyone does (``None``)."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if holders is None or holding.holders_of(module) == holders or holding.is_pinned(module):
            holding.check_release(module, name)
    for module in modules.values():
        for own in holding.tensors_held(module):
            leaving = holding.holders_of(module, own) if holders is None else holders
            holding.release_tensor(module, own, leaving)
        leaving = holding.holders_of(module) if holders is None else holders
        holding.release_module(module, leaving, adopt_mode=adopt_mode)
    ids = {id(module) for module in modules.values()}
    for module in modules.values():
        holding.end_lone_pair(module, ids)
    optim.put_back(model)
