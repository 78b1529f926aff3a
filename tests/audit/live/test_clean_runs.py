"""No false alarms: properly frozen models in many kinds of loop, watched at every step."""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import zoo
from clean_zoo import ARCHITECTURES, Architecture
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import freezekit
from freezekit import DriftAuditor


@dataclass(frozen=True)
class Loop:
    """How a loop trains."""

    optimizer: Callable[[Any], Optimizer] = SGD
    everything: bool = False  # the optimizer holds what is frozen too
    set_to_none: bool = True
    autocast: bool = False
    accumulate: int = 1
    clip: bool = False
    schedule: bool = False
    average: bool = False  # EMA of the head
    evaluate: bool = False
    save: bool = False  # and load the same again, cast and move to what it is already, exchange its memory
    compile: bool = False


LOOPS: dict[str, Loop] = {
    "AdamW, evaluation": Loop(partial(AdamW, lr=1e-3, weight_decay=0.1), evaluate=True),
    "momentum and decay over everything": Loop(
        partial(SGD, lr=0.01, momentum=0.9, weight_decay=0.1), everything=True, schedule=True
    ),
    "autocast, foreach": Loop(partial(AdamW, lr=1e-3, foreach=True), autocast=True, set_to_none=False),
    "accumulation, clipping, fused": Loop(
        partial(Adam, lr=1e-3, fused=True), everything=True, accumulate=2, clip=True, set_to_none=False
    ),
    "EMA of the head": Loop(average=True, schedule=True),
    "saving, loading, copying": Loop(partial(SGD, lr=0.01, momentum=0.9), save=True, evaluate=True),
}
FREEZES = ("ours", "by hand", "extraction")


def total(out: object) -> Tensor:
    """Return something to minimise, whatever a model gives back."""
    if isinstance(out, Tensor):
        return out.float().square().mean() if out.is_floating_point() else torch.zeros(())
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else ()
    return sum((total(value) for value in values), torch.zeros(()))


def freeze(model: nn.Module, arch: Architecture, how: str) -> None:
    if how == "ours":
        freezekit.freeze_backbone(model, head=None if arch.needs == "peft" else arch.head)
    elif arch.needs != "peft":  # which freezes the base model by itself
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(f"{name}.".startswith(f"{arch.head}."))


def set_mode(model: nn.Module, how: str) -> None:
    """What the loop does at the start of each step; by hand the frozen layers go back to eval mode."""
    model.train()
    if how == "ours":
        return
    for module in model.modules():
        if not any(p.requires_grad for p in module.parameters()):
            module.eval()


def features(model: nn.Module, arch: Architecture) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return the head and what a frozen model hands to it."""
    head = model.get_submodule(arch.head)
    caught: list[tuple[Any, ...]] = []
    hook = head.register_forward_pre_hook(lambda _, given: caught.append(copy.deepcopy(given)))
    model.eval()
    with torch.no_grad():
        model(**arch.batch())
    hook.remove()
    return head, caught[0]


def losses(model: nn.Module, arch: Architecture, loop: Loop, how: str) -> Iterator[Tensor]:
    call = torch.compile(model, backend="eager") if loop.compile else model
    while True:
        if how == "extraction":
            head, given = features(model, arch)
            yield total(head(*given))
            continue
        set_mode(model, how)
        with torch.autocast("cpu", torch.bfloat16, enabled=loop.autocast):
            out = call(**arch.batch())
        yield total(out)


def beside(model: nn.Module, arch: Architecture, loop: Loop, step: int) -> None:
    """What a loop does every so many steps, none of which moves anything."""
    if loop.evaluate and step % 10 == 5:
        model.eval()
        with torch.no_grad():
            model(**arch.batch())
    if loop.save and step % 10 == 5:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        model.load_state_dict(torch.load(file))
        model.float().to("cpu")
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        copy.deepcopy(model.state_dict())


def run(name: str, loop: Loop, how: str, steps: int) -> None:
    arch = ARCHITECTURES[name]
    if importlib.util.find_spec(arch.needs) is None:
        pytest.skip(f"{arch.needs} is not installed")
    torch.manual_seed(0)
    torch.compiler.reset()
    model = zoo.scramble(arch.make())
    freeze(model, arch, how)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = loop.optimizer(model.parameters() if loop.everything else trained)
    scheduler = CosineAnnealingLR(optimizer, steps) if loop.schedule else None
    ema = copy.deepcopy(model.get_submodule(arch.head)) if loop.average else None
    # both at once: neither may disturb the other
    with DriftAuditor(model, optimizer) as auditor, DriftAuditor(model, watch="all") as other:
        loss = losses(model, arch, loop, how)
        before = [p.detach().clone() for p in trained]
        for step in range(1, steps + 1):
            optimizer.zero_grad(set_to_none=loop.set_to_none)
            for _ in range(loop.accumulate):
                next(loss).backward()
            if loop.clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if scheduler:
                scheduler.step()
            if ema:
                with torch.no_grad():
                    for mean, p in zip(
                        ema.parameters(), model.get_submodule(arch.head).parameters(), strict=True
                    ):
                        mean.lerp_(p, 0.1)
            beside(model, arch, loop, step)
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True)), "the head did train"
    for watching in (auditor, other):
        report = watching.report()
        assert report.clean
        assert report.findings == report.changed == ()
        assert watching.step == steps
    assert auditor.report().compared == other.report().compared > 0


FEW = list(ARCHITECTURES)[:6]
PAIRS = [(name, list(LOOPS)[(2 * i + j) % len(LOOPS)], how)
         for i, name in enumerate(ARCHITECTURES) for j, how in enumerate(FREEZES)]  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # of the libraries, about their own affairs; an alarm is an error
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(("name", "loop", "how"), [pair for pair in PAIRS if pair[0] in FEW])
def test_no_false_alarm(name: str, loop: str, how: str) -> None:
    run(name, LOOPS[loop], how, 20)


@pytest.mark.parametrize("loop", LOOPS)
def test_no_false_alarm_in_any_loop(loop: str) -> None:
    run("own layers", LOOPS[loop], "by hand", 20)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes_anew_is_no_alarm(norm: Callable[[nn.Module], nn.Module]) -> None:
    """Its layer keeps the result as a plain attribute; what it is computed from does not move."""
    model = nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = SGD(model[1].parameters(), lr=0.1)
    with DriftAuditor(model, optimizer) as auditor, DriftAuditor(model, optimizer, watch="all"):
        for _ in range(3):
            model.train()
            model[0].eval()
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
    assert auditor.report().clean


@pytest.mark.parametrize("how", ["ours", "by hand"])
def test_no_false_alarm_under_compile(how: str) -> None:
    run("resnet18", replace(LOOPS["AdamW, evaluation"], compile=True), how, 10)


@pytest.mark.census
@pytest.mark.parametrize(("name", "loop", "how"), PAIRS)
def test_no_false_alarm_in_200_steps(name: str, loop: str, how: str) -> None:
    run(name, LOOPS[loop], how, 200)
