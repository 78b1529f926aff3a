"""Time one synchronised batch norm layer on several processes of this machine, and count what it sends.

    python recipes/bench_sync_batchnorm.py                          # 2 and 4 ranks, float32
    python recipes/bench_sync_batchnorm.py --ranks 2 --shape 1      # one case
    python recipes/bench_sync_batchnorm.py --steps 2                # just a look

A step is one layer, forward and backward, in train mode, on each rank's own batch; its time is that of the
slowest rank. Every round times every contender once, all in the same processes, so that whatever else the
machine does hits all of them; a ratio is the median over the rounds of time by time of the same round: below
1 is faster than freezekit's BatchNorm without synchronisation. Beside that one's median stands its median
deviation. With more ranks than cores, ranks wait for one another and times say little.
"naive" adds up sums and sums of squares by one differentiable all_reduce, as detectron2's NaiveSyncBatchNorm.
"sent" is what a rank puts into its collectives; "moved" what then passes through its port in a ring.
"error" is the largest of the output in float32, of numbers around 1000 with deviation 1, against float64.
torch's own SyncBatchNorm takes no CPU tensors.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import freezekit

SHAPES = ((8, 64, 56, 56), (8, 256, 28, 28), (8, 2048, 7, 7), (32, 512))
TARGET, OWN, NAIVE = "not synchronised", "freezekit", "naive"

console = Console(highlight=False)
console.width = max(console.width, 124)


class Naive(freezekit.nn.BatchNorm2d):
    """What one writes first: correct where the mean is near zero and batches are even."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise in train mode."""
        dims = [d for d in range(input.dim()) if d != 1]
        shape = [-1] + [1] * (input.dim() - 2)
        sums = torch.cat([input.mean(dims), input.square().mean(dims)])
        mean, squares = (differentiable.all_reduce(sums) / dist.get_world_size()).chunk(2)
        var = squares - mean.square()
        n = input.numel() // input.size(1) * dist.get_world_size()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return input * scale.reshape(shape) + (self.bias - mean * scale).reshape(shape)


def contenders(shape: tuple[int, ...]) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = freezekit.nn.BatchNorm2d(shape[1]) if len(shape) == 4 else freezekit.nn.BatchNorm1d(shape[1])
    with torch.no_grad():
        plain.weight.uniform_(0.5, 2)
        plain.bias.normal_()
    naive = Naive(shape[1])
    naive.load_state_dict(plain.state_dict())
    return {
        TARGET: plain,
        OWN: freezekit.convert_batchnorm(copy.deepcopy(plain), to="sync"),
        NAIVE: naive,
    }


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """Note the bytes of the message of each collective called inside."""
    found: dict[str, list[int]] = {"all_gather": [], "all_reduce": []}
    kept = dist.all_gather, dist.all_reduce

    def all_gather(into: list[Tensor], message: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["all_gather"].append(message.nbytes)
        return kept[0](into, message, *args, **kwargs)

    def all_reduce(message: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["all_reduce"].append(message.nbytes)
        return kept[1](message, *args, **kwargs)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    try:
        yield found
    finally:
        dist.all_gather, dist.all_reduce = kept


def race(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time every contender once a round, in rotating order, every other round backwards."""
    for step in [*steps.values()] * 2:
        step()
    times: dict[str, list[float]] = {label: [] for label in steps}
    order = list(steps)
    for number in range(rounds):
        for label in order if number % 2 else reversed(order):
            dist.barrier()
            began = time.perf_counter()
            steps[label]()
            times[label].append(time.perf_counter() - began)
        order = order[1:] + order[:1]
    return times


def stepper(layer: nn.Module, x: Tensor, g: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], g)


def error(layer: nn.Module, shape: tuple[int, ...], rank: int) -> float:
    """Return the largest error of the output, of numbers far from zero."""
    torch.manual_seed(1)
    x = torch.randn(dist.get_world_size(), *shape[:2], *(min(size, 8) for size in shape[2:])) + 1000
    joined = x.flatten(0, 1).double()
    truth = copy.deepcopy(layer).double()
    truth.__class__ = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    expected = truth(joined).unflatten(0, x.shape[:2])[rank]
    return float((copy.deepcopy(layer)(x[rank]) - expected).abs().max())


def work(
    rank: int, ranks: int, folder: str, shapes: list[tuple[int, ...]], rounds: int, threads: int
) -> None:
    warnings.simplefilter("ignore")  # torch.distributed.nn warns of its end
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    found = []
    for shape in shapes:
        torch.manual_seed(rank)
        x, g = torch.randn(2, *shape)
        x.requires_grad_()
        layers = contenders(shape)
        steps = {label: stepper(layer, x, g) for label, layer in layers.items()}
        sent = {}
        for label, step in steps.items():
            with counted() as sent[label]:
                step()
        errors = {label: error(layers[label], shape, rank) for label in (OWN, NAIVE)}
        mine = race(steps, rounds)
        all_times: list[Any] = [None] * ranks
        dist.all_gather_object(all_times, mine)
        slowest = {k: [max(t) for t in zip(*(each[k] for each in all_times), strict=True)] for k in mine}
        found.append((slowest, sent, errors))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def amount(count: float) -> str:
    return f"{count / 1024:.1f} KiB" if count else "-"


@click.command()
@click.option("--steps", default=30, show_default=True, help="Rounds.")
@click.option("--ranks", type=int, multiple=True, default=(2, 4), show_default=True, help="May be repeated.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch on each rank.")
@click.option(
    "--shape", "pick", type=click.IntRange(0, len(SHAPES) - 1), multiple=True, help="Only this shape."
)
def main(steps: int, ranks: tuple[int, ...], threads: int, pick: tuple[int, ...]) -> None:
    """Compare freezekit's SyncBatchNorm with its BatchNorm and a naive synchronised one."""
    shapes = [SHAPES[k] for k in pick or range(len(SHAPES))]
    console.print(f"torch {torch.__version__}, gloo, {os.cpu_count()} cores, float32, {steps} rounds")
    for world in ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, (world, folder, shapes, steps, threads), nprocs=world)
            found = torch.load(f"{folder}/found.pt")
        table = Table(title=f"BatchNorm on {world} ranks, training: time as a multiple of {TARGET}")
        table.add_column("input of a rank", no_wrap=True)
        table.add_column(f"{TARGET}, ms", justify="right", no_wrap=True)
        for column in ("layer", "time", "collectives", "sent", "moved", "error"):
            table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
        for shape, (times, sent, errors) in zip(shapes, found, strict=True):
            middle = statistics.median(times[TARGET])
            spread = statistics.median(abs(t - middle) for t in times[TARGET]) / middle
            given, base = "x".join(map(str, shape)), f"{middle * 1e3:.2f} ±{spread:3.0%}"
            for label in (OWN, NAIVE):
                gathered, reduced = sent[label]["all_gather"], sent[label]["all_reduce"]
                ratio = statistics.median(a / b for a, b in zip(times[label], times[TARGET], strict=True))
                moved = (world - 1) * (sum(gathered) + 2 * sum(reduced) / world)
                table.add_row(
                    given, base, label, f"{ratio:.2f}", str(len(gathered) + len(reduced)),
                    amount(sum(gathered) + sum(reduced)), amount(moved), f"{errors[label]:.0e}",
                )  # fmt: skip
                given = base = ""
        console.print(table)


if __name__ == "__main__":
    main()
