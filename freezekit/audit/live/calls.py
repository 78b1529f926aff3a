"""The calls of torch that reach frozen tensors, as they are wrapped while somebody watches."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from freezekit.audit.live.evidence import Recorder

__all__ = ["callees", "recorders", "wrap_call", "wrap_setattr", "wrappers"]

recorders: list[Recorder] = []
"""Who watches; as a rule nobody, or one."""

callees: dict[int, tuple[Recorder, ...]] = {}
"""Whose forwards are watched, by the module's ``id``, and by whom."""

_busy: list[str] = []


def wrap_setattr(kind: type[nn.Module], original: Any) -> Any:
    """Wrap how attributes of a class of modules are set."""
    compiling = torch.compiler.is_compiling

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:  # noqa: N807
        if recorders and type(self) is kind and not compiling():
            for recorder in recorders:
                recorder.set(self, name, value)
        if original is None:
            super(kind, self).__setattr__(name, value)
        else:
            original(self, name, value)

    return __setattr__


def wrap_call(kind: type[nn.Module], original: Any) -> Any:
    """Wrap the call of a class of modules; a forward hook would make ``torch.compile`` warn."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        def call() -> Any:
            if original is not None:
                return original(self, *args, **kwargs)
            return super(kind, self).__call__(*args, **kwargs)  # type: ignore[misc]

        if _is_traced() or type(self) is not kind:
            return call()
        for recorder in callees.get(id(self), ()):
            call = functools.partial(recorder.watched_call, self, call)
        return call()

    return __call__


def _is_traced() -> bool:
    """Tell whether what is computed now becomes part of a graph, or goes through somebody's mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _around(kind: str, target: Callable[[Any], Any], original: Any) -> Any:
    """Wrap a method that writes to a model: what is inside ``target(self)`` is compared before and after."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _busy or not recorders or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        _busy.append(kind)  # what it calls for the parts of the model is the same call
        try:
            module = target(self)
            held = [(recorder, recorder.before(module)) for recorder in recorders]
            try:
                return original(self, *args, **kwargs)
            finally:
                what = f"{type(self).__name__}.{original.__name__}"
                for recorder, before in held:
                    recorder.after(kind, what, before)
        finally:
            _busy.pop()

    return method


def _wrap_collective(given: Callable[..., Any], original: Any) -> Any:
    """Wrap what sends tensors between processes; ``given`` tells those written to from its arguments."""

    @functools.wraps(original)
    def collective(*args: Any, **kwargs: Any) -> Any:
        if _busy or not recorders or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        written = given(*args, **kwargs)
        tensors = [written] if isinstance(written, Tensor) else list(written or ())
        held = [(recorder, recorder.collectives.before(tensors)) for recorder in recorders]
        waited = not kwargs.get("async_op", False)
        _busy.append("broadcast")
        try:
            return original(*args, **kwargs)
        finally:
            _busy.pop()
            for recorder, before in held:
                if before is not None:
                    recorder.sent(original.__name__.strip("_"), before, waited)

    return collective


def _argument(at: int, name: str, *args: Any, **kwargs: Any) -> Any:
    return args[at] if len(args) > at else kwargs.get(name)


def _buffers(parallel: Any) -> Any:
    return parallel.modules_buffers


#: collective -> where its call has the tensors it writes to, by position and by name
_COLLECTIVES = {
    "broadcast": (0, "tensor"), "all_reduce": (0, "tensor"), "reduce": (0, "tensor"), "recv": (0, "tensor"),
    "all_reduce_coalesced": (0, "tensors"), "_broadcast_coalesced": (1, "tensors"),
    "all_gather": (0, "tensor_list"), "all_gather_into_tensor": (0, "output_tensor"),
    "gather": (1, "gather_list"), "scatter": (0, "tensor"), "reduce_scatter": (0, "output"),
    "reduce_scatter_tensor": (0, "output"), "all_to_all": (0, "output_tensor_list"),
    "all_to_all_single": (0, "output"),
}  # fmt: skip


def wrappers() -> list[tuple[Any, str, Callable[[Any], Any]]]:
    """Return what is wrapped: where it is, its name, and what makes the wrapper."""

    def itself(module: Any) -> Any:
        return module

    around = functools.partial
    found: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (nn.Module, "load_state_dict", around(_around, "load_state_dict", itself)),
        (nn.Module, "_apply", around(_around, "move", itself)),
        (AveragedModel, "update_parameters", around(_around, "averaging", itself)),
    ]
    timm = sys.modules.get("timm.utils.model_ema")
    for name, inside in (("ModelEma", "ema"), ("ModelEmaV2", "module"), ("ModelEmaV3", "module")):
        for method in ("update", "set"):
            if callable(vars(getattr(timm, name, object)).get(method)):
                held = functools.partial(_attribute, inside)
                found.append((getattr(timm, name), method, around(_around, "averaging", held)))
    dist = torch.distributed
    for name, given in _COLLECTIVES.items() if dist.is_available() else ():
        if hasattr(dist, name):
            wrapper = functools.partial(_wrap_collective, functools.partial(_argument, *given))
            found.append((dist, name, wrapper))
    if dist.is_available():
        # it sets torch's counters of writes back afterwards
        parallel = nn.parallel.DistributedDataParallel
        found.append((parallel, "_sync_buffers", functools.partial(_wrap_collective, _buffers)))
    return found


def _attribute(name: str, holder: Any) -> Any:
    return getattr(holder, name)
