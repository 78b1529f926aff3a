"""Stations 1 to 3 of the tour: BatchNorm alone. Run them with tour.py."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws files, needs no screen

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import freezekit.nn

console = Console(highlight=False)
console.width = max(console.width, 120)  # so that no table breaks
LIBRARIES = {"torch.nn": nn, "freezekit.nn": freezekit.nn}


def say(text: str) -> None:
    console.print("\n" + textwrap.dedent(text).strip(), markup=False)


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    table = Table(*columns, title=f"\n{title}", title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table, markup=False)


def corrections(*rows: tuple[int, str, str]) -> None:
    """Show what an article says beside what was measured. Every row was asserted before."""
    table = Table("article", "says", "measured", title="\nWhere the articles slip", title_justify="left")
    for article, says, measured in rows:
        table.add_row(str(article), says, measured, end_section=True)
    console.print(table, markup=False)


def save(figure: Figure, folder: Path, name: str) -> None:
    figure.savefig(folder / name, dpi=120)
    plt.close(figure)
    console.print(f"plot: {name}")


def numbers(values: Tensor, digits: int = 4) -> str:
    return "  ".join(f"{value:.{digits}f}" for value in values.flatten().tolist())


def close(a: Tensor, b: Tensor | list[float], tolerance: float = 1e-6) -> bool:
    return torch.allclose(a, torch.as_tensor(b).to(a), rtol=0, atol=tolerance)


def digits() -> tuple[Tensor, Tensor]:
    """1,797 real handwritten digits, (N, 1, 8, 8) in 0..1."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def what_bn_computes(folder: Path, steps: int | None) -> None:
    say("""
        Article 1 sends two samples through a linear layer and a BN layer of three features. BN works on one
        feature (column) at a time: subtract its mean over the batch, divide by its standard deviation, then
        multiply by gamma and add beta, which are 1 and 0 in a new layer.
    """)
    samples = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    weight = torch.tensor([[0.0193, 0.3252, -0.3773], [0.3813, 0.2321, 0.5265], [-0.3829, -0.1440, 0.1517]])
    bias = torch.tensor([-0.2935, 0.5100, -0.0860])
    # As the article prints it, from weights with more digits than the four it shows.
    x = torch.tensor([[-0.7556, 2.9349, -0.3017], [-0.8537, 6.3545, -1.4271]])
    assert close(samples @ weight.T + bias, x, 1e-3)

    mean = x.mean(0)
    centred = x - mean
    var = centred.square().mean(0)  # biased: divided by n, not by n - 1
    y = centred / torch.sqrt(var + 1e-5)
    layers = {name: library.BatchNorm1d(3)(x).detach() for name, library in LIBRARIES.items()}
    show(
        "Article 1's numbers, step by step",
        ("", "feature 1", "feature 2", "feature 3"),
        [
            (name, *(f"{value:.4g}" for value in row.tolist()))
            for name, row in {
                "x, sample 1": x[0],
                "x, sample 2": x[1],
                "mean": mean,
                "variance, biased": var,
                "y, sample 1": y[0],
                "y, sample 2": y[1],
                **{f"{name}, sample 1": output[0] for name, output in layers.items()},
            }.items()
        ],
    )
    assert close(mean, [-0.8046, 4.6447, -0.8644], 1e-4)
    assert close(var, [2.4059e-03, 2.9234, 3.1663e-01], 1e-4)
    assert close(y, torch.tensor([[0.9979, -1, 1], [-0.9979, 1, -1]]), 1e-4)
    assert all(close(output, y) for output in layers.values())

    say("""
        A batch of two always comes out as +1 and -1, whatever went in: of two numbers BN keeps only which is
        larger. It is 0.9979 where the variance is so small that eps = 1e-5 counts. Small batches lose a lot.
    """)
    pairs = torch.tensor([[1.0, 7, -300], [2, 1000, -400]])
    assert close(nn.BatchNorm1d(3)(pairs).abs(), torch.ones(2, 3), 1e-4)

    constant = torch.full((4, 1), 5.0)
    assert torch.isnan((constant - constant.mean()) / constant.std(correction=0)).all()
    assert all(
        close(library.BatchNorm1d(1)(constant), torch.zeros(4, 1), 1e-4) for library in LIBRARIES.values()
    )

    say("""
        On images the statistics of a channel are over the samples, the height and the width. Here the input
        is all 1,797 digits of scikit-learn, one channel.
    """)
    images, _ = digits()
    var = images.var((0, 2, 3), correction=0)
    per_pixel = images.var(0, correction=0).mean()
    outputs = {name: library.BatchNorm2d(1)(images).detach() for name, library in LIBRARIES.items()}
    by_hand = (images - images.mean()) / torch.sqrt(var + 1e-5)
    assert all(close(output, by_hand, 1e-5) for output in outputs.values())
    assert per_pixel < 0.6 * var
    y = by_hand.flatten()
    skew = [((v - v.mean()) / v.std()).pow(3).mean().item() for v in (images.flatten(), y)]
    low = (y < 0).float().mean().item()
    assert abs(y.mean()) < 1e-4
    assert abs(y.std() - 1) < 1e-3
    assert abs(skew[0] - skew[1]) < 1e-2
    assert skew[1] > 0.5

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, values, name, color in (
        (axes[0], images.flatten(), "before BN", "tab:gray"),
        (axes[1], y, "after BN", "tab:blue"),
    ):
        axis.hist(values.numpy(), bins=17, density=True, color=color, edgecolor="white")
        axis.set_title(f"{name}: mean {abs(values.mean()):.2f}, std {values.std():.2f}, skew {skew[0]:.2f}")
        axis.set_xlabel("pixel")
    normal = torch.linspace(-3, 3, 200)
    axes[1].plot(
        normal, torch.exp(-normal.square() / 2) / 2.5066, color="tab:red", label="normal distribution"
    )
    axes[1].legend()
    axes[0].set_ylabel("density")
    figure.suptitle("BN shifts and scales the pixels of the digits; the shape stays")
    save(figure, folder, "1_what_bn_computes.png")

    corrections(
        (
            4,
            "what comes out has a normal distribution",
            f"Mean 0 and variance 1, no more. The digits keep their skew of {skew[1]:.2f} (normal: 0) and "
            f"{low:.0%} of the pixels below the mean.",
        ),
        (
            1,
            "BatchNorm2d averages over N first, then over the pixels, and the variance likewise",
            f"Right for the mean. Variance per pixel, then averaged, gives {per_pixel:.4f}; BN uses "
            f"{var.item():.4f}, which has the differences between pixels in it.",
        ),
        (
            3,
            "gamma and beta are there for numerical stability",
            "That is eps: a constant feature gives 0/0 = nan without it and 0 with it. Gamma and beta give "
            "the layer its freedom back, as the article goes on to say.",
        ),
    )


