"""pytest plug-in: guards a training step. Every run loads it: big imports come late. PYTEST_DONT_REWRITE."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from freezekit.errors import DriftError, FreezekitError

if TYPE_CHECKING:
    import torch

    from freezekit.audit.live.monitor import DriftAuditor

__all__ = ["NotFrozenError", "assert_frozen", "frozen"]


class NotFrozenError(DriftError, AssertionError):
    """What a test guards moved, or does something else than when it was frozen; ``report`` says what."""


class assert_frozen:  # noqa: N801  # it reads as an assertion, like pytest.raises
    """Fail unless what is frozen in a model stays so in the training steps of the ``with`` block.

    It is compared bit for bit, and run again after each step. An error of the block's own comes first.

    Args:
        model: the model.
        optimizer: whose steps are meant; by default of any that has parameters of the model. To be given
            where it has none: for a frozen teacher, a backbone beside its head.
        frozen: names or globs of the frozen layers and tensors, if it cannot be told by ``requires_grad``.
        probe: run the frozen layers again after every so many steps; ``None`` compares their state alone.

    Raises:
        NotFrozenError: something frozen moved, normalises by the batch, drops out, or gives something else.
        FreezekitError: nothing is frozen, or no step was made: a forward alone is no training step.
        SelectionError: a pattern in ``frozen`` matches nothing.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> _ = model[0].requires_grad_(False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with assert_frozen(model):
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()

    Source: torch.optim.Optimizer.register_step_post_hook; torch.nn.BatchNorm2d on running statistics.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None,
        frozen: str | Iterable[str] | None = None, *, probe: int | None = 1,
    ) -> None:  # fmt: skip
        __tracebackhide__ = True
        from freezekit.audit.live.monitor import DriftAuditor

        try:
            self._auditor = DriftAuditor(model, optimizer, frozen, 1, "record", watch="all", probe=probe)
        except FreezekitError as error:
            raise error.with_traceback(None) from None  # shown at the user's line, not at ours
        self._entered = False

    def __enter__(self) -> DriftAuditor:
        self._entered = True
        return self._auditor.attach()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        __tracebackhide__ = True
        self._auditor.__exit__(kind)
        if kind is None and (failure := self._failure()):
            raise failure

    def _failure(self) -> FreezekitError | None:
        report = self._auditor.report()
        # dropout is no error in a report, as somebody may want it; they have probe=None
        codes = sorted({f.code for f in report.findings if f.level == "error" or f.code == "FK202"})
        kind = type(self._auditor.model).__name__
        if codes:
            text = str(report).partition("\n")[2] if report.clean else str(report)
            return NotFrozenError(f"{kind} did not stay frozen ({', '.join(codes)})\n{text}", report)
        remedy = "train while it is guarded; give optimizer= if that has no parameter of the model"
        none = FreezekitError("no optimizer step was seen, so nothing was guarded", where=kind, remedy=remedy)
        return None if self._auditor.step else none

    def __del__(self) -> None:
        if not getattr(self, "_entered", True):
            warnings.warn("guards nothing; use: with assert_frozen(model):", RuntimeWarning, stacklevel=2)


_GUARDS = pytest.StashKey[list[assert_frozen]]()


@pytest.fixture
def frozen(request: pytest.FixtureRequest) -> Iterator[Callable[..., DriftAuditor]]:
    """Guard a model from ``frozen(model)`` to the test's end; it takes what :class:`assert_frozen` takes."""
    guards = request.node.stash[_GUARDS] = []

    def guard(*args: Any, **kwargs: Any) -> DriftAuditor:
        __tracebackhide__ = True
        guards.append(assert_frozen(*args, **kwargs))
        return guards[-1].__enter__()

    yield guard
    for one in guards:
        one.__exit__(BaseException)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Look at the end of the test, so that the test fails, not its teardown; unless it did by itself."""
    yield
    guards = item.stash.get(_GUARDS, None)
    said = [str(failure) for guard in guards or () if (failure := guard._failure())]
    if guards == []:
        said = ["frozen was not called, so nothing was guarded. Remedy: frozen(model)"]
    if said:
        pytest.fail("\n\n".join(said), pytrace=False)
