"""What an audit finds: codes, findings, drift per layer, and the report that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import os

__all__ = [
    "CAUSES",
    "CODES",
    "REPORT_KEY",
    "UNITS",
    "Cause",
    "CauseSummary",
    "CheckpointDrift",
    "DriftReport",
    "Finding",
    "LayerDrift",
    "Level",
    "Moment",
]

REPORT_KEY = "freezekit_report"
"""Under what a checkpoint holds the text of a report."""

Level = Literal["error", "warning"]
"""What a finding is: an error makes an audit fail, a warning does not."""

UNITS = ("step", "epoch", "checkpoint")
"""What the steps of a report may count."""

CODES: dict[str, tuple[str, Level]] = {
    "FK101": ("running statistics moved", "error"),
    "FK102": ("only num_batches_tracked moved", "error"),
    "FK103": ("a frozen parameter changed", "error"),
    "FK104": ("a frozen buffer changed", "error"),
    "FK105": ("a frozen tensor is missing, added, reshaped or recast", "error"),
    # its values are those that were frozen
    "FK106": ("a frozen tensor moved to another device", "warning"),
    "FK201": ("the output depends on what else is in the batch", "error"),
    # somebody may want it
    "FK202": ("dropout is active in the frozen part", "warning"),
    "FK203": ("the output is not what it was when frozen", "error"),
    # before training: an error happens in the next steps, a warning may
    "FK301": ("a frozen norm layer is in train mode", "error"),
    "FK302": ("an optimizer will move a frozen parameter", "error"),
    "FK303": ("an optimizer will apply a stale gradient to a frozen parameter", "error"),
    "FK304": ("a frozen layer normalises by the batch", "error"),
    "FK305": ("nothing keeps a frozen layer in eval mode", "warning"),
    "FK306": ("dropout is on in the frozen part, or will be", "warning"),
    "FK307": ("a frozen embedding will rewrite its own weight", "error"),
    "FK308": ("a frozen layer will write to its own buffers", "error"),
    "FK309": ("a frozen layer may write to its own buffers", "warning"),
    "FK310": ("a frozen tensor shares its memory with one that trains", "error"),
    "FK311": ("what is named as frozen will be trained", "error"),
    "FK312": ("a norm layer is frozen only in part", "warning"),
    "FK313": ("a parameter trains but is in no optimizer", "warning"),
    "FK314": ("nothing trains", "warning"),
    "FK315": ("a frozen parameter keeps a stale gradient", "warning"),
    "FK316": ("an optimizer that is not torch's has a frozen parameter", "warning"),
    "FK317": ("frozen buffers are overwritten by those of another rank", "warning"),
    "FK318": ("a frozen tensor has no values yet", "error"),
    "FK401": ("running statistics hold NaN or infinity", "error"),
    "FK402": ("running_var is negative", "error"),
    "FK403": ("running statistics were never trained", "error"),
    # a model that was frozen in part counts differently in its two parts, and rightly so
    "FK404": ("num_batches_tracked differs between layers", "warning"),
    # real and healthy files have what the rest tells of, if for a reason
    "FK405": ("channels without variance are in use", "warning"),
    "FK406": ("running statistics are out of range", "warning"),
    "FK407": ("fewer batches were counted than steps were taken", "warning"),
    "FK408": ("running statistics stayed while the weights before them changed", "warning"),
    "FK409": ("running statistics may not have been trained", "warning"),
    # between the processes of a run
    "FK501": ("frozen values differ between ranks", "error"),
    "FK502": ("one rank's frozen values overwrote another's", "error"),
    "FK503": ("trained parameters differ between ranks", "error"),
    "FK504": ("the ranks froze or built different models", "error"),
    "FK505": ("the ranks are at different steps", "error"),
    "FK506": ("a rank did not come to the comparison", "error"),
    "FK507": ("the audit of another rank found something", "error"),
}
"""What each code means, and its level."""


CAUSES: dict[str, str] = {
    "train-mode forward": "requires_grad=False does not stop running statistics; "
    "freezekit.freeze_backbone(model), or freezekit.freeze(model, NAMES) for a part, keeps the layer in "
    "eval mode whatever model.train() does",
    "own forward": "the layer writes to its own state in eval mode too: change its forward, or take "
    "it out of the frozen part",
    "recompute": "freezekit.freeze_backbone(model) keeps the layer in eval mode, so that computing it "
    "again in the backward pass moves nothing",
    "gradient": "freezekit.freeze_backbone(model, optimizer=optimizer) before training, or "
    "optimizer.zero_grad(set_to_none=True) once after freezing",
    "momentum": "freezekit.freeze_backbone(model, optimizer=optimizer) takes what is frozen out of "
    "the optimizer and parks its momentum",
    "weight decay": "freezekit.freeze_backbone(model, optimizer=optimizer) takes what is frozen out "
    "of the optimizer; or make it from freezekit.trainable_parameters(model)",
    "optimizer": "make the optimizer from freezekit.trainable_parameters(model), or freeze with optimizer=",
    "load_state_dict": "load first, then freeze and make the auditor",
    "averaging": "freezekit.AveragedModel copies what is frozen and averages the rest",
    # the attribute: every torch has it, while the argument of that name is deprecated since 2.13
    "broadcast": "broadcast_buffers = False on the DistributedDataParallel model, or the same checkpoint "
    "on every rank",
    "write": "find the code that writes to it; what is frozen must only be read",
    "assignment": "do not put another tensor in place of a frozen one; unfreeze it first",
    "move": "move or cast the model before making the auditor",
    "unknown": "every=1 narrows it down to a step; auditor.check() between the parts of the loop to a line",
}
"""What to do about each kind of cause."""


@dataclass(frozen=True)
class Cause:
    """Why something moved, as far as that is known for certain.

    Args:
        kind: one of :data:`CAUSES`; ``"unknown"`` where the evidence does not tell.
        detail: the evidence: ``"in train mode since train.py:31 in fit"``.
        where: the line of the user's code that did it, as ``"train.py:31 in fit"``, where known.

    >>> print(Cause("write", "2 counted writes outside any optimizer step"))
    write (2 counted writes outside any optimizer step)
    """

    kind: str
    detail: str = ""
    where: str | None = None

    def __str__(self) -> str:
        where = self.where if self.where and self.where not in self.detail else ""
        told = ", ".join(part for part in (self.detail, where) if part)
        return f"{self.kind} ({told})" if told else self.kind


@dataclass(frozen=True)
class Moment:
    """How far a layer's running statistics were from the frozen ones at one step.

    Args:
        step: the optimizer step after which this was measured.
        mean_shift_sigma: as in :class:`LayerDrift`.
        var_ratio: as in :class:`LayerDrift`.
        num_batches_tracked: the counter then, ``None`` where there is none.
    """

    step: int
    mean_shift_sigma: float | None
    var_ratio: float | None
    num_batches_tracked: int | None


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, where, and what to do about it.

    Args:
        code: ``FK101`` and so on; the first digit is the kind (1 state moved, 4 checkpoint health, 5 ranks).
        name: the layer or tensor concerned.
        message: what was seen, with its size.
        fix: what to do.
        step: the step at which it was first seen, in a live audit or in the checkpoints of a run.
        cause: why it moved, in a live audit.
        ranks: the processes concerned, where several were compared.

    >>> Finding("FK101", "bn1", "mean moved by 0.5 sigma", "freeze it", step=1).level
    'error'
    """

    code: str
    name: str
    message: str
    fix: str
    step: int | None = None
    cause: Cause | None = None
    ranks: tuple[int, ...] = ()

    @property
    def level(self) -> Level:
        """``"error"`` makes an audit fail, ``"warning"`` does not."""
        return CODES[self.code][1]

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        why = "" if self.cause is None else f"cause: {self.cause}"
        told = self.message if why in self.message else f"{self.message}; {why}"
        return f"{self.code} {self.name}{at}: {told}"


