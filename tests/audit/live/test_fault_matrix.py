"""Every fault in every mode of watching: found, at its step, and its cause right or unknown."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from fault_scene import GUILTY, Fault, Scene
from faults import FAULTS
from torch import Tensor, nn

from freezekit import DriftAuditor, DriftReport

MODES: dict[str, dict[str, Any]] = {
    "rolling": {},
    "all": {"watch": "all"},
    "norm": {"watch": "norm"},
    "digest": {"watch": "all", "snapshot": "digest"},
}
WINDOW = 20
"""Checks in which a rolling compare has seen every parameter once."""

CASES = [
    pytest.param(fault, mode, id=f"{mode}: {fault.name}")
    for mode in MODES
    for fault in FAULTS.values()
    if mode != "norm" or fault.norm
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated:FutureWarning"),
]


@dataclass(frozen=True)
class Seen:
    """What an audit made of a fault, and what was really so."""

    report: DriftReport
    expected: int
    clean: tuple[str, ...]
    moved: dict[str, bool]  # and whether it left a hint

    def finding(self, wanted: str) -> Any:
        """Return the finding that ``"FK103|FK105 name"`` asks for, or ``None``."""
        codes, name = wanted.split()
        found = [f for f in self.report.findings if f.code in codes.split("|") and f.name == name]
        return found[0] if found else None


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor by name, whatever it is registered as; written apart from the auditor's own way."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = {**vars(module), **module._parameters, **module._buffers}
        for key, value in own.items():
            held = (
                [(f"{key}.{i}", v) for i, v in enumerate(value)]
                if isinstance(value, list)
                else [(key, value)]
            )
            for item, tensor in held:
                if isinstance(tensor, Tensor) and tensor.grad_fn is None:
                    found[f"{path}.{item}".lstrip(".")] = tensor
    return found


def bits(tensor: Tensor) -> tuple[object, ...]:
    """Return all that a tensor is, its values as bytes."""
    flat = torch.empty(0) if tensor.is_meta else tensor.detach().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), tensor.device, flat.view(torch.uint8).numpy().tobytes()


def looks(tensor: Tensor) -> tuple[int, int, int]:
    """Return what changes with a write that leaves a hint."""
    return id(tensor), tensor.data_ptr(), tensor._version


@cache
def run(fault: Fault, mode: str) -> Seen:
    """Let a fault strike under an auditor, long enough for it to be seen, and no longer."""
    if fault.needs and importlib.util.find_spec(fault.needs) is None:
        pytest.skip(f"{fault.needs} is not installed")
    torch.manual_seed(0)
    s: Scene = fault.build()
    model = s.audited or s.model
    follow = None if s.follow_all else s.follow or s.optimizer
    auditor = DriftAuditor(model, follow, s.frozen, on_drift="record", **MODES[mode]).attach()
    patience = WINDOW + 5 if mode == "rolling" and not fault.hint else 0
    clean: tuple[str, ...] = ()
    try:
        for step in range(1, fault.at + patience + 1):
            if step == GUILTY:
                before = dict(state(model))
                kept = {name: (bits(t), looks(t), isinstance(t, nn.Parameter)) for name, t in before.items()}
                clean = tuple(str(f) for f in auditor.report().findings)
            s.step(step == GUILTY)
            if step == GUILTY:
                after = state(model)
                hints = {}
                for name in {*kept, *after}:
                    if name not in kept or name not in after:
                        hints[name] = True
                    elif bits(after[name]) != kept[name][0]:
                        hints[name] = not kept[name][2] or looks(after[name]) != kept[name][1]
            if step == fault.at:
                expected = auditor.step
    finally:
        auditor.detach()
    return Seen(auditor.report(), expected, clean, hints)


def wanted(fault: Fault) -> tuple[str, ...]:
    return (fault.finds,) if isinstance(fault.finds, str) else fault.finds


def watched(fault: Fault, mode: str) -> tuple[str, ...]:
    """Return the findings that must come in this mode: those of norm layers alone in ``watch="norm"``."""
    return tuple(w for w in wanted(fault) if mode != "norm" or ".lin" not in w)


def deadline(fault: Fault, mode: str, seen: Seen) -> int:
    """Return the last step at whose check it may be first seen."""
    return seen.expected + (WINDOW - 1 if mode == "rolling" and not fault.hint else 0)


@pytest.mark.parametrize(("fault", "mode"), CASES)
def test_detected_in_time(fault: Fault, mode: str) -> None:
    seen = run(fault, mode)
    assert seen.clean == (), "the two steps before the fault were clean"
    for want in watched(fault, mode):
        name = want.split()[1]
        assert any(m == name or m.startswith(f"{name}.") for m in seen.moved), "the fault did not strike"
        finding = seen.finding(want)
        assert finding is not None, f"not found; found {[str(f) for f in seen.report.findings]}"
        assert finding.step is not None, "found by the report, by no check"
        assert seen.expected <= finding.step <= deadline(fault, mode, seen)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_hint_is_as_stated(fault: Fault) -> None:
    seen = run(fault, "all")
    for want in wanted(fault):
        name = want.split()[1]
        mine = [hint for moved, hint in seen.moved.items() if moved == name or moved.startswith(f"{name}.")]
        assert mine
        assert any(mine) == fault.hint


@pytest.mark.parametrize(("fault", "mode"), CASES)
def test_the_cause_is_right_or_unknown(fault: Fault, mode: str) -> None:
    seen = run(fault, mode)
    right = (fault.causes,) if isinstance(fault.causes, str) else fault.causes
    for want in watched(fault, mode):
        cause = seen.finding(want).cause
        assert cause is not None, "a live audit names a cause, if only an unknown one"
        assert cause.kind in {*right, "unknown"}, f"{cause}, but {fault.why}"


def verdict(fault: Fault, mode: str) -> Counter[str]:
    """Count one fault in one mode; the first finding it must bring speaks for it."""
    seen = run(fault, mode)
    finding = seen.finding(watched(fault, mode)[0])
    count = Counter(faults=1)
    if finding is None or finding.step is None:
        return count
    count["detected"] += 1
    count["at the step"] += finding.step == seen.expected
    count["in time"] += seen.expected <= finding.step <= deadline(fault, mode, seen)
    right = (fault.causes,) if isinstance(fault.causes, str) else fault.causes
    kind = finding.cause.kind if finding.cause else "none"
    count["right" if kind in right else kind if kind in ("unknown", "none") else "wrong"] += 1
    return count


def test_the_figures() -> None:
    """The promise as a whole: everything found, in time, nineteen causes in twenty right, no cause wrong."""
    totals: dict[str, Counter[str]] = {}
    for mode in MODES:
        totals[mode] = Counter()
        for fault in FAULTS.values():
            here = not fault.needs or importlib.util.find_spec(fault.needs)
            if here and (mode != "norm" or fault.norm):
                totals[mode] += verdict(fault, mode)
    columns = ("faults", "detected", "at the step", "in time", "right", "unknown", "wrong", "none")
    print("\n" + " ".join(f"{c:>11}" for c in ("watch", *columns)))
    for mode, count in totals.items():
        print(" ".join(f"{c:>11}" for c in (mode, *(count[c] for c in columns))))
    for mode, count in totals.items():
        assert count["detected"] == count["in time"] == count["faults"], mode
        assert mode == "rolling" or count["at the step"] == count["faults"], mode
        assert count["wrong"] == count["none"] == 0, mode
        if mode in ("rolling", "all"):  # without the values from before less can be proved, and of norms too
            assert count["right"] >= 0.95 * count["faults"], mode


@pytest.mark.parametrize("where", [0.0, 0.37, 1.0])
def test_every_part_of_every_parameter_has_its_turn(where: float) -> None:
    """A byte flipped without a trace, in any parameter at any phase of the rolling compare."""
    sizes = (7, 64, 3001, 70_000, 300_001, 520_000, 128)
    model = nn.ParameterList(nn.Parameter(torch.randn(size), requires_grad=False) for size in sizes)
    for phase, (size, parameter) in enumerate(zip(sizes, model, strict=True)):
        auditor = DriftAuditor(model, on_drift="record")
        for _ in range(3 * phase):
            assert auditor.check() == []
        storage = parameter.untyped_storage()
        byte = int(where * (4 * size - 1))
        storage[byte] = storage[byte] ^ 1
        found = [finding for _ in range(WINDOW) for finding in auditor.check()]
        assert [(f.code, f.name) for f in found] == [("FK103", str(phase))]


def test_the_matrix_is_large_enough() -> None:
    assert len(FAULTS) >= 50
    assert sum(not fault.hint for fault in FAULTS.values()) >= 3
    # "broadcast" is in test_faults_ddp.py
    kinds = {f.causes if isinstance(f.causes, str) else f.causes[0] for f in FAULTS.values()}
    assert kinds == {
        "train-mode forward", "own forward", "recompute", "gradient", "momentum", "weight decay", "optimizer",
        "load_state_dict", "averaging", "write", "assignment", "move",
    }  # fmt: skip
