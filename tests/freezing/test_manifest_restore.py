"""Manifests of live freezes: what they say, and freezes restored from them, as after a resume."""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import freezekit
from freezekit import (
    FreezekitError,
    Manifest,
    OptimizerWarning,
    freeze,
    freeze_backbone,
    freeze_to,
    is_frozen,
    trainable_parameters,
    unfreeze,
)
from freezekit.freezing import holding

MLP = ["layer1", "bn", "drop", "layer2", "fc"]


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = OrderedDict(
        layer1=nn.Linear(4, 8),
        bn=nn.BatchNorm1d(8),
        drop=nn.Dropout(0.5),
        layer2=nn.Linear(8, 8),
        fc=nn.Linear(8, 2),
    )
    return zoo.scramble(nn.Sequential(layers))  # type: ignore[return-value]


def held(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules(remove_duplicate=False) if holding.is_held(m)]


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


def again(maker: Callable[[], nn.Module], model: nn.Module) -> nn.Module:
    """The same model as another process would build it, with the state of this one, through a file."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = maker()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def test_what_it_says() -> None:
    model = mlp()
    manifest = freeze_backbone(model, bn="freeze_stats", convert="affine").manifest()
    assert manifest.model == "Sequential"
    assert (manifest.freezekit, manifest.torch) == (freezekit.__version__, torch.__version__)
    assert {key: manifest.choices[key] for key in ("bn", "convert")} == {
        "bn": "freeze_stats",
        "convert": "affine",
    }
    assert manifest.names == ("layer1", "bn", "drop", "layer2")
    assert manifest.head == ("fc",)
    assert manifest.rule == "'fc' is named like a head and comes last"
    assert manifest.layers == ("layer1", "bn", "drop", "layer2")
    assert [(t.name, t.role, t.dtype, t.shape) for t in manifest.tensors] == [
        ("layer1.weight", "parameter", "float32", (8, 4)),
        ("layer1.bias", "parameter", "float32", (8,)),
        ("bn.running_mean", "running_mean", "float32", (8,)),
        ("bn.running_var", "running_var", "float32", (8,)),
        ("bn.num_batches_tracked", "num_batches_tracked", "int64", ()),
        ("layer2.weight", "parameter", "float32", (8, 8)),
        ("layer2.bias", "parameter", "float32", (8,)),
    ]
    state = model.state_dict()
    assert [t.sha256 for t in manifest.tensors] == [sha256(state[t.name]) for t in manifest.tensors]
    assert all(t.persistent and t.tied_to is None and t.reason is None for t in manifest.tensors)


def test_patterns_and_modules_are_kept_as_names() -> None:
    model = mlp()
    manifest = freeze(model, [model.bn, "layer?.weight"]).manifest()
    assert manifest.names == ("bn", "layer1.weight", "layer2.weight")
    assert (manifest.head, manifest.rule) == ((), None)


def test_it_is_of_this_freeze_and_of_now() -> None:
    model = mlp()
    first, second = freeze(model, ["layer1", "bn"]), freeze(model, ["bn", "layer2"])
    assert first.manifest().layers == ("layer1", "bn")
    assert second.manifest().frozen == second.frozen
    before = second.manifest()
    with torch.no_grad():
        model.layer2.weight.mul_(1.5)  # frozen or not, code can write
    after = second.manifest()
    differing = [t.name for t, u in zip(before.tensors, after.tensors, strict=True) if t != u]
    assert differing == ["layer2.weight"]
    unfreeze(model, "layer2")
    assert second.manifest().layers == ("bn",)
    second.undo()
    assert second.manifest().tensors == ()


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.ParameterDict(
            {
                "fp16": torch.randn(3, 2).half(),
                "bf16": torch.randn(3, 2).bfloat16(),
                "pairs": torch.randn(3, 2, dtype=torch.complex64),
                "turned": torch.randn(3, 2).t(),
                "empty": torch.randn(0, 2),
            }
        )
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("meta", torch.empty(2, device="meta"))
        self.register_buffer("quantised", torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8))
        self.register_buffer("lazy", torch.randn(2, dtype=torch.complex64).conj())
        self.register_buffer("passing", torch.randn(2), persistent=False)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and still in old files
def test_odd_tensors() -> None:
    model = Odd()
    found = {t.name: t for t in freeze(model, "*").manifest().tensors}
    assert set(found) == {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert {name: t.reason for name, t in found.items() if t.sha256 is None} == {
        "sparse": "sparse_coo layout",
        "meta": "on the meta device, without values",
        "quantised": "quantised",
        "lazy": "lazily conjugated or negated",
    }
    assert found["mixed.fp16"].sha256 == sha256(model.mixed["fp16"])
    assert found["mixed.bf16"].dtype == "bfloat16"
    assert found["mixed.bf16"].sha256 == sha256(model.mixed["bf16"].view(torch.int16))
    assert found["mixed.pairs"].sha256 == sha256(model.mixed["pairs"])
    assert found["mixed.turned"].sha256 == sha256(model.mixed["turned"].contiguous())
    assert found["mixed.empty"].sha256 == hashlib.sha256().hexdigest()
    assert [name for name, t in found.items() if not t.persistent] == ["passing"]
    assert Manifest.from_json(Manifest("Odd", tuple(found.values())).to_json()).frozen == list(found)


def test_a_tensor_that_is_not_plain_has_no_digest() -> None:
    class Wrapped(Tensor):
        @classmethod
        def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotImplementedError

    model = nn.Module()
    model.register_buffer("odd", Tensor._make_wrapper_subclass(Wrapped, (3,)))
    (only,) = freeze(model, "*").manifest().tensors
    assert (only.name, only.sha256, only.reason) == ("odd", None, "a Wrapped, not a plain tensor")


def test_tied_tensors_are_named_each_time() -> None:
    model = mlp()
    model.layer3 = nn.Linear(8, 8)
    model.layer3.weight = model.layer2.weight
    manifest = freeze(model, ["layer1", "layer2"]).manifest()
    assert manifest.frozen == [
        "layer1.weight",
        "layer1.bias",
        "layer2.weight",
        "layer2.bias",
        "layer3.weight",
    ]
    assert {t.name: t.tied_to for t in manifest.tensors if t.tied_to} == {"layer3.weight": "layer2.weight"}
    assert manifest.tensors[4].sha256 == manifest.tensors[2].sha256


@pytest.mark.gpu
def test_cuda_has_the_digests_of_the_cpu() -> None:
    model = mlp()
    handle = freeze_backbone(model)
    before = handle.manifest()
    model.cuda()
    assert handle.manifest() == before
    assert before.restore(mlp().cuda()).manifest() == before


CHANGES: dict[str, Callable[[nn.Module], freezekit.Freeze]] = {
    "backbone": lambda m: freeze_backbone(m),
    "stats": lambda m: freeze_backbone(m, bn="freeze_stats"),
    "affine": lambda m: freeze_backbone(m, convert="affine"),
    "fold": lambda m: freeze_backbone(m, convert="fold"),
    "all": lambda m: freeze(m, "*"),
    "parts": lambda m: freeze(m, ["bn", "drop", "layer2.bias"]),
    "norm": lambda m: freeze(m, "bn"),
    "one": lambda m: freeze(m, "layer1.weight"),
    "dropout": lambda m: freeze(m, "drop"),
}


@pytest.mark.parametrize("how", CHANGES)
def test_restored_is_what_it_was(how: str) -> None:
    model = mlp()
    handle = CHANGES[how](model)
    manifest = Manifest.from_json(handle.manifest().to_json())
    fresh = again(lambda: mlp(seed=5), model)
    restored = manifest.restore(fresh)
    assert restored.frozen == handle.frozen == manifest.frozen
    assert held(fresh) == held(model) == list(manifest.layers)
    assert restored.trainable == handle.trainable
    assert restored.kernels == handle.kernels
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]
    assert str(restored) == str(handle)
    assert restored.manifest() == manifest
    restored.undo()
    assert held(fresh) == []
    assert [type(m) for m in fresh.modules()] == [type(m) for m in mlp().modules()]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_restored_over_the_zoo(name: str) -> None:
    model = zoo.make(name)
    handle = freeze_backbone(model)
    fresh = again(lambda: zoo.make(name, seed=5), model)
    restored = handle.manifest().restore(fresh)
    assert restored.frozen == handle.frozen
    assert held(fresh) == held(model)
    x = zoo.images(name)
    model.train()
    fresh.train()
    head = zoo.ZOO[name][2]
    assert torch.equal(zoo.features(fresh, head, x), zoo.features(model, head, x))


@pytest.mark.parametrize(
    "names", [["layer2"], ["drop"], ["bn"], ["layer1.weight"], ["layer2.bias", "bn"], MLP[:-1]]
)
@pytest.mark.parametrize("bn", ["freeze", "freeze_stats"])
def test_restored_after_partial_unfreezing(names: list[str], bn: str) -> None:
    model = mlp()
    handle = freeze_backbone(model, bn=bn)
    unfreeze(model, names)
    manifest = handle.manifest()
    fresh = again(lambda: mlp(seed=5), model)
    restored = manifest.restore(fresh)
    assert restored.frozen == handle.frozen
    assert held(fresh) == held(model)
    assert restored.trainable == handle.trainable
    assert restored.manifest() == manifest


def test_resume_freezes_only_what_was_still_frozen() -> None:
    """Lightning#21901, #6891: after a resume in the middle of a schedule, all is frozen again."""
    model = zoo.make("resnet18")
    handle = freeze_backbone(model)
    unfreeze(model, "layer4")
    manifest = handle.manifest()
    # as if the script simply began anew
    anew = again(lambda: zoo.make("resnet18"), model)
    freeze_backbone(anew)
    assert not any(p.requires_grad for p in anew.layer4.parameters())
    fresh = again(lambda: zoo.make("resnet18"), model)
    restored = manifest.restore(fresh)
    assert all(p.requires_grad for p in fresh.layer4.parameters())
    assert fresh.train().layer4[0].bn1.training
    assert not fresh.layer3[0].bn1.training
    assert restored.frozen == handle.frozen
    assert restored.trainable == handle.trainable


