"""Finds the files of published weights: ``torchvision:NAME[/WEIGHTS]``, ``timm:NAME``.

Beside ``audit/live`` the only module of the observing arm that may import torch, since the libraries that
know the names do. What it finds is read as any other file: nothing is loaded by torch.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlparse

from freezekit.audit.checkpoint.container import SourceFile, guarded, printable
from freezekit.errors import CheckpointError, FreezekitError

__all__ = ["find_weights"]

_INSTALL = {"torchvision": "pip install torchvision", "timm": "pip install timm"}
#: what torch.hub takes for the start of a file's SHA-256 in its name
_HASH = re.compile(r"-([a-f0-9]{8,64})\.")


def find_weights(name: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Return the file of published weights and what to call it, or ``None`` where ``name`` names none.

    They are taken from the local cache of torch.hub or of Hugging Face, or fetched into it.

    Args:
        name: ``torchvision:NAME``, ``torchvision:NAME/WEIGHTS``, ``timm:NAME`` or ``timm:NAME.TAG``; anything
            else is a path.

    Raises:
        FreezekitError: there is no such model, or the library is missing.
        CheckpointError: the file is not there and cannot be fetched, or is damaged.

    >>> find_weights("base.pth") is None
    True
    """
    text = os.fsdecode(name)
    library, colon, rest = text.partition(":")
    if library not in _INSTALL or not colon or os.path.exists(text):
        return None
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise FreezekitError(
            f"{library}, which knows these weights, cannot be imported",
            where=printable(text),
            got=printable(str(error)),
            remedy=_INSTALL[library],
        ) from error
    full, path = (_torchvision if library == "torchvision" else _timm)(rest)
    return path, f"{library}:{full} ({path})"


def _torchvision(rest: str) -> tuple[str, str]:
    from torchvision import models  # type: ignore[import-untyped]

    name, _, wanted = rest.partition("/")
    names = models.list_models()
    name = _one_of(name, names, f"torchvision:{rest}", "model")
    members = models.get_model_weights(name).__members__
    if not members:
        raise FreezekitError("torchvision has no weights for this model", where=f"torchvision:{name}")
    member = _one_of(wanted or "DEFAULT", list(members), f"torchvision:{name}/{wanted}", "weights")
    weights = members[member]
    others = [other for other in members if members[other] is not weights]
    named = f"torchvision:{name}/{others[0]}" if others and not wanted else ""
    return f"{name}/{weights.name}", _from_hub(weights.url, named)


def _timm(rest: str) -> tuple[str, str]:
    import timm
    from timm.models import get_pretrained_cfg

    architecture, _, tag = rest.partition(".")
    architecture = _one_of(architecture, timm.list_models(), f"timm:{rest}", "model")
    known = [name.partition(".")[2] for name in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag:
        tag = _one_of(tag, known, f"timm:{rest}", "weights")
    cfg = get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
    full = f"{architecture}.{cfg.tag}" if cfg is not None and cfg.tag else architecture
    if cfg is not None and cfg.file:
        return full, str(cfg.file)
    if cfg is not None and cfg.hf_hub_id:
        return full, _from_hugging_face(cfg.hf_hub_id, cfg.hf_hub_filename)
    if cfg is not None and cfg.url:
        return full, _from_hub(cfg.url if isinstance(cfg.url, str) else cfg.url[0])
    raise FreezekitError(
        "timm has no weights for this model",
        where=f"timm:{full}",
        remedy=f"there are: {', '.join(known[:8])}" if known else "give the file that training started from",
    )


def _one_of(name: str, names: Iterable[str], where: str, kind: str) -> str:
    """Return the name as it is spelt, or say which there are."""
    spelt = {known.lower(): known for known in names}
    if name.lower() in spelt:
        return spelt[name.lower()]
    close = difflib.get_close_matches(name.lower(), list(spelt), n=3, cutoff=0.5)
    shown = [spelt[found] for found in close] if kind == "model" and close else list(spelt.values())[:12]
    raise FreezekitError(
        "there is no such model" if kind == "model" else "there are no such weights",
        where=printable(where),
        got=repr(printable(name)),
        remedy=("did you mean " if close and kind == "model" else "there are: ") + ", ".join(shown),
    )


def _from_hub(url: str, other: str = "") -> str:
    """Return a file of torch.hub's cache, fetched if it is not there; ``other`` names other weights."""
    from torch import hub

    filename = os.path.basename(urlparse(url).path)
    path = os.path.join(hub.get_dir(), "checkpoints", filename)
    found = _HASH.search(filename)
    expected = found.group(1) if found else ""
    if os.path.exists(path):
        digest = _digest(path) if expected else ""
        if not digest.startswith(expected):
            raise CheckpointError(
                "damaged: it is not the file that its name says",
                where=printable(path, 1000),
                got=f"SHA-256 {digest[:16]}... instead of {expected}...",
                remedy="delete it, and it is fetched again",
            )
        return path
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        hub.download_url_to_file(url, path, expected or None, progress=True)
    except Exception as error:  # whatever the network, the disk and the hash have to say
        remedy = f"put the file at {printable(path, 1000)}"
        remedy += f", or name those it started from if others: {other}" if other else ""
        raise _not_fetched(url, error, remedy) from error
    return path


def _digest(path: str) -> str:
    import hashlib  # OpenSSL takes 3 MB, and few audits need a digest

    digest = hashlib.sha256()
    with guarded(printable(path, 1000)):
        file = SourceFile.at(path)
        for place in range(0, file.size, 2**24):
            digest.update(file.pread(place, min(2**24, file.size - place)))
    return digest.hexdigest()


def _from_hugging_face(repository: str, filename: str | None) -> str:
    """Return a file of Hugging Face's cache, fetched if it is not there; safetensors where there is some."""
    import huggingface_hub as hugging

    repository, _, revision = repository.partition("@")
    where: dict[str, Any] = {"repo_id": repository, "revision": revision or None}
    names = [filename or "pytorch_model.bin"]
    if names[0].endswith(".bin"):
        plain = {"pytorch_model.bin": "model", "open_clip_pytorch_model.bin": "open_clip_model"}
        names.insert(0, plain.get(names[0], names[0][:-4]) + ".safetensors")
    for name in names:
        cached = hugging.try_to_load_from_cache(filename=name, **where)
        if isinstance(cached, str):
            return cached
    errors = hugging.errors
    try:
        try:
            return str(hugging.hf_hub_download(filename=names[0], **where))
        except errors.LocalEntryNotFoundError:
            raise  # there is no network, for the other file as little
        except errors.EntryNotFoundError:
            return str(hugging.hf_hub_download(filename=names[-1], **where))
    except Exception as error:  # as above
        remedy = f"where there is a network: huggingface-cli download {repository} {names[0]}"
        raise _not_fetched(f"{repository}/{names[0]}", error, remedy) from error


def _not_fetched(what: str, error: Exception, remedy: str) -> CheckpointError:
    first = str(error).strip().partition("\n")[0]
    return CheckpointError(
        "these weights are not in the local cache and could not be fetched",
        where=printable(what, 300),
        got=f"{type(error).__name__}: {printable(first, 160)}",
        remedy=remedy,
    )
