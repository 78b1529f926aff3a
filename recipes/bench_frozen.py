"""How fast the frozen kernels are: ratios of medians, forward and backward, the candidates taking turns.

    python recipes/bench_frozen.py --steps 50      # the layer alone, then a ResNet-50

Others on the machine move the times, and less so the ratios; ``--threads 1`` makes both steadier.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable

import torch
import torchvision
from torch import Tensor, nn

import freezekit

SHAPES = [(16, 64, 56, 56), (16, 256, 28, 28), (16, 2048, 7, 7), (32, 512)]


def ratios(runs: dict[str, Callable[[], object]], steps: int) -> dict[str, float]:
    """Median times of the candidates, divided by the first's."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(steps + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if step:  # the first is for warming up
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    first = next(iter(medians.values()))
    return {name: median / first for name, median in medians.items()}


def row(label: str, values: Iterable[float]) -> None:
    print(label.ljust(34), *(f"{value:8.2f}" for value in values))


def scrambled(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_()
    return norm


def layers(steps: int) -> None:
    print("\none layer: BN in eval, torchvision's FrozenBatchNorm2d, exact, affine")
    logs: list[list[float]] = []
    for shape in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last)[: 1 + (len(shape) == 4)]:
            flat = len(shape) == 2
            live = scrambled(nn.BatchNorm1d(shape[1]) if flat else nn.BatchNorm2d(shape[1])).eval()
            live.requires_grad_(False)
            candidates: dict[str, nn.Module] = {"eval": live}
            if not flat:
                candidates["torchvision"] = torchvision.ops.FrozenBatchNorm2d(shape[1])
                candidates["torchvision"].load_state_dict(live.state_dict())
            for convert in (None, "affine"):
                holder = nn.Sequential(copy.deepcopy(live))
                freezekit.freeze(holder, "0", convert=convert)
                candidates[convert or "exact"] = holder[0]
            x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
            grad = torch.randn(shape).contiguous(memory_format=layout)

            def run(layer: nn.Module, x: Tensor = x, grad: Tensor = grad) -> None:
                x.grad = None
                layer(x).backward(grad)

            found = ratios(
                {k: lambda m=m: run(m) for k, m in candidates.items()}, steps * (20 if flat else 1)
            )
            values = [found["eval"], found.get("torchvision", math.nan), found["exact"], found["affine"]]
            row(f"{shape} {'channels last' if layout is torch.channels_last else ''}", values)
            logs.append([math.log(value) for value in values])
    means = []
    for column in zip(*logs, strict=True):
        known = [value for value in column if not math.isnan(value)]
        means.append(math.exp(sum(known) / len(known)))
    row("geometric mean", means)


def without_bn(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(0.5)  # so that nothing overflows, which would be slow
    return model


def resnet50(steps: int, batch: int) -> None:
    print(f"\nResNet-50, a batch of {batch}: BN in eval, exact, affine, fold, no BN at all")
    base = torchvision.models.resnet50(num_classes=10)
    for module in base.modules():
        if isinstance(module, nn.BatchNorm2d):
            scrambled(module)
    images = torch.randn(batch, 3, 224, 224)
    for what in ("head only", "all but BN trains"):
        models = {name: copy.deepcopy(base) for name in ("eval", "exact", "affine", "fold")}
        models["none"] = without_bn(base)
        for name, model in models.items():
            frozen = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
            if name in ("eval", "none"):
                model.eval()
                for n, parameter in model.named_parameters():
                    trains = n.startswith("fc") if what == "head only" else n.rpartition(".")[0] not in frozen
                    parameter.requires_grad_(trains)
                continue
            convert = None if name == "exact" else name
            if what == "head only":
                freezekit.freeze_backbone(model, convert=convert)
            else:
                freezekit.freeze(model, frozen, convert=convert)
            model.train()

        def run(model: nn.Module) -> None:
            model.zero_grad()
            model(images).square().mean().backward()

        row(what, ratios({name: lambda m=m: run(m) for name, m in models.items()}, steps).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="timed runs of each candidate")
    parser.add_argument("--batch", type=int, default=4, help="images for the ResNet-50")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layers(options.steps)
    resnet50(max(options.steps // 4, 1), options.batch)


if __name__ == "__main__":
    main()
