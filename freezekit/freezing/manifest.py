"""The acting side of a manifest: made from a freeze in force, and restored onto a model."""

from __future__ import annotations

import hashlib
import secrets
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freezekit import __version__
from freezekit.errors import FreezekitError
from freezekit.freezing import holding
from freezekit.freezing.distributed import full, reshard
from freezekit.freezing.freeze import _freeze
from freezekit.freezing.groups import warn_of_orphans
from freezekit.freezing.handle import Choices, Freeze
from freezekit.freezing.layers import BORDER
from freezekit.freezing.optim import check_optimizers
from freezekit.freezing.selection import Selection, require_module, resolve, tensors_of
from freezekit.manifest import FrozenTensor, Manifest, bare_name

__all__ = ["make_manifest", "restore", "verify"]


def make_manifest(handle: Freeze) -> Manifest:
    """Describe what a freeze holds now; one tensor at a time is copied, and only where it has to be."""
    model, selection = handle.model, handle.selection
    reshard(model)
    first: dict[int, FrozenTensor] = {}
    tensors = []
    for name, owner, own, tensor in tensors_of(model):
        if handle._holder not in holding.holders_of(owner, own):
            continue
        known = first.get(id(tensor))
        digest, reason = (known.sha256, known.reason) if known else _digest(tensor)
        made = FrozenTensor(
            name,
            _role(owner, own),
            _dtype(tensor),
            tuple(tensor.shape),
            digest,
            reason,
            persistent=own not in owner._non_persistent_buffers_set,
            tied_to=known.name if known else None,
        )
        first.setdefault(id(tensor), made)
        tensors.append(made)
    modules = model.named_modules(remove_duplicate=False)
    return Manifest(
        model=holding.live_class(model).__name__,
        tensors=tuple(tensors),
        layers=tuple(path for path, module in modules if handle._holder in holding.holders_of(module)),
        choices=handle.choices._asdict(),
        names=handle.names,
        head=selection.head if selection else (),
        rule=selection.rule if selection else None,
        border=handle._holder.startswith(BORDER),
        freezekit=__version__,
        torch=torch.__version__,
    )


def verify(manifest: Manifest, model: nn.Module) -> None:
    """As :meth:`freezekit.Manifest.verify`."""
    require_module(model)
    reshard(model)
    _Place(manifest, model).compare_values("give the model the dtype it had then", "verifying", "")


def restore(manifest: Manifest, model: nn.Module, optimizer: Any, *, strict: bool) -> Freeze:
    """As :meth:`freezekit.Manifest.restore`."""
    require_module(model)
    reshard(model)
    place = _Place(manifest, model)
    place.refuse_frozen_already()
    if strict:
        lenient = "; strict=False freezes them as they are"
        place.compare_values("restore first, then change the dtype of the model", "restoring", lenient)
    names = place.names()
    choices = Choices(**manifest.choices)  # type: ignore[arg-type]  # _freeze() refuses what it does not know
    kind = BORDER if manifest.border else ""
    if names:
        patterns = resolve(model, names, "names")
        handle = _freeze(model, patterns, None, choices, optimizer, kind, stacklevel=4)
    else:  # all had been unfrozen
        optimizers = check_optimizers(optimizer)
        handle = Freeze(model, kind + secrets.token_hex(8), None, (), choices, optimizers=optimizers)
        warn_of_orphans(model, optimizers, stacklevel=3)
    try:
        place.complete(handle)
    except BaseException:
        handle.undo()
        raise
    handle.names = manifest.names
    if manifest.rule is not None:
        handle.selection = Selection(manifest.names, manifest.head, manifest.rule)
    return handle


