"""The frozen values: what is compared when, and what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from freezekit.audit.live.kept import Kept, bits_of, is_plain
from freezekit.audit.live.region import Region
from freezekit.audit.live.snapshot import WINDOW, Snapshot

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def frozen(model: nn.Module) -> nn.Module:
    return zoo.scramble(model).requires_grad_(False)


def large(parts: int = 24, size: int = 300_000) -> nn.Module:
    """A model with more than one window's worth of large parameters."""
    torch.manual_seed(0)
    return frozen(nn.ModuleList(nn.Linear(size // 100, 100, bias=False) for _ in range(parts)))


def flip(tensor: Tensor, index: int) -> None:
    """Change one bit, so that torch does not see it."""
    tensor.data.view(torch.int32).view(-1)[index] ^= 1


def names(snapshot: Snapshot, **options: bool) -> list[str]:
    return [change.place.name for change in snapshot.look(**options)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("digest", [False, True])
def test_any_bit_counts(dtype: torch.dtype, digest: bool) -> None:
    torch.manual_seed(0)
    for size in (1, 7, 70_000):
        tensor = torch.randint(0, 2, (size,)).to(dtype)
        kept = Kept(bits_of(tensor), digest=digest)
        assert not kept.differs(bits_of(tensor.clone()))
        for _ in range(3):
            other = tensor.clone()
            at, bit = int(torch.randint(size, ())), int(torch.randint(other.element_size() * 8, ()))
            if dtype is torch.bool:
                bit = 0
            bits_of(other).view(torch.uint8)[at * other.element_size() + bit // 8] ^= 1 << bit % 8
            assert kept.differs(bits_of(other))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=40), st.randoms())
def test_a_digest_knows_places(values: list[int], random: object) -> None:
    row = torch.tensor(values, dtype=torch.int32)
    kept = Kept(row, digest=True)
    shuffled = copy.copy(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert bool(kept.differs(torch.tensor(shuffled, dtype=torch.int32))) == (shuffled != values)


@pytest.mark.parametrize("digest", [False, True])
def test_large_parameters_are_all_compared_within_a_window(digest: bool) -> None:
    model = large()
    snapshot = Snapshot(Region(model), turns=True, digest=digest)
    seen = []
    for part in range(24):
        weight = model[part].weight
        index = weight.numel() // 2 + 1  # not among the values looked at each time
        flip(weight, index)
        looks = next(n for n in range(1, WINDOW + 2) if names(snapshot) == [f"{part}.weight"])
        seen.append(looks)
        flip(weight, index)
        assert names(snapshot) == []
    assert max(seen) <= WINDOW
    assert max(seen) > WINDOW // 2  # so that it is in turns


@pytest.mark.parametrize("digest", [False, True])
def test_hints(digest: bool) -> None:
    model = large()
    snapshot = Snapshot(Region(model), turns=True, digest=digest)
    weight = model[13].weight
    before = weight.clone()
    with torch.no_grad():
        weight.view(-1)[12_345].add_(1)  # torch counts it
    (change,) = snapshot.look()
    assert (change.place.name, change.writes, change.rebased, change.what) == ("13.weight", 1, False, "value")
    assert change.since == 0
    with torch.no_grad():
        weight.copy_(before)
    assert names(snapshot) == []
    weight.data *= 1.01  # seen in the values looked at each time
    assert names(snapshot) == ["13.weight"]
    weight.data = weight.data.clone()
    (change,) = snapshot.look()
    assert change.rebased
    model[13].weight = nn.Parameter(weight.data.clone(), requires_grad=False)
    (change,) = snapshot.look()
    assert change.replaced


def test_what_comes_back_is_no_change() -> None:
    model = frozen(nn.BatchNorm1d(3))
    snapshot = Snapshot(Region(model), turns=True)
    mean = model.running_mean.clone()
    model.running_mean += 1
    assert names(snapshot) == ["running_mean"]
    model.running_mean.copy_(mean)
    assert names(snapshot) == []
    model.running_mean = mean
    assert names(snapshot) == []
    mean += 1
    (change,) = snapshot.look()
    assert not change.replaced
    assert change.writes == 1


@pytest.mark.parametrize("digest", [False, True])
def test_everything_at_each_look(digest: bool) -> None:
    model = large()
    snapshot = Snapshot(Region(model), turns=False, digest=digest)
    flip(model[17].weight, 150_000)
    assert names(snapshot) == ["17.weight"]
    flip(model[17].weight, 150_000)
    assert names(snapshot) == []


def test_a_full_look() -> None:
    model = large()
    snapshot = Snapshot(Region(model), turns=True)
    flip(model[23].weight, 150_000)
    assert names(snapshot, full=True) == ["23.weight"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = frozen(nn.Conv2d(40, 50, 5)).to(memory_format=memory_format)
    snapshot = Snapshot(Region(model), turns=True)
    assert snapshot._queue
    assert torch.equal(snapshot.slots["weight"].before(), model.weight)
    other = torch.channels_last if memory_format is torch.contiguous_format else torch.contiguous_format
    for _ in range(2):
        model.to(memory_format=other)
        assert names(snapshot, full=True) == []
        model.weight.data[3, 2, 1, 0] += 1
        assert names(snapshot) == ["weight"]
        model.weight.data[3, 2, 1, 0] -= 1
        model.weight.data.copy_(snapshot.slots["weight"].before())


def test_what_is_kept() -> None:
    model = frozen(torchvision.models.mobilenet_v2(num_classes=10))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    state = sum(t.numel() * t.element_size() for m in norms for t in m.state_dict().values())
    assert Snapshot(Region(model, norm=True), turns=False).nbytes == state
    region = Region(model)
    digests = Snapshot(region, turns=True, digest=True)
    assert 8 * len(region.places) <= digests.nbytes <= 64 * len(region.places)
    whole = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert whole <= Snapshot(region, turns=True).nbytes <= 1.01 * whole


def test_a_digest_of_one_large_tensor_is_small() -> None:
    model = frozen(nn.Linear(10_000, 1_000, bias=False))
    assert Snapshot(Region(model), turns=False, digest=True).nbytes <= 64


def test_a_tied_tensor_is_kept_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(500, 500, bias=False), "b": nn.Linear(500, 500, bias=False)})
    model["b"].weight = model["a"].weight
    frozen(model)
    snapshot = Snapshot(Region(model), turns=False)
    assert snapshot.nbytes == 500 * 500 * 4
    model["b"].weight = nn.Parameter(model["b"].weight + 1, requires_grad=False)
    assert names(snapshot) == ["b.weight"]


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2), requires_grad=False)
        self.codes = torch.randn(3)
        self.anchors = [torch.randn(2, 2), torch.randn(1)]
        self.table = {"a": torch.randn(2), 3: torch.randn(2)}
        self.result = torch.randn(2, requires_grad=True) * 2
        self.nothing = None


def test_tensors_held_as_plain_attributes() -> None:
    torch.manual_seed(0)
    model = Holder()
    snapshot = Snapshot(Region(model), turns=True)
    assert list(snapshot.slots) == ["weight", "codes", "anchors.0", "anchors.1", "table.a", "table.3"]
    model.codes += 1
    model.anchors[1] = model.anchors[1] * 2
    model.table[3].data[0] = 7
    assert names(snapshot) == ["codes", "anchors.1", "table.3"]
    del model.anchors
    model.cache = torch.zeros(3)
    changes = {change.place.name: change.what for change in snapshot.look()}
    assert changes == {"codes": "value", "anchors.0": "missing", "anchors.1": "missing", "table.3": "value"}


def test_a_lists_of_weights_of_an_lstm_is_not_watched_twice() -> None:
    model = frozen(nn.LSTM(3, 4))
    assert list(Region(model).places) == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]


