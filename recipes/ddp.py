"""Fine-tune a head under DistributedDataParallel, the backbone frozen in four ways, audited on every rank.

    python recipes/ddp.py                                      # starts two processes, on the CPU (gloo)
    python recipes/ddp.py --steps 2                            # just a look
    torchrun --standalone --nproc-per-node 4 recipes/ddp.py    # the same; on GPUs (nccl) where there are four

Freeze first, then wrap: DDP waits for a gradient of every parameter that required one when it was made. To
unfreeze later, unfreeze, then wrap anew, as the last way goes on to do. What comes of each way is compared
bit for bit, on each rank, with the weights that all started from and with the other ranks.
Needs: pip install 'freezekit[demo]'
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from freezekit import DriftAuditor, Freeze, FreezekitError, check, freeze_backbone, trainable_parameters

NAIVE, ALONE, EVAL, FROZEN = (
    "requires_grad=False",
    "the same, no broadcast",
    "the same, eval()",
    "freeze_backbone",
)
BATCH = 4  # on each rank
CONVOLUTION = "backbone.6.weight"
SAID = {NAIVE: ["FK301", "FK317"], ALONE: ["FK301"], EVAL: ["FK305", "FK317"], FROZEN: []}
"""What freezekit.check says before training."""
PATIENCE = 100  # seconds, for all of it


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, width, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict(backbone=backbone, head=nn.Linear(64, 10)))


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


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = (model(images).argmax(1) == labels).double().mean()
    model.train()  # as one does, for the loop to go on
    return float(hits)


def finetune(
    way: str, base: dict[str, Tensor], train: TensorDataset, test: TensorDataset, steps: int | None
) -> dict[str, Any]:
    """Train a new head on this rank's share of the digits, and return what came of the model."""
    model = network().to(train.tensors[0].device)
    model.load_state_dict(base)  # the same on every rank
    nn.init.zeros_(model.head.weight)
    if way == FROZEN:
        handle = freeze_backbone(model)
    else:
        model.backbone.requires_grad_(False)
    ddp = DistributedDataParallel(model)
    ddp.broadcast_buffers = way in (NAIVE, EVAL)  # DDP's default; see freezekit explain FK317
    in_buckets: set[int] = set()
    ddp.register_comm_hook(in_buckets, note_and_reduce)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=5e-3)

    ddp.train()
    if way == EVAL:
        model.backbone.eval()
    warned = {finding.code for finding in check(ddp, optimizer)}
    if dist.get_rank() == 0:  # one rank looks where the training starts
        accuracy(model, *test.tensors)
    loader = DataLoader(train, BATCH, sampler=DistributedSampler(train))
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        for x, y in itertools.islice(batches(loader, 3), steps):
            optimizer.zero_grad()
            F.cross_entropy(ddp(x), y).backward()
            optimizer.step()
    after = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    return {
        "after": after,
        "differ": {n for n in base if n.startswith("backbone.") and not torch.equal(base[n], after[n])},
        "report": auditor.report(),
        "warned": sorted(warned),
        "in_buckets": [name for name, p in model.named_parameters() if id(p) in in_buckets],
        "accuracy": accuracy(model, *test.tensors),
        "unfrozen": go_on(ddp, handle, train, steps) if way == FROZEN else None,
    }


def go_on(
    wrapped: DistributedDataParallel, handle: Freeze, train: TensorDataset, steps: int | None
) -> dict[str, Any]:
    """Unfreeze the last convolution, wrap anew, and train on."""
    handle.unfreeze(CONVOLUTION)
    model = handle.model
    try:
        wrapped(train.tensors[0][:BATCH])
        refused = ""
    except FreezekitError as error:  # it would leave the gradient of what is unfrozen to each rank alone
        refused = str(error)
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    in_buckets: set[int] = set()
    ddp.register_comm_hook(in_buckets, note_and_reduce)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-3)
    with DriftAuditor(model, optimizer, on_drift="record") as auditor:
        loader = DataLoader(train, BATCH, sampler=DistributedSampler(train))
        for x, y in itertools.islice(batches(loader, 1), steps):
            optimizer.zero_grad()
            F.cross_entropy(ddp(x), y).backward()
            optimizer.step()
    return {
        "after": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        "refused": refused,
        "clean": auditor.report().clean,
        "in_buckets": [name for name, p in model.named_parameters() if id(p) in in_buckets],
    }


