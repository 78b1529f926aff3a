"""The rules on models that people write: what is certain is found, what is not is refused."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torchvision
import zoo
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN

import freezekit
from freezekit import SelectionError, find_backbone, freeze_backbone


def conv() -> nn.Module:
    return nn.Conv2d(3, 3, 1)


def fc() -> nn.Module:
    return nn.Linear(3, 2)


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


class Block(nn.Module):
    """A block of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()


def net(**children: nn.Module) -> nn.Module:
    return nn.ModuleDict(children)


#: the children of a model, its head, and the first words of the rule
CERTAIN: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"conv1": conv, "conv2": conv, "fc1": fc, "fc2": fc}, ("fc1", "fc2")),
    ({"conv1": conv, "bn1": lambda: nn.BatchNorm2d(3), "layer1": block, "fc": fc}, ("fc",)),
    ({"backbone": block, "head": fc}, ("head",)),
    ({"backbone": block, "head_a": fc, "head_b": fc}, ("head_a", "head_b")),
    ({"backbone": block, "heads": lambda: nn.ModuleList([fc(), fc()])}, ("heads",)),
    ({"features": block, "classifier": fc, "regressor": fc}, ("classifier", "regressor")),
    ({"encoder": block, "fc_age": fc, "fc_gender": fc}, ("fc_age", "fc_gender")),
    ({"backbone": block, "neck": conv, "box_head": conv, "cls": conv}, ("neck", "box_head", "cls")),
    ({"encoder": block, "decoder": block, "seg_head": conv}, ("decoder", "seg_head")),
    ({"backbone": block, "decoder": block}, ("decoder",)),
    ({"encoder": block, "projector": fc}, ("projector",)),
    ({"image_encoder": block, "image_proj": fc, "text_encoder": block, "out": fc}, ("image_proj", "out")),
    ({"stem": conv, "body": block, "norm": lambda: nn.LayerNorm(3), "logits": fc}, ("norm", "logits")),
    ({"embedding": lambda: nn.Embedding(5, 3), "encoder": block, "output_layer": fc}, ("output_layer",)),
    ({"feature_extractor": block, "dropout": nn.Dropout, "linear": fc}, ("dropout", "linear")),
    ({"patch_embed": conv, "blocks": block, "norm": lambda: nn.LayerNorm(3), "head": fc}, ("head",)),
    # may be new: a projection, a pool, a lone convolution on the blocks
    ({"conv1": conv, "layer_proj": fc, "fc": fc}, ("layer_proj", "fc")),
    ({"conv1": conv, "pool": conv, "fc": fc}, ("pool", "fc")),
    ({"layer1": block, "layer2": block, "conv": conv, "fc": fc}, ("conv", "fc")),
    ({"layer1": block, "bn": lambda: nn.BatchNorm1d(3), "fc": fc}, ("bn", "fc")),
    # a head of its own inside, which people replace by a new one
    ({"backbone": lambda: net(conv1=conv(), fc=fc()), "head": fc}, ("head", "backbone.fc")),
    ({"backbone": lambda: zoo.make("resnet18"), "head": fc}, ("head", "backbone.fc")),
    ({"resnet": lambda: zoo.make("resnet18"), "head": fc}, ("head", "resnet.fc")),
    ({"backbone": lambda: nn.DataParallel(zoo.make("resnet18")), "head": fc}, ("head", "backbone.module.fc")),
    ({"backbone": lambda: net(body=block(), fpn=block()), "rpn": block, "roi_heads": fc},
     ("rpn", "roi_heads", "backbone.fpn")),
    # what people put on a library's model inside an encoder of their own
    ({"encoder": lambda: net(net=zoo.make("resnet18")), "head": fc}, ("head", "encoder.net.fc")),
    ({"encoder": lambda: net(cnn=zoo.make("resnet18"), embed=fc()), "head": fc},
     ("head", "encoder.embed", "encoder.cnn.fc")),
    ({"encoder": lambda: net(resnet=block(), linear=fc(), bn=nn.BatchNorm1d(2)), "head": fc},
     ("head", "encoder.linear", "encoder.bn")),
    ({"encoder": lambda: nn.Sequential(conv(), library_layer(), nn.Flatten(), fc()), "head": fc},
     ("head", "encoder.3")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("children", "head"), CERTAIN, ids=lambda x: "-".join(x) if isinstance(x, dict) else ""
)
def test_conventional_names(children: dict[str, Any], head: tuple[str, ...]) -> None:
    model = net(**{name: make() for name, make in children.items()})
    found = find_backbone(model)
    assert found.head == head
    assert found.backbone
    handle = freeze_backbone(model)
    assert set(handle.trainable) == {
        n for n, _ in model.named_parameters() if any(n.startswith(f"{h}.") for h in head)
    }