class _Place:
    """What a manifest names, found in a model.

    Args:
        manifest: the manifest.
        model: the model.

    Raises:
        FreezekitError: something is not in the model, or has another shape there.
    """

    def __init__(self, manifest: Manifest, model: nn.Module) -> None:
        self.manifest, self.model = manifest, model
        every = {name: (owner, own, t) for name, owner, own, t in tensors_of(model)}
        paths = dict(model.named_modules(remove_duplicate=False))
        theirs, ours = _wrappers(manifest, every)
        live = {bare_name(name, ours): name for name in every}
        bare = {bare_name(tensor.name, theirs): tensor for tensor in manifest.tensors}
        # a buffer that is in no checkpoint may be made by the first forward pass only
        missing = [tensor.name for name, tensor in bare.items() if name not in live and tensor.persistent]
        layers = {bare_name(path, theirs) for path in manifest.layers}
        missing += sorted(layers - {bare_name(path, ours) for path in paths})
        as_then = f"build the model as it was when the manifest was made (a {manifest.model[:80]!r})"
        self._refuse(missing, "frozen layers and tensors of the manifest are not in the model", as_then)
        self.tensors = {live[name]: tensor for name, tensor in bare.items() if name in live}
        self.owners = {name: every[name][:2] for name in self.tensors}
        self.values = {name: every[name][2] for name in self.tensors}
        self.layers = {path: module for path, module in paths.items() if bare_name(path, ours) in layers}
        reshaped = [
            f"{name!r}: {tuple(self.values[name].shape)}, was {tensor.shape}"
            for name, tensor in self.tensors.items()
            if tensor.persistent and tuple(self.values[name].shape) != tensor.shape
        ]
        self._refuse(reshaped, "frozen tensors have another shape in the model", as_then, quote=str)

    def refuse_frozen_already(self) -> None:
        """Refuse a model frozen anew, where the restored freeze would change nothing about what trains."""
        held: dict[str, set[str]] = {}
        for name, owner, own, _ in tensors_of(self.model):
            for holder in holding.holders_of(owner, own):
                held.setdefault(holder, set()).add(name)
        for names in held.values():
            if names > self.tensors.keys():
                more = sorted(names - self.tensors.keys())
                raise FreezekitError(
                    "all of the manifest is frozen already, and more, so that restoring would change nothing",
                    where="model",
                    got=f"{_shown(more)} frozen too",
                    remedy="restore the manifest in place of freezing the model, or unfreeze(model) before",
                )

    def compare_values(self, recasting: str, doing: str, lenient: str) -> None:
        """Refuse a model whose values are not those that were frozen.

        Args:
            recasting: what to do about another dtype.
            doing: what the values are compared for.
            lenient: how to do that all the same.
        """
        digests: dict[int, str | None] = {}
        recast, differing = [], []
        for name, tensor in self.tensors.items():
            value = self.values[name]
            if not tensor.persistent:
                continue
            if _dtype(value) != tensor.dtype:
                recast.append(f"{name!r}: {_dtype(value)}, was {tensor.dtype}")
            elif tensor.sha256 is not None:
                if id(value) not in digests:
                    digests[id(value)] = _digest(value)[0]
                if digests[id(value)] != tensor.sha256:
                    differing.append(name)
        fault = "frozen tensors have another dtype in the model"
        self._refuse(recast, fault, recasting + lenient, quote=str)
        self._refuse(
            differing,
            "frozen tensors have other values in the model than when the manifest was made",
            f"load the checkpoint that was saved with the manifest before {doing}; if that was done, they "
            f"had drifted by then{lenient}",
        )

    def names(self) -> list[str]:
        """Return what to give to :func:`freeze`: layers of which all is frozen, and tensors outside them."""
        ids = self._whole()
        whole = dict.fromkeys(path for path, module in self.layers.items() if path and id(module) in ids)
        named = [
            name
            for name, (owner, own) in self.owners.items()
            if own in owner._parameters or id(owner) in ids  # the model itself has no name to be given by
        ]
        return [name for name in [*whole, *named] if name.rpartition(".")[0] not in whole]

    def _whole(self) -> set[int]:
        """Return the layers with nothing in them but what was frozen, or trains by the choice of ``bn``."""
        frozen = {(id(owner), own) for owner, own in self.owners.values()}
        held = {id(module) for module in self.layers.values()}
        trains = self.manifest.choices.get("bn") in ("freeze_stats", "train")
        whole: set[int] = set()
        for _, module in reversed(list(self.model.named_modules(remove_duplicate=False))):
            exempt = trains and holding.is_batchnorm(module)
            own = [n for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]
            children = [child for child in module._modules.values() if child is not None]
            all_own = all((id(module), name) in frozen for name in own)
            if exempt or (id(module) in held and all_own and all(id(child) in whole for child in children)):
                whole.add(id(module))
        return whole

    def complete(self, handle: Freeze) -> None:
        """Make a freeze by names cover exactly what the manifest names, and nothing beside."""
        holder = handle._holder
        held = {id(module) for module in self.layers.values()}
        for module in self.model.modules():
            if id(module) in held:
                holding.hold_module(module, holder)
            elif holder in holding.holders_of(module):  # taken for a whole layer, all of it being frozen
                holding.release_module(module, {holder}, adopt_mode=False)
        for owner, own in self.owners.values():
            if own in owner._buffers:
                holding.note_tensor(owner, own, holder)
                if id(owner) not in held:
                    holding.pin_buffers(owner)
        differing = self.tensors.keys() ^ set(handle.frozen)
        self._refuse(
            sorted(differing),
            "tensors cannot be frozen, or left to train, as they were",
            "freeze the model anew: freezekit.freeze_backbone(model)",
        )

    def _refuse(
        self, names: Sequence[str], fault: str, remedy: str, quote: Callable[[str], str] = repr
    ) -> None:
        if names:
            raise FreezekitError(
                fault,
                where=type(self.model).__name__,
                got=f"{len(names)}: {_shown(names, quote)}",
                remedy=remedy,
            )