def note_and_reduce(in_buckets, bucket):  # torch refuses annotations that are strings
    """Do what DDP does with each bucket of gradients, and note whose they are."""
    in_buckets.update(id(parameter) for parameter in bucket.parameters())
    return allreduce_hook(None, bucket)


def verify(ways: dict[str, list[dict[str, Any]]]) -> None:
    """Assert what the recipe claims."""

    def equal(way: str, rank: int, other_way: str, other_rank: int, names: Iterable[str]) -> bool:
        one, other = ways[way][rank]["after"], ways[other_way][other_rank]["after"]
        return all(torch.equal(one[name], other[name]) for name in names)

    everything = ways[FROZEN][0]["after"].keys()
    for way, ranks in ways.items():
        for rank, one in enumerate(ranks):
            # the buckets hold the head alone, and it is the same on all ranks, however the backbone fares
            assert one["in_buckets"] == ["head.weight", "head.bias"], one["in_buckets"]
            assert equal(way, rank, way, 0, one["in_buckets"])
            # nothing moved, or all of it, by two independent looks
            assert one["differ"] == set(one["report"].changed)
            assert one["report"].clean == (not one["differ"]) == (way == FROZEN), way
            assert one["warned"] == SAID[way], one["warned"]
    for rank in range(1, len(ways[FROZEN])):
        assert equal(FROZEN, rank, FROZEN, 0, everything)  # bit for bit
        assert not equal(NAIVE, rank, NAIVE, 0, ["backbone.1.running_mean"])
        assert not equal(ALONE, rank, ALONE, 0, ["backbone.1.running_mean"])
        # a rank that was never in train mode gets what rank 0 did to its own
        assert {finding.cause.kind for finding in ways[EVAL][rank]["report"].findings} == {"broadcast"}
    for one in ways[FROZEN]:
        later, first = one["unfrozen"], ways[FROZEN][0]["unfrozen"]["after"]
        assert "wrap the model anew" in later["refused"], later["refused"]
        assert later["clean"]
        assert later["in_buckets"] == [CONVOLUTION, "head.weight", "head.bias"]
        moved = {name for name in first if not torch.equal(later["after"][name], one["after"][name])}
        assert moved == set(later["in_buckets"])
        assert all(torch.equal(later["after"][name], first[name]) for name in first)
    # what is broadcast, and saved in the end, was computed from rank 0's share of the data alone
    assert equal(NAIVE, 0, ALONE, 0, ways[NAIVE][0]["differ"])


def table_of(ways: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table(title="a head fine-tuned on shifted digits under DDP")
    table.add_column("backbone frozen by", no_wrap=True)
    for column in ("rank", "backbone changed", "apart from rank 0", "accuracy"):
        table.add_column(column, justify="right")
    table.add_column("check said")
    table.add_column("cause", no_wrap=True)
    for way, ranks in ways.items():
        for rank, one in enumerate(ranks):
            apart = [n for n, t in one["after"].items() if not torch.equal(t, ranks[0]["after"][n])]
            table.add_row(
                "" if rank else way,
                str(rank),
                f"{len(one['differ'])} of {one['report'].compared}",
                f"{len(apart)} of {len(one['after'])}",
                f"{one['accuracy']:.3f}",
                ", ".join(one["warned"]) or "nothing",
                ", ".join({finding.cause.kind for finding in one["report"].findings}) or "none",
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
    images, labels = digits()
    known, new, held_out = torch.randperm(len(images)).split([600, 900, 297])
    sent = [pretrained(images[known], labels[known]) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent, 0)
    shifted = F.pad(images, (1, 0, 1, 0))[..., :8, :8]
    train, test = (
        TensorDataset(shifted[rows].to(device), labels[rows].to(device)) for rows in (new, held_out)
    )
    ways = {}
    for way in (NAIVE, ALONE, EVAL, FROZEN):
        ways[way] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(ways[way], finetune(way, sent[0], train, test, steps))
    if dist.get_rank() == 0:
        console = Console(highlight=False)
        console.width = max(console.width, 100)
        console.print(table_of(ways))
    verify(ways)
    dist.destroy_process_group()


def start(rank: int, init_method: str, steps: int | None) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    work(init_method, steps)


@click.command()
@click.option("--steps", type=click.IntRange(min=2), help="Stop each way after so many steps.")
def main(steps: int | None) -> None:
    """Freeze a backbone under DDP in four ways, and compare what became of it on every rank."""
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
