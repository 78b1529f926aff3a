"""TorchScript files: the state is what ``torch.jit.load(FILE).state_dict()`` has, bit by bit."""

import io
import re
import zipfile

import pytest
import torch
import torchvision
from hostile import build_hostile as build

from freezekit import audit_checkpoint
from freezekit.audit.checkpoint import read_checkpoint
from freezekit.errors import CheckpointError

# torch's word on what it wrote itself: both are going out of use
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = torch.nn.BatchNorm2d(4)
        self.register_buffer("scratch", torch.randn(3), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("absent", None)
        self.plain = torch.randn(2)
        self.sizes = [1, 2]
        self.several = [torch.randn(2)]
        self.by_name = {"a": 1}

    def forward(self, x):
        return self.bn(x) + self.scratch.sum()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Inner(), Inner()
        self.again = self.first
        self.conv = torch.nn.Conv2d(4, 4, 1).to(memory_format=torch.channels_last)
        self.tied = self.conv.weight
        self.gain = torch.nn.Parameter(torch.randn(4, 1, 1).bfloat16())
        self.register_buffer("index", torch.arange(6).view(2, 3).t())
        self.tail = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.ReLU())

    def forward(self, x):
        return self.tail(self.again(self.second(self.first(self.conv(x))))) * self.gain.float()


def filled(net):
    """Random statistics, none at its default."""
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor.float()) + 0.5)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(torch.randint(1, 1000, ()).item())
    return net.eval()


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_as_torch_has_it(path):
    table, state = read_checkpoint(path), torch.jit.load(path).state_dict()
    assert list(table) == list(state)
    for name, tensor in state.items():
        assert table[name].dtype == str(tensor.dtype).removeprefix("torch.")
        assert table[name].shape == tuple(tensor.shape)
        assert table[name].read() == bits(tensor), name
    return table


def said(table):
    """The notes, but for the one that tells of parts that are built alike."""
    return [note for note in table.notes if not note.startswith("also holds: :first")]


def test_scripted(tmp_path):
    net = filled(Net())
    torch.jit.script(net).save(tmp_path / "a.pt")
    table = assert_as_torch_has_it(tmp_path / "a.pt")
    assert said(table) == []
    assert {name: table[name].role for name in ("tied", "gain", "index", "again.scratch")} == {
        "tied": "parameter",
        "gain": "parameter",
        "index": "buffer",
        "again.scratch": "buffer",
    }
    assert table.norm_layers() == ["first.bn", "second.bn", "again.bn", "tail.0"]
    # TorchScript knows no buffer that is not persistent; nothing else is more or less than the model has
    assert set(net.state_dict()) == {name for name in table if not name.endswith("scratch")}


