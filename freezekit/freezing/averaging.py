"""Averaging around what is frozen: recalibrated statistics, and averaged weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import swa_utils

from freezekit.errors import FreezekitError
from freezekit.freezing import holding
from freezekit.freezing.selection import require_module, tensors_of
from freezekit.nn.held import Held

__all__ = ["AveragedModel", "update_bn"]


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: nn.Module, device: int | torch.device | None = None) -> None:
    """Recalibrate the BN layers that are not frozen, as ``torch.optim.swa_utils.update_bn`` does.

    Their running statistics become the plain averages over the batches of one pass, in train mode. On a
    model with nothing frozen they have the bits that torch's function gives. Nothing else changes: every
    other buffer (a running statistic of InstanceNorm, a vector of spectral norm), the mode of every layer
    and every momentum are afterwards what they were. A BN layer that no batch reaches, or that the model's
    own ``train()`` leaves in eval mode, keeps its statistics.

    Frozen means frozen by freezekit: ``requires_grad=False`` or eval mode alone says nothing about
    statistics. As with torch's function, dropout that is not frozen draws random numbers.

    Args:
        loader: batches. Of a list or tuple the first element goes to the model; a mapping is given as
            keyword arguments; anything else as it is.
        model: the model.
        device: where to move the batches first, if anywhere.

    Raises:
        FreezekitError: the loader gave no batch. Then, and if the loader or the model raises, statistics,
            momenta and modes are what they were before.

    >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    >>> from freezekit import freeze
    >>> handle = freeze(model, "0")
    >>> update_bn([torch.full((3, 2), 4.0)], model)
    >>> model[0].running_mean, model[1].running_mean.round(decimals=3)
    (tensor([0., 0.]), tensor([4., 4.]))

    Source: PyTorch documentation, torch.optim.swa_utils.update_bn; Izmailov et al. 2018, arXiv:1803.05407,
    section 3.2.
    """
    require_module(model)
    modules = list(model.modules())
    with _modes_kept(modules):
        model.train()
        live = [m for m in modules if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
        if not live:
            return
        with _buffers_kept(modules, live), _cumulative(live):
            empty = True
            for batch in loader:
                empty = False
                _run(model, batch, device)
            if empty:
                raise FreezekitError(
                    "the loader gave no batch, so there is nothing to take statistics from",
                    where="loader",
                    got=type(loader).__name__,
                    remedy="give one that has batches; a generator that was read already has none left",
                )


def _run(model: nn.Module, batch: Any, device: int | torch.device | None) -> None:
    if isinstance(batch, (list, tuple)):
        batch = batch[0]
    if isinstance(batch, Mapping):
        named = {k: v.to(device) if device is not None and hasattr(v, "to") else v for k, v in batch.items()}
        model(**named)
    else:
        model(batch if device is None else batch.to(device))


@contextmanager
def _modes_kept(modules: list[nn.Module]) -> Iterator[None]:
    # A held layer is always in eval mode; what must come back is the mode it will take up when unfrozen.
    modes = [m.__dict__.get("_asked_training") if isinstance(m, Held) else m.training for m in modules]
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            if mode is None:
                module.__dict__.pop("_asked_training", None)
            else:
                module.training = mode


@contextmanager
def _buffers_kept(modules: list[nn.Module], live: list[_BatchNorm]) -> Iterator[None]:
    """Put every buffer back at the end, but those of a BN layer that has counted a batch by then."""
    saved = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
        and not is_lazy(buffer)
        and not buffer.is_meta
        and buffer.layout is torch.strided
    ]
    moved: set[nn.Module] = set()
    try:
        yield
        moved = {m for m in live if m.num_batches_tracked is not None and m.num_batches_tracked > 0}
    finally:
        for module, name, buffer, value in saved:
            if module in moved:
                continue
            module._buffers[name] = buffer  # some layers put a new tensor in place of the old
            if buffer.shape != value.shape:  # observers resize theirs at the first batch
                buffer.resize_(value.shape)
            if not bool(((buffer == value) | ((buffer != buffer) & (value != value))).all()):
                buffer.copy_(value)


@contextmanager
def _cumulative(layers: list[_BatchNorm]) -> Iterator[None]:
    """Start the layers' statistics anew, as the average over the batches from here on."""
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


