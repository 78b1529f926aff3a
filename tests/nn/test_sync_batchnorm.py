"""The own SyncBatchNorm in one process: its formulas, in a group of one, against ordinary batch norm."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from norms import HALVES, assert_no_less_exact, assert_same, data, randomised, run
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import freezekit
from freezekit.nn import sync_batchnorm

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")


class Forced(freezekit.nn.SyncBatchNorm):
    """Synchronises in a group of one, too."""

    def _group(self, input: Tensor) -> Any:
        return dist.group.WORLD if self.training else None


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pair(shape: tuple[int, ...], **kwargs: Any) -> tuple[Any, Any]:
    forced = randomised(Forced(shape[1], **kwargs))
    theirs = getattr(nn, f"BatchNorm{max(len(shape) - 2, 1)}d")(shape[1], **kwargs)
    theirs.load_state_dict(forced.state_dict(), strict=True)
    return forced, theirs


SHAPES = [
    (6, 4),
    (3, 4, 5),
    (3, 4, 2, 5),
    (2, 4, 2, 3, 2),
    (40, 8, 16, 20),
]  # the last takes the blocked kernel


@needs_gloo
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 0.3, "momentum": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_group_of_one_is_batch_norm(shape: tuple[int, ...], kwargs: dict[str, Any], last: bool) -> None:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    if last and layout is None:
        pytest.skip("no such layout")
    forced, theirs = pair(shape, **kwargs, dtype=torch.float64)
    for training in (True, True, False):
        x = data(shape, torch.float64)
        x = x.contiguous(memory_format=layout) if last else x
        got, expected = run(forced.train(training), x), run(theirs.train(training), x)
        assert_same(got, expected, 1e-12)
        assert got["output"].stride() == expected["output"].stride()


@needs_gloo
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_less_exact_than_torch(shape: tuple[int, ...], dtype: torch.dtype, autocast: bool) -> None:
    forced, theirs = pair(shape)
    exact = copy.deepcopy(theirs).double()
    x, grad = data(shape, dtype), torch.randn(shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, native = run(forced, x, grad), run(theirs, x, grad)
    assert_no_less_exact(got, native, run(exact, x.double(), grad.double()))


@needs_gloo
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "strided",
    [
        lambda: data((4, 6), torch.float64).t(),
        lambda: data((2, 5, 4), torch.float64).transpose(1, 2),
        lambda: data((2, 8, 3, 10), torch.float64)[:, ::2, :, 1::2],
        lambda: data((2, 4, 3, 1), torch.float64).expand(2, 4, 3, 5),
    ],
)
def test_strides(strided: Any) -> None:
    x = strided()
    forced, theirs = pair(tuple(x.shape), dtype=torch.float64)
    assert_same(run(forced, x), run(theirs, x), 1e-12)


@needs_gloo
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("affine", [True, False])
def test_derivatives(affine: bool) -> None:
    layer = randomised(Forced(2, affine=affine, track_running_stats=False, dtype=torch.float64))
    x = data((3, 2, 2), torch.float64).requires_grad_()

    def call(x: Tensor, *parameters: Tensor) -> Any:
        named = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(layer, named, x)

    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@needs_gloo
@pytest.mark.usefixtures("alone")
def test_what_cannot_be_batched_says_so() -> None:
    x = data((3, 2, 2)).requires_grad_()
    output = Forced(2)(x)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for c10d::allreduce_"):
        torch.autograd.grad(output, x, torch.ones(4, *output.shape), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: Forced(2)(x).sum())(x.detach())


@needs_gloo
@pytest.mark.usefixtures("alone")
def test_far_from_zero() -> None:
    shape = (64, 4, 5)
    forced, theirs = pair(shape, momentum=1.0)
    x = torch.randn(shape) * 1e-2 + 1e4
    got, truth = run(forced, x), run(copy.deepcopy(theirs).double(), x.double())
    assert_same(got["output"].double(), truth["output"], 1e-3)
    naive = x.square().mean((0, 2)) - x.mean((0, 2)).square()
    assert (naive / truth["running_var"] - 1).abs().max() > 0.1
    torch.testing.assert_close(got["running_var"].double(), truth["running_var"], rtol=1e-4, atol=0)


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 1),
    offset=st.sampled_from([0.0, 1.0, -1e6]),
    seed=st.integers(0, 2**32),
)
def test_statistics_joined(counts: list[int], offset: float, seed: int) -> None:
    joined = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed)).double() + offset
    parts = joined.split(counts)
    rows = [(p.mean(0), p.var(0, correction=0)) if len(p) else (torch.zeros(3).double(),) * 2 for p in parts]
    heads = [[float(n), 1.0, 8.0] for n in counts]
    told = (
        *(torch.stack(column) for column in zip(*rows, strict=True)),
        torch.tensor(counts)[:, None].double(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync_batchnorm, "_gather", lambda *_: (*told, heads))
        for mean, var in rows:
            exchange = sync_batchnorm._Exchange(None, 1, 1)
            pivot = mean.round()
            got_mean, rest, got_var = exchange.shared(pivot, mean - pivot, var)
            torch.testing.assert_close(got_mean, joined.mean(0), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(pivot + rest, joined.mean(0), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got_var, joined.var(0, correction=0), rtol=1e-9, atol=1e-12)


def test_in_one_process_it_is_any_batch_norm() -> None:
    layer = randomised(freezekit.nn.SyncBatchNorm(4))
    for shape in SHAPES[:4]:
        ordinary = getattr(freezekit.nn, f"BatchNorm{max(len(shape) - 2, 1)}d")(4)
        ordinary.load_state_dict(layer.state_dict())
        x = data(shape)
        assert_same(run(copy.deepcopy(layer), x), run(ordinary, x), 0)


def test_a_torch_built_without_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    monkeypatch.delattr(dist, "is_initialized")
    assert freezekit.nn.SyncBatchNorm(4)(data((3, 4))).shape == (3, 4)


def test_ddp_on_the_cpu_refuses_torchs_class_which_is_why_this_is_none() -> None:
    assert not isinstance(freezekit.nn.SyncBatchNorm(2), nn.SyncBatchNorm)
    assert issubclass(freezekit.nn.SyncBatchNorm, nn.modules.batchnorm._BatchNorm)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "process_group"):
        assert hasattr(nn.SyncBatchNorm(2), name) == hasattr(freezekit.nn.SyncBatchNorm(2), name) is True
