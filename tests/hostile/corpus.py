# ruff: noqa: E501  # tables and messages
"""Writes files of every kind that this torch writes, and what torch itself reads in them. Without freezekit.

    python tests/hostile/corpus.py FOLDER

runs under any torch from 2.6 on; beside the files it leaves ``expected.json``: for each file, by key, the dtype,
the shape, and the SHA-256 of the values as little-endian, contiguous bytes, or ``"unsupported"`` where a tensor
has no plain values (sparse, quantised, meta, nested). ``check_corpus.py`` reads them all with freezekit.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

Expected = dict[str, dict[str, list[Any]]]


def digest(tensor: torch.Tensor) -> list[Any]:
    """Return dtype, shape and the digest of a tensor's values, or ``"unsupported"`` where it has none."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_nested:
        return [dtype, [], "unsupported"]
    shape = list(tensor.shape)
    plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)
    if not plain or isinstance(tensor, TwoTensor):
        return [dtype, shape, "unsupported"]
    flat = tensor.detach().resolve_conj().resolve_neg().as_subclass(torch.Tensor).reshape(-1).contiguous()
    return [dtype, shape, hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()]


class Named(torch.Tensor):
    """A subclass that only has another name."""


class TwoTensor(torch.Tensor):
    """A subclass that wraps two others and has no memory of its own."""

    @staticmethod
    def __new__(cls, a: torch.Tensor, b: torch.Tensor) -> TwoTensor:
        return torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype)

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.a, self.b = a, b

    def __reduce_ex__(self, _: Any) -> Any:
        return TwoTensor, (self.a, self.b)

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise NotImplementedError