UNCERTAIN: list[tuple[dict[str, Any], str]] = [
    ({"encoder": block, "decoder": block}, "backbone='encoder'"),  # an autoencoder
    ({"net": block, "fc": fc}, "'net' may or may not be of the head"),
    ({"conv1": conv, "lstm": lambda: nn.LSTM(3, 3), "fc": fc}, "'lstm' may or may not"),
    ({"conv1": conv, "attention": block, "fc": fc}, "'attention' may or may not"),
    ({"conv1": conv, "fc1": fc, "conv2": conv, "fc2": fc}, "'conv2' may or may not"),
    ({"fc1": fc, "fc2": fc}, "all of it is named like a head.*head='fc2'"),
    ({"adapter": conv, "backbone": block, "head": fc}, "'adapter' may be new"),
    ({"stem": conv, "backbone": lambda: zoo.make("resnet18"), "head": fc}, "'stem' may be new"),
    ({"layer1": block, "conv": conv, "layer2": block, "fc": fc}, "'layer2' may or may not"),
    ({"conv1": conv, "attention_block": block, "fc": fc}, "'attention_block' may or may not"),
    ({"class_embed": fc, "backbone": block, "head": fc}, "'class_embed' may be new"),
    ({"embed": block, "backbone": lambda: zoo.make("resnet18"), "fc": fc}, "'embed' may be new"),
    ({"trunk_output": block, "other": fc}, "no part is named like a head"),
    ({"conv1": conv, "aux_fc": fc}, "no head is the main one"),
    ({"head": block}, "cannot tell"),
    ({"meta_encoder": fc, "backbone": lambda: zoo.make("resnet18"), "head": fc}, "'meta_encoder' may be new"),
    (
        {"teacher": lambda: zoo.make("resnet18"), "student": lambda: zoo.make("resnet18"), "fc": fc},
        "it has a student.*backbone='teacher'",
    ),
    (
        {"student_backbone": block, "teacher_backbone": block, "student_head": fc},
        "it has a student.*backbone='teacher_backbone'",
    ),
]


@pytest.mark.parametrize(
    ("children", "says"), UNCERTAIN, ids=lambda x: "-".join(x) if isinstance(x, dict) else ""
)
def test_what_is_not_certain_is_refused(children: dict[str, Any], says: str) -> None:
    model = net(**{name: make() for name, make in children.items()})
    with pytest.raises(SelectionError, match=says) as caught:
        freeze_backbone(model)
    assert "freeze_backbone(model" in str(caught.value) or "freezekit.freeze(model" in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())


def library_layer() -> nn.Module:
    return nn.Sequential(torchvision.models.resnet.BasicBlock(3, 3))


@pytest.mark.parametrize(
    ("layers", "start"),
    [
        ([conv, lambda: nn.BatchNorm2d(3), nn.ReLU, nn.Flatten, fc, nn.ReLU, fc], 2),
        ([conv, nn.Flatten, lambda: nn.BatchNorm1d(3), fc], 1),
        ([block, nn.Flatten, fc], 1),
        ([block, nn.Flatten, fc, nn.ReLU, fc], 1),
        ([block, lambda: nn.Sequential(nn.Flatten(), fc())], 1),
        ([conv, Block, Block, nn.Flatten, fc], 3),
        ([conv, library_layer, library_layer, nn.Flatten, fc], 3),
        ([conv, nn.ReLU, lambda: nn.Sequential(nn.Flatten(), fc(), nn.ReLU(), fc())], 1),
    ],
)
def test_sequential(layers: list[Any], start: int) -> None:
    model = nn.Sequential(*(make() for make in layers))
    assert find_backbone(model).head == tuple(str(k) for k in range(start, len(layers)))


