"""Callbacks for the Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from freezekit.errors import FreezekitError
from freezekit.hooks import loop
from freezekit.manifest import Manifest

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise FreezekitError(
        "transformers is not installed", where=__name__, remedy="pip install 'freezekit[transformers]'"
    ) from error

__all__ = ["DriftAudit", "FreezeBackbone"]

MANIFEST = "freezekit_manifest.json"
"""The file in each checkpoint's folder that says what is frozen; for ``freezekit audit --manifest``."""


class FreezeBackbone(loop.FreezeBackbone, TrainerCallback):
    """Freeze the backbone of a Trainer's model, and unfreeze parts of it as the epochs go.

    Takes what :class:`freezekit.hooks.loop.FreezeBackbone` does, but for ``lr``, ``decay`` and ``growth``:
    the Trainer's scheduler sets the rates. Without ``unfreeze`` the backbone is frozen as soon as the Trainer
    is made, and its optimizer has the head alone; with it, all is in the optimizer from the start, and waits
    there. A run resumes in mid-schedule; checkpoints have a manifest beside the model.

    >>> callback = FreezeBackbone(unfreeze={3: "resnet.encoder.stages.3"})
    >>> callback.handle is None
    True

    Source: transformers documentation, TrainerCallback.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Freeze before the optimizer is made, if nothing is to join it later."""
        if not self._stages and model is not None:
            self.freeze(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take up the optimizer; when resumed, check that what is frozen is what was."""
        if args.parallel_mode.value == "distributed":
            self.refuse_stages_in_ddp()
        self.freeze(given["model"])
        self.start(given["optimizer"])
        self.start_epoch(int(state.epoch or 0))
        saved = _folder(args, state) / MANIFEST
        if state.global_step and saved.is_file():
            Manifest.load(saved).verify(given["model"])
        self.manifest()  # has the digests of now, so that drift is found in the first checkpoint too

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Unfreeze what is due."""
        self.start_epoch(int(state.epoch or 0))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the manifest beside the model."""
        if state.is_world_process_zero:
            self.manifest().save(_folder(args, state) / MANIFEST)


class DriftAudit(loop.DriftAudit, TrainerCallback):
    """Audit the training of a Trainer's model; what is found goes to its logs.

    Takes what :class:`freezekit.hooks.loop.DriftAudit` does. Given as ``callbacks=[DriftAudit()]`` it writes
    to the log history and the console; after :meth:`attach` TensorBoard, W&B and others get it as well. The
    Trainer does not say when a run has failed: the audit then ends with the Trainer, or at its next run.

    >>> audit = DriftAudit(on_drift="record", probe=10, save="drift.json")

    Source: transformers documentation, TrainerCallback.
    """

    _due = ""

    def attach(self, trainer: Any) -> DriftAudit:
        """Join a Trainer in front of its loggers, which are called before the callbacks it was given."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        trainer.callback_handler.callbacks.remove(self)
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin with the first step: by then the other callbacks have frozen what they do."""
        self._due = "start"

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take note with the next step of what was unfrozen."""
        self._due = self._due or "epoch"

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Do what is due."""
        if self._due == "start":
            self._save = self._save if state.is_world_process_zero else None
            self.start(given["model"], given["optimizer"])
        elif self._due == "epoch":
            self.start_epoch()
        self._due = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add to what is logged of the training how much has drifted, and how far."""
        if logs is not None and "loss" in logs:
            scalars = self.scalars()
            logs.update(scalars)
            state.log_history[-1].update(scalars)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compare everything once more, and save the report."""
        self.finish()


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
