"""More than twenty tiny architectures, built offline, each with the name of its head and a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
import zoo
from torch import Tensor, nn
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class Architecture:
    """A model, the prefix of its head's names, and what it is called with."""

    make: Callable[[], nn.Module]
    head: str
    batch: Callable[[], dict[str, Any]]
    needs: str = "torchvision"


def images(size: int = 32, key: str = "x", batch: int = 4) -> Callable[[], dict[str, Any]]:
    return lambda: {key: torch.randn(batch, 3, size, size)}


def words(*keys: str) -> Callable[[], dict[str, Any]]:
    return lambda: {key: torch.randint(2, 50, (3, 7)) for key in keys or ("input_ids",)}


def timm_model(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=5)

    return make


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        [4, 4], 16, [1, 1], [2, 2], [4, 4], stochastic_depth_prob=0.2, num_classes=5
    )


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2), num_init_features=16, bn_size=2, num_classes=5)


def detector() -> nn.Module:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import FrozenBatchNorm2d

    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 4, 1), FrozenBatchNorm2d(8)
    )
    body.out_channels = 8
    anchors = AnchorGenerator(((8, 16),), ((1.0,),))
    return FasterRCNN(body, 3, rpn_anchor_generator=anchors, min_size=32, max_size=32,
                      rpn_post_nms_top_n_train=10, box_detections_per_img=4)  # fmt: skip


def pictures() -> dict[str, Any]:
    target = {"boxes": torch.tensor([[2.0, 2, 20, 20]]), "labels": torch.tensor([1])}
    return {"images": [torch.rand(3, 32, 32) for _ in range(2)], "targets": [target, target]}


def unet() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet18", encoder_depth=3, encoder_weights=None, decoder_channels=(16, 8, 8), classes=2)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, num_labels=3)  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, pad_token_id=0, num_labels=3
    )
    return GPT2ForSequenceClassification(config)


def wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                            conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 4),
                            num_feat_extract_layers=2, num_conv_pos_embeddings=4,
                            num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
                            classifier_proj_size=8, num_labels=3)  # fmt: skip
    return Wav2Vec2ForSequenceClassification(config)


def hf_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config)


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(bert(), LoraConfig(target_modules=["query", "value"], r=2, lora_dropout=0.1,
                                             modules_to_save=["classifier"]))  # fmt: skip


class Recurrent(nn.Module):
    """Words through an LSTM, whose flat list of weights is a plain attribute."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"emb": nn.Embedding(50, 8), "rnn": kind(8, 8, 2, dropout=0.3)})
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone["rnn"](self.backbone["emb"](x))[0].mean(1))


class Stateful(nn.Module):
    """Keeps a count of what it saw in train mode, a table in a list, and the last result as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("ramp", torch.linspace(0, 1, 8), persistent=False)
        self.tables = [torch.randn(8), torch.randn(8)]
        self.offset = torch.randn(8)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.tables[0].mul_(0.9)
            self.offset = self.offset * 0.9
        self.last = x * self.weight + self.ramp + self.tables[0] + self.offset
        return self.last


def own_layers() -> nn.Module:
    body = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        Stateful(),
        parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.BatchNorm1d(8, affine=False),
        nn.GroupNorm(2, 8),
        nn.Dropout(0.2),
    )
    return nn.ModuleDict({"backbone": body, "head": nn.Linear(8, 3)})


class Whole(nn.Module):
    """A backbone and a head, one after the other."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def video() -> nn.Module:
    body = nn.Sequential(
        nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    )
    return Whole(body, nn.Linear(8, 3))


def style_transfer() -> nn.Module:
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.SyncBatchNorm(8))
    return Whole(body, nn.Conv2d(8, 3, 1))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
    return Whole(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3))


def own_whole() -> nn.Module:
    parts = own_layers()
    return Whole(parts["backbone"], parts["head"])


def of_zoo(name: str) -> Callable[[], nn.Module]:
    return lambda: zoo.ZOO[name][0]()


def random(*shape: int, key: str = "x") -> Callable[[], dict[str, Any]]:
    return lambda: {key: torch.randn(*shape)}


ARCHITECTURES: dict[str, Architecture] = {
    # the first six stand for the rest in a normal run
    "resnet18": Architecture(of_zoo("resnet18"), "fc", images()),
    "own layers": Architecture(own_whole, "head", random(6, 8), "torch"),
    "lstm": Architecture(
        lambda: Recurrent(nn.LSTM), "head", lambda: {"x": torch.randint(0, 50, (4, 6))}, "torch"
    ),
    "detector": Architecture(detector, "roi_heads.box_predictor", pictures),
    "bert": Architecture(bert, "classifier", words(), "transformers"),
    "timm test_efficientnet": Architecture(timm_model("test_efficientnet"), "classifier", images(), "timm"),
    "mobilenet_v3": Architecture(
        lambda: torchvision.models.mobilenet_v3_small(num_classes=5, width_mult=0.5), "classifier", images()
    ),
    "shufflenet": Architecture(lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5), "fc", images()),
    "densenet": Architecture(densenet, "classifier", images()),
    "convnext": Architecture(of_zoo("convnext"), "classifier", images()),
    "vit": Architecture(of_zoo("vit"), "heads", images()),
    "swin": Architecture(swin, "head", images()),
    "timm test_resnet": Architecture(timm_model("test_resnet"), "fc", images(), "timm"),
    "timm test_vit": Architecture(timm_model("test_vit"), "head", images(160), "timm"),
    "smp unet": Architecture(unet, "segmentation_head", images(), "segmentation_models_pytorch"),
    "gpt2": Architecture(gpt2, "score", words(), "transformers"),
    "wav2vec2": Architecture(
        wav2vec2, "classifier", lambda: {"input_values": torch.randn(2, 400)}, "transformers"
    ),
    "transformers resnet": Architecture(hf_resnet, "classifier", images(key="pixel_values"), "transformers"),
    "gru": Architecture(
        lambda: Recurrent(nn.GRU), "head", lambda: {"x": torch.randint(0, 50, (4, 6))}, "torch"
    ),
    "video": Architecture(video, "head", random(4, 3, 4, 6, 6), "torch"),
    "style transfer": Architecture(style_transfer, "head", images(12), "torch"),
    "transformer encoder": Architecture(encoder, "head", random(4, 5, 16), "torch"),
    "lora": Architecture(lora, "base_model.model.classifier", words(), "peft"),
}
