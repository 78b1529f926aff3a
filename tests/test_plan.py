"""``freezekit plan``: what would be frozen, and one clear line where that cannot be said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import freezekit.cli
from freezekit import FreezekitError
from freezekit.freezing.plan import build_without_memory, plan

MODULE = """
import sys, torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.features = nn.Linear(100_000, 100_000)
        self.classifier = nn.Linear(100_000, 2)

class Makers:
    make = Net

made = nn.Sequential()
number = 5

def unclear():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

def nothing():
    return None

def stops():
    sys.exit(7)

def fails():
    raise ValueError("no\\nconfiguration")

class Leave(BaseException):
    pass

def leaves():
    raise Leave("now")

class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Linear(3, 3)
        self.fc = nn.LazyLinear(2)

def lazy():
    return nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))

def reads():
    layer = nn.Linear(3, 3)
    return float(layer.weight.sum())
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "planned.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    (tmp_path / "raises.py").write_text("raise OSError('no disk')")
    return tmp_path


def run(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    package = str(Path(freezekit.cli.__file__).parent.parent)
    env = {
        **os.environ,
        "PYTHONPATH": package,
        "PYTHONSAFEPATH": "1",
    }  # the folder is not on the path by itself
    command = [sys.executable, "-m", "freezekit", "plan", name]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)


def test_torchvision() -> None:
    assert plan("torchvision:squeezenet1_1") == "\n".join([
        "backbone: features",
        "head:     classifier",
        "rule:     torchvision calls the head 'classifier'",
        "",
        "layer       type               frozen  trainable  held norms",
        "features    FrozenSequential  722,496          0           0",
        "classifier  Sequential              0    513,000           0",
        "total       SqueezeNet        722,496    513,000           0",
        "",
        "call:",
        "  import freezekit",
        "  import torchvision",
        "  model = torchvision.models.get_model('squeezenet1_1', weights=\"DEFAULT\")",
        "  freezekit.freeze_backbone(model)",
    ])  # fmt: skip


def test_what_would_be_downloaded_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", None)
    assert "backbone: backbone.body\n" in plan("torchvision:fasterrcnn_resnet50_fpn")
    assert "rule:     torchvision calls the head 'fc'" in plan("torchvision:regnet_y_400mf")


def test_weights_that_there_are_not_are_not_asked_for() -> None:
    pytest.importorskip("timm")
    assert "create_model('beit3_giant_patch14_224', num_classes=10)" in plan("timm:beit3_giant_patch14_224")


def test_timm() -> None:
    pytest.importorskip("timm")
    text = plan("timm:vit_base_patch16_siglip_224.webli")  # has no classifier unless asked for one
    assert "head:     head, attn_pool\n" in text
    assert "timm.create_model('vit_base_patch16_siglip_224.webli', pretrained=True, num_classes=10)" in text


def test_a_factory_in_the_current_folder(here: Path) -> None:
    done = run("planned:Net", here)  # 40 GB if it took memory
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^features +FrozenLinear +10,000,100,000 +0 +0$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith(
        "  from planned import Net\n  model = Net()\n  freezekit.freeze_backbone(model)\n"
    )
    assert re.search(r"^fc +LazyLinear +0 +0 +0$", run("planned:Lazy", here).stdout, re.MULTILINE)
    assert "from planned import Makers\n  model = Makers.make()" in run("planned:Makers.make", here).stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet18", r"MODEL: this names no model \(got 'resnet18'\)\. Remedy: give torchvision:NAME"),
        ("planned:", "this names no model"),
        ("torchvision:resnet19", "no such model in torchvision .* Remedy: did you mean 'resnet18' or"),
        ("torchvision:qqqqq", "no such model in torchvision .* Remedy: check the name"),
        ("torchvision:raft_small", "in optical flow no part is a head"),
        ("timm:resnet18.nonsense", "no such weights in timm .* did you mean 'resnet18."),
        ("planned.py:Net", "this is no module's name .*as planned:Net"),
        ("./planned.py:Net", "this is no module's name .*as planned:Net"),
        (".planned:Net", "this is no module's name .*as planned:Net"),
        ("planned:lazy", r"cannot tell the head of Sequential: .*0 .LazyLinear, 0 parameters"),
        ("planned:leaves", r"making it fails \(got Leave: now\)"),
        ("planned:Nett", "planned:Nett: no such name in planned .* did you mean 'Net'"),
        ("planned:number", r"neither a model nor makes one \(got int\)"),
        ("planned:nothing", r"this makes no model \(got NoneType\)"),
        ("planned:stops", r"making it fails \(got SystemExit: 7\)"),
        ("planned:fails", r"making it fails \(got ValueError: no configuration\)"),
        ("planned:reads", "cannot be built without memory, on the meta device .* make the model yourself"),
        ("planned:unclear", "cannot tell the head of Sequential"),
        ("planned:made", "cannot tell the head of Sequential"),
        ("absent:Net", "no such module .got absent.* pip install absent, or run this in the folder that"),
        ("planned.absent:Net", "cannot be imported|no such module|not installed"),
        ("broken:Net", "a package is not installed .* pip install nothing_of_this_name"),
        ("raises:Net", "the module cannot be imported .got OSError: no disk"),
    ],
)  # fmt: skip
def test_errors_are_one_line(name: str, says: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("planned", "broken", "raises"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    done = CliRunner().invoke(freezekit.cli.main, ["plan", name])
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.search(says, line), line
    assert "Remedy: " in line


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        FreezekitError, match=r"a package is not installed .got timm.*Remedy: pip install timm"
    ):
        plan("timm:resnet18")


def test_without_memory() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, int(torch.arange(5).sum()))

    model = build_without_memory(Reads)  # what a constructor computes stays real
    assert model.layer.weight.shape == (10, 3)
    assert model.layer.weight.is_meta
    with pytest.raises(ValueError, match="mine"):
        build_without_memory(lambda: (_ for _ in ()).throw(ValueError("mine")))
