"""Names of two files brought together: whatever wraps either, the comparison is that of the bare models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from freezekit import FreezekitError, audit_checkpoint
from freezekit.audit import drift
from freezekit.audit.aligning import align, renaming
from freezekit.audit.frozen_set import differing, frozen_names
from freezekit.audit.state import StateTable, TensorState, role_of

State = dict[str, Tensor]


def model(seed: int = 0) -> State:
    """A small residual network's state: the same names again and again in its blocks."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def layer(name: str, out: int, into: int) -> None:
        state[f"{name}.conv.weight"] = torch.randn(out, into, generator=generator)
        for own in ("weight", "bias", "running_mean"):
            state[f"{name}.bn.{own}"] = torch.randn(out, generator=generator)
        state[f"{name}.bn.running_var"] = torch.rand(out, generator=generator) + 0.5
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)

    layer("stem", 4, 3)
    for n in range(3):
        layer(f"layer1.{n}", 4, 4)
        layer(f"layer2.{n}", 6, 6)
    state["head.fc.weight"] = torch.randn(2, 6, generator=generator)
    state["head.fc.bias"] = torch.randn(2, generator=generator)
    return state


def tuned(state: State) -> State:
    """The head trained, the statistics of two layers moved, the counter of one."""
    new = {name: t.clone() for name, t in state.items()}
    new["head.fc.weight"] += 1
    new["layer1.1.bn.running_mean"] += 1
    new["stem.bn.running_var"] *= 2
    new["layer2.2.bn.num_batches_tracked"] += 1
    return new


def table(state: State, source: str) -> StateTable:
    return StateTable(
        [
            TensorState(
                name,
                role_of(name, str(t.dtype).removeprefix("torch.")),
                str(t.dtype).removeprefix("torch."),
                tuple(t.shape),
                t.contiguous().numpy().tobytes,
            )
            for name, t in state.items()
        ],
        source,
    )


def audit(new: State, base: State) -> tuple[list[tuple[str, str]], list[str], int]:
    aligned = align(table(new, "new"), table(base, "base"))
    names, _, _ = frozen_names(aligned.table, aligned.base, given=aligned.given, outside=aligned.outside)
    _, findings, changed = drift.compare(aligned.base, aligned.table, names)
    return [(f.code, f.name) for f in findings], changed, len(names)


EXPECTED = [("FK101", "stem.bn"), ("FK101", "layer1.1.bn"), ("FK102", "layer2.2.bn")]


def wrap(state: State, prefix: str, part: str = "", inner: str = "") -> State:
    """Put a prefix on all names, and something inside, behind the names of one part."""
    made: State = {}
    for name, t in state.items():
        inside = bool(part) and name.startswith(f"{part}.")
        made[prefix + (f"{part}.{inner}{name[len(part) + 1 :]}" if inside else name)] = t
    return made


PREFIXES = st.sampled_from(
    ["", "model.", "net.", "backbone.", "module.", "ema.module.", "student.", "model._orig_mod.",
     "encoder.model.", "0.", "a.b.c.", "layer1.", "model.layer2.0."]
)  # fmt: skip
INNER = st.sampled_from(["", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "model."])
PARTS = st.sampled_from(["", "stem", "layer1", "layer2", "head"])


@settings(max_examples=300, deadline=None, database=None)
@given(PREFIXES, PREFIXES, PARTS, PARTS, INNER, INNER, st.booleans(), st.booleans())
# layer1.model.* has its longest end in common with model.layer2.model.*, another part
@example("", "model.", "layer1", "layer2", "model.", "model.", False, False)
@example("model.", "net.", "layer1", "layer2", "model.", "model.", False, False)
# as much as the student, the teacher fits a base that is a copy itself
@example("student.", "ema.module.", "head", "head", "model.", "", False, True)
def test_the_comparison_is_that_of_the_bare_models(
    prefix: str, other: str, part: str, other_part: str, inner: str, other_inner: str, more: bool, copy: bool
) -> None:
    base = model()
    new = wrap(tuned(base), prefix, part, inner)
    if more:
        new["loss.weight"] = torch.ones(3)
    if copy and prefix == "student.":
        new |= wrap(model(1), "teacher.")
    findings, changed, compared = audit(new, wrap(base, other, other_part, other_inner))
    assert [code for code, _ in findings] == [code for code, _ in EXPECTED]
    for (_, name), (_, expected) in zip(findings, EXPECTED, strict=True):
        kept = [p for p in name.split(".") if p in expected.split(".")]
        assert kept[-len(expected.split(".")) :] == expected.split(".")
    assert len(changed) == 3
    assert compared == 35


