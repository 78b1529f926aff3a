"""Many checkpoints of a run: when a layer began to move, how fast, how it went on, and what is left out."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor, nn

import freezekit
from freezekit import CheckpointError, DriftReport, FreezekitError, SelectionError, audit_checkpoint
from freezekit.audit.course import Point, course
from freezekit.audit.trend import run_order

State = dict[str, Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    zoo.scramble(model)
    for layer in (model[1], model[4]):
        layer.num_batches_tracked.fill_(100)
    return model


def batch(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(8, 1, 10, 10) * 1.5 + seed / 50


def run(
    tmp_path: Path,
    prepare: Callable[[nn.Sequential], object],
    each: Callable[[nn.Sequential, int], object] = lambda model, epoch: model.train(),
    *,
    after: Callable[[nn.Sequential, int], object] = lambda model, epoch: None,
    lightning: bool = False,
    epochs: int = 5,
) -> tuple[Path, list[Path]]:
    """Train ten steps an epoch with Adam, saving a checkpoint after each; return the base and them."""
    model = net()
    base = tmp_path / "base.pth"
    torch.save(copy.deepcopy(model.state_dict()), base)
    prepare(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    folder = tmp_path / "run"
    folder.mkdir()
    paths = []
    for epoch in range(epochs):
        each(model, epoch)
        if any(p.requires_grad and p not in optimizer.state for p in model.parameters()):
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(10):
            optimizer.zero_grad()
            model(batch(10 * epoch + step)).square().mean().backward()
            optimizer.step()
        after(model, epoch)
        if lightning:
            content: object = {
                "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
                "global_step": 10 * (epoch + 1), "epoch": epoch, "pytorch-lightning_version": "2.5.0",
                "optimizer_states": [optimizer.state_dict()],
            }  # fmt: skip
            paths.append(folder / f"epoch={epoch}-step={10 * (epoch + 1)}.ckpt")
        else:
            content = model.state_dict()
            paths.append(folder / f"model_{epoch + 8}.pth")  # 8, 9, 10: not the order of the letters
        torch.save(content, paths[-1])
    return base, paths


def naive(model: nn.Sequential) -> None:
    model[:8].requires_grad_(False)


def told(report: DriftReport) -> list[tuple[str, str, int | None, str]]:
    return [(f.code, f.name, f.step, f.message.partition("; ")[2]) for f in report.findings]


def shifts(base: Path, paths: list[Path], layer: str) -> list[float]:
    """How far a layer's mean is from the base, by torch."""
    before = torch.load(base)
    sigma = (before[f"{layer}.running_var"].double() + 1e-5).sqrt()
    found = []
    for path in paths:
        state = torch.load(path)
        state = {n.removeprefix("model."): t for n, t in state.get("state_dict", state).items()}
        moved = state[f"{layer}.running_mean"].double() - before[f"{layer}.running_mean"].double()
        found.append(float((moved.abs() / sigma).max()))
    return found


