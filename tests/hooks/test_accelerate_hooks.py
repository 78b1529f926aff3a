"""Accelerate's hooks, in loops with a real Accelerator."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from click.testing import CliRunner
from torch import nn

from freezekit import DriftError, DriftReport, FreezekitError, trainable_parameters
from freezekit.cli import main

accelerate = pytest.importorskip("accelerate")

from freezekit.hooks.accelerate import DriftAudit, FreezeBackbone  # noqa: E402

STAGES = {1: "layer2*", 3: ["layer1", "layer1_bn"]}


@pytest.fixture(autouse=True)
def _a_state_of_its_own() -> Iterator[None]:
    """Accelerate's settings are those of the process, whoever made an Accelerator first."""

    def reset() -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    reset()
    yield
    reset()


def net() -> Any:
    torch.manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name in ("layer1", "layer2"):
        layers[name] = nn.Linear(4, 4)
        layers[f"{name}_bn"] = nn.BatchNorm1d(4)
    layers["fc"] = nn.Linear(4, 2)
    return zoo.scramble(nn.Sequential(layers))


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    now = model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, now[name])}


class Run:
    """A user's loop.

    Args:
        hook: what freezes, if anything.
        everything: whether the optimizer has all parameters, and a scheduler, or what trains at first.
        options: the Accelerator's.
    """

    def __init__(self, hook: FreezeBackbone | None, everything: bool = True, **options: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.hook, self.inner = hook, net()
        if hook is None:
            self.inner[:4].requires_grad_(False)
        else:
            hook.freeze(self.inner)
        parameters = self.inner.parameters() if everything else trainable_parameters(self.inner)
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
        self.model, self.optimizer = self.accelerator.prepare(self.inner, optimizer)
        if everything:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
            self.scheduler: Any = self.accelerator.prepare(scheduler)
        if hook is not None:
            hook.attach(self.accelerator, self.model, self.optimizer)
        self.audit = DriftAudit(watch="all")

    def train(self, epochs: range, folder: Path | None = None) -> None:
        self.audit.start(self.model, self.optimizer)
        for epoch in epochs:
            if self.hook is not None:
                self.hook.start_epoch(epoch)
            self.audit.start_epoch()
            for step in range(4):
                x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * epoch + step))
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model.train()(x).float().square().mean())
                    self.optimizer.step()
                    if hasattr(self, "scheduler"):
                        self.scheduler.step()
                    self.optimizer.zero_grad()
            if folder is not None:
                self.accelerator.save_state(str(folder / str(epoch)))
        self.audit.finish()


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}])
def test_nothing_of_the_backbone_moves(options: dict[str, Any]) -> None:
    run = Run(FreezeBackbone(), **options)
    before = state(run.inner)
    run.train(range(2))
    assert run.audit.report is not None
    assert run.audit.report.clean
    steps = 4 if "gradient_accumulation_steps" in options else 8
    assert run.audit.report.source == f"Sequential after {steps} steps"
    assert moved(run.inner, before) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}])
def test_the_naive_way_is_found_and_explained(options: dict[str, Any]) -> None:
    with pytest.raises(DriftError, match="FK101 layer1_bn at step 1: running mean moved.*train-mode forward"):
        Run(None, **options).train(range(1))


@pytest.mark.parametrize("everything", [True, False])
def test_a_resumed_run_ends_as_the_whole_one(everything: bool, tmp_path: Path) -> None:
    """The optimizer's state is loaded before any registered object's, and has what was unfrozen."""
    options: dict[str, Any] = {} if everything else {"decay": 0.5, "growth": 1.5}
    whole = Run(FreezeBackbone(unfreeze=STAGES, **options), everything)
    whole.train(range(5), tmp_path)
    for epoch in range(4):
        again = Run(FreezeBackbone(unfreeze=STAGES, **options), everything)
        again.accelerator.load_state(str(tmp_path / str(epoch)))
        again.train(range(epoch + 1, 5))
        assert moved(again.inner, state(whole.inner)) == set()


def test_the_same_run_can_go_back_to_an_earlier_state(tmp_path: Path) -> None:
    run = Run(FreezeBackbone(unfreeze=STAGES))
    run.train(range(5), tmp_path)
    end = state(run.inner)
    run.accelerator.load_state(str(tmp_path / "1"))
    assert run.hook is not None
    assert run.hook.handle is not None
    assert {name.partition(".")[0] for name in run.hook.handle.frozen} == {"layer1", "layer1_bn"}
    run.train(range(2, 5))
    assert moved(run.inner, end) == set()