@pytest.mark.parametrize("unfrozen", [False, True])
def test_training_goes_on_as_if_it_had_not_stopped(unfrozen: bool, tmp_path: Path) -> None:
    model, x = zoo.make("resnet18"), zoo.images("resnet18")
    optimizer = make_sgd(model)
    handle = freeze_backbone(model, optimizer=optimizer)
    if unfrozen:
        unfreeze(model, "layer4")
    zoo.train(model, optimizer, x)
    path = tmp_path / "resume.pth"
    content = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "freezekit_manifest": handle.manifest().to_json(),
    }
    torch.save(content, path)
    zoo.train(model, optimizer, x)

    saved = torch.load(path, weights_only=True)
    resumed = zoo.make("resnet18", seed=5)
    resumed.load_state_dict(saved["state_dict"])
    optimizer = make_sgd(resumed)
    Manifest.from_json(saved["freezekit_manifest"]).restore(resumed, optimizer=optimizer)
    optimizer.load_state_dict(saved["optimizer"])
    zoo.train(resumed, optimizer, x)
    assert zoo.snapshot(resumed) == zoo.snapshot(model)
    state = model.state_dict()
    assert any(not torch.equal(saved["state_dict"][name], state[name]) for name in state)


def make_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)


def test_nothing_was_frozen_any_more() -> None:
    model = mlp()
    handle = freeze_backbone(model)
    unfreeze(model)
    manifest = handle.manifest()
    assert (manifest.tensors, manifest.layers) == ((), ())
    fresh = again(mlp, model)
    with pytest.raises(FreezekitError, match=r"optimizer=: not an optimizer .got int"):
        manifest.restore(fresh, 3)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([*fresh.parameters()][:-2], lr=0.1)
    with pytest.warns(OptimizerWarning, match=r"move them: fc.weight, fc.bias\. Remedy") as caught:
        restored = manifest.restore(fresh, optimizer)
    assert caught[0].filename == __file__
    assert restored.orphans == ["fc.weight", "fc.bias"]
    assert restored.frozen == []
    assert restored.manifest() == manifest


