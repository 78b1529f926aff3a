"""The plain loop's hooks for a loop with an Accelerator."""

from __future__ import annotations

from typing import Any

from freezekit.errors import FreezekitError
from freezekit.hooks import loop

try:
    from accelerate.utils import extract_model_from_parallel
except ModuleNotFoundError as error:
    raise FreezekitError(
        "accelerate is not installed", where=__name__, remedy="pip install 'freezekit[accelerate]'"
    ) from error

__all__ = ["DriftAudit", "FreezeBackbone"]


class FreezeBackbone(loop.FreezeBackbone):
    """Freeze a backbone before an Accelerator prepares the model, and unfreeze parts of it by epoch.

    Takes what :class:`freezekit.hooks.loop.FreezeBackbone` does. Call :meth:`prepare` in place of
    ``accelerator.prepare``, and :meth:`start_epoch` at each epoch. ``accelerator.save_state`` and
    ``load_state`` have its state with theirs: with ``unfreeze``, make the optimizer of all parameters.

    >>> from accelerate import Accelerator
    >>> from torch import nn, optim
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> hook, accelerator = FreezeBackbone(head="2"), Accelerator(cpu=True)
    >>> model, optimizer = hook.prepare(accelerator, model, optim.SGD(model.parameters(), lr=0.1))
    >>> len(hook.handle.frozen)
    7

    Source: Accelerate documentation, Accelerator.prepare and Accelerator.register_for_checkpointing.
    """

    def prepare(self, accelerator: Any, model: Any, *others: Any) -> tuple[Any, ...]:
        """Freeze the model, let the Accelerator prepare it with the others, and return what it returns.

        Args:
            accelerator: the Accelerator.
            model: the model, not wrapped yet.
            others: one optimizer or several, and what else is to be prepared.
        """
        self.freeze(model)
        prepared = accelerator.prepare(model, *others)
        self.start([each for each in prepared if hasattr(each, "param_groups")], prepared[0])
        accelerator.register_for_checkpointing(self)
        return tuple(prepared)


class DriftAudit(loop.DriftAudit):
    """Audit a loop with an Accelerator: ``accelerator.log(audit.scalars(), step)`` tells its trackers.

    Takes what :class:`freezekit.hooks.loop.DriftAudit` does. :meth:`start` takes the model and the optimizer
    as ``accelerator.prepare`` returned them; steps that ``accelerator.accumulate`` leaves out do not count.

    >>> audit = DriftAudit(on_drift="record", save="drift.json")

    Source: Accelerate documentation, Accelerator.log.
    """

    def start(self, model: Any, optimizer: Any = None) -> None:
        """Watch the model inside its wrappers from now on."""
        super().start(extract_model_from_parallel(model), optimizer)
