"""Folding: which BN layers can be folded into the layer before them, found out by tracing a copy."""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from freezekit.freezing import holding
from freezekit.nn.affine import affine_class
from freezekit.nn.folded import FOLDABLE

__all__ = ["Plan", "describe", "make_plan"]

_CONTAINED = {nn.Sequential.forward, nn.ModuleList.forward, nn.ModuleDict.forward}
"""The forwards of containers, whose children may be iterated over instead."""

_WAYS = ((False, False, False), (True, True, False), (False, True, True))
"""(training, with gradients, with every argument given) of each trace."""


@dataclass
class Plan:
    """What ``convert=`` is to do to the BN layers of a freeze.

    Args:
        affine: the BN layers to compute by scale and shift.
        folds: name of a BN -> the layer before it, to fold it into.
        kept: name of a BN -> why it is not computed in the way that was asked for.
    """

    affine: list[nn.Module]
    folds: dict[str, nn.Module]
    kept: dict[str, str]

    def carry_out(self, norms: dict[str, nn.Module]) -> None:
        """Swap the classes, once everything that is to be held is."""
        for norm in self.affine:
            holding.make_affine(norm)
        for name, layer in self.folds.items():
            holding.fold(layer, norms[name])


def make_plan(model: nn.Module, norms: dict[str, nn.Module], convert: str | None) -> Plan | None:
    """Plan the conversion of the BN layers ``norms``, which are to be frozen; nothing is changed yet.

    Args:
        model: the model they are part of.
        norms: the BN layers by name, those other freezes hold already included.
        convert: ``"affine"``, ``"fold"`` or ``None``.
    """
    if convert is None:
        return None
    plan = Plan([], {}, {})
    fresh: dict[str, nn.Module] = {}
    for name, norm in norms.items():
        if holding.is_held(norm):
            if holding.kernel_of(norm) != convert:
                plan.kept[name] = f"frozen before, as {holding.kernel_of(norm)}, and stays so"
        elif affine_class(type(norm)) is None:
            plan.kept[name] = f"{type(norm).__name__} is a BN subclass and keeps its own forward"
        else:
            fresh[name] = norm
    plan.affine = list(fresh.values())
    if convert == "fold" and fresh:
        evidence = _Evidence(model)
        for name, norm in fresh.items():
            found = evidence.layer_before(name, norm)
            if isinstance(found, str):
                plan.kept[name] = found
            else:
                plan.folds[name] = found
    return plan


def describe(kernels: dict[str, str], kept: dict[str, str]) -> list[str]:
    """Return the lines that ``str(handle)`` has on it.

    >>> describe({"bn1": "fold", "bn2": "affine"}, {"bn2": "it is shared: bn2 is bn3"})
    ['BN computed by: fold 1, affine 1', '  bn2: it is shared: bn2 is bn3']
    """
    counts = {kernel: list(kernels.values()).count(kernel) for kernel in ("fold", "affine", "exact")}
    lines = ["BN computed by: " + ", ".join(f"{kernel} {n}" for kernel, n in counts.items() if n)]
    lines += [f"  {name}: {why}" for name, why in list(kept.items())[:3]]
    return lines + ([f"  and {len(kept) - 3} more in .unfolded"] if len(kept) > 3 else [])


