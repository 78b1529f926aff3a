"""freezekit makes frozen mean frozen in PyTorch, and proves it.

The names below are loaded on first use (PEP 562), so that the command line, which audits checkpoints
without torch, starts at once. :mod:`freezekit.nn` has layers of its own, :mod:`freezekit.hooks` the
callbacks for training frameworks, and :mod:`freezekit.audit.findings` what a report is made of.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # type checkers take it for True; importing typing would cost more than all the rest

__version__ = "0.1.0"

_HOME = {
    "AveragedModel": "freezekit.freezing.averaging",
    "DriftAuditor": "freezekit.audit.live.monitor",
    "DriftReport": "freezekit.audit.findings",
    "Finding": "freezekit.audit.findings",
    "Freeze": "freezekit.freezing.handle",
    "Manifest": "freezekit.manifest",
    "RestoreReport": "freezekit.audit.restoring",
    "Selection": "freezekit.freezing.selection",
    "UnfreezeSchedule": "freezekit.freezing.schedule",
    "audit_checkpoint": "freezekit.audit.files",
    "check": "freezekit.audit.live.risks",
    "convert_batchnorm": "freezekit.freezing.convert",
    "find_backbone": "freezekit.freezing.discovery",
    "freeze": "freezekit.freezing.freeze",
    "freeze_backbone": "freezekit.freezing.freeze",
    "freeze_to": "freezekit.freezing.layers",
    "is_frozen": "freezekit.freezing.handle",
    "layer_groups": "freezekit.freezing.layers",
    "parameter_groups": "freezekit.freezing.layers",
    "restore_checkpoint": "freezekit.audit.restoring",
    "trainable_parameters": "freezekit.freezing.handle",
    "unfreeze": "freezekit.freezing.release",
    "update_bn": "freezekit.freezing.averaging",
    "CheckpointError": "freezekit.errors",
    "DriftError": "freezekit.errors",
    "DriftWarning": "freezekit.errors",
    "FreezekitError": "freezekit.errors",
    "OptimizerWarning": "freezekit.errors",
    "SelectionError": "freezekit.errors",
    "nn": "freezekit",
}

__all__ = [
    "AveragedModel",
    "CheckpointError",
    "DriftAuditor",
    "DriftError",
    "DriftReport",
    "DriftWarning",
    "Finding",
    "Freeze",
    "FreezekitError",
    "Manifest",
    "OptimizerWarning",
    "RestoreReport",
    "Selection",
    "SelectionError",
    "UnfreezeSchedule",
    "audit_checkpoint",
    "check",
    "convert_batchnorm",
    "find_backbone",
    "freeze",
    "freeze_backbone",
    "freeze_to",
    "is_frozen",
    "layer_groups",
    "nn",
    "parameter_groups",
    "restore_checkpoint",
    "trainable_parameters",
    "unfreeze",
    "update_bn",
]

if TYPE_CHECKING:
    from typing import Any

    from freezekit import nn
    from freezekit.audit.files import audit_checkpoint
    from freezekit.audit.findings import DriftReport, Finding
    from freezekit.audit.live.monitor import DriftAuditor
    from freezekit.audit.live.risks import check
    from freezekit.audit.restoring import RestoreReport, restore_checkpoint
    from freezekit.errors import (
        CheckpointError,
        DriftError,
        DriftWarning,
        FreezekitError,
        OptimizerWarning,
        SelectionError,
    )
    from freezekit.freezing.averaging import AveragedModel, update_bn
    from freezekit.freezing.convert import convert_batchnorm
    from freezekit.freezing.discovery import find_backbone
    from freezekit.freezing.freeze import freeze, freeze_backbone
    from freezekit.freezing.handle import Freeze, is_frozen, trainable_parameters
    from freezekit.freezing.layers import freeze_to, layer_groups, parameter_groups
    from freezekit.freezing.release import unfreeze
    from freezekit.freezing.schedule import UnfreezeSchedule
    from freezekit.freezing.selection import Selection
    from freezekit.manifest import Manifest


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'freezekit' has no attribute {name!r}")
    if home == __name__:
        value = importlib.import_module(f"freezekit.{name}")
    else:
        value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
