"""Time one normalisation layer, forward and backward, against the layers people use; and measure its error.

    python recipes/bench_norm.py                                    # ratios on the CPU, float32
    python recipes/bench_norm.py --compile --only frozen            # both sides under torch.compile
    python recipes/bench_norm.py --device cuda --dtype bfloat16 --params float32
    python recipes/bench_norm.py --steps 0 --errors all             # errors in every dtype, no times
    python recipes/bench_norm.py --steps 2                          # just a look

Every round times every contender once, all in one process, so that whatever else the machine does hits all of
them; a ratio is the median over the rounds of time by time of the same round, below 1 is faster. Beside the
target's median stands its median deviation: more than some 10% says that the machine is busy. Where cores are
shared, take fewer --threads: those that wait for one another cost whole time slices.
"copy" clones the input and the gradient: what moving the memory costs at the least.
Needs: pip install 'freezekit[vision]'; timm is optional
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import freezekit

try:
    from timm.layers import FrozenBatchNormAct2d
except ImportError:
    FrozenBatchNormAct2d = None

SHAPES = ((16, 64, 56, 56), (16, 256, 28, 28), (16, 2048, 7, 7), (32, 512))
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
PAIRS = [(name, name) for name in DTYPES] + [("bfloat16", "float32"), ("float16", "float32")]
RESULTS = ("output", "x.grad", "weight.grad", "bias.grad", "mean", "var")
LEAST = 1e-3  # seconds that one timing lasts at the least: a tiny layer is repeated
COPY = "copy"

# No progress bar anywhere: its thread would take part in the race.
console = Console(highlight=False)
console.width = max(console.width, 124)

Layer = Callable[[Tensor], Tensor]


class AbsentError(Exception):
    """A contender that cannot be had here, and why."""


@dataclass(frozen=True)
class Case:
    """What a layer is given."""

    shape: tuple[int, ...]
    channels_last: bool
    dtype: torch.dtype
    params: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def format(self) -> str:
        """The memory format's name."""
        return "NHWC" if self.channels_last else "NCHW" if len(self.shape) == 4 else "NC"

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return an input, its channels with means and deviations of their own, and an output gradient."""
        torch.manual_seed(0)
        per_channel = (self.shape[1],) + (1,) * (len(self.shape) - 2)
        # drawn in float64, so that sums of float64 tensors have something to round
        x, g = torch.randn(2, *self.shape, dtype=torch.float64)
        x = x * torch.empty(per_channel).uniform_(0.5, 2) + torch.randn(per_channel)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x, g = (t.to(self.device, self.dtype, memory_format=layout) for t in (x, g))
        return x.requires_grad_(), g


# -- the layers -------------------------------------------------------------------------------------------


def build(home: Any, kind: str, case: Case) -> Any:
    """Return the layer of that kind from torch.nn or freezekit.nn, with random parameters and statistics."""
    first, channels, *rest = case.shape
    rank = "2d" if rest else "1d"
    name, args, options = {
        "batch": (f"BatchNorm{rank}", (channels,), {}),
        # without a third dimension the input is one unbatched example: channels first
        "instance": (f"InstanceNorm{rank}", (channels if rest else first,), {"affine": True}),
        "layer": ("LayerNorm", (case.shape[1:],), {}),
        "group": ("GroupNorm", (32, channels), {}),
    }[kind]
    return fill(getattr(home, name)(*args, **options), case)


def fill(layer: nn.Module, case: Case) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if name.endswith(("weight", "var")):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.normal_()
    return layer.to(case.device, case.params)


def native(kind: str) -> Callable[[Case], Any]:
    return lambda case: build(nn, kind, case)


def own(kind: str) -> Callable[[Case], Any]:
    return lambda case: build(freezekit.nn, kind, case)


def naive(case: Case) -> nn.Module:
    return build(nn, "batch", case).eval().requires_grad_(False)


def naive_training_affine(case: Case) -> nn.Module:
    return build(nn, "batch", case).eval()


def frozen(convert: str | None = None, home: Any = nn) -> Callable[[Case], nn.Module]:
    def make(case: Case) -> nn.Module:
        layer = build(home, "batch", case)
        freezekit.freeze(layer, "*", convert=convert)
        return layer.train()

    return make


def torchvision_frozen(case: Case) -> nn.Module:
    if len(case.shape) != 4:
        raise AbsentError("4D input only")
    return fill(torchvision.ops.FrozenBatchNorm2d(case.shape[1]), case)


def timm_frozen(case: Case) -> nn.Module:
    if FrozenBatchNormAct2d is None:
        raise AbsentError("not installed")
    if len(case.shape) != 4:
        raise AbsentError("4D input only")
    return fill(FrozenBatchNormAct2d(case.shape[1], apply_act=False), case)


def attempt(make: Callable[[Case], Any], case: Case) -> tuple[Any, str]:
    """Return the layer, or None and the reason."""
    try:
        return make(case), ""
    except AbsentError as absent:
        return None, str(absent)


@dataclass(frozen=True)
class Race:
    """A target and who runs against it; ``passes``: over how many tensors memory must be gone at least."""

    title: str
    kind: str
    target: tuple[str, Callable[[Case], Any]]
    own: dict[str, Callable[[Case], Any]]
    others: dict[str, Callable[[Case], Any]]
    passes: int


def _training(title: str, kind: str, passes: int) -> Race:
    return Race(f"{title}, training", kind, ("torch", native(kind)), {"freezekit": own(kind)}, {}, passes)


RACES = {
    # batch: x twice and y; then x and g for the sums, x and g again, and the input's gradient
    "batch": _training("BatchNorm", "batch", 8),
    "frozen": Race(
        "BatchNorm, frozen",
        "batch",
        ("torch eval()", naive),
        {
            "frozen": frozen(),
            "frozen affine": frozen("affine"),
            "frozen own BN": frozen(home=freezekit.nn),
        },
        {
            "eval(), its affine trains": naive_training_affine,
            "torchvision": torchvision_frozen,
            "timm": timm_frozen,
        },
        4,
    ),
    # one example's part fits the cache, so nothing is fetched twice
    "instance": _training("InstanceNorm", "instance", 5),
    "layer": _training("LayerNorm", "layer", 5),
    "group": _training("GroupNorm", "group", 5),
}


# -- times ------------------------------------------------------------------------------------------------


def timed(step: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the seconds of one call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - began) / repeats


def race(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time every contender once a round, in rotating order, every other round backwards."""
    repeats = {}
    for label, step in steps.items():
        for _ in range(2):
            step()
        repeats[label] = math.ceil(LEAST / timed(step, 1, device))
    times: dict[str, list[float]] = {label: [] for label in steps}
    order = list(steps)
    for number in range(rounds):
        for label in order if number % 2 else reversed(order):
            times[label].append(timed(steps[label], repeats[label], device))
        order = order[1:] + order[:1]
    return times