def _wrappers(manifest: Manifest, live: Collection[str]) -> tuple[str, str]:
    """Return the wrapper in front of the manifest's names, and of the model's, for most to be the same."""
    choices = (("", ""), ("module", ""), ("", "module"))

    def matches(choice: tuple[str, str]) -> int:
        names = {bare_name(name, choice[1]) for name in live}
        return sum(bare_name(name, choice[0]) in names for name in manifest.frozen)

    return max(choices, key=matches)  # the first of the best


def _shown(names: Sequence[str], quote: Callable[[str], str] = repr) -> str:
    return ", ".join(map(quote, names[:3])) + (", ..." if len(names) > 3 else "")


def _role(owner: nn.Module, own: str) -> str:
    if own in owner._parameters:
        return "parameter"
    of_norm = owner._buffers.get("running_mean") is not None
    return own if of_norm and own in ("running_mean", "running_var", "num_batches_tracked") else "buffer"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _digest(tensor: Tensor) -> tuple[str | None, str | None]:
    """Return the SHA-256 of the values as little-endian, C-contiguous bytes, or why there is none."""
    tensor = full(tensor)
    reason = _without_bytes(tensor)
    if reason is not None:
        return None, reason
    plain = tensor.detach()
    plain = (torch.view_as_real(plain) if plain.is_complex() else plain).cpu().contiguous()
    raw = plain.reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "big":
        raw = raw.reshape(-1, plain.element_size())[:, ::-1].copy()
    return hashlib.sha256(raw.data).hexdigest(), None


def _without_bytes(tensor: Tensor) -> str | None:
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_quantized:
        return "quantised"
    if tensor.layout is not torch.strided:
        return f"{str(tensor.layout).removeprefix('torch.')} layout"
    if tensor.is_conj() or tensor.is_neg():
        return "lazily conjugated or negated"  # a file has it otherwise than it is
    if type(tensor).__torch_dispatch__ != Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}, not a plain tensor"
    return None