@pytest.mark.parametrize(
    "layers",
    [
        [fc, nn.ReLU, fc],  # nobody knows where the head begins
        [block, block, fc],  # a trunk and a neck, or two blocks
        [library_layer, block, fc],
        [conv, block, fc],  # an adapter before a network
        [block, conv, fc],
        [block, block],
        [Block, lambda: zoo.make("resnet18"), fc],
        [conv, lambda: zoo.make("resnet18")],  # the convolution may be new
        [conv, lambda: nn.Sequential(conv(), nn.Flatten(), fc())],
        [fc],
    ],
)
def test_sequential_is_refused_where_it_could_be_otherwise(layers: list[Any]) -> None:
    with pytest.raises(SelectionError, match="cannot tell the head of Sequential"):
        find_backbone(nn.Sequential(*(make() for make in layers)))


def test_a_network_with_its_own_classifier_in_sequential() -> None:
    model = nn.Sequential(zoo.make("resnet18"), nn.ReLU(), nn.Linear(10, 2))
    assert find_backbone(model).head == ("0.fc", "1", "2")


def test_what_is_put_on_a_library_model_in_sequential_is_head() -> None:
    model = nn.Sequential(zoo.make("resnet18"), library_layer(), nn.Linear(10, 2))
    assert find_backbone(model).head == ("0.fc", "1", "2")


def test_adapters_inside_are_not_frozen() -> None:
    model = zoo.make("vit")
    model.encoder.layers.encoder_layer_0.mlp.lora_a = nn.Linear(32, 2)
    with pytest.raises(
        SelectionError, match="adapters or other new layers.*encoder.layers.encoder_layer_0.mlp.lora_a"
    ):
        freeze_backbone(model)


class WithLoRA(nn.Module):
    """A linear layer with low-rank factors beside it, as tutorials write it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.zeros(linear.in_features, 2))


class LowRank(nn.Linear):
    """One that is told by its name alone."""


LowRank.__name__ = "LoRALinear"


@pytest.mark.parametrize("make", [WithLoRA, lambda _: LowRank(8, 8)])
def test_what_others_put_into_a_library_model_is_not_frozen(make: Any) -> None:
    model = zoo.make("vit")
    for layer in model.encoder.layers:
        layer.mlp[0] = make(layer.mlp[0])
    with pytest.raises(SelectionError, match=r"other new layers.*encoder_layer_0.mlp.0") as caught:
        freeze_backbone(model)
    handle = eval(str(caught.value).partition("for example ")[2])
    for layer in model.encoder.layers:
        assert all(p.requires_grad for p in layer.mlp[0].parameters())
    assert "encoder.ln.weight" in handle.frozen


def test_a_layer_of_ones_own_in_the_place_of_another_is_no_addition() -> None:
    class Norm(nn.BatchNorm2d):
        pass

    model = zoo.make("resnet18")
    model.bn1 = Norm(64)
    assert find_backbone(model).head == ("fc",)
    freeze_backbone(model)
    assert find_backbone(model).head == ("fc",)


def test_a_frozen_model_is_told_apart_alike() -> None:
    for model in (
        zoo.make("resnet18"),
        net(conv1=conv(), bn1=nn.BatchNorm2d(3), fc=fc()),
        nn.Sequential(block(), fc()),
    ):
        before = find_backbone(model)
        freeze_backbone(model)
        assert find_backbone(model) == before


class Holder(nn.Module):
    """A model of one's own that holds another one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model
        self.criterion = nn.CrossEntropyLoss()


def test_the_only_child_decides() -> None:
    model = Holder(zoo.make("resnet18"))
    assert find_backbone(model).head == ("net.fc",)
    model.prompt = nn.Parameter(torch.ones(3))  # which may be new
    with pytest.raises(SelectionError):
        find_backbone(model)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile])
def test_wrappers_of_wrappers(wrap: Any) -> None:
    model = nn.DataParallel(wrap(Holder(zoo.make("resnet18"))))
    (head,) = find_backbone(model).head
    assert model.get_submodule(head) is not None
    assert head.endswith(".net.fc")
    assert [n for n, p in model.named_parameters() if not n.startswith(head)] == [
        n for n in freeze_backbone(model).frozen if n in dict(model.named_parameters())
    ]


def test_the_remedy_for_a_model_inside_is_a_call_that_can_be_made() -> None:
    model = nn.DataParallel(net(conv1=conv(), lstm=nn.LSTM(3, 3), fc=fc()))
    with pytest.raises(SelectionError) as caught:
        find_backbone(model)
    call = str(caught.value).partition("for example ")[2]
    assert call == "freezekit.freeze_backbone(model.module, head=['lstm', 'fc'])"
    handle = eval(call)
    assert handle.trainable[-3:] == ["lstm.bias_hh_l0", "fc.weight", "fc.bias"]