class _Tracer(fx.Tracer):
    """Takes every layer for one node; what is made of layers it looks into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layer = isinstance(m, (_NormBase, _ConvNd, nn.Linear)) or type(m).__module__.startswith(
            "freezekit.nn"
        )
        return layer or super().is_leaf_module(m, module_qualified_name)


class _Evidence:
    """The graphs of a model, or of those parts of it that can be traced, under the names of the model.

    A forward may ask for the mode, for gradients, and for arguments left out, and what an unfreeze will wake
    is not known; so it is traced in several ways, which must agree. What is traced is a copy on the meta
    device: the model's own forward never runs on the model, and no parameter or buffer is copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            self.names.setdefault(id(module), []).append(name)
        self.traces: list[dict[str, list[fx.Node]]] = []
        self.kept: set[fx.Node] = set()
        self.obstacle = "the forward that calls it cannot be traced, or none does"
        for training, gradients, given in _WAYS:
            try:
                copied = _meta_copy(model)
            except Exception as error:  # whatever a class does when it is copied: then there is no evidence
                self.obstacle = f"the model cannot be copied to be traced: {error}"
                self.traces.append({})
                return
            for module in copied.modules():
                module.training = training
            self.traces.append(self._trace_copy(copied, gradients, given))

    def _trace_copy(self, copied: nn.Module, gradients: bool, given: bool) -> dict[str, list[fx.Node]]:
        """Return the nodes that call each module; names are the first that the module has in the model."""
        calls: dict[str, list[fx.Node]] = {}
        states = random.getstate(), np.random.get_state()  # a forward may draw numbers
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
            warnings.simplefilter("ignore")
            self._trace("", copied, calls, given)
        random.setstate(states[0])
        np.random.set_state(states[1])
        # What a forward has put away in an attribute, others may use.
        for module in copied.modules():
            self.kept |= {value.node for value in module.__dict__.values() if isinstance(value, fx.Proxy)}
        return calls

    def _trace(self, name: str, module: nn.Module, calls: dict[str, list[fx.Node]], given: bool) -> None:
        # How a container is run is the business of what it is in.
        if not name or type(module).forward not in _CONTAINED:
            defaults = {} if given else _defaults(module)
            try:
                graph = _Tracer().trace(module, defaults)
            except Exception:  # anything can go wrong when a forward runs on stand-ins: then no evidence
                graph = None
            if graph is not None:
                for node in graph.nodes:
                    if node.op == "call_module":
                        target = f"{name}.{node.target}" if name else str(node.target)
                        calls.setdefault(self.names[id(self.modules[target])][0], []).append(node)
                return
        for child_name, child in module.named_children():
            self._trace(f"{name}.{child_name}" if name else child_name, child, calls, given)

    def layer_before(self, name: str, norm: nn.Module) -> nn.Module | str:
        """Return the layer that the BN can be folded into, or why there is none."""
        found: set[str] = set()
        if len(self.names[id(norm)]) > 1:
            return "it is shared: " + " is ".join(self.names[id(norm)])
        if norm.running_mean is None:
            return "it has no running statistics"
        for calls in self.traces:
            if not calls.get(name):
                return self.obstacle
            for node in calls[name]:
                (before, *rest), kwargs = node.args or (None,), node.kwargs
                if not isinstance(before, fx.Node) or before.op != "call_module" or rest or kwargs:
                    return "what it is given does not come from a convolution or linear layer"
                layer_name = next(n for n, nodes in calls.items() if before in nodes)
                if len(before.users) > 1 or before in self.kept:
                    return f"the output of {layer_name} is used elsewhere too"
                if len(calls[layer_name]) > 1 or len(calls[name]) > 1:
                    return f"it or {layer_name} is called more than once"
                found.add(layer_name)
        if len(found) != 1:
            return "it comes after one layer in training and after another in eval mode"
        return self._judge(found.pop(), norm)

    def _judge(self, layer_name: str, norm: Any) -> nn.Module | str:
        layer: Any = self.modules[layer_name]
        if "forward" in layer.__dict__ or "forward" in norm.__dict__:
            return f"it or {layer_name} has a forward of its own"
        kind = holding.live_class(layer)
        if kind not in FOLDABLE:
            return f"{layer_name} before it is a {kind.__name__}, not just a convolution or linear layer"
        if len(self.names[id(layer)]) > 1:
            return f"{layer_name} is shared: " + " is ".join(self.names[id(layer)])
        channels = layer.out_features if kind is nn.Linear else layer.out_channels
        if channels != norm.num_features:
            return f"{layer_name} has {channels} channels and it has {norm.num_features}"
        norm_name = self.names[id(norm)][0]
        leaving = [self.modules[path] for path in _path(layer_name) if path not in _path(norm_name)]
        entering = [self.modules[path] for path in _path(norm_name) if path not in _path(layer_name)]
        seeing = [m._forward_hooks or m._backward_hooks or m._backward_pre_hooks for m in leaving]
        seeing += [m._forward_pre_hooks or m._forward_hooks for m in entering]
        seeing += [m._backward_hooks or m._backward_pre_hooks for m in entering]
        if any(seeing):
            return f"a hook between {layer_name} and it would see other values"
        found: nn.Module = layer
        return found


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Return the arguments that a call of the module may leave out, and what they are then."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _path(name: str) -> list[str]:
    return [name.rsplit(".", k)[0] for k in range(name.count(".") + 1)]


def _meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model without its hooks, with tensors on the meta device in the place of its own."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for hooks in (value for key, value in module.__dict__.items() if key.endswith("_hooks")):
            memo[id(hooks)] = OrderedDict()
        for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if isinstance(value, Tensor) and id(value) not in memo:
                meta = torch.empty_like(value, device="meta", requires_grad=False)
                memo[id(value)] = nn.Parameter(meta, False) if isinstance(value, nn.Parameter) else meta
    return copy.deepcopy(model, memo)
