"""A second run of a frozen layer, on a copy, that the training loop cannot notice."""

from __future__ import annotations

import copy
import hashlib
import random
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from freezekit.audit.live.sample import Sample
from freezekit.audit.live.structures import NotProbedError

__all__ = ["Replica", "is_compiled", "random_states", "randomness", "unnoticed"]

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks",
    "_global_backward_pre_hooks",
)  # fmt: skip
_NOBODY = torch.distributed.GroupMember.NON_GROUP_MEMBER if torch.distributed.is_available() else None
"""A process group of which this process is no member: a layer that is given it talks to nobody."""
_WRAPPERS = ("FullyShardedDataParallel", "DistributedDataParallel", "DataParallel")


class Replica:
    """Makes copies of one layer; the frozen parameters are shared, not copied, where its forward only reads.

    Args:
        layer: the layer to copy; it is never run or written to.
        model: the model that it is part of.

    Raises:
        NotProbedError: a copy could not be told from the original, or would have to speak to other processes.
    """

    def __init__(self, layer: nn.Module, model: nn.Module) -> None:
        self.layer = layer
        self.model = model
        for part in layer.modules():
            _refuse(part)

    def make(self, modes: dict[str, bool], *, shared: bool) -> nn.Module:
        """Return a fresh copy.

        Args:
            modes: ``training`` of each module in it.
            shared: with the very parameters instead of copies.

        Raises:
            NotProbedError: it cannot be copied.
        """
        memo: dict[int, Any] = {}
        for own in self.model.parameters():
            memo[id(own)] = own  # those of the rest of the model, should the layer refer to it
        for part in self.layer.modules():
            for name in _HOOKS:
                hooks = part.__dict__.get(name)
                if hooks:
                    memo[id(hooks)] = _own_hooks(hooks)
            if "process_group" in part.__dict__:
                memo[id(part.process_group)] = part.process_group  # it cannot be copied
            for parameter in part._parameters.values() if not shared else ():
                memo.pop(id(parameter), None)
            _detach(part.__dict__, memo)
        try:
            made = copy.deepcopy(self.layer, memo)
        except Exception as reason:
            raise NotProbedError(f"cannot be copied: {_short(reason)}") from reason
        for path, part in made.named_modules():
            if part.training != modes.get(path, part.training):
                part.training = modes[path]
            if type(part) is nn.SyncBatchNorm:
                part.__class__ = _LocalBatchNorm
            elif _is_own_sync(part):
                part.process_group = _NOBODY
        return made

    def writes(self, used: nn.Module) -> bool:
        """Tell whether a run wrote to the parameters of a copy that was not shared."""
        for part, other in zip(self.layer.modules(), used.modules(), strict=False):
            for name, parameter in part._parameters.items():
                now = other._parameters.get(name)
                if parameter is None or now is None:
                    continue
                if now._version or not torch.equal(_bits(parameter), _bits(now)):
                    return True
        return False


class _LocalBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm of this process alone: one that waits for the others would wait for ever."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = nn.modules.batchnorm._BatchNorm.forward(self, input)
        return output

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def _is_own_sync(part: nn.Module) -> bool:
    """Tell whether it is freezekit's own SyncBatchNorm, which this arm must not import."""
    return (type(part).__module__, type(part).__qualname__) == (
        "freezekit.nn.sync_batchnorm",
        "SyncBatchNorm",
    )


def is_compiled(module: nn.Module) -> bool:
    """Tell whether torch.compile was put on this very module."""
    return (
        type(module).__name__ == "OptimizedModule" or module.__dict__.get("_compiled_call_impl") is not None
    )


def _refuse(part: nn.Module) -> None:
    kind = type(part).__name__
    if isinstance(part, torch.jit.ScriptModule):
        raise NotProbedError("scripted")
    if kind in _WRAPPERS:
        raise NotProbedError(f"holds a {kind}, whose forward speaks to other processes")
    for tensor in (*part._parameters.values(), *part._buffers.values()):
        if tensor is not None and is_lazy(tensor):
            raise NotProbedError("lazy")
        if hasattr(tensor, "device_mesh"):
            raise NotProbedError("spread over several processes")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    local = type(part) is nn.SyncBatchNorm or _is_own_sync(part)
    if distributed and part.training and "Sync" in kind and not local:
        raise NotProbedError(f"holds a {kind} in train mode, which speaks to other processes")
    for name, held in vars(part).items():
        if isinstance(held, types.FunctionType) and _reaches_module(held):
            raise NotProbedError(f"{name} was put on it and refers to the original")


