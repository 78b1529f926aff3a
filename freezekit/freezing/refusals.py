"""Refusals: what cannot be frozen, found out before anything is changed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from freezekit.errors import FreezekitError, SelectionError

__all__ = ["refuse_impossible", "refuse_lone_buffers", "refuse_shared", "refuse_unknown"]


def refuse_impossible(modules: dict[str, nn.Module], frozen: set[int], held: Container[int]) -> None:
    """Refuse layers that would move or depend on the batch even when held in eval mode.

    Args:
        modules: all of the model, by name.
        frozen: ids of the modules that are to be held, or have a tensor that is to be frozen.
        held: ids of those to be held.
    """
    for name, module in modules.items():
        if id(module) not in frozen:
            continue
        kind = type(module).__name__
        if id(module) in held and isinstance(module, _BatchNorm) and module.running_mean is None:
            raise FreezekitError(
                "a BN layer without running statistics normalises by the batch even in eval mode, so it "
                "cannot be frozen",
                where=name,
                got=f"{kind}(track_running_stats=False)",
                remedy="leave it out, or give it statistics (track_running_stats=True) and calibrate them",
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise FreezekitError(
                "a scripted module has its mode compiled in and cannot be held in eval mode",
                where=name,
                got=kind,
                remedy="freeze the module that was scripted, and use it as it is or through torch.jit.trace",
            )
        node = _node_in_train_mode(module) if id(module) in held else None
        if node is not None:
            raise FreezekitError(
                "a traced graph has train mode written into it and cannot be held in eval mode",
                where=name,
                got=node,
                remedy="trace or export the model in eval mode, or freeze it first and trace it then",
            )
        if _is_uninitialised(module):
            raise FreezekitError(
                "a lazily initialised layer has no values to freeze yet",
                where=name,
                got=kind,
                remedy="run one batch through the model first",
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise FreezekitError(
                "an embedding with max_norm rewrites its weight in eval mode too, so it cannot be frozen",
                where=name,
                got=f"max_norm={module.max_norm}",
                remedy="renormalise the weight once and set max_norm to None, or leave the layer out",
            )
        if id(module) in held and module.training and not _only_sets_mode(module):
            raise FreezekitError(
                "this class has a train() of its own, which may do more than set the mode",
                where=name,
                got=f"{kind} in train mode",
                remedy="call model.eval() first, so that it is frozen as eval mode leaves it",
            )


def _node_in_train_mode(module: nn.Module) -> str | None:
    """Find a call in a graph that drops out or normalises by the batch, whatever mode the module is in."""
    if not isinstance(module, GraphModule):
        return None
    # torchvision's feature extractors change over to a second graph in train mode.
    graphs = (module.graph, getattr(module, "train_graph", module.graph))
    for node in (node for graph in graphs for node in graph.nodes if node.op == "call_function"):
        target: Any = node.target
        schema = getattr(target, "_schema", None)
        try:
            names = (
                [a.name for a in schema.arguments] if schema else list(inspect.signature(target).parameters)
            )
        except (TypeError, ValueError):  # a builtin
            names = []
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
        # Attention is given a probability instead of a mode.
        live = given.get("training", given.get("train", "dropout_p" in given))
        if live is True and given.get("p", given.get("dropout_p")) != 0:
            return f"{node.name} = {node.target}"
    return None


def _is_uninitialised(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return bool(module.has_uninitialized_params())
    # How a codebook notes that a first batch has set its values, which happens in eval mode too.
    initialised = module._buffers.get("initted")
    return initialised is not None and not initialised.is_meta and not bool(initialised.all())


def _only_sets_mode(module: nn.Module) -> bool:
    """Tell whether ``train()`` does no more than set the mode, as transformers' does without its kernels."""
    train = type(module).train
    if train.__qualname__ == "PreTrainedModel.train" and train.__module__.startswith("transformers."):
        return not getattr(module, "use_kernels", True)
    return train is nn.Module.train


_DRAWS = re.compile("Drop|StochasticDepth|RReLU")
"""Classes, of torch and of libraries, that draw random numbers in train mode and have no tensors."""


def refuse_shared(
    modules: dict[str, nn.Module],
    tensors: list[tuple[str, nn.Module, str, Tensor]],
    chosen: set[str],
    held: Collection[int],
) -> None:
    """Refuse what is on both sides of the cut, where freezing one side would silently freeze the other."""
    draws = {kind for kind in map(type, modules.values()) if _DRAWS.search(kind.__name__)}

    def sides() -> Iterator[tuple[str, Tensor | nn.Module]]:
        yield from ((name, tensor) for name, _, _, tensor in tensors)
        yield from ((name, m) for name, m in modules.items() if type(m) in draws and id(m) in held)

    frozen = {id(thing): name for name, thing in sides() if name in chosen}
    for name, thing in sides():
        if name not in chosen and id(thing) in frozen:
            kind = "dropout layer"
            if isinstance(thing, Tensor):
                kind = "parameter" if isinstance(thing, nn.Parameter) else "buffer"
            raise SelectionError(
                f"backbone and head share a {kind}: it cannot be frozen in one and train in the other",
                where="model",
                got=f"{frozen[id(thing)]} is {name}",
                remedy="say by name what is to be frozen, for example freezekit.freeze(model, "
                f"{frozen[id(thing)].partition('.')[0]!r}), which freezes it everywhere",
            )


def refuse_lone_buffers(
    tensors: list[tuple[str, nn.Module, str, Tensor]],
    chosen: set[str],
    held: dict[int, nn.Module],
    *,
    complement: bool,
) -> None:
    """Refuse buffers that nothing would keep in place, their layer not being frozen whole."""
    for name, owner, own, _ in tensors:
        if own not in owner._buffers or name not in chosen or id(owner) in held:
            continue
        if complement and owner._modules:
            continue  # beside the head, in the module that holds both: part of the backbone all the same
        raise SelectionError(
            "a buffer moves with its layer and cannot be frozen without it",
            where="names",
            got=repr(name),
            remedy=f"name the layer, {name.rpartition('.')[0]!r}, or both it and its parameters",
        )


def refuse_unknown(bn: object, convert: object, hold: object) -> None:
    """Refuse what ``bn=``, ``convert=`` and ``hold=`` do not know."""
    for where, got, known in (
        ("bn=", bn, ("freeze", "freeze_stats", "train")),
        ("convert=", convert, (None, "affine", "fold")),
        ("hold=", hold, ("all", "norm")),
    ):
        if got not in known:
            raise FreezekitError(
                "no such choice",
                where=where,
                got=repr(got),
                remedy="give one of " + ", ".join(map(repr, known)),
            )