class TestRuns:
    def test_naive_freezing(self, tmp_path: Path) -> None:
        base, paths = run(tmp_path, naive)
        report = audit_checkpoint(map(str, paths), base)
        assert not report.clean
        assert report.source == str(paths[-1])
        assert report.against == str(base)
        assert (report.scope, report.compared, report.unit) == (
            "inferred: 2 of 2 BN layers kept their parameters bit for bit in all 5 checkpoints",
            10,
            "checkpoint",
        )
        assert [one.source for one in report.checkpoints] == list(map(str, paths))
        assert [(one.step, one.changed, one.layers) for one in report.checkpoints] == [
            (k, 6, 2) for k in range(1, 6)
        ]
        for layer in report.layers:
            expected = shifts(base, paths, layer.name)
            assert [m.mean_shift_sigma for m in layer.timeline] == pytest.approx(expected)
            assert [m.num_batches_tracked for m in layer.timeline] == [110, 120, 130, 140, 150]
            assert (layer.step, layer.changed, layer.batches) == (1, True, 50)
            assert len(layer.scatter) == 8
        worst = [max(pair) for pair in zip(*(shifts(base, paths, n) for n in "14"), strict=True)]
        assert [one.mean_shift_sigma for one in report.checkpoints] == pytest.approx(worst)
        assert {(f.code, f.step) for f in report.findings} == {("FK101", 1)}
        for finding in report.findings:
            assert "moved first by checkpoint 1, the first checkpoint; steady since" in finding.message
        assert DriftReport.from_json(report.to_json()) == report
        assert str(report)

    def test_properly_frozen(self, tmp_path: Path) -> None:
        base, paths = run(tmp_path, freezekit.freeze_backbone)
        report = audit_checkpoint(paths[0].parent, base)
        assert report.clean
        assert report.findings == ()
        assert len(report.checkpoints) == 5
        assert {(one.changed, one.layers, one.mean_shift_sigma) for one in report.checkpoints} == {
            (0, 0, 0.0)
        }
        assert all(layer.timeline == () for layer in report.layers)
        assert DriftReport.from_json(report.to_json()) == report

    def test_eval_at_first_in_lightnings_files(self, tmp_path: Path) -> None:
        base, paths = run(tmp_path, naive, lambda model, epoch: model.train(epoch >= 2), lightning=True)
        report = audit_checkpoint(paths, base)
        assert report.unit == "step"
        assert [one.step for one in report.checkpoints] == [10, 20, 30, 40, 50]
        assert [one.changed for one in report.checkpoints] == [0, 0, 6, 6, 6]
        assert all(
            "moved first between step 20 and step 30; steady since" in f.message for f in report.findings
        )
        layer = report.layers[0]
        assert layer.step == 30
        assert [m.mean_shift_sigma for m in layer.timeline] == pytest.approx(shifts(base, paths, "1"))
        assert [m.num_batches_tracked for m in layer.timeline] == [100, 100, 110, 120, 130]
        rate = (shifts(base, paths, "1")[-1]) / 30 * 10
        assert f"about {rate:.2g} sigma per 10 steps" in report.findings[0].message

    def test_calibrated_at_the_end(self, tmp_path: Path) -> None:
        def after(model: nn.Sequential, epoch: int) -> None:
            if epoch == 4:
                torch.optim.swa_utils.update_bn([batch(k) for k in range(3)], model)

        base, paths = run(tmp_path, naive, after=after, lightning=True)
        report = audit_checkpoint(paths, base)
        for finding in report.findings:
            assert finding.message.endswith(
                "; counter set back between step 40 and step 50, as resetting, calibrating or loading does"
            )

    def test_unfrozen_on_the_way(self, tmp_path: Path) -> None:
        def each(model: nn.Sequential, epoch: int) -> None:
            model.train()
            if epoch == 3:
                model[3:].requires_grad_(True)

        base, paths = run(tmp_path, naive, each, lightning=True)
        report = audit_checkpoint(paths, base)
        assert report.scope == ("the optimizer in it never held them: 3 of 8 parameters in all 5 checkpoints")
        assert {finding.name for finding in report.findings} == {"1"}
        shift = shifts(base, paths, "4")[:3]
        assert any(
            note == "1 layer was not frozen to the end, and not judged: "
            f"4 at step 40; before that their mean had moved by up to {max(shift):.3g} sigma"
            for note in report.notes
        )

    def test_all_trained(self, tmp_path: Path) -> None:
        base, paths = run(tmp_path, lambda model: None)
        report = audit_checkpoint(paths, base)
        assert report.clean
        assert report.compared == 0

    def test_without_a_base_the_first_is_it(self, tmp_path: Path) -> None:
        _, paths = run(tmp_path, naive)
        report = audit_checkpoint(paths)
        assert report.against == str(paths[0])
        assert report.scope.endswith("in all 5 checkpoints, of which the first is the base")
        assert [one.changed for one in report.checkpoints] == [0, 6, 6, 6, 6]
        assert "moved first between checkpoint 1 and checkpoint 2" in report.findings[0].message

    def test_a_frozen_set_that_is_given(self, tmp_path: Path) -> None:
        base, paths = run(tmp_path, naive)
        report = audit_checkpoint(paths, base, frozen=["4", "8.bias"])
        assert [(f.code, f.name, f.step) for f in report.findings] == [
            ("FK101", "4", 1),
            ("FK103", "8.bias", 1),
        ]
        assert report.scope == "as given in all 5 checkpoints"
        assert (
            "; moved first by checkpoint 1, the first checkpoint; steady since" in report.findings[1].message
        )
        assert audit_checkpoint(paths, frozen=["4"]).checkpoints[0].changed == 0
        with pytest.raises(SelectionError, match="no layer or tensor matches"):
            audit_checkpoint(paths, base, frozen=["nothing"])

    def test_by_a_manifest(self, tmp_path: Path) -> None:
        model = net()
        manifest = freezekit.freeze_backbone(model).manifest()
        base, paths = run(tmp_path, naive)
        report = audit_checkpoint(paths, manifest=manifest)
        assert [one.changed for one in report.checkpoints] == [6] * 5
        assert [one.mean_shift_sigma for one in report.checkpoints] == [None] * 5
        assert report.findings[0].message == (
            "running_mean, running_var and num_batches_tracked are not what was frozen; moved first by "
            "checkpoint 1, the first checkpoint"
        )
        assert DriftReport.from_json(report.to_json()) == report
        far = audit_checkpoint(paths, base, manifest=manifest)
        assert [one.mean_shift_sigma for one in far.checkpoints] == [
            one.mean_shift_sigma for one in audit_checkpoint(paths, base).checkpoints
        ]


