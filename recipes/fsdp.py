"""Fine-tune a head under FSDP2, save it with its manifest, resume from that, and unfreeze more.

    python recipes/fsdp.py                                     # starts two processes, on the CPU (gloo)
    python recipes/fsdp.py --steps 2                           # just a look
    torchrun --standalone --nproc-per-node 4 recipes/fsdp.py   # the same; on GPUs (nccl) where there are four

Freeze first, then shard. Each checkpoint of torch.distributed.checkpoint gets a folder of its own: .metadata
comes last, so that a folder without it is known not to be whole, and the one before it is still there. What
comes of each way is compared bit for bit, on each rank, with the weights that all started from.
Needs: pip install 'freezekit[demo]', and on the CPU a torch whose fully_shard runs there (2.6 does not)
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from freezekit import Manifest, audit_checkpoint, freeze_backbone

NAIVE, FROZEN = "requires_grad=False", "freeze_backbone"
BATCH = 4  # on each rank
STAGE = "backbone.2.0.weight"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
PATIENCE = 300  # seconds, for all of it


def network() -> nn.Module:
    stages: list[nn.Module] = []
    for channels, width, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        conv = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        stages.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
    backbone = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict(backbone=backbone, head=nn.Linear(64, 10)))


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for stage in model.backbone[:3]:
        fully_shard(stage, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def pretrained(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the weights of a network that knows the digits."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(4):
        for rows in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.state_dict()


def batches(loader: DataLoader, epochs: int) -> Iterator[list[Tensor]]:
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        yield from loader


def train(model: nn.Module, optimizer: Any, data: TensorDataset, steps: int | None) -> None:
    """Train on this rank's share of the digits."""
    model.train()  # a frozen layer stays in eval mode
    loader = DataLoader(data, BATCH, sampler=DistributedSampler(data))
    for x, y in itertools.islice(batches(loader, 2), steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return float((model(images).argmax(1) == labels).double().mean())


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put together what is sharded; all ranks must call this."""
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).cpu().clone() for n, t in tensors.items()}


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def momentum(optimizer: Any) -> dict[str, Tensor]:
    moments = {f"{k}.{key}": t for k, kept in enumerate(optimizer.state.values()) for key, t in kept.items()}
    return whole(moments)


def save(folder: Path, model: nn.Module, optimizer: Any, manifest: Manifest | None) -> None:
    """Save into a folder that is new: a save over the last checkpoint that is cut off would spoil it."""
    state = state_of(model, optimizer)
    if manifest is not None:
        state["freezekit_manifest"] = manifest.to_json()
    dcp.save(state, checkpoint_id=folder)


def last_in(run: Path) -> Path:
    """Return the last checkpoint that is whole."""
    return max((path.parent for path in run.glob("step-*/.metadata")), key=lambda path: int(path.name[5:]))


def begin(way: str, base: dict[str, Tensor], device: torch.device) -> tuple[nn.Module, Any, Manifest | None]:
    model, manifest = network().to(device), None
    model.load_state_dict(base)  # the same on every rank
    nn.init.zeros_(model.head.weight)
    if way == FROZEN:
        manifest = freeze_backbone(model).manifest()
    else:
        model.backbone.requires_grad_(False)
    shard(model, device)
    return model, torch.optim.AdamW(model.parameters(), lr=5e-3), manifest


def resume(run: Path, device: torch.device) -> tuple[nn.Module, Any, Any]:
    """Make all anew, as another process does, on as many ranks as there are by then."""
    folder = last_in(run)
    model, manifest = network().to(device), Manifest.load(folder)
    handle = manifest.restore(model, strict=False)  # its values are not loaded yet
    shard(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    manifest.verify(model)  # what was frozen is what was loaded, bit for bit
    return model, optimizer, handle


def finetune(
    way: str,
    base: dict[str, Tensor],
    folder: Path,
    data: TensorDataset,
    test: TensorDataset,
    steps: int | None,
) -> list[dict[str, Any]]:
    """Train a head, save, resume, unfreeze one convolution, train on, save; return what came of each."""
    device, run = data.tensors[0].device, folder / way
    found: list[dict[str, Any]] = []

    def look(what: str, frozen: set[str]) -> None:
        after = whole(model.state_dict())
        found.append(
            {
                "what": what,
                "frozen": frozen,
                "after": after,
                "differ": {name for name in frozen if not torch.equal(after[name], base[name])},
                "momentum": momentum(optimizer),
                "accuracy": accuracy(model, *test.tensors),
            }
        )

    backbone = {name for name in base if name.startswith("backbone.")}
    model, optimizer, manifest = begin(way, base, device)
    train(model, optimizer, data, steps)
    save(run / "step-1", model, optimizer, manifest)
    look("head", backbone)
    if way == NAIVE:
        return found
    # a process that starts here would do the same
    model, optimizer, handle = resume(run, device)
    look("resumed", set(handle.frozen))
    # its BN stays frozen, as each rank would count its own batches; the weight waits in the optimizer
    handle.unfreeze(STAGE)
    train(model, optimizer, data, steps)
    save(run / "step-2", model, optimizer, handle.manifest())
    look("last convolution", set(handle.frozen))
    return found


def audited(folder: Path) -> dict[str, list[Any]]:
    """Audit the folders without torch; one rank does."""
    by_base = audit_checkpoint(folder / NAIVE / "step-1", against=folder / "base.pt", frozen="backbone")
    by_manifest = [audit_checkpoint(folder / FROZEN / f"step-{n}") for n in (1, 2)]
    return {NAIVE: [by_base], FROZEN: [by_manifest[0], by_manifest[0], by_manifest[1]]}


def verify(ways: dict[str, list[list[dict[str, Any]]]], reports: dict[str, list[Any]]) -> None:
    """Assert what the recipe claims."""
    for way, ranks in ways.items():
        for looks in ranks:
            for look, report in zip(looks, reports[way], strict=True):
                statistics = {name for name in look["frozen"] if name.endswith(STATISTICS)}
                assert look["differ"] == (statistics if way == NAIVE else set()), look["differ"]
                # the files say the same, read without torch
                assert set(report.changed) == look["differ"]
                assert report.clean == (way == FROZEN)
    for head, resumed, stage in ways[FROZEN]:
        for part in "after", "momentum":  # what was loaded is what was saved
            assert head[part].keys() == resumed[part].keys()
            assert all(torch.equal(head[part][name], resumed[part][name]) for name in head[part])
        assert resumed["frozen"] - stage["frozen"] == {STAGE}
        assert not torch.equal(stage["after"][STAGE], head["after"][STAGE])
        first = ways[FROZEN][0][2]["after"]
        assert all(torch.equal(stage["after"][name], first[name]) for name in first)  # on all ranks
    for looks in ways[NAIVE][1:]:
        # FSDP shards parameters; statistics each rank keeps for itself, and the checkpoint has one rank's
        name = "backbone.0.1.running_mean"
        assert not torch.equal(looks[0]["after"][name], ways[NAIVE][0][0]["after"][name])


def table_of(ways: dict[str, list[list[dict[str, Any]]]], reports: dict[str, list[Any]]) -> Table:
    table = Table(title="a head fine-tuned on shifted digits under FSDP2")
    table.add_column("backbone frozen by", no_wrap=True)
    table.add_column("trained", no_wrap=True)
    for column in ("rank", "frozen changed", "accuracy"):
        table.add_column(column, justify="right")
    table.add_column("the audit of its folder")
    for way, ranks in ways.items():
        for k, report in enumerate(reports[way]):
            for rank, looks in enumerate(ranks):
                codes = sorted({finding.code for finding in report.findings})
                table.add_row(
                    *(("", "") if rank else ("" if k else way, looks[k]["what"])),
                    str(rank),
                    f"{len(looks[k]['differ'])} of {len(looks[k]['frozen'])}",
                    f"{looks[k]['accuracy']:.3f}",
                    "" if rank else ", ".join(codes) or f"clean, {report.compared} compared",
                )
    return table


def work(init_method: str, steps: int | None) -> None:
    """Do what each process does, whoever started it."""
    local = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        init_method=init_method,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=PATIENCE),
    )
    torch.manual_seed(0)
    first = dist.get_rank() == 0
    images, labels = digits()
    known, new, held_out = torch.randperm(len(images)).split([600, 900, 297])
    shifted = F.pad(images, (1, 0, 1, 0))[..., :8, :8]
    data, test = (
        TensorDataset(shifted[rows].to(device), labels[rows].to(device)) for rows in (new, held_out)
    )
    with tempfile.TemporaryDirectory(prefix="freezekit-recipe-") as temporary:
        # all save into rank 0's folder, which on several machines must be one that all see
        sent = [pretrained(images[known], labels[known]), temporary] if first else [None, None]
        dist.broadcast_object_list(sent, 0)
        base, folder = sent[0], Path(sent[1])
        if first:
            torch.save(base, folder / "base.pt")
        ways: dict[str, Any] = {}
        for way in (NAIVE, FROZEN):
            ways[way] = [None] * dist.get_world_size()
            dist.all_gather_object(ways[way], finetune(way, base, folder, data, test, steps))
        reports = [audited(folder) if first else None]
        dist.broadcast_object_list(reports, 0)
    if first:
        console = Console(highlight=False)
        console.width = max(console.width, 100)
        console.print(table_of(ways, reports[0]))
    verify(ways, reports[0])
    dist.destroy_process_group()


def start(rank: int, init_method: str, steps: int | None) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    work(init_method, steps)


@click.command()
@click.option("--steps", type=click.IntRange(min=2), help="Stop each training after so many steps.")
def main(steps: int | None) -> None:
    """Freeze a backbone under FSDP2, save, resume and unfreeze, and compare what became of it."""
    if "LOCAL_RANK" in os.environ:  # torchrun started this process
        work("env://", steps)
        return
    with tempfile.TemporaryDirectory(prefix="freezekit-recipe-") as folder:  # to meet in: no port is needed
        context = mp.spawn(start, (f"file://{folder}/store", steps), nprocs=2, join=False, daemon=True)
        end = time.monotonic() + PATIENCE
        try:
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    raise click.ClickException(f"not done after {PATIENCE} seconds")
        finally:
            for process in context.processes:
                process.kill()


if __name__ == "__main__":
    main()
