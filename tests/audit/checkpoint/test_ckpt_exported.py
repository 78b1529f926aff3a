"""``.pt2`` archives of every layout: the state is that of ``torch.export.load(FILE)``, bit by bit."""

import copy
import json
import logging
import zipfile

import pytest
import torch
from hostile import build_hostile as build
from torch._export.serde.schema import SCHEMA_VERSION
from torch._export.serde.serialize import serialize
from torch.export.pt2_archive import _package as package
from torch.export.pt2_archive._package_weights import TensorProperties, Weights

from freezekit.audit.checkpoint import read_checkpoint
from freezekit.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:No complete tensor found"
)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 1).to(memory_format=torch.channels_last)
        self.bn = torch.nn.BatchNorm2d(4)
        self.tied = self.conv.weight
        whole = torch.randn(10)
        self.register_buffer("part", whole[2:5])
        self.register_buffer("steps", whole[4:9:2])
        self.register_buffer("scratch", torch.randn(2), persistent=False)
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("scalar", torch.tensor(2.5))
        self.register_buffer("small", torch.randn(2, 3).bfloat16().t())
        self.register_buffer("mask", torch.tensor([True, False]))
        self.constant = torch.randn(1)

    def forward(self, x):
        extra = [self.part, self.steps, self.scratch, self.empty, self.scalar, self.small.float(), self.mask]
        return self.bn(self.conv(x)) + sum(t.sum() for t in extra) + self.constant + self.tied.sum()


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(1)
    net = Net()
    for tensor in (net.bn.running_mean, net.bn.running_var, net.bn.weight.data, net.bn.bias.data):
        tensor.copy_(torch.rand(4) + 0.5)
    net.bn.num_batches_tracked.fill_(77)
    return torch.export.export(net.eval(), (torch.randn(2, 3, 4, 4),))


def until_2_7(program, path):
    """As the ``torch.export.save`` of torch 2.6 and 2.7 writes it."""
    parts = serialize(program)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", parts.exported_program)
        archive.writestr("serialized_state_dict.pt", parts.state_dict)
        archive.writestr("serialized_constants.pt", parts.constants)
        archive.writestr("serialized_example_inputs.pt", parts.example_inputs)
        archive.writestr("version", ".".join(map(str, SCHEMA_VERSION)))
        archive.writestr("extra_files/note.txt", "hello")


def of_2_8(program, path):
    """As the ``torch.export.save`` of torch 2.8 writes it."""
    parts = serialize(program)
    with package.PT2ArchiveWriter(str(path)) as archive:
        archive.write_bytes("models/model.json", parts.exported_program)
        archive.write_bytes("data/weights/model.pt", parts.state_dict)
        archive.write_bytes("data/constants/model.pt", parts.constants)
        archive.write_bytes("data/sample_inputs/model.pt", parts.example_inputs)


LAYOUTS = {"2.6": until_2_7, "2.8": of_2_8, "2.9": lambda program, path: torch.export.save(program, path)}


def bits(tensor):
    raw = tensor.detach().contiguous().reshape(-1)
    return raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b""


def assert_equal(table, state):
    assert list(table) == list(state)
    for name, tensor in state.items():
        assert table[name].dtype == str(tensor.dtype).removeprefix("torch.")
        assert table[name].shape == tuple(tensor.shape)
        assert table[name].unsupported is None
        assert table[name].read() == bits(tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, program, tmp_path, caplog):
    path = tmp_path / "a.pt2"
    LAYOUTS[layout](program, path)
    caplog.set_level(logging.CRITICAL)
    table, state = read_checkpoint(path), torch.export.load(path).state_dict
    assert_equal(table, state)
    assert set(table) == set(program.state_dict)
    assert table.notes == ()
    assert table.norm_layers() == ["bn"]
    roles = {name: table[name].role for name in ("tied", "part", "mask", "bn.running_mean", "bn.weight")}
    assert roles == {
        "tied": "parameter",
        "part": "buffer" if layout == "2.9" else "parameter",  # before, only parameters are told apart
        "mask": "buffer",
        "bn.running_mean": "running_mean",
        "bn.weight": "parameter",
    }


def test_compressed_again_is_refused(program, tmp_path):
    until_2_7(program, tmp_path / "a.pt2")
    change(tmp_path / "a.pt2", lambda members: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="not supported: a compressed zip archive"):
        read_checkpoint(tmp_path / "a.pt2")


def change(path, edit, compression=zipfile.ZIP_STORED):
    """Write an archive again with its members changed, by their names below the archive's root."""
    with zipfile.ZipFile(path) as archive:
        root = next((n.removesuffix("archive_format") for n in archive.namelist() if "archive_f" in n), "")
        members = {name.removeprefix(root): archive.read(name) for name in archive.namelist()}
    edit(members)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(root + name, data)


