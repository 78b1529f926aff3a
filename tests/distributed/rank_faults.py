"""Faults between ranks, injected on purpose: what strikes which rank, and what every rank must tell."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from zoo import scramble

from freezekit import DriftAuditor

GUILTY = 3
"""The step in which a fault strikes, where it does not say otherwise."""

LAST = 4


class Scene:
    """A loop on one rank: a frozen ``body``, a ``head`` that trains, and the rank's own data."""

    def __init__(self, rank: int, world: int, wrap: str) -> None:
        self.rank, self.world, self.wrap = rank, world, wrap
        torch.manual_seed(0)
        body = nn.Sequential(OrderedDict(lin=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)))
        self.model = scramble(nn.Sequential(OrderedDict(body=body, head=nn.Linear(4, 2))))
        self.model.body.requires_grad_(False).eval()
        torch.manual_seed(rank)
        self.x = torch.randn(8, 4) * 2 + 1
        self.ddp: nn.Module = self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, weight_decay=0.1)
        self.sync = wrap == "by hand"

    @property
    def body(self) -> Any:
        return self.model.body

    def wrapped(self) -> None:
        """Wrap the model as the row says."""
        if self.wrap.startswith("DDP"):
            self.ddp = DistributedDataParallel(self.model)
            self.ddp.broadcast_buffers = self.wrap == "DDP"

    def step(self, fault: Fault, number: int) -> None:
        """Train one step."""
        hit = number == fault.at and self.rank in fault.on(self.world)
        self.model.train()
        self.body.eval()
        if hit:
            fault.before(self)
        self.optimizer.zero_grad()
        alone = number == fault.at and fault.no_sync
        with self.ddp.no_sync() if alone else nullcontext():
            self.ddp(self.x).square().mean().backward()
        if self.sync:
            average(self.model.head)
        if hit:
            fault.between(self)
        self.optimizer.step()
        if hit:
            fault.after(self)


