"""Rules for the models of transformers, segmentation_models_pytorch, Lightning and PEFT."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from freezekit.freezing.selection import Selection

__all__ = ["RULES"]

RULES: tuple[Callable[[nn.Module], Selection | None], ...] = ()