def test_modules_put_in_place_of_others() -> None:
    model = frozen(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    snapshot = Snapshot(Region(model), turns=True)
    twin = copy.deepcopy(model[1])
    model[1] = twin
    assert names(snapshot) == []
    twin.running_var *= 2
    assert names(snapshot) == ["1.running_var"]
    model[1] = nn.Identity()
    assert {c.place.name.partition(".")[2]: c.what for c in snapshot.look()} == dict.fromkeys(
        ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"), "missing"
    )
    model[1] = twin
    assert names(snapshot) == ["1.running_var"]


def test_additions_to_a_layer_frozen_whole() -> None:
    model = frozen(nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3)))
    snapshot = Snapshot(Region(model), turns=True)
    model[0].bias = nn.Parameter(torch.zeros(3))
    assert [(c.place.name, c.what) for c in snapshot.look()] == [("0.bias", "added")]
    model[0].bias = None
    assert names(snapshot) == []
    model[1].register_buffer("mask", torch.ones(3))
    assert names(snapshot) == ["1.mask"]


@pytest.mark.parametrize("digest", [False, True])
def test_casts(digest: bool) -> None:
    model = frozen(nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(3)))
    snapshot = Snapshot(Region(model), turns=True, digest=digest)
    model.half()
    changes = {change.place.name: change.what for change in snapshot.look()}
    assert set(changes.values()) == {"dtype"}
    assert len(changes) == 6  # the counter stays
    model.float()
    assert "0.weight" in names(snapshot)  # rounded
    model[0].to("meta")
    assert {c.place.name: c.what for c in snapshot.look()}["0.weight"] == "device"


