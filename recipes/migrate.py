"""Migrate from another way of freezing: the old call and freezekit's, on the same model, measured.

    python recipes/migrate.py
    python recipes/migrate.py --steps 2      # just a look
    python recipes/migrate.py --only timm    # what comes from one package

A head is trained on handwritten digits over a frozen backbone, with `model.train()` before each step, as in
any loop. Which tensors of the backbone moved? Which keys are missing in its checkpoint? Is its output, in
train mode, what it was in eval mode? The weights are random and the BN statistics fit the data: what moves is
telling, how far the output goes off is not. What is not installed is skipped.
Needs: pip install 'freezekit[demo,vision]'; and timm, lightning, fastai, segmentation-models-pytorch or
transformers, if you come from one of them
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

from freezekit import DriftAuditor, check, freeze_backbone, freeze_to, trainable_parameters

console = Console(highlight=False)
console.width = max(console.width, 100)


# -- by hand: eval() and requires_grad_(False), and a train() that leaves it so --------------------------


class ByHand(torchvision.models.MobileNetV2):
    """What many projects write for themselves."""

    def train(self, mode: bool = True) -> ByHand:
        """Leave the backbone in eval mode."""
        super().train(mode)
        self.features.eval()
        return self


def by_hand_before(model: nn.Module) -> nn.Module:
    held = ByHand(num_classes=10)
    held.load_state_dict(model.state_dict())
    held.features.requires_grad_(False)
    return held


def by_hand_after(model: nn.Module) -> nn.Module:
    freeze_backbone(model)
    return model


def average_weights(model: nn.Module, images: Tensor) -> None:
    """Do what scripts with SWA do at the end; update_bn calls train() on each BN itself."""
    update_bn([images], model)


# -- torchvision: FrozenBatchNorm2d, as in its detection models ------------------------------------------


def torchvision_before(model: nn.Module) -> nn.Module:
    frozen = detection_body(FrozenBatchNorm2d)
    frozen.load_state_dict(model.state_dict())
    return frozen


def torchvision_after(model: nn.Module) -> nn.Module:
    freeze_backbone(model, backbone="body")
    return model


def detection_body(norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=norm_layer, trainable_layers=0
    )


# -- timm: freeze ----------------------------------------------------------------------------------------


def timm_before(model: nn.Module) -> nn.Module:
    from timm.utils.model import freeze

    freeze(model, ["stem", "stages"])
    return model


def timm_after(model: nn.Module) -> nn.Module:
    freeze_backbone(model)
    return model


def levit() -> nn.Module:
    import timm

    return timm.create_model("levit_128s", num_classes=10, img_size=32)


# -- Lightning: BaseFinetuning.freeze, which BackboneFinetuning calls --------------------------------------


def lightning_before(model: nn.Module, **options: bool) -> nn.Module:
    from lightning.pytorch.callbacks import BaseFinetuning

    BaseFinetuning.freeze(model.features, **options)
    return model


def lightning_after(model: nn.Module) -> nn.Module:
    freeze_backbone(model)
    return model


# -- fastai: Learner.freeze, which is freeze_to(-1) ----------------------------------------------------------


def fastai_before(model: nn.Module, **options: bool) -> nn.Module:
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.torch_core import params

    learner = Learner(
        DataLoaders([], []),
        model,
        F.cross_entropy,
        splitter=lambda model: [params(model.features), params(model.classifier)],
        **options,
    )
    learner.freeze()
    return model


def fastai_after(model: nn.Module) -> nn.Module:
    freeze_to(model, -1)
    return model


# -- segmentation_models_pytorch: freeze_encoder -------------------------------------------------------------


def smp_before(model: nn.Module) -> nn.Module:
    model.train()  # as it is when made
    model.freeze_encoder()
    return model


def smp_after(model: nn.Module) -> nn.Module:
    freeze_backbone(model)
    return model


def unet() -> nn.Module:
    import segmentation_models_pytorch

    return segmentation_models_pytorch.Unet("efficientnet-b0", encoder_weights=None)


def encoder_to_train_mode(model: nn.Module, images: Tensor) -> None:
    """Do what a loop does that sets the modes of the parts one by one."""
    model.encoder.train()
    with torch.no_grad():
        model(images)


# -- transformers: DETR's replace_batch_norm, on a backbone of timm ------------------------


def detr_before(model: nn.Module) -> nn.Module:
    from transformers.models.detr.modeling_detr import replace_batch_norm

    with torch.no_grad():
        replace_batch_norm(model)
    model.requires_grad_(False).classifier.requires_grad_(True)
    return model


def detr_after(model: nn.Module) -> nn.Module:
    freeze_backbone(model)
    return model


def mobilenet_v3() -> nn.Module:
    import timm

    return timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=10)


# -- what is measured ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An old way and the new one; ``head`` is what trains, and is given the backbone's output."""

    needs: tuple[str, ...]
    old: str
    before: Callable[[nn.Module], nn.Module]
    leaves: set[str]
    """What the old way leaves open: moved tensors, missing keys, another output."""
    new: str
    after: Callable[[nn.Module], nn.Module]
    model: Callable[[], nn.Module]
    head: str
    then: Callable[[nn.Module, Tensor], None] | None = None
    """What else a script does, after the last step."""


