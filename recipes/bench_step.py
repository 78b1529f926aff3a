"""Time a training step of a ResNet-50 whose BatchNorm is frozen in different ways, and weigh what it keeps.

    python recipes/bench_step.py                                    # both regimes, eager, NCHW
    python recipes/bench_step.py --channels-last --batch 8 --size 128
    python recipes/bench_step.py --compile --only convs --with frozen --with fold
    python recipes/bench_step.py --steps 2                          # just a look

"head" trains the last layer alone; "convs" trains everything but BatchNorm. Every round steps every contender
once, in one process, so that whatever else the machine does hits all of them; a ratio is the median over the
rounds of time by time of the same round, below 1 is faster. Beside a median stands the median deviation: more
than some 10% says that the machine is busy (--threads 1 is steadier then). "saved" is what autograd keeps for
the backward pass: distinct storages that are neither parameters nor buffers.
Needs: pip install 'freezekit[vision]'
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import freezekit

# No progress bar anywhere: its thread would take part in the race.
console = Console(highlight=False)
console.width = max(console.width, 100)
TARGET = "BN in eval()"
FROZEN = ("frozen", "affine", "fold")  # must compute what the target computes
CONVERT = {"frozen": None, "affine": "affine", "fold": "fold"}


def base_model(x: Tensor) -> nn.Module:
    """Return a random network with statistics that fit it, as a trained one's do."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(x)
        for norm in norms:
            norm.momentum = 0.1
            norm.weight.uniform_(0.5, 1.0)
            norm.bias.normal_(0, 0.1)
    return model


def norm_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def like(base: nn.Module, norm_layer: Callable[[int], nn.Module]) -> nn.Module:
    """Return the same network with another class in BatchNorm's place."""
    with torch.device("meta"):
        model = torchvision.models.resnet50(norm_layer=norm_layer)
    model.to_empty(device="cpu").load_state_dict(base.state_dict(), strict=False)
    return model


def make(who: str, base: nn.Module, head_only: bool) -> nn.Module:
    """Return the contender, ready to step."""
    if who == "no BN":
        model = like(base, lambda channels: nn.Identity())
    elif who == "torchvision's":
        model = like(base, torchvision.ops.FrozenBatchNorm2d)
    else:
        model = copy.deepcopy(base)
    if who == "BN trains, own":
        freezekit.convert_batchnorm(model)
    model.train()
    if who in FROZEN:
        if head_only:
            freezekit.freeze_backbone(model, convert=CONVERT[who])
        else:
            freezekit.freeze(model, norm_names(model), convert=CONVERT[who])
        return model
    if head_only:
        model.requires_grad_(False).fc.requires_grad_(True)
    if who == TARGET:
        for name in norm_names(model):
            model.get_submodule(name).eval().requires_grad_(False)
    return model


@dataclass
class Contender:
    """A network that trains."""

    model: nn.Module
    x: Tensor
    target: Tensor
    compiled: bool

    def __post_init__(self) -> None:
        self.call: Callable[[Tensor], Tensor] = (
            torch.compile(self.model, fullgraph=True) if self.compiled else self.model
        )
        # a rate so small that every round computes the same; the update costs what it always costs
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=1e-12)

    def forward(self) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self.call(self.x), self.target)

    def step(self) -> float:
        """Return the seconds of one step."""
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)
        began = time.perf_counter()
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # frees them: no network keeps gradients while another one runs
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)
        return time.perf_counter() - began

    def saved(self) -> float:
        """Return the MiB that autograd keeps between forward and backward, run eagerly."""
        known = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # all are alive until the loss is gone, so no address is counted for two
            loss = F.cross_entropy(self.model(self.x), self.target)
        del loss
        return sum(sizes.values()) / 2**20


WHO = (TARGET, "BN trains", "BN trains, own", *FROZEN, "torchvision's", "no BN")


def compete(
    title: str, head_only: bool, who: list[str], base: nn.Module, x: Tensor, rounds: int, compiled: bool
) -> None:
    """Run the race of one regime and print its table."""
    target = torch.arange(len(x), device=x.device)
    runners: dict[str, Contender] = {}
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 4 * len(WHO)  # they share the code of ResNet.forward
    for name in who:
        model = make(name, base, head_only).to(x.device)
        if x.is_contiguous(memory_format=torch.channels_last):
            model = model.to(memory_format=torch.channels_last)
        runners[name] = Contender(model, x, target, compiled)
    losses, saved = {}, {}
    for name, runner in runners.items():
        saved[name] = runner.saved()
        losses[name] = runner.forward().item()
        if name in (*FROZEN, "torchvision's"):
            assert abs(losses[name] - losses[TARGET]) < 1e-2 * losses[TARGET], (name, losses)
        for _ in range(2 if compiled else 1):
            runner.step()
    times: dict[str, list[float]] = {name: [] for name in runners}
    order = list(runners)
    for number in range(rounds):
        for name in order if number % 2 else reversed(order):
            times[name].append(runners[name].step())
        order = order[1:] + order[:1]

    table = Table(title=title)
    table.add_column("contender", no_wrap=True)
    for column in ("ms", f"of {TARGET}", "of BN trains", "saved MiB", "loss"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in runners:
        middle = statistics.median(times[name])
        spread = statistics.median(abs(t - middle) for t in times[name]) / middle
        ratios = [
            f"{statistics.median(a / b for a, b in zip(times[name], times[rival], strict=True)):.2f}"
            if rival in times
            else "-"
            for rival in (TARGET, "BN trains")
        ]
        table.add_row(
            name, f"{middle * 1e3:.0f} ±{spread:3.0%}", *ratios, f"{saved[name]:.0f}", f"{losses[name]:.3f}"
        )
    console.print(table)


@click.command()
@click.option("--steps", default=10, show_default=True, help="Rounds.")
@click.option("--threads", type=int, help="Threads of torch on the CPU.  [default: torch's choice]")
@click.option("--device", default="cpu", show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--size", default=224, show_default=True, help="Image size in pixels.")
@click.option("--channels-last", is_flag=True)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile every contender.")
@click.option("--only", type=click.Choice(["head", "convs"]), help="One regime only.")
@click.option(
    "--with",
    "chosen",
    type=click.Choice(WHO[1:]),
    multiple=True,
    help="Only these and the target; repeat it.",
)
def main(
    steps: int,
    threads: int | None,
    device: str,
    batch: int,
    size: int,
    channels_last: bool,
    compiled: bool,
    only: str | None,
    chosen: tuple[str, ...],
) -> None:
    """Compare ways to freeze the BatchNorm of a ResNet-50: time as a ratio, and saved activations."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(1)
    x = torch.randn(batch, 3, size, size)
    base = base_model(x)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = x.to(device, memory_format=layout)
    where = torch.cuda.get_device_name(device) if device != "cpu" else f"threads: {torch.get_num_threads()}"
    console.print(
        f"ResNet-50, {batch}x3x{size}x{size}, {'NHWC' if channels_last else 'NCHW'}, "
        f"torch {torch.__version__}, {where}, {'compiled' if compiled else 'eager'}, {steps} rounds"
    )
    who = [name for name in WHO if not chosen or name in (TARGET, *chosen)]
    for regime, title in (("head", "head only"), ("convs", "all but BN trains")):
        if only in (None, regime):
            compete(title, regime == "head", who, base, x, steps, compiled)


if __name__ == "__main__":
    main()