def _reaches_module(function: types.FunctionType) -> bool:
    """Tell whether a function put on a module holds a module: of a copy, it would run the original."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    held = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return any(isinstance(getattr(item, "__self__", item), nn.Module) for item in held)


def _filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _own_hooks(hooks: OrderedDict[int, Any]) -> OrderedDict[int, Any]:
    """Return the hooks by which torch itself makes a weight (old weight_norm, pruning), not the user's."""
    kept = {key: hook for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils.")}
    return OrderedDict((key, copy.copy(hook)) for key, hook in kept.items())


def _detach(held: Any, memo: dict[int, Any]) -> None:
    """Provide for the tensors that came out of a graph: they cannot be deep-copied."""
    for value in held.values() if isinstance(held, dict) else held:
        if isinstance(value, Tensor) and value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
        elif type(value) in (list, tuple, dict):
            _detach(value, memo)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().nan_to_num() if tensor.is_floating_point() else tensor.detach()


def _short(reason: BaseException) -> str:
    line = str(reason).strip().partition("\n")[0]
    return f"{type(reason).__name__}: {line[:120]}" if line else type(reason).__name__


@contextmanager
def unnoticed(sample: Sample, model: nn.Module, devices: set[torch.device]) -> Iterator[None]:
    """Run under the conditions of a sample, and leave nothing of it behind.

    Args:
        sample: whose conditions.
        model: none of whose own modules may be called meanwhile.
        devices: whose random states to put back.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(random_states(devices))
        stack.enter_context(_only_copies(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_same_kernels())
        for kind in {"cpu", *(device.type for device in devices)} - {"meta"}:
            dtype = sample.autocast.get(
                kind
            )  # no cache: it would outlive the copy inside the loop's autocast
            stack.enter_context(torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False))
        yield


@contextmanager
def random_states(devices: set[torch.device]) -> Iterator[None]:
    """Put back the random states of torch, Python and numpy.

    Args:
        devices: beside the CPU.
    """
    numpy = sys.modules.get("numpy")
    python = random.getstate()
    arrays = numpy.random.get_state() if numpy else None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices} - {"cpu", "meta"}:
            numbers = [device.index or 0 for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=numbers, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(arrays)


@contextmanager
def _only_copies(model: nn.Module) -> Iterator[None]:
    """Put hooks on all modules aside, and stop a copy that calls the original's layers."""
    tables = [getattr(torch_module, name) for name in _GLOBAL_HOOKS]
    held = [dict(table) for table in tables]
    originals = {id(part) for part in model.modules()}

    def guard(module: nn.Module, _: Any) -> None:
        if id(module) in originals:
            raise NotProbedError("its copy calls the original's layers")

    for table in tables:
        table.clear()
    handle = torch_module.register_module_forward_pre_hook(guard)
    try:
        yield
    finally:
        handle.remove()
        for table, hooks in zip(tables, held, strict=True):
            table.clear()
            table.update(hooks)


@contextmanager
def _same_kernels() -> Iterator[None]:
    """Keep the same inputs from being computed in two ways.

    torch's attention takes other kernels in eval mode, which also blank what is masked, and cuDNN those that
    it finds fastest.
    """
    cudnn, mha = torch.backends.cudnn, torch.backends.mha
    fast, benchmark, deterministic = mha.get_fastpath_enabled(), cudnn.benchmark, cudnn.deterministic
    mha.set_fastpath_enabled(False)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        mha.set_fastpath_enabled(fast)
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic


def randomness(devices: set[torch.device]) -> bytes:
    """Return a digest of all random states: where it moved, something was drawn."""
    digest = hashlib.blake2b(torch.get_rng_state().numpy().tobytes())
    digest.update(str(hash(random.getstate())).encode())
    if numpy := sys.modules.get("numpy"):
        name, keys, *rest = numpy.random.get_state()
        digest.update(keys.tobytes() + repr((name, rest)).encode())
    for device in sorted(devices, key=str):
        if device.type not in ("cpu", "meta"):
            digest.update(getattr(torch, device.type).get_rng_state(device).numpy().tobytes())
    return digest.digest()
