"""Lightning's callbacks, made from the ``Callback`` of the Lightning that is imported by then, or of both."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from freezekit.audit.findings import REPORT_KEY
from freezekit.errors import FreezekitError
from freezekit.hooks import loop
from freezekit.manifest import KEY

__all__ = ["DriftAudit", "FreezeBackbone"]

_packages = ("lightning.pytorch", "pytorch_lightning")
_found = [name for name in _packages if name in sys.modules]  # importing both changes who logs for the first
_found = _found or [name for name in _packages if importlib.util.find_spec(name.partition(".")[0])][:1]
with loop.needs("lightning"):
    _modules = [importlib.import_module(name) for name in _found or _packages[:1]]
_Callback: Any = type("_Callback", tuple(module.Callback for module in _modules), {})


class FreezeBackbone(loop.FreezeBackbone, _Callback):  # type: ignore[misc]
    """Freeze a Lightning module's backbone for ``fit``, and unfreeze parts of it as the epochs go.

    Takes what :class:`freezekit.hooks.loop.FreezeBackbone` does, with names as they are in the Lightning
    module. Make the optimizer of what requires a gradient, or of ``self.parameters()``: with an LR scheduler
    only that will do. Checkpoints resume in mid-schedule, and ``freezekit audit`` checks their frozen part.

    >>> callback = FreezeBackbone(unfreeze={3: "backbone.layer4", 5: "backbone"}, decay=0.1)

    Source: Lightning documentation, Callback and BackboneFinetuning.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Freeze, before the optimizers are made and before anything wraps the model."""
        self._stage = stage
        if stage == "fit":
            pl_module.configure_model()  # does nothing when Lightning calls it a second time
            self.freeze(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take up the optimizers; the module's state is restored by now, and theirs will be next."""
        try:
            self.start(trainer.optimizers, trainer.model)
        except FreezekitError as error:
            if error.where != "optimizer=":
                raise
            fix = "make the optimizer of self.parameters(), in groups or not: what is frozen waits in it"
            raise FreezekitError(error.what, where="configure_optimizers", remedy=fix) from None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Unfreeze what is due."""
        self.start_epoch(trainer.current_epoch)

    def _advance(self, epoch: int) -> list[str]:
        """As in the loop's hook, without the eval mode that Lightning's validation reads and puts back."""
        for module in self.handle.model.modules() if self.handle else ():
            if module.__dict__.get("_asked_training") is False:
                del module.__dict__["_asked_training"]
        return super()._advance(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs; nothing if the model was never trained."""
        return super().state_dict() if self.handle else {}

    def load_state_dict(self, state: Any) -> None:
        """Take up a checkpoint's state, unless it is loaded to validate, test or predict."""
        if getattr(self, "_stage", "fit") == "fit":
            super().load_state_dict(state)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the manifest where ``freezekit audit`` looks for it."""
        if state := checkpoint["callbacks"].get(self.state_key):
            checkpoint[KEY] = state["manifest"]


class DriftAudit(loop.DriftAudit, _Callback):  # type: ignore[misc]
    """Audit the training of a Lightning module; what is found goes to its logger and into its checkpoints.

    Takes what :class:`freezekit.hooks.loop.DriftAudit` does. Each epoch's scalars go through ``log_dict``, so
    that callbacks can monitor ``"freezekit/changed"``. Put it last: what callbacks after it write at the end
    of training, as ``EMAWeightAveraging`` does, it does not see.

    >>> audit = DriftAudit(on_drift="record", probe=10, save="drift.json")

    Source: Lightning documentation, Callback and LightningModule.log_dict.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch from now on: everything is restored, and the sanity check is over."""
        self.start(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take note at an epoch's first batch of what was unfrozen, by whichever callback or hook."""
        if batch_idx == 0:
            self.start_epoch()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log how much has drifted, and how far."""
        pl_module.log_dict(self.scalars(), rank_zero_only=True)  # what drifted may differ between ranks

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the report where ``freezekit audit`` looks for it."""
        if report := self.auditor.report() if self.auditor else self.report:
            checkpoint[REPORT_KEY] = report.to_json()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Compare everything once more, and save the report."""
        self.finish()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Stop watching, after an exception too."""
        self.stop()

    on_exception = teardown
