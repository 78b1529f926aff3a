"""Faults that need a second process: what DistributedDataParallel and collectives do to what is frozen."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fault_scene import GUILTY, Scene, plain, scene, train_body
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from freezekit import DriftAuditor

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")


def by_broadcast(s: Scene) -> None:
    dist.broadcast(s.model.body.bn.running_mean, 0)


def by_all_reduce(s: Scene) -> None:
    dist.all_reduce(s.model.body.bn.running_var)


def parameter_by_all_reduce(s: Scene) -> None:
    dist.all_reduce(s.model.body.lin.weight)


def parameter_by_broadcast(s: Scene) -> None:
    with torch.no_grad():
        dist.broadcast(s.model.body.lin.weight.data, 0)


def by_all_gather(s: Scene) -> None:
    mine, spare = s.model.body.bn.running_mean, torch.empty(4)
    dist.all_gather([spare, mine] if dist.get_rank() == 0 else [mine, spare], mine.clone())


def by_object(s: Scene) -> None:
    sent = [s.model.body.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent, 0)
    s.model.body.load_state_dict(sent[0])


def other_statistics(s: Scene) -> None:
    """Let the ranks differ, as after loading another file on each."""
    with torch.no_grad():
        s.model.body.bn.running_mean.add_(dist.get_rank())


Told = list[tuple[str, "int | None", "str | None"]]
"""What was found, at which step, and why."""

BN, LIN, BROADCAST = "FK101 body.bn", "FK103 body.lin.weight", "broadcast"

#: name -> strike, whether the model is wrapped, whether the ranks start apart, what each must find, and why
Row = tuple[Callable[[Scene], object] | None, bool, bool, tuple[str | None, str | None], str]
ROWS: dict[str, Row] = {
    # DDP sends rank 0's buffers at each forward, in eval mode too
    "broadcast_buffers, statistics apart": (None, True, True, (None, BN), BROADCAST),
    # in train mode the forward moves them on each rank, whatever was sent before
    "naive train mode": (train_body, True, False, (BN, BN), "train-mode forward"),
    # two causes on rank 1 from then on, but at the first step both ranks were still equal
    "broadcast by hand": (by_broadcast, False, True, (None, BN), BROADCAST),
    # a sum over the ranks is in place, on each of them
    "all_reduce of a buffer": (by_all_reduce, False, False, (BN, BN), BROADCAST),
    # each rank receives the other's in place of its own
    "all_gather into a buffer": (by_all_gather, False, True, (BN, BN), BROADCAST),
    # the same of a parameter
    "all_reduce of a parameter": (parameter_by_all_reduce, False, False, (LIN, LIN), BROADCAST),
    # through .data, as old loops do, of ranks that differ
    "broadcast of a parameter": (parameter_by_broadcast, False, True, (None, LIN), BROADCAST),
    # what was sent is loaded: the write is that of load_state_dict
    "broadcast of a state dict": (by_object, False, True, (None, BN), "load_state_dict"),
}


MODES: list[dict[str, Any]] = [{}, {"watch": "all"}]


def worker(rank: int, folder: str) -> None:
    """Run every row on one rank, and write down what came."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    said = {name: [told(name, mode) for mode in MODES] for name in ROWS}
    said["wrapping"] = [wrapping(mode) for mode in MODES]
    dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(said))


def told(name: str, mode: dict[str, Any]) -> Told:
    strike, wrapped, apart, *_ = ROWS[name]
    torch.manual_seed(0)
    s = scene(plain(), before=strike or other_forward)
    ddp = DistributedDataParallel(s.model) if wrapped else None
    if apart:
        other_statistics(s)
        with torch.no_grad():
            s.model.body.lin.weight.add_(dist.get_rank())
    auditor = DriftAuditor(s.model, s.optimizer, on_drift="record", **mode).attach()
    for step in range(1, GUILTY + 1):
        # only the guilty step runs wrapped, so that the first two send nothing
        s.forward = (lambda s: ddp(s.x)) if ddp and step == GUILTY else None
        s.step(step == GUILTY)
    auditor.detach()
    return shown(auditor)


def other_forward(s: Scene) -> None:
    """Nothing more than the wrapped forward itself."""


def wrapping(mode: dict[str, Any]) -> Told:
    """Make the auditor first, as is tempting, and wrap then: DDP sends rank 0's weights."""
    torch.manual_seed(dist.get_rank())
    model: nn.Module = plain()
    auditor = DriftAuditor(model, on_drift="record", **mode).attach()
    DistributedDataParallel(model)
    auditor.check()
    auditor.detach()
    return shown(auditor)


def shown(auditor: DriftAuditor) -> Told:
    findings = auditor.report().findings
    return [(f"{f.code} {f.name}", f.step, f.cause.kind if f.cause else None) for f in findings]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Told]]]:
    """What each of two processes said; starting them takes longer than all they do."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(worker, (str(folder),), nprocs=2, join=False)
    end = time.monotonic() + 240
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "not done after 240 s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_detected_on_the_rank_where_it_moved(ranks: list[dict[str, list[Told]]]) -> None:
    for name, (*_, wanted, _) in ROWS.items():
        for rank, mode in itertools.product((0, 1), (0, 1)):
            found = {what: step for what, step, _ in ranks[rank][name][mode]}
            if wanted[rank] is None:
                assert found == {}, f"{name}: rank {rank} moved nothing"
            else:
                assert found.get(wanted[rank]) == GUILTY, f"{name}, rank {rank}, {MODES[mode]}: {found}"


def test_the_cause_is_right_or_unknown_on_each_rank(ranks: list[dict[str, list[Told]]]) -> None:
    wrong, right, unknown = [], 0, 0
    for name, (*_, wanted, cause) in ROWS.items():
        for rank, mode in itertools.product((0, 1), (0, 1)):
            for what, _, kind in ranks[rank][name][mode]:
                right += what == wanted[rank] and kind == cause
                unknown += what == wanted[rank] and kind == "unknown"
                if kind not in (cause, "unknown"):
                    wrong.append(f"{name}, rank {rank}, {MODES[mode]}: {what} by {kind}")
    print(f"\nright {right}, unknown {unknown}, wrong {len(wrong)}")
    assert wrong == []


def test_wrapping_sends_the_weights_too(ranks: list[dict[str, list[Told]]]) -> None:
    assert ranks[0]["wrapping"] == [[], []]
    for findings in ranks[1]["wrapping"]:
        assert {what for what, *_ in findings} >= {BN, LIN}
        assert {kind for *_, kind in findings} <= {BROADCAST, "unknown"}