@pytest.mark.parametrize("border", [-1, 0])
def test_the_border_moves_on_after_a_resume(border: int) -> None:
    model = mlp()
    handle = freeze_to(model, border)
    manifest = Manifest.from_json(handle.manifest().to_json())
    fresh = again(mlp, model)
    optimizer = make_sgd(fresh)
    assert manifest.restore(fresh, optimizer).manifest() == manifest
    for n in (-1, -2):
        moved, expected = freeze_to(fresh, n, optimizer=optimizer), freeze_to(model, n)
        assert moved.trainable == expected.trainable
        assert held(fresh) == held(model)
        members = {id(p) for p in optimizer.param_groups[0]["params"]}
        assert members == {id(p) for p in trainable_parameters(fresh)}
    assert not freeze(mlp(), "fc").manifest().border


def test_the_warning_points_at_the_call() -> None:
    model = mlp()
    manifest = freeze_backbone(model).manifest()
    fresh = again(mlp, model)
    with pytest.warns(OptimizerWarning, match="move them: fc.weight, fc.bias") as caught:
        manifest.restore(fresh, torch.optim.SGD([*fresh.parameters()][:-2], lr=0.1))
    assert caught[0].filename == __file__


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda m: m,
    "data parallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "both": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


@pytest.mark.parametrize("patterns", ["*", "[lb]*"])
@pytest.mark.parametrize("after", WRAPPERS)
@pytest.mark.parametrize("before", WRAPPERS)
def test_wrappers_do_not_matter(before: str, after: str, patterns: str) -> None:
    model, same = mlp(), mlp()
    freeze(same, patterns)
    wrapped = WRAPPERS[before](model)
    whole = patterns == "*"
    handle = freeze(wrapped, "*" if whole else [model.layer1, model.bn, model.layer2])
    fresh = mlp()
    restored = handle.manifest().restore(WRAPPERS[after](fresh))
    assert held(fresh) == held(same)
    assert len(restored.frozen) == len(handle.frozen)
    assert trainable_parameters(fresh) == [p for p in fresh.parameters() if p.requires_grad]
    assert len(trainable_parameters(fresh)) == len(trainable_parameters(same))


