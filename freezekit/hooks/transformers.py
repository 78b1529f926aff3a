"""The Trainer's callbacks: its events translated to the plain loop's hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from freezekit.errors import FreezekitError
from freezekit.hooks import loop

with loop.needs("transformers"):
    from transformers import TrainerCallback

__all__ = ["DriftAudit", "FreezeBackbone"]

_STATE = "freezekit"
"""Where the Trainer's state, which it saves as ``trainer_state.json``, has that of the schedule."""


class FreezeBackbone(loop.FreezeBackbone, TrainerCallback):
    """Freeze the backbone of a Trainer's model, and unfreeze parts of it as the epochs go.

    Takes what :class:`freezekit.hooks.loop.FreezeBackbone` does. Without ``unfreeze`` it freezes as the
    Trainer is made, whose optimizer then has the head alone; with it, when training begins: the optimizer
    has all parameters, and frozen ones wait there, at the rates that the Trainer's scheduler sets.
    Checkpoints resume in mid-schedule; ``frozen.json`` in each is for ``freezekit audit --manifest``.

    >>> callback = FreezeBackbone(unfreeze={3: "resnet.encoder.stages.3"})

    Source: transformers documentation, TrainerCallback.
    """

    _epoch = 0

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Freeze before the optimizer is made, which holds what requires a gradient by then."""
        if not self._stages:
            self.freeze(given["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take up the optimizer, which is restored by now, as is the model; resume where a checkpoint was."""
        if args.parallel_mode.value == "distributed":
            self.refuse_stages_in_ddp()  # the Trainer shows its callbacks the model inside
        self.freeze(given["model"])  # for the first time, or a new one from model_init
        if saved := state.stateful_callbacks.get(_STATE):
            self.load_state_dict(saved)
        try:
            self.start(given["optimizer"])
        except FreezekitError as error:
            if error.where != "optimizer=":
                raise
            fix = "make it of model.parameters(), or give none; and give a model that nobody has frozen"
            fault = "the Trainer's optimizer lacks what is to train later"
            raise FreezekitError(fault, where="unfreeze=", remedy=fix) from None
        self.verify()
        self._epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Unfreeze what is due, and leave in the Trainer's state what resuming needs."""
        self.start_epoch(self._epoch)
        self._epoch += 1  # the state's does not tell it after an epoch that was stopped early
        state.stateful_callbacks[_STATE] = self.state_dict()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the manifest beside the model."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir():  # a hyperparameter search has other folders
            self.manifest().save(folder / "frozen.json")


class DriftAudit(loop.DriftAudit, TrainerCallback):
    """Audit the training of a Trainer's model; what is found is logged beside the loss.

    Takes what :class:`freezekit.hooks.loop.DriftAudit` does. As one of ``callbacks=[...]`` it reaches
    ``trainer.state.log_history`` and the console; :meth:`attach` it, and TensorBoard, W&B, MLflow and the
    others get it too. A run that fails is not told of: its audit ends with the next, or with the Trainer.

    >>> audit = DriftAudit(on_drift="record", probe=10, save="drift.json")

    Source: transformers documentation, TrainerCallback and Trainer.log.
    """

    _new_epoch = False

    def attach(self, trainer: Any) -> DriftAudit:
        """Go in front of the Trainer's loggers, which are called before the callbacks it is given."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the audit of a run that failed."""
        self.stop()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave it to the epoch's first step: whoever freezes or unfreezes has done so by then."""
        self._new_epoch = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Watch from the first step on, and take note in each epoch's of what was unfrozen."""
        new, self._new_epoch = self._new_epoch, False
        if new and self.auditor is not None:
            self.start_epoch()
        elif new:
            self.start(given["model"], given["optimizer"])

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Add how much has drifted, and how far, to what is logged of the training."""
        if {"loss", "train_loss"} & given["logs"].keys():
            scalars = self.scalars()  # once: it compares the model
            given["logs"].update(scalars)
            state.log_history[-1].update(scalars)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compare everything once more, and save the report."""
        self.finish()
