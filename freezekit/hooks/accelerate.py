"""Hooks for a loop with Accelerate's ``Accelerator``: the plain loop's, aware of what ``prepare`` returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from freezekit.errors import FreezekitError
from freezekit.hooks import loop

with loop.needs("accelerate"):
    from accelerate import PartialState
    from accelerate.utils import extract_model_from_parallel

__all__ = ["DriftAudit", "FreezeBackbone"]


class FreezeBackbone(loop.FreezeBackbone):
    """Freeze a backbone in a loop with an ``Accelerator``, and unfreeze parts of it as the epochs go.

    Takes what :class:`freezekit.hooks.loop.FreezeBackbone` does. Call :meth:`freeze` before the optimizer is
    made, :meth:`attach` after ``accelerator.prepare``, :meth:`start_epoch` at each epoch. ``save_state`` and
    ``load_state`` then include the schedule; ``frozen.json`` beside the model is for ``freezekit audit
    --manifest``.

    >>> import torch
    >>> from accelerate import Accelerator
    >>> accelerator = Accelerator(cpu=True)
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> hook = FreezeBackbone(head="2", unfreeze={1: "1"})
    >>> handle = hook.freeze(model)
    >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> hook.attach(accelerator, model, optimizer)
    >>> hook.start_epoch(0), hook.start_epoch(1)
    ([], ['1.weight', '1.bias'])

    Source: Accelerate documentation, Accelerator.register_save_state_pre_hook and its sister for loading.
    """

    def attach(self, accelerator: Any, model: nn.Module, optimizer: Any) -> None:
        """Take up what ``accelerator.prepare`` returned, and join in what the accelerator saves and loads.

        Args:
            accelerator: the ``Accelerator``.
            model: the model that it prepared.
            optimizer: the optimizer that it prepared, or several.
        """
        self.start(optimizer, getattr(model, "_orig_mod", model))  # DDP may be inside torch.compile's module
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def _save(self, models: list[nn.Module], weights: Any, folder: str) -> None:
        if PartialState().is_main_process:
            state, (schedule, frozen) = self.state_dict(), self._files(models, folder)
            self.manifest().save(frozen)
            del state["manifest"]
            schedule.write_text(json.dumps(state))

    def _load(self, models: list[nn.Module], folder: str) -> None:
        """Unfreeze what had been, before the optimizer's state is loaded, whose groups have it."""
        schedule, frozen = self._files(models, folder)
        if not schedule.is_file():
            raise FreezekitError(
                "the state was saved without this hook",
                where=str(schedule),
                remedy="load it before .attach(accelerator, model, optimizer)",
            )
        state = json.loads(schedule.read_text())
        state["manifest"] = frozen.read_text()
        self.load_state_dict(state)  # the values are checked when the model is loaded, after this

    def _files(self, models: list[nn.Module], folder: str) -> tuple[Path, Path]:
        """Return where schedule and manifest are: numbered as Accelerate numbers the files of its models."""
        inside = [extract_model_from_parallel(model, keep_torch_compile=False) for model in models]
        at = next((k for k, model in enumerate(inside) if self.handle and self.handle.model is model), 0)
        end = f"_{at}.json" if at else ".json"
        return Path(folder, f"freezekit{end}"), Path(folder, f"frozen{end}")


class DriftAudit(loop.DriftAudit):
    """Audit a loop with an ``Accelerator``: after each real step, not where gradients are accumulated.

    Takes what :class:`freezekit.hooks.loop.DriftAudit` does. Call :meth:`start` with what ``prepare``
    returned, after ``load_state``, then :meth:`start_epoch` at each epoch, :meth:`log` as often as you like,
    and :meth:`finish`; the main process saves the report.

    >>> audit = DriftAudit(on_drift="record", probe=10, save="drift.json")

    Source: Accelerate documentation, Accelerator.log and unwrap_model.
    """

    def start(self, model: nn.Module, optimizer: Any = None) -> None:
        """Watch the model inside its wrappers from now on, after each step of the optimizer."""
        super().start(extract_model_from_parallel(model, keep_torch_compile=False), optimizer)

    def log(self, accelerator: Any, step: int | None = None) -> None:
        """Log how much has drifted, and how far, to the accelerator's trackers."""
        accelerator.log(self.scalars(), step=step)
