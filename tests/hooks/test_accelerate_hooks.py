"""A loop with a real Accelerator: accumulation, mixed precision, saved states, trackers, two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from freezekit import DriftError, FreezekitError, audit_checkpoint
from freezekit.hooks.accelerate import DriftAudit, FreezeBackbone

accelerate = pytest.importorskip("accelerate")

STAGES = {1: "layer2*", 2: ["layer1", "layer1_bn"]}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Accelerators share their state in a process, and the auditor leaves torch as it was."""
    ours = nn.Module.__setattr__
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert nn.Module.__setattr__ is ours


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name in ("layer1", "layer2"):
        layers[name] = nn.Linear(4, 4)
        layers[f"{name}_bn"] = nn.BatchNorm1d(4)
    layers["fc"] = nn.Linear(4, 2)
    return zoo.scramble(nn.Sequential(layers))  # type: ignore[return-value]


def batches() -> DataLoader[Any]:
    random = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 4, generator=random), torch.arange(32) % 2
    return DataLoader(TensorDataset(x, y), batch_size=4)


def start(**options: Any) -> Any:
    return accelerate.Accelerator(cpu=True, **options)


def train(
    accelerator: Any,
    model: Any,
    optimizer: Any,
    loader: Any,
    epochs: range,
    hook: Any,
    audit: Any,
    log: bool = False,
) -> None:
    step = 0
    for epoch in epochs:
        if hook is not None:
            hook.start_epoch(epoch)
        audit.start_epoch()
        for x, y in loader:
            with accelerator.accumulate(model):
                model.train()
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if log:
                accelerator.log(audit.scalars(), step=step)


@pytest.mark.parametrize(
    "options",
    [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 4}],
    ids=["plain", "bf16", "accumulation"],
)
def test_nothing_of_the_backbone_moves(options: dict[str, Any]) -> None:
    raw = net()
    before = {name: t.clone() for name, t in raw.state_dict().items() if "layer" in name}
    hook, audit, accelerator = FreezeBackbone(), DriftAudit(watch="all", probe=1), start(**options)
    optimizer = torch.optim.AdamW(raw.parameters(), lr=0.1, weight_decay=0.5)
    model, optimizer, loader = hook.prepare(accelerator, raw, optimizer, batches())
    audit.start(model, optimizer)
    train(accelerator, model, optimizer, loader, range(2), hook, audit)
    assert audit.auditor is not None
    assert audit.auditor.step == 16 // options.get("gradient_accumulation_steps", 1)
    report = audit.finish()
    assert report is not None
    assert report.clean, str(report)
    assert report.compared == len(before)
    assert all(torch.equal(raw.state_dict()[name], tensor) for name, tensor in before.items())
    assert not torch.equal(raw.fc.weight, net().fc.weight)  # type: ignore[union-attr, arg-type]


def test_the_naive_way_is_found_and_explained() -> None:
    raw, accelerator = net(), start(gradient_accumulation_steps=2)
    raw[:4].requires_grad_(False)
    audit = DriftAudit()
    model, optimizer, loader = accelerator.prepare(raw, torch.optim.SGD(raw.parameters(), lr=0.1), batches())
    audit.start(model, optimizer)
    with pytest.raises(
        DriftError, match="FK101 layer1_bn at step 1.*over 2 batches; cause: train-mode forward"
    ):
        train(accelerator, model, optimizer, loader, range(1), None, audit)
    audit.stop()


