"""Measure what the audit across ranks sends and how long it takes, and model it for more ranks.

    python recipes/bench_ranks.py
    python recipes/bench_ranks.py --steps 2

A head is trained on a frozen backbone by 2, 4 and 8 processes (gloo, on this machine), which train apart on
the same data: whatever they send, the audit sends. Bytes sent are what the process gave to the kernel
(wchar of /proc/self/io), bytes received those of its connections (TCP_INFO); so this runs on Linux alone. The
line of under 100 bytes that a rank writes to the store at each interval is sent another way, and not counted.

The model: gloo's all_gather goes round a ring, so a rank sends P - 1 records, each with its headers, in as
many turns. Both lines, bytes and milliseconds over P - 1, are laid through what was measured at 2 and 4, and
compared with what is measured at 8. Where there are more processes than cores, they wait for each other: the
time of more ranks, each on a machine of its own, is that of so many turns through a network.
Needs: pip install 'freezekit[vision]'
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import statistics
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import click
import torch
import torch.distributed as dist
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn

import freezekit
from freezekit.audit.live.meeting import Meeting

MEASURED = (2, 4, 8)
MODELLED = (16, 64, 256, 1024)
TURN = 50e-6
"""Seconds that a turn takes in a network of the field."""
RECORD = 14
"""Numbers of 8 bytes that a rank sends."""


def small() -> nn.Module:
    body = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())
    return nn.Sequential(OrderedDict(body=body, fc=nn.Linear(64, 10)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small": (small, (64,)),
    "ResNet-50": (torchvision.models.resnet50, (3, 32, 32)),
}


def sent() -> int:
    """Return how many bytes this process has written since it began, to sockets and files."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("wchar"))


def received() -> int:
    """Return how many bytes this process's connections have received."""
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, struct.error):  # no connection
            with socket.socket(fileno=os.dup(int(fd))) as one:
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("Q", info, 128)[0]
    return total


def work(rank: int, world: int, store: str, steps: int, results: Any) -> None:
    """Measure on one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://{store}", timedelta(minutes=5), world, rank)
    found = {}
    for name, (make, shape) in MODELS.items():
        torch.manual_seed(0)
        model = make()
        freezekit.freeze_backbone(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        model(torch.randn(2, *shape)).square().mean().backward()
        plain = [timed(optimizer.step) for _ in range(steps + 2)][2:]
        with freezekit.DriftAuditor(model, optimizer, ranks=1) as auditor:
            optimizer.step()  # makes the group
            optimizer.step()
            dist.barrier()
            before = sent(), received()
            whole = [timed(optimizer.step) for _ in range(steps)]
            after = sent(), received()
            dist.barrier()
        assert auditor.report().clean
        bytes_ = [(b - a) / steps for a, b in zip(before, after, strict=True)]
        found[name] = (*bytes_, statistics.median(whole) - statistics.median(plain))
    meeting, record = Meeting(300.0), torch.zeros(RECORD, dtype=torch.int64)
    gathers = [timed(lambda: meeting.gather(record, 0)) for _ in range(20 * steps + 2)][2:]
    found["exchange"] = statistics.median(gathers)
    dist.barrier()
    results.put(found)
    meeting.leave()
    dist.destroy_process_group()


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(world: int, steps: int) -> dict[str, Any]:
    """Return the medians over the ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "freezekit"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        store = "{}:{}".format(*free.getsockname())
    results = context.Queue()
    ranks = [
        context.Process(target=work, args=(r, world, store, steps, results), daemon=True)
        for r in range(world)
    ]
    for rank in ranks:
        rank.start()
    told = [results.get(timeout=300) for _ in ranks]
    for rank in ranks:
        rank.join()
    return {
        **{name: [statistics.median(t[name][k] for t in told) for k in range(3)] for name in MODELS},
        "exchange": statistics.median(t["exchange"] for t in told),
    }


def line(at_2: float, at_4: float) -> Callable[[int], float]:
    """Return what a line over P - 1 through both gives for so many ranks."""
    slope = (at_4 - at_2) / 2
    return lambda world: at_2 + slope * (world - 2)


@click.command()
@click.option("--steps", default=30, show_default=True, help="Comparisons that are measured.")
def main(steps: int) -> None:
    """Print the tables."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = {world: measure(world, steps) for world in MEASURED}
    name = "small"
    bytes_ = line(found[2][name][0], found[4][name][0])
    exchange = line(found[2]["exchange"], found[4]["exchange"])
    title = f"what a rank exchanges in an interval: one all_gather of {RECORD * 8} bytes"
    table = Table(title=title)
    columns = (
        "ranks",
        "sent B\nmodel",
        "sent B\nmeasured",
        "received B\nmeasured",
        "exchange ms\nmodel",
        "exchange ms\nmeasured",
        f"ms at\n{TURN * 1e6:.0f} us a turn",
        "B a step\nranks=10",
        "B a step\nranks=100",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for world in (*MEASURED, *MODELLED):
        here = found.get(world)
        fitted = "fitted" if world in (2, 4) else ""
        table.add_row(
            str(world),
            fitted or f"{bytes_(world):,.0f}",
            f"{here[name][0]:,.0f}" if here else "",
            f"{here[name][1]:,.0f}" if here else "",
            fitted or f"{exchange(world) * 1e3:.2f}",
            f"{here['exchange'] * 1e3:.2f}" if here else "",
            f"{(world - 1) * TURN * 1e3:.2f}",
            f"{(here[name][0] if here else bytes_(world)) / 10:,.0f}",
            f"{(here[name][0] if here else bytes_(world)) / 100:,.0f}",
        )
    console = Console(highlight=False, width=110)
    console.print(table)
    table = Table(title=f"what an interval adds to a step, {os.cpu_count()} cores")
    for column in ("model", "ranks", "ms an interval", "of it exchange", "ms a step\nranks=10", "sent B"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name in MODELS:
        for world in MEASURED:
            number, _, added = found[world][name]
            share = min(1.0, found[world]["exchange"] / added) if added > 0 else 1.0
            row = [
                name,
                str(world),
                f"{added * 1e3:.1f}",
                f"{share:.0%}",
                f"{added * 1e2:.2f}",
                f"{number:,.0f}",
            ]
            table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