def mobilenet() -> nn.Module:
    return torchvision.models.mobilenet_v2(num_classes=10)


def without_bn(before: Callable[..., nn.Module]) -> Callable[[nn.Module], nn.Module]:
    return lambda model: before(model, train_bn=False)


MOVED, KEYS, OUTPUT = "moved", "keys", "output"
SMP = "segmentation_models_pytorch"
ALL, BODY, GROUPS = (
    "freeze_backbone(model)",
    'freeze_backbone(model, backbone="body")',
    "freeze_to(model, -1)",
)
CASES = [
    Case(("torch",), "eval() in a train() of one's own", by_hand_before, set(),
         ALL, by_hand_after, mobilenet, "classifier"),
    Case(("torch",), "the same, then SWA's update_bn", by_hand_before, {MOVED, OUTPUT},
         ALL, by_hand_after, mobilenet, "classifier", average_weights),
    Case(("torchvision",), "torchvision FrozenBatchNorm2d", torchvision_before, {KEYS, OUTPUT},
         BODY, torchvision_after, detection_body, "fpn"),
    Case(("timm",), "timm freeze(model, submodules)", timm_before, {MOVED, KEYS, OUTPUT},
         ALL, timm_after, levit, "head"),
    Case(("lightning",), "Lightning BaseFinetuning.freeze(part)", lightning_before, {MOVED, OUTPUT},
         ALL, lightning_after, mobilenet, "classifier"),
    Case(("lightning",), "the same, train_bn=False", without_bn(lightning_before), {OUTPUT},
         ALL, lightning_after, mobilenet, "classifier"),
    Case(("fastai",), "fastai learner.freeze()", fastai_before, {MOVED, OUTPUT},
         GROUPS, fastai_after, mobilenet, "classifier"),
    Case(("fastai",), "the same, train_bn=False", without_bn(fastai_before), {MOVED, OUTPUT},
         GROUPS, fastai_after, mobilenet, "classifier"),
    Case((SMP,), "smp model.freeze_encoder()", smp_before, {OUTPUT},
         ALL, smp_after, unet, "decoder"),
    Case((SMP,), "the same, then encoder.train()", smp_before, {MOVED, OUTPUT},
         ALL, smp_after, unet, "decoder", encoder_to_train_mode),
    Case(("transformers", "timm"), "DETR's replace_batch_norm(model)", detr_before, {KEYS, OUTPUT},
         ALL, detr_after, mobilenet_v3, "classifier"),
]  # fmt: skip
PACKAGES = list(dict.fromkeys(case.needs[0] for case in CASES))


@dataclass(frozen=True)
class Outcome:
    """What came of one way."""

    tensors: int
    moved: int
    missing: int
    equal: bool
    off: float
    codes: list[str]

    @property
    def leaves(self) -> set[str]:
        """What is left open."""
        found = {MOVED: self.moved, KEYS: self.missing, OUTPUT: not self.equal}
        return {what for what, is_open in found.items() if is_open}


def digits() -> Tensor:
    images = torch.tensor(load_digits().images[:64], dtype=torch.float32).unsqueeze(1) / 16
    return F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)


@torch.no_grad()
def settle(model: nn.Module, images: Tensor) -> None:
    """Give the BN layers the statistics of these images, as training does."""
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for norm in momenta:
        norm.momentum = None  # the average over all batches
    model.train()
    for batch in images.split(16):
        model(batch)
    for norm, momentum in momenta.items():
        norm.momentum = momentum


@torch.no_grad()
def output(model: nn.Module, head: str, images: Tensor) -> list[Tensor]:
    """Return what the head is given."""
    given: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(
        lambda _, inputs: given.extend(tree_leaves(inputs))
    )
    model(images)
    hook.remove()
    return given


