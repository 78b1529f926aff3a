"""Folders of torch.distributed.checkpoint are read as torch reads them, and nothing in them is run."""

import io
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
import time
import tracemalloc
from math import prod

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from freezekit import audit_checkpoint
from freezekit.audit.checkpoint import read_checkpoint
from freezekit.audit.checkpoint.distributed import _check_cover, _Chunk
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.state import DTYPE_SIZES
from freezekit.errors import CheckpointError, SelectionError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")

RANK = """
import sys, warnings
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

warnings.simplefilter("ignore")
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Flatten(), torch.nn.Linear(5 * 36, 1)
)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(3):
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
state, moments = get_state_dict(model, optimizer)
dcp.save({"app": {"model": state, "optim": moments}, "epoch": 3}, checkpoint_id=f"{folder}/fsdp")

wide, row = torch.randn(5, 7), torch.randn(1, 3)
tensors = {
    "rows": distribute_tensor(wide, mesh, [Shard(0)]),
    "columns": distribute_tensor(wide, mesh, [Shard(1)]),
    "half": distribute_tensor(wide.bfloat16(), mesh, [Shard(1)]),
    "same": distribute_tensor(wide, mesh, [Replicate()]),
    "few": distribute_tensor(row, mesh, [Shard(0)]),
}
dcp.save(tensors, storage_writer=dcp.FileSystemWriter(f"{folder}/split", single_file_per_rank=False))
local = {"rows": tensors["rows"], "own": torch.full((2,), 1.0 + rank)}
dcp.save(local, checkpoint_id=f"{folder}/local", use_collectives=False)
torch.save([wide, row], f"{folder}/values{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes save together."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "rank.py").write_text(RANK)
    command = [sys.executable, str(folder / "rank.py")]
    ranks = [subprocess.Popen([*command, str(rank), str(folder)]) for rank in range(2)]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    return folder


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(table, state):
    assert set(table) == set(state)
    for name, tensor in state.items():
        assert (table[name].dtype, table[name].shape) == (str(tensor.dtype)[6:], tuple(tensor.shape)), name
        assert table[name].read() == bits(tensor), name


def converted(folder, tmp_path):
    """As torch itself reads the folder."""
    dcp_to_torch_save(folder, tmp_path / "converted.pt")
    return torch.load(tmp_path / "converted.pt", weights_only=False)


def test_fsdp_model_of_two_ranks(two_ranks, tmp_path):
    table = read_checkpoint(two_ranks / "fsdp")
    assert_same(table, converted(two_ranks / "fsdp", tmp_path)["app"]["model"])
    assert table.source == str(two_ranks / "fsdp")
    assert table.notes == ()
    assert table["1.running_mean"].role == "running_mean"


def test_tensors_cut_along_any_axis(two_ranks, tmp_path):
    table = read_checkpoint(two_ranks / "split")
    assert_same(table, converted(two_ranks / "split", tmp_path))
    wide, row = torch.load(two_ranks / "values1.pt")
    assert_same(table, {"rows": wide, "columns": wide, "half": wide.bfloat16(), "same": wide, "few": row})


def test_ranks_with_metadata_of_their_own(two_ranks):
    table = read_checkpoint(two_ranks / "local")
    wide, _ = torch.load(two_ranks / "values0.pt")
    assert_same(table, {"rows": wide, "own": torch.ones(2)})
    said = "2 ranks wrote metadata of their own; of what several hold, the first one's is read"
    assert table.notes == (said,)


def model():
    torch.manual_seed(3)
    made = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.PReLU())
    made[1].running_var.uniform_(0.5, 2)
    return made


@pytest.mark.parametrize("threads", [1, 3])
def test_one_process(tmp_path, threads):
    net = model()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    state = {"model": net.state_dict(), "optim": optimizer.state_dict(), "epoch": 3}
    state |= {"freezekit_manifest": "what it says", "freezekit_report": [1]}
    writer = dcp.FileSystemWriter(tmp_path / "a", thread_count=threads)
    dcp.save(state, storage_writer=writer, no_dist=True)
    table = read_checkpoint(tmp_path / "a")
    assert_same(table, net.state_dict())
    assert_same(table, converted(tmp_path / "a", tmp_path)["model"])
    assert list(table) == list(net.state_dict())
    assert table.manifest == "what it says"
    said = "its 'freezekit_report' is not text, and was not used: save auditor.report().to_json() there"
    assert table.notes == (said,)


def test_big_tensors_are_compared(tmp_path):
    """They are read a piece at a time, and lie in no file as one."""
    torch.manual_seed(5)
    state = {"bn.weight": torch.randn(3), "conv.weight": torch.randn(3, 700_000)}
    moved = {**state, "conv.weight": state["conv.weight"].clone()}
    moved["conv.weight"][-1, -1] += 1
    for name, tensors in ("a", state), ("b", moved):
        dcp.save(tensors, checkpoint_id=tmp_path / name, no_dist=True)
    torch.save(state, tmp_path / "base")
    assert audit_checkpoint(tmp_path / "a", tmp_path / "base", frozen="*").clean
    assert audit_checkpoint(tmp_path / "base", tmp_path / "a", frozen="*").clean
    report = audit_checkpoint(tmp_path / "b", tmp_path / "base", frozen="*")
    assert report.changed == ("conv.weight",)
    assert report.findings[0].message == "parameter changed: 1 of 2,100,000 values by up to 1"


def test_flat_state_with_prefix(tmp_path):
    wrapped = {f"module.{name}": tensor for name, tensor in model().state_dict().items()}
    dcp.save(wrapped, checkpoint_id=tmp_path / "a", no_dist=True)
    table = read_checkpoint(tmp_path / "a")
    assert_same(table, model().state_dict())
    assert table.notes == ("stripped 'module.' (DataParallel) from the names",)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_dtypes_and_shapes(tmp_path):
    torch.manual_seed(4)
    state = {name: (torch.randn(3, 4) * 9).abs().to(getattr(torch, name)) for name in DTYPE_SIZES}
    state |= {"scalar": torch.tensor(7), "nothing": torch.empty(0, 3), "turned": torch.randn(3, 2).t()}
    state |= {"expanded": torch.randn(3, 1).expand(3, 5), "part": torch.randn(100)[40:44]}
    dcp.save(state, checkpoint_id=tmp_path / "a", no_dist=True)
    assert_same(read_checkpoint(tmp_path / "a"), state)


def test_entries_that_are_no_tensors_are_noted(tmp_path):
    state = {"w": torch.randn(3), "b": torch.randn(3), "lr": 0.1, "epoch": 7, "note": {"x": "y"}}
    dcp.save(state, checkpoint_id=tmp_path / "a", no_dist=True)
    table = read_checkpoint(tmp_path / "a")
    assert list(table) == ["w", "b"]
    assert table.notes == ("skipped entries that are not tensors: lr, epoch, note",)


# hand-made folders: {name: (size, [(offsets, tensor), ...])}


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def write(folder, tensors, others=(), edit=None):
    folder.mkdir(exist_ok=True)
    entries, places, stream = {}, {}, io.BytesIO()

    def put(index, value):
        start = stream.tell()
        torch.save(value, stream)
        places[index] = _StorageInfo("__0_0.distcp", start, stream.tell() - start)

    for name, (size, chunks) in tensors.items():
        for offsets, tensor in chunks:
            put(MetadataIndex(name, offsets), tensor)
        boxes = [ChunkStorageMetadata(torch.Size(offsets), tensor.shape) for offsets, tensor in chunks]
        dtype = chunks[0][1].dtype if chunks else torch.float32
        entries[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(size), boxes)
    for name, value in dict(others).items():
        put(MetadataIndex(name), value)
        entries[name] = BytesStorageMetadata()
    metadata = Metadata(entries, {name: tuple(name.split("/")) for name in entries}, places)
    if edit is not None:
        edit(metadata)
    (folder / "__0_0.distcp").write_bytes(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def read_all(folder):
    table = read_checkpoint(folder)
    for tensor in table.values():
        tensor.read()
    return table


def good():
    return {"w": ((4, 3), [((0, 0), torch.ones(2, 3)), ((2, 0), torch.zeros(2, 3))])}


def test_the_hand_made_folder_is_good(tmp_path):
    write(tmp_path / "a", good(), {"epoch": 3})
    assert read_all(tmp_path / "a")["w"].values().tolist() == [[1] * 3] * 2 + [[0] * 3] * 2
    assert converted(tmp_path / "a", tmp_path)["w"].tolist() == [[1] * 3] * 2 + [[0] * 3] * 2


def info(metadata, **fields):
    for index in list(metadata.storage_data)[:1]:
        vars(metadata.storage_data[index]).update(fields)


def box(metadata, offsets, sizes):
    metadata.state_dict_metadata["w"].chunks[1] = ChunkStorageMetadata(offsets, sizes)
    _, second, *_ = metadata.storage_data
    metadata.storage_data[MetadataIndex("w", offsets)] = metadata.storage_data.pop(second)


def size(metadata, value):
    metadata.state_dict_metadata["w"].size = value


def dtype(metadata, value):
    metadata.state_dict_metadata["w"].properties.dtype = value


def drop(metadata):
    metadata.storage_data.pop(list(metadata.storage_data)[1])


EDITS = {
    "parent": (lambda m: info(m, relative_path="../a/__0_0.distcp"), r"file outside its folder.*got \.\./a/"),
    "absolute": (lambda m: info(m, relative_path="/etc/passwd"), "names a file outside its folder"),
    "backslash": (lambda m: info(m, relative_path="..\\x"), "names a file outside its folder"),
    "drive": (lambda m: info(m, relative_path="C:x"), "names a file outside its folder"),
    "nul": (lambda m: info(m, relative_path="__0_0.distcp\0"), "names a file outside its folder"),
    "itself": (lambda m: info(m, relative_path="."), "names a file outside its folder"),
    "no such file": (lambda m: info(m, relative_path="__1_0.distcp"), r"half-written: .*no __1_0\.distcp"),
    "no text": (lambda m: info(m, relative_path=7), "an item or its file has no name"),
"the metadata": (lambda m: info(m, relative_path=".metadata"), "lies beyond the file's end"),
    "negative offset": (lambda m: info(m, offset=-1), "lies beyond the file's end.*at -1 of"),
    "huge offset": (lambda m: info(m, offset=2**70), "lies beyond the file's end.*out of range"),
    "huge length": (lambda m: info(m, length=10**15), "lies beyond the file's end.*1000000000000000 bytes"),
    "negative length": (lambda m: info(m, length=-5), "lies beyond the file's end"),
    "fraction": (lambda m: info(m, length=5.5), "lies beyond the file's end"),
    "short": (lambda m: info(m, length=20), "a chunk of w is bigger than its place"),
    "cut": (lambda m: info(m, length=100), "zip archive's directory"),
    "overlapping items": (lambda m: info(m, offset=5), "items overlap"),
    "zstd": (lambda m: info(m, transform_descriptors=["stream.zstd/1"]), "through an extension.*stream.zstd"),
    "gap": (lambda m: box(m, (3, 0), (1, 3)), "leave a gap or overlap"),
    "overlap": (lambda m: box(m, (1, 0), (2, 3)), r"leave a gap or overlap.*2 chunks of \[4, 3\]"),
    "outside": (lambda m: box(m, (3, 0), (2, 3)), r"lies outside of it.*\[2, 3\] at \[3, 0\] of \[4, 3\]"),
    "negative chunk": (lambda m: box(m, (-2, 0), (2, 3)), "out of range"),
    "other rank": (lambda m: box(m, (2,), (2,)), "lies outside of it"),
    "other shape": (lambda m: box(m, (2, 0), (3, 2)), "lies outside of it"),
    "no place": (drop, r"the chunk of w at \[2, 0\] has no place"),
    "huge size": (lambda m: size(m, (2**50, 3)), "fewer than 1099511627776 elements|out of range"),
    "bigger size": (lambda m: size(m, (5, 3)), "leave a gap or overlap"),
    "100 axes": (lambda m: size(m, (1,) * 100), "out of range"),
    "other dtype": (lambda m: dtype(m, torch.int32), r"not what \.metadata says.*float32.*instead of int32"),
    "no entries": (lambda m: vars(m).update(state_dict_metadata=None), "it has no entries"),
    "no places": (lambda m: vars(m).update(storage_data=None), "no places of them"),
    "key": (lambda m: m.state_dict_metadata.update({5: BytesStorageMetadata()}), "a key is no text"),
    "no chunks": (lambda m: vars(m.state_dict_metadata["w"]).update(chunks=None), "no chunks"),
    "no properties": (lambda m: vars(m.state_dict_metadata["w"]).update(properties=None), "no dtype"),
    "twice": (lambda m: m.planner_data.update(w=("b",), epoch=("b",)), "two entries are called b"),
    "in an entry": (lambda m: m.planner_data.update(epoch=("w", "b")), "both an entry and what holds others"),
    "only empty": (lambda m: m.state_dict_metadata.pop("w"), "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_hostile_metadata(tmp_path, name):
    edit, says = EDITS[name]
    write(tmp_path / "a", good(), {"epoch": 3}, edit)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=says) as caught:
        read_all(tmp_path / "a")
    assert time.perf_counter() - start < 2
    assert str(caught.value).startswith(str(tmp_path / "a"))
    assert str(caught.value).isprintable()


def test_a_chunk_that_holds_something_else(tmp_path):
    tensors = {"w": ((4, 3), [((0, 0), torch.ones(2, 3)), ((2, 0), torch.zeros(2, 3))])}
    write(tmp_path / "a", tensors)
    smaller = io.BytesIO()
    torch.save({"x": torch.zeros(2, 3)}, smaller)
    raw = bytearray((tmp_path / "a" / "__0_0.distcp").read_bytes())
    write(tmp_path / "a", tensors, edit=lambda m: info(m, offset=len(raw), length=smaller.tell()))
    (tmp_path / "a" / "__0_0.distcp").write_bytes(raw + smaller.getvalue())
    with pytest.raises(CheckpointError, match="a chunk of w is not what .metadata says.*got a dict with 'x'"):
        read_all(tmp_path / "a")


def test_damaged_values_are_seen(tmp_path):
    write(tmp_path / "a", {"w": ((64,), [((0,), torch.full((64,), 1.5))])})
    path = tmp_path / "a" / "__0_0.distcp"
    raw = path.read_bytes()
    path.write_bytes(
        raw.replace(torch.full((64,), 1.5).numpy().tobytes(), torch.full((64,), 2.5).numpy().tobytes())
    )
    with pytest.raises(CheckpointError, match="__0_0.distcp: damaged: checksum of storage 0 .tensor w"):
        read_all(tmp_path / "a")


@pytest.mark.parametrize("where", ["metadata", "item"])
def test_code_is_not_run(tmp_path, where):
    """Both are live: torch runs them."""
    canary = tmp_path / "ran"
    if where == "metadata":
        write(tmp_path / "a", good(), edit=lambda m: vars(m).update(version=Payload(canary)))
    else:
        write(tmp_path / "a", good(), {"epoch": Payload(canary)})
    with pytest.raises(CheckpointError, match=r"would run posix.system\(.touch.*nothing was executed"):
        read_all(tmp_path / "a")
    assert not canary.exists()
    converted(tmp_path / "a", tmp_path)
    assert canary.exists()


def test_half_written(tmp_path):
    write(tmp_path / "a", good())
    raw = (tmp_path / "a" / "__0_0.distcp").read_bytes()
    (tmp_path / "a" / "__0_0.distcp").write_bytes(raw[:-1])
    with pytest.raises(
        CheckpointError, match=r"__0_0\.distcp: truncated or hostile: the place of w lies beyond"
    ):
        read_checkpoint(tmp_path / "a")
    os.unlink(tmp_path / "a" / "__0_0.distcp")
    with pytest.raises(
        CheckpointError, match=r"half-written: a file that it names is missing .got no __0_0\.distcp"
    ):
        read_checkpoint(tmp_path / "a")
    os.mkfifo(tmp_path / "a" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="not a regular file .got a FIFO"):
        read_checkpoint(tmp_path / "a")
    os.unlink(tmp_path / "a" / ".metadata")
    (tmp_path / "a" / "__1_0.distcp").touch()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a")
    assert str(caught.value) == (
        f"{tmp_path}/a: a half-written torch.distributed.checkpoint folder (got no .metadata, which is"
        " written last). Remedy: copy the folder again, or take the checkpoint before it"
    )
    os.mkfifo(tmp_path / "a" / ".metadata")
    with pytest.raises(CheckpointError, match=r"\.metadata: not a regular file .got a FIFO"):
        read_checkpoint(tmp_path / "a")


def test_shards_newer_than_the_metadata(tmp_path):
    """As a save over another leaves them; who copied the folder may have left it so too."""
    write(tmp_path / "a", good())
    shard, metadata = tmp_path / "a" / "__0_0.distcp", tmp_path / "a" / ".metadata"
    for later, notes in (0, 0), (9, 0), (11, 1), (-1000, 0):
        os.utime(metadata, (1_700_000_000, 1_700_000_000))
        os.utime(shard, (1_700_000_000 + later, 1_700_000_000 + later))
        table = read_checkpoint(tmp_path / "a")
        assert len(table.notes) == notes
    os.utime(shard, (1_800_000_000, 1_800_000_000))
    (said,) = read_checkpoint(tmp_path / "a").notes
    assert said.startswith("__0_0.distcp is newer than .metadata, which is written last: ")


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle", b"\x80\x04N.", b"\x80\x04}.", b"{}"])
def test_metadata_that_is_something_else(tmp_path, content):
    write(tmp_path / "a", good())
    (tmp_path / "a" / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: "):
        read_checkpoint(tmp_path / "a")


def test_limits_can_be_set_and_lifted(tmp_path):
    write(tmp_path / "a", good())
    with pytest.raises(CheckpointError, match=r"holds too many keys .got 1, more than 0.*--no-limits"):
        read_checkpoint(tmp_path / "a", limits=Limits(keys=0))
    with pytest.raises(CheckpointError, match=r"metadata is too long .*more than 100.*--no-limits"):
        read_checkpoint(tmp_path / "a", limits=Limits(pickle_bytes=100))
    assert list(read_checkpoint(tmp_path / "a", limits=Limits.NONE)) == ["w"]


def test_roots_and_training(two_ranks):
    table = read_checkpoint(two_ranks / "fsdp")
    assert (table.root, [root.path for root in table.roots]) == ("app.model", ["app.model"])
    assert table.training.epoch == 3
    (optimizer,) = table.training.optimizers
    assert optimizer.path == "app.optim"
    names = {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}
    assert set(optimizer.groups[0]) == names
    assert optimizer.shapes["0.weight"] == (5, 3, 3, 3)
    assert {step.values().item() for step in optimizer.steps.values()} == {3.0}


def test_another_root(tmp_path):
    net = model()
    ema = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    state = {"model": net.state_dict(), "ema": ema}
    dcp.save(state, checkpoint_id=tmp_path / "a", no_dist=True)
    assert_same(read_checkpoint(tmp_path / "a", root="ema"), state["ema"])
    with pytest.raises(SelectionError, match="no such root .got 'emma'.*did you mean 'ema'"):
        read_checkpoint(tmp_path / "a", root="emma")


def test_changed_while_read(tmp_path):
    write(tmp_path / "a", good())
    table = read_checkpoint(tmp_path / "a")
    table["w"].read()
    path = tmp_path / "a" / "__0_0.distcp"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: changed while reading"):
        table["w"].read()


def test_safetensors_inside(tmp_path):
    if not hasattr(filesystem, "SerializationFormat"):
        pytest.skip("this torch writes no safetensors")
    writer = dcp.FileSystemWriter(
        tmp_path / "a", serialization_format=filesystem.SerializationFormat.SAFETENSORS
    )
    dcp.save(model().state_dict(), storage_writer=writer, no_dist=True)
    with pytest.raises(CheckpointError, match="a .distcp file that is written as safetensors"):
        read_checkpoint(tmp_path / "a")


def test_one_list_of_chunks_for_many_tensors(tmp_path):
    """A pickle may say with two bytes that a tensor has the chunks of another: 9 million of them in all."""

    chunks = [ChunkStorageMetadata((index,), (1,)) for index in range(3000)]

    def edit(metadata):
        entry = TensorStorageMetadata(TensorProperties(torch.float32), (3000,), chunks)
        metadata.state_dict_metadata.update({f"t{index}": entry for index in range(3000)})
        metadata.planner_data = None
        metadata.storage_data.update(
            {MetadataIndex("t0", (index,)): _StorageInfo("__0_0.distcp", index, 0) for index in range(3000)}
        )

    write(tmp_path / "a", good(), edit=edit)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"the chunk of t1 at \[0\] has no place"):
        read_checkpoint(tmp_path / "a")
    assert time.process_time() - start < 2


def test_no_more_is_read_than_there_is(tmp_path):
    """A hundred chunks in one place would be a hundred times the file."""
    big = torch.zeros(100_000)

    def edit(metadata):
        (index,) = metadata.storage_data
        entry = metadata.state_dict_metadata["w"]
        entry.size = torch.Size((10_000_000,))
        entry.chunks = [ChunkStorageMetadata((at,), (100_000,)) for at in range(0, 10_000_000, 100_000)]
        for chunk in entry.chunks:
            metadata.storage_data[MetadataIndex("w", chunk.offsets)] = metadata.storage_data[index]

    write(tmp_path / "a", {"w": ((100_000,), [((0,), big)])}, edit=edit)
    with pytest.raises(CheckpointError, match="items overlap"):
        read_checkpoint(tmp_path / "a")


def partition(shape, rng):
    """Cut a box in two again and again."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(rng.randrange(12)):
        offsets, sizes = boxes.pop(rng.randrange(len(boxes)))
        axis = rng.randrange(len(shape))
        at = rng.randrange(sizes[axis] + 1)
        for start, length in ((0, at), (at, sizes[axis] - at)):
            if length:
                moved = (*offsets[:axis], offsets[axis] + start, *offsets[axis + 1 :])
                boxes.append((moved, (*sizes[:axis], length, *sizes[axis + 1 :])))
    return boxes


