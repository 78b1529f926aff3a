"""Risks: what will go wrong with a frozen part, told before training starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from freezekit.audit.findings import Finding
from freezekit.audit.live.layers import layer_risks
from freezekit.audit.live.members import member_risks, optimizers_of
from freezekit.audit.live.region import Region
from freezekit.audit.live.sharing import tensor_risks
from freezekit.errors import FreezekitError

__all__ = ["check"]


def check(
    model: nn.Module, optimizer: Any = None, frozen: str | Iterable[str] | None = None
) -> list[Finding]:
    """Look at a model before it is trained, and say what will move or change its frozen part.

    Nothing is run and nothing is changed: modes, tensors, random state and hooks stay as they are.

    Args:
        model: a model of which a part is frozen, by whatever means.
        optimizer: the optimizer that will train it, or a list of them; without one, what an optimizer could
            do is left out.
        frozen: names or globs of what is meant to be frozen; by default what does not require a gradient,
            with the buffers beside it.

    Returns:
        What was found (FK3xx), errors before warnings, each with its fix; ``freezekit explain FK301``
        says more. An error happens in the next steps of training, a warning may. An empty list means that
        nothing was found, not that nothing can happen: :class:`freezekit.DriftAuditor` watches.

    Raises:
        FreezekitError: nothing is frozen, something given is no model or no optimizer, or part of the model
            is scripted.
        SelectionError: a pattern in ``frozen`` matches nothing.

    >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> _ = model[0].requires_grad_(False)
    >>> for finding in check(model):
    ...     print(finding)
    ...     print(finding.fix)
    FK301 0: BatchNorm1d in train mode: the next forward moves its running statistics
    freezekit.freeze(model, '0')

    Source: ``freezekit explain`` names one for each code.
    """
    if not isinstance(model, nn.Module):
        raise FreezekitError(
            "not a model", where="model", got=type(model).__name__, remedy="give a torch.nn.Module"
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise FreezekitError(
                "a scripted module cannot be looked into",
                where=name or "model",
                got=type(module).__name__,
                remedy="check the model before it is scripted or traced",
            )
    optimizers = optimizers_of(optimizer)
    region = Region(model, frozen)
    found = [
        *layer_risks(region),
        *tensor_risks(region, optimizers),
        *member_risks(region, optimizers),
    ]
    return sorted(found, key=lambda finding: finding.level != "error")
