"""The live auditor: watches a model's frozen part during training, by value."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from freezekit.audit import drift
from freezekit.audit.findings import DriftReport, Finding
from freezekit.audit.state import DTYPE_SIZES, Role, StateTable, TensorState
from freezekit.errors import DriftError, DriftWarning, FreezekitError
from freezekit.patterns import select

__all__ = ["DriftAuditor"]

OnDrift = Literal["raise", "warn", "record"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DriftAuditor:
    """Compares the frozen part of a model, every parameter and buffer, bit for bit, as training goes on.

    It works on any model, whoever froze it and however: by default whatever does not require a gradient
    counts as frozen, with the buffers beside it. What is frozen, and the state to compare with, is that at
    construction: make a new auditor after unfreezing something. As a context manager, or between
    :meth:`attach` and :meth:`detach`, it checks by itself after every optimizer step, so the loop needs no
    change.

    Args:
        model: the model.
        optimizer: whose steps to follow; by default every optimizer that holds parameters of the model.
        frozen: names or globs of the frozen layers and tensors, if it cannot be told by ``requires_grad``.
        every: check after every so many steps.
        on_drift: ``"raise"`` :class:`~freezekit.DriftError` at the first finding, ``"warn"`` of each new one
            with :class:`~freezekit.DriftWarning`, or only ``"record"`` it for :meth:`report`.

    Raises:
        FreezekitError: nothing in the model is frozen, or an argument is wrong.
        SelectionError: a pattern in ``frozen`` matches nothing.

    >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> _ = model[0].requires_grad_(False)  # not enough
    >>> optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    >>> with DriftAuditor(model, optimizer, on_drift="record") as auditor:
    ...     model(torch.tensor([[0.0, 1.0], [2.0, 3.0]])).sum().backward()
    ...     optimizer.step()
    >>> print(auditor.report().findings[0])
    FK101 0 at step 1: running mean moved by up to 0.2 sigma, spread by x1.05 over 1 batch; in train mode

    Source: torch.optim.Optimizer.register_step_post_hook; torch.nn.BatchNorm2d on running statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        frozen: str | Iterable[str] | None = None,
        every: int = 1,
        on_drift: OnDrift = "raise",
    ) -> None:
        if on_drift not in ("raise", "warn", "record"):
            raise FreezekitError(
                "unknown reaction",
                where="on_drift=",
                got=repr(on_drift),
                remedy="'raise', 'warn' or 'record'",
            )
        if not isinstance(every, int) or every < 1:
            raise FreezekitError(
                "not a number of steps", where="every=", got=repr(every), remedy="give a whole number from 1"
            )
        if not isinstance(model, nn.Module):
            raise FreezekitError(
                "not a model", where="model", got=type(model).__name__, remedy="give a torch.nn.Module"
            )
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise FreezekitError(
                "not an optimizer of torch's kind",
                where="optimizer=",
                got=type(optimizer).__name__,
                remedy="leave it out and call .check() after each step",
            )
        self.model = model
        self.optimizer = optimizer
        self.every = every
        self.on_drift = on_drift
        self.step = 0
        """Optimizer steps seen while attached."""
        current = _tensors(model)
        self._frozen, self._scope, self._notes = _frozen_names(model, current, frozen)
        self._inferred = frozen is None
        self._known = set(current)
        loose = {name.rpartition(".")[0] for name in self._known.difference(self._frozen)}
        self._layers = {name.rpartition(".")[0] for name in self._frozen} - loose
        """Layers that are frozen whole, to which nothing may be added."""
        self._before = {name: current[name][0].detach().clone() for name in self._frozen}
        self._roles = {name: current[name][1] for name in self._frozen}
        self._first: dict[tuple[str, str], int] = {}
        self._modes: dict[str, bool] = {}
        self._hook: Any = None

    def attach(self) -> DriftAuditor:
        """Check after optimizer steps from now on; returns itself."""
        if self._hook is None:
            if self.optimizer is not None:
                self._hook = self.optimizer.register_step_post_hook(self._after_step)
            else:
                self._hook = register_optimizer_step_post_hook(self._after_any_step)
        return self

    def detach(self) -> None:
        """Stop checking by itself; :meth:`check` and :meth:`report` still work."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def check(self) -> list[Finding]:
        """Compare now, react as ``on_drift`` says, and return the findings that are new.

        Raises:
            DriftError: something moved and ``on_drift`` is ``"raise"``.
        """
        current, moved = self._look()
        if not moved:
            return []
        report = self._report(current, moved)
        new = []
        for finding in report.findings:
            key = (finding.code, finding.name)
            if key not in self._first:
                self._first[key] = self.step
                self._modes[finding.name] = _training(self.model, finding.name)
                new.append(self._completed(finding))
        if new and self.on_drift != "record":
            more = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
            if self.on_drift == "raise":
                raise DriftError(f"{new[0]}{more}", self.report(), remedy=new[0].fix)
            warnings.warn(f"{new[0]}{more}. Remedy: {new[0].fix}", DriftWarning, stacklevel=2)
        return new

    def report(self) -> DriftReport:
        """Return the state of things now, with the step at which each finding was first seen."""
        return self._report(*self._look())

    def __enter__(self) -> DriftAuditor:
        return self.attach()

    def __exit__(self, exc_type: type[BaseException] | None, *_: Any) -> None:
        self.detach()
        if exc_type is None:
            self.check()  # what moved after the last step

    def _after_step(self, *_: Any) -> None:
        self.step += 1
        if self.step % self.every == 0:
            self.check()

    def _after_any_step(self, optimizer: Optimizer, *_: Any) -> None:
        ours = {id(parameter) for parameter in self.model.parameters()}
        if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            self._after_step()

    def _look(self) -> tuple[dict[str, tuple[Tensor, Role]], list[str]]:
        """Return the tensors as they are, and the names of those that differ."""
        current = _tensors(self.model)
        return current, [name for name in self._watched(current) if not self._same(name, current.get(name))]

    def _watched(self, current: dict[str, tuple[Tensor, Role]]) -> Iterator[str]:
        """Yield the frozen names, and those added since to a layer that was frozen whole."""
        yield from self._frozen
        yield from (n for n in current if n not in self._known and n.rpartition(".")[0] in self._layers)

    def _same(self, name: str, entry: tuple[Tensor, Role] | None) -> bool:
        before = self._before.get(name)
        return before is not None and entry is not None and _same_bits(before, entry[0])

    def _report(self, current: dict[str, tuple[Tensor, Role]], moved: list[str]) -> DriftReport:
        """Describe the norm layers and whatever moved; the rest is known to be the same already."""
        stats = ("running_mean", "running_var", "num_batches_tracked")
        names = [*self._frozen, *(name for name in moved if name not in self._roles)]
        shown = [n for n in names if n in moved or n.rpartition(".")[2] in stats]
        before = _table({n: (self._before[n], self._roles[n]) for n in shown if n in self._before})
        after = _table({n: current[n] for n in shown if n in current})
        modules = dict(self.model.named_modules(remove_duplicate=False))
        kinds = {name: type(module).__name__ for name, module in modules.items()}
        eps = {name: getattr(module, "eps", 1e-5) for name, module in modules.items()}
        layers, findings, changed = drift.compare(before, after, set(names), kinds=kinds, eps=eps)
        steps = {name: step for (code, name), step in self._first.items() if code in ("FK101", "FK102")}
        return DriftReport(
            f"{type(self.model).__name__} after {self.step} step{'' if self.step == 1 else 's'}",
            "its state when the auditor was made",
            self._scope,
            len(self._frozen),
            tuple(changed),
            tuple(replace(layer, step=steps.get(layer.name)) for layer in layers),
            tuple(self._completed(finding) for finding in findings),
            self._notes,
        )

    def _completed(self, finding: Finding) -> Finding:
        """Add when it was first seen, and that the layer was in train mode then, which is how it moves."""
        train = finding.code in ("FK101", "FK102") and self._modes.get(finding.name, False)
        fix, now = finding.fix, "; it requires a gradient by now"
        # check() completes what a report had already
        message = finding.message.removesuffix(now) + ("; in train mode" if train else "")
        if self._trains_now(finding.name):
            message += now
            fix = "make a new DriftAuditor after unfreezing; if nothing was to be unfrozen, freeze it again"
        return replace(finding, message=message, fix=fix, step=self._first.get((finding.code, finding.name)))

    def _trains_now(self, name: str) -> bool:
        """Tell whether a parameter, or one of a layer, was frozen but requires a gradient now."""
        owner, _, own = name.rpartition(".") if name in self._roles else (name, "", "")
        try:
            parameters = self.model.get_submodule(owner)._parameters
        except AttributeError:
            return False  # the layer is gone
        prefix = f"{owner}." if owner else ""
        watched = [p for key, p in parameters.items() if prefix + key in self._roles and own in ("", key)]
        return self._inferred and any(p is not None and p.requires_grad for p in watched)


def _tensors(model: nn.Module) -> dict[str, tuple[Tensor, Role]]:
    """Return every parameter and buffer by name, non-persistent and tied ones included."""
    found: dict[str, tuple[Tensor, Role]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        is_norm = module._buffers.get("running_mean") is not None
        prefix = f"{path}." if path else ""
        for name, tensor in module._parameters.items():
            if tensor is not None:
                found[prefix + name] = (tensor, "parameter")
        for name, tensor in module._buffers.items():
            if tensor is not None:
                stat = is_norm and name in ("running_mean", "running_var", "num_batches_tracked")
                found[prefix + name] = (tensor, name if stat else "buffer")
    return found


def _frozen_names(
    model: nn.Module, current: dict[str, tuple[Tensor, Role]], frozen: str | Iterable[str] | None
) -> tuple[list[str], str, tuple[str, ...]]:
    """Return the names of the frozen tensors, how that was told, and what could not be told."""
    if frozen is not None:
        return select(frozen, list(current), where="frozen=", kind="layer or tensor"), "as given", ()
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {path: _is_frozen(path, modules) for path in modules}
    names, unclear = [], []
    for name, (tensor, role) in current.items():
        of_frozen_layer = layers[name.rpartition(".")[0]]
        if not tensor.requires_grad if role == "parameter" else of_frozen_layer:
            names.append(name)
        elif role != "parameter" and of_frozen_layer is None:
            unclear.append(name)
    if not names:
        raise FreezekitError(
            "nothing in the model is frozen: every parameter requires a gradient",
            where="model",
            got=type(model).__name__,
            remedy="freezekit.freeze_backbone(model) first, or say what must not move: frozen=[...]",
        )
    notes = []
    if unclear and len(names) < len(current):
        shown = ", ".join(unclear[:3]) + (", ..." if len(unclear) > 3 else "")
        notes.append(f"not watched, as frozen and trained parts surround them: {shown}; name them in frozen=")
    return names, "what does not require a gradient", tuple(notes)


def _is_frozen(path: str, modules: dict[str, nn.Module]) -> bool | None:
    """Tell whether a module's buffers count as frozen; ``None`` if that cannot be told."""
    module = modules[path]
    if isinstance(getattr(type(module), "training", None), property):
        return True  # a class that keeps itself in one mode, as ours do when frozen
    if own := [p.requires_grad for p in module._parameters.values() if p is not None]:
        return not any(own)
    while path:  # without parameters of its own it goes with what is beside it
        path = path.rpartition(".")[0]
        if beside := {p.requires_grad for p in modules[path].parameters()}:
            return None if len(beside) > 1 else not beside.pop()
    return False


