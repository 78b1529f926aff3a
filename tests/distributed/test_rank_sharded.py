"""The live auditor on sharded models: local shards bit by bit, what is replicated between the ranks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import run
from torch import nn

import freezekit
from freezekit import DriftAuditor

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
    pytest.mark.skipif(
        torch.__version__.startswith("2.6."), reason="this torch shards on accelerators alone"
    ),
]

GUILTY, LAST = 3, 5


def net() -> Any:
    torch.manual_seed(0)
    body = nn.Sequential(
        OrderedDict(lin=nn.Linear(6, 6), norm=nn.BatchNorm1d(6), out=nn.Linear(6, 6, bias=False))
    )
    model = nn.Sequential(OrderedDict(body=body, head=nn.Linear(6, 2)))
    model.body.requires_grad_(False).eval()
    return model


def fsdp(*, norm: bool = True, **how: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = net()
    if not norm:
        del model.body.norm
    for part in (model.body.lin, model.body.out):
        fully_shard(part, **how)
    return fully_shard(model, **how)


def hsdp() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("copies", "shards"))
    return fsdp(mesh=mesh)


def tp() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = net()
    del model.body.norm  # it would normalise a part of the channels
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"body.lin": ColwiseParallel(), "body.out": RowwiseParallel()})


def mixed() -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return fsdp(
        norm=False, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    )


def kept_whole() -> Any:
    return fsdp(reshard_after_forward=False)


def nothing(model: Any, rank: int, auditor: DriftAuditor, x: Any) -> None:
    pass


def local_write(model: Any, rank: int, auditor: DriftAuditor, x: Any) -> None:
    if rank == 1:
        model.body.lin.weight.to_local().add_(1)


def write_by_data(model: Any, rank: int, auditor: DriftAuditor, x: Any) -> None:
    if rank == 1:
        model.body.lin.weight.to_local().data[0, 0] += 1


def write_through(model: Any, rank: int, auditor: DriftAuditor, x: Any) -> None:
    with torch.no_grad():
        model.body.lin.weight.mul_(2)


def replicated(model: Any, rank: int, auditor: DriftAuditor, x: Any) -> None:
    if rank == 1:
        model.body.norm.running_mean.add_(1)


def validation(model: Any, rank: int, auditor: DriftAuditor, x: Any) -> None:
    """Leave the root's parameters whole, as FSDP2 does after a forward alone, and look."""
    with torch.no_grad():
        model.eval()(x)
    auditor.check()
    auditor.report()
    auditor.renew()


def in_between(model: Any, rank: int, auditor: DriftAuditor, x: Any) -> None:
    """One rank looks between forward and backward, and sends nothing."""
    out = model(x)
    if rank == 1:
        auditor.check()
        auditor.report()
    out.sum().backward()


def decayed(model: Any, rank: int, auditor: DriftAuditor, x: Any) -> None:
    model.body.out.weight.grad = torch.zeros_like(model.body.out.weight)


def loaded(model: Any, rank: int, auditor: DriftAuditor, x: Any) -> None:
    model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()})


Strike = Callable[[Any, int, DriftAuditor, Any], None]
#: model, what happens, and what must be found on rank 0 and on rank 1
CASES: dict[str, tuple[Callable[[], Any], Strike, dict[str, Any], list[str], list[str]]] = {
    "FSDP2": (fsdp, nothing, {}, [], []),
    "FSDP2, digests": (fsdp, nothing, {"snapshot": "digest"}, [], []),
    "FSDP2, everything watched": (fsdp, nothing, {"watch": "all", "keep": "host"}, [], []),
    "FSDP2 in bfloat16": (mixed, nothing, {}, [], []),
    "FSDP2 kept whole": (kept_whole, in_between, {}, [], []),
    "FSDP2 with a validation": (fsdp, validation, {}, [], []),
    "FSDP2 looked at in between": (fsdp, in_between, {}, [], []),
    "tensor parallel": (tp, nothing, {}, [], []),
    "FSDP2, a write to a shard": (
        fsdp, local_write, {}, ["FK507 model"], ["FK103 body.lin.weight write", "FK507 model"]),
    "FSDP2, a write to a shard, digests": (
        fsdp, local_write, {"snapshot": "digest"}, ["FK507 model"],
        ["FK103 body.lin.weight write", "FK507 model"]),
    "FSDP2, a write by .data": (
        fsdp, write_by_data, {}, ["FK507 model"], ["FK103 body.lin.weight write", "FK507 model"]),
    "FSDP2, a write to the whole": (
        fsdp, write_through, {}, ["FK103 body.lin.weight write"], ["FK103 body.lin.weight write"]),
    "FSDP2, weight decay": (
        fsdp, decayed, {}, ["FK103 body.out.weight weight decay"], ["FK103 body.out.weight weight decay"]),
    "FSDP2, load_state_dict": (
        fsdp, loaded, {"frozen": ["body.lin"]}, ["FK103 body.lin.bias load_state_dict",
        "FK103 body.lin.weight load_state_dict"], ["FK103 body.lin.bias load_state_dict",
        "FK103 body.lin.weight load_state_dict"]),
    "FSDP2, a buffer of one rank": (
        fsdp, replicated, {}, ["FK501 body.norm.running_mean write"],
        ["FK101 body.norm write", "FK501 body.norm.running_mean write"]),
    "tensor parallel, a write to a shard": (
        tp, local_write, {}, ["FK507 model"], ["FK103 body.lin.weight write", "FK507 model"]),
}  # fmt: skip


