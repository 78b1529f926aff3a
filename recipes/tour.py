"""Look inside BatchNorm: five articles about it, retold as seven stations that check what the articles say.

    python recipes/tour.py                          # the whole tour; plots go to a temporary folder
    python recipes/tour.py --station 7 --out plots  # one station
    python recipes/tour.py --steps 2                # just a look

Nothing is taken on trust: each station computes its claims, with torch's layers and with freezekit.nn's, and
asserts them. Stations 1 to 3 are in tour_batchnorm.py, 4 to 6 in tour_networks.py, and 7, to which they
lead, is here: how to freeze BN, and how not to.
Needs: pip install 'freezekit[recipes]'
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import matplotlib.pyplot as plt
import torch
import tour_batchnorm
import tour_networks
from torch import nn
from tour_batchnorm import console, corrections, save, say, show
from tour_networks import LeNet, split, train

import freezekit
from freezekit import DriftAuditor

ARTICLES = """\
  1  PyTorch BN: how it is computed, its source, and train against eval
  2  About Batch Normalization (blog.csdn.net/zz2230633069, 94588738)
  3  Notes on problems met when using BN
  4  Normalization layers and initialization (github.com/zhangxiann/PyTorch_Practice, lesson 6)
  5  How to lock a normalization layer correctly (blog.chenc.me, 2023-07-13)"""


def norms(model: nn.Module) -> list[nn.Module]:
    """Return the BN layers, found as articles 1 and 3 find them."""
    return [module for module in model.modules() if "BatchNorm" in type(module).__name__]


def bn_eval(model: nn.Module) -> None:
    for norm in norms(model):
        norm.eval()


def bn_set(model: nn.Module, name: str, value: object) -> None:
    for norm in norms(model):
        setattr(norm, name, value)


def no_grad(model: LeNet) -> None:
    model.features.requires_grad_(False)


def no_grad_but_bn(model: LeNet) -> None:
    no_grad(model)
    for norm in norms(model):
        norm.requires_grad_(True)


class Overridden(LeNet):
    """A model whose own train() puts its BN back into eval mode."""

    def train(self, mode: bool = True) -> Overridden:  # noqa: D102
        super().train(mode)
        if mode:
            bn_eval(self)
            bn_set(self, "track_running_stats", False)
        return self


@dataclass
class Way:
    """A way to freeze ``model.features``.

    Args:
        name: of the way.
        article: where it is from.
        risks: the codes that freezekit.check must give.
        findings: the codes that the auditor must give.
        once: what is done before training.
        after_train: what is done after each model.train().
        trained: what the optimizer gets.
        model: the class.
    """

    name: str
    article: str
    risks: str
    findings: str
    once: Callable[[LeNet], object] = lambda model: None
    after_train: Callable[[nn.Module], object] = lambda model: None
    trained: Callable[[LeNet], object] = lambda model: model.parameters()
    model: type[LeNet] = LeNet


def learning_rates(model: LeNet) -> list[dict[str, object]]:
    return [{"params": model.features.parameters(), "lr": 0.0}, {"params": model.head.parameters()}]


def untracked(model: LeNet) -> None:
    no_grad(model)
    bn_set(model, "track_running_stats", False)


def no_momentum(model: LeNet) -> None:
    no_grad(model)
    bn_set(model, "momentum", 0.0)


def not_affine(model: LeNet) -> None:
    no_grad_but_bn(model)
    bn_set(model, "affine", False)


def eval_once(model: LeNet) -> None:
    no_grad(model)
    bn_eval(model)


WAYS = [
    Way("requires_grad=False", "5", "FK301", "FK101 FK201", no_grad),
    Way("learning rate 0", "5", "FK301 FK311", "FK101 FK201", trained=learning_rates),
    Way("not in the optimizer", "-", "FK301", "FK101 FK201", trained=lambda model: model.head.parameters()),
    Way("no grad, bn.eval() once", "5", "FK301", "FK101 FK201", eval_once),
    Way("bn.eval() after each train()", "1, 3", "FK305 FK311", "FK103 FK203", no_grad_but_bn, bn_eval),
    Way("no grad, track_running_stats=False", "1", "FK304", "FK201", untracked),
    Way("no grad, momentum=0", "-", "FK301", "FK102 FK201", no_momentum),
    Way("affine=False", "-", "FK301 FK311", "FK101 FK103 FK201", not_affine),
    Way("no grad, bn.eval() after each train()", "3, 5", "FK305", "", no_grad, bn_eval),
    Way("no grad, train() overridden", "1", "", "", no_grad, model=Overridden),
    Way("freezekit.freeze_backbone(model)", "-", "", "", freezekit.freeze_backbone),
]


def ways_to_freeze(folder: Path, steps: int | None) -> None:
    say("""
        A LeNet with BN has learned the digits 0 to 4. Now a new head is to learn 5 to 9, on features that
        stay as they are. Each way of freezing them trains for itself, with model.train() in each step, as
        most loops and frameworks have it. Then: how many tensors of the features moved? Is the output for a
        digit the same with any batch-mates? Is it that of eval mode after model.train(), and after
        features.train()? How far is the output for the old digits from what it was, in eval mode and as the
        loop leaves the model?
    """)
    images, labels, test_images, test_labels = split()
    old, old_test = labels < 5, test_images[test_labels < 5]
    torch.manual_seed(0)
    base, new_head = LeNet(bn=True, classes=5), nn.Linear(84, 5)
    train(base, torch.optim.AdamW(base.parameters(), lr=3e-3), images[old], labels[old], steps or 88)
    start = {name: tensor.clone() for name, tensor in base.features.state_dict().items()}
    before = base.eval().features(old_test)
    batch, others = images[:8], torch.cat([images[:1], images[8:15]])

    measured, told, moves = [], [], []
    for way in WAYS:
        model = way.model(bn=True, classes=5)
        model.load_state_dict(base.state_dict())
        model.head.load_state_dict(new_head.state_dict())
        model.eval()
        way.once(model)

        in_eval, after_model, after_features = (copy.deepcopy(model) for _ in range(3))
        after_model.train()
        after_features.features.train()
        wanted = in_eval.features(batch)
        survives = [torch.equal(wanted, trial.features(batch)) for trial in (after_model, after_features)]

        optimizer = torch.optim.AdamW(way.trained(model), lr=3e-3)
        model.train()
        way.after_train(model)
        risks = freezekit.check(model, optimizer, frozen="features")
        probe = 1 if steps else 20
        with DriftAuditor(model, optimizer, "features", on_drift="record", probe=probe) as auditor:
            torch.manual_seed(1)
            train(model, optimizer, images[~old], labels[~old] - 5, steps or 60, 8, way.after_train)
        report = auditor.report()

        end = model.features.state_dict()
        moved = [name for name in start if not torch.equal(start[name], end[name])]
        model.train()
        way.after_train(model)
        alone = torch.equal(*(copy.deepcopy(model).features(x)[0] for x in (batch, others)))
        left = model.features(old_test)
        after = model.eval().features(old_test)
        moves.append([((output - before).norm() / before.norm()).item() for output in (after, left)])

        # freezekit, which was not told the way, finds what was measured without it
        assert set(report.changed) == {f"features.{name}" for name in moved}
        assert report.clean == (not moved and alone)
        codes = [" ".join(sorted({finding.code for finding in found})) for found in (risks, report.findings)]
        assert codes == [way.risks, way.findings], (way.name, codes)
        assert (moves[-1][0] == 0) == all("num_batches" in name for name in moved)
        assert (not moved and alone and all(survives)) == (way.once is freezekit.freeze_backbone)

        answers = ("yes" if answer else "no" for answer in (alone, *survives))
        measured.append(
            (way.name, f"{len(moved)} of {len(start)}", *answers, *(f"{move:.1%}" for move in moves[-1]))
        )
        causes = sorted({finding.cause.kind for finding in report.findings if finding.cause})
        told.append((way.name, way.article, *(code or "-" for code in codes), ", ".join(causes) or "-"))
    show(
        "Measured; the last two columns: how far the output moved",
        ("way", "moved", "any mates", "model.train()", "features.train()", "in eval", "as left"),
        measured,
    )
    show("What freezekit says of it", ("way", "article", "check", "DriftAuditor", "cause"), told)
    say("""
        "no grad" is requires_grad=False. Two ways work by hand, as long as each loop remembers the call, or
        nobody calls train() of a part. freezekit explain FK301 tells more of a code.
    """)

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharex=True, sharey=True)
    titles = ("in eval mode", "as the loop leaves the model")
    for axis, title, values in zip(axes, titles, zip(*moves, strict=True), strict=True):
        colors = ["tab:orange" if value else "tab:green" for value in values]
        bars = axis.barh([way.name for way in WAYS], [100 * value for value in values], color=colors)
        axis.bar_label(bars, [f"{value:.1%}" if value else "0" for value in values], padding=4)
        axis.set_title(title)
        axis.set_xlabel("percent")
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    figure.suptitle("How far the output of the frozen features moved")
    save(figure, folder, "7_ways_to_freeze.png")

    counts = [row[1].partition(" ")[0] for row in measured]
    assert counts == ["9", "9", "9", "9", "6", "0", "3", "15", "0", "0", "0"]
    assert moves[-1] == [0, 0]
    assert min(move[1] for move in moves[:4]) > 0.05
    renamed = type("MyNorm", (nn.BatchNorm2d,), {})
    assert norms(nn.Sequential(renamed(3))) == []
    corrections(
        (
            5,
            "with requires_grad=False or learning rate 0, bn.eval() is what is missing",
            "Until the next model.train(), which most loops call in each epoch: as many tensors move as "
            "without.",
        ),
        (
            1,
            "bn.eval() freezes the parameters of BN (in the answer below the article)",
            "Only its statistics: gamma and beta train on, here in all 3 layers.",
        ),
        (
            1,
            "track_running_stats=False keeps BN from taking part in gradient updates (same place)",
            "It has nothing to do with gradients. No tensor moves, and in train mode the batch normalises.",
        ),
        (
            3,
            "set to eval what has 'BatchNorm' in the name of its class, after model.train()",
            "Right for the statistics, in each epoch. A subclass with another name is missed.",
        ),
    )


STATIONS = [
    tour_batchnorm.what_bn_computes,
    tour_batchnorm.train_against_eval,
    tour_batchnorm.running_statistics,
    tour_networks.side_by_side,
    tour_networks.a_hundred_layers,
    tour_networks.lenet,
    ways_to_freeze,
]


@click.command()
@click.option("--station", type=click.IntRange(1, len(STATIONS)), help="Visit this one only.")
@click.option("--steps", type=click.IntRange(min=2), help="Where a station trains, for so many steps only.")
@click.option("--out", type=click.Path(file_okay=False), help="Folder for plots.  [default: a temporary one]")
def main(station: int | None, steps: int | None, out: str | None) -> None:
    """Seven stations through BatchNorm, each with its numbers and a plot."""
    folder = Path(out or tempfile.mkdtemp(prefix="freezekit-tour-"))
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the networks are small: several threads would mostly wait for each other
    console.print(f"The articles, all in Chinese:\n{ARTICLES}", soft_wrap=True)
    for number, visit in enumerate(STATIONS, 1):
        if station in (None, number):
            title = visit.__name__.replace("_", " ").replace("bn", "BN")
            console.print()
            console.rule(f"Station {number}: {title}", align="left")
            visit(folder, steps)
    console.print(f"\nplots: {folder}", soft_wrap=True)


if __name__ == "__main__":
    main()
