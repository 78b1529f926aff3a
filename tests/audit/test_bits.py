"""same_bits and difference: in pieces, by checksum where that proves it, reading no more than it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from freezekit.audit import bits
from freezekit.audit.bits import close, difference, same_bits
from freezekit.audit.checkpoint import read_checkpoint
from freezekit.audit.checkpoint.container import SourceFile
from freezekit.audit.state import TensorState
from freezekit.errors import CheckpointError

Reads = list[int]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Lengths of what is read of tensors, in pieces of 64 elements."""
    lengths: Reads = []
    pread = SourceFile.pread

    def counted(file: SourceFile, offset: int, length: int) -> bytes:
        lengths.append(length)
        return pread(file, offset, length)

    monkeypatch.setattr(SourceFile, "pread", counted)
    monkeypatch.setattr(bits, "_PIECE", 64)
    return lengths


def tensor(value: Tensor, path: Path, form: str) -> TensorState:
    if form == "safetensors":
        save_file({"w": value.contiguous()}, path)
    else:
        torch.save({"w": value}, path, _use_new_zipfile_serialization=form == "zip")
    return read_checkpoint(path)["w"]


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize(
    "lay",
    [
        lambda t: t,
        lambda t: t.t().contiguous().t(),  # another order in memory, without gaps
        lambda t: torch.stack([t, t + 1], -1)[..., 0],  # gaps
    ],
    ids=["plain", "transposed", "gaps"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.uint8])
def test_any_changed_value_is_found_whatever_the_layout(
    tmp_path: Path, reads: Reads, form: str, lay: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    value = (torch.randn(40, 50) * 50).to(dtype)
    base = tensor(lay(value), tmp_path / "base", form)
    assert same_bits(base, tensor(lay(value), tmp_path / "same", form))
    assert same_bits(base, tensor(value, tmp_path / "plain", form))
    assert difference(base, tensor(value, tmp_path / "plain", form)) == (0, 0.0)
    for place in ((0, 0), (39, 49), (17, 3)):
        moved = value.clone()
        moved[place] = moved[place] * 2 + 1
        other = tensor(lay(moved), tmp_path / "other", form)
        assert not same_bits(base, other)
        assert not same_bits(other, base)
        count, size = difference(base, other)
        expected = (moved.real.double() - value.real.double()).abs().max()
        assert (count, size) == (1, pytest.approx(float(expected)))


def test_checksums_prove_a_difference_without_reading(tmp_path: Path, reads: Reads) -> None:
    value = torch.randn(1000)
    one, same = tensor(value, tmp_path / "a", "zip"), tensor(value, tmp_path / "b", "zip")
    other = tensor(value + 1, tmp_path / "c", "zip")
    reads.clear()
    assert not same_bits(one, other)
    assert same_bits(one, same, checksums=True)
    assert reads == []
    assert same_bits(one, same)  # what counts as frozen is compared by its bytes
    assert sum(reads) == 8000


def test_without_checksums_the_first_difference_ends_it(tmp_path: Path, reads: Reads) -> None:
    value = torch.randn(100_000)
    moved = value.clone()
    moved[100] += 1
    one, other = (tensor(t, tmp_path / name, "safetensors") for name, t in (("a", value), ("b", moved)))
    reads.clear()
    assert not same_bits(one, other, checksums=True)
    assert reads == [256] * 4


def test_damage_is_found_piece_by_piece_too(tmp_path: Path, reads: Reads) -> None:
    value = torch.randn(1000)
    one, other = tensor(value, tmp_path / "a", "zip"), tensor(value, tmp_path / "b", "zip")
    raw = bytearray((tmp_path / "b").read_bytes())
    raw[raw.index(value.numpy().tobytes()) + 3999] ^= 1
    (tmp_path / "b").write_bytes(raw)
    other = read_checkpoint(tmp_path / "b")["w"]
    with pytest.raises(CheckpointError, match=r"damaged: checksum of storage .* does not match"):
        _ = [None for _ in other.read.pieces(256)]  # type: ignore[attr-defined]
    assert not same_bits(one, other)


def test_a_cast_copy_is_close(tmp_path: Path, reads: Reads) -> None:
    value = torch.randn(1000)
    one, half = tensor(value, tmp_path / "a", "zip"), tensor(value.half(), tmp_path / "b", "zip")
    assert close(one, half)
    value[999] += 0.1
    assert not close(one, tensor(value.half(), tmp_path / "c", "zip"))