def train_against_eval(folder: Path, steps: int | None) -> None:
    say("""
        In train mode BN normalises by the batch, and on the way moves its running statistics a tenth
        (momentum) towards the batch's. In eval mode it normalises by the running statistics. Article 1 runs
        one batch in train mode, then the same batch in eval mode.
    """)
    x = torch.tensor([[-1.5318, -2.0604, 0.2636], [-1.5732, -4.3626, -0.4648]])
    rows = []
    for name, library in LIBRARIES.items():
        layer = library.BatchNorm1d(3)
        trained = layer(x).detach()
        evaluated = layer.eval()(x).detach()
        assert close(layer.running_mean, [-0.1553, -0.3212, -0.0101], 1e-4)
        assert close(layer.running_var, [0.9001, 1.1650, 0.9265], 1e-4)
        assert close(evaluated, torch.tensor([[-1.4509, -1.6113, 0.2843], [-1.4945, -3.7443, -0.4724]]), 2e-4)
        rows += [
            (name, "train, sample 1", numbers(trained[0])),
            ("", "running_mean then", numbers(layer.running_mean)),
            ("", "running_var then", numbers(layer.running_var)),
            ("", "eval, sample 1", numbers(evaluated[0])),
        ]
    show("Article 1's second run", ("layer", "", "features 1 to 3"), rows)

    say("""
        So in train mode a sample's output depends on who else is in the batch. One digit, 40 times among
        other digits: the larger the batch, the less its batch-mates matter. In eval mode they do not at all.
    """)
    torch.manual_seed(0)
    images, _ = digits()
    layer = nn.BatchNorm2d(1, momentum=None)
    layer(images)
    sizes, spread, outputs, evaluated = (2, 4, 8, 16, 32, 64), {}, {}, set()
    for size in sizes:
        batches = [torch.cat([images[:1], images[torch.randperm(1796)[: size - 1] + 1]]) for _ in range(40)]
        outputs[size] = [nn.BatchNorm2d(1)(batch)[0, 0, 1, 3].item() for batch in batches]
        spread[size] = torch.tensor(outputs[size]).std().item()
        evaluated |= {layer.eval()(batch)[0, 0, 1, 3].item() for batch in batches}
    show(
        "One pixel of one digit, standard deviation of the output over 40 batches",
        ("mode", *(f"batch of {size}" for size in sizes)),
        [("train", *(f"{spread[size]:.3f}" for size in sizes)), ("eval", *["0"] * len(sizes))],
    )
    assert len(evaluated) == 1
    assert spread[2] > 2 * spread[64] > 0

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for size in sizes:
        label = "train" if size == 2 else None
        axis.scatter([size] * 40, outputs[size], s=16, alpha=0.5, color="tab:orange", label=label)
    axis.axhline(min(evaluated), color="tab:blue", label="eval")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, map(str, sizes))
    axis.set_xlabel("batch size")
    axis.set_ylabel("output")
    axis.set_title("The same pixel of the same digit among 40 different sets of batch-mates")
    axis.legend()
    save(figure, folder, "2_train_against_eval.png")

    say("A batch of one is its own mean. Vectors are refused in train mode; images become instance norm:")
    for library in LIBRARIES.values():
        said = ""
        try:
            library.BatchNorm1d(3)(torch.ones(1, 3))
        except ValueError as error:
            said = str(error)
        assert "more than 1 value per channel" in said
        assert close(library.BatchNorm2d(1)(images[:1]), library.InstanceNorm2d(1)(images[:1]), 1e-5)
        assert library.BatchNorm1d(3).eval()(torch.ones(1, 3)).shape == (1, 3)
    show(
        "Batch size 1",
        ("input", "train", "eval"),
        [
            ("BatchNorm1d, (1, 3)", f"ValueError: {said}", "fine"),
            ("BatchNorm2d, (1, 1, 8, 8)", "equals InstanceNorm2d", "fine"),
        ],
    )

    for library in LIBRARIES.values():
        layer = library.BatchNorm2d(1)
        before = layer(images[:32])
        layer.running_mean.fill_(1000.0)
        assert torch.equal(before, layer(images[:32]))
        assert "running_mean" not in dict(layer.named_parameters())
    other = {
        "RReLU": nn.RReLU(),
        "InstanceNorm2d(track_running_stats=True)": nn.InstanceNorm2d(1, track_running_stats=True),
    }
    changed = [name for name, m in other.items() if not torch.equal(m.train()(-images), m.eval()(-images))]
    assert changed == list(other)
    corrections(
        (
            5,
            "E and Var come from a learnable parameter, smoothed over the batches, also in training",
            "In train mode from the batch alone: with running_mean set to 1000 the output has the same bits. "
            "The running statistics are buffers, not parameters: no gradient, no optimizer.",
        ),
        (
            4,
            "in training, mean and variance are exponentially weighted over the batches; they are fixed",
            "The running ones are, and only eval mode uses them. One 'training' must be meant as 'testing'.",
        ),
        (
            1,
            "train and eval mode differ only with dropout or batch norm in the model",
            f"Nearly: {' and '.join(changed)} differ too.",
        ),
    )