def test_traced_graphs_keep_their_names() -> None:
    graph = torch.fx.symbolic_trace(zoo.make("resnet18"))
    assert find_backbone(graph).head == ("avgpool", "fc")


def test_own_parameters_that_may_be_new_are_head() -> None:
    model = zoo.make("vit")
    model.prompt = nn.Parameter(torch.ones(3))
    model.register_buffer("prior", torch.ones(10))
    found = find_backbone(model)
    assert found.head == ("heads", "prompt", "prior")
    assert "class_token" in found.backbone
    handle = freeze_backbone(model)
    assert "prompt" in handle.trainable
    assert "prior" not in handle.frozen


@pytest.mark.parametrize(
    "model", [net(conv1=conv(), bn=nn.BatchNorm2d(3), fc=fc()), nn.Sequential(conv(), nn.Flatten(), fc())]
)
def test_own_parameters_of_a_home_made_model_that_may_be_new_are_head(model: nn.Module) -> None:
    model.prototypes = nn.Parameter(torch.ones(10, 3))
    model.pos_embed = nn.Parameter(torch.ones(3))
    model.register_buffer("prior", torch.ones(2))
    model.register_buffer("centre", torch.ones(5))
    found = find_backbone(model)
    assert found.head[-2:] == ("prototypes", "prior")
    assert {"pos_embed", "centre"} <= set(found.backbone)


def test_a_pool_with_parameters_is_head() -> None:
    model = zoo.make("resnet18")
    model.avgpool = nn.Conv2d(512, 512, 1)
    assert find_backbone(model).head == ("fc", "avgpool")


def test_more_heads_on_a_model_of_torchvision() -> None:
    model = zoo.make("resnet18")
    model.fc = nn.Identity()
    model.fc_age, model.fc_gender = nn.Linear(512, 1), nn.Linear(512, 2)
    assert find_backbone(model).head == ("fc_age", "fc_gender")


def test_the_pyramid_of_a_detector_trains() -> None:
    with torch.device("meta"):
        model = torchvision.models.detection.retinanet_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=3
        )
    assert isinstance(model.backbone, BackboneWithFPN)
    handle = freeze_backbone(model)
    assert handle.selection.backbone == ("backbone.body",)
    assert freezekit.is_frozen(model, "backbone.body.layer4")
    assert not freezekit.is_frozen(model, "backbone.fpn")


def test_the_heads_of_segmentation() -> None:
    with torch.device("meta"):
        model = torchvision.models.segmentation.fcn_resnet50(
            weights=None, weights_backbone=None, aux_loss=True
        )
    assert find_backbone(model).head == ("classifier", "aux_classifier")


class TestTimm:
    @pytest.mark.parametrize(
        ("name", "head"),
        [
            ("test_vit", ("head",)),
            ("test_vit3", ("head", "attn_pool")),
            ("test_efficientnet", ("classifier",)),
            ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
            ("levit_384_s8", ("head", "head_dist")),
            ("beit_base_patch16_224", ("head", "fc_norm")),
            ("efficientvim_m1", ("heads", "weights")),
        ],
    )
    def test_heads(self, name: str, head: tuple[str, ...]) -> None:
        timm = pytest.importorskip("timm")
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=7)
        assert find_backbone(model).head == head

    def test_without_a_classifier(self) -> None:
        timm = pytest.importorskip("timm")
        model = timm.create_model("test_vit", num_classes=0)
        with pytest.raises(
            SelectionError, match=r"'head' has no parameters.*model.reset_classifier\(num_classes\)"
        ):
            find_backbone(model)
        model.reset_classifier(5)
        assert find_backbone(model).head == ("head",)
        both = net(model=timm.create_model("test_vit", num_classes=0), head=nn.Linear(64, 2))
        assert find_backbone(both).backbone == ("model",)

    def test_a_classifier_of_ones_own(self) -> None:
        timm = pytest.importorskip("timm")
        model = timm.create_model("test_vit", num_classes=5)
        model.head = nn.Sequential(OrderedDict(hidden=nn.Linear(64, 8), out=nn.Linear(8, 2)))
        assert freeze_backbone(model).trainable == [f"head.{n}" for n, _ in model.head.named_parameters()]