def covers(shape, boxes):
    count = torch.zeros(shape, dtype=torch.int64)
    for offsets, sizes in boxes:
        count[tuple(slice(at, at + length) for at, length in zip(offsets, sizes, strict=True))] += 1
    return bool((count == 1).all())


def test_cover_is_told_exactly():
    """Against counting each element; moved, dropped and doubled boxes keep the volume right often enough."""
    rng = random.Random(7)
    told = {True: 0, False: 0}
    for _ in range(4000):
        shape = tuple(rng.randrange(1, 6) for _ in range(rng.randrange(1, 4)))
        boxes = partition(shape, rng)
        for _ in range(rng.choice((0, 0, 1, 2))):
            index = rng.randrange(len(boxes))
            _, sizes = boxes[index]
            sizes = rng.choice(boxes)[1] if rng.random() < 0.3 else sizes
            boxes[index] = (tuple(rng.randrange(n - k + 1) for n, k in zip(shape, sizes, strict=True)), sizes)
        chunks = [_Chunk(offsets, sizes, None) for offsets, sizes in boxes]
        try:
            _check_cover("w", shape, chunks)
            fits = True
        except CheckpointError:
            fits = False
        assert fits == covers(shape, boxes), (shape, boxes)
        right = sum(prod(sizes) for _, sizes in boxes) == prod(shape)
        told[fits] += right
    assert min(told.values()) > 100