class Net(nn.Module):
    """Conv, BN with values of its own, a head, a buffer that is not saved, two tied layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False))
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)
        self.head = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.head.weight
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("passing", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(torch.relu(self.bn(self.conv(x)))).mean((2, 3))
        return self.tied(self.head(self.norm(x)))


def trained() -> Net:
    """Return a network whose statistics are no defaults."""
    net = Net()
    for _ in range(3):
        net(torch.randn(4, 3, 6, 6) * 3 + 1)
    return net


def of_all_dtypes(*, legacy: bool = False) -> dict[str, torch.Tensor]:
    """Return a tensor of random bits of each dtype that this torch can make and save one of."""
    made = {}
    for name in sorted(dir(torch)):
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype) or str(dtype) != f"torch.{name}" or name.startswith("q"):
            continue
        try:
            raw = torch.randint(0, 256, (96,), dtype=torch.uint8)
            tensor = raw > 127 if dtype == torch.bool else raw.view(dtype)
            tensor = tensor.reshape(2, -1)
            torch.save(tensor, buffer := BytesIO(), _use_new_zipfile_serialization=not legacy)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except (
            RuntimeError,
            TypeError,
            KeyError,
            AttributeError,
            pickle.UnpicklingError,
        ):  # no memory, or not saved, by this torch
            continue
        made[name] = tensor
    return made


def of_all_layouts() -> dict[str, torch.Tensor]:
    """Return tensors that share, skip, repeat or lack memory."""
    base = torch.randn(4, 6, 2)
    made = {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "sliced": base[1:3, ::2],
        "one": base[3, 5, 1],
        "scalar": torch.tensor(3.5),
        "expanded": base[0, 0, :1].expand(5, 3),
        "empty": torch.empty(0, 3),
        "empty_inside": base[:, 6:],
        "flat": base.view(-1)[7:],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "windows": torch.arange(10.0).unfold(0, 4, 2),
        "parameter": nn.Parameter(torch.randn(3)),
        "frozen_parameter": nn.Parameter(base[0], requires_grad=False),
        "grad": torch.randn(3, requires_grad=True),
        "counter": torch.tensor(7),
        "negative_zero": torch.tensor([-0.0, float("nan"), float("-inf")]),
        "ones_in_shape": base[:1, :, :1],
    }
    if hasattr(nn, "Buffer"):
        made["buffer"] = nn.Buffer(torch.randn(2))
    return made


def of_odd_kinds() -> dict[str, torch.Tensor]:
    """Return tensors of which not all have values that a reader without torch can give."""
    values = torch.randn(3, 4)
    return {
        "plain": values,
        "sparse_coo": values.to_sparse(),
        "sparse_csr": values.to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(values, 0.1, 3, torch.quint8),
        "quantised_channels": torch.quantize_per_channel(
            values, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2]), 0, torch.qint8
        ),
        "meta": torch.empty(3, 2, device="meta"),
        "subclass": torch.randn(3).as_subclass(Named),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "neg": torch.randn(3, dtype=torch.complex64).conj().imag,
        "two": TwoTensor(torch.randn(2), torch.randn(2)),
    }


def nested() -> dict[str, torch.Tensor]:
    """Return a nested tensor."""
    return {"plain": torch.randn(2), "nested": torch.nested.nested_tensor([torch.randn(2), torch.randn(3)])}


def write(folder: Path) -> Expected:
    """Write the corpus; a kind of file that this torch fails to write is told on stderr and left out."""
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    expected: Expected = {}

    def add(name: str, save: Callable[[Path], Any], load: Callable[[Path], Any]) -> None:
        path = folder / name
        try:
            save(path)
            loaded = load(path)
        except Exception as error:  # an older torch cannot do all
            print(f"{name}: not written: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            return
        if isinstance(loaded, nn.Module):
            loaded = loaded.state_dict()
        expected[name] = {
            key: digest(value) for key, value in loaded.items() if isinstance(value, torch.Tensor)
        }

    def unpickled(*inside: str) -> Callable[[Path], Any]:
        def load(path: Path) -> Any:
            loaded = torch.load(path, map_location="cpu", weights_only=False)
            for key in inside:
                loaded = loaded[key]
            return loaded

        return load

    net = trained()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(4, 3, 6, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    states = {
        "dtypes": of_all_dtypes(), "old_dtypes": of_all_dtypes(legacy=True), "layouts": of_all_layouts(), "odd": of_odd_kinds(), "nested": nested(),
        "net": net.state_dict(), "half": trained().half().state_dict(), "bf16": trained().bfloat16().state_dict(),
        "parallel": nn.DataParallel(trained()).state_dict(),
        "compiled": OrderedDict((f"_orig_mod.{key}", value) for key, value in trained().state_dict().items()),
        "average": torch.optim.swa_utils.AveragedModel(trained()).state_dict(),
        "module": net,
    }  # fmt: skip
    for protocol in (2, 3, 4, 5):
        for name, state in states.items():
            for kind, new in (("zip", True), ("legacy", False)):
                if not new and name in (
                    "dtypes",
                    "nested",
                ):  # which torch saves in a way it cannot read itself
                    continue

                def save(path: Path, state: Any = state, protocol: int = protocol, new: bool = new) -> None:
                    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)

                add(f"{name}-{protocol}.{kind}.pt", save, unpickled())
    training = {"epoch": 3, "state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    add("lightning.ckpt", lambda path: torch.save(training, path), unpickled("state_dict"))
    plain = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "args": {"lr": 0.1}}
    add("training.pth", lambda path: torch.save(plain, path), unpickled("model"))
    for name, dtype in (
        ("f4", "float32"),
        ("f8", "float64"),
        ("i2", "int16"),
        ("i8", "int64"),
        ("c8", "complex64"),
    ):
        big = {
            "w": torch.randn(7).mul(100).to(getattr(torch, dtype)),
            "v": torch.arange(4).to(getattr(torch, dtype)),
        }
        add(f"big_endian_{name}.pt", lambda path, big=big: _save_big_endian(big, path), unpickled())
    add("untrained.pt", lambda path: torch.save(Net().state_dict(), path), unpickled())
    add("net.torchscript.pt", lambda path: torch.jit.script(trained()).save(str(path)), torch.jit.load)

    def trace(path: Path) -> None:
        torch.jit.trace(trained().eval(), torch.randn(2, 3, 6, 6)).save(str(path))

    add("traced.torchscript.pt", trace, torch.jit.load)

    def export(path: Path) -> None:
        torch.export.save(torch.export.export(trained().eval(), (torch.randn(2, 3, 6, 6),)), path)

    add("net.pt2", export, lambda path: torch.export.load(path).state_dict)
    from torch.distributed import checkpoint

    def distributed(path: Path) -> None:
        checkpoint.save(dict(trained().state_dict()), checkpoint_id=path)

    def gathered(path: Path) -> Any:
        state = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
        checkpoint.load(state, checkpoint_id=path)
        return state

    add("dcp", distributed, gathered)
    _write_safetensors(states, add)
    (folder / "expected.json").write_text(
        json.dumps({"torch": torch.__version__, "files": expected}, indent=1)
    )
    return expected


def _write_safetensors(states: dict[str, Any], add: Callable[..., None]) -> None:
    from safetensors.torch import load_file, save, save_file

    for name in ("dtypes", "layouts", "net", "half", "bf16"):
        tensors = {}
        for key, value in states[name].items():
            with suppress(Exception):  # a dtype that cannot be copied, or that safetensors has not
                copy = value.detach().clone().contiguous()
                save({key: copy})
                tensors[key] = copy

        def write_file(path: Path, tensors: dict[str, torch.Tensor] = tensors) -> None:
            save_file(tensors, path, {"format": "pt"})

        add(f"{name}.safetensors", write_file, load_file)


def _save_big_endian(state: dict[str, torch.Tensor], path: Path) -> None:
    """Save as a big-endian machine does."""
    torch.save(state, path)
    size = next(iter(state.values())).element_size() // (2 if next(iter(state.values())).is_complex() else 1)
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            if name.endswith("/byteorder"):
                content = b"big"
            elif "/data/" in name:
                content = b"".join(
                    content[start : start + size][::-1] for start in range(0, len(content), size)
                )
            archive.writestr(zipfile.ZipInfo(name), content)


if __name__ == "__main__":
    made = Path(sys.argv[1])
    made.mkdir(parents=True, exist_ok=True)
    files = write(made)
    print(f"torch {torch.__version__}: {len(files)} files, {sum(map(len, files.values()))} tensors")