def test_a_child_called_module_is_no_wrapper() -> None:
    def make() -> nn.Module:
        return nn.Sequential(OrderedDict(module=nn.Linear(2, 2), fc=nn.Linear(2, 2)))

    model = make()
    manifest = freeze(model, "module").manifest()
    fresh = again(make, model)
    assert manifest.restore(fresh).frozen == ["module.weight", "module.bias"]
    assert not is_frozen(fresh, "fc")


def test_a_compiled_part() -> None:
    model = mlp()
    manifest = freeze_backbone(model).manifest()
    fresh = again(mlp, model)
    fresh.layer2 = torch.compile(fresh.layer2, backend="eager")
    restored = manifest.restore(fresh)
    assert "layer2._orig_mod.weight" in restored.frozen
    assert restored.trainable == ["fc.weight", "fc.bias"]


def test_shared_and_tied_parts() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        shared = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
        model = nn.Sequential(shared, nn.Linear(4, 4, bias=False), shared, nn.Linear(4, 4))
        model[1].weight = shared[0].weight
        return model

    model = make()
    handle = freeze(model, "0")
    assert held(model) == ["0", "0.0", "0.1", "2", "2.0", "2.1"]  # not 1, which only has a frozen weight
    fresh = again(make, model)
    restored = handle.manifest().restore(fresh)
    assert held(fresh) == held(model)
    assert restored.frozen == handle.frozen
    assert type(fresh[1]) is nn.Linear


