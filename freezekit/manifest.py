"""Manifest: what was frozen, with digests, as plain data that both arms share. Nothing here imports torch."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from freezekit.errors import CheckpointError
from freezekit.jsonfile import Reader, write

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from freezekit.freezing.handle import Freeze

__all__ = ["FORMAT", "KEY", "FrozenTensor", "Manifest", "bare_name"]

KEY = "freezekit_manifest"
"""Under what a checkpoint holds the text of a manifest; also the JSON's first field, with its format."""
FORMAT = 1

MAX_BYTES = 32 * 2**20
_MAX_RANK = 64
_ROLES = ("running_mean", "running_var", "num_batches_tracked", "parameter", "buffer")
_CHOICES = ("bn", "convert", "hold")
READER = Reader(
    "manifest", "save the manifest again from the run, or copy the file again", MAX_BYTES, max_text=1_000
)


@dataclass(frozen=True)
class FrozenTensor:
    """One frozen tensor.

    Args:
        name: dotted name in the model.
        role: ``"parameter"``, ``"running_mean"``, ``"running_var"``, ``"num_batches_tracked"`` or
            ``"buffer"``.
        dtype: torch's name without ``torch.``.
        shape: sizes, outermost first.
        sha256: SHA-256 of the values as little-endian, C-contiguous bytes; ``None`` where there is none.
        reason: why there is no digest (``"quantised"``), or ``None``.
        persistent: whether ``state_dict()`` has it.
        tied_to: first name of the same tensor, where it has several.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str | None
    reason: str | None = None
    persistent: bool = True
    tied_to: str | None = None


@dataclass(frozen=True, repr=False)
class Manifest:
    """What a freeze holds, with a digest of every tensor: made by :meth:`Freeze.manifest`, kept as JSON.

    Saved beside a checkpoint, or inside it as text, it lets the freeze be restored after a resume, and lets
    ``freezekit audit`` check the checkpoint without the file that training started from.

    Args:
        model: name of the model's class.
        tensors: the frozen tensors, in the model's order.
        layers: names of the layers held in eval mode; ``""`` is the model itself.
        choices: how they were frozen: ``bn`` and ``convert`` as given to :func:`freezekit.freeze_backbone`.
        names: what was to be frozen: the backbone, or what :func:`freezekit.freeze` was given.
        head: names of the head, where a backbone was frozen.
        rule: how backbone and head were told apart, likewise.
        freezekit: version that made it.
        torch: version it was made with.
        border: whether :func:`freezekit.freeze_to` made the freeze, which moves it when called again.

    >>> manifest = Manifest("Net", (FrozenTensor("w", "parameter", "float32", (2,), "0" * 64),), ("",))
    >>> print(manifest)
    manifest of a Net: 1 tensor and 1 layer frozen
    >>> Manifest.from_json(manifest.to_json()) == manifest
    True

    Source: JSON, RFC 8259; SHA-256, FIPS 180-4.
    """

    model: str
    tensors: tuple[FrozenTensor, ...]
    layers: tuple[str, ...] = ()
    choices: dict[str, str | None] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    rule: str | None = None
    freezekit: str = ""
    torch: str = ""
    border: bool = False

    @property
    def frozen(self) -> list[str]:
        """Names of the frozen tensors, tied ones under each of their names."""
        return [tensor.name for tensor in self.tensors]

    def to_json(self) -> str:
        """Return the manifest as JSON text, one tensor a line; ASCII, whatever the names.

        To keep it in a checkpoint: ``torch.save({"state_dict": model.state_dict(), "freezekit_manifest":
        handle.manifest().to_json()}, path)``. Text passes ``torch.load(weights_only=True)``.
        """
        facts = {
            KEY: FORMAT,
            "freezekit": self.freezekit,
            "torch": self.torch,
            "model": self.model,
            "choices": self.choices,
            "names": self.names,
            "head": self.head,
            "rule": self.rule,
            "layers": self.layers,
            **({"border": True} if self.border else {}),
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items()]
        rows = ",\n".join(json.dumps(_without_defaults(tensor)) for tensor in self.tensors)
        lines.append(f'"tensors": [\n{rows}\n]')
        return "{" + ",\n".join(lines) + "}\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Make a manifest from JSON text.

        Args:
            text: what :meth:`to_json` returned.

        Raises:
            CheckpointError: it is no manifest, damaged, hostile, or of a newer format.

        >>> Manifest.from_json("{}")
        Traceback (most recent call last):
        freezekit.errors.CheckpointError: not a freezekit manifest: no 'freezekit_manifest' in it. ...
        """
        content = READER.mapping(READER.parse(text), "it")
        if KEY not in content:
            raise CheckpointError(
                f"not a freezekit manifest: no '{KEY}' in it",
                remedy="give what handle.manifest().save(path) wrote, or .to_json() returned",
            )
        version = content.pop(KEY)
        if type(version) is int and version > FORMAT:
            raise CheckpointError(
                "a manifest of a newer format", got=f"{version}, {FORMAT} is known", remedy="update freezekit"
            )
        if type(version) is not int or version != FORMAT:
            READER.refuse(f"its format is {FORMAT}", version)
        READER.keys(content, set(cls.__dataclass_fields__) - {"border"}, {"border"}, "it")
        tensors = tuple(
            _tensor(item, f"tensor {n}")
            for n, item in enumerate(READER.entries(content["tensors"], "tensors"))
        )
        if len({tensor.name for tensor in tensors}) != len(tensors):
            READER.refuse("no tensor is in it twice", None)
        border = content.get("border", False)
        if type(border) is not bool:
            READER.refuse("its 'border' is true or false", border)
        choices = READER.mapping(content["choices"], "choices")
        READER.keys(choices, set(), set(_CHOICES), "choices")
        return cls(
            model=_text(content["model"], "model"),
            tensors=tensors,
            layers=_texts(content["layers"], "layers"),
            choices={key: _optional_text(value, key) for key, value in choices.items()},
            names=_texts(content["names"], "names"),
            head=_texts(content["head"], "head"),
            rule=_optional_text(content["rule"], "rule"),
            border=border,
            freezekit=_text(content["freezekit"], "freezekit"),
            torch=_text(content["torch"], "torch"),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the manifest as a JSON file: whole or not at all.

        Args:
            path: the file; one that is there already is replaced.

        Raises:
            FreezekitError: it cannot be written.

        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "frozen.json")
        >>> Manifest("Net", ()).save(path)
        >>> Manifest.load(path)
        <manifest of a Net: 0 tensors and 0 layers frozen>
        """
        write(path, self.to_json(), "manifest")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read the manifest from its file, or from a checkpoint that holds one; nothing in it is executed.

        Args:
            path: what :meth:`save` wrote, or a ``.pt``, ``.pth`` or ``.safetensors`` file or a folder of
                ``torch.distributed.checkpoint`` with the text of a manifest under ``"freezekit_manifest"``
                (safetensors: in its metadata).

        Raises:
            CheckpointError: it is missing, damaged or hostile, holds no manifest, or one of a newer format.
        """
        # reading what may be hostile is the observing arm's trade
        from freezekit.audit.manifest import load_manifest

        return load_manifest(path)

    def restore(self, model: nn.Module, optimizer: Optimizer | None = None, *, strict: bool = True) -> Freeze:
        """Freeze in a model exactly what was frozen when the manifest was made, in the same way.

        To resume: build the model, load its state, then call this in place of ``freeze_backbone``. What had
        been unfrozen by then trains on. Prefixes of wrappers (``module.``, ``_orig_mod.``) do not matter, nor
        does how the model is sharded, or was; of a sharded one every rank has to call it.

        Args:
            model: the model, its state loaded.
            optimizer: as for :func:`freezekit.freeze`; restore first, then load the optimizer's state.
            strict: whether to check first that dtypes and values are those in the manifest. Buffers that are
                not in a ``state_dict()`` are not compared.

        Returns:
            The freeze in force, which holds what the manifest says.

        Raises:
            FreezekitError: the model is not the manifest's, its values differ, or more of it is frozen
                already; nothing is changed then.

        >>> import freezekit
        >>> from torch import nn
        >>> model, resumed = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)) for _ in range(2))
        >>> manifest = freezekit.freeze(model, "0").manifest()
        >>> loaded = resumed.load_state_dict(model.state_dict())
        >>> manifest.restore(resumed).trainable
        ['1.weight', '1.bias']
        """
        from freezekit.freezing.manifest import restore

        return restore(self, model, optimizer, strict=strict)

    def verify(self, model: nn.Module) -> None:
        """Check that a model has the values that were frozen, whether it is frozen or not.

        Of a sharded model every rank has to call it, as each tensor is gathered for its digest.

        Args:
            model: the model; prefixes of wrappers and buffers that are in no ``state_dict()`` do not matter.

        Raises:
            FreezekitError: the model is not the manifest's, or its values or dtypes differ.

        >>> import freezekit
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> manifest = freezekit.freeze(model, "0").manifest()
        >>> model[1].weight.data += 1
        >>> manifest.verify(model)
        """
        from freezekit.freezing.manifest import verify

        verify(self, model)

    def __str__(self) -> str:
        tensors, layers = len(self.tensors), len(self.layers)
        return (
            f"manifest of a {self.model}: {tensors} tensor{'' if tensors == 1 else 's'} and "
            f"{layers} layer{'' if layers == 1 else 's'} frozen"
        )

    def __repr__(self) -> str:
        return f"<{self}>"