def test_traced_has_mangled_classes(tmp_path):
    torch.jit.trace(filled(Net()), torch.randn(2, 4, 3, 3)).save(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert any("___torch_mangle_" in name for name in archive.namelist())
    table = assert_as_torch_has_it(tmp_path / "a.pt")
    assert table["tail.0.running_mean"].role == "running_mean"


def test_for_the_lite_interpreter(tmp_path):
    torch.jit.script(filled(Net()))._save_for_lite_interpreter(str(tmp_path / "a.ptl"))
    assert_as_torch_has_it(tmp_path / "a.ptl")


def rewritten(path, change):
    """Write a zip again, with its members changed by name."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: (archive.read(info), info.compress_type) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, (data, method) in members.items():
            if (data := change(name, data)) is not None:
                archive.writestr(name, data, method)


def test_without_code_every_tensor_counts(tmp_path):
    net = filled(Net())
    torch.jit.script(net)._save_for_lite_interpreter(str(tmp_path / "a.ptl"))
    rewritten(tmp_path / "a.ptl", lambda name, data: None if "/code/" in name else data)
    table = read_checkpoint(tmp_path / "a.ptl")
    assert set(net.state_dict()) < set(table)
    assert table["first.plain"].read() == bits(net.first.plain)
    assert said(table) == [
        "it does not say which attributes are buffers: every tensor in it counts as state",
    ]


def test_from_before_torch_1_5(tmp_path):
    """Then no line told the buffers: they were whatever tensor was no parameter."""
    net = filled(Net())
    torch.jit.script(net).save(tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", lambda name, data: re.sub(rb"\n  __buffers__ = .*", b"", data))
    table = read_checkpoint(tmp_path / "a.pt")
    assert set(net.state_dict()) < set(table)
    assert table["tail.0.running_var"].read() == bits(net.tail[0].running_var)
    assert table["conv.weight"].role == "parameter"
    assert len(said(table)) == 1


def test_typed_lists_of_old_files(tmp_path):
    wrapped = build.call(build.glob("torch.jit._pickle", "build_intlist"), b"](" + build.number(3) + b"e")
    body = build.mapping(sizes=wrapped, weight=build.tensor())
    body = build.glob("__torch__", "Net") + b")\x81" + body + b"b"
    code = b'class Net(Module):\n  __parameters__ = ["weight", ]\n  __buffers__ = []\n  weight : Tensor\n'
    members = [*build.torch_members(body), ("archive/code/__torch__.py", code)]
    (tmp_path / "a.pt").write_bytes(build.zip_bytes(members))
    assert list(read_checkpoint(tmp_path / "a.pt")) == ["weight"]


@pytest.mark.filterwarnings("ignore")
def test_packed_weights_are_listed_as_unsupported(tmp_path):
    class Quantised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bn = torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(self.fc(x))

    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no quantised kernels here")
    net = torch.ao.quantization.quantize_dynamic(filled(Quantised()), {torch.nn.Linear})
    torch.jit.script(net).save(tmp_path / "a.pt")
    table, state = read_checkpoint(tmp_path / "a.pt"), torch.jit.load(tmp_path / "a.pt").state_dict()
    packed = "fc._packed_params._packed_params"
    assert set(table) == {*state, packed}
    assert table[packed].unsupported == "object of the class quantized.LinearPackedParamsBase"
    for name, tensor in state.items():
        assert table[name].read() == bits(tensor)


def test_frozen_has_no_state(tmp_path):
    torch.jit.freeze(torch.jit.script(filled(Net()))).save(tmp_path / "a.pt")
    assert not torch.jit.load(tmp_path / "a.pt").state_dict()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert str(caught.value) == (
        f"{tmp_path}/a.pt: a frozen TorchScript module (torch.jit.freeze) has no state: its parameters are "
        "constants now. Remedy: give the checkpoint it was made from, or the module as it was before "
        "torch.jit.freeze"
    )


def test_without_parameters(tmp_path):
    torch.jit.script(torch.nn.ReLU()).save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="TorchScript module without parameters and buffers"):
        read_checkpoint(tmp_path / "a.pt")


def test_resnet_is_audited_as_its_state_dict(tmp_path):
    model = filled(torchvision.models.resnet18())
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(base, tmp_path / "base.pt")
    model.layer1[0].bn1.running_mean += 1
    model.layer2[1].bn2.running_var[3] = float("nan")
    with torch.no_grad():
        model.fc.bias += 1
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.jit.script(model).save(tmp_path / "scripted.pt")
    for against in (None, tmp_path / "base.pt"):
        plain = audit_checkpoint(tmp_path / "state.pt", against)
        scripted = audit_checkpoint(tmp_path / "scripted.pt", against)
        assert scripted.findings == plain.findings
        assert scripted.layers == plain.layers
        assert scripted.changed == plain.changed
        assert scripted.notes == plain.notes
        assert not plain.clean
    assert "layer1.0.bn1" in {finding.name for finding in plain.findings}


def scripted_bytes(code, compression=zipfile.ZIP_DEFLATED, body=None):
    body = build.mapping(weight=build.tensor()) if body is None else body
    body = build.glob("__torch__", "Net") + b")\x81" + body + b"b"
    buffer = io.BytesIO(build.zip_bytes(build.torch_members(body)))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/code/__torch__.py", code, compression)
    return buffer.getvalue()


CODE = 'class Net(Module):\n  __parameters__ = ["weight", ]\n  __buffers__ = []\n  weight : Tensor\n'


def test_the_file_built_here_is_good(tmp_path):
    (tmp_path / "a").write_bytes(scripted_bytes(CODE))
    assert read_checkpoint(tmp_path / "a")["weight"].values().tolist() == [0, 0, 0]


BIG = CODE + " " * 40_000_000


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (scripted_bytes(BIG), r"__torch__.py is too long \(got 40000\d\d\d bytes, more than 10485760\)"),
        (
            scripted_bytes(BIG).replace(len(BIG).to_bytes(4, "little"), len(CODE).to_bytes(4, "little")),
            "zip member has two sizes",
        ),
        (
            scripted_bytes(CODE)[:-30],
            "directory at its end cannot be",
        ),
        (
            scripted_bytes("class Other(Module):\n  __parameters__ = []\n"),
            "TorchScript module without parameters",
        ),
        (scripted_bytes(CODE, body=build.number(3)), "holds no module"),
        (
            scripted_bytes(CODE, body=b"}K\1" + build.tensor() + b"s"),
            "attribute's name is no text",
        ),
    ],
    ids=["bomb", "lying bomb", "cut", "no such class", "no module", "name"],
)
def test_is_refused(raw, says, tmp_path):
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(tmp_path / "a")


def test_damaged_code_is_refused(tmp_path):
    raw = scripted_bytes(CODE)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        info = archive.getinfo("archive/code/__torch__.py")
        start = info.header_offset + 30 + len(info.filename)
    for change, says in (
        (raw[:start] + b"\xff" * 20 + raw[start + 20 :], "cannot be unpacked"),
        (raw.replace(info.CRC.to_bytes(4, "little"), b"\1\2\3\4"), "checksum of archive/code/__torch__.py"),
    ):
        (tmp_path / "a").write_bytes(change)
        with pytest.raises(CheckpointError, match=says):
            read_checkpoint(tmp_path / "a")


def test_code_that_is_missing(tmp_path):
    body = build.mapping(weight=build.tensor(), inner=build.glob("__torch__.pkg.mod", "Inner") + b")\x81}b")
    (tmp_path / "a").write_bytes(scripted_bytes(CODE, body=body))
    says = r"damaged: the code of one of its classes is missing \(got archive/code/__torch__/pkg/mod.py\)"
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(tmp_path / "a")


def test_a_module_inside_itself(tmp_path):
    body = b"q\x00}" + build.text("me") + b"h\x00s"
    (tmp_path / "a").write_bytes(scripted_bytes(CODE, body=body))
    with pytest.raises(CheckpointError, match="nested without end"):
        read_checkpoint(tmp_path / "a")


def test_its_code_is_not_run(tmp_path):
    code = CODE + f"import os\nos.system('touch {tmp_path}/ran')\n"
    (tmp_path / "a").write_bytes(scripted_bytes(code))
    assert list(read_checkpoint(tmp_path / "a")) == ["weight"]
    assert not (tmp_path / "ran").exists()
