"""Backbone and head are found, or the error says what to do."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import zoo
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import get_model, list_models

import freezekit
from freezekit import FreezekitError, SelectionError, find_backbone, freeze_backbone


class _NoMemory(TorchFunctionMode):
    """Layers make their parameters with torch.empty: on the meta device the largest model costs nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(name: str, classes: int) -> nn.Module:
    with _NoMemory():
        return get_model(name, weights=None, num_classes=classes)


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("name", list_models(module=torchvision.models))
def test_every_torchvision_classification_model(name: str) -> None:
    """The truth nobody labelled by hand: what changes shape with the number of classes is the head."""
    model, other = build(name, 10), build(name, 11)
    shapes = {n: p.shape for n, p in other.named_parameters()}
    truth = {n for n, p in model.named_parameters() if p.shape != shapes[n]}
    assert truth
    selection = find_backbone(model)
    handle = freeze_backbone(model)
    assert truth <= set(handle.trainable)
    # nothing but whole heads is left to train, and together with the backbone they are the model
    heads = tuple(f"{head}." for head in selection.head)
    assert all(n.startswith(heads) for n in handle.trainable)
    assert {n for n, _ in model.named_parameters()} == set(handle.trainable) | (
        set(handle.frozen) & {n for n, _ in model.named_parameters()}
    )
    handle.undo()
    assert all(p.requires_grad for p in model.parameters())


def test_root_parameters_belong_to_the_backbone() -> None:
    model = zoo.make("vit")
    selection = find_backbone(model)
    assert selection.head == ("heads",)
    assert selection.backbone == ("class_token", "conv_proj", "encoder")
    assert str(selection) == (
        "backbone: class_token, conv_proj, encoder\n"
        "head:     heads\n"
        "rule:     torchvision calls the head 'heads'"
    )
    assert freezekit.is_frozen(model, "class_token") is False
    freeze_backbone(model)
    assert freezekit.is_frozen(model, "class_token")


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_auxiliary_heads_train_too() -> None:
    model = build("inception_v3", 10)
    assert find_backbone(model).head == ("AuxLogits", "fc")
    distilled = nn.Sequential(
        OrderedDict(body=nn.Linear(4, 4), head=nn.Linear(4, 2), head_dist=nn.Linear(4, 2))
    )
    assert find_backbone(distilled).head == ("head", "head_dist")


def test_buffers_beside_the_head_belong_to_the_backbone() -> None:
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), fc=nn.Linear(4, 2)))
    model.register_buffer("position", torch.ones(3))
    assert "position" in freeze_backbone(model).frozen


class TestGiven:
    def test_head_by_name_inside_a_child(self) -> None:
        model = torchvision.models.vgg11_bn(num_classes=3, init_weights=False)
        handle = freeze_backbone(model, head="classifier.6")
        assert handle.trainable == ["classifier.6.weight", "classifier.6.bias"]
        assert "classifier.5" in handle.selection.backbone
        model.train()
        assert not model.classifier[5].training  # a dropout between frozen layers
        assert model.training  # what holds the head follows train()
        assert model.classifier.training

    @pytest.mark.parametrize("form", ["name", "module", "list", "glob"])
    def test_head_in_every_form(self, form: str) -> None:
        model = zoo.make("resnet18")
        head = {"name": "fc", "module": model.fc, "list": ["fc"], "glob": "f?"}[form]
        assert freeze_backbone(model, head=head).trainable == ["fc.weight", "fc.bias"]

    def test_backbone_by_glob_and_by_modules(self) -> None:
        model = zoo.make("resnet18")
        by_glob = freeze_backbone(model, backbone="layer[12]").frozen
        freezekit.unfreeze(model)
        by_module = freeze_backbone(model, backbone=[model.layer1, model.layer2]).frozen
        assert by_glob == by_module
        assert {name.partition(".")[0] for name in by_glob} == {"layer1", "layer2"}

    def test_the_rest_is_head_when_the_backbone_is_given(self) -> None:
        handle = freeze_backbone(zoo.make("mobilenet_v2"), backbone="features")
        assert handle.selection.head == ("classifier",)

    def test_both(self) -> None:
        model = zoo.make("resnet18")
        handle = freeze_backbone(model, backbone=["conv1", "bn1"], head="fc")
        assert {name.partition(".")[0] for name in handle.frozen} == {"conv1", "bn1"}

    def test_both_and_overlapping(self) -> None:
        with pytest.raises(SelectionError, match=r"in the backbone and in the head .got layer4"):
            freeze_backbone(zoo.make("resnet18"), backbone=["layer*"], head=["layer4", "fc"])

    def test_a_module_of_another_model(self) -> None:
        with pytest.raises(
            SelectionError, match=r"head=: the module given is not part of the model .got Linear"
        ):
            freeze_backbone(zoo.make("resnet18"), head=nn.Linear(2, 2))

    def test_the_model_itself(self) -> None:
        model = zoo.make("resnet18")
        with pytest.raises(SelectionError, match="is the whole model"):
            freeze_backbone(model, head=model)

    def test_a_misspelt_name_gets_the_closest(self) -> None:
        with pytest.raises(SelectionError, match="did you mean 'layer4'"):
            freeze_backbone(zoo.make("resnet18"), backbone="layr4")


