"""A sample of the census: models with odd heads of every family; all of them by ``-m census``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import census
import pytest
import torch
from torch import nn

from freezekit.freezing.handle import Freeze

TORCHVISION_ON_CPU = [
    "googlenet", "mnasnet0_5", "mobilenet_v3_small", "quantized_mobilenet_v2", "regnet_y_400mf", "resnet18",
    "shufflenet_v2_x0_5", "squeezenet1_1",
]  # fmt: skip
TORCHVISION = [
    "alexnet", "convnext_tiny", "deeplabv3_mobilenet_v3_large", "densenet121", "efficientnet_b0",
    "fasterrcnn_mobilenet_v3_large_fpn", "fcn_resnet50", "fcos_resnet50_fpn", "inception_v3",
    "keypointrcnn_resnet50_fpn", "lraspp_mobilenet_v3_large", "maskrcnn_resnet50_fpn", "maxvit_t",
    "mvit_v1_b", "quantized_googlenet", "quantized_inception_v3", "r2plus1d_18", "regnet_x_400mf",
    "retinanet_resnet50_fpn_v2", "s3d", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "swin3d_t",
    "swin_t", "vgg11_bn", "vit_b_16",
]  # fmt: skip
TIMM_ON_CPU = [
    "test_byobnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet", "test_resnet",
    "test_vit", "test_vit2", "test_vit3",
]  # fmt: skip
TIMM = [
    "beit_base_patch16_224", "cait_xxs24_224", "coat_lite_tiny", "coatnet_nano_rw_224", "convnext_atto",
    "cpubone_nano", "crossvit_tiny_240", "cs3darknet_s", "deit_tiny_distilled_patch16_224", "dla34",
    "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "efficientvim_m1_dist",
    "efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_224", "fastvit_t8", "ghostnet_050",
    "hgnetv2_b0", "hrnet_w18_small", "inception_next_atto", "inception_v4", "legacy_xception", "levit_128s",
    "levit_384_s8", "mixer_s32_224", "mobilenetv4_conv_small", "naflexvit_base_patch16_map",
    "pit_ti_distilled_224", "regnetz_005", "repvit_m0_9", "resnet50_clip", "rexnet_100",
    "samvit_base_patch16", "selecsls42", "sequencer2d_s", "swinv2_tiny_window8_256", "tinynet_e", "vgg11",
    "visformer_tiny", "volo_d1_224", "xcit_nano_12_p16_224",
]  # fmt: skip


def check(entry: census.Entry) -> None:
    assert (entry.verdict, entry.why, entry.trace) == ("ok", "", "")
    assert entry.share < 1


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    check(census.judge(name, census.torchvision_models()[name]))


@pytest.mark.parametrize("name", TORCHVISION_ON_CPU)
def test_torchvision_with_values(name: str) -> None:
    check(census.judge(name, census.torchvision_models()[name], device="cpu"))


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    if name not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} has no {name}")
    check(census.judge(name, census.timm_models()[name]))


@pytest.mark.parametrize("name", TIMM_ON_CPU)
def test_timm_with_values(name: str) -> None:
    timm = pytest.importorskip("timm")
    if name not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} has no {name}")
    check(census.judge(name, census.timm_models()[name], device="cpu"))


@pytest.mark.census
@pytest.mark.parametrize(
    ("family", "reached"), [("torchvision", 1.0), ("timm", 0.99), ("transformers", 0.93), ("smp", 1.0)]
)
def test_all_of_a_family(family: str, reached: float) -> None:
    if family == "timm":
        pytest.importorskip("timm")
    builders = census.models(family)
    if not builders:
        pytest.skip(f"no models of {family} are listed")
    entries = [e for e in census.census(builders) if e.verdict != "no class count"]
    assert [e for e in entries if e.verdict == "WRONG" or e.trace] == []
    assert sum(e.verdict == "ok" for e in entries) >= reached * len(entries) > 0


class TestItself:
    """What the census is to find, it finds."""

    @staticmethod
    def build(classes: int) -> nn.Module:
        return nn.ModuleDict({"features": nn.Linear(4, 4), "classifier": nn.Linear(4, classes)})

    def test_a_wrong_freeze(self) -> None:
        def build(classes: int) -> nn.Module:
            return nn.ModuleDict({"features": nn.Linear(4, classes), "classifier": nn.Linear(classes, 2)})

        entry = census.judge("wrong", build)
        assert (entry.verdict, entry.why) == ("WRONG", "features.bias, features.weight")

    def test_a_refusal(self) -> None:
        entry = census.judge("refused", lambda classes: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, classes)))
        assert entry.verdict == "refusal"
        assert "cannot tell the head of Sequential" in entry.why

    def test_no_class_count(self) -> None:
        assert census.judge("none", lambda classes: nn.Linear(4, 4)).verdict == "no class count"
        assert census.judge("none", lambda classes: nn.Linear(4, "x")).verdict == "no class count"

    def test_a_freeze_that_is_not_undone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Freeze, "undo", lambda self: None)
        assert "('module', 'features')" in census.judge("frozen", self.build).trace

    def test_a_value_that_is_not_restored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        undo = Freeze.undo

        def careless(self: Freeze) -> None:
            undo(self)
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[3] *= -1

        monkeypatch.setattr(Freeze, "undo", careless)
        assert census.judge("changed", self.build, device="cpu").trace == "('tensor', 'features.weight')"

    def test_a_backbone_that_is_not_held(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("freezekit.freezing.holding.hold_module", lambda module, holder: None)
        assert "not frozen: features" in census.judge("loose", self.build).trace

    def test_as_a_script(self, tmp_path: Path) -> None:
        arguments = ["--family", "torchvision", "--names", "resnet18", "raft_small"]
        script = [sys.executable, census.__file__, *arguments, "--json", str(tmp_path / "census.json")]
        done = subprocess.run(script, capture_output=True, text=True, check=True)
        assert "torchvis" in done.stdout
        resnet, raft = json.loads((tmp_path / "census.json").read_text())
        assert (resnet["verdict"], resnet["head"], resnet["trace"]) == ("ok", ["fc"], "")
        assert raft["verdict"] == "no class count"
