"""Which layer inside a frozen part it is whose output differs between two runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from freezekit.audit.live.structures import Difference, axes, cloned, compare, leaves, rebuilt, share

__all__ = ["Blame", "Recording", "replayed"]


@dataclass(frozen=True, slots=True)
class Blame:
    """A layer whose output differs although what it was given does not.

    Args:
        difference: how much.
        drew: whether its own code drew random numbers.
    """

    difference: Difference
    drew: bool


@dataclass(slots=True)
class _Call:
    path: str
    given: Any
    gave: Any = None
    aligned: bool = True
    blamed: bool = False
    drew: bool = False


class Recording:
    """A run of a copy, with what every module in it was given and gave.

    Args:
        copy: the copy; it is run once here and has hooks afterwards.
        inputs: its args and kwargs.
    """

    def __init__(self, copy: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        self.calls: dict[str, list[_Call]] = defaultdict(list)
        open_: list[_Call] = []
        handles = []
        for path, module in copy.named_modules():

            def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                call = _Call(path, cloned((args, kwargs)))
                self.calls[path].append(call)
                open_.append(call)

            def after(_: nn.Module, args: Any, output: Any) -> None:
                open_.pop().gave = cloned(output)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        copy(*inputs[0], **inputs[1])
        for handle in handles:
            handle.remove()


def replayed(
    copy: nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    recording: Recording,
    error: float,
    randomness: Callable[[], bytes],
    batch: int | None = None,
) -> dict[str, Blame]:
    """Run a copy again and return the layers that do otherwise than recorded, by name.

    After each layer the recorded output goes on in place of the other, so that every layer is judged by
    itself: a second fault shows as clearly as the first, and one fault is not seen in all that follows it.

    Args:
        copy: the copy to run; it has hooks meanwhile.
        inputs: its args and kwargs.
        recording: the run to compare with.
        error: how far rounding may go.
        randomness: gives a digest of the random states.
        batch: size of the batch, where only sample 0 is to be the same.
    """
    return _Replay(copy, recording, error, randomness, batch).run(inputs)


class _Replay:
    def __init__(
        self,
        copy: nn.Module,
        recording: Recording,
        error: float,
        randomness: Callable[[], bytes],
        batch: int | None,
    ) -> None:
        self.copy, self.recording, self.error, self.batch = copy, recording, error, batch
        self.randomness = randomness
        self.seen = randomness()
        self.open: list[_Call | None] = []
        self.counts: dict[str, int] = defaultdict(int)
        self.blames: dict[str, Blame] = {}

    def run(self, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Blame]:
        handles = []
        for path, module in self.copy.named_modules():

            def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> Any:
                return self.before(path, args, kwargs)

            def after(_: nn.Module, args: Any, output: Any) -> Any:
                return self.after(output)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        self.copy(*inputs[0], **inputs[1])
        for handle in handles:
            handle.remove()
        return self.blames

    def before(self, path: str, args: Any, kwargs: Any) -> Any:
        self.draw()
        above = self.open[-1] if self.open else None
        number = self.counts[path]
        self.counts[path] += 1
        known = self.recording.calls.get(path, [])
        if number >= len(known):
            self.open.append(None)  # it was not called, or not so often: whoever called it will show it
            return None
        call = known[number]
        call.aligned, call.blamed, call.drew = True, False, False
        self.open.append(call)
        difference = compare(call.given, (args, kwargs), self.error, self.batch)
        if difference is None:
            return None
        if self.batch is not None:
            call.aligned = False  # mixed by what is above, or only laid out otherwise: the output above tells
            return None
        if above is not None:
            self.blame(above, difference)
        return cloned(call.given)

    def after(self, output: Any) -> Any:
        self.draw()
        call = self.open.pop()
        above = self.open[-1] if self.open else None
        if call is None:
            return None
        difference = compare(call.gave, output, self.error, self.batch) if call.aligned else None
        if difference is not None and not (self.batch is not None and call.blamed):
            self.blame(call, difference)
        if above is not None and call.blamed:
            above.blamed = True
        if difference is None or any(type(a) is not type(b) for a, b in self.pairs(call, output)):
            return None
        recorded = iter([leaf for leaf in leaves(call.gave) if isinstance(leaf, Tensor)])
        return rebuilt(output, lambda tensor: self.forced(tensor, next(recorded)))

    def pairs(self, call: _Call, output: Any) -> list[tuple[Any, Any]]:
        old, new = leaves(call.gave), leaves(output)
        return list(zip(old, new, strict=True)) if len(old) == len(new) else [(None, 0)]

    def forced(self, tensor: Tensor, recorded: Tensor) -> Tensor:
        if self.batch is None:
            return recorded.clone()
        made = tensor.clone()
        if tensor.shape == recorded.shape:
            for axis in axes(tensor, self.batch)[:1]:
                share(made, self.batch, axis).copy_(share(recorded, self.batch, axis))
        return made

    def blame(self, call: _Call, difference: Difference) -> None:
        call.blamed = True
        before = self.blames.get(call.path)
        drew = call.drew or (before is not None and before.drew)
        if before is not None and before.difference.size >= difference.size:
            difference = before.difference
        self.blames[call.path] = Blame(difference, drew)

    def draw(self) -> None:
        """Put down what was drawn since the last look to the layer that was running."""
        now = self.randomness()
        if now != self.seen and self.open and (call := self.open[-1]) is not None:
            call.drew = True
            if call.path in self.blames:
                self.blame(call, self.blames[call.path].difference)
        self.seen = now