def test_a_resumed_run_ends_as_the_whole_one(tmp_path: Path) -> None:
    def prepared() -> tuple[Any, ...]:
        raw, accelerator = net(), start()
        hook, audit = FreezeBackbone(unfreeze=STAGES), DriftAudit(watch="all")
        optimizer = torch.optim.AdamW(raw.parameters(), lr=0.1, weight_decay=0.5)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
        model, optimizer, loader, schedule = hook.prepare(accelerator, raw, optimizer, batches(), schedule)
        return accelerator, model, optimizer, loader, hook, audit

    accelerator, model, optimizer, loader, hook, audit = prepared()
    audit.start(model, optimizer)
    for epoch in range(4):
        train(accelerator, model, optimizer, loader, range(epoch, epoch + 1), hook, audit)
        accelerator.save_state(str(tmp_path / str(epoch)))
    assert audit.finish() is not None
    whole = accelerator.unwrap_model(model).state_dict()
    for epoch in range(3):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator, model, optimizer, loader, hook, audit = prepared()
        accelerator.load_state(str(tmp_path / str(epoch)))
        audit.start(model, optimizer)
        train(accelerator, model, optimizer, loader, range(epoch + 1, 4), hook, audit)
        audit.finish()
        for name, tensor in accelerator.unwrap_model(model).state_dict().items():
            assert torch.equal(tensor, whole[name]), (epoch, name)


def test_the_saved_states_frozen_part_is_audited(tmp_path: Path) -> None:
    raw, accelerator, hook = net(), start(), FreezeBackbone()
    model, optimizer, loader = hook.prepare(
        accelerator, raw, torch.optim.SGD(raw.parameters(), lr=0.1), batches()
    )
    train(accelerator, model, optimizer, loader, range(1), hook, DriftAudit())
    accelerator.save_state(str(tmp_path / "state"))
    hook.manifest().save(tmp_path / "frozen.json")
    report = audit_checkpoint(tmp_path / "state" / "model.safetensors", manifest=tmp_path / "frozen.json")
    assert report.clean
    assert report.compared == 14


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trackers_get_the_scalars(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    raw, accelerator = net(), start(log_with="tensorboard", project_dir=str(tmp_path))
    raw[:4].requires_grad_(False)
    accelerator.init_trackers("run")
    audit = DriftAudit(on_drift="record")
    model, optimizer, loader = accelerator.prepare(raw, torch.optim.SGD(raw.parameters(), lr=0.1), batches())
    audit.start(model, optimizer)
    train(accelerator, model, optimizer, loader, range(1), None, audit, log=True)
    report = audit.finish()
    accelerator.end_training()
    assert report is not None
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    shifts = events.Scalars("freezekit/layer1_bn/mean_shift_sigma")
    assert [event.step for event in shifts] == list(range(1, 9))
    assert shifts[-1].value == pytest.approx(report.layers[0].mean_shift_sigma)
    assert events.Scalars("freezekit/changed")[-1].value == len(report.changed)


def two_processes() -> None:
    """Run by ``test_two_processes``, once on each rank."""
    raw, accelerator = net(), start()
    assert accelerator.num_processes == 2
    hook, audit = FreezeBackbone(), DriftAudit(watch="all")
    before = {name: t.clone() for name, t in raw.state_dict().items() if "layer" in name}
    optimizer = torch.optim.SGD(raw.parameters(), lr=0.1)
    model, optimizer, loader = hook.prepare(accelerator, raw, optimizer, batches())
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    audit.start(model, optimizer)
    train(accelerator, model, optimizer, loader, range(2), hook, audit)
    report = audit.finish()
    assert report is not None
    assert report.clean
    assert not report.changed
    assert all(torch.equal(raw.state_dict()[name], tensor) for name, tensor in before.items())
    heads = accelerator.gather(raw.fc.weight.detach().flatten()[None])  # type: ignore[union-attr, operator]
    assert torch.equal(heads[0], heads[1])
    with pytest.raises(FreezekitError, match="unfreeze=: DistributedDataParallel would leave"):
        FreezeBackbone(unfreeze=STAGES).prepare(
            accelerator, net(), torch.optim.SGD(net().parameters(), lr=0.1)
        )
    accelerator.end_training()


def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import test_accelerate_hooks\ntest_accelerate_hooks.two_processes()\n")
    here = Path(__file__).parent
    path = os.pathsep.join(
        [str(here.parent.parent), str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command = [*command[:4], "--standalone", str(script)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