def test_several_programs(program, tmp_path):
    other = copy.deepcopy(program)
    package.package_pt2(str(tmp_path / "a.pt2"), exported_programs={"encoder": other, "model": program})
    table = read_checkpoint(tmp_path / "a.pt2")
    assert_equal(table, torch.export.load(tmp_path / "a.pt2").state_dict)
    assert table.notes == ("also holds: encoder; read 'model'",)
    package.package_pt2(str(tmp_path / "b.pt2"), exported_programs={"encoder": other})
    assert_equal(read_checkpoint(tmp_path / "b.pt2"), package.load_pt2(str(tmp_path / "b.pt2"))
                 .exported_programs["encoder"].state_dict)  # fmt: skip


def test_weights_beside_compiled_code(program, tmp_path):
    (tmp_path / "code.so").write_bytes(b"\x7fELF")
    # in a package they are joined by their storages, and those must be contiguous
    state = {name: t.detach() for name, t in program.state_dict.items() if t.is_contiguous()}
    weights = Weights({name: (tensor, TensorProperties(tensor)) for name, tensor in state.items()})
    package.package_pt2(str(tmp_path / "a.pt2"), aoti_files=[str(tmp_path / "code.so"), weights])
    assert_equal(read_checkpoint(tmp_path / "a.pt2"), state)


@pytest.mark.parametrize("old", [False, True], ids=["now", "torch 2.6"])
def test_weights_inside_compiled_code(old, tmp_path):
    (tmp_path / "code.so").write_bytes(b"\x7fELF")
    if old:
        members = [
            ("version", b"0"),
            ("archive_format", b"pt2"),
            ("data/aotinductor/model/code.so", b"\x7fELF"),
        ]
        (tmp_path / "a.pt2").write_bytes(build.zip_bytes(members))
    else:
        package.package_pt2(str(tmp_path / "a.pt2"), aoti_files=[str(tmp_path / "code.so")])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a.pt2")
    assert str(caught.value) == (
        f"{tmp_path}/a.pt2: not supported: a .pt2 archive of AOTInductor: its weights are inside the "
        "compiled code. Remedy: give the checkpoint or the torch.export.save file that it was made from"
    )


def test_from_a_big_endian_machine(program, tmp_path):
    torch.export.save(program, tmp_path / "a.pt2")
    change(tmp_path / "a.pt2", lambda members: members.update(byteorder=b"big"))
    with pytest.raises(CheckpointError, match="not supported: a .pt2 archive from a big-endian machine"):
        read_checkpoint(tmp_path / "a.pt2")


def test_weights_that_are_pickled(program, tmp_path):
    torch.export.save(program, tmp_path / "a.pt2")
    whole = torch.randn(4, 3)
    torch.save(torch.nn.Parameter(whole.t()), tmp_path / "plain.pt")
    torch.save([1], tmp_path / "list.pt")

    def edit(members):
        config = json.loads(members["data/weights/model_weights_config.json"])
        for name in ("plain", "list"):
            entry = {"path_name": name, "is_param": True, "use_pickle": True, "tensor_meta": None}
            config["config"][name] = entry
            members[f"data/weights/{name}"] = (tmp_path / f"{name}.pt").read_bytes()
        members["data/weights/model_weights_config.json"] = json.dumps(config)

    change(tmp_path / "a.pt2", edit)
    table = read_checkpoint(tmp_path / "a.pt2")
    assert table["plain"].read() == bits(whole.t())
    assert table["plain"].role == "parameter"
    assert table["list"].unsupported == "kind of tensor: a list of 1 items"


def test_nothing_in_it(tmp_path):
    empty = torch.export.export(torch.nn.ReLU(), (torch.randn(2),))
    for layout, write in LAYOUTS.items():
        write(empty, tmp_path / layout)
        with pytest.raises(CheckpointError, match="pt2 archive whose program has no parameters and buffers"):
            read_checkpoint(tmp_path / layout)


# hostile lists of weights

META = {
    "dtype": 7, "sizes": [{"as_int": 3}], "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0},
    "layout": 7, "requires_grad": False, "device": {"type": "cpu", "index": None},
}  # fmt: skip


def archive(entries, raw=None, weights=bytes(12)):
    text = json.dumps({"config": entries}).encode() if raw is None else raw
    return build.zip_bytes(
        [
            ("m/archive_format", b"pt2"),
            ("m/models/model.json", b"{}"),
            ("m/data/weights/model_weights_config.json", text),
            ("m/data/weights/weight_0", weights),
        ]
    )


def entry(path="weight_0", is_param=True, use_pickle=False, **meta):
    return {
        "path_name": path, "is_param": is_param, "use_pickle": use_pickle, "tensor_meta": {**META, **meta}
    }  # fmt: skip


def test_the_archive_built_here_is_good(tmp_path):
    (tmp_path / "a").write_bytes(archive({"w": entry()}))
    assert read_checkpoint(tmp_path / "a")["w"].values().tolist() == [0, 0, 0]