def test_many_chunks(tmp_path):
    chunks = [((at,), torch.full((1,), float(at))) for at in range(1000)]
    random.Random(1).shuffle(chunks)
    grid = [_Chunk((x, y), (1, 1), None) for x in range(200) for y in range(200)]
    start = time.process_time()
    assert len(_check_cover("w", (200, 200), grid)) == 40_000
    assert time.process_time() - start < 2
    write(tmp_path / "a", {"w": ((1000,), chunks)})
    assert read_checkpoint(tmp_path / "a")["w"].values().tolist() == list(range(1000))


def test_only_what_is_asked_for_is_read(tmp_path):
    big, small = torch.randn(1_000_000), torch.randn(10)
    write(tmp_path / "a", {"big": ((1_000_000,), [((0,), big)]), "small": ((10,), [((0,), small)])})
    tracemalloc.start()
    assert read_checkpoint(tmp_path / "a")["small"].read() == bits(small)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_torch_is_not_imported(tmp_path):
    write(tmp_path / "a", good())
    code = textwrap.dedent("""
        import sys
        from freezekit.audit.checkpoint import read_checkpoint
        assert read_checkpoint(sys.argv[1])["w"].values().sum() == 6
        assert "torch" not in sys.modules
    """)
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True)


def test_relative_path_survives_a_change_of_directory(tmp_path, monkeypatch):
    write(tmp_path / "a", good())
    monkeypatch.chdir(tmp_path)
    table = read_checkpoint("a")
    monkeypatch.chdir(pathlib.Path("/"))
    assert table.source == "a"
    assert table["w"].values().sum() == 6
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(CheckpointError, match="a/__0_0.distcp: no such file"):
        table["w"].read()
