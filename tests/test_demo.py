"""The demo runs, offline, and shows what it is meant to show."""

from __future__ import annotations

import io
import socket
from pathlib import Path

import pytest
import torch
from rich.console import Console

from freezekit import FreezekitError, audit_checkpoint, demo


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the demo must not use the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    before = torch.random.get_rng_state()
    out = io.StringIO()
    naive, ours = demo.run(str(tmp_path / "out"), Console(file=out, width=100, highlight=False))
    assert torch.equal(torch.random.get_rng_state(), before)

    assert not naive.live.clean
    assert not naive.disk.clean
    assert naive.live.changed == naive.disk.changed
    assert len(naive.live.changed) == 9
    assert (naive.live.findings[0].code, naive.live.findings[0].name, naive.live.findings[0].step) == (
        "FK101", "features.1", 1,
    )  # fmt: skip
    assert ours.live.clean
    assert ours.disk.clean
    assert ours.live.compared == naive.live.compared == 18
    # the old head on the frozen backbone is the old network, bit for bit: nothing can be lost
    assert naive.old_task < ours.old_task
    assert ours.old_task > 0.9

    text = out.getvalue()
    assert "requires_grad=False" in text
    assert "9 of 18" in text
    assert "features.1, step 1" in text
    assert "first FK101 features.1 at step 1" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "base.pth",
        "frozen.pth",
        "naive.pth",
    ]
    assert not audit_checkpoint(tmp_path / "out" / "naive.pth", tmp_path / "out" / "base.pth").clean

    with pytest.raises(FreezekitError, match=r"would overwrite files .got base.pth, naive.pth, frozen.pth"):
        demo.run(str(tmp_path / "out"))


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FreezekitError, match="cannot make the folder"):
        demo.run(str(tmp_path / "file" / "out"))


def test_both_heads_start_alike_and_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, batches = [], []

    def look(model: torch.nn.Module, *_: object) -> None:
        heads.append(model.get_submodule("classifier").weight.detach().clone())
        batches.append(torch.randperm(5).tolist())

    monkeypatch.setattr(demo, "_train", look)
    demo.run(console=Console(file=io.StringIO()))
    base, naive, ours = heads
    assert torch.equal(naive, ours)
    assert not torch.equal(naive, base)
    assert batches[1] == batches[2]


def test_what_the_demo_says_can_be_checked(tmp_path: Path) -> None:
    out = io.StringIO()
    arms = demo.run(str(tmp_path / "out"), Console(file=out, width=100, highlight=False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(demo._SEED)
        *_, new_test = demo._digits()
    for arm in arms:
        model = demo._network()
        model.load_state_dict(torch.load(arm.file))
        assert demo._accuracy(model, new_test) == arm.new_task
    naive, base = tmp_path / "out" / "naive.pth", tmp_path / "out" / "base.pth"
    assert f"freezekit audit {naive} --against {base}" in out.getvalue().splitlines()
