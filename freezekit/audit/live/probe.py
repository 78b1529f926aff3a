"""The behaviour probe: does the frozen part still do what it did, whoever else is in the batch."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from freezekit.audit.findings import Finding
from freezekit.audit.live.region import Region
from freezekit.audit.live.replica import is_compiled
from freezekit.audit.live.sample import Sample
from freezekit.audit.live.structures import NotProbedError
from freezekit.audit.live.trial import Reference, Trial

__all__ = ["Probe"]

_ROOM = 2**28
"""Bytes of inputs that are kept at a time; layers for which there is no room have their turn next time."""

_TRIES = 2
"""Forwards without any call after which no more are waited for: a compiled model may compile again."""

_COMPILED = "Using `torch.compile.module.` when there are global hooks"
"""What a compiled model says while a hook for all modules is there, though it never calls ours."""

_STATELESS = (
    nn.Linear, nn.Bilinear, nn.Identity, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d,
    nn.ConvTranspose2d, nn.ConvTranspose3d, nn.LayerNorm, nn.GroupNorm, nn.ReLU, nn.GELU, nn.Embedding,
)  # fmt: skip
"""Nothing but their tensors decides what these give, and those are compared anyway."""


class Probe:
    """Runs the frozen layers a second time on what the training loop gave them, and compares.

    It runs copies, so the loop notices nothing: modes, buffers, hooks, attributes, gradients and random
    states are what they were. Three questions are asked of every frozen layer: does it give the same for
    the same batch, the same for a sample whatever else is in the batch, and what it gave in eval mode when
    it was first probed. It never raises; what cannot be probed is in :attr:`notes`.

    Args:
        region: the frozen part.

    >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> _ = model[0].requires_grad_(False)
    >>> probe = Probe(Region(model))
    >>> probe.arm()
    >>> _ = model(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    >>> probe.run()[0].message
    'sample 0 changed by up to 1 (100 % of the largest output) when its batch-mates did; in train mode'

    Source: torch.nn.BatchNorm2d on track_running_stats; torch.nn.Dropout on training.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.notes: list[str] = []
        """What could not be probed and why, each once."""
        self._armed: dict[int, tuple[str, nn.Module]] = {}
        self._caught: dict[str, tuple[nn.Module, Sample]] = {}
        self._own: set[int] = set()
        self._inside: dict[int, tuple[str, int]] = {}
        """Parts of what is waited for, in case that is passed by: their names, and whose they are."""
        self._parts: dict[str, tuple[nn.Module, Sample, int]] = {}
        self._fired = False
        """Whether any layer of the model was called."""
        self._hook: Any = None
        self._divided: set[str] = set()
        """Roots that were never called themselves: their children are probed in their place."""
        self._done: set[str] = set()
        """Layers probed in this round; each has its turn before any has its second."""
        self._misses = 0
        self._whole: set[str] = set()
        self._reads: dict[tuple[str, tuple[bool, ...]], bool] = {}
        self._references: dict[str, Reference] = {}

    def arm(self) -> None:
        """Keep what the frozen layers are given in the next forward; :meth:`run` is to follow."""
        self.disarm()
        if self._misses == _TRIES:
            return
        try:
            if any(is_compiled(module) for module in self.region.model.modules()):
                raise NotProbedError("compiled")
            units = {name: unit for name, unit in self._units().items() if not _is_stateless(unit)}
        except Exception as reason:
            self._note("", reason)
            return
        if not units.keys() - self._done:
            self._done.clear()
        self._armed = {id(unit): (name, unit) for name, unit in units.items() if name not in self._done}
        self._own = {id(module) for module in self.region.model.modules()}
        self._inside = {
            id(part): (_joined(name, path), root)
            for root, (name, unit) in self._armed.items()
            for path, part in unit.named_modules()
            if part is not unit and _is_of_interest(part) and not _is_stateless(part)
        }
        if self._armed:
            warnings.filterwarnings("ignore", message=_COMPILED)
            self._hook = register_module_forward_pre_hook(self._catch)

    def disarm(self) -> None:
        """Keep nothing, and stop waiting for a forward."""
        self._unhook()
        self._armed, self._caught, self._fired = {}, {}, False
        self._inside, self._parts = {}, {}

    def run(self) -> list[Finding]:
        """Probe the layers whose inputs were kept and return what is wrong with them.

        It leaves no trace and never raises.
        """
        caught, missed = self._caught, dict(self._armed.values())
        caught |= {
            name: (part, given) for name, (part, given, root) in self._parts.items() if root in self._armed
        }
        fired = self._fired
        self.disarm()
        if fired:
            self._misses = 0
            self._done.update(missed)
            self._divide(missed)
        elif missed:
            self._misses += 1
            self._remember("not probed: no call was seen")
        findings = []
        for name, (layer, sample) in caught.items():
            self._done.add(name)
            try:
                findings += self._probe(name, layer, sample)
            except Exception as reason:
                self._note(name, reason)
        return findings

    def _units(self) -> dict[str, nn.Module]:
        """Return what to probe: the frozen roots, in place of those never called their children."""
        units: dict[str, nn.Module] = {}

        def add(name: str, module: nn.Module) -> None:
            divided = name in self._divided or _is_never_called(module)
            if not divided:
                units[name] = module
                return
            for key, child in module.named_children():
                if _is_of_interest(child):
                    add(f"{name}.{key}" if name else key, child)

        for name, root in self.region.roots.items():
            add(name, root)
        return units

    def _divide(self, missed: dict[str, nn.Module]) -> None:
        """Look next time at the children of layers that were passed by, as when a list is iterated over."""
        for name, module in missed.items():
            if any(True for _ in module.children()):
                self._divided.add(name)
            else:
                self._note(name, NotProbedError("no call was seen"))

    def _catch(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        self._fired = self._fired or id(module) in self._own
        root = id(module)
        if root in self._armed:
            name, _ = self._armed.pop(root)
        else:
            name, root = self._inside.pop(root, ("", 0))
            if root not in self._armed:
                return
            for part in module.modules():  # what it calls itself is probed with it
                self._inside.pop(id(part), None)
        try:
            # a hook for all modules is not given what is passed by name: it is taken from its caller
            kwargs = sys._getframe(1).f_locals.get("kwargs", {})
            kept = [sample.size for _, sample in self._caught.values()]
            kept += [sample.size for _, sample, _ in self._parts.values()]
            if sum(kept) < _ROOM:
                sample = Sample.of(module, args, kwargs, whole=name in self._whole)
                if root == id(module):
                    self._caught[name] = module, sample
                else:
                    self._parts[name] = module, sample, root
        except Exception as reason:
            self._note(name, reason)
        if not self._armed:
            self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            ours = [known for known in warnings.filters if getattr(known[1], "pattern", "") == _COMPILED]
            for known in ours:
                warnings.filters.remove(known)  # type: ignore[attr-defined]

    def _probe(self, name: str, layer: nn.Module, sample: Sample) -> list[Finding]:
        trial = Trial(layer, self.region.model, sample, partial(self._shares, name))
        try:
            output = trial.look(first=name not in self._references)
            known = self._references.get(name)
            if known is None:
                self._references[name] = trial.reference(output)
            elif known.kinds == trial.kinds:
                trial.look_back(known)
            else:  # what another device or precision gives differs, and rightly so
                del self._references[name]
        except Exception as reason:
            if isinstance(reason, NotProbedError) or not sample.cut:
                self._note(name, reason)
            self._whole.add(name)  # perhaps it does not like a part of a batch
        for path in trial.mixing:
            self._remember(
                f"{_joined(name, path)}: what it gives for one row depends on the others in eval mode too; "
                "they may be parts of one sample, so that is no finding"
            )
        order = list(trial.parts)
        return [
            Finding(seen.code, _joined(name, path), seen.message, seen.fix, cause=seen.cause)
            for path, seen in sorted(trial.found, key=lambda item: order.index(item[0]))
        ]

    def _shares(self, name: str, trial: Trial, modes: dict[str, bool]) -> bool:
        """Tell whether a layer only reads its parameters, so that its copies can have the very same."""
        key = name, tuple(modes.values())
        if key not in self._reads:
            self._reads[key] = trial.only_reads(modes)
        return self._reads[key]

    def _note(self, name: str, reason: Exception) -> None:
        why = reason.what if isinstance(reason, NotProbedError) else f"{type(reason).__name__}: {reason}"
        self._remember(f"not probed: {name or 'the model'} ({why.strip().partition(chr(10))[0][:200]})")

    def _remember(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _joined(name: str, path: str) -> str:
    return ".".join(part for part in (name, path) if part)


def _is_of_interest(part: nn.Module) -> bool:
    """Tell whether a part has tensors, or drops out: a loss or a pooling may mix samples, and rightly so."""
    held = any(True for _ in part.parameters()) or any(True for _ in part.buffers())
    return held or isinstance(part, nn.modules.dropout._DropoutNd)


def _is_never_called(module: nn.Module) -> bool:
    """Tell a list or a wrapper from a layer."""
    wrapper = isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return wrapper or type(module).forward is nn.Module.forward


def _is_stateless(unit: nn.Module) -> bool:
    """Tell whether nothing but its tensors decides what it gives: these are compared anyway."""
    return all(
        type(part) in _STATELESS
        and "forward" not in part.__dict__
        and not part._forward_pre_hooks
        and getattr(part, "max_norm", None) is None
        for part in unit.modules()
    )