def test_a_saved_state_whose_frozen_part_had_drifted(tmp_path: Path) -> None:
    """Told by the real command line, and refused at the first epoch after loading it."""
    from safetensors.torch import load_file, save_file

    Run(FreezeBackbone(unfreeze=STAGES)).train(range(2), tmp_path)
    folder = tmp_path / "1"
    command = ["audit", str(folder / "model.safetensors"), "--manifest", str(folder / "frozen.json")]
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, done.output.partition("\n")[0]) == (
        0, "CLEAN: none of 7 frozen tensors changed (2 layers with running statistics)"
    )  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    tensors["layer1_bn.running_mean"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, done.output[:5]) == (1, "DRIFT")
    again = Run(FreezeBackbone(unfreeze=STAGES))
    again.accelerator.load_state(str(folder))
    with pytest.raises(FreezekitError, match=r"other values in the model.*layer1_bn\.running_mean"):
        again.train(range(2, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_what_is_found_goes_to_the_trackers_and_to_a_file(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = Run(None, log_with="tensorboard", project_dir=str(tmp_path))
    run.accelerator.init_trackers("run")
    audit = DriftAudit(on_drift="record", save=tmp_path / "drift.json")
    audit.start(run.model, run.optimizer)
    for step in range(2):
        run.accelerator.backward(run.model.train()(torch.randn(8, 4)).square().mean())
        run.optimizer.step()
        audit.log(run.accelerator, step)
    run.accelerator.end_training()
    report = audit.finish()
    assert report is not None
    assert report == DriftReport.load(tmp_path / "drift.json")
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("freezekit/changed")] == [
        (0, 6.0),
        (1, 6.0),
    ]
    shifts = events.Scalars("freezekit/layer1_bn/mean_shift_sigma")
    assert shifts[-1].value == pytest.approx(report.layers[0].mean_shift_sigma)


SCRIPT = """
import torch
from accelerate import Accelerator, debug_launcher
from torch import nn

from freezekit import DriftError, FreezekitError
from freezekit.hooks.accelerate import DriftAudit, FreezeBackbone


def train(hook, folder):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    if hook is None:
        inner[:2].requires_grad_(False)
    else:
        hook.freeze(inner)
    optimizer = torch.optim.SGD([p for p in inner.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(inner, optimizer)
    if hook is not None:
        hook.attach(accelerator, model, optimizer)
    audit = DriftAudit(save=f"{folder}/drift.json")
    audit.start(model, optimizer)
    for step in range(2):
        random = torch.Generator().manual_seed(10 * step + accelerator.process_index)
        accelerator.backward(model.train()(torch.randn(8, 4, generator=random)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    if hook is not None:
        accelerator.save_state(f"{folder}/state")
    heads = accelerator.gather(inner[2].weight.detach()[None])
    return accelerator.num_processes, torch.equal(heads[0], heads[1]), str(audit.finish()).partition(":")[0]


def main(folder):
    say = print if Accelerator(cpu=True).is_main_process else lambda *_: None
    say(*train(FreezeBackbone(head="2"), folder))
    for hook in (None, FreezeBackbone(head="2", unfreeze={1: "0"})):
        try:
            train(hook, folder)
        except (DriftError, FreezekitError) as error:
            say(str(error)[:50])


if __name__ == "__main__":
    import sys

    debug_launcher(main, (sys.argv[1],))
"""


def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "train.py"), str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "2 True CLEAN",
        "FK101 1 at step 1: running mean moved by up to 0.0",
        "unfreeze=: DistributedDataParallel would leave wha",
    ], done.stderr
    assert (tmp_path / "state" / "frozen.json").is_file()
    assert (tmp_path / "drift.json").is_file()


def test_without_accelerate_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "freezekit.hooks.accelerate")
    with pytest.raises(
        FreezekitError, match=r"cannot be imported.*Remedy: pip install 'freezekit\[accelerate\]'$"
    ):
        importlib.import_module("freezekit.hooks.accelerate")


def test_a_state_that_was_saved_without_the_hook_is_refused_with_what_to_do(tmp_path: Path) -> None:
    accelerator, model, hook = accelerate.Accelerator(cpu=True), net(), FreezeBackbone(head="fc")
    hook.freeze(model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.save_state(str(tmp_path))
    hook.attach(accelerator, model, optimizer)
    with pytest.raises(FreezekitError, match=r"freezekit\.json: .*saved without this hook\. Remedy: load it"):
        accelerator.load_state(str(tmp_path))


def test_two_models_each_with_a_hook(tmp_path: Path) -> None:
    accelerator, hooks = accelerate.Accelerator(cpu=True), []
    for stages in (STAGES, {1: "layer2"}):
        model, hook = net(), FreezeBackbone(head="fc", unfreeze=stages)
        hook.freeze(model)
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        hook.attach(accelerator, prepared, optimizer)
        hook.start_epoch(1)
        hooks.append(hook)
    held = [list(hook.handle.frozen) for hook in hooks if hook.handle]
    assert held[0] != held[1]
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))
    assert [hook.start_epoch(1) for hook in hooks] == [[], []]
    assert [hook.handle.frozen for hook in hooks if hook.handle] == held
    assert {"frozen.json", "frozen_1.json"} <= {path.name for path in tmp_path.iterdir()}
