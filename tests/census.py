"""A census of models: is the head found, and does a freeze leave no trace?

The truth is labelled by nobody: what changes its shape between 10 and 11 classes is head, and must train.

    python tests/census.py --family torchvision --all --json census.json
    python tests/census.py --family timm --sample 50
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import freezekit
from freezekit import FreezekitError
from freezekit.freezing.plan import build_without_memory

Builder = Callable[[int], nn.Module]

VERDICTS = ("ok", "refusal", "WRONG", "no class count")


@dataclass
class Entry:
    """What became of one model."""

    name: str
    verdict: str
    why: str = ""
    """The reason of a refusal, the tensors of a wrong freeze."""
    rule: str = ""
    head: tuple[str, ...] = ()
    share: float = 0.0
    """Of the model's parameters, how much is head."""
    trace: str = ""
    """What a freeze and its undo left changed; or what of the backbone was not frozen; nothing is well."""
    seconds: float = 0.0


def torchvision_models() -> dict[str, Builder]:
    from torchvision.models import get_model, get_model_builder, list_models

    def builder(name: str) -> Builder:
        def build(classes: int) -> nn.Module:
            parameters = inspect.signature(get_model_builder(name)).parameters
            backbone = {"weights_backbone": None} if "weights_backbone" in parameters else {}
            return get_model(name, weights=None, num_classes=classes, **backbone)

        return build

    return {name: builder(name) for name in list_models()}


def timm_models() -> dict[str, Builder]:
    import timm

    return {
        name: lambda classes, name=name: timm.create_model(name, pretrained=False, num_classes=classes)
        for name in timm.list_models()
    }


def models(family: str) -> dict[str, Builder]:
    """Return the builders of a family by name; those of frameworks are in a file of their own."""
    if family == "torchvision":
        return torchvision_models()
    if family == "timm":
        return timm_models()
    if importlib.util.find_spec("census_frameworks") is None:
        return {}
    found: dict[str, Builder] = importlib.import_module("census_frameworks").models()
    return {name: build for name, build in found.items() if name.startswith(f"{family}/")}


def judge(name: str, build: Builder, device: str = "meta") -> Entry:
    """Build the model twice, find its head, freeze it and undo that."""
    start = time.monotonic()
    entry = _judge(name, build, device)
    entry.seconds = round(time.monotonic() - start, 2)
    return entry


def _judge(name: str, build: Builder, device: str) -> Entry:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about their own models
        try:
            model = build(10) if device == "cpu" else build_without_memory(lambda: build(10))
            other = build_without_memory(lambda: build(11))
        except Exception as error:
            return Entry(name, "no class count", f"{type(error).__name__}: {error}"[:200])
    truth = differing(model, other)
    del other
    if not truth:
        return Entry(name, "no class count", "no tensor changes its shape")
    try:
        found = freezekit.find_backbone(model)
        before = trace_of(muddle(model))
        handle = freezekit.freeze_backbone(model)
    except FreezekitError as error:
        return Entry(name, "refusal", str(error))
    numel = {n: p.numel() for n, p in model.named_parameters(remove_duplicate=False)}
    frozen = set(handle.frozen)
    share = 1 - sum(count for n, count in numel.items() if n in frozen) / sum(numel.values())
    entry = Entry(name, "ok", rule=found.rule, head=found.head, share=round(share, 4))
    wrong = [n for n in truth if n in frozen or under(n, found.backbone) or not under(n, found.head)]
    if wrong or not frozen:
        entry.verdict, entry.why = "WRONG", ", ".join(wrong) or "nothing is frozen"
    entry.trace = unfrozen(model, found.backbone)
    handle.undo()
    after = trace_of(model)
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    entry.trace += "; ".join(sorted(map(str, changed))[:5])
    return entry


