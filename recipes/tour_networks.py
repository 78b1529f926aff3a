"""Stations 4 to 6 of the tour: BN beside the other norm layers, and in networks. Run them with tour.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.lines import Line2D
from torch import Tensor, nn
from tour_batchnorm import LIBRARIES, close, corrections, digits, save, say, show

import freezekit.nn


def side_by_side(folder: Path, steps: int | None) -> None:
    say("""
        All four subtract a mean and divide by a standard deviation; they differ in what these are over. Here
        that is measured: an output depends on an input if the gradient between them is not zero.
    """)
    torch.manual_seed(0)
    n, c, h = 4, 6, 3
    x = torch.randn(n, c, h, h)
    kinds = {
        "BN, train": lambda library: library.BatchNorm2d(c),
        "BN, eval": lambda library: library.BatchNorm2d(c).eval(),
        "LN over (C, H, W)": lambda library: library.LayerNorm([c, h, h]),
        "IN": lambda library: library.InstanceNorm2d(c, affine=True),
        "GN, 2 groups": lambda library: library.GroupNorm(2, c),
    }
    rows, maps = [], {}
    for name, make in kinds.items():
        layer, own = make(nn), make(freezekit.nn)
        assert close(layer(x), own(x), 1e-5)
        jacobian = torch.autograd.functional.jacobian(lambda v, f=own: f(v)[:, :, 0, 0], x)
        # (n, c, n', c'): whether the first pixel of channel c of sample n depends on channel c' of sample n'
        reach = jacobian.abs().sum((4, 5)) > 1e-6
        # cells that depend on the same inputs get the same number
        seen: list[list[bool]] = []
        maps[name] = torch.zeros(n, c, dtype=torch.int)
        for i, k in itertools.product(range(n), range(c)):
            inputs = reach[i, k].flatten().tolist()
            if inputs not in seen:
                seen.append(inputs)
            maps[name][i, k] = seen.index(inputs)
        mates = any(reach[i, :, k].any() for i, k in itertools.permutations(range(n), 2))
        statistics = getattr(own, "running_mean", None) is not None
        modes_differ = not torch.equal(own.train()(x), own.eval()(x))
        answers = ("yes" if answer else "no" for answer in (statistics, mates, modes_differ))
        rows.append((name, "-" if "eval" in name else len(seen), tuple(own.weight.shape), *answers))
    show(
        f"On an input of ({n}, {c}, {h}, {h})",
        ("layer", "means", "shape of gamma", "running stats", "needs batch-mates", "train differs from eval"),
        rows,
    )
    assert [row[1] for row in rows] == [c, "-", n, n * c, n * 2]
    assert [row[3:] for row in rows] == [("yes", "yes", "yes"), ("yes", "no", "yes"), *[("no",) * 3] * 3]

    figure, axes = plt.subplots(1, 5, figsize=(14, 3), layout="constrained")
    for axis, (name, cells) in zip(axes, maps.items(), strict=True):
        if "eval" in name:
            axis.imshow(torch.zeros(n, c).numpy(), cmap="Pastel2", alpha=0.4)
            axis.text(2.5, 1.5, "each channel by\nits running statistics", ha="center", va="center")
        else:
            axis.imshow(cells.numpy(), cmap="rainbow", alpha=0.5)
            for i, k in itertools.product(range(n), range(c)):
                axis.text(k, i, int(cells[i, k]) + 1, ha="center", va="center")
        axis.set_title(name)
        axis.set_xlabel("channel")
        axis.set_xticks(range(c))
        axis.set_yticks(range(n))
    axes[0].set_ylabel("sample")
    figure.suptitle("Cells with the same number share a mean and a variance")
    save(figure, folder, "4_side_by_side.png")

    say("The four are one family. One group is LN over (C, H, W), as many groups as channels is IN:")
    for library in LIBRARIES.values():
        assert close(library.GroupNorm(1, c)(x), library.LayerNorm([c, h, h])(x), 1e-5)
        assert close(library.GroupNorm(c, c)(x), library.InstanceNorm2d(c)(x), 1e-5)
        # Article 4's examples: channels that are constant, 1, 2, ...
        ramp = torch.arange(1.0, 5).view(1, 4, 1, 1).expand(2, 4, 2, 2)
        assert close(library.GroupNorm(2, 4)(ramp)[0, :, 0, 0], [-1, 1, -1, 1], 1e-4)
        assert close(
            library.LayerNorm([2, 3, 4])(ramp[:1, :2, :1, :1].expand(8, 2, 3, 4))[0, :, 0, 0], [-1, 1], 1e-4
        )
        assert close(library.InstanceNorm2d(4)(ramp), torch.zeros(2, 4, 2, 2), 1e-4)
        refused = False
        try:
            library.GroupNorm(3, 4)
        except ValueError:
            refused = True
        assert refused
        tracking = library.InstanceNorm2d(c, track_running_stats=True)
        tracking(x)
        assert not torch.equal(tracking.running_mean, torch.zeros(c))
    show(
        "Article 4's examples, with constant channels 1, 2, ...",
        ("layer", "first sample, one value a channel"),
        [("GN, 2 groups of 4", "-1  1  -1  1"), ("LN over (2, 3, 4)", "-1  1"), ("IN", "0  0  0  0")],
    )
    corrections(
        (
            4,
            "the gamma and beta of LN are per sample",
            "One a position, shared by all samples: (6, 3, 3) above.",
        ),
        (
            4,
            "GN takes a mean of each feature of each sample; num_channels must divide num_groups",
            "Of each group of each sample; and the groups must divide the channels: GroupNorm(3, 4) is "
            "refused.",
        ),
        (
            4,
            "IN: track_running_stats=True is for training",
            "It gives IN running statistics, which eval mode uses; by default it has none. Such an IN needs "
            "freezing as much as BN does.",
        ),
    )


def spreads(init: str, bn: bool, seed: int) -> tuple[list[float], list[float]]:
    """Return the spread after each layer of article 4's MLP, and the norm of each layer's gradient."""
    torch.manual_seed(seed)
    x, layers, stds = torch.randn(16, 256), [nn.Linear(256, 256, bias=False) for _ in range(100)], []
    for layer in layers:
        if init == "std 1":
            nn.init.normal_(layer.weight, std=1)
        if init == "Kaiming":
            nn.init.kaiming_normal_(layer.weight)
        x = layer(x)
        x = torch.relu(freezekit.nn.BatchNorm1d(256)(x) if bn else x)
        stds.append(x.std().item())
    gradients = torch.autograd.grad((x * torch.randn_like(x)).sum(), [layer.weight for layer in layers])
    return stds, [gradient.norm().item() for gradient in gradients]


def a_hundred_layers(folder: Path, steps: int | None) -> None:
    say("""
        Article 4 stacks 100 layers, Linear(256, 256) and ReLU, and looks at the spread of the activations.
        Each layer multiplies it by a factor, and a factor to the power of 100 is nearly always 0 or infinity:
        unless the weights have the one right size (Kaiming), or BN sets the spread anew in each layer.
    """)
    inits = ("torch's default", "std 1", "Kaiming")
    runs = {(init, bn): spreads(init, bn, seed=1) for bn in (False, True) for init in inits}
    rows = []
    for (init, bn), (stds, gradients) in runs.items():
        at = (f"{stds[layer - 1]:.2g}" for layer in (1, 10, 30, 100))
        ratio = f"{gradients[0] / gradients[-1]:.2g}" if gradients[-1] > 0 else "-"
        rows.append(("with BN" if bn else "no BN", init, *at, ratio))
    show(
        "Standard deviation of the activations, and gradient of layer 1 over that of layer 100",
        ("", "weights", *(f"layer {layer}" for layer in (1, 10, 30, 100)), "gradient 1 / 100"),
        rows,
    )

    seeds = {seed: spreads("Kaiming", False, seed)[0] for seed in range(2 if steps else 6)}
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for (init, bn), (stds, gradients) in runs.items():
        for axis, values in zip(axes[[0, 2]], (stds, gradients), strict=True):
            drawn = [value if 0 < value < math.inf else math.nan for value in values]
            axis.semilogy(range(1, 101), drawn, "-" if bn else "--", color=f"C{inits.index(init)}")
    for stds in seeds.values():
        axes[1].plot(range(1, 101), stds, "--", color="C2", alpha=0.7)
    axes[1].plot(range(1, 101), runs["Kaiming", True][0], color="C2")
    axes[0].set_title("Activations: BN holds the spread")
    axes[0].set_ylabel("standard deviation")
    axes[1].set_title(f"The same, Kaiming only, {len(seeds)} seeds without BN")
    axes[1].set_ylim(0)
    axes[2].set_title("Gradients: with BN they explode on the way back")
    axes[2].set_ylabel("norm of the weight's gradient")
    lines = [Line2D([], [], color=f"C{i}", linewidth=4) for i in range(3)]
    lines += [Line2D([], [], color="black", linestyle=style) for style in ("--", "-")]
    figure.legend(lines, [*inits, "no BN", "with BN"], loc="outside lower center", ncols=5)
    for axis in axes:
        axis.set_xlabel("layer")
    save(figure, folder, "5_a_hundred_layers.png")

    assert runs["torch's default", False][0][-1] < 1e-38  # below what float32 holds in full
    lost = next(i for i, std in enumerate(runs["std 1", False][0], 1) if not math.isfinite(std))
    assert lost < 50
    with_bn = [std for init in inits for std in runs[init, True][0]]
    low, high = min(with_bn), max(with_bn)
    assert 0.5 < low < high < 0.65
    expected = math.sqrt(0.5 - 0.5 / math.pi)  # of a normal distribution after ReLU
    assert low < expected < high
    least, most = min(map(min, seeds.values())), max(map(max, seeds.values()))
    assert least < 0.6
    assert most > 0.9
    growth = min(runs[init, True][1][0] / runs[init, True][1][-1] for init in inits)
    assert growth > 1e6
    say(f"""
        With BN the spread is {low:.3f} to {high:.3f} in every layer, for all three weights; a normal
        distribution after ReLU has {expected:.3f}. Without BN, weights of std 1 overflow at layer {lost}.
    """)
    corrections(
        (
            4,
            "with Kaiming weights the spread stays in 0.6 to 0.9",
            f"For one seed. Over {len(seeds)} seeds it wanders from {least:.2f} to {most:.2f}: the weights "
            "have the right size, but nothing pulls the spread back.",
        ),
        (4, "with BN it stays in 0.58 to 0.59", f"Nearly: {low:.3f} to {high:.3f}, with a batch of 16."),
        (
            1,
            "BN avoids exploding gradients",
            f"It holds the activations. In these 100 layers it makes the gradient grow {growth:.0e} times or "
            "more on its way back (why: Yang et al. 2019, arXiv:1902.08129).",
        ),
    )


class LeNet(nn.Module):
    """Article 4's LeNet, for one colour channel; BN after both convolutions and the first linear layer."""

    def __init__(self, bn: bool, classes: int = 10) -> None:
        super().__init__()
        bn1d, bn2d = (nn.BatchNorm1d, nn.BatchNorm2d) if bn else (nn.Identity, nn.Identity)
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 6, 5), bn2d(6), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), bn2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(16 * 5 * 5, 120), bn1d(120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        )
        self.head = nn.Linear(84, classes)
        for module in self.modules():
            if not bn and isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.head(self.features(x))