@dataclass(frozen=True)
class CauseSummary:
    """What a report holds of one kind of cause.

    Args:
        kind: one of :data:`CAUSES`.
        findings: how many findings it has.
        layers: how many layers they are of.
        tensors: how many tensors, where they are not of a layer as a whole.
        step: the first step at which one was seen, ``None`` where that is not known.
        places: the lines of the user's code that did it, as far as known.
        example: the first of the findings.
    """

    kind: str
    findings: int
    layers: int
    tensors: int
    step: int | None
    places: tuple[str, ...]
    example: Finding

    @property
    def fix(self) -> str:
        """What to do about it."""
        return CAUSES[self.kind]


@dataclass(frozen=True)
class LayerDrift:
    """A layer with running statistics, and how far they moved.

    Args:
        name: the layer.
        kind: its class, or ``"BatchNorm"`` where a file does not say.
        channels: number of channels.
        num_batches_tracked: the counter now, ``None`` where there is none.
        batches: how far the counter moved, ``None`` without a comparison.
        mean_shift_sigma: largest ``|Δmean| / sqrt(var_before + eps)`` over the channels, in standard
            deviations; ``None`` without a comparison.
        var_ratio: the ``sqrt((var_after + eps) / (var_before + eps))`` furthest from 1 over the channels;
            ``None`` without a comparison.
        changed: whether the layer counts as frozen and a bit of its statistics or counter differs, in any
            checkpoint of a run.
        step: the step at which that was first seen, in a live audit or in the checkpoints of a run.
        timeline: how it went: in a live audit, or from checkpoint to checkpoint.
        scatter: of each channel of a layer that moved, ``(after - before)`` of the mean in standard
            deviations, with its sign, and the spread as in ``var_ratio``; empty where they are not known.
    """

    name: str
    kind: str
    channels: int
    num_batches_tracked: int | None
    batches: int | None = None
    mean_shift_sigma: float | None = None
    var_ratio: float | None = None
    changed: bool = False
    step: int | None = None
    timeline: tuple[Moment, ...] = ()
    scatter: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class CheckpointDrift:
    """One of several checkpoints of a run, and how far it is from the base.

    Args:
        source: the file.
        step: the number by which timelines and findings refer to it; see :class:`freezekit.DriftReport`.
        changed: how many frozen tensors differ.
        layers: how many layers with running statistics moved.
        mean_shift_sigma: the largest of the layers', ``None`` where it is not known.
        var_ratio: the one furthest from 1 of the layers', likewise.
    """

    source: str
    step: int
    changed: int
    layers: int
    mean_shift_sigma: float | None
    var_ratio: float | None