def running_statistics(folder: Path, steps: int | None) -> None:
    say("""
        running = (1 - momentum) * running + momentum * batch: momentum is the weight of the new batch, the
        other way round than in an optimizer. Article 4 shows it with features that are constant, 1 to 5, and
        momentum 0.3: feature 2 goes 0, 0.6, 1.02, and every variance 1, 0.7, 0.49.
    """)
    constant = torch.arange(1.0, 6).expand(3, 5).unsqueeze(2)
    rows = []
    for name, library in LIBRARIES.items():
        layer = library.BatchNorm1d(5, momentum=0.3)
        for batch, factor, var in ((1, 0.3, 0.7), (2, 0.51, 0.49)):
            layer(constant)
            assert close(layer.running_mean, factor * torch.arange(1.0, 6))
            assert close(layer.running_var, [var] * 5)
            assert layer.num_batches_tracked == batch
            rows.append(
                (
                    name if batch == 1 else "",
                    batch,
                    numbers(layer.running_mean, 2),
                    numbers(layer.running_var, 2),
                )
            )
    show("Article 4's worked example", ("layer", "num_batches_tracked", "running_mean", "running_var"), rows)

    say("""
        momentum=None is the plain average over all batches so far: the weight of the new batch is
        1 / num_batches_tracked. Article 1 feeds ten random batches to both kinds and computes along by hand:
    """)
    torch.manual_seed(0)
    batches = torch.randn(10, 8, 3, 20, 20)
    n = 8 * 20 * 20
    means, variances = batches.mean((1, 3, 4)), batches.var((1, 3, 4), correction=0)
    rows = []
    for momentum in (0.1, None):
        mean, var = torch.zeros(3), torch.ones(3)
        for t in range(10):
            factor = 1 / (t + 1) if momentum is None else momentum
            mean = (1 - factor) * mean + factor * means[t]
            var = (1 - factor) * var + factor * variances[t] * n / (n - 1)
        rows.append((momentum, "by hand", numbers(mean), numbers(var)))
        for name, library in LIBRARIES.items():
            layer = library.BatchNorm2d(3, momentum=momentum)
            for batch in batches:
                layer(batch)
            assert close(layer.running_mean, mean)
            assert close(layer.running_var, var)
            rows.append(("", name, numbers(layer.running_mean), numbers(layer.running_var)))
    assert close(mean, means.mean(0))
    show("Ten batches", ("momentum", "", "running_mean", "running_var"), rows)

    say("""
        Two variances are in play. The biased one (divided by n) normalises. The unbiased one (divided by
        n - 1) goes into running_var. Article 1's numbers of station 2 tell, since two samples make it twice
        as large:
    """)
    x = torch.tensor([-2.0604, -4.3626])
    biased, unbiased = x.var(correction=0).item(), x.var().item()
    moved = [0.9 + 0.1 * biased, 0.9 + 0.1 * unbiased]
    out = [((x[0] - x.mean()) / (var + 1e-5) ** 0.5).item() for var in (biased, unbiased)]
    layer = nn.BatchNorm1d(1)
    y = layer(x.unsqueeze(1))[0].item()
    show(
        "Which variance is where (article 1, feature 2)",
        ("", "with biased", "with unbiased", "torch"),
        [
            ("output, sample 1", *(f"{v:.4f}" for v in (*out, y))),
            ("running_var", *(f"{v:.4f}" for v in (*moved, layer.running_var.item()))),
        ],
    )
    assert abs(out[0] - y) < 1e-4 < abs(out[1] - y)
    assert abs(moved[1] - 1.1650) < 1e-4 < abs(moved[0] - 1.1650)

    images, _ = digits()
    for library in LIBRARIES.values():
        layer = library.BatchNorm2d(1)
        layer(images)
        before = layer.eval()(images)
        assert layer.num_batches_tracked == 1
        # set on a layer that has statistics: eval mode still uses them, train mode leaves them alone
        layer.track_running_stats = False
        statistics = layer.running_mean.clone()
        assert torch.equal(before, layer(images))
        assert not torch.equal(before, layer.train()(images))
        assert torch.equal(statistics, layer.running_mean)
        # a layer made with it has none, and needs the batch in eval mode too
        layer = library.BatchNorm2d(1, affine=False, track_running_stats=False)
        assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
        assert layer.weight is layer.bias is None
        assert not torch.equal(layer.eval()(images[:8])[0], layer(images[:16])[0])
        assert library.BatchNorm3d(3)(torch.ones(3, 3, 2, 2, 3)).shape == (3, 3, 2, 2, 3)

    total = steps or 60
    truth = images.mean().item()
    torch.manual_seed(0)
    rows = [torch.randperm(len(images))[:16] for _ in range(total)]
    last = {}
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for momentum in (0.01, 0.1, 0.5, None):
        layer, course = freezekit.nn.BatchNorm2d(1, momentum=momentum), [0.0]
        for batch in rows:
            layer(images[batch])
            course.append(layer.running_mean.item())
        last[momentum] = abs(course[-1] - truth)
        axis.plot(course, label=f"momentum={momentum}", marker="." if total < 10 else None)
    axis.axhline(truth, color="black", linestyle=":", label="mean of all digits")
    axis.set_xlabel("batches of 16 digits")
    axis.set_ylabel("running_mean")
    axis.set_title("A small momentum is slow, a large one restless, None is the average")
    axis.legend(loc="lower right")
    save(figure, folder, "3_running_statistics.png")
    assert last[None] < last[0.01]
    if steps is None:
        assert last[None] < 0.01 < last[0.01]

    corrections(
        (
            2,
            "Bessel's correction (n - 1) is not used in BN",
            "Not for the output, but for running_var: see the table.",
        ),
        (
            3,
            "the variance is the unbiased one, as in the paper",
            "Only for running_var: the output would be 0.7071.",
        ),
        (
            4,
            "track_running_stats=True is for training, False for testing, with mean and variance fixed",
            "False fixes nothing: there are no running statistics, and the batch normalises in eval mode "
            "too. Train or eval is model.train() or model.eval().",
        ),
        (
            1,
            "BN normalises by the batch if training or not track_running_stats (its source is of torch 1.x)",
            "Today what counts in eval mode is whether there are buffers. With track_running_stats set to "
            "False later, they stay, and eval mode uses them; train mode leaves them alone and normalises "
            "by the batch.",
        ),
        (
            1,
            "num_batches_tracked counts the forward passes",
            "Those in train mode: it is 1 after one in each mode.",
        ),
        (1, "with affine=False, weight and bias are not updated", "There are none: both are None."),
        (4, "the input of BatchNorm3d is (3, 2, 2, 2, 3)", "Its code makes (3, 3, 2, 2, 3): three channels."),
    )