def saved(folder: Path, name: str, **changes: float) -> Path:
    """A checkpoint of the net with some statistics moved by a number, and a head of its own."""
    state = net().state_dict()
    torch.manual_seed(len(name))
    state["8.weight"] += torch.rand(4, 8)
    place: dict[str, object] = {}
    for key, value in changes.items():
        if key in ("global_step", "epoch"):
            place[key] = value
        else:
            state[f"{key[1:]}.running_mean"] += value
            state[f"{key[1:]}.num_batches_tracked"] += round(1000 * value)
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": state, **place}, folder / name)
    return folder / name


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.save(net().state_dict(), tmp_path / "base.pth")
    return tmp_path / "base.pth"


class TestCourses:
    def test_back_at_the_end(self, tmp_path: Path, base: Path) -> None:
        paths = [
            saved(tmp_path, f"{k}.pth", global_step=100 * k, _1=move)
            for k, move in enumerate([0, 0, 0.3, 0.5, 0], 1)
        ]
        report = audit_checkpoint(paths, base)
        assert not report.clean
        assert [one.changed for one in report.checkpoints] == [0, 0, 2, 2, 0]
        (finding,) = report.findings
        assert (finding.code, finding.name, finding.step) == ("FK101", "1", 300)
        sigma = (torch.load(base)["1.running_var"].min().double() + 1e-5).sqrt()
        assert finding.message == (
            f"running mean moved by up to {0.5 / sigma:.3g} sigma, spread by x1 over 500 batches at "
            "step 400; moved first between step 200 and step 300; as it was again at step 500"
        )
        assert report.layers[0].changed
        assert report.layers[0].mean_shift_sigma == 0
        assert report.changed == ("1.running_mean", "1.num_batches_tracked")
        assert DriftReport.from_json(report.to_json()) == report

    @pytest.mark.parametrize(
        ("moves", "expected"),
        [
            (
                [0, 0.3, 0.3, 0.3],
                "moved between epoch 1 and epoch 2, and not since: a jump, as loading or calibrating makes",
            ),
            ([0, 0.1, 0.2, 0.2], "moved first between epoch 1 and epoch 2; stopped at epoch 3, about 0.1 S"),
            ([0, 0, 0, 0.3], "moved first between epoch 3 and epoch 4"),
            (
                [0.1, 0.2, 0.3, 0.4],
                "moved first by epoch 1, the first checkpoint; steady since, about 0.1 S",
            ),
            (
                [0.1, 0.3, 0.31, 0.32],
                "moved first by epoch 1, the first checkpoint; steady since, levelling off",
            ),
            (
                [0, 0.1, 0.1, 0.3],
                "moved first between epoch 1 and epoch 2; moved on in 1 of 2 times since, about 0.1 S",
            ),
        ],
    )
    def test_shapes(self, moves: list[float], expected: str, tmp_path: Path, base: Path) -> None:
        paths = [saved(tmp_path, f"{k}.pth", epoch=k, _1=move) for k, move in enumerate(moves, 1)]
        (finding,) = audit_checkpoint(paths, base).findings
        sigma = float((torch.load(base)["1.running_var"].min().double() + 1e-5).sqrt())
        message = finding.message.partition("; ")[2]
        assert message == expected.replace("0.1 S", f"{0.1 / sigma:.2g} sigma per epoch")

    def test_one_layer_after_the_other(self, tmp_path: Path, base: Path) -> None:
        paths = [
            saved(tmp_path, "a.pth", global_step=1, _1=0.1),
            saved(tmp_path, "b.pth", global_step=1000, _1=0.2, _4=0.1),
        ]
        report = audit_checkpoint(paths, base)
        assert [(f.name, f.step) for f in report.findings] == [("1", 1), ("4", 1000)]
        assert [layer.step for layer in report.layers] == [1, 1000]

    def test_only_the_counter(self) -> None:
        points = [Point(k, k > 1, k, 0.0, k) for k in range(4)]
        assert course(points, "step") == "moved first between step 1 and step 2; steady since"

    def test_many_checkpoints_are_thinned(self, tmp_path: Path, base: Path) -> None:
        paths = [saved(tmp_path, f"{k}.pth", global_step=k, _1=k / 1000) for k in range(1, 301)]
        report = audit_checkpoint(paths, base)
        assert len(report.checkpoints) == 300
        steps = [moment.step for moment in report.layers[0].timeline]
        assert len(steps) <= 256
        assert (steps[0], steps[-1]) == (1, 300)
        assert DriftReport.from_json(report.to_json()) == report