def _training(model: nn.Module, layer: str) -> bool:
    try:
        return bool(model.get_submodule(layer).training)
    except AttributeError:
        return False  # the finding is about a tensor


def _same_bits(before: Tensor, now: Tensor) -> bool:
    if before.shape != now.shape or before.dtype != now.dtype or before.layout != now.layout:
        return False
    if before.is_meta or now.is_meta:
        return before.is_meta == now.is_meta
    before, now = _plain(before), _plain(now)
    return before.shape == now.shape and bool(torch.equal(before, now.to(before.device)))


def _plain(tensor: Tensor) -> Tensor:
    """Return the values as integers of the same bits, so that NaN equals NaN and 0.0 differs from -0.0."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_BITS[tensor.element_size()])


def _table(tensors: dict[str, tuple[Tensor, Role]]) -> StateTable:
    return StateTable([_state(name, t, role) for name, (t, role) in tensors.items()], source="model")


def _state(name: str, tensor: Tensor, role: Role) -> TensorState:
    dtype = str(tensor.dtype).removeprefix("torch.")
    unsupported = None if dtype in DTYPE_SIZES else f"values of {dtype} cannot be shown"
    if tensor.is_meta:
        unsupported = "on the meta device, without values"
    return TensorState(name, role, dtype, tuple(tensor.shape), _reader(tensor), unsupported)


def _reader(tensor: Tensor) -> Callable[[], bytes]:
    if tensor.is_meta:
        return bytes
    return lambda: _plain(tensor).cpu().contiguous().numpy().tobytes()