def differing(model: nn.Module, other: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers whose shapes differ, or that one of the two lacks."""
    shapes, others = ({n: t.shape for n, t in tensors(m)} for m in (model, other))
    return sorted(n for n in shapes.keys() | others.keys() if shapes.get(n) != others.get(n))


def tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return every parameter and buffer, tied ones under each of their names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def under(name: str, scopes: Iterable[str]) -> bool:
    """Tell whether a tensor is one of the names or below one."""
    return any(name == scope or name.startswith(f"{scope}.") for scope in scopes)


def muddle(model: nn.Module) -> nn.Module:
    """Give modules different modes, hooks and gradients, since a default restored proves nothing."""
    for k, module in enumerate(model.modules()):
        # but where train() is overwritten, which freezing would refuse in train mode
        module.training = k % 5 != 3 and type(module).train is nn.Module.train
        if k % 11 == 5:
            module.register_forward_hook(print)
            module.register_forward_pre_hook(print)
            module.register_full_backward_hook(print)
    for k, parameter in enumerate(model.parameters()):
        if k % 7 == 2:
            parameter.requires_grad_(False)
    return model


def trace_of(model: nn.Module) -> dict[Any, Any]:
    """Note everything about a model that a freeze might leave changed."""
    found: dict[Any, Any] = {"state_dict": list(model.state_dict())}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = {
            k: list(v.items()) for k, v in module.__dict__.items() if k.endswith("_hooks") and v is not None
        }
        found["module", name] = (id(module), type(module), module.training, set(module.__dict__), hooks)
    for name, tensor in tensors(model):
        bits = (
            None
            if tensor.is_meta
            else tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
        found["tensor", name] = (id(tensor), tensor.requires_grad, tensor.dtype, tensor.shape, bits)
    return found


def unfrozen(model: nn.Module, backbone: Iterable[str]) -> str:
    """Say what of the backbone would move, or be in train mode, after ``model.train()``."""
    modes = {id(m): m.training for m in model.modules()}
    model.train()
    loose = [
        n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad and under(n, backbone)
    ]
    live = [n for n, m in model.named_modules(remove_duplicate=False) if m.training and under(n, backbone)]
    for module in model.modules():
        if module.training:  # the head's, which nobody but this function has changed
            module.training = modes[id(module)]
    return "".join(f"not frozen: {n}; " for n in (loose + live)[:3])


def census(builders: dict[str, Builder], device: str = "meta") -> Iterable[Entry]:
    for name, build in builders.items():
        yield judge(name, build, device)


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--family", action="append", required=True, help="torchvision, timm, transformers, smp"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="so many models of each, evenly spread")
    parser.add_argument("--all", action="store_true", help="every model")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="these models alone")
    parser.add_argument("--device", default="meta", help="cpu compares values as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what became of each model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    table = Table(
        "family", "models", "take classes", "ok", "refused", "wrong", "left no trace", "head > 30 %"
    )
    entries: list[Entry] = []
    for family in options.family:
        builders = models(family)
        if options.names:
            builders = {name: builders[name] for name in options.names}
        elif options.sample and not options.all:
            builders = dict(list(builders.items())[:: max(1, len(builders) // options.sample)])
        of_family = []
        for entry in census(builders, options.device):
            of_family.append(entry)
            if entry.verdict not in ("ok", "no class count") or entry.trace:
                console.print(f"{entry.verdict} {entry.name}: {entry.why} {entry.trace}", markup=False)
            if options.json:
                options.json.write_text(json.dumps([asdict(e) for e in [*entries, *of_family]], indent=1))
        entries += of_family
        count = Counter(entry.verdict for entry in of_family)
        ok = [entry for entry in of_family if entry.verdict == "ok"]
        row = (len(of_family), len(of_family) - count["no class count"], *(count[v] for v in VERDICTS[:3]))
        clean = sum(not entry.trace for entry in ok)
        table.add_row(family, *map(str, row), f"{clean} of {len(ok)}", str(sum(e.share > 0.3 for e in ok)))
    console.print(table)


if __name__ == "__main__":
    main()
