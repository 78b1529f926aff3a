"""Layers of the frozen part that move by themselves: by their mode, or by what their forward does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase, ObserverBase
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from freezekit.audit.findings import Finding
from freezekit.audit.live.modes import keeps_itself, modes_after_train
from freezekit.audit.live.region import Region, held_in

__all__ = ["freeze_call", "layer_risks"]

_DRAWS = re.compile("Drop|StochasticDepth")
_RATES = ("p", "drop_prob", "drop_rate", "dropout_prob", "dropout_p", "prob", "rate")
"""What libraries call the probability of a dropout layer."""

_CODEBOOK = re.compile("cluster_size|embed_avg|ema_w")
"""Buffers that codebooks of vector quantisation move in train mode."""


@dataclass
class _Part:
    """The frozen part: its layers, and in which mode they are and will be."""

    region: Region
    later: dict[int, bool]
    roots: dict[int, str] = field(default_factory=dict)
    """Of each module inside a part that is frozen whole, the name of that part."""

    def call(self, name: str, module: nn.Module) -> str:
        return freeze_call(self.roots.get(id(module), name))

    def is_live(self, module: nn.Module) -> bool:
        """Whether it is in train mode and stays in it."""
        return bool(module.training) and self.later[id(module)]

    def by_mode(
        self, code: str, name: str, module: nn.Module, does: str, fix: str | None = None
    ) -> Iterator[Finding]:
        """Yield a risk of train mode: certain if it is in it, else if nothing keeps it out."""
        kind, call = type(module).__name__, self.call(name, module)
        if self.is_live(module):
            yield Finding(code, name, f"{kind} in train mode: {does}", fix or call)
        elif module.training:
            message = f"{kind} in train mode until model.train() is called, which puts it into eval mode"
            yield Finding("FK305", name, message, "model.train()")
        elif self.later[id(module)]:
            message = f"{kind} in eval mode, which the next model.train() undoes: then {does}"
            yield Finding("FK305", name, message, call)


def freeze_call(name: str) -> str:
    """Return the call that freezes a part by its name; all of the model by ``""``.

    >>> freeze_call("layer1")
    "freezekit.freeze(model, 'layer1')"
    """
    return f"freezekit.freeze(model, {name or '*'!r})"


def layer_risks(region: Region) -> Iterator[Finding]:
    """Yield what the layers of the frozen part will do."""
    part = _Part(region, modes_after_train(region.model))
    for path, root in region.roots.items():
        part.roots.update({id(module): path for module in root.modules()})
    inner = {
        id(m) for top in region.model.modules() if isinstance(top, FakeQuantizeBase) for m in top.children()
    }
    for name, module in region.model.named_modules():
        if isinstance(module, _NormBase) or "running_var" in module._buffers:
            yield from _norm(part, name, module)
        if name not in region.layers and id(module) not in part.roots:
            continue
        if _writes_when_training(module):
            yield from part.by_mode("FK308", name, module, "each forward writes to its vectors u and v")
        elif id(module) not in inner:
            yield from _always_writes(part, name, module)
        if any(_CODEBOOK.search(buffer) for buffer in module._buffers) and _may_train(part, module):
            message = (
                f"{type(module).__name__} looks like a codebook, which moves with every batch in train mode"
            )
            yield Finding("FK309", name, message, part.call(name, module))
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield from _embedding(name, module)
        if id(module) in part.roots:
            yield from _dropout(part, name, module)


def _may_train(part: _Part, module: nn.Module) -> bool:
    return bool(module.training) or part.later[id(module)]


def _norm(part: _Part, name: str, module: nn.Module) -> Iterator[Finding]:
    region, prefix = part.region, f"{name}." if name else ""
    stats = [held_in(module._buffers, key) is not None for key in ("running_mean", "running_var")]
    own = {key: prefix + key in region.places for key, p in module._parameters.items() if p is not None}
    frozen = name in region.layers or id(module) in part.roots
    if not any(stats):
        if frozen and isinstance(module, _NormBase) and not isinstance(module, _InstanceNorm):
            message = (
                f"{type(module).__name__} without running statistics normalises by the batch in eval mode too"
            )
            fix = (
                "make it with track_running_stats=True, then freezekit.update_bn(loader, model) to calibrate "
                f"it, then {part.call(name, module)}"
            )
            yield Finding("FK304", name, message, fix)
    elif not isinstance(module, _NormBase) and not hasattr(module, "momentum"):
        return  # a frozen layer of another library: it has statistics and never writes to them
    elif frozen or any(f"{prefix}{key}" in region.places for key in ("running_mean", "running_var")):
        yield from _statistics(part, name, module)
    elif any(own.values()) and not all(own.values()) and _may_train(part, module):
        still, trains = ([key for key, is_ in own.items() if is_ == want] for want in (True, False))
        message = (
            f"{', '.join(still)} frozen, {', '.join(trains)} not: its running statistics count as trained, "
            "and move"
        )
        yield Finding("FK312", name, message, freeze_call(name))


def _statistics(part: _Part, name: str, module: nn.Module) -> Iterator[Finding]:
    """Yield what becomes of running statistics that count as frozen."""
    kind, call = type(module).__name__, part.call(name, module)
    if isinstance(module, _InstanceNorm) and not part.is_live(module) and _writes_in_eval_mode(module):
        if module.track_running_stats:
            message = (
                f"{kind}: torch {torch.__version__} writes its statistics back in eval mode too, off by the "
                "rounding of a mean over the batch"
            )
            fix = "a newer torch, or a layer of freezekit.nn in its place before freezing"
            yield Finding("FK309", name, message, fix)
        else:
            message = f"{kind} with statistics and track_running_stats=False writes to them in eval mode"
            yield Finding("FK308", name, message, _tracking(name, call))
    elif getattr(module, "track_running_stats", True):
        yield from part.by_mode("FK301", name, module, "the next forward moves its running statistics")
    elif not isinstance(module, _InstanceNorm):
        does = "it normalises by the batch, though its running statistics stay as they are"
        yield from part.by_mode("FK304", name, module, does, _tracking(name, call))


def _writes_in_eval_mode(layer: _InstanceNorm) -> bool:
    """Try it on a copy: older versions of torch put back the mean of what they had repeated for the batch."""
    own = object.__new__(type(layer))  # without the hooks, which may hold anything
    own.__dict__.update(vars(layer), training=False)
    for kind in ("_parameters", "_buffers"):
        own.__dict__[kind] = {
            k: None if t is None else t.detach().clone() for k, t in vars(layer)[kind].items()
        }
    mean = own.running_mean
    if mean is None or mean.is_meta:
        return False
    try:
        with torch.no_grad():
            mean.copy_(torch.arange(1, mean.numel() + 1) / 3)
            before = mean.clone()
            inputs = mean.new_ones(7, mean.numel(), *(2,) * (own._get_no_batch_dim() - 1))
            for _ in range(3):
                own.forward(inputs)
            return not torch.equal(mean, before)
    except Exception:  # a subclass with a forward of its own, or a dtype that this torch cannot do
        return False


def _tracking(name: str, call: str) -> str:
    return f"model.get_submodule({name!r}).track_running_stats = True, then {call}"


def _writes_when_training(module: nn.Module) -> bool:
    if isinstance(module, _SpectralNorm):
        return "_u" in module._buffers
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


def _always_writes(part: _Part, name: str, module: nn.Module) -> Iterator[Finding]:
    kind = type(module).__name__
    if isinstance(module, FakeQuantizeBase) and not keeps_itself(module):
        enabled = module.observer_enabled
        if not enabled.is_meta and bool(enabled.any()):
            message = f"{kind} observes: it moves its scale and zero_point with every batch, in eval mode too"
            fix = f"model.get_submodule({name!r}).disable_observer(), or {part.call(name, module)}"
            yield Finding("FK308", name, message, fix)
    elif isinstance(module, ObserverBase) and "min_val" in module._buffers and not keeps_itself(module):
        message = f"{kind} records the range of every batch, in eval mode too"
        yield Finding("FK308", name, message, part.call(name, module))


def _embedding(name: str, module: nn.Embedding | nn.EmbeddingBag) -> Iterator[Finding]:
    weight, most = module.weight.detach(), module.max_norm
    if most is None or weight.is_meta or weight.requires_grad:
        return
    # A row once shortened is never touched again; a little more than the rounding of its length.
    longer = int(
        (torch.linalg.vector_norm(weight.float(), module.norm_type, dim=1) > most * (1 + 1e-6)).sum()
    )
    if longer:
        where = f"model.get_submodule({name!r})"
        message = f"max_norm={most:g}: a lookup shortens, in place, each of the {longer} rows that are longer"
        fix = (
            f"{where}.weight.data.renorm_({module.norm_type:g}, 0, {most:g}), if the rows are meant to be "
            f"shortened; then {where}.max_norm = None"
        )
        yield Finding("FK307", name, message, fix)


def _dropout(part: _Part, name: str, module: nn.Module) -> Iterator[Finding]:
    rate = _rate(module)
    if rate is None or not _may_train(part, module):
        return
    kind = type(module).__name__
    how = "in train mode" if module.training else "in eval mode, which the next model.train() undoes"
    if module.training and not part.is_live(module):
        yield from part.by_mode("FK306", name, module, "")
        return
    message = f"{kind}({rate}) {how}: the same input gives another output each time"
    yield Finding("FK306", name, message, part.call(name, module))


def _rate(module: nn.Module) -> str | None:
    """Return the probability with which a module drops something in train mode, with its name, if any."""
    kind, held = type(module).__name__, vars(module)
    if isinstance(module, nn.RReLU):
        return f"{module.lower:g} to {module.upper:g}" if module.lower != module.upper else None
    if isinstance(module, nn.RNNBase) and module.num_layers < 2:
        return None  # it drops between layers
    if _DRAWS.search(kind):
        names = [key for key in _RATES if key in held][:1]
    elif isinstance(module, nn.RNNBase) or "Attention" in kind or "Attn" in kind:
        names = [key for key in held if "drop" in key]
    else:
        names = [key for key in held if key == "layerdrop"]
    for key in names:
        value = held[key]
        if isinstance(value, (int, float, Tensor)) and not isinstance(value, bool) and float(value) > 0:
            return f"{key}={float(value):g}"
    return None
