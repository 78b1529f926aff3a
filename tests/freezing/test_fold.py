"""convert="fold": which layers fold, right values and gradients, and that it all comes apart again."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import freezekit
from freezekit import FreezekitError, freeze, freeze_backbone, unfreeze


def net(seed: int = 0, **conv: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = OrderedDict(
        conv=nn.Conv2d(3, 4, 3, **conv), bn=nn.BatchNorm2d(4), act=nn.ReLU(), fc=nn.Conv2d(4, 2, 1)
    )
    return zoo.scramble(nn.Sequential(layers))  # type: ignore[return-value]


def close(model: nn.Module, expected: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def eval_output(model: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(model).eval()(x).detach()


X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))


# -- values and gradients ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 3), transposed=st.booleans(), groups=st.integers(1, 3), stride=st.integers(1, 2),
    dilation=st.integers(1, 2), kernel=st.integers(1, 3), bias=st.booleans(), affine=st.booleans(),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]), out=st.integers(1, 2),
    trains=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_convolution(
    rank: int, transposed: bool, groups: int, stride: int, dilation: int, kernel: int, bias: bool,
    affine: bool, mode: str, out: int, trains: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    kwargs: dict[str, Any] = {"groups": groups, "stride": stride, "dilation": dilation, "bias": bias}
    kwargs |= {"padding": 1} if transposed else {"padding": 1, "padding_mode": mode}
    conv = getattr(nn, f"Conv{'Transpose' * transposed}{rank}d")(2 * groups, out * groups, kernel, **kwargs)
    norm = getattr(nn, f"BatchNorm{rank}d")(out * groups, affine=affine)
    model = zoo.scramble(nn.Sequential(conv, norm))
    x = torch.randn(2, 2 * groups, *[6] * rank)
    exact = copy.deepcopy(model).double().eval()
    leaf = x.double().requires_grad_()
    expected = exact(leaf)
    expected.square().sum().backward()

    handle = freeze(model, "1" if trains else ["0", "1"], convert="fold")
    assert handle.kernels == {"1": "fold"}
    x.requires_grad_()
    for _ in range(2):  # the second time from what is remembered
        x.grad = None
        model.zero_grad()
        given_out = model.train()(x)
        given_out.square().sum().backward()
    scale = float(expected.detach().abs().max()) + 1
    torch.testing.assert_close(given_out.double(), expected, rtol=1e-5, atol=1e-5 * scale)
    grads = [(x.grad, leaf.grad)]
    grads += [(p.grad, q.grad) for p, q in zip(conv.parameters(), exact[0].parameters(), strict=True)]
    for ours, theirs in grads if trains else grads[:1]:
        size = float(theirs.abs().max()) + 1
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5 * size)
    if not trains:
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("convert", [None, "affine", "fold"])
@pytest.mark.parametrize("make", [net, lambda: convless()])
def test_gamma_and_beta_train_when_only_statistics_are_frozen(
    convert: str | None, make: Callable[[], nn.Module]
) -> None:
    model, x = make().double(), X.double()
    exact = copy.deepcopy(model).eval()
    handle = freeze(model, ["conv", "bn"], bn="freeze_stats", convert=convert)
    assert {"bn.weight", "bn.bias"} <= set(handle.trainable)
    assert not {"bn.weight", "bn.bias"} & set(handle.frozen)
    assert {"bn.running_mean", "conv.weight"} <= set(handle.frozen)
    bits = {n: b for n, b in zoo.snapshot(model).items() if n in handle.frozen}
    for network in (model.train(), exact):
        network(x).square().sum().backward()
    for name in ("weight", "bias"):
        ours, theirs = (getattr(network.bn, name).grad for network in (model, exact))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert {n: b for n, b in zoo.snapshot(model).items() if n in handle.frozen} == bits
    torch.testing.assert_close(model(x), eval_output(model, x))  # and the moved gamma is used
    handle.undo()
    assert type(model.bn) is nn.BatchNorm2d


def convless() -> nn.Module:
    torch.manual_seed(0)
    layers = OrderedDict(conv=nn.Conv2d(3, 3, 1), act=nn.ReLU(), bn=nn.BatchNorm2d(3), fc=nn.Conv2d(3, 2, 1))
    return zoo.scramble(nn.Sequential(layers))


def test_linear_folds_by_rank() -> None:
    model = zoo.scramble(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    flat, sequence = torch.randn(7, 6), torch.randn(7, 4, 6)
    with pytest.raises(RuntimeError, match="running_mean should contain 5 elements not 4"):
        model.eval()(torch.randn(7, 5, 6))
    expected = [eval_output(model, x) for x in (flat, sequence)]
    assert freeze(model, "*", convert="fold").kernels == {"1": "fold"}
    for x, y in zip((flat, sequence), expected, strict=True):
        close(model, y, x)
    with pytest.raises(RuntimeError, match="running_mean should contain 5 elements not 4"):
        model(torch.randn(7, 5, 6))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_unbatched_input_is_taken_or_refused_as_before(rank: int) -> None:
    conv, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
    model = zoo.scramble(nn.Sequential(conv(3, 6, 1), norm(6))).eval()
    x = torch.randn(3, *[6] * rank)
    if rank == 1:  # (6, 6) is a batch of six to BatchNorm1d
        expected = model(x)
        freeze(model, "*", convert="fold")
        close(model, expected, x)
        return
    for _ in range(2):
        with pytest.raises(ValueError, match=f"expected {rank + 2}D input .got {rank + 1}D input"):
            model(x)
        freeze(model, "*", convert="fold")


def test_sizes_and_layouts() -> None:
    model = net()
    expected = eval_output(model, X)
    freeze_backbone(model, convert="fold", head="fc")
    assert model(X[:0]).shape == (0, 2, 6, 6)
    close(model, expected, X.contiguous(memory_format=torch.channels_last))
    close(model.to(memory_format=torch.channels_last), expected, X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(X).float(), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(model.double()(X.double()).float(), expected)


# -- what folds ----------------------------------------------------------------------------------------


class Block(nn.Module):
    """A forward of one's own, by name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "twice":
            return self.bn(y) + y
        if self.how == "shared":
            return self.bn(y) + self.conv(x + 1)
        if self.how == "again":
            return self.bn(y) + self.bn(self.other(x))
        if self.how == "in training":
            return self.bn(y) + (y if self.training else 0)
        if self.how == "between":
            return self.bn(y * 2)
        if self.how == "untraceable" and x.sum() > 0:
            return self.bn(y)
        return self.bn(y)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Activated(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


def hooked(where: str) -> nn.Module:
    block = Block("plain")
    module = getattr(block, where.partition(".")[0])
    getattr(module, where.partition(".")[2])(lambda *_: None)
    return block


CASES: dict[str, tuple[Callable[[], nn.Module], str | None, str]] = {
    "plain": (lambda: Block("plain"), None, "fold"),
    "traced": (lambda: torch.fx.symbolic_trace(Block("plain")), None, "fold"),
    "compiled": (lambda: torch.compile(Block("plain"), backend="eager"), None, "fold"),
    "pre-hook on conv": (lambda: hooked("conv.register_forward_pre_hook"), None, "fold"),
    "output used twice": (lambda: Block("twice"), "the output of conv is used elsewhere too", "affine"),
    "conv shared": (lambda: Block("shared"), "it or conv is called more than once", "affine"),
    "bn shared": (lambda: Block("again"), "called more than once", "affine"),
    "something between": (lambda: Block("between"), "does not come from a convolution", "affine"),
    "untraceable": (lambda: Block("untraceable"), "cannot be traced", "affine"),
    "hook on conv": (lambda: hooked("conv.register_forward_hook"), "a hook between conv and it", "affine"),
    "pre-hook on bn": (lambda: hooked("bn.register_forward_pre_hook"), "a hook between conv", "affine"),
    "bn first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Tanh()), "does not come from", "affine"),
    "after a relu": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
        "1 before it is a ReLU",
        "affine",
    ),
    "conv subclass": (
        lambda: nn.Sequential(Standardized(3, 3, 1), nn.BatchNorm2d(3)),
        "0 before it is a Standardized",
        "affine",
    ),
    "bn subclass": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), Activated(3)),
        "Activated is a BN subclass and keeps its own forward",
        "exact",
    ),
    "registered twice": (
        lambda: nn.ModuleDict({"net": (b := Block("plain")), "alias": b.conv})["net"],
        None,
        "fold",
    ),
    "own": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), freezekit.nn.BatchNorm2d(3)), None, "fold"),
    "weight norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)
        ),
        "before it is a ParametrizedConv2d",
        "affine",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_folds_and_what_does_not(case: str) -> None:
    make, reason, kernel = CASES[case]
    torch.manual_seed(0)
    model = zoo.scramble(make())
    expected = model.eval()(X).detach()
    handle = freeze(model, "*", convert="fold")
    (name,) = handle.kernels
    assert handle.kernels == {name: kernel}
    assert (reason is None and handle.unfolded == {}) or (reason or "") in handle.unfolded[name]
    close(model.train(), expected, X)