TWICE = b'{"config": {"w": {}, "w": {}}}'
HUGE = [{"as_int": 2**40}]
ONE = [{"as_int": 1}]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (archive({}, b"\xff"), "not UTF-8"),
        (archive({}, b"{"), "it is not JSON"),
        (archive({}, b"[" * 100_000), "it is not JSON"),
        (archive({}, b"[]"), "model_weights_config.json is an object"),
        (archive({}, TWICE), "no key is in it twice"),
        (archive({}, b'{"config": 1e9}'), "its numbers are whole"),
        (archive({}, b'{"config": {"w": ' + b"9" * 30 + b"}}"), "its numbers are sizes"),
        (archive({}, b'{"a": "' + b"x" * 5 * 2**20 + b'"}'), "too long .got 5242889 bytes, more"),
        (archive({}, b"{}"), "config is an object"),
        (archive({"w": 3}), "w is an object"),
        (archive({"w": entry(path=3)}), "path_name of w is text"),
        (archive({"w": entry(path="../../../m/archive_format")}), "missing from the zip archive"),
        (archive({"w": entry(path="weight_9")}), r"storage is missing .*\(got m/data/weights/weight_9\)"),
        (archive({"w": entry(is_param=1)}), "is_param of w is true or false"),
        (archive({"w": entry(use_pickle=None)}), "use_pickle of w is true or false"),
        (archive({"w": entry(use_pickle=True)}), "directory at its end cannot be read"),
        (archive({"w": {**entry(), "tensor_meta": None}}), "tensor_meta of w is an object"),
        (archive({"w": entry(sizes=3)}), "sizes is a list"),
        (archive({"w": entry(sizes=[3])}), "sizes of w is told by whole numbers"),
        (archive({"w": entry(sizes=[{"as_int": True}])}), "sizes of w is told by whole numbers"),
        (archive({"w": entry(sizes=[{"as_expr": {"expr_str": "s0"}}])}), "told by whole numbers"),
        (archive({"w": entry(sizes=[{"as_int": -3}])}), "has sizes of 0 or more"),
        (archive({"w": entry(sizes=HUGE)}), "fewer than"),
        (archive({"w": entry(sizes=HUGE, strides=[{"as_int": 0}])}), "fewer than"),
        (archive({"w": entry(sizes=ONE * 65, strides=ONE * 65)}), "at most 64 dimensions"),
        (archive({"w": entry(sizes=[{"as_int": 4}])}), "ends within its storage's 3 elements"),
        (archive({"w": entry(strides=[{"as_int": 2}])}), "ends within its storage's 3 elements"),
        (archive({"w": entry(strides=[])}), "as many strides as sizes"),
        (archive({"w": entry(storage_offset={"as_int": 1})}), "ends within its storage's 3 elements"),
        (archive({"w": entry(storage_offset={"as_int": -1})}), "offset of 0 or more"),
        (archive({"w": entry(storage_offset=0)}), "storage_offset of w is told by whole numbers"),
        (archive({"w": entry(dtype=8)}), "as long as its bytes in the file"),
        (archive({"w": entry(), "_orig_mod.w": entry()}), "same name"),
        (archive({"w\x1b[31m": 3}), r"w\\x1b\[31m is an object"),
    ],
)  # fmt: skip
def test_is_refused(raw, says, tmp_path):
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_checkpoint(tmp_path / "a")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(tmp_path)) + 600


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"dtype": 99}, "dtype number 99"),
        ({"dtype": "7"}, "dtype unknown"),
        ({"layout": 1}, "layout that is not strided"),
    ],
)
def test_is_listed_as_unsupported(meta, reason, tmp_path):
    (tmp_path / "a").write_bytes(archive({"w": entry(**meta), "v": entry()}))
    table = read_checkpoint(tmp_path / "a")
    assert table["w"].unsupported == reason
    assert table["w"].shape == (3,)
    with pytest.raises(CheckpointError, match=f"values of w cannot be read: unsupported {reason}"):
        table["w"].read()


def test_fake_weights_have_no_values(tmp_path):
    (tmp_path / "a").write_bytes(archive({"w": entry()}, weights=b""))
    assert read_checkpoint(tmp_path / "a")["w"].unsupported == "fake tensor, saved without values"


def test_one_storage_for_two_dtypes(tmp_path):
    """Torch reads the second with the first one's dtype: no value is better than either."""
    (tmp_path / "a").write_bytes(archive({"w": entry(), "v": entry(dtype=4)}))
    table = read_checkpoint(tmp_path / "a")
    assert table["w"].unsupported is None
    assert table["v"].unsupported == "storage that tensors of two dtypes share"


def test_damage_to_a_weight_is_told(tmp_path):
    raw = archive({"w": entry()}, weights=b"flip me, yes")
    (tmp_path / "a").write_bytes(raw.replace(b"flip me, yes", b"flip me, yEs"))
    with pytest.raises(CheckpointError, match=r"checksum of storage weight_0 \(tensor w\) does not match"):
        read_checkpoint(tmp_path / "a")["w"].read()