def average(module: nn.Module) -> None:
    """Average the gradients over the ranks."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


Strike = Callable[[Scene], object]
Which = Callable[[int], "tuple[int, ...]"]


def nothing(s: Scene) -> None:
    """Leave the loop as it is."""


def last(world: int) -> tuple[int, ...]:
    return (world - 1,)


def second(world: int) -> tuple[int, ...]:
    return (1,)


def first(world: int) -> tuple[int, ...]:
    return (0,)


def everyone(world: int) -> tuple[int, ...]:
    return tuple(range(world))


def all_but_first(world: int) -> tuple[int, ...]:
    return tuple(range(1, world))


@dataclass(frozen=True)
class Fault:
    """A fault on some ranks, and what every rank must tell of it.

    `finds` are the FK5xx findings, all there are; `causes` the kinds that are true, the best first. `named`
    are the ranks that must be named, those that are hit unless it says otherwise; of what trains, both of
    two ranks are, as nothing tells which of them is right.
    """

    name: str
    on: Which
    finds: str
    causes: str = ""
    wrap: str = "DDP"
    before: Strike = nothing
    between: Strike = nothing
    after: Strike = nothing
    start: Strike = nothing
    at: int = GUILTY
    named: Which | None = None
    no_sync: bool = False
    says: str = ""
    wrap_late: bool = False
    how: dict[str, Any] = field(default_factory=dict)

    def ranks(self, code: str, world: int) -> tuple[int, ...]:
        """Return the ranks that a finding must name."""
        if self.named is not None:
            return self.named(world)
        undecided = world == 2 and code in ("FK503", "FK504")
        return everyone(world) if undecided else self.on(world)


def run_fault(rank: int, world: int, fault: Fault) -> list[tuple[Any, ...]]:
    """Run one row on one rank, and return its findings."""
    s = Scene(rank, world, fault.wrap)
    if rank in fault.on(world):
        fault.start(s)
    if not fault.wrap_late:
        s.wrapped()
    how = {"ranks": 1, "timeout": 120.0, **fault.how}
    auditor = DriftAuditor(s.model, s.optimizer, on_drift="record", **how).attach()
    if fault.wrap_late:
        s.wrapped()
    for number in range(1, LAST + 1):
        s.step(fault, number)
    auditor.detach()
    return [
        (f.code, f.name, f.step, f.ranks, f.cause.kind if f.cause else None, str(f), f.fix)
        for f in auditor.report().findings
    ]


# --- what strikes ----------------------------------------------------------------------------------------


def other_checkpoint(s: Scene) -> None:
    s.body.load_state_dict({k: v + 1 for k, v in s.body.state_dict().items()})


def flipped_bit(s: Scene) -> None:
    s.body.lin.weight.data.view(torch.int32)[0, 0] ^= 1


def counted(s: Scene) -> None:
    s.body.bn.num_batches_tracked.add_(1)


def statistics_apart(s: Scene) -> None:
    s.body.bn.running_mean.add_(1)


def train_body(s: Scene) -> None:
    s.body.train()


def unfreeze_lin(s: Scene) -> None:
    s.body.lin.requires_grad_(True)


def no_gradients(s: Scene) -> None:
    s.optimizer.zero_grad()


def own_head(s: Scene) -> None:
    with torch.no_grad():
        s.model.head.weight.add_(s.rank + 1)


def other_lr(s: Scene) -> None:
    s.optimizer.param_groups[0]["lr"] *= 2


def stop_sync(s: Scene) -> None:
    s.sync = False


def halved(s: Scene) -> None:
    s.model.head.weight.grad /= 2


def keep_old(s: Scene) -> None:
    s.old = {k: v.clone() for k, v in s.model.head.state_dict().items()}  # type: ignore[attr-defined]


def restart(s: Scene) -> None:
    s.model.head.load_state_dict(s.old)  # type: ignore[attr-defined]


def zero_gradient(s: Scene) -> None:
    s.body.lin.weight.grad = torch.zeros(4, 4)


def stale_gradient(s: Scene) -> None:
    s.body.lin.weight.grad = torch.ones(4, 4)


def clip(s: Scene) -> None:
    nn.utils.clip_grad_norm_(s.model.parameters(), 0.01)


def broadcast_bias(s: Scene) -> None:
    dist.broadcast(s.body.lin.bias.data, 0)


def bias_apart(s: Scene) -> None:
    with torch.no_grad():
        s.body.lin.bias.add_(1)


def start_apart(s: Scene) -> None:
    with torch.no_grad():
        for tensor in (*s.model.parameters(), *s.model.buffers()):
            tensor.add_(s.rank)


def extra_buffer(s: Scene) -> None:
    s.model.head.register_buffer("seen", torch.zeros(1))


NAN = float("nan")


def nan_everywhere(s: Scene) -> None:
    s.body.lin.bias.data.fill_(NAN)


def replaced(s: Scene) -> None:
    s.body.lin.bias = nn.Parameter(s.body.lin.bias.detach() + 1, requires_grad=False)


FAULTS = [
    Fault("another checkpoint on one rank", last, "FK501 body", "load_state_dict", "DDP without buffers",
          before=other_checkpoint, says="differ on"),
    Fault("a bit of a frozen weight flipped on one rank", second, "FK501 body.lin.weight", "write",
          before=flipped_bit),
    Fault("one frozen counter is one ahead", last, "FK501 body.bn.num_batches_tracked", "write",
          "DDP without buffers", before=counted),
    Fault("rank 0's own frozen weight moves", first, "FK501 body.lin.weight", "write", before=flipped_bit),
    Fault("rank 0's buffers over an eval BN", last, "FK502 body.bn.running_mean", "broadcast",
          wrap_late=True, start=statistics_apart, at=1, says="now those of rank 0"),
    Fault("rank 0 broadcasts a frozen parameter by hand", everyone, "FK502 body.lin.bias", "broadcast",
          "by hand", start=lambda s: bias_apart(s) if s.rank == 1 else None, before=broadcast_bias,
          named=second, at=1),
    Fault("wrapped after the audit began, seeds apart", everyone, "FK502 body", "broadcast",
          start=start_apart, wrap_late=True, at=1, named=all_but_first),
    Fault("requires_grad=False in train mode", everyone, "FK501 body.bn", "train-mode forward",
          "DDP without buffers", before=train_body, says="all ranks"),
    Fault("the same, with broadcast_buffers", everyone, "FK501 body.bn", "train-mode forward",
          before=train_body),
    Fault("unfrozen inside DDP", everyone, "FK503 body.lin", before=unfreeze_lin,
          says="unfrozen after DistributedDataParallel wrapped the model"),
    Fault("one rank froze fewer layers", last, "FK504 body.lin", wrap="by hand",
          start=unfreeze_lin, at=1),
    Fault("one rank in train mode", last, "FK504 body, FK501 body.bn", "train-mode forward",
          "DDP without buffers", before=train_body, says="in train mode on"),
    Fault("one rank has nothing to step by", last, "FK503 head", between=no_gradients),
    Fault("a head made with other seeds, not wrapped", everyone, "FK503 head.weight", wrap="by hand",
          start=own_head, at=1),
    Fault("another learning rate on one rank", second, "FK503 head", before=other_lr),
    Fault("gradients forgotten to be averaged", everyone, "FK503 head", wrap="by hand", before=stop_sync),
    Fault("one parameter averaged twice on one rank", last, "FK503 head.weight", between=halved),
    Fault("one rank restarts from an older head", last, "FK503 head", start=keep_old, after=restart, at=2),
    Fault("weight decay on a frozen weight of one rank", last, "FK501 body.lin.weight", "weight decay",
          between=zero_gradient),
    Fault("a stale gradient on one rank", second, "FK501 body.lin.weight", "gradient",
          between=stale_gradient),
    Fault("clipped on each rank after no_sync", everyone, "FK503 head", between=clip, no_sync=True),
    Fault("a buffer more on one rank", last, "FK504 head.seen", wrap="by hand", before=extra_buffer),
    Fault("NaN in a frozen bias of one rank", last, "FK501 body.lin.bias", "write", wrap="by hand",
          before=nan_everywhere),
    Fault("a frozen tensor replaced on one rank", second, "FK501 body.lin.bias", "assignment", wrap="by hand",
          before=replaced),
]  # fmt: skip
