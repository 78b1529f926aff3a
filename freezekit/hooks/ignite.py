"""Ignite's handlers: its events translated to the plain loop's hooks."""

from __future__ import annotations

from typing import Any

from torch import nn

from freezekit.hooks import loop

with loop.needs("ignite"):
    from ignite.engine import Engine, Events

__all__ = ["DriftAudit", "FreezeBackbone"]


class FreezeBackbone(loop.FreezeBackbone):
    """Freeze a backbone for a trainer's runs, and unfreeze parts of it as the epochs go.

    Takes what :class:`freezekit.hooks.loop.FreezeBackbone` does; ``unfreeze={0: ...}`` is what Ignite calls
    epoch 1. Attach it before a learning-rate scheduler is made. To resume: attach, load, run; in ``to_save``
    and ``to_load`` of Ignite's ``Checkpoint`` put it before an optimizer that lacks what is frozen.

    >>> import torch
    >>> from ignite.engine import create_supervised_trainer
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> trainer = create_supervised_trainer(model, optimizer, nn.functional.mse_loss)
    >>> freeze, audit = FreezeBackbone(head="2", unfreeze={1: "1"}), DriftAudit()
    >>> freeze.attach(trainer, model, optimizer)
    >>> audit.attach(trainer, model, optimizer)
    >>> _ = trainer.run([(torch.randn(4, 2), torch.randn(4, 1))], max_epochs=2)
    >>> freeze.handle.frozen, audit.report.clean
    (['0.weight', '0.bias'], True)

    Source: Ignite documentation, Engine, Events and Checkpoint.
    """

    def attach(self, trainer: Engine, model: nn.Module, optimizer: Any) -> None:
        """Freeze now, and unfreeze as the trainer's epochs go.

        Args:
            trainer: whose epochs count.
            model: the model; a wrapped one was frozen before by :meth:`freeze`, or has no ``unfreeze=``.
            optimizer: what trains it, or several.
        """
        self.freeze(_inner(model))
        self.start(optimizer, model)
        trainer.add_event_handler(Events.EPOCH_STARTED, self._next)

    def _next(self, trainer: Engine) -> None:
        self.start_epoch(trainer.state.epoch - 1)


class DriftAudit(loop.DriftAudit):
    """Audit a trainer's runs; what is found is among ``trainer.state.metrics`` after each epoch.

    Takes what :class:`freezekit.hooks.loop.DriftAudit` does. Attach it before a logger, as one does with
    Ignite's metrics: ``attach_output_handler(..., metric_names="all")`` then logs ``freezekit/changed``, and
    how far each layer moved. ``EMAHandler.ema_model`` needs an audit of its own, with ``frozen=``.
    """

    def attach(self, trainer: Engine, model: nn.Module, optimizer: Any = None) -> None:
        """Watch the model in each run of the trainer, after each step of the optimizer, or of any."""
        trainer.add_event_handler(Events.STARTED, self._begin, _inner(model), optimizer)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._log)
        trainer.add_event_handler(Events.TERMINATE | Events.COMPLETED, self.finish)
        run = trainer.run

        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            except BaseException:
                self.stop()
                raise

        # a handler of EXCEPTION_RAISED would keep Ignite from raising, and the user's from being called
        trainer.run = watched  # type: ignore[method-assign]

    def _begin(self, trainer: Engine, model: nn.Module, optimizer: Any) -> None:
        self.start(model, optimizer)
        self._log(trainer)
        if not trainer.has_event_handler(self._next, Events.EPOCH_STARTED):
            trainer.add_event_handler(Events.EPOCH_STARTED, self._next)  # after whoever unfreezes

    def _next(self, _: Engine) -> None:
        self.start_epoch()

    def _log(self, trainer: Engine) -> None:
        trainer.state.metrics.update(self.scalars())


def _inner(model: nn.Module) -> nn.Module:
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model