def measure(case: Case, freeze: Callable[[nn.Module], nn.Module], images: Tensor, steps: int) -> Outcome:
    """Freeze, train the rest, and see what became of the backbone."""
    torch.manual_seed(0)
    model = case.model()
    settle(model, images)
    before = copy.deepcopy(model.state_dict())
    wanted = output(model.eval(), case.head, images)
    trained = (case.head, "head_dist", "segmentation_head")  # some have a second head
    backbone = [name for name in before if not name.startswith(trained)]

    model = freeze(model).train()
    kept = [name for name in model.state_dict() if name in set(backbone)]
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.01)
    found = check(model, optimizer, frozen=kept)
    with DriftAuditor(model, optimizer, frozen=kept, on_drift="record", probe=steps) as auditor:
        for step in range(steps):
            model.train()
            optimizer.zero_grad()
            batch = images.roll(step * 8, 0)[:8]
            sum(out.square().mean() for out in tree_leaves(model(batch))).backward()  # any loss will do
            optimizer.step()
        if case.then:
            case.then(model, images)
        auditor.check()
    found += auditor.report().findings

    after = model.state_dict()
    given = output(model.train(), case.head, images)
    apart = [(got - want).abs().max() / want.abs().max() for got, want in zip(given, wanted, strict=True)]
    return Outcome(
        tensors=len(backbone),
        moved=sum(not torch.equal(before[name], after[name]) for name in kept),
        missing=len(backbone) - len(kept),
        equal=all(map(torch.equal, given, wanted)),
        off=float(max(apart)),
        codes=sorted({finding.code for finding in found}),
    )


# -- what else, by package -----------------------------------------------------------------------------


def interchange() -> str:
    """Load the checkpoint of a model with FrozenBatchNorm2d into one frozen by freezekit, and back."""
    torch.manual_seed(0)
    images = digits()
    plain = detection_body()
    settle(plain, images)
    old = torchvision_before(plain).eval()
    new, back = detection_body(), detection_body(FrozenBatchNorm2d).eval()
    torchvision_after(new)
    new.load_state_dict(old.state_dict(), strict=True)
    back.load_state_dict(new.state_dict(), strict=True)
    given = [output(model.eval(), "fpn", images) for model in (plain, new, old, back)]
    assert all(map(torch.equal, given[0], given[1]))
    assert all(map(torch.equal, given[2], given[3]))
    counts = [sum(1 for _ in model.body.parameters()) for model in (old, new)]
    assert counts == [20, 60], counts
    with torch.autocast("cpu", torch.bfloat16):
        x = images.bfloat16()
        kinds = [norm.eval()(x).dtype for norm in (FrozenBatchNorm2d(3), nn.BatchNorm2d(3))]
    assert kinds == [torch.float32, torch.bfloat16], kinds
    return (
        "torchvision: checkpoints load strictly from FrozenBatchNorm2d into freezekit's frozen BN, and back; "
        f"it leaves {counts[0]} parameters to unfreeze, freezekit {counts[1]}; under bf16 autocast it gives "
        "float32, BN bfloat16"
    )


def orphans() -> str:
    """Count the parameters of an optimizer whose layers timm replaces."""
    counts = []
    for freeze in (timm_before, timm_after):
        model = levit().eval()
        held = torch.optim.SGD(model.parameters(), lr=0.1).param_groups[0]["params"]
        freeze(model)
        there = set(map(id, model.parameters()))
        counts.append(sum(id(parameter) not in there for parameter in held))
    assert counts[0] > counts[1] == 0, counts
    return f"timm: {counts[0]} parameters that an optimizer had are in no layer any more; with freezekit none"


@click.command()
@click.option("--steps", default=5, show_default=True, type=click.IntRange(min=1), help="Steps of each way.")
@click.option("--only", type=click.Choice(PACKAGES), help="Measure what comes from this package.")
def main(steps: int, only: str | None) -> None:
    """Show what other ways of freezing leave open, and that freezekit's calls leave nothing of that."""
    warnings.simplefilter("ignore", FutureWarning)  # of what the packages import
    table = Table(title="a frozen backbone while its head trains")
    table.add_column("frozen by", no_wrap=True)
    for column in ("tensors moved", "keys missing", "output off"):
        table.add_column(column, justify="right")
    table.add_column("findings")
    packages = PACKAGES if only is None else [only]
    absent = {name for name in PACKAGES if importlib.util.find_spec(name) is None}
    if skipped := [name for name in packages if name in absent]:
        console.print("skipped, not installed:", ", ".join(skipped))
    cases = [c for c in CASES if c.needs[0] in packages and not absent.intersection(c.needs)]
    used = dict.fromkeys(name for case in cases for name in case.needs)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in used)
    images = digits()
    for case in track(cases, description="measuring", console=console, transient=True):
        old = measure(case, case.before, images, steps)
        new = measure(case, case.after, images, steps)
        for call, outcome in ((case.old, old), (case.new, new)):
            table.add_row(
                call,
                f"{outcome.moved} of {outcome.tensors}",
                str(outcome.missing),
                "0" if outcome.equal else f"{outcome.off:.0e}",
                ", ".join(outcome.codes) or "none",
                end_section=outcome is new,
            )
        # the recipe's own claim
        assert new.leaves == set(), (case.new, new)
        assert new.codes == [], (case.new, new)
        assert old.leaves == case.leaves, (case.old, old, f"not so with {versions}")
    console.print(table)
    if "torchvision" in used:
        console.print(interchange())
    if "timm" in used:
        console.print(orphans())
    console.print(f"measured with {versions}")


if __name__ == "__main__":
    main()
