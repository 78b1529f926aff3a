"""The seven promises of a frozen region, on five architectures and with each kernel of the BN layers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freezekit

MODELS = list(zoo.ZOO)
KERNELS: list[tuple[str, str | None]] = [(name, None) for name in MODELS]
KERNELS += [(name, kernel) for kernel in ("affine", "fold") for name in ("resnet18", "mobilenet_v2")]

TOLERANCE = 1e-5
"""The published tolerance of ``convert=``, relative to the largest value of the output."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "convert" in metafunc.fixturenames:
        metafunc.parametrize(("name", "convert"), KERNELS)
    else:
        metafunc.parametrize("name", MODELS)


def assert_frozen_output(out: Tensor, expected: Tensor, convert: str | None) -> None:
    if convert is None:
        assert torch.equal(out, expected)
    else:
        assert float((out.detach() - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def frozen_bits(model: nn.Module, handle: freezekit.Freeze) -> dict[str, bytes]:
    bits = zoo.snapshot(model)
    return {name: bits[name] for name in handle.frozen}


def head_of(name: str) -> str:
    return zoo.ZOO[name][2]


def eval_features(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """The oracle: what the backbone gives in eval mode, with every mode put back afterwards.

    Without gradients, unless the input asks for one: torch's attention takes another path then, in eval mode
    too, with other bits.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.set_grad_enabled(x.requires_grad):
        out = zoo.features(model, head_of(name), x).detach()
    for module, mode in modes.items():
        module.training = mode
    return out


def live_head(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(head_of(name))


# -- the control: without freezekit each of these must be seen to fail ---------------------------------


def test_naive_freezing_breaks_state_or_behaviour(name: str) -> None:
    model, x = zoo.make(name), zoo.images(name)
    expected = eval_features(model, name, x)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.startswith(head_of(name)))
    before = zoo.snapshot(model)
    optimizer = torch.optim.SGD(model.get_submodule(head_of(name)).parameters(), lr=0.1)
    zoo.train(model, optimizer, x)
    moved = [
        n for n, bits in zoo.snapshot(model).items() if bits != before[n] and not n.startswith(head_of(name))
    ]
    has_bn = any("running_mean" in n for n in before)
    assert bool(moved) == has_bn
    assert not torch.equal(zoo.features(model, head_of(name), x), expected)


# -- 1 state -------------------------------------------------------------------------------------------


def test_state_is_bit_identical_through_training(name: str, convert: str | None) -> None:
    model, x = zoo.make(name), zoo.images(name)
    handle = freezekit.freeze_backbone(model, convert=convert)
    before = frozen_bits(model, handle)
    head_before = zoo.snapshot(live_head(model, name))
    assert set(before) == {n for n in zoo.snapshot(model) if not n.startswith(head_of(name) + ".")}
    zoo.train(model, torch.optim.SGD(freezekit.trainable_parameters(model), lr=0.1), x)
    assert frozen_bits(model, handle) == before
    assert zoo.snapshot(live_head(model, name)) != head_before  # and something did train


# -- 2 behaviour ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "assigned", "eval"])
def test_output_is_that_of_eval_mode(name: str, mode: str, convert: str | None) -> None:
    model, x = zoo.make(name), zoo.images(name)
    upstream = x.clone().requires_grad_()
    expected, expected_upstream = (eval_features(model, name, images) for images in (x, upstream))
    freezekit.freeze_backbone(model, convert=convert)
    if mode == "assigned":
        for module in model.modules():
            module.training = True
    else:
        model.train(mode == "train")
    assert_frozen_output(zoo.features(model, head_of(name), x), expected, convert)
    assert_frozen_output(zoo.features(model, head_of(name), upstream), expected_upstream, convert)


def test_output_does_not_depend_on_batch_mates(name: str, convert: str | None) -> None:
    model = zoo.make(name)
    freezekit.freeze_backbone(model, convert=convert)
    model.train()
    x, y = zoo.images(name, seed=1), zoo.images(name, seed=2) * 5
    y[0] = x[0]
    one, other = (zoo.features(model, head_of(name), batch)[0] for batch in (x, y))
    assert torch.equal(one, other)


# -- 3 gradient ----------------------------------------------------------------------------------------


def test_no_gradient_for_frozen_parameters_but_for_the_input(name: str, convert: str | None) -> None:
    model, x = zoo.make(name), zoo.images(name)
    model.eval()
    upstream = x.clone().requires_grad_()
    zoo.features(model, head_of(name), upstream).square().sum().backward()
    expected = upstream.grad
    model.zero_grad()
    handle = freezekit.freeze_backbone(model, convert=convert)
    model.train()
    upstream = x.clone().requires_grad_()
    zoo.features(model, head_of(name), upstream).square().sum().backward()
    assert expected is not None
    torch.testing.assert_close(upstream.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    parameters = dict(model.named_parameters())
    for frozen in handle.frozen:
        if frozen in parameters:
            assert parameters[frozen].grad is None
            assert not parameters[frozen].requires_grad


# -- 4 optimizer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    ],
    ids=["sgd", "adamw", "rmsprop"],
)
def test_a_running_optimizer_cannot_move_it(
    name: str, build: Callable[..., torch.optim.Optimizer], convert: str | None
) -> None:
    model, x = zoo.make(name), zoo.images(name)
    optimizer = build(model.parameters())  # holds everything, with momentum from before
    zoo.train(model, optimizer, x, steps=2)
    model(x).sum().backward()  # a stale gradient
    handle = freezekit.freeze_backbone(model, convert=convert)
    before = frozen_bits(model, handle)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        model.train()
        model(x).sum().backward()
    assert frozen_bits(model, handle) == before


# -- 5 survival ----------------------------------------------------------------------------------------


def _deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _sync(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _apply_train(model: nn.Module) -> nn.Module:
    return model.apply(lambda module: module.train())


@pytest.mark.parametrize("ordeal", [_deepcopy, _pickle, _save, _sync, _apply_train])
def test_survives(name: str, ordeal: Callable[[nn.Module], nn.Module], convert: str | None) -> None:
    model, x = zoo.make(name), zoo.images(name)
    expected = eval_features(model, name, x)
    frozen = freezekit.freeze_backbone(model, convert=convert).frozen
    bits = zoo.snapshot(model)
    exact = zoo.features(model, head_of(name), x).detach()
    assert_frozen_output(exact, expected, convert)
    survivor = ordeal(model)
    optimizer = torch.optim.SGD(freezekit.trainable_parameters(survivor), lr=0.1)
    zoo.train(survivor, optimizer, x)
    after = zoo.snapshot(survivor)
    assert {n: after[n] for n in frozen} == {n: bits[n] for n in frozen}
    assert torch.equal(zoo.features(survivor, head_of(name), x), exact)
    freezekit.unfreeze(survivor)  # and a copy can still be unfrozen
    assert all(parameter.requires_grad for parameter in survivor.parameters())
    assert not any(type(module).__name__.startswith(("Frozen", "Folded")) for module in survivor.modules())


def test_survives_update_bn(name: str, convert: str | None) -> None:
    model, x = zoo.make(name), zoo.images(name)
    handle = freezekit.freeze_backbone(model, convert=convert)
    before = frozen_bits(model, handle)
    torch.optim.swa_utils.update_bn([x, x], model)
    assert frozen_bits(model, handle) == before


def test_survives_activation_checkpointing(name: str, convert: str | None) -> None:
    model, x = zoo.make(name), zoo.images(name)
    handle = freezekit.freeze_backbone(model, convert=convert)
    before = frozen_bits(model, handle)
    model.train()
    checkpoint(model, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert frozen_bits(model, handle) == before


def test_survives_compile(name: str, convert: str | None) -> None:
    model, x = zoo.make(name), zoo.images(name)
    live_head(model, name).eval()  # no dropout, so that outputs compare
    model.eval()
    with torch.no_grad():
        expected = model(x)
    handle = freezekit.freeze_backbone(model, convert=convert)
    before = frozen_bits(model, handle)
    model.train()
    live_head(model, name).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    out.sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert frozen_bits(model, handle) == before


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_survives_export(name: str, convert: str | None) -> None:
    model, x = zoo.make(name), zoo.images(name)
    model.eval()
    with torch.no_grad():
        expected = model(x)
    freezekit.freeze_backbone(model, convert=convert)
    model.train()
    live_head(model, name).eval()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_survives_ddp(name: str, convert: str | None) -> None:
    model, x = zoo.make(name), zoo.images(name)
    handle = freezekit.freeze_backbone(model, convert=convert)
    before = frozen_bits(model, handle)
    parallel = nn.parallel.DistributedDataParallel(model)
    zoo.train(parallel, torch.optim.SGD(freezekit.trainable_parameters(model), lr=0.1), x)
    assert frozen_bits(model, handle) == before


# -- 6 reversible --------------------------------------------------------------------------------------


def description(model: nn.Module) -> list[object]:
    """Everything undo() must bring back, down to the identity of the objects."""
    return [
        (
            path, id(module), type(module),
            {k: v for k, v in module.__dict__.items() if not k.startswith("_")},
            [(k, id(h)) for k, h in module._forward_hooks.items()],
            [(k, id(p), p is not None and p.requires_grad) for k, p in module._parameters.items()],
            [(k, id(b)) for k, b in module._buffers.items()],
            sorted(module.__dict__),
        )
        for path, module in model.named_modules(remove_duplicate=False)
    ]  # fmt: skip


@pytest.mark.parametrize("asked", [None, True, False])
def test_undo_restores_everything(name: str, asked: bool | None, convert: str | None) -> None:
    model, x = zoo.make(name), zoo.images(name)
    # a mixture to come back to: some layers in eval, some parameters fixed, own momenta, a hook
    calls: list[int] = []
    for k, module in enumerate(model.modules()):
        module.training = k % 3 > 0
        if hasattr(module, "momentum"):
            module.momentum = k / 1000
        if k % 5 == 0:
            module.register_forward_hook(lambda *_: calls.append(1))
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k % 4 > 0)
    described, bits = description(model), zoo.snapshot(model)
    handle = freezekit.freeze_backbone(model, convert=convert)
    ids = [id(module) for module in model.modules()]
    assert ids == [entry[1] for entry in described]  # type: ignore[index]
    if asked is not None:
        for module in model.modules():
            if "Frozen" in type(module).__name__:
                module.train(asked)
    with torch.no_grad():
        model(x)
    assert calls
    handle.undo()
    handle.undo()
    untouched = live_head(model, name)
    after = zoo.snapshot(model)
    assert [d for d in description(model) if d[0] != ""] == [d for d in described if d[0] != ""]  # type: ignore[index]
    assert model.training == described[0][3]["training"]  # type: ignore[index]
    assert {n: b for n, b in after.items() if not n.startswith(head_of(name))} == {
        n: b for n, b in bits.items() if not n.startswith(head_of(name))
    }
    assert untouched is model.get_submodule(head_of(name))


def test_undone_model_trains_again(name: str, convert: str | None) -> None:
    model, x = zoo.make(name), zoo.images(name)
    before = zoo.snapshot(model)
    freezekit.freeze_backbone(model, convert=convert).undo()
    twin = zoo.make(name)
    for net in (model, twin):
        torch.manual_seed(5)
        zoo.train(net, torch.optim.SGD(net.parameters(), lr=0.1), x)
    assert zoo.snapshot(model) == zoo.snapshot(twin) != before


# -- 7 interchange -------------------------------------------------------------------------------------


def test_state_dict_interchanges_strictly(name: str, convert: str | None) -> None:
    model, other = zoo.make(name), zoo.make(name, seed=7)
    plain = model.state_dict()
    freezekit.freeze_backbone(model, convert=convert)
    frozen = model.state_dict()
    assert list(frozen) == list(plain)
    assert frozen._metadata == plain._metadata
    assert all(torch.equal(frozen[k], plain[k]) for k in plain)
    other.load_state_dict(frozen, strict=True)
    assert zoo.snapshot(other) == zoo.snapshot(model)
    model.load_state_dict(zoo.make(name, seed=9).state_dict(), strict=True)
    assert zoo.snapshot(model) == zoo.snapshot(zoo.make(name, seed=9))


def test_a_dictionary_from_before_counters_loads_into_a_frozen_model(name: str, convert: str | None) -> None:
    model = zoo.make(name)
    old = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    freezekit.freeze_backbone(model, convert=convert)
    model.load_state_dict(old, strict=True)