def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and test digits, 32 pixels wide as LeNet wants them."""
    images, labels = digits()
    images = F.interpolate(images, size=32, mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return images[train], labels[train], images[test], labels[test]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    steps: int,
    size: int = 32,
    after_train: Callable[[nn.Module], object] = lambda model: None,
) -> list[float]:
    """Train as always, with model.train() in every step; return the losses."""
    losses: list[float] = []
    while len(losses) < steps:
        rows = torch.randperm(len(images))[:size]
        model.train()
        after_train(model)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def lenet(folder: Path, steps: int | None) -> None:
    say("""
        Article 4 trains a LeNet on banknotes, without BN from Kaiming weights, and with BN from torch's
        default ones. Here it learns the digits, at three learning rates: what BN is good for shows at rates
        that the other one does not stand.
    """)
    images, labels, test_images, test_labels = split()
    total = steps or 160
    rows, found = [], {}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", sharey=True)
    for axis, rate in zip(axes, (0.01, 0.1, 0.3), strict=True):
        for bn in (False, True):
            torch.manual_seed(0)
            model = LeNet(bn)
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
            losses = train(model, optimizer, images, labels, total)
            late = losses[total // 4 :]
            hits = found[rate, bn] = accuracy(model, test_images, test_labels)
            name = "with BN" if bn else "no BN, Kaiming"
            last = sum(losses[-20:]) / len(losses[-20:])
            rows.append((rate, name, f"{last:.3f}", f"{max(late):.2f}", f"{hits:.3f}"))
            axis.plot(losses, ".-" if steps else "-", label=f"{name}: {hits:.0%} of test digits", alpha=0.85)
        axis.set_title(f"learning rate {rate}")
        axis.set_xlabel("step")
        axis.legend(loc="upper right")
    axes[0].set_ylabel("training loss")
    axes[0].set_ylim(0, 5)
    figure.suptitle("LeNet on handwritten digits")
    save(figure, folder, "6_lenet.png")
    show(
        f"LeNet on 1,437 digits, {total} steps of 32",
        ("learning rate", "", "loss, last 20 steps", f"highest after step {total // 4}", "test accuracy"),
        rows,
    )
    if steps is None:
        assert min(found[0.01, True], found[0.1, True]) > 0.95
        assert found[0.1, False] < 0.9
        assert found[0.3, False] < 0.3 < 0.6 < found[0.3, True]
        corrections(
            (
                4,
                "with BN the training is very stable",
                f"It stands higher rates than without. At 0.3 its loss still jumps, to {rows[-1][3]}.",
            ),
        )