def bare_name(name: str, wrapper: str = "") -> str:
    """Return a dotted name without what ``torch.compile`` puts into it, and without ``wrapper`` in front.

    >>> bare_name("module._orig_mod.fc.weight", "module"), bare_name("module", "module")
    ('fc.weight', '')
    """
    if "_orig_mod" in name:
        name = ".".join(part for part in name.split(".") if part != "_orig_mod")
    return "" if name == wrapper else name.removeprefix(f"{wrapper}.") if wrapper else name


def _without_defaults(tensor: FrozenTensor) -> dict[str, Any]:
    fields = FrozenTensor.__dataclass_fields__
    return {key: value for key, value in asdict(tensor).items() if value != fields[key].default}


def _tensor(item: object, where: str) -> FrozenTensor:
    fields = READER.mapping(item, where)
    required = {"name", "role", "dtype", "shape", "sha256"}
    READER.keys(fields, required, {"reason", "persistent", "tied_to"}, where)
    name, role, dtype = (_text(fields[key], f"{where}'s {key}") for key in ("name", "role", "dtype"))
    digest, reason = (_optional_text(fields.get(key), f"{where}'s {key}") for key in ("sha256", "reason"))
    shape, persistent = READER.entries(fields["shape"], f"{where}'s shape"), fields.get("persistent", True)
    fits = role in ("parameter", "buffer") or role == name.rpartition(".")[2]
    if not name or role not in _ROLES or not fits or not re.fullmatch(r"\w{1,50}", dtype, re.ASCII):
        READER.refuse(
            f"{where} has a name, a role that fits its name, and a dtype",
            f"{name!r}, {role!r}, {dtype!r}"[:120],
        )
    if len(shape) > _MAX_RANK or not all(type(size) is int and 0 <= size <= 2**62 for size in shape):
        READER.refuse(f"{where}'s shape is sizes", None)
    if type(persistent) is not bool:
        READER.refuse(f"{where}'s 'persistent' is true or false", persistent)
    is_digest = digest is None or re.fullmatch(r"[0-9a-f]{64}", digest)
    if (digest is None) == (reason is None) or not is_digest:
        READER.refuse(
            f"{where} has a SHA-256 in lower-case hexadecimal digits, or a reason why it has none", None
        )
    tied_to = _optional_text(fields.get("tied_to"), f"{where}'s tied_to")
    return FrozenTensor(name, role, dtype, tuple(shape), digest, reason, persistent, tied_to)


def _text(value: object, where: str) -> str:
    made = READER.text(value, where)
    try:
        made.encode()
    except UnicodeEncodeError:
        READER.refuse(f"{where} is text", ascii(value)[:80])
    return made


def _optional_text(value: object, where: str) -> str | None:
    return None if value is None else _text(value, where)


def _texts(value: object, where: str) -> tuple[str, ...]:
    made = tuple(_text(item, f"an entry of {where}") for item in READER.entries(value, where))
    if len(set(made)) != len(made):
        READER.refuse(f"no entry of {where} is in it twice", None)
    return made
