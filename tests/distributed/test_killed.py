"""A rank dies in a step or in a save: the last good checkpoint loads, nothing half-written is accepted."""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from distributed.ranks import Dead, die, run
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from freezekit import Manifest, audit_checkpoint, freeze_backbone, trainable_parameters
from freezekit.cli import main
from freezekit.errors import CheckpointError, FreezekitError

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
    pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard needs a GPU"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch"),
]

MOMENTS = ("before its shard", "in its shard", "before .metadata", "in .metadata", "in its place")
NEW, OVER, OTHER = "a new folder", "over the last", "over another run's"


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    backbone[1].running_mean.normal_()
    backbone[1].num_batches_tracked.fill_(100)
    return nn.Sequential(backbone, nn.Linear(6 * 36, 4))


class Run:
    """A run on each rank, as it saves itself and goes on."""

    def __init__(self, seed: int = 0) -> None:
        self.model = network(seed)
        self.manifest = freeze_backbone(self.model, head="1").manifest()
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(trainable_parameters(self.model), lr=0.1)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 3, 8, 8)).pow(2).mean().backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "freezekit_manifest": self.manifest.to_json()}

    def save(self, folder: Path) -> None:
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **parts)
        self.manifest = Manifest.from_json(state["freezekit_manifest"])

    def whole(self) -> dict[str, Tensor]:
        """Return the model and the momentum, unsharded."""
        moments = {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        return {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
            for name, tensor in (self.model.state_dict() | moments).items()
        }


def verified(run: Run) -> str:
    try:
        run.manifest.verify(run.model)
    except FreezekitError as error:
        return error.what
    return "verified"


def dying_in(moment: str, rank: int) -> Any:
    """Return a patch by which one rank dies in the next save."""

    def now(*args: Any, **kwargs: Any) -> None:
        die()

    def half(transforms: Any, stream: Any, *args: Any) -> None:
        half_pickled(None, stream)

    def half_pickled(value: Any, stream: Any) -> None:
        stream.write(b"\x80\x04")
        stream.flush()
        die()

    who, target, name, instead = {
        "before its shard": (1, filesystem.FileSystemWriter, "write_data", now),
        "in its shard": (1, filesystem, "_write_item", half),
        "before .metadata": (0, filesystem.FileSystemWriter, "finish", now),
        "in .metadata": (0, filesystem.pickle, "dump", half_pickled),
        "in its place": (0, filesystem.FileSystem, "rename", now),
    }[moment]
    return mock.patch.object(target, name, instead) if rank == who else nullcontext()


def started(rank: int, folder: Path) -> Run:
    """Return a run that has saved a good checkpoint, and what was in it."""
    warnings.simplefilter("ignore")
    run = Run()
    run.step()
    run.save(folder / "run" / "step-1")
    good = run.whole()
    if rank == 0:
        torch.save(good, folder / "good.pt")
        shutil.copytree(folder / "run" / "step-1", folder / "last")
        for file in (folder / "last").iterdir():
            os.utime(file, (1_700_000_000, 1_700_000_000))  # long ago
    dist.barrier()
    return run


def saving(rank: int, folder: Path, moment: str, place: str) -> str:
    """Train on, and die in the next save; what the others see is gloo's error."""
    run = started(rank, folder)
    run = Run(seed=1) if place == OTHER else run
    run.step()
    try:
        with dying_in(moment, rank):
            run.save(folder / ("run/step-2" if place == NEW else "last"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def stepping(rank: int, folder: Path, moment: str) -> str:
    """Train on, and die in a step."""
    run = started(rank, folder)
    if rank == 1 and moment == "in backward":
        run.model[1].register_full_backward_pre_hook(lambda module, grads: die())
    if rank == 1 and moment == "before the step":
        run.optimizer.register_step_pre_hook(lambda *args: die())
    try:
        run.step()
        run.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "stepped"


def resuming(rank: int, folders: list[Path]) -> list[tuple[str, dict[str, Tensor], str]]:
    """Go on in a new run of other ranks from the last checkpoint that is whole, as a recipe does."""
    warnings.simplefilter("ignore")
    found = []
    for folder in folders:
        run = Run(seed=2)
        last = max(path.parent for path in folder.glob("run/step-*/.metadata"))
        run.load(last)
        found.append((last.name, run.whole(), verified(run)))
        run.step()
    return found


def loading(rank: int, folder: Path) -> tuple[dict[str, Tensor], str]:
    """Load what may be a mixture."""
    warnings.simplefilter("ignore")
    run = Run(seed=2)
    run.load(folder)
    return run.whole(), verified(run)


CASES = [(moment, NEW) for moment in MOMENTS] + [
    (moment, OVER) for moment in MOMENTS if moment != "in .metadata"
]
CASES += [("before its shard", OTHER)]
STEPS = ("in backward", "before the step")


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[Path, list[Any]]]:
    """What each death left, and what the other rank said."""
    made = {}
    for case in (*CASES, *STEPS):
        folder = tmp_path_factory.mktemp("died")
        if case in STEPS:
            made[case] = folder, run(stepping, 2, folder, case, dying=[1])
        else:
            made[case] = folder, run(saving, 2, folder, *case, dying=[1 if "shard" in case[0] else 0])
    return made


@pytest.mark.parametrize("case", [*CASES, *STEPS])
def test_the_other_rank_ends_by_gloos_error(died: Any, case: Any) -> None:
    said = [each for each in died[case][1] if each is not Dead]
    assert len(said) == 1
    assert "gloo" in said[0]


def test_the_last_good_checkpoint_loads_on_other_ranks(died: Any) -> None:
    folders = [folder for folder, _ in died.values()]
    for rank in run(resuming, 3, folders):
        for folder, (name, whole, said) in zip(folders, rank, strict=True):
            assert (name, said) == ("step-1", "verified")
            good = torch.load(folder / "good.pt")
            assert whole.keys() == good.keys()
            assert "1.weight.exp_avg" in good
            assert all(torch.equal(whole[key], good[key]) for key in good)


@pytest.mark.parametrize("case", [*CASES, *STEPS])
def test_the_last_good_checkpoint_is_clean(died: Any, case: Any) -> None:
    report = audit_checkpoint(died[case][0] / "run" / "step-1")
    assert (report.clean, report.scope, report.notes) == (True, "as the manifest inside it says", ())


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_half_written_folder_is_refused(died: Any, moment: str) -> None:
    """Where each save has a folder of its own, torch itself guarantees that: .metadata comes last."""
    folder, _ = died[moment, NEW]
    for path in folder / "run" / "step-2", folder / "run":  # in the folder of the run it is the last one
        outcome = CliRunner().invoke(main, ["audit", str(path)])
        assert (outcome.exit_code, outcome.stdout) == (3, "")
        assert outcome.stderr == (
            f"freezekit: {folder}/run/step-2: a half-written torch.distributed.checkpoint folder (got no "
            ".metadata, which is written last). Remedy: copy the folder again, or take the checkpoint before "
            "it\n"
        )


@pytest.mark.parametrize(
    ("moment", "says"),
    [
        ("in its shard", "last/__1_0.distcp: truncated or hostile: .* lies beyond the file's end"),
        ("in its place", "last: a half-written torch.distributed.checkpoint folder .got no .metadata"),
    ],
)
def test_what_a_save_over_the_last_one_left(died: Any, moment: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"{says}.*Remedy: copy the folder again, or take the check"):
        audit_checkpoint(died[moment, OVER][0] / "last")


@pytest.mark.parametrize(
    ("moment", "late"),
    [
        ("before its shard", "__0_0.distcp is"),
        ("before .metadata", "__0_0.distcp and 1 more are"),
    ],
)
def test_shards_newer_than_the_metadata_are_told_of(died: Any, moment: str, late: str) -> None:
    """Nothing in the bytes tells that; who copies a folder may leave it so."""
    report = audit_checkpoint(died[moment, OVER][0] / "last")
    said = (
        f"{late} newer than .metadata, which is written last: the folder was copied so, or a save over it was"
        " cut off and it is a mixture of two; save into a new folder each time"
    )
    assert (report.clean, report.notes) == (True, (said,))


def test_torch_takes_a_mixture_and_the_manifest_does_not(died: Any) -> None:
    """The naive way: a save over the last checkpoint, cut off where rank 1 would have begun."""
    same, other = (died["before its shard", place][0] for place in (OVER, OTHER))
    good = torch.load(same / "good.pt")
    for whole, said in run(loading, 2, same / "last"):  # of one run: what is frozen is the same
        assert said == "verified"
        rows = (whole["1.weight"] == good["1.weight"]).all(1)
        assert rows.tolist() == [False, False, True, True]
    for whole, said in run(loading, 2, other / "last"):
        assert said.startswith("frozen tensors have other values in the model than when")
        rows = (whole["0.0.weight"] == network(0).state_dict()["0.0.weight"]).flatten(1).all(1)
        assert rows.tolist() == [False, False, False, True, True, True]
    outcome = CliRunner().invoke(main, ["audit", str(other / "last"), "--format", "json"])
    assert outcome.exit_code == 1
    codes = {(finding["code"], finding["name"]) for finding in json.loads(outcome.stdout)["findings"]}
    assert ("FK103", "0.0.weight") in codes


class Dying(io.FileIO):
    """A file whose writer dies."""

    def write(self, data: Any) -> int:
        written = super().write(data[: len(data) // 2])
        if self.tell() > 1_000:
            die()
        return written + super().write(data[written:])


def single_file(rank: int, folder: Path, way: str) -> str:
    """Rank 0 saves for all, as DDP's loops do, and dies in it."""
    model = network()
    manifest = freeze_backbone(model, head="1").manifest()
    state = {"model": model.state_dict(), "freezekit_manifest": manifest.to_json()}
    if rank == 0:
        torch.save(state, folder / "last.pt")
        manifest.save(folder / "frozen.json")
    try:
        dist.barrier()
        if rank == 0 and way == "manifest":
            with mock.patch("freezekit.jsonfile.os.fsync", side_effect=lambda file: die()):
                manifest.save(folder / "frozen.json")
        elif rank == 0:
            with Dying(folder / ("last.pt" if way == "naive" else "last.pt.part"), "w") as file:
                torch.save(state, file)
            os.replace(folder / "last.pt.part", folder / "last.pt")
        dist.barrier()
    except RuntimeError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("way", ["naive", "replaced", "manifest"])
def test_a_single_file(tmp_path: Path, way: str) -> None:
    dead, said = run(single_file, 2, tmp_path, way, dying=[0])
    assert dead is Dead
    assert "gloo" in said
    outcome = CliRunner().invoke(main, ["audit", str(tmp_path / "last.pt")])
    if way == "naive":
        assert (outcome.exit_code, outcome.stderr.count("\n")) == (3, 1)
        assert "last.pt: " in outcome.stderr
        return
    assert outcome.exit_code == 0
    manifest = Manifest.load(tmp_path / "frozen.json")
    assert manifest == Manifest.load(tmp_path / "last.pt")
    manifest.verify(network())
    with pytest.raises(FreezekitError, match="other values"):
        manifest.verify(network(1))
