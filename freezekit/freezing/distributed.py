"""What torch.distributed does to a model: wrappers that know what trained when they were made, and shards."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from freezekit.errors import FreezekitError
from freezekit.freezing import holding
from freezekit.freezing.selection import tensors_of

__all__ = ["changes_told", "full", "reshard"]


class _Wrapped:
    """Forward pre-hook of a wrapper, once it is known that what trains has changed since it was made."""

    def __init__(self) -> None:
        self.trained: dict[str, bool] = {}
        """Of the parameters that freezing or unfreezing has changed: whether they trained at the wrapping."""

    def __call__(self, wrapper: Any, args: Any) -> None:
        """Refuse a forward pass that is to train what the wrapper does not know, or no longer what it knows.

        Raises:
            FreezekitError: other parameters train than at the wrapping.
        """
        if not torch.is_grad_enabled():
            return
        trains = {name: p.requires_grad for name, p in wrapper.module.named_parameters()}
        for trained, fault in (
            (False, "it would not synchronise what was unfrozen since it was made"),
            (True, "it would wait for gradients of what was frozen since it was made"),
        ):
            other = [n for n, was in self.trained.items() if was is trained and trains.get(n) is not was]
            if other:
                raise FreezekitError(
                    fault,
                    where="DistributedDataParallel",
                    got=f"{len(other)} parameter{'s' * (len(other) > 1)}, from {other[0]!r}",
                    remedy="wrap the model anew after freezing or unfreezing, on every rank: "
                    "ddp = DistributedDataParallel(ddp.module)",
                )


def _in_use() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def changes_told(model: nn.Module) -> Iterator[None]:
    """Tell each ``DistributedDataParallel`` around the model what begins or ceases to train in the block.

    It refuses its next forward pass with gradients then, unless all is again as it was when it was made.
    """
    if not _in_use():
        yield
        return
    reshard(model)
    # What somebody has set to train although it is frozen has begun to do so unknown to any wrapper, too.
    before = {
        id(t): t.requires_grad and not holding.holders_of(owner, own)
        for _, owner, own, t in tensors_of(model)
        if isinstance(t, nn.Parameter)
    }
    try:
        yield
    finally:
        now = {id(p): p.requires_grad for p in model.parameters()}
        changed = {key: was for key, was in before.items() if now.get(key, was) is not was}
        for wrapper in _wrappers() if changed else ():
            _tell(wrapper, changed)
        _drop_gathered(model)


def _wrappers() -> list[DistributedDataParallel]:
    """Return all wrappers there are: neither a model nor its parameters know of them."""
    kinds = [DistributedDataParallel]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return [each for each in gc.get_referrers(*kinds) if type(each) in kinds]


def _tell(wrapper: DistributedDataParallel, changed: dict[int, bool]) -> None:
    ignored = wrapper.parameters_to_ignore
    named = wrapper.module.named_parameters()
    trained = {n: changed[id(p)] for n, p in named if id(p) in changed and n not in ignored}
    if not trained:
        return
    hook = next((h for h in wrapper._forward_pre_hooks.values() if isinstance(h, _Wrapped)), None)
    if hook is None:
        hook = _Wrapped()
        wrapper.register_forward_pre_hook(hook)
    hook.trained = trained | hook.trained  # what was first is what was at the wrapping


def reshard(model: nn.Module) -> None:
    """Have the modules of ``fully_shard`` show their sharded parameters, of which the others are made.

    Raises:
        FreezekitError: parameters were laid together into one, of which no part can be frozen.
    """
    for name, module in model.named_modules() if _in_use() else ():
        if "_flat_param" in module._parameters:
            raise FreezekitError(
                "FullyShardedDataParallel has made one parameter of all in here, to be frozen as one",
                where=name or type(module).__name__,
                got="use_orig_params=False",
                remedy="shard with torch.distributed.fsdp.fully_shard, or give use_orig_params=True",
            )
        if holding.is_sharded(module):
            module.reshard()


def _drop_gathered(model: nn.Module) -> None:
    """Drop the gradients that ``fully_shard`` keeps back for parameters which no longer train.

    They come from ``set_requires_gradient_sync(False)``, would become ``.grad`` of the shards at the next
    backward pass, and are nowhere else to be found.
    """
    for module in model.modules():
        state: Any = module._get_fsdp_state() if holding.is_sharded(module) else None  # type: ignore[operator]
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for each in (p for group in groups for p in getattr(group, "fsdp_params", ())):
            if not each.sharded_param.requires_grad:
                if "unsharded_accumulated_grad" in vars(each):  # in torch 2.15 it is the one below
                    each.unsharded_accumulated_grad = None
                if hasattr(each, "_unsharded_param"):
                    each._unsharded_param.grad = None


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor of which each rank has a part; every rank has to call it."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    with torch.no_grad():
        # What is offloaded lies on the CPU, where the group of its mesh cannot gather it.
        whole: Tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return whole
