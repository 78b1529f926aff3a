"""One frozen layer on trial: run again on what the loop gave it, and each layer inside judged by itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from freezekit.audit.findings import Cause
from freezekit.audit.live.culprits import Blame, Recording, replayed
from freezekit.audit.live.region import is_norm
from freezekit.audit.live.replica import Replica, random_states, randomness, unnoticed
from freezekit.audit.live.sample import Sample
from freezekit.audit.live.structures import cloned, compare, largest_error

__all__ = ["Reference", "Seen", "Trial"]

_HOLD = "freezekit.freeze_backbone(model) keeps the layer in eval mode whatever model.train() does"
_STATE = (
    "what it gives hangs on more than its inputs and its tensors: change its forward, or leave it unfrozen"
)
_RANDOM = "drop nothing where its own training is False: F.dropout(x, p, training=self.training)"
_MOVED = "find what changed in it: its values, its settings, or its mode"
_OTHER_NORM = (
    "it has no running statistics to go by: make it with track_running_stats=True and calibrate it with "
    "freezekit.update_bn(loader, model) before freezing, or use a norm of single samples"
)
_TRAIN = Cause("train-mode forward", "in train mode")


@dataclass(frozen=True)
class Seen:
    """What was seen of one layer; the rest of a finding is its name.

    Args:
        code: FK201, FK202 or FK203.
        message: what was seen, with its size.
        fix: what to do.
        cause: why, where that is certain.
    """

    code: str
    message: str
    fix: str
    cause: Cause | None


@dataclass(frozen=True)
class Reference:
    """What a layer gave in eval mode when it was first probed.

    Args:
        sample: for which inputs.
        output: what it gave.
        copy: the layer as it was, but for the parameters, which may be those of the model.
        kinds: devices and dtypes of its tensors.
    """

    sample: Sample
    output: Any
    copy: nn.Module
    kinds: tuple[Any, ...]


class Trial:
    """Judges one layer by its behaviour.

    Args:
        layer: the layer.
        model: the model it is part of.
        sample: what the loop gave it.
        shares: tells whether copies in some modes can have the very parameters.

    Raises:
        NotProbedError: the layer cannot be run a second time without risk.
    """

    def __init__(
        self,
        layer: nn.Module,
        model: nn.Module,
        sample: Sample,
        shares: Callable[[Trial, dict[str, bool]], bool],
    ) -> None:
        self.model, self.sample, self.shares = model, sample, shares
        self.replica = Replica(layer, model)
        self.parts = dict(layer.named_modules())
        tensors = [*layer.parameters(), *layer.buffers()]
        self.kinds = tuple((t.device, t.dtype) for t in tensors)
        self.devices = {t.device for t in tensors}
        tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
        on_cuda = any(device.type == "cuda" for device in self.devices)
        self.error = largest_error({t.dtype for t in tensors} | sample.dtypes, on_cuda and tf32)
        self.found: list[tuple[str, Seen]] = []
        """The layers with something wrong, by their names inside."""
        self.mixing: list[str] = []
        """Layers that mix rows by design, so that nothing can be said."""

    def look(self, *, first: bool) -> Any:
        """Ask whether the same batch, and the same sample among others, gives the same.

        Args:
            first: compare train mode with eval mode, too.

        Returns:
            The output for the sample.
        """
        sample = self.sample
        with self.unnoticed(sample):
            one, other = sample.with_mates() or (sample, None)
            made = self.make(sample.modes)
            before = self.randomness()
            output = self.call(made, one)
            drew = self.randomness() != before
            again = self.call(made, other or one)
            differs = compare(output, again, self.error, one.batch if other else None) is not None
            if differs or drew:
                self.look_closer(one, other)
            if any(sample.modes.values()) and (first or differs or drew):
                self.compare_with_eval(one)
        return output if one is sample else None

    def reference(self, output: Any) -> Reference:
        """Keep what is given now, to compare with later.

        Args:
            output: what the layer gave, should it have been in eval mode.
        """
        modes = self.sample.in_eval().modes
        with self.unnoticed(self.sample):
            copy = self.make(modes)
            if output is None or any(self.sample.modes.values()):
                output = self.call(self.make(modes), self.sample)
        return Reference(self.sample, output, copy, self.kinds)

    def look_back(self, known: Reference) -> None:
        """Ask whether it still gives what it gave.

        Args:
            known: what it gave, and for what.
        """
        with self.unnoticed(known.sample):
            output = self.call(self.make(self.sample.modes), known.sample)
            difference = compare(known.output, output, self.error)
            if difference is None:
                return
            earlier, modes = Replica(known.copy, self.model), known.sample.in_eval().modes
            shared = self.shares(self, modes)
            then, now = earlier.make(modes, shared=shared), self.make(self.sample.modes)
            for path, blame in self.replay(then, known.sample, now, known.sample).items():
                message = f"its output for the inputs of the first probe changed {blame.difference}"
                self.accuse(path, blame.drew, message, _MOVED)
            if self.found:
                return
            then = earlier.make(modes, shared=shared)
            if compare(known.output, self.call(then, known.sample), self.error) is not None:
                # the layer as it was gives something else as well: the parameters, which it shares, moved
                self.accuse(
                    "", False, f"its output for the inputs of the first probe changed {difference}", _MOVED
                )

    def only_reads(self, modes: dict[str, bool]) -> bool:
        """Tell whether a forward leaves the parameters alone.

        Args:
            modes: ``training`` of each module in it.
        """
        used = self.replica.make(modes, shared=False)
        self.call(used, self.sample)
        return not self.replica.writes(used)

    def look_closer(self, one: Sample, other: Sample | None) -> None:
        """Find out which layers give something else the second time, or among other batch-mates."""
        modes, off = one.modes, one.in_eval().modes
        made = self.make(modes)
        if blames := self.replay(made, one, made, one):
            made = self.make(off)
            always = self.replay(made, one, made, one)
            for path, blame in blames.items():
                message = f"the same batch again gave an output that differs {blame.difference}"
                self.accuse(path, blame.drew, message, _STATE, by_mode=path not in always)
        if other is None:
            return
        mixing = self.replay(self.make(modes), one, self.make(modes), other, batch=one.batch)
        mixing = {path: blame for path, blame in mixing.items() if not self.has(path)}
        if not mixing:
            return
        anyway = self.replay(self.make(off), one, self.make(off), other, batch=one.batch)
        for path, blame in mixing.items():
            message = f"sample 0 changed {blame.difference} when its batch-mates did"
            if path not in anyway:
                self.put(path, "FK201", message, _HOLD, by_mode=True)
            elif _uses_batch(self.parts[path]):
                self.put(path, "FK201", f"{message}, in eval mode too", _OTHER_NORM)
            else:
                self.mixing.append(path)

    def compare_with_eval(self, one: Sample) -> None:
        """Find out which layers do otherwise in the modes of the loop than in eval mode."""
        blames = self.replay(self.make(one.in_eval().modes), one, self.make(one.modes), one)
        for path, blame in blames.items():
            message = f"its output differs {blame.difference} from that in eval mode"
            self.accuse(path, blame.drew, message, _STATE, by_mode=True)

    def accuse(self, path: str, drew: bool, message: str, fix: str, *, by_mode: bool = False) -> None:
        """Put down that a layer gives something else, by chance or by what it remembers."""
        if drew:
            self.put(path, "FK202", f"{message}: it draws random numbers", _RANDOM, by_mode=by_mode)
        else:
            self.put(path, "FK203", message, fix, by_mode=by_mode)

    def put(self, path: str, code: str, message: str, fix: str, *, by_mode: bool = False) -> None:
        """Put down what was seen of a layer, once.

        Args:
            path: the layer, by its name inside.
            code: of the finding.
            message: what was seen.
            fix: what to do, should it not be the mode that does it.
            by_mode: whether it does not happen in eval mode.
        """
        if self.has(path):
            return
        if by_mode and self.sample.modes.get(path):
            self.found.append((path, Seen(code, f"{message}; in train mode", _HOLD, _TRAIN)))
        else:
            self.found.append((path, Seen(code, message, fix, None)))

    def has(self, path: str) -> bool:
        """Tell whether something was seen of a layer."""
        return any(path == other for other, _ in self.found)

    def replay(
        self, first: nn.Module, one: Sample, second: nn.Module, other: Sample, batch: int | None = None
    ) -> dict[str, Blame]:
        """Return the layers that do otherwise in a second run, which has the first's random numbers.

        One copy run twice goes on with the random numbers instead.
        """
        with nullcontext() if second is first else random_states(self.devices):
            recording = Recording(first, one.inputs())
        return replayed(second, other.inputs(), recording, self.error, self.randomness, batch)

    def make(self, modes: dict[str, bool]) -> nn.Module:
        """Return a fresh copy of the layer in some modes."""
        return self.replica.make(modes, shared=self.shares(self, modes))

    def call(self, copy: nn.Module, sample: Sample) -> Any:
        """Return what a copy gives, in memory of its own."""
        args, kwargs = sample.inputs()
        return cloned(copy(*args, **kwargs))

    def randomness(self) -> bytes:
        """Return a digest of the random states."""
        return randomness(self.devices)

    def unnoticed(self, sample: Sample) -> AbstractContextManager[None]:
        """Run under the conditions of a sample."""
        return unnoticed(sample, self.model, self.devices)


def _uses_batch(module: nn.Module) -> bool:
    """Tell whether a layer that mixes rows in eval mode too normalises by the batch."""
    names = " ".join(kind.__name__ for kind in type(module).__mro__ if kind is not nn.Module)
    if "Batch" in names or "BN" in names:
        return True
    return is_norm(module) and not any(word in names for word in ("Layer", "Group", "Instance", "RMS"))