class TestOrder:
    def test_by_the_files_steps_not_the_names(self, tmp_path: Path, base: Path) -> None:
        paths = [
            saved(tmp_path, "a.pth", global_step=300, epoch=3, _1=0.3),
            saved(tmp_path, "b.pth", global_step=100, epoch=1),
            saved(tmp_path, "c.pth", global_step=200, epoch=2, _1=0.1),
        ]
        report = audit_checkpoint(paths, base)
        assert [(os.path.basename(one.source), one.step) for one in report.checkpoints] == [
            ("b.pth", 100), ("c.pth", 200), ("a.pth", 300),
        ]  # fmt: skip
        assert report.source == str(paths[0])

    def test_by_the_steps_in_the_names(self, tmp_path: Path, base: Path) -> None:
        paths = [saved(tmp_path, f"step_{k}.pth") for k in (100, 20, 3)]
        report = audit_checkpoint(paths, base)
        assert [one.step for one in report.checkpoints] == [3, 20, 100]
        assert report.unit == "step"

    def test_as_given_where_nothing_tells(self, tmp_path: Path, base: Path) -> None:
        paths = [saved(tmp_path, name) for name in ("last.pth", "before.pth")]
        report = audit_checkpoint(paths, base)
        assert report.source == str(paths[1])
        assert run_order(["x/m_10.pth", "x/m_9.pth"]) == ["x/m_9.pth", "x/m_10.pth"]  # as a shell lists them
        assert run_order(["x/m_2.pth", "x/m_10.pth", "x/m_1.pth"])[0] == "x/m_2.pth"

    @pytest.mark.parametrize("same", [True, False])
    def test_a_copy_of_the_last_step(self, same: bool, tmp_path: Path, base: Path) -> None:
        paths = [
            saved(tmp_path, "a.ckpt", global_step=100, _1=0.1),
            saved(tmp_path, "b.ckpt", global_step=200, _1=0.2),
            saved(tmp_path, "last.ckpt", global_step=200, _1=0.2 if same else 0.4),
        ]
        report = audit_checkpoint(paths, base)
        assert len(report.checkpoints) == (2 if same else 3)
        assert (
            "left out last.ckpt: of the same step as b.ckpt, and the same in all that is compared"
            in report.notes
        ) == same
        assert DriftReport.from_json(report.to_json()) == report