class AveragedModel(swa_utils.AveragedModel):
    """torch's ``AveragedModel`` (SWA, EMA), in which what is frozen is copied and never averaged.

    The average of a constant with itself should be that constant, but ``decay * a + (1 - decay) * a`` is
    not, to the last bit; over a run it drifts. Here only what is not frozen in the model is handed to torch's
    averaging. A parameter that merely has ``requires_grad=False`` is left alone for as long as it equals its
    average, and averaged if it has moved.

    The copy of a frozen layer is frozen too, so make the average after freezing, also on resume: a copy made
    before is averaged as it should be, but ``update_bn`` takes its layers for live ones. A layer that is
    unfrozen in the model is averaged from then on; its copy takes part in ``update_bn`` again after
    ``freezekit.unfreeze(averaged.module, ...)``.

    Args:
        model: the model to copy.
        device: where the copy is kept; by default where the model is.
        avg_fn: gives the new average of one tensor from the average, the model's tensor and the count.
        multi_avg_fn: the same in place, for lists of tensors. With neither, the mean of all updates (SWA).
        use_buffers: whether buffers are averaged too; otherwise they are copied.

    Raises:
        AssertionError: both functions are given.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> from freezekit import freeze
    >>> handle = freeze(model, "0")
    >>> averaged = AveragedModel(model, avg_fn=lambda average, new, n: 0.9 * average + 0.1 * new)
    >>> for _ in range(100):
    ...     averaged.update_parameters(model)
    >>> torch.equal(averaged.module[0].weight, model[0].weight)
    True

    Source: PyTorch documentation, torch.optim.swa_utils.AveragedModel.
    """

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Copy what is frozen in ``model``, and average the rest in.

        Args:
            model: the model that was copied, wrapped or not.

        Raises:
            FreezekitError: it has more or fewer parameters or buffers than the copy.
        """
        frozen = {
            id(t)
            for _, owner, own, t in tensors_of(model)
            if holding.holders_of(owner, own) or (own in owner._buffers and holding.is_held(owner))
        }
        # Two modules with nothing but what is left to average, in torch's order.
        mine, theirs = nn.Module(), nn.Module()
        for name, average, new in _pairs(self.module, model):
            if id(new) in frozen:
                average.copy_(new)
            elif not isinstance(new, nn.Parameter):
                mine.register_buffer(name, average)
                theirs.register_buffer(name, new)
            elif new.requires_grad or not torch.equal(average, new.to(average.device)):
                mine.register_parameter(name, average)  # type: ignore[arg-type]  # as in the model it copies
                theirs.register_parameter(name, new)
        # In a stand-in that shares all but the module: a thread that uses this one meanwhile finds it whole.
        rest = copy.copy(self)
        rest._modules = {"module": mine}
        if mine._parameters or mine._buffers:
            super(AveragedModel, rest).update_parameters(theirs)
        else:  # torch fails on an empty list
            self.n_averaged += 1


def _pairs(averaged: nn.Module, model: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """Pair the tensors by their order, as torch does: a wrapper has put other names on them."""
    pairs = []
    for kind in ("parameters", "buffers"):
        averages, news = list(getattr(averaged, kind)()), list(getattr(model, kind)())
        if len(averages) != len(news):
            raise FreezekitError(
                f"the model has other {kind} than the copy that is averaged",
                where="model",
                got=f"{len(news)} {kind}, where the copy has {len(averages)}",
                remedy="give the model that was copied, or copy this one: AveragedModel(model)",
            )
        pairs += [
            (f"{kind}{k}", average, new) for k, (average, new) in enumerate(zip(averages, news, strict=True))
        ]
    return pairs