def test_what_was_added_below_a_frozen_layer_later_trains() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(body=mlp(), fc=nn.Linear(2, 2)))

    def adapt(model: nn.Sequential) -> nn.Sequential:
        model.body.add_module("adapter", nn.Linear(2, 2))
        return model

    model = make()
    handle = freeze(model, "body")
    adapt(model)
    manifest = handle.manifest()
    assert "body" in manifest.layers
    fresh = again(lambda: adapt(make()), model)
    restored = manifest.restore(fresh)
    assert restored.frozen == handle.frozen
    assert held(fresh) == held(model)
    assert fresh.body.adapter.weight.requires_grad
    assert fresh.train().body.adapter.training
    assert not fresh.body.training


def test_buffers_of_a_layer_that_is_not_frozen_whole() -> None:
    def make() -> nn.Sequential:
        model = mlp()
        model.register_buffer("mean", torch.randn(4))  # beside the head, in the module that holds both
        return model

    def adapt(model: nn.Sequential) -> nn.Sequential:
        model.bn.add_module("adapter", nn.Linear(2, 2))
        return model

    model = make()
    handle = freeze_backbone(model)
    adapt(model)
    fresh = again(lambda: adapt(make()), model)
    restored = handle.manifest().restore(fresh)
    assert {"mean", "bn.running_mean"} <= set(restored.frozen)
    assert restored.frozen == handle.frozen
    assert held(fresh) == held(model)
    assert not fresh.train().bn.training
    assert restored.manifest() == handle.manifest()