@pytest.mark.parametrize("patterns", [["bn", "conv"], "*"])
def test_what_the_forward_does_in_training_counts(patterns: Any) -> None:
    model = zoo.scramble(Block("in training"))
    # held whole, an unfreeze may still wake it
    assert "used elsewhere" in freeze(model, patterns, convert="fold").unfolded["bn"]


class Branching(nn.Module):
    """Something comes between convolution and BN, but a stand-in may not see it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.stash: Any = None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        if (self.kind == "argument left out" and skip is None) or (
            self.kind == "no gradients" and not torch.is_grad_enabled()
        ):
            y = y.relu()
        if self.kind == "kept":
            self.stash = y
        out: Tensor = self.bn(y)
        return out


@pytest.mark.parametrize("kind", ["argument left out", "no gradients", "kept"])
def test_what_comes_between_is_found(kind: str) -> None:
    model, x = zoo.scramble(Branching(kind)).eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected, stash = model(x), model.stash
        handle = freeze(model, "*", convert="fold")
        assert handle.kernels == {"bn": "affine"}
        close(model, expected, x)
    assert stash is None or torch.equal(model.stash, stash)


def test_a_bn_that_gets_something_else_computes_on_it() -> None:
    model = net().eval()
    handle = freeze(model, "*", convert="fold")
    x = torch.randn(2, 3, 6, 6)
    kept = model.conv
    model.conv = nn.Conv2d(3, 4, 3)
    twin = net().eval()
    twin.load_state_dict(model.state_dict())
    close(model, twin(x), x)
    model.conv = kept
    model.conv.forward = lambda x: 2 * nn.Conv2d.forward(kept, x)
    assert handle.kernels == {"bn": "affine"}
    del model.conv.forward
    assert handle.kernels == {"bn": "fold"}


def test_an_output_carries_nothing_of_freezekit() -> None:
    model = net()[:2]
    freeze(model, "*", convert="fold")
    assert model(torch.randn(2, 3, 6, 6)).__dict__ == {}


def test_undo_unfolds_a_convolution_whose_bn_has_left() -> None:
    model = net().eval()
    handle = freeze(model, "*", convert="fold")
    left, model.bn = model.bn, nn.Identity()
    handle.undo()
    assert type(model.conv) is nn.Conv2d
    assert left is not model.bn


def test_what_is_remembered_is_dropped_where_the_weight_may_move_unseen() -> None:
    model = net().eval()
    x = torch.randn(2, 3, 6, 6)
    for _ in range(2):
        handle = freeze(model, "*", convert="fold")
        model(x)
        unfreeze(model, "conv")
        seen = model.conv.weight._version
        model.conv.weight.data[:, :, 1:] += 1.0  # where no sample is taken, and not counted
        assert model.conv.weight._version == seen
        freeze(model, "conv")
        twin = net().eval()
        twin.load_state_dict(model.state_dict())
        close(model, twin(x), x)
        handle.undo()


class Tapping(nn.Module):
    """Runs a container by itself, and cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.block = Block("plain")

    def forward(self, x: Tensor) -> Tensor:
        taps = []
        for layer in self.stem:
            x = layer(x)
            taps.append(x)
        if x.sum() > 1e9:
            return x
        return self.block(x) + taps[0]


