"""TensorState and StateTable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from torch import nn

from freezekit import audit_checkpoint
from freezekit.audit.state import DTYPE_SIZES, StateTable, TensorState


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPE_SIZES if dtype != "bool"])
def test_values_are_torchs(dtype: str) -> None:
    raw = (
        torch.arange(256, dtype=torch.uint8).repeat_interleave(2).roll(1).repeat(8)
    )  # every byte, every code
    tensor = raw.view(getattr(torch, dtype))
    state = TensorState("x", "buffer", dtype, tuple(tensor.shape), lambda: raw.numpy().tobytes())
    real = torch.view_as_real(tensor)[..., 0] if tensor.is_complex() else tensor
    np.testing.assert_array_equal(state.values(), real.double().numpy())


def test_a_name_given_twice() -> None:
    tensor = TensorState("w", "parameter", "float32", (2,), lambda: bytes(8))
    with pytest.raises(ValueError, match=r"a.pth: a tensor name is given twice"):
        StateTable([tensor, tensor], source="a.pth")


def test_a_mean_without_a_variance_is_no_layer(tmp_path: Path) -> None:
    torch.save({"m.running_mean": torch.zeros(3)}, tmp_path / "a.pth")
    report = audit_checkpoint(tmp_path / "a.pth")
    assert report.layers == ()
    assert "no layer keeps running statistics" in report.notes


def test_a_whole_number_beside_a_frozen_norm_is_a_buffer(tmp_path: Path) -> None:
    state = zoo.scramble(nn.ModuleDict({"a": nn.BatchNorm1d(4)})).state_dict() | {"a.seen": torch.tensor(3)}
    torch.save(state, tmp_path / "base.pth")
    torch.save(state | {"a.seen": torch.tensor(4)}, tmp_path / "new.pth")
    report = audit_checkpoint(tmp_path / "new.pth", tmp_path / "base.pth")
    assert [(f.code, f.name) for f in report.findings] == [("FK104", "a.seen")]