def stepper(layer: Any, x: Tensor, g: Tensor, compile: bool) -> Callable[[], object]:
    """Forward and backward, for the input and whatever trains; nothing accumulates."""
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    call: Layer = torch.compile(layer, fullgraph=True, dynamic=False) if compile else layer
    g = g.to(layer(x.detach()).dtype)  # torchvision's layer promotes a half input beside float32 parameters
    return lambda: torch.autograd.grad(call(x), wanted, g)


def run_race(entry: Race, cases: list[Case], rounds: int, compile: bool, notes: dict[str, str]) -> None:
    label, make_target = entry.target
    contenders = {**entry.own, **entry.others}
    found: dict[str, dict[str, list[float]]] = {}  # format -> contender -> ratios
    rows = []
    for case in cases:
        torch.compiler.reset()  # or it would see one layer with many shapes
        x, g = case.tensors()
        steps: dict[str, Callable[[], object]] = {}
        try:
            steps[label] = stepper(make_target(case), x, g, compile)
            steps[label]()
        except RuntimeError as error:
            notes[f"{entry.title}, {case} {case.format}: {label}"] = str(error).partition("\n")[0]
            continue
        for name, make in contenders.items():
            layer, why = attempt(make, case)
            if layer is None:
                notes[name if name in entry.others else f"{entry.title}: {name}"] = why
            else:
                steps[name] = stepper(layer, x, g, compile)
        if not set(steps) & set(entry.own):
            continue  # nothing to compare
        steps[COPY] = lambda x=x, g=g: (x.detach().clone(), g.clone())
        times = race(steps, rounds, case.device)
        cells = {}
        for name in (*contenders, COPY):
            if name not in times:
                continue
            ratio = statistics.median(a / b for a, b in zip(times[name], times[label], strict=True))
            for group in (case.format, "all"):
                found.setdefault(group, {}).setdefault(name, []).append(ratio)
            cells[name] = f"{ratio:.2f}"
            if case.device.type == "cuda" and name != COPY:
                share = statistics.median(
                    c / t * entry.passes / 4 for c, t in zip(times[COPY], times[name], strict=True)
                )
                cells[name] += f" ({share:.0%})"
        middle = statistics.median(times[label])
        spread = statistics.median(abs(t - middle) for t in times[label]) / middle
        rows.append((f"{case} {case.format}", f"{middle * 1e3:.3f} ±{spread:3.0%}", cells))
    if not rows:
        return
    columns = [name for name in (*contenders, COPY) if name in found["all"]]
    table = Table(title=f"{entry.title}: time as a multiple of {label}")
    table.add_column("input", no_wrap=True)
    table.add_column(f"{label}, ms", justify="right", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for given, absolute, cells in rows:
        table.add_row(given, absolute, *(cells.get(name, "-") for name in columns))
    table.add_section()
    for group, ratios in sorted(found.items()):
        means = {name: f"{statistics.geometric_mean(values):.2f}" for name, values in ratios.items()}
        table.add_row(f"geo. mean, {group}", "", *(means.get(name, "-") for name in columns))
    console.print(table)


# -- errors -----------------------------------------------------------------------------------------------


def wide(t: Tensor, dtype: Any) -> Any:
    return t.detach().double().cpu().numpy().astype(dtype)


def truth(entry: Race, layer: Any, x: Tensor, g: Tensor, dtype: Any) -> dict[str, Any]:
    """Return what one step must give by the textbook's formulas, in a wider type."""
    first, channels, *rest = x.shape
    if entry.kind == "instance" and not rest:
        first, channels, rest = 1, first, [channels]
    groups = {"layer": 1, "group": 32}.get(entry.kind, channels)
    view = (first, groups, channels // groups, *rest)
    flat = (1, 1, channels, *rest) if entry.kind == "layer" else (1, *view[1:3], *(1 for _ in rest))
    over = tuple(k for k in range(len(view)) if k != 1 and (k or entry.kind == "batch"))
    across = tuple(k for k in range(len(view)) if flat[k] == 1)
    xs, gs = (wide(t, dtype).reshape(view) for t in (x, g))
    weight, bias = (wide(p, dtype).reshape(flat) for p in (layer.weight, layer.bias))
    if not layer.training:
        mean, var = (wide(b, dtype).reshape(flat) for b in (layer.running_mean, layer.running_var))
        scale = weight / np.sqrt(var + dtype(layer.eps))
        return {"output": (xs - mean) * scale + bias, "x.grad": gs * scale}
    mean = xs.mean(over, keepdims=True)
    centred = xs - mean
    var = (centred * centred).mean(over, keepdims=True)
    rstd = 1 / np.sqrt(var + dtype(layer.eps))
    xhat, gw = centred * rstd, gs * weight
    inner = gw - gw.mean(over, keepdims=True) - xhat * (gw * xhat).mean(over, keepdims=True)
    answer = {
        "output": xhat * weight + bias,
        "x.grad": inner * rstd,
        "weight.grad": (gs * xhat).sum(across),
        "bias.grad": gs.sum(across),
    }
    if entry.kind == "batch":
        n = xs.size // channels
        momentum = dtype(layer.momentum)
        for name, batch in (("mean", mean), ("var", var * n / (n - 1))):
            before = wide(getattr(layer, f"running_{name}"), dtype)
            answer[name] = (1 - momentum) * before + momentum * batch.ravel()
    return answer


def errors(
    layer: Any, x: Tensor, g: Tensor, answer: dict[str, Any], dtype: Any
) -> dict[str, tuple[float, float]]:
    """Return the largest error of each result, and a quarter of its last place, which is nobody's fault."""
    output = layer(x)
    training = layer.training and any(p.requires_grad for p in layer.parameters())
    wanted = [x, layer.weight, layer.bias] if training else [x]
    grads = torch.autograd.grad(output, wanted, g.to(output.dtype))
    got = dict(zip(RESULTS, (output, *grads), strict=False))
    got |= {name: getattr(layer, f"running_{name}") for name in ("mean", "var") if name in answer}
    found = {}
    for name, right in answer.items():
        error = np.abs(wide(got[name], dtype).ravel() - right.ravel()).max()
        floor = np.abs(right).max() * torch.finfo(got[name].dtype).eps / 4
        found[name] = (float(error), float(floor))
    return found


def run_errors(chosen: list[Race], cases: list[Case], notes: dict[str, str]) -> None:
    first = cases[0]
    dtype, exact = np.float64, "float64"
    if first.dtype is torch.float64:
        dtype, exact = np.longdouble, "long double"
    of = str(first.dtype).removeprefix("torch.")
    if first.params is not first.dtype:
        of += f", parameters {str(first.params).removeprefix('torch.')}"
    table = Table(
        title=f"Largest error against {exact}, and as a multiple of torch's: {of}",
        caption="! more than twice torch's error",
    )
    for column in ("layer", "input"):
        table.add_column(column, no_wrap=True)
    for name in RESULTS:
        table.add_column(name, justify="right", no_wrap=True)
    flagged = total = 0
    for entry in chosen:
        for case in cases:
            x, g = case.tensors()
            try:
                rival = entry.target[1](case)
                answer = truth(entry, rival, x, g, dtype)
                theirs = errors(rival, x, g, answer, dtype)
            except RuntimeError as error:
                notes[f"errors of {entry.title}, {of}, {case}: torch"] = str(error).partition("\n")[0]
                continue
            for label, make in entry.own.items():
                layer, why = attempt(make, case)
                if layer is None:
                    notes[f"{entry.title}: {label}"] = why
                    continue
                ours = errors(layer, x, g, answer, dtype)
                cells = []
                for name in RESULTS:
                    if name not in ours:
                        cells.append("")
                        continue
                    error, floor = ours[name]
                    ratio = max(error, floor) / max(theirs[name][0], floor) if floor else 1.0
                    total, flagged = total + 1, flagged + (ratio > 2)
                    cells.append(f"{error:.0e} x{ratio:.1f}{'!' if ratio > 2 else ' '}")
                what = f"{entry.kind} norm" if label == "freezekit" else label
                table.add_row(what, f"{case} {case.format}", *cells)
    if total:
        console.print(table)
        console.print(f"{flagged} of {total} errors are more than twice torch's ({of})")


@click.command()
@click.option("--steps", default=15, show_default=True, help="Rounds; 0 for no times.")
@click.option("--threads", type=int, help="Threads of torch on the CPU.  [default: torch's choice]")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--params", type=click.Choice(list(DTYPES)), help="Dtype of parameters.  [default: --dtype]")
@click.option("--compile", is_flag=True, help="torch.compile the layer and its rivals.")
@click.option("--only", type=click.Choice(list(RACES)), multiple=True, help="Only this; may be repeated.")
@click.option(
    "--shape", "pick", type=click.IntRange(0, len(SHAPES) - 1), multiple=True, help="Only this shape."
)
@click.option(
    "--errors",
    "which",
    type=click.Choice(["none", "this", "all"]),
    default="this",
    show_default=True,
    help="Errors of no dtype, this one, or all.",
)
def main(
    steps: int,
    threads: int | None,
    device: str,
    dtype: str,
    params: str | None,
    compile: bool,
    only: tuple[str, ...],
    pick: tuple[int, ...],
    which: str,
) -> None:
    """Compare freezekit's layers with torch's, torchvision's and timm's: time as a ratio, and error."""
    if threads:
        torch.set_num_threads(threads)
    chosen = [RACES[name] for name in only or RACES]

    def cases(dtype: str, params: str) -> list[Case]:
        return [
            Case(SHAPES[k], last, DTYPES[dtype], DTYPES[params], torch.device(device))
            for k in pick or range(len(SHAPES))
            for last in ((False, True) if len(SHAPES[k]) == 4 else (False,))
        ]

    where = torch.cuda.get_device_name(device) if device != "cpu" else f"threads: {torch.get_num_threads()}"
    console.print(
        f"torch {torch.__version__}, {where}, {dtype} input, {params or dtype} parameters, "
        f"{'compiled' if compile else 'eager'}, {steps} rounds"
    )
    notes: dict[str, str] = {}
    if steps:
        for entry in chosen:
            run_race(entry, cases(dtype, params or dtype), steps, compile, notes)
        if device != "cpu":
            console.print("In brackets: the bandwidth reached, as a share of the copy's.")
    pairs = {"none": [], "this": [(dtype, params or dtype)], "all": PAIRS}[which]
    for pair in pairs:
        run_errors(chosen, cases(*pair), notes)
    for what, why in notes.items():
        console.print(f"left out: {what}: {why}", markup=False)


if __name__ == "__main__":
    main()