@pytest.mark.parametrize("wrapped", ["new", "base", "both"])
def test_one_prefix(wrapped: str) -> None:
    base = model()
    new = wrap(tuned(base), "model." if wrapped != "base" else "")
    assert audit(new, wrap(base, "net." if wrapped != "new" else ""))[0] == [
        (code, ("net." if wrapped == "both" else "") + name) for code, name in EXPECTED
    ]


def test_a_backbone_file_against_the_whole_model() -> None:
    base = wrap(model(), "backbone.")
    base = {n.replace("backbone.head", "head"): t for n, t in base.items()}
    base |= {f"neck.bn.{own}": torch.ones(3) for own in ("weight", "bias", "running_mean", "running_var")}
    new = {n: t for n, t in tuned(model()).items() if not n.startswith("head")}
    assert audit(new, base)[0] == EXPECTED
    aligned = align(table(new, "new"), table(base, "base"))
    assert aligned.notes == (
        "base: prefix 'backbone.' stripped to match the checkpoint",
        "base: 6 tensors lie outside what both files have: head.fc.weight, head.fc.bias, neck.bn.weight, "
        "neck.bn.bias, ...",
    )
    other = differing(aligned.base, aligned.table, aligned.outside)
    assert other[0].startswith("3 of 42 other tensors differ")
    # but what is said to be frozen and is not there is missing
    names, _, _ = frozen_names(aligned.table, aligned.base, "head", outside=aligned.outside)
    found = drift.compare(aligned.base, aligned.table, names)[1]
    assert [(f.code, f.name) for f in found] == [("FK105", "head.fc.weight"), ("FK105", "head.fc.bias")]


def test_missing_reshaped_and_recast_layers_under_a_prefix() -> None:
    base, new = model(), tuned(model())
    for name in [n for n in new if n.startswith("layer2.1.")]:
        del new[name]
    new["layer1.0.bn.running_var"] = torch.ones(5)
    new["layer1.2.bn.running_mean"] = new["layer1.2.bn.running_mean"].double()
    found, _, _ = audit(wrap(new, "model."), base)
    assert {name for code, name in found if code == "FK105"} == {
        "layer1.0.bn.running_var",
        "layer1.2.bn.running_mean",
        *(f"layer2.1.bn.{own}" for own in ("weight", "bias", "running_mean", "running_var")),
        "layer2.1.bn.num_batches_tracked",
    }


def test_another_block_is_not_taken_for_one_that_is_gone() -> None:
    base, new = model(), tuned(model())
    for name in [n for n in new if n.startswith("layer1.0.")]:
        new[name.replace("layer1.0", "extra.5")] = new.pop(name)
    aligned = align(table(new, "new"), table(base, "base"))
    assert (aligned.given, aligned.notes) == ({}, ())
    found, _, _ = audit(new, base)
    assert {code for code, name in found if name.startswith("layer1.0")} == {"FK105"}


def test_the_student_is_compared_not_the_teacher() -> None:
    base = model()
    new = wrap(model(1), "teacher.") | wrap(tuned(base), "student.")
    assert audit(new, base)[0] == EXPECTED
    assert audit(base, new)[0] != []  # and the other way about the student's base is its student


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["layer.0.weight"], ["mylayer.0.weight"]),
        (["blocks.0.norm.weight", *(f"blocks.{n}.attn.qkv" for n in range(20))],
         ["conv.weight", "bn.norm.weight", *(f"layer.{n}.conv1.kernel" for n in range(20))]),
    ],
)  # fmt: skip
def test_nonsense_is_not_picked(names: list[str], others: list[str]) -> None:
    assert renaming(names, others) == {}
    zeros = torch.zeros(2)
    with pytest.raises(FreezekitError, match="no tensor name in common"):
        align(table(dict.fromkeys(names, zeros), "a"), table(dict.fromkeys(others, zeros), "b"))


def test_names_that_collide_once_a_prefix_is_gone(tmp_path: Path) -> None:
    base = model()
    new = wrap(tuned(base), "model.") | {"head.fc.weight": torch.ones(2, 6)}
    torch.save(new, tmp_path / "new.pth")
    torch.save(base, tmp_path / "base.pth")
    report = audit_checkpoint(tmp_path / "new.pth", tmp_path / "base.pth")
    assert [(f.code, f.name) for f in report.findings] == EXPECTED
    assert "left out, as prefixes gave their names to others: head.fc.weight" in report.notes
