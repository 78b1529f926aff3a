"""Reports of every kind, for the tests of their forms: alone, compared, live, of a run, and hostile."""

from __future__ import annotations

import math
import random

from freezekit.audit.findings import (
    CAUSES,
    Cause,
    CheckpointDrift,
    DriftReport,
    Finding,
    LayerDrift,
    Moment,
)

TRAIN = Cause("train-mode forward", "in train mode since train.py:31 in fit", "train.py:31 in fit")
EVIL = "</script><script>alert(1)</script><!--<img src=//evil.test/x onerror=alert(2)>|`@me`\u2028\n\u202e#1"


def layer(
    name: str, size: float, *, channels: int = 8, steps: tuple[int, ...] = (), since: int | None = None
) -> LayerDrift:
    """A layer that moved by about ``size``, on a straight way; one of size 0 did not."""
    if not size:
        return LayerDrift(name, "BatchNorm", channels, 10, 0, 0.0, 1.0)
    chance = random.Random(name)
    dots = [
        (float(f"{chance.gauss(0, size):.4g}"), float(f"{math.exp(chance.gauss(0, size)):.4g}"))
        for _ in range(channels)
    ]
    shift = max(abs(x) for x, _ in dots)
    ratio = max((y for _, y in dots), key=lambda y: abs(math.log(y)))
    moments = []
    for k, step in enumerate(steps, 1):
        part = k / len(steps) if since is None or step >= since else 0.0
        moments.append(Moment(step, shift * part, ratio**part, 10 + step))
    return LayerDrift(
        name, "BatchNorm", channels, 17, 7, shift, ratio, True, since, tuple(moments), tuple(dots)
    )


def found(layer: LayerDrift, cause: Cause | None = None) -> Finding:
    return Finding("FK101", layer.name, "running mean moved", CAUSES["train-mode forward"], layer.step, cause)


def alone() -> DriftReport:
    layers = tuple(LayerDrift(f"bn{k}", "BatchNorm", 8 * k, 40 if k < 3 else 7) for k in range(1, 5))
    findings = (
        Finding("FK401", "bn2", "3 of 16 values are NaN or infinite", "restore the statistics"),
        Finding("FK404", "bn3", "2 of 4 layers differ from 40 (bn3: 7, bn4: 7)", "harmless"),
    )
    return DriftReport("model.pth", None, "statistics only", 0, (), layers, findings, ("a note",))


def drift(count: int = 5, *, channels: int = 8) -> DriftReport:
    layers = tuple(layer(f"layer{k}.bn", 0.05 * k % 7, channels=channels) for k in range(count))
    moved = tuple(one for one in layers if one.changed)
    changed = tuple(f"{one.name}.running_mean" for one in moved)
    return DriftReport(
        "new.pth", "base.pth", "as given", 5 * count, changed, layers, tuple(map(found, moved))
    )


def live() -> DriftReport:
    steps = (1, 11, 21, 31)
    layers = tuple(layer(f"bn{k}", 0.1 * k, steps=steps, since=1) for k in range(1, 4))
    weight = Cause("weight decay", "AdamW, group 0", "train.py:9 in make")
    findings = (
        *(found(one, TRAIN) for one in layers),
        Finding("FK103", "conv.weight", "parameter changed", CAUSES["weight decay"], 11, weight),
        Finding("FK202", "drop", "active", "freeze it", 1),
    )
    changed = ("bn1.running_mean", "bn2.running_mean", "bn3.running_mean", "conv.weight")
    where = ("Net after 31 steps", "its state when the auditor was made", "what does not require a gradient")
    return DriftReport(*where, 20, changed, layers, findings)


def trend(
    count: int = 6, checkpoints: int = 5, *, unit: str = "step", first: int = 2, channels: int = 8
) -> DriftReport:
    """A run that drifts from its checkpoint ``first`` (from 0) on; each third layer never does."""
    by = 1 if unit == "checkpoint" else 100
    steps = tuple(by * k for k in range(1, checkpoints + 1))
    layers = tuple(
        layer(f"stage{k}.norm", 0.05 * (k % 9 + 1), steps=steps, since=steps[first], channels=channels)
        if k % 3
        else layer(f"stage{k}.norm", 0)
        for k in range(count)
    )
    moved = tuple(one for one in layers if one.changed)
    run = tuple(
        CheckpointDrift(
            f"run/step-{step}.ckpt", step, 3 * len(moved), len(moved),
            max(m.mean_shift_sigma or 0.0 for one in moved for m in one.timeline if m.step == step), 1.25,
        )
        if step >= steps[first]
        else CheckpointDrift(f"run/step-{step}.ckpt", step, 0, 0, 0.0, 1.0)
        for step in steps
    )  # fmt: skip
    changed = tuple(
        f"{one.name}.{stat}"
        for one in moved
        for stat in ("running_mean", "running_var", "num_batches_tracked")
    )
    return DriftReport(
        run[-1].source, "base.pth", "as given", 5 * count, changed, layers, tuple(map(found, moved)), (),
        run, unit,
    )  # fmt: skip


def hostile() -> DriftReport:
    layers = tuple(layer(f"{EVIL}{k}", 0.1, steps=(1, 2), since=1) for k in range(3))
    findings = tuple(Finding("FK101", one.name, EVIL, EVIL, 1, Cause("write", EVIL, EVIL)) for one in layers)
    run = tuple(CheckpointDrift(f"{EVIL}/{k}.pth", k, 1, 1, 0.1, 1.0) for k in (1, 2))
    return DriftReport(EVIL, EVIL, EVIL, 9, (EVIL,), layers, findings, (EVIL,), run)


def clean() -> DriftReport:
    layers = (layer("bn1", 0), layer("bn2", 0))
    return DriftReport("new.pth", "base.pth", "as given", 10, (), layers, ())


EVERY = {"alone": alone, "clean": clean, "drift": drift, "live": live, "trend": trend, "hostile": hostile}
