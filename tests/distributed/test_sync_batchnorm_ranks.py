"""The own SyncBatchNorm on several ranks against one process on the joined batch."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import run as run_ranks
from norms import HALVES, assert_no_less_exact, assert_same, data, outcome, randomised, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import freezekit
from freezekit.audit.live.trial import Sample, Trial

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
every_world = pytest.mark.parametrize("world", [2, 4])
SyncBatchNorm = freezekit.nn.SyncBatchNorm


# --- Values: three steps, as one process on the joined batch


@dataclasses.dataclass(frozen=True)
class Case:
    """Batches by rank (as many as there are), what follows in the shape, the layer's arguments."""

    batches: tuple[int, ...] = (3, 3, 3, 3)
    rest: tuple[int, ...] = (4, 2, 5)
    dtype: torch.dtype = torch.float64
    param_dtype: torch.dtype = torch.float64
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    layout: torch.memory_format = torch.contiguous_format
    offset: float = 0.0

    def steps(self, world: int) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Inputs and output gradients by rank for each step, the same wherever this is called."""
        torch.manual_seed(3)
        batches = list(self.batches[:world])
        steps = []
        for _ in range(3):
            x = data((sum(batches), *self.rest), self.dtype) + self.offset
            grad = torch.randn(x.shape).to(self.dtype)
            steps.append(
                tuple([p.contiguous(memory_format=self.layout) for p in t.split(batches)] for t in (x, grad))
            )
        return steps

    def layer(self, home: Any, name: str, dtype: torch.dtype) -> Any:
        torch.manual_seed(4)
        layer = getattr(home, name)(self.rest[0], **self.kwargs, dtype=self.param_dtype)
        return randomised(layer).to(dtype)

    def joined(self, world: int, home: Any, dtype: torch.dtype, param_dtype: torch.dtype) -> list[Any]:
        """One process, all batches."""
        layer = self.layer(home, f"BatchNorm{max(len(self.rest) - 1, 1)}d", param_dtype)
        steps = ((torch.cat(x).to(dtype), torch.cat(grad).to(dtype)) for x, grad in self.steps(world))
        return [run(layer, x, grad) for x, grad in steps]


FLOAT = {"dtype": torch.float32, "param_dtype": torch.float32}
UNEVEN, EMPTY = (5, 1, 2, 7), (0, 4, 0, 3)
CASES = {
    "even": Case(),
    "uneven": Case(UNEVEN),
    "an empty batch": Case(EMPTY),
    "one value on each rank": Case((1, 1, 1, 1), (4,)),
    "2D": Case(UNEVEN, (6,)),
    "3D": Case(UNEVEN, (6, 5)),
    "5D": Case(UNEVEN, (6, 2, 3, 2)),
    "empty, 2D": Case(EMPTY, (6,)),
    "large": Case((14, 3, 9, 11), (8, 32, 32)),
    "large, empty": Case((0, 9, 8, 11), (8, 32, 32)),
    "large, channels_last": Case((14, 3, 9, 11), (8, 32, 32), layout=torch.channels_last),
    "channels_last": Case(UNEVEN, layout=torch.channels_last),
    "channels_last_3d": Case(UNEVEN, (4, 2, 3, 2), layout=torch.channels_last_3d),
    "momentum None": Case(UNEVEN, kwargs={"momentum": None}),
    "momentum 1": Case(UNEVEN, kwargs={"momentum": 1.0}),
    "no affine": Case(EMPTY, kwargs={"affine": False}),
    "no statistics": Case(EMPTY, kwargs={"track_running_stats": False}),
    "neither": Case(UNEVEN, kwargs={"affine": False, "track_running_stats": False}),
    "float32": Case(UNEVEN, **FLOAT),
    "float32, empty": Case(EMPTY, **FLOAT),
    "float32, large": Case((14, 3, 9, 11), (8, 32, 32), **FLOAT),
    "float32, far from zero": Case(UNEVEN, (4, 12, 12), **FLOAT, offset=1e3),
    **{
        str(half)[6:]: Case((14, 3, 9, 11), (8, 5, 5), dtype=half, param_dtype=torch.float32)
        for half in HALVES
    },
    "bfloat16, empty": Case(EMPTY, (8, 5, 5), dtype=torch.bfloat16, param_dtype=torch.float32),
}
# Shapes without any plan, from a seed.
random_shapes = torch.Generator().manual_seed(7)
for number in range(25):
    draw = [int(n) for n in torch.randint(0, 5, (4,), generator=random_shapes)]
    size = [int(n) + 1 for n in torch.randint(0, 5, (1 + number % 4,), generator=random_shapes)]
    CASES[f"shape {number}"] = Case((draw[0] + 1, draw[1] + 1, *draw[2:]), tuple(size))


def values(rank: int, world: int) -> dict[str, list[dict[str, Tensor]]]:
    found = {}
    for name, case in CASES.items():
        layer = case.layer(freezekit.nn, "SyncBatchNorm", case.param_dtype)
        found[name] = [run(layer, x[rank], grad[rank]) for x, grad in case.steps(world)]
    return found


@pytest.fixture(scope="module")
def all_values() -> dict[int, list[dict[str, Any]]]:
    return {world: run_ranks(values, world, world) for world in (2, 4)}


@every_world
@pytest.mark.parametrize("name", CASES)
def test_ranks_are_one_process_on_the_joined_batch(
    all_values: dict[int, list[dict[str, Any]]], name: str, world: int
) -> None:
    case, by_rank = CASES[name], [found[name] for found in all_values[world]]
    oracle = case.joined(world, nn, torch.float64, torch.float64)
    native = case.joined(world, freezekit.nn, case.dtype, case.param_dtype)
    for step, truth in enumerate(oracle):
        seen = [steps[step] for steps in by_rank]
        got = {}
        for key in truth:
            parts = [each[key] for each in seen]
            if key in ("output", "input.grad"):
                got[key] = torch.cat(parts)
                if case.layout != torch.contiguous_format:
                    assert all(p.is_contiguous(memory_format=case.layout) for p in parts if len(p))
            elif key.endswith(".grad"):
                got[key] = torch.stack(parts).sum(0)
            else:  # the statistics, which are the same on every rank
                assert all(torch.equal(part, parts[0]) for part in parts)
                got[key] = parts[0]
        if case.dtype == torch.float64:
            assert_same(got, truth, 1e-12)
        else:
            assert_no_less_exact(got, native[step], truth)


# --- Behaviour: one run for each world, of everything below


class Counted:
    """Counts the collectives that are called inside."""

    NAMES = ("all_gather", "all_reduce", "broadcast", "all_gather_into_tensor", "barrier")

    def __enter__(self) -> dict[str, int]:
        self.counts: dict[str, int] = {}
        self.kept = {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self.kept.items():
            setattr(dist, name, self.counted(name, function))
        return self.counts

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, function in self.kept.items():
            setattr(dist, name, function)


def batch(rank: int, shape: tuple[int, ...] = (3, 4, 5)) -> Tensor:
    torch.manual_seed(100 + rank)
    return data(shape, torch.float64)


def layer_of(**kwargs: Any) -> Any:
    torch.manual_seed(5)
    return randomised(SyncBatchNorm(4, dtype=torch.float64, **kwargs))


def joined_layer() -> Any:
    torch.manual_seed(5)
    return randomised(nn.BatchNorm1d(4, dtype=torch.float64))


def counts(rank: int, world: int) -> dict[str, dict[str, int]]:
    found = {}

    def step(name: str, layer: nn.Module, x: Tensor) -> None:
        with Counted() as found[name]:
            output = layer(x)
            if output.requires_grad:
                output.sin().sum().backward()

    x = batch(rank)
    step("trains", layer_of(), x.clone().requires_grad_())
    step("first layer", layer_of(), x)
    step("without affine", layer_of(affine=False), x.clone().requires_grad_())
    step("input trains on rank 0", layer_of(), x.clone().requires_grad_(rank == 0))
    step("an empty batch", layer_of(), x[: 3 * (rank == 0)].clone().requires_grad_())
    step("eval", layer_of().eval(), x.clone().requires_grad_())
    step("eval, no statistics", layer_of(track_running_stats=False).eval(), x.clone().requires_grad_())
    with torch.no_grad():
        step("no_grad", layer_of(), x)
    with torch.inference_mode():
        step("inference_mode", layer_of(), x)
    step("meta", layer_of().to("meta"), x.to("meta"))
    frozen = layer_of()
    freezekit.freeze(frozen, "*")
    step("frozen", frozen.train(), x.clone().requires_grad_())
    mixed = layer_of().eval()
    if rank == 0:
        freezekit.freeze(mixed, "*")
    step("frozen on rank 0, eval on the others", mixed, x.clone().requires_grad_())
    frozen = layer_of()
    freezekit.freeze(frozen, "*").undo()
    step("freeze undone", frozen, x.clone().requires_grad_())
    network = nn.Sequential(nn.Conv1d(4, 4, 1).double(), layer_of(), nn.Conv1d(4, 4, 1).double(), layer_of())
    step("two layers", network, x)
    freezekit.freeze(network, ["0", "1"])
    step("two layers, one frozen", network.train(), x)
    return found


def errors(rank: int, world: int) -> dict[str, Any]:
    """What goes wrong on a rank, and on all as one; after each, the ranks still talk to each other."""
    found: dict[str, Any] = {}
    x = batch(rank)

    def attempt(name: str, call: Callable[[], Any]) -> None:
        found[name] = outcome(call)
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == world

    for name, wrong in {
        "channels": x[:, :3],
        "more channels": torch.cat([x, x], 1),
        "one dimension": x[0, 0],
        "dtype": x.int(),
        "float32 input": x.float(),
    }.items():
        attempt(name, lambda wrong=wrong: layer_of()(wrong if rank == 1 else x))
    plain = SyncBatchNorm(4, affine=False, track_running_stats=False)
    attempt("dtypes differ", lambda: plain(x.float() if rank == 1 else x))
    one = x[:1, :, :1] if rank == 1 else x[:0]
    attempt("one value", lambda: layer_of()(one))
    attempt("no value", lambda: layer_of()(x[:0]).shape)
    attempt("two values", lambda: layer_of()(x[:1, :, :1] if rank < 2 else x[:0]).shape)
    half = layer_of()
    half.running_mean = None if rank == 1 else half.running_mean
    attempt("no running mean", lambda: half(x))
    zero = layer_of(eps=0.0 if rank == 1 else 1e-5)
    attempt("eps", lambda: zero(x))
    leaf = x.clone().requires_grad_()
    with torch.set_grad_enabled(rank != 1):
        output = layer_of()(leaf)
    attempt("no graph", lambda: output.requires_grad and torch.autograd.grad(output.sum(), leaf))
    layer, leaf = layer_of(), x.clone().requires_grad_(rank != 1)
    output, wanted = layer(leaf), [*layer.parameters()]
    attempt("derivative", lambda: torch.autograd.grad(output.sum(), wanted, create_graph=True))
    return found


class Twice(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.norm(x).tanh())
        return out


def graphs(rank: int, world: int) -> dict[str, Any]:
    """Gradients in graphs of several kinds."""
    found = {}
    x = batch(rank)
    found["twice"] = run(Twice(layer_of()), x)
    for reentrant in (False, True):
        layer = layer_of()

        def forward(x: Tensor, layer: Any = layer, reentrant: bool = reentrant) -> Any:
            return checkpoint(layer, x, use_reentrant=reentrant)

        leaf = x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            forward(leaf).sin().sum().backward()
        found[f"checkpoint {reentrant}"] = [leaf.grad, *(p.grad for p in layer.parameters())]
    layer, leaf = layer_of(), x.clone().requires_grad_()
    layer(leaf).sin().sum().backward()
    found["checkpoint"] = [leaf.grad, *(p.grad for p in layer.parameters())]
    for empty in (False, True):
        layer, leaf = layer_of(), (x[:0] if empty and rank == 1 else x).clone().requires_grad_()
        first = torch.autograd.grad(layer(leaf).sin().sum(), [leaf, *layer.parameters()], create_graph=True)
        # A rank's part of a sum over ranks: so the gradients of the parameters are summed before the square.
        summed = [first[0], *(total(grad) / world for grad in first[1:])]
        second = torch.autograd.grad(
            first[0].square().sum() + sum(g.sin().sum() for g in summed[1:]), [leaf, *layer.parameters()]
        )
        found[f"second order, empty {empty}"] = [leaf.detach(), *second]
    layer, leaf = layer_of(), x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(layer, backend="aot_eager")
        compiled(leaf).sin().sum().backward()
    found["compiled"] = [leaf.grad, *(p.grad for p in layer.parameters()), layer.running_var]
    layer, leaf = layer_of(), x.clone().requires_grad_()
    layer(leaf).sin().sum().backward()
    found["eager"] = [leaf.grad, *(p.grad for p in layer.parameters()), layer.running_var]
    return found


def total(tensor: Tensor) -> Tensor:
    """The sum over ranks, differentiable."""
    summed: Tensor = freezekit.nn.sync_batchnorm._Sum.apply(tensor, dist.group.WORLD)
    return summed


def groups(rank: int, world: int) -> dict[str, Any]:
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    mine = pairs[rank // 2]
    first = layer_of(process_group=pairs[0])  # of which the later ranks are no members
    return {"pairs": run(layer_of(process_group=mine), batch(rank)), "first": run(first, batch(rank))}


def network() -> nn.Sequential:
    torch.manual_seed(6)
    body = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )
    return nn.Sequential(body, nn.Flatten(), nn.Linear(5 * 16, 2)).double()


def images(world: int) -> list[Tensor]:
    torch.manual_seed(9)
    return list(data((4 * world, 3, 8, 8), torch.float64).chunk(world))


def train(model: nn.Module, xs: list[Tensor]) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        output = model(torch.cat([x.roll(step, -1) for x in xs]))
        output.square().mean().backward()
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def ddp(rank: int, world: int) -> dict[str, Any]:
    found = {}
    for name, convert in {"own": "sync", "naive": "freezekit"}.items():
        model = freezekit.convert_batchnorm(network(), to=convert)
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        train(wrapped, images(world)[rank : rank + 1])
        found[name] = model.state_dict()
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    found["torch's"] = outcome(lambda: DistributedDataParallel(theirs))
    return found


def probe(rank: int, world: int) -> list[Any]:
    """A trial on one rank alone, which must not wait for the others, nor be told anything else."""
    if rank:
        return []
    model = freezekit.convert_batchnorm(network().train(), to="sync", process_group=dist.group.WORLD)
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    sample = Sample.of(model[0], (images(world)[0],), {}, whole=False)
    with Counted() as called:
        trial = Trial(model[0], model, sample, lambda *_: True)
        trial.look(first=True)
    same = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    risks = [finding.code for finding in freezekit.check(model)]
    return [[(path, seen.code) for path, seen in trial.found], called, same, risks]


PARTS = {f.__name__: f for f in (counts, errors, graphs, groups, ddp, probe)}


def behaviour(rank: int, world: int) -> dict[str, Any]:
    return {name: part(rank, world) for name, part in PARTS.items()}


@pytest.fixture(scope="module")
def all_seen() -> dict[int, dict[str, list[Any]]]:
    seen = {}
    for world in (2, 4):
        ranks = run_ranks(behaviour, world, world)
        seen[world] = {name: [found[name] for found in ranks] for name in PARTS}
    return seen


TALK = {"all_gather": 1, "all_reduce": 1}
EXPECTED_COUNTS: dict[str, dict[str, int]] = {
    "trains": TALK,
    "first layer": {"all_gather": 1},
    "without affine": TALK,
    "input trains on rank 0": TALK,
    "an empty batch": TALK,
    "eval": {},
    "eval, no statistics": {},
    "no_grad": {"all_gather": 1},
    "inference_mode": {"all_gather": 1},
    "meta": {},
    "frozen": {},
    "frozen on rank 0, eval on the others": {},
    "freeze undone": TALK,
    "two layers": {"all_gather": 2, "all_reduce": 2},
    "two layers, one frozen": TALK,
}


@every_world
@pytest.mark.parametrize("name", EXPECTED_COUNTS)
def test_collectives(all_seen: Any, name: str, world: int) -> None:
    assert [found[name] for found in all_seen[world]["counts"]] == [EXPECTED_COUNTS[name]] * world


ELSEWHERE = (
    "SyncBatchNorm cannot run: the input on rank 1 does not fit its layer. Remedy: see the error raised there"
)
OWN_ERRORS = {
    "channels": (RuntimeError, "should be given 4 channels: the input of shape (3, 3, 5) has 3"),
    "more channels": (RuntimeError, "should be given 4 channels: the input of shape (3, 8, 5) has 8"),
    "one dimension": (ValueError, "expected at least 2D input (got 1D input)"),
    "dtype": (NotImplementedError, "not implemented for torch.int32"),
    "float32 input": (RuntimeError, "weight is torch.float64, but a torch.float32 input takes"),
    "no running mean": (ValueError, "must either both be None"),
    "eps": (ValueError, "eps must be positive"),
}


@every_world
@pytest.mark.parametrize("name", OWN_ERRORS)
def test_what_does_not_fit_on_one_rank_is_an_error_on_all(all_seen: Any, name: str, world: int) -> None:
    for rank, found in enumerate(all_seen[world]["errors"]):
        error, message = found[name]
        if rank == 1:
            assert error is OWN_ERRORS[name][0]
            assert OWN_ERRORS[name][1] in message
        else:
            assert (error, message) == (RuntimeError, ELSEWHERE)


@every_world
def test_errors_of_all_ranks_together(all_seen: Any, world: int) -> None:
    one = f"Expected more than 1 value per channel when training, got 1 on all {world} ranks together"
    widths = [8, 4, 8, 8][:world]
    for found in all_seen[world]["errors"]:
        assert found["one value"] == (ValueError, one)
        assert found["dtypes differ"][0] is RuntimeError
        assert f"in different dtypes, of {widths} bytes by rank" in found["dtypes differ"][1]
        assert found["no value"] == (None, (0, 4, 5))
        assert found["two values"][0] is None


@every_world
def test_a_backward_that_others_do_not_run_is_an_error_and_no_wait(all_seen: Any, world: int) -> None:
    for rank, found in enumerate(all_seen[world]["errors"]):
        if rank == 1:
            assert found["no graph"] == (None, False)
        else:
            assert found["no graph"][0] is RuntimeError
            assert "but rank 1 ran SyncBatchNorm without a graph" in found["no graph"][1]
        assert found["derivative"][0] is RuntimeError
        assert "the input requires a gradient on some ranks only" in found["derivative"][1]


@every_world
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(all_seen: Any, world: int, reentrant: bool) -> None:
    for found in all_seen[world]["graphs"]:
        assert_same(found[f"checkpoint {reentrant}"], found["checkpoint"], 0)


@every_world
def test_compiled(all_seen: Any, world: int) -> None:
    for found in all_seen[world]["graphs"]:
        assert_same(found["compiled"], found["eager"], 1e-12)


@every_world
def test_twice_in_one_graph(all_seen: Any, world: int) -> None:
    seen = [found["twice"] for found in all_seen[world]["graphs"]]
    x = torch.cat([batch(rank) for rank in range(world)])
    grad = torch.cat([torch.linspace(-1, 2, 60).reshape(3, 4, 5).cos().double()] * world)
    truth = run(Twice(joined_layer()), x, grad)
    assert_same(torch.cat([s["output"] for s in seen]), truth["output"], 1e-12)
    for key in ("norm.weight.grad", "norm.bias.grad"):
        assert_same(torch.stack([s[key] for s in seen]).sum(0), truth[key], 1e-11)
    assert_same(seen[0]["norm.running_var"], truth["norm.running_var"], 1e-12)


@every_world
@pytest.mark.parametrize("empty", [False, True])
def test_second_order(all_seen: Any, world: int, empty: bool) -> None:
    seen = [found[f"second order, empty {empty}"] for found in all_seen[world]["graphs"]]
    layer, x = joined_layer(), torch.cat([s[0] for s in seen]).requires_grad_()
    first = torch.autograd.grad(layer(x).sin().sum(), [x, *layer.parameters()], create_graph=True)
    # Each of the `world` ranks adds the same function of the summed gradients over `world`.
    loss = first[0].square().sum() + sum((g / world).sin().sum() * world for g in first[1:])
    truth = torch.autograd.grad(loss, [x, *layer.parameters()])
    assert_same(torch.cat([s[1] for s in seen]), truth[0], 1e-11)
    for got, expected in zip(zip(*(s[2:] for s in seen), strict=True), truth[1:], strict=True):
        assert_same(torch.stack(got).sum(0), expected, 1e-11)


@every_world
def test_process_groups(all_seen: Any, world: int) -> None:
    seen = all_seen[world]["groups"]
    for first in range(0, world, 2):
        x = torch.cat([batch(first), batch(first + 1)])
        truth = joined_layer()(x)
        for name in ("pairs", "first"):
            got = torch.cat([seen[first][name]["output"], seen[first + 1][name]["output"]])
            if name == "pairs" or first == 0:
                assert_same(got, truth, 1e-12)
            else:  # no members of the group: each for itself
                assert_same(got[:3], joined_layer()(batch(first)), 1e-12)


@every_world
def test_ddp_is_one_process_on_the_joined_batch(all_seen: Any, world: int) -> None:
    truth = train(network(), images(world))
    for found in all_seen[world]["ddp"]:
        assert_same(found["own"], truth, 1e-12)
        assert found["own"].keys() == truth.keys()
        assert not torch.allclose(found["naive"]["0.4.running_var"], truth["0.4.running_var"], rtol=1e-3)
        assert found["torch's"] == (ValueError, "SyncBatchNorm layers only work with GPU modules")


@every_world
def test_a_probe_on_one_rank_waits_for_none(all_seen: Any, world: int) -> None:
    found, called, same, risks = all_seen[world]["probe"][0]
    assert found == [("1", "FK201"), ("4", "FK201")]
    assert called == {}
    assert same
    assert risks == ["FK301"] * 2


def beside_torchs(rank: int) -> dict[str, list[dict[str, Tensor]]]:
    """Both layers on one GPU; gloo carries CUDA tensors, too."""
    found: dict[str, list[dict[str, Tensor]]] = {"own": [], "torch": []}
    for name, home in {"own": freezekit.nn, "torch": nn}.items():
        for dtype in (torch.float64, torch.float32):
            torch.manual_seed(5)
            layer = randomised(home.SyncBatchNorm(4)).to("cuda", dtype)
            x = batch(rank)[: 1 + rank].to("cuda", dtype)
            found[name] += [{k: v.cpu() for k, v in run(layer, x).items()} for _ in range(3)]
    return found


@pytest.mark.gpu
def test_against_torchs_layer() -> None:
    for found in run_ranks(beside_torchs, 2):
        for got, expected in zip(found["own"], found["torch"], strict=True):
            assert_same(got, expected, 1e-10 if got["output"].dtype == torch.float64 else 1e-5)
