"""Folders of torch.distributed.checkpoint: audited as the gathered file is, and taken up on other ranks."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from distributed.ranks import run
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from freezekit import (
    Manifest,
    audit_checkpoint,
    freeze,
    freeze_backbone,
    restore_checkpoint,
    trainable_parameters,
)
from freezekit.cli import main
from freezekit.errors import CheckpointError
from freezekit.hooks.loop import FreezeBackbone

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
    pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard needs a GPU"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch"),
]

BACKBONE = ["0", "1", "3", "4"]


def network() -> nn.Module:
    """Some layers have fewer rows than there are ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Conv2d(5, 1, 3), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3)),
    )
    for norm in (model[1], model[4]):  # as pretraining leaves them
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(100)
    return model


def tower() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def batch(rank: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank))


def train(model: nn.Module, optimizer: Any, x: Tensor, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).float().pow(2).mean().backward()
        optimizer.step()


def naive(model: nn.Module, head: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(head))
    return model


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model[0])
    return fully_shard(model)


class App:
    """As torch's tutorial has it."""

    def __init__(self, model: nn.Module, optimizer: Any, manifest: str) -> None:
        self.model, self.optimizer, self.manifest = model, optimizer, manifest

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer, "freezekit_manifest": self.manifest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def saved_by(rank: int, text: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what is saved, by name."""
    x = batch(rank, 4, 3, 8, 8)

    def frozen(wrap: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, Any]:
        model = network()
        freeze_backbone(model, head="6")
        made = wrap(model)
        optimizer = torch.optim.AdamW(trainable_parameters(model))
        train(made, optimizer, x)
        return made, optimizer

    def ddp() -> dict[str, Any]:
        model, optimizer = frozen(DistributedDataParallel)
        return {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
            "freezekit_manifest": text,
            "epoch": 3,
        }

    def fsdp() -> dict[str, Any]:
        model, optimizer = frozen(sharded)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optim": optimizer_state, "freezekit_manifest": text}

    def app() -> dict[str, Any]:
        return {"app": App(*frozen(sharded), text)}

    def hook(unfreeze: dict[int, str] | None = None) -> dict[str, Any]:
        model, own = network(), FreezeBackbone(head="6", unfreeze=unfreeze)
        own.freeze(model)
        own.manifest()
        sharded(model)
        optimizer = torch.optim.AdamW(model.parameters())
        own.start(optimizer)
        own.start_epoch(0)
        train(model, optimizer, x)
        return {"model": get_model_state_dict(model), "freeze": own}

    def drifted(flat: bool = False) -> dict[str, Any]:
        model = sharded(naive(network(), "6"))
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer, x)
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        inside = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
        # as torchtitan has it: all in one
        return {**get_model_state_dict(model), **inside} if flat else {"model": model.state_dict(), **inside}

    def alone() -> dict[str, Any]:
        model = sharded(naive(network(), "6"))
        train(model, torch.optim.SGD(model.parameters(), 0.1), x)
        return get_model_state_dict(model)

    def parts() -> dict[str, Any]:
        model = sharded(naive(network(), "6"))
        train(model, torch.optim.SGD(model.parameters(), 0.1), x)
        return {"model": get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))}

    def half() -> dict[str, Any]:
        model = sharded(network().bfloat16())
        freeze_backbone(model, head="6")
        optimizer = torch.optim.AdamW(trainable_parameters(model))
        train(model, optimizer, x.bfloat16())
        return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}

    def columns() -> dict[str, Any]:
        """Cut along the second axis, and along two where there are ranks for it."""
        world = dist.get_world_size()
        mesh = init_device_mesh("cpu", (2, 2) if world == 4 else (world,))
        cuts = [[Shard(1), Shard(0)], [Shard(0), Shard(1)]] if world == 4 else [[Shard(1)], [Shard(0)]]
        state = network().state_dict()
        return {
            name: distribute_tensor(tensor, mesh, cuts[index % 2]) if tensor.dim() > 1 else tensor
            for index, (name, tensor) in enumerate(state.items())
        }

    def parallel() -> dict[str, Any]:
        """Tensor parallel, and FSDP2 around it where there are ranks for it."""
        world = dist.get_world_size()
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        model = naive(tower(), "4")
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if world == 4:
            fully_shard(model, mesh=mesh["data"])
        optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
        train(model, optimizer, batch(rank // 2, 4, 8))
        return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}

    return {
        "ddp": ddp,
        "fsdp": fsdp,
        "app": app,
        "hook": hook,
        "stages": lambda: hook({5: "3"}),
        "drifted": drifted,
        "flat": lambda: drifted(True),
        "alone": alone,
        "parts": parts,
        "half": half,
        "columns": columns,
        "parallel": parallel,
    }


def saving(rank: int, folder: Path, text: str) -> None:
    warnings.simplefilter("ignore")
    for name, make in saved_by(rank, text).items():
        dcp.save(make(), checkpoint_id=folder / name)


INSIDE = "as the manifest inside it says"
NEVER = "the optimizer in it never {} them: {} parameters"
NORMS = "inferred: {} of {} kept their parameters bit for bit"
FROZEN = {"fsdp": INSIDE, "ddp": INSIDE, "app": INSIDE, "hook": INSIDE, "stages": INSIDE}
FROZEN |= {"half": NEVER.format("held", "8 of 10")}
DRIFTED = dict.fromkeys(("drifted", "flat"), NEVER.format("stepped", "8 of 10"))
DRIFTED |= {"alone": NORMS.format(2, "2 BN layers"), "parallel": NEVER.format("stepped", "6 of 8")}
DRIFTED["parts"] = NORMS.format(0, "2 BN layers") + ", 2 are saved without them"
UNTRAINED = {"columns": NORMS.format(2, "2 BN layers")}
TOLD = FROZEN | DRIFTED | UNTRAINED
WORLDS = (2, 4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name, model in ("base", network()), ("tower", tower()), ("half", network().bfloat16()):
        torch.save(model.state_dict(), folder / f"{name}.pt")
    manifest = freeze_backbone(network(), head="6").manifest()
    manifest.save(folder / "frozen.json")
    for world in WORLDS:
        run(saving, world, folder / str(world), manifest.to_json())
        for each in list((folder / str(world)).iterdir()):
            dcp_to_torch_save(each, f"{each}.pt")
    return folder


def base_of(saved: Path, name: str) -> Path:
    return saved / f"{ {'parallel': 'tower', 'half': 'half'}.get(name, 'base') }.pt"


def told(path: Path, **asked: Any) -> dict[str, Any]:
    text = audit_checkpoint(path, **asked).to_json()
    return json.loads(text.replace(json.dumps(str(path))[1:-1], "PATH"))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", TOLD)
def test_the_report_is_that_of_the_gathered_file(saved: Path, name: str, world: int) -> None:
    folder, file, base = saved / str(world) / name, saved / str(world) / f"{name}.pt", base_of(saved, name)
    first = "3" if name == "parallel" else BACKBONE
    questions = {"alone": {}, "against": {"against": base}, "frozen": {"against": base, "frozen": first}}
    if base.stem == "base":
        questions["manifest"] = {"manifest": saved / "frozen.json"}
        questions["both"] = {"manifest": saved / "frozen.json", "against": base}
    for asked in questions.values():
        assert told(folder, **asked) == told(file, **asked)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", TOLD)
def test_the_frozen_set_is_told_and_what_moved(saved: Path, name: str, world: int) -> None:
    path = saved / str(world) / name
    report = audit_checkpoint(path, against=base_of(saved, name))
    assert report.scope == TOLD[name]
    norms = ["3"] if name == "parallel" else ["1", "4"]
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    moved = {f"{norm}.{kind}" for norm in norms for kind in kinds} if name in DRIFTED else set()
    assert set(report.changed) == moved
    if name in FROZEN and name != "half":
        assert told(path)["scope"] == INSIDE


@pytest.mark.parametrize("name", ["fsdp", "drifted"])
def test_the_command_line_says_the_same(saved: Path, name: str) -> None:
    folder, file = saved / "4" / name, saved / "4" / f"{name}.pt"
    for asked in ["--against", str(saved / "base.pt")], ["--manifest", str(saved / "frozen.json")]:
        for form in "table", "markdown", "html", "json":
            outcomes = [
                CliRunner().invoke(main, ["audit", str(path), *asked, "--format", form])
                for path in (folder, file)
            ]
            assert [outcome.exit_code for outcome in outcomes] == [int(name in DRIFTED)] * 2
            of_folder, of_file = outcomes[0].stdout, outcomes[1].stdout
            assert of_folder.split() == of_file.replace(str(file), str(folder)).split()


def test_a_run_of_folders_is_that_of_its_gathered_files(saved: Path, tmp_path: Path) -> None:
    """The second drifted; what a crash left between them is told of."""
    for step, name in (1, "fsdp"), (2, "drifted"):
        shutil.copytree(saved / "2" / name, tmp_path / "run" / f"step-{step}")
        (tmp_path / "files").mkdir(exist_ok=True)
        shutil.copy(saved / "2" / f"{name}.pt", tmp_path / "files" / f"step-{step}.pt")
    base = saved / "base.pt"
    texts = [audit_checkpoint(tmp_path / run, against=base).to_json() for run in ("run", "files")]
    texts = [text.replace(f"{tmp_path}/run", "RUN").replace(f"{tmp_path}/files", "RUN") for text in texts]
    assert texts[0] == texts[1].replace("RUN/step-1.pt", "RUN/step-1").replace("RUN/step-2.pt", "RUN/step-2")
    found = json.loads(texts[0])
    assert [checkpoint["step"] for checkpoint in found["checkpoints"]] == [1, 2]
    assert {finding["name"] for finding in found["findings"]} == {"1", "4"}
    shutil.copytree(tmp_path / "run" / "step-2", tmp_path / "run" / "step-3")
    (tmp_path / "run" / "step-2" / ".metadata").unlink()
    report = audit_checkpoint(tmp_path / "run", against=base)
    assert [checkpoint.step for checkpoint in report.checkpoints] == [1, 3]
    assert any("left out" in note and "step-2: a half-written" in note for note in report.notes)


def test_a_folder_is_restored_as_a_file(saved: Path, tmp_path: Path) -> None:
    asked = {"frozen": BACKBONE}
    with pytest.raises(CheckpointError, match=r"made one file by .*format_utils\.dcp_to_torch_save\(FOLD"):
        restore_checkpoint(saved / "4" / "drifted", saved / "base.pt", tmp_path / "restored.pt", **asked)
    restore_checkpoint(saved / "4" / "drifted.pt", saved / "base.pt", tmp_path / "restored.pt", **asked)
    assert audit_checkpoint(tmp_path / "restored.pt", against=saved / "base.pt", **asked).clean


def test_the_manifest_is_loaded_from_the_folder(saved: Path) -> None:
    given = Manifest.load(saved / "frozen.json")
    for name in FROZEN.keys() - {"half"}:
        assert Manifest.load(saved / "2" / name) == given
    with pytest.raises(CheckpointError, match="2/alone: a checkpoint that holds no manifest"):
        Manifest.load(saved / "2" / "alone")


# -- saved, and loaded on other ranks


def whole(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return the model and what the optimizer keeps for it, unsharded."""
    kept = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    every = {**model.state_dict(), **kept}
    return {n: t.full_tensor() if isinstance(t, DTensor) else t.clone() for n, t in every.items()}


WRAPPED = {"plain": lambda model: model, "ddp": DistributedDataParallel, "fsdp": sharded}


def going_on(rank: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Train through a stage, and save while training goes on."""
    warnings.simplefilter("ignore")
    found, beside = {}, dist.new_group(backend="gloo")  # or its collectives get mixed up with the training's
    for kind in ("plain", "fsdp"):
        model, hook = network(), FreezeBackbone(head="6", unfreeze={1: "3"})
        hook.freeze(model)
        hook.manifest()
        model = WRAPPED[kind](model)
        optimizer = torch.optim.AdamW(model.parameters())
        hook.start(optimizer)
        for epoch in range(2):
            hook.start_epoch(epoch)
            train(model, optimizer, batch(0, 4, 3, 8, 8))
        found[kind] = whole(model, optimizer)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "freeze": hook}
        saving = dcp.async_save(state, checkpoint_id=folder / kind, process_group=beside)
        train(model, optimizer, batch(1, 4, 3, 8, 8))
        saving.result()
    return found


def taken_up(rank: int, folder: Path, kind: str) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Load it as README says: what freezes first, then what is frozen and trained."""
    warnings.simplefilter("ignore")
    model, hook = network(), FreezeBackbone(head="6", unfreeze={1: "3"})
    nn.init.zeros_(model[0].weight)
    hook.freeze(model)
    dcp.load({"freeze": hook}, checkpoint_id=folder)
    inner = sharded(model) if kind == "fsdp" else model
    optimizer = torch.optim.AdamW(model.parameters())
    hook.start(optimizer)
    wrapped = DistributedDataParallel(inner) if kind == "ddp" else inner
    model_state, optimizer_state = get_state_dict(wrapped, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    parts = {"model_state_dict": model_state, "optim_state_dict": optimizer_state}
    set_state_dict(wrapped, optimizer, **parts)
    found = whole(model, optimizer)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    newly = hook.start_epoch(1)  # which verifies what was frozen
    train(wrapped, optimizer, batch(rank, 4, 3, 8, 8))
    Manifest.load(folder).verify(model)
    return found, trainable, newly


def naively(rank: int, folder: Path) -> str:
    """Take all of it up at once, while what had been unfrozen is frozen still."""
    warnings.simplefilter("ignore")
    model, hook = network(), FreezeBackbone(head="6", unfreeze={1: "3"})
    hook.freeze(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "freeze": hook}
    dcp.load(state, checkpoint_id=folder)
    hook.start(optimizer)
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    try:
        set_state_dict(model, optimizer, **parts)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def gone_on(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("gone_on")
    return folder, run(going_on, 2, folder)[0]


@pytest.mark.parametrize(("world", "kind"), [(1, "plain"), (4, "ddp"), (3, "fsdp")])
def test_a_run_is_taken_up_on_other_ranks(gone_on: Any, world: int, kind: str) -> None:
    """Bit for bit: weights, statistics and momentum, the stage that it had reached, and what is frozen."""
    folder, saved = gone_on
    for how, good in saved.items():
        assert {"3.weight.exp_avg", "6.bias.step"} < good.keys()
        assert "0.weight.exp_avg" not in good
        for found, trainable, newly in run(taken_up, world, folder / how, kind):
            assert found.keys() == good.keys()
            assert all(torch.equal(found[name], good[name]) for name in good)
            assert trainable == ["3.weight", "3.bias", "6.weight", "6.bias"]
            assert newly == []


def test_what_is_saved_while_training_goes_on_is_audited(gone_on: Any) -> None:
    folder, _ = gone_on
    frozen = [name for name in network().state_dict() if name[0] in "014"]
    for how in "plain", "fsdp":
        report = audit_checkpoint(folder / how)
        assert (report.clean, report.scope, report.compared) == (True, INSIDE, len(frozen))
        assert Manifest.load(folder / how).frozen == frozen


def test_the_optimizer_is_asked_after_the_stages(gone_on: Any) -> None:
    (said,) = run(naively, 1, gone_on[0] / "plain")
    assert said.startswith("Missing optimizer state for parameter '3.weight' in checkpoint.")


@pytest.mark.parametrize("parked", [True, False])
def test_momentum_of_what_is_frozen_is_not_in_it(tmp_path: Path, parked: bool) -> None:
    """torch saves that of the parameters in the optimizer, and loads that of what requires a gradient."""
    runs = []
    for _ in range(2):
        model = tower()
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer, batch(0, 4, 8))
        handle = freeze(model, "0", optimizer=optimizer if parked else None)
        runs.append((model, optimizer, handle))
    (model, optimizer, handle), (other, resumed, other_handle) = runs
    train(model, optimizer, batch(1, 4, 8))
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    assert ("0.weight" in state["optimizer"]["state"]) == (not parked)
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    template = dict(zip(("model", "optimizer"), get_state_dict(other, resumed), strict=True))
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    parts = {"model_state_dict": template["model"], "optim_state_dict": template["optimizer"]}
    set_state_dict(other, resumed, **parts)
    handle.undo()
    other_handle.undo()
    good, found = whole(model, optimizer), whole(other, resumed)
    assert {name for name in good if name not in found or not torch.equal(good[name], found[name])} == (
        set() if parked else {n for n in good if n.startswith("0.") and n.count(".") > 1}
    )