@dataclass(frozen=True)
class DriftReport:
    """The outcome of an audit; ``str()`` of it is a table.

    Args:
        source: what was audited.
        against: what it was compared with, or ``None``.
        scope: how it was told what is frozen, in words.
        compared: number of tensors in the frozen part.
        changed: names of those that differ, in any checkpoint of a run.
        layers: the layers with running statistics, in the model's order.
        findings: what is wrong, in the model's order.
        notes: what else a reader should know.
        checkpoints: all the checkpoints of a run that were audited, in its order; ``source`` is the last.
        unit: what ``step`` counts in this report: ``"step"``, ``"epoch"``, or ``"checkpoint"`` where the
            files tell neither and are numbered from 1.

    >>> DriftReport("a.pth", None, "", 0, (), (), ()).clean
    True
    """

    source: str
    against: str | None
    scope: str
    compared: int
    changed: tuple[str, ...]
    layers: tuple[LayerDrift, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    checkpoints: tuple[CheckpointDrift, ...] = ()
    unit: str = "step"

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong; warnings do not count."""
        return not any(finding.level == "error" for finding in self.findings)

    @property
    def by_cause(self) -> dict[str, CauseSummary]:
        """The causes that are known of the findings, by kind; the one that was seen first comes first."""
        kinds: dict[str, list[Finding]] = {}
        for finding in self.findings:
            if finding.cause is not None:
                kinds.setdefault(finding.cause.kind, []).append(finding)
        made = [_summary(kind, found) for kind, found in kinds.items()]
        made.sort(key=lambda cause: (cause.step is None, cause.step or 0))
        return {cause.kind: cause for cause in made}

    def to_json(self) -> str:
        """Return the report as JSON; ``freezekit audit --schema`` says what is in it."""
        from freezekit.report.json import render

        return render(self)

    @classmethod
    def from_json(cls, text: str) -> DriftReport:
        """Make a report from JSON text.

        Args:
            text: what :meth:`to_json` returned.

        Raises:
            CheckpointError: it is no report, damaged, hostile, or made by a newer freezekit.

        >>> report = DriftReport("a.pth", None, "", 0, (), (), ())
        >>> DriftReport.from_json(report.to_json()) == report
        True
        """
        from freezekit.audit.saved import parse

        return parse(text)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as a JSON file, whole or not at all; ``freezekit audit FILE`` shows it.

        Args:
            path: the file; one that is there already is replaced.

        Raises:
            FreezekitError: it cannot be written.

        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "drift.json")
        >>> DriftReport("a.pth", None, "", 0, (), (), ()).save(path)
        >>> DriftReport.load(path).source
        'a.pth'
        """
        from freezekit.jsonfile import write

        write(path, self.to_json(), "report")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DriftReport:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.

        Raises:
            CheckpointError: it is missing, damaged or hostile, or no report.
        """
        from freezekit.audit.saved import load

        return load(path)

    def __str__(self) -> str:
        from freezekit.report.text import render

        return render(self)


_OF_TENSORS = ("FK103", "FK104", "FK105", "FK106")


def _summary(kind: str, found: list[Finding]) -> CauseSummary:
    """Count the findings that have a cause of this kind."""
    tensors = {finding.name for finding in found if finding.code in _OF_TENSORS}
    layers = {finding.name for finding in found if finding.code not in _OF_TENSORS}
    places = dict.fromkeys(f.cause.where for f in found if f.cause is not None and f.cause.where)
    steps = [finding.step for finding in found if finding.step is not None]
    first = min(steps, default=None)
    example = next(finding for finding in found if finding.step == first or first is None)
    return CauseSummary(kind, len(found), len(layers), len(tensors), first, tuple(places), example)