def test_views_of_the_same_memory_in_another_shape() -> None:
    model = frozen(nn.Linear(6, 4))
    snapshot = Snapshot(Region(model), turns=True)
    model.weight.data = model.weight.data.view(4, 6).t()
    assert [(c.place.name, c.what) for c in snapshot.look()] == [("weight", "shape")]
    model.weight.data = model.weight.data.t()
    model.bias.data = model.bias.data.view(torch.int32)
    assert [(c.place.name, c.what) for c in snapshot.look()] == [("bias", "dtype")]


def test_a_square_matrix_transposed_in_place() -> None:
    model = frozen(nn.Linear(300, 300))
    snapshot = Snapshot(Region(model), turns=True)
    model.weight.data = model.weight.data.t()
    assert names(snapshot) == ["weight"]
    model.weight.data = model.weight.data.t()
    assert names(snapshot) == []


def test_a_buffer_resized_in_the_same_memory() -> None:
    model = frozen(nn.BatchNorm1d(6))
    snapshot = Snapshot(Region(model), turns=True)
    model.running_mean.data = model.running_mean.data[:3]
    assert [(c.place.name, c.what) for c in snapshot.look()] == [("running_mean", "shape")]
    model.running_var.resize_(2)
    assert names(snapshot) == ["running_mean", "running_var"]


def test_inference_tensors() -> None:
    with torch.inference_mode():
        model = frozen(nn.BatchNorm1d(3))
    assert not is_plain(model.running_mean)
    snapshot = Snapshot(Region(model), turns=True)
    assert names(snapshot) == []
    with torch.inference_mode():
        model.running_mean += 1
    assert names(snapshot) == ["running_mean"]


def test_the_look_leaves_no_trace() -> None:
    model = frozen(torchvision.models.resnet18(num_classes=10))
    state = zoo.snapshot(model)
    versions = {name: t._version for name, t in model.state_dict(keep_vars=True).items()}
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    snapshot = Snapshot(Region(model), turns=True)
    for _ in range(3):
        assert snapshot.look() == []
    assert zoo.snapshot(model) == state
    assert versions == {name: t._version for name, t in model.state_dict(keep_vars=True).items()}
    assert keys == {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("digest", [False, True])
@pytest.mark.parametrize("host", [False, True])
def test_cuda(digest: bool, host: bool) -> None:
    model = frozen(torchvision.models.resnet18(num_classes=10)).cuda()
    snapshot = Snapshot(Region(model), turns=True, digest=digest, host=host)
    assert snapshot.look() == []
    model.bn1.running_mean[0] += 1
    assert names(snapshot) == ["bn1.running_mean"]
    model.bn1.running_mean.copy_(torch.as_tensor(snapshot.slots["bn1.running_mean"].before() or 0))
