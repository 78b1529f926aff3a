"""Models of the frameworks, each buildable with any number of classes: what differs in shape is the head.

Everything is built from tiny or shortened configurations on the meta device, so nothing is downloaded and
the largest costs no memory.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a configuration that asks for weights is to fail

Builder = Callable[[int], nn.Module]


class CannotBuildError(Exception):
    """This version of the library does not make this model from a configuration's defaults."""


#: the auto classes of transformers whose models are made for ``num_labels`` classes
TABLES = (
    "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "IMAGE_SEGMENTATION",
    "INSTANCE_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "OBJECT_DETECTION", "AUDIO_CLASSIFICATION",
    "AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR", "VISUAL_QUESTION_ANSWERING",
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION",
)  # fmt: skip

#: models whose number of outputs does not follow ``num_labels``, or that need a package of their own
LEFT_OUT = {
    "BlipForQuestionAnswering", "Blip2ForConditionalGeneration", "ShieldGemma2ForImageClassification",
    "Nemotron3DiarizationForAudioFrameClassification", "PPOCRV5MobileDetForObjectDetection",
    "PPOCRV5ServerDetForObjectDetection", "PPOCRV6MediumDetForObjectDetection",
    "PPOCRV6SmallDetForObjectDetection", "DinatForImageClassification", "LayoutLMv2ForSequenceClassification",
    "LayoutLMv2ForTokenClassification", "Sapiens2ForSemanticSegmentation",
    "CohereCompassTextForSequenceClassification",
}  # fmt: skip

#: what a configuration needs beside its defaults
SETTINGS: dict[str, dict[str, Any]] = {
    "BeitForSemanticSegmentation": {"out_indices": [3, 5, 7, 11], "num_hidden_layers": 12},
    "PerceiverForImageClassificationFourier": {"num_self_attention_heads": 1, "num_cross_attention_heads": 1},
    "PerceiverForImageClassificationConvProcessing": {
        "num_self_attention_heads": 1, "num_cross_attention_heads": 1,
    },
    "EsmForSequenceClassification": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "EsmForTokenClassification": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "HunYuanDenseV1ForSequenceClassification": {"head_dim": 128},
    "HunYuanMoEV1ForSequenceClassification": {"head_dim": 128},
    "MinistralForSequenceClassification": {"head_dim": 128},
    "MinistralForTokenClassification": {"head_dim": 128},
    "NemotronForSequenceClassification": {"num_key_value_heads": 8, "head_dim": 128},
    "NemotronForTokenClassification": {"num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip

#: what shortens a model
DEPTHS = (
    "num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers", "num_layers",
    "num_encoder_layers", "num_decoder_layers", "decoder_num_layers",
)  # fmt: skip

SEGMENTATION = (
    "Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "MAnet", "Linknet", "PAN",
    "UPerNet", "Segformer", "DPT",
)  # fmt: skip
ENCODERS = ("resnet18", "efficientnet-b0", "mobileone_s0", "tu-resnet18", "tu-convnext_atto")

#: one name of each kind, for the run that has little time
SAMPLE = (
    "transformers/ViTForImageClassification", "transformers/DeiTForImageClassificationWithTeacher",
    "transformers/BeitForImageClassification", "transformers/ResNetForImageClassification",
    "transformers/LevitForImageClassificationWithTeacher", "transformers/CLIPForImageClassification",
    "transformers/TimmWrapperForImageClassification", "transformers/SegformerForSemanticSegmentation",
    "transformers/UperNetForSemanticSegmentation", "transformers/DetrForObjectDetection",
    "transformers/DetrForSegmentation", "transformers/Mask2FormerForUniversalSegmentation",
    "transformers/RTDetrForObjectDetection", "transformers/VideoMAEForVideoClassification",
    "transformers/BertForSequenceClassification", "transformers/DebertaV2ForSequenceClassification",
    "transformers/BartForSequenceClassification", "transformers/T5ForTokenClassification",
    "transformers/LlamaForSequenceClassification", "transformers/XLNetForTokenClassification",
    "transformers/Wav2Vec2ForSequenceClassification", "transformers/WhisperForAudioClassification",
    "transformers/Wav2Vec2ForXVector", "transformers/ViltForQuestionAnswering",
    "transformers/PerceiverForSequenceClassification", "smp/Unet-resnet18", "smp/DPT-tu-vit_tiny_patch16_224",
    "smp/Segformer-mit_b0", "lightning/timm", "peft/lora",
)  # fmt: skip


def models() -> dict[str, Builder]:
    """Return a builder for each model of the frameworks that are installed; it takes the class count."""
    found: dict[str, Builder] = {}
    if importlib.util.find_spec("transformers"):
        found |= {f"transformers/{n}": functools.partial(transformer, n) for n in _transformers_names()}
    if importlib.util.find_spec("segmentation_models_pytorch"):
        pairs = [(a, e) for a in SEGMENTATION for e in ENCODERS if a != "DPT"]
        pairs += [("DPT", "tu-vit_tiny_patch16_224"), ("Unet", "mit_b0"), ("Segformer", "mit_b0")]
        found |= {f"smp/{a}-{e}": functools.partial(_segmentation, a, e) for a, e in pairs}
    if importlib.util.find_spec("lightning") and importlib.util.find_spec("timm"):
        found["lightning/timm"] = _lightning
    if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):
        found["peft/lora"] = _peft
    return {name: functools.partial(quietly, build) for name, build in found.items()}


def quietly(build: Callable[[Any], nn.Module], what: Any) -> nn.Module:
    """Build on the meta device, without the constructors' warnings of zero-element layers and old names."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return build(what)


def _transformers_names() -> list[str]:
    from transformers.models.auto import modeling_auto

    names: dict[str, None] = {}
    for table in TABLES:
        for given in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).values():
            names |= dict.fromkeys((given,) if isinstance(given, str) else given)
    return [name for name in names if name not in LEFT_OUT]


def transformer(name: str, classes: int) -> nn.Module:
    import transformers

    kind = getattr(transformers, name)
    settings = SETTINGS.get(name, {})
    error: Exception | None = None
    for short in (True, False):  # some models of few layers contradict their configuration
        config = kind.config_class(num_labels=classes, **settings)
        if short:
            _shorten(config, keep=set(settings))
        try:
            model: nn.Module = kind(config)
            return model
        except Exception as failed:  # whatever a constructor does
            error = failed
    raise CannotBuildError(name) from error


def _shorten(config: Any, keep: set[str]) -> None:
    for name in DEPTHS:
        depth = getattr(config, name, None)
        if isinstance(depth, int) and depth > 2 and name not in keep and "funnel" not in config.model_type:
            setattr(config, name, 2)
    for value in list(vars(config).values()):
        if hasattr(value, "model_type"):
            _shorten(value, keep)


def _segmentation(architecture: str, encoder: str, classes: int) -> nn.Module:
    import segmentation_models_pytorch

    auxiliary = {} if architecture == "DPT" else {"aux_params": {"classes": classes}}
    # mit_b0 reads a tensor's value when it is made
    with torch.device("cpu" if encoder == "mit_b0" else "meta"):
        model: nn.Module = getattr(segmentation_models_pytorch, architecture)(
            encoder_name=encoder, encoder_weights=None, classes=classes, **auxiliary
        )
    return model


def _lightning(classes: int) -> nn.Module:
    import lightning
    import timm
    import torchmetrics

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.loss = nn.CrossEntropyLoss()
            self.net = timm.create_model("resnet18", num_classes=classes)
            self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=classes)

    return Classifier()


def _peft(classes: int) -> nn.Module:
    import peft

    model = transformer("BertForSequenceClassification", classes)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1))