class TestLeftOut:
    def test_a_file_that_a_crash_cut_off(self, tmp_path: Path, base: Path) -> None:
        paths = [saved(tmp_path, f"{k}.pth", global_step=k) for k in (1, 2, 3)]
        paths[1].write_bytes(paths[1].read_bytes()[:-3000])
        report = audit_checkpoint(paths, base)
        assert report.clean
        assert [one.step for one in report.checkpoints] == [1, 3]
        assert report.notes[0].startswith(f"left out, as it could not be read: {paths[1]}: ")
        # the verdict is on the last: without it there is none
        with pytest.raises(CheckpointError, match=r"2\.pth"):
            audit_checkpoint(paths[:2], base)
        with pytest.raises(CheckpointError, match=r"2\.pth"):
            audit_checkpoint(paths[:2])

    def test_damaged_values(self, tmp_path: Path, base: Path) -> None:
        paths = [saved(tmp_path, f"{k}.pth", global_step=k) for k in (1, 2, 3)]
        raw = bytearray(paths[1].read_bytes())
        mean = net().state_dict()["1.running_mean"].numpy().tobytes()
        raw[raw.index(mean)] ^= 1
        paths[1].write_bytes(raw)
        report = audit_checkpoint(paths, base)
        assert [one.step for one in report.checkpoints] == [1, 3]
        assert any("left out" in note and "2.pth" in note for note in report.notes)

    def test_none_is_readable(self, tmp_path: Path, base: Path) -> None:
        for name in "ab":
            (tmp_path / f"{name}.pth").write_bytes(b"nothing")
        with pytest.raises(CheckpointError, match=r"b\.pth: a text, not a checkpoint"):
            audit_checkpoint([tmp_path / "a.pth", tmp_path / "b.pth"], base)

    def test_one_that_is_not_there(self, tmp_path: Path, base: Path) -> None:
        paths = [saved(tmp_path, "a.pth"), tmp_path / "b.pth", saved(tmp_path, "c.pth")]
        with pytest.raises(CheckpointError, match=r"b\.pth: no such file"):
            audit_checkpoint(paths, base)
        with pytest.raises(FreezekitError, match="no checkpoint was given"):
            audit_checkpoint([], base)

    @pytest.mark.parametrize("with_base", [True, False])
    @pytest.mark.parametrize("odd", [0, 1, 2])
    def test_another_model(self, odd: int, with_base: bool, tmp_path: Path, base: Path) -> None:
        paths = [saved(tmp_path, f"{k}.pth", global_step=k) for k in range(3)]
        bigger = nn.Sequential(*net(), *(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3)))
        torch.save({"state_dict": bigger.state_dict(), "global_step": odd}, paths[odd])
        with pytest.raises(FreezekitError, match="not of the same model as the other checkpoints") as caught:
            audit_checkpoint(paths, base if with_base else None)
        assert str(caught.value).startswith(f"{paths[odd]}: ")

    def test_one_path_is_no_run(self, tmp_path: Path, base: Path) -> None:
        path = saved(tmp_path / "run", "a.pth", _1=0.1)
        single = audit_checkpoint(path, base)
        assert audit_checkpoint([path], base) == single
        assert audit_checkpoint(tmp_path / "run", base) == single
        assert single.checkpoints == ()
        with pytest.raises(FreezekitError, match="nothing to compare the frozen layers with"):
            audit_checkpoint([path], frozen=["1"])


def test_no_torch_is_imported_and_little_memory_used(tmp_path: Path, base: Path) -> None:
    paths = [saved(tmp_path, f"{k}.pth", global_step=k, _1=k / 10) for k in range(5)]
    script = (
        "import sys, json; from freezekit import audit_checkpoint\n"
        f"report = audit_checkpoint({[str(path) for path in paths]!r}, {str(base)!r})\n"
        "print(json.dumps([len(report.checkpoints), 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [5, False]