def test_passing_buffers_are_not_compared() -> None:
    class Cached(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("cache", torch.rand(3), persistent=False)

    model = nn.Sequential(Cached())
    manifest = freeze(model, "0").manifest()
    fresh = nn.Sequential(Cached())
    fresh.load_state_dict(model.state_dict())
    assert manifest.restore(fresh).frozen == ["0.weight", "0.bias", "0.cache"]
    fresh = nn.Sequential(Cached())
    fresh.load_state_dict(model.state_dict())
    fresh[0].cache = None
    assert manifest.restore(fresh).frozen == ["0.weight", "0.bias"]


def untouched(model: nn.Module) -> bool:
    pristine = mlp()
    return [type(m) for m in model.modules()] == [type(m) for m in pristine.modules()] and all(
        p.requires_grad for p in model.parameters()
    )


def test_other_values_are_refused() -> None:
    model = mlp()
    manifest = freeze_backbone(model).manifest()
    fresh = again(mlp, model)
    fresh.bn.running_var[3] += 1e-6
    with pytest.raises(
        FreezekitError, match=r"frozen tensors have other values .*got 1: 'bn.running_var'.*strict=False"
    ):
        manifest.restore(fresh)
    assert untouched(fresh)
    assert manifest.restore(fresh, strict=False).frozen == manifest.frozen
    with pytest.raises(
        FreezekitError, match=r"frozen tensors .*got 9: 'layer1.weight', 'layer1.bias', 'bn.weight', \.\.\."
    ):
        manifest.restore(zoo.scramble(mlp(seed=3)))


def test_what_trains_may_differ() -> None:
    model = mlp()
    manifest = freeze_backbone(model).manifest()
    fresh = again(mlp, model)
    fresh.fc = nn.Linear(8, 5)
    assert manifest.restore(fresh).trainable == ["fc.weight", "fc.bias"]


def test_another_dtype_is_refused() -> None:
    manifest = freeze_backbone(mlp()).manifest()
    fresh = mlp()
    fresh.layer2.half()
    with pytest.raises(FreezekitError, match=r"another dtype .*'layer2.weight': float16, was float32"):
        manifest.restore(fresh)
    assert untouched(fresh)
    assert manifest.restore(fresh, strict=False).frozen == manifest.frozen


def test_another_model_is_refused() -> None:
    manifest = freeze_backbone(mlp()).manifest()
    fresh = mlp()
    del fresh.drop
    with pytest.raises(FreezekitError, match=r"not in the model \(got 1: 'drop'\).*as it was .*Sequential"):
        manifest.restore(fresh)
    fresh = mlp()
    fresh.layer1 = nn.Linear(4, 8, bias=False)
    with pytest.raises(FreezekitError, match=r"not in the model \(got 1: 'layer1.bias'\)"):
        manifest.restore(fresh)
    fresh = mlp()
    fresh.layer2 = nn.Linear(8, 9)
    with pytest.raises(
        FreezekitError, match=r"frozen .*another shape .*got 2: 'layer2.weight': \(9, 8\), was \(8, 8\)"
    ):
        manifest.restore(fresh)
    assert all(p.requires_grad for p in fresh.parameters())
    with pytest.raises(FreezekitError, match=r"not a model \(got dict\)"):
        manifest.restore({})  # type: ignore[arg-type]


def test_a_tensor_the_manifest_does_not_know_in_a_frozen_layer() -> None:
    model = mlp()
    model.layer1 = nn.Linear(4, 8, bias=False)
    manifest = freeze_backbone(model).manifest()
    fresh = mlp()
    fresh.layer1.weight = copy.deepcopy(model.layer1.weight).requires_grad_(True)
    fresh.load_state_dict(model.state_dict(), strict=False)
    restored = manifest.restore(fresh)
    # it was in no frozen layer then, so it trains; the layer is held all the same
    assert restored.frozen == manifest.frozen
    assert restored.trainable == ["layer1.bias", "fc.weight", "fc.bias"]


def test_frozen_anew_before_is_refused() -> None:
    model = mlp()
    handle = freeze_backbone(model)
    unfreeze(model, "layer2")
    manifest = handle.manifest()
    fresh = again(mlp, model)
    freeze_backbone(fresh)
    with pytest.raises(
        FreezekitError, match=r"frozen already, and more.*'layer2.bias', 'layer2.weight' frozen too.*unfreeze"
    ):
        manifest.restore(fresh)
    unfreeze(fresh)
    assert manifest.restore(fresh).frozen == manifest.frozen


def test_several_freezes_are_restored_one_by_one() -> None:
    model = mlp()
    handles = [freeze(model, ["layer1", "bn"]), freeze(model, ["bn", "layer2"])]
    fresh = again(mlp, model)
    restored = [handle.manifest().restore(fresh) for handle in handles]
    assert [r.frozen for r in restored] == [h.frozen for h in handles]
    assert held(fresh) == held(model)
    restored[0].undo()
    assert held(fresh) == ["bn", "layer2"]


def test_restoring_twice_is_two_freezes() -> None:
    model = mlp()
    manifest = freeze_backbone(model).manifest()
    fresh = again(mlp, model)
    first, second = manifest.restore(fresh), manifest.restore(fresh)
    first.undo()
    assert held(fresh) == list(manifest.layers)
    second.undo()
    assert untouched(fresh)


def test_an_unknown_choice_is_refused() -> None:
    manifest = freeze_backbone(mlp()).manifest()
    manifest.choices["bn"] = "melt"
    fresh = mlp()
    with pytest.raises(FreezekitError, match="no such choice"):
        manifest.restore(fresh)
    assert untouched(fresh)


def test_survives_pickling_of_the_handle() -> None:
    handle = freeze_backbone(mlp())
    twin = pickle.loads(pickle.dumps(handle))
    assert twin.manifest() == handle.manifest()