def audited(rank: int, make: Callable[[], Any], strike: Strike, how: dict[str, Any]) -> dict[str, Any]:
    model = make()
    torch.manual_seed(0 if make is tp else rank)
    x = torch.randn(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    if strike is validation:
        with torch.no_grad():
            model.eval()(x)  # before the auditor is made, too
    auditor = DriftAuditor(model, optimizer, on_drift="record", ranks=1, timeout=120.0, **how).attach()
    for step in range(1, LAST + 1):
        model.train()
        model.body.eval()
        optimizer.zero_grad()
        if step == GUILTY:
            strike(model, rank, auditor, x)
            model.train()
            model.body.eval()
        model(x).square().mean().backward()
        optimizer.step()
    auditor.detach()
    report = auditor.report()
    found = [
        f"{f.code} {f.name}" + (f" {f.cause.kind}" if f.cause is not None else "") for f in report.findings
    ]
    return {
        "found": sorted(found),
        "steps": {f.step for f in report.findings},
        "notes": report.notes,
        "kept": auditor.kept_bytes,
        "ranks": [f.ranks for f in report.findings if f.ranks],
    }


def copies_apart(rank: int) -> dict[str, Any]:
    """HSDP: rank 2 has the same shards as rank 0, and writes to its own."""
    return audited(rank, hsdp, lambda m, r, a, x: local_write(m, r - 1, a, x), {})


def worker(rank: int) -> dict[str, dict[str, Any]]:
    said = {name: audited(rank, make, strike, how) for name, (make, strike, how, *_) in CASES.items()}
    from torch.distributed.fsdp import FSDPModule

    model = fsdp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert isinstance(model, FSDPModule)
    risks = {}
    for name in ("sharded", "whole"):
        if name == "whole":
            model.eval()(torch.ones(4, 6))
        risks[name] = {finding.code for finding in freezekit.check(model, optimizer)}
    return {**said, "check": risks}


@pytest.fixture(scope="module")
def told() -> list[dict[str, dict[str, Any]]]:
    return run(worker, 2)


@pytest.mark.parametrize("case", CASES)
def test_what_is_found(told: list[dict[str, dict[str, Any]]], case: str) -> None:
    for rank, said in enumerate(told):
        assert said[case]["found"] == sorted(CASES[case][3 + rank])
        assert said[case]["steps"] <= {GUILTY}
        assert said[case]["ranks"] == [(1,)] * len(said[case]["ranks"])


def test_only_the_local_shards_are_kept(told: list[dict[str, dict[str, Any]]]) -> None:
    # half of two weights and a bias, half of the norm's weight and bias, its statistics and counter; and four
    # values of each of the two parameters that are compared in turns
    whole = 4 * (6 * 6 * 2 + 6) + 4 * 2 * 6
    assert told[0]["FSDP2"]["kept"] == whole / 2 + 4 * 2 * 6 + 8 + 4 * 4 * 2


def test_the_report_says_what_is_compared_with_none(told: list[dict[str, dict[str, Any]]]) -> None:
    assert (
        "7 sharded tensors compared only between ranks that hold the same shards, if there are any"
        in told[0]["FSDP2"]["notes"]
    )


def test_check_is_the_same_when_the_root_is_whole(told: list[dict[str, dict[str, Any]]]) -> None:
    for said in told:
        assert said["check"]["sharded"] == said["check"]["whole"] == {"FK305"}


def test_copies_of_a_shard_are_compared() -> None:
    for rank, said in enumerate(run(copies_apart, 4)):
        assert said["ranks"] == [(2,)]
        assert "FK501 body.lin.weight write" in said["found"]
        assert said["found"] == ["FK103 body.lin.weight write"] * (rank == 2) + [
            "FK501 body.lin.weight write"
        ]