def test_in_an_untraceable_model_blocks_fold_and_bare_containers_do_not() -> None:
    model = zoo.scramble(Tapping())
    expected = eval_output(model, X)
    handle = freeze(model, "*", convert="fold")
    assert handle.kernels == {"stem.1": "affine", "block.bn": "fold"}
    close(model, expected, X)


class Writing(nn.Module):
    """Does to itself what a forward should not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Any = None

    def train(self, mode: bool = True) -> Writing:
        self.calls += 100
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        torch.rand(3)
        self.last = x
        return self.bn(self.conv(x))


def test_finding_out_never_runs_or_writes_to_the_model() -> None:
    model = zoo.scramble(Writing().eval())
    model.calls.zero_()
    hooks: list[int] = []
    model.register_forward_hook(lambda *_: hooks.append(1))
    state = torch.get_rng_state()
    assert freeze(model, "*", convert="fold").kernels == {"bn": "fold"}
    assert model.calls.item() == 0
    assert model.last is None
    assert hooks == []
    assert torch.equal(torch.get_rng_state(), state)


def test_torchvision_folds_whole() -> None:
    for name, count in (("resnet18", 20), ("mobilenet_v2", 52), ("efficientnet_b0", 49)):
        handle = freeze_backbone(zoo.make(name), convert="fold")
        assert list(handle.kernels.values()) == ["fold"] * count


# -- what is remembered --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_var"])
@pytest.mark.parametrize("how", ["data", "copy_", "assign", "load", "add_"])
def test_a_tensor_that_changed_is_seen(name: str, how: str) -> None:
    model, other = net(), net(seed=5)
    freeze_backbone(model, head="fc", convert="fold")
    model(X)
    tensor, new = model.state_dict()[name], other.state_dict()[name]
    if how == "load":
        model.load_state_dict({**model.state_dict(), name: new})
    elif how == "assign":
        getattr(model.get_submodule(name.split(".")[0]), name.split(".")[1]).data = new.clone()
    elif how == "add_":
        with torch.no_grad():
            getattr(model.get_submodule(name.split(".")[0]), name.split(".")[1]).add_(0.5)
    else:
        (tensor.data if how == "data" else tensor).copy_(new)
    close(model, eval_output(model, X), X)
    plain = net()
    plain.load_state_dict(model.state_dict())
    close(model, plain.eval()(X), X)


def test_folded_weights_are_remembered_apart_from_the_model() -> None:
    model = net()
    freeze_backbone(model, head="fc", convert="fold")
    size = len(pickle.dumps(model))
    model(X)
    remembered = freezekit.nn.remembered._formed
    assert model.conv in remembered
    first = remembered[model.conv][2][0]
    model(X)
    assert remembered[model.conv][2][0] is first
    assert len(pickle.dumps(model)) == size
    assert copy.deepcopy(model).conv not in remembered
    copied = copy.deepcopy(model)
    with torch.inference_mode():
        copied(X)
    copied(X.clone().requires_grad_()).sum().backward()


def test_no_activation_is_kept_that_a_network_without_bn_would_not_keep() -> None:
    def kept(model: nn.Module) -> int:
        storages: dict[int, int] = {}
        own = {p.data_ptr() for p in model.parameters()}

        def pack(t: Tensor) -> Tensor:
            if t.data_ptr() not in own and t.numel() > 4 * 27:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(X)
        return sum(storages.values())

    model = net()
    without = nn.Sequential(*(m for k, m in model.named_children() if k != "bn"))
    plain, before = kept(without), kept(copy.deepcopy(model).eval())
    freeze(model, "bn", convert="fold")
    assert kept(model) == plain < before


# -- it comes apart again ------------------------------------------------------------------------------


def description(model: nn.Module) -> list[object]:
    return [
        (
            n,
            id(m),
            type(m),
            sorted(m.__dict__),
            m.training,
            [(id(p), p.requires_grad) for p in m.parameters()],
        )
        for n, m in model.named_modules()
    ]


@pytest.mark.parametrize("patterns", [[["conv"], ["bn"]], [["conv", "bn"], ["bn"]], [["bn"], ["conv", "bn"]]])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_overlapping_freezes_end_in_any_order(patterns: list[list[str]], order: tuple[int, int]) -> None:
    model = net()
    described, bits, expected = description(model), zoo.snapshot(model), eval_output(model, X)
    handles = [freeze(model, names, convert="fold") for names in patterns]
    close(model.train(), expected, X)
    assert type(model.conv).__name__ == "FrozenFoldedConv2d"
    handles[order[0]].undo()
    if freezekit.is_frozen(model, "bn"):
        close(model.train(), expected, X)
        assert handles[order[1]].kernels == {"bn": "fold"}
    else:
        assert type(model.conv).__name__ == "FrozenConv2d"
    handles[order[1]].undo()
    assert description(model) == described
    assert {n: b for n, b in zoo.snapshot(model).items() if "running" not in n and "num_" not in n} == {
        n: b for n, b in bits.items() if "running" not in n and "num_" not in n
    }


def test_unfreezing_one_of_the_two() -> None:
    model = net()
    expected = eval_output(model, X)
    handle = freeze_backbone(model, head="fc", convert="fold")
    model.train()
    unfreeze(model, "conv")
    assert type(model.conv).__name__ == "FoldedConv2d"
    assert model.conv.training
    close(model, expected, X)
    model(X).sum().backward()
    assert model.conv.weight.grad is not None
    handle.undo()
    assert type(model.conv) is nn.Conv2d
    handle = freeze_backbone(model, head="fc", convert="fold")
    model.eval()
    unfreeze(model, "bn")
    assert type(model.conv).__name__ == "FrozenConv2d"
    close(model.eval(), expected, X)
    assert handle.kernels == {}
    handle.undo()


def test_a_kernel_stays_until_all_let_go() -> None:
    model = net()
    first = freeze(model, "bn")
    second = freeze(model, ["conv", "bn"], convert="fold")
    assert second.kernels == {"bn": "exact"}
    assert second.unfolded == {"bn": "frozen before, as exact, and stays so"}
    first.undo()
    assert second.kernels == {"bn": "exact"}
    second.undo()
    assert freeze(model, "bn", convert="fold").kernels == {"bn": "fold"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_part_is_right_by_itself(copied: Callable[[Any], Any]) -> None:
    model = net()
    conv, bn = (copy.deepcopy(m).eval() for m in (model.conv, model.bn))
    expected = eval_output(model, X)
    freeze_backbone(model, head="fc", convert="fold")
    alone, after = copied(model.conv), copied(model.bn)
    close(alone, conv(X), X)
    close(after, bn(conv(X)), conv(X))
    close(nn.Sequential(alone, after), bn(conv(X)), X)
    whole = copied(model)
    close(whole, expected, X)
    assert whole.conv in freezekit.nn.remembered._formed
    unfreeze(alone)
    unfreeze(whole)
    assert type(alone) is type(whole.conv) is nn.Conv2d
    close(model, expected, X)


def test_a_shallow_copy_or_a_replaced_layer_is_right_too() -> None:
    model = net()
    conv, expected = copy.deepcopy(model.conv), eval_output(model, X)
    freeze_backbone(model, head="fc", convert="fold")
    shallow = copy.copy(model.conv)
    close(shallow, conv(X), X)
    close(model, expected, X)
    replicas = [m._replicate_for_data_parallel() for m in (model.conv, model.bn)]  # on another device
    for replica, original in zip(replicas, (model.conv, model.bn), strict=True):
        for name, parameter in original.named_parameters():
            setattr(replica, name, parameter.detach().clone())
    close(model.fc, expected, replicas[1](replicas[0](X)).relu())
    del original, replicas  # the last to hold the BN besides the model
    model.bn = nn.Identity()
    close(model.conv, conv(X), X)


def test_a_hook_registered_later_sees_what_it_would_see_unfolded() -> None:
    model = net()
    conv, expected = copy.deepcopy(model.conv), eval_output(model, X)
    freeze_backbone(model, head="fc", convert="fold")
    for module in (model.conv, model.bn):
        seen: list[Tensor] = []
        hook = module.register_forward_hook(
            lambda m, x, y, seen=seen: seen.append(y if m is model.conv else x[0])
        )
        close(model, expected, X)
        torch.testing.assert_close(seen[0], conv(X))
        hook.remove()
    close(model, expected, X)


def test_undo_refuses_to_break_a_layer_that_was_changed_meanwhile() -> None:
    model = net()
    handle = freeze(model, "bn", convert="fold")
    nn.utils.parametrizations.weight_norm(model.conv)
    with pytest.raises(FreezekitError, match="the layer that bn is folded into: the class of this layer was"):
        handle.undo()
    nn.utils.parametrize.remove_parametrizations(model.conv, "weight")
    handle.undo()
    assert type(model.conv) is nn.Conv2d


def test_compiled_models_follow_an_unfreeze() -> None:
    model = net()
    expected = eval_output(model, X)
    freeze_backbone(model, head="fc", convert="fold")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected)
    with torch.no_grad():
        model.conv.weight.mul_(2)
    torch.testing.assert_close(compiled(X), eval_output(model, X))
    model.eval()
    unfreeze(model, "bn")
    torch.testing.assert_close(compiled(X), eval_output(model, X))


# -- the handle ----------------------------------------------------------------------------------------


def test_the_handle_tells() -> None:
    model = nn.Sequential(OrderedDict(body=nn.Sequential(nn.BatchNorm2d(3), *net()), fc=nn.Conv2d(2, 2, 1)))
    handle = freeze_backbone(model, convert="fold")
    assert handle.kernels == {"body.0": "affine", "body.2": "fold"}
    assert str(handle).splitlines()[-2:] == [
        "BN computed by: fold 1, affine 1",
        "  body.0: what it is given does not come from a convolution or linear layer",
    ]
    handle.undo()
    assert handle.kernels == handle.unfolded == {}
    assert "computed by" not in str(freeze_backbone(model))
    assert str(freeze(net(), "bn", convert="affine")).endswith("BN computed by: affine 1")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"bn": "eval"}, "bn=: no such choice .got 'eval'.*'freeze', 'freeze_stats', 'train'"),
        ({"hold": "norms"}, "hold=: no such choice .got 'norms'.*'all', 'norm'"),
        ({"convert": "folded"}, "convert=: no such choice .got 'folded'.*None, 'affine', 'fold'"),
    ],
)
def test_unknown_choices_are_refused(choices: dict[str, str], message: str) -> None:
    model = net()
    for call in (
        lambda: freeze(model, "bn", **choices),
        lambda: freeze_backbone(model, head="fc", **choices),
    ):
        with pytest.raises(FreezekitError, match=message):
            call()
    assert type(model.bn) is nn.BatchNorm2d


def test_a_large_weight_that_was_exchanged_is_seen_by_its_memory() -> None:
    """Of a large one only a sample is compared by value, which is the same here."""
    model = zoo.scramble(nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64)))
    x = torch.randn(2, 64, 5, 5)
    freeze(model, "*", convert="fold")
    model(x)
    new = model[0].weight.detach().clone()
    new[:, 1:] += 1
    model[0].weight.data = new
    torch.testing.assert_close(model(x), eval_output(model, x), rtol=1e-4, atol=1e-4)
    conv = copy.deepcopy(model[0])
    torch.testing.assert_close(model(x), copy.deepcopy(model[1])(conv(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_folded_convolution_that_trains_keeps_no_more_than_one_without_bn(transposed: bool) -> None:
    conv: nn.Module = (nn.ConvTranspose2d if transposed else nn.Conv2d)(8, 8, 3, groups=2)
    model = zoo.scramble(nn.Sequential(conv, nn.BatchNorm2d(8)))
    handle = freezekit.freeze(model, "1", convert="fold")
    assert handle.kernels == {"1": "fold"}
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum()
    assert sorted(t.data_ptr() for t in kept if t.numel() > 8) == sorted(
        (x.data_ptr(), conv.weight.data_ptr())
    )
    del kept[:]
    double = copy.deepcopy(model).double()
    x2 = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(double, x2)
    assert torch.autograd.gradgradcheck(
        lambda x, w: torch.func.functional_call(double, {"0.weight": w}, x), (x2, double[0].weight)
    )
    conv.weight.data.mul_(1.0)
    y = model(x).sum()
    with torch.no_grad():
        conv.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