class TestRefusals:
    def test_no_conventional_name_lists_the_children(self) -> None:
        model = nn.ModuleDict({"alpha": nn.Linear(4, 8), "beta": nn.Linear(8, 8), "gamma": nn.Linear(8, 2)})
        with pytest.raises(SelectionError) as caught:
            freeze_backbone(model)
        message = str(caught.value)
        assert (
            "alpha (Linear, 40 parameters); beta (Linear, 72 parameters); gamma (Linear, 18 parameters)"
            in message
        )
        assert message.endswith("freezekit.freeze_backbone(model, head='gamma')")
        assert all(p.requires_grad for p in model.parameters())  # nothing was half done

    def test_a_head_without_parameters(self) -> None:
        model = zoo.make("resnet18")
        model.fc = nn.Identity()
        with pytest.raises(SelectionError, match=r"'fc' has no parameters.*model.fc = ..."):
            freeze_backbone(model)

    def test_optical_flow_has_no_head(self) -> None:
        with pytest.raises(
            SelectionError, match=r"optical flow no part is a head.*backbone=.'feature_encoder'"
        ):
            find_backbone(torchvision.models.optical_flow.raft_small(weights=None))

    def test_a_detector_on_a_backbone_of_ones_own(self) -> None:
        trunk = torchvision.models.mobilenet_v2(weights=None).features
        trunk.out_channels = 1280
        with torch.device("meta"):
            model = torchvision.models.detection.FasterRCNN(trunk, num_classes=3)
        with pytest.raises(SelectionError, match=r"may hold new layers.*backbone='backbone'"):
            find_backbone(model)

    def test_tied_parameters_across_the_cut(self) -> None:
        model = nn.Sequential(OrderedDict(embed=nn.Linear(4, 4), head=nn.Linear(4, 4)))
        model.head.weight = model.embed.weight
        with pytest.raises(SelectionError, match="embed.weight is head.weight"):
            freeze_backbone(model)
        assert model.embed.bias.requires_grad

    @pytest.mark.parametrize("shared", [nn.BatchNorm1d(4), nn.Dropout()])
    def test_a_module_on_both_sides_of_the_cut(self, shared: nn.Module) -> None:
        head = nn.Sequential(shared, nn.Linear(4, 2))
        model = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), norm=shared, fc=head))
        with pytest.raises(SelectionError, match="backbone and head share a .* is fc.0"):
            freeze_backbone(model, head="fc")

    def test_stochastic_depth_on_both_sides_of_the_cut(self) -> None:
        shared = torchvision.ops.StochasticDepth(0.5, "row")
        model = nn.ModuleDict({"stem": nn.Sequential(nn.Linear(4, 4), shared), "fc": nn.Linear(4, 2)})
        model["fc"].add_module("drop", shared)
        with pytest.raises(SelectionError, match="share a dropout layer.*stem.1 is fc.drop"):
            freeze_backbone(model)
        freeze_backbone(model, hold="norm")

    def test_a_conventional_name_that_is_not_last(self) -> None:
        model = nn.ModuleDict({"stem": nn.Linear(4, 4), "fc": nn.Linear(4, 4), "mixer": nn.Bilinear(4, 4, 2)})
        with pytest.raises(
            SelectionError, match="'mixer' may or may not be of the head, beside 'fc'.*head=.'mixer', 'fc'"
        ):
            freeze_backbone(model)

    def test_layers_after_the_head_of_torchvision(self) -> None:
        model = zoo.make("resnet18")
        model.attention = nn.Linear(2, 2)
        with pytest.raises(SelectionError, match="'attention' comes after the head 'fc' and may be new"):
            find_backbone(model)

    @pytest.mark.parametrize("given", [{"head": "bn.weight"}, {"backbone": "bn.running_mean"}])
    def test_half_of_a_norm_layer(self, given: dict[str, str]) -> None:
        model = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), bn=nn.BatchNorm1d(4), fc=nn.Linear(4, 2)))
        with pytest.raises(SelectionError, match="a buffer moves with its layer"):
            freeze_backbone(model, **given)

    def test_bn_without_running_statistics(self) -> None:
        model = nn.Sequential(
            OrderedDict(bn=nn.BatchNorm1d(4, track_running_stats=False), fc=nn.Linear(4, 2))
        )
        with pytest.raises(FreezekitError, match="bn: a BN layer without running statistics"):
            freeze_backbone(model)
        assert type(model.bn) is nn.BatchNorm1d

    def test_lazy_layers(self) -> None:
        model = nn.Sequential(OrderedDict(body=nn.LazyLinear(4), fc=nn.Linear(4, 2)))
        with pytest.raises(FreezekitError, match=r"body: a lazily .* run one batch"):
            freeze_backbone(model)
        model(torch.ones(1, 3))
        freeze_backbone(model)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:Warning")
    def test_scripted_layers(self) -> None:
        model = nn.Sequential(OrderedDict(body=torch.jit.script(nn.Linear(4, 4)), fc=nn.Linear(4, 2)))
        with pytest.raises(FreezekitError, match="body: a scripted module"):
            freeze_backbone(model)


def test_wrapped_models_are_looked_into() -> None:
    model = zoo.make("resnet18")
    for wrapper, name in ((torch.compile(model), "_orig_mod"), (nn.DataParallel(model), "module")):
        handle = freeze_backbone(wrapper)
        assert handle.selection.head == (f"{name}.fc",)
        assert handle.trainable == [f"{name}.fc.weight", f"{name}.fc.bias"]
        assert not freezekit.is_frozen(model, "fc")
        assert freezekit.is_frozen(model, "layer1")
        handle.undo()


def test_a_head_further_down_is_suggested() -> None:
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "fc": nn.Linear(4, 2)})
    model = nn.ModuleDict({"net": net, "loss": nn.Linear(2, 2)})
    with pytest.raises(SelectionError, match="freeze_backbone.model, head='net.fc'."):
        freeze_backbone(model)


def test_ddp_comes_after_freezing(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(FreezekitError, match="freeze the model first, then wrap it"):
            freeze_backbone(nn.parallel.DistributedDataParallel(zoo.make("resnet18")))
    finally:
        torch.distributed.destroy_process_group()
