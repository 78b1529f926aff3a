"""Models spread over several files are read as transformers reads them, and an index leads nowhere else."""

import json
import os
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from freezekit import audit_checkpoint
from freezekit.audit.checkpoint import read_checkpoint, sharded
from freezekit.audit.manifest import manifest_of
from freezekit.errors import CheckpointError


def state(seed=0, prefix=""):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(5, 6))
    model[1].running_mean.normal_()
    return {prefix + name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


SHARDS = ("model-00001-of-00002", "model-00002-of-00002")


def write(folder, tensors, form="safetensors", edit=None, name=None):
    """Save a state in two shards with their index, as transformers does."""
    folder.mkdir(exist_ok=True)
    stem = "model" if form == "safetensors" else "pytorch_model"
    shards = [f"{stem}-0000{n}-of-00002.{form}" for n in (1, 2)]
    names = sorted(tensors)
    weight_map = {name: shards[2 * index >= len(names)] for index, name in enumerate(names)}
    for shard in shards:
        part = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        save_file(part, folder / shard) if form == "safetensors" else torch.save(part, folder / shard)
    index = {"metadata": {"total_size": 123.0}, "weight_map": weight_map}
    if edit is not None:
        edit(index["weight_map"])
    path = folder / (name or f"{stem}.{form}.index.json")
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return path


def assert_same(table, tensors):
    assert set(table) == set(tensors)
    for name, tensor in tensors.items():
        assert (table[name].dtype, table[name].shape) == (str(tensor.dtype)[6:], tuple(tensor.shape))
        assert table[name].read() == tensor.numpy().tobytes()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_index_and_its_folder(tmp_path, form):
    path = write(tmp_path / "a", state(), form)
    for given in (path, tmp_path / "a"):
        table = read_checkpoint(given)
        assert_same(table, state())
        assert table.source == str(path)
        assert table.notes == ()
        assert table["1.running_var"].role == "running_var"


@pytest.mark.parametrize("safe", [True, False])
def test_a_state_that_hugging_face_saved(tmp_path, safe):
    """By what save_pretrained calls."""
    hub = pytest.importorskip("huggingface_hub")
    tensors = {f"layer.{index}.weight": torch.randn(300, index + 1) for index in range(9)}
    for name in "ab":
        (tmp_path / name).mkdir()
    hub.save_torch_state_dict(tensors, tmp_path / "a", max_shard_size="10KB", safe_serialization=safe)
    assert len(os.listdir(tmp_path / "a")) > 4
    assert_same(read_checkpoint(tmp_path / "a"), tensors)
    hub.save_torch_state_dict(tensors, tmp_path / "b", safe_serialization=safe)
    assert len(os.listdir(tmp_path / "b")) == 1
    assert_same(read_checkpoint(tmp_path / "b"), tensors)


def test_audited_against_a_single_file(tmp_path):
    before = state()
    save_file(before, tmp_path / "base.safetensors")
    after = {**before, "1.running_mean": before["1.running_mean"] + 1}
    write(tmp_path / "a", after)
    report = audit_checkpoint(tmp_path / "a", against=tmp_path / "base.safetensors")
    assert [(finding.code, finding.name) for finding in report.findings] == [("FK101", "1")]
    assert audit_checkpoint(tmp_path / "base.safetensors", against=tmp_path / "a").clean is False


def test_prefix_of_all_names_is_stripped_over_all_shards(tmp_path):
    write(tmp_path / "a", state(prefix="module."), "bin")
    table = read_checkpoint(tmp_path / "a")
    assert_same(table, state())
    assert table.notes == ("stripped 'module.' (DataParallel) from the names",)
    # in one of the shards all names have it, so that it alone would lose it
    mixed = state(prefix="module.") | {"zzz": torch.ones(1)}
    write(tmp_path / "b", mixed, "bin")
    assert set(read_checkpoint(tmp_path / "b")) == set(mixed)


def test_texts_of_a_shard_are_found(tmp_path):
    path = write(tmp_path / "a", state())
    shard = tmp_path / "a" / f"{SHARDS[1]}.safetensors"
    save_file(load_file(shard), shard, metadata={"freezekit_manifest": "x"})
    assert read_checkpoint(path).manifest == "x"
    with pytest.raises(CheckpointError, match="manifest"):
        manifest_of(read_checkpoint(path))


def test_unlisted_tensors_are_read_and_noted(tmp_path):
    write(tmp_path / "a", state(), edit=lambda m: m.pop("0.bias"))
    table = read_checkpoint(tmp_path / "a")
    assert_same(table, state())
    said = f"{SHARDS[0]}.safetensors holds what the index does not list: 0.bias"
    assert table.notes == (said,)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("model.safetensors pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.bin model.safetensors.index.json", "model.safetensors.index.json"),
        ("model.safetensors model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin pytorch_model.bin.index.json", "pytorch_model.bin"),
        ("model.safetensors model.fp16.safetensors", "model.safetensors"),
        ("model.fp16.safetensors", "model.fp16.safetensors"),
        ("model.safetensors.index.fp16.json", "model.safetensors.index.fp16.json"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
        ("diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.fp16.bin"),
        ("adapter_model.safetensors adapter_model.bin", "adapter_model.safetensors"),
        ("pytorch_model.bin adapter_model.safetensors", "pytorch_model.bin"),
        ("only.pth", "only.pth"),
        ("checkpoint-5/model.safetensors", "checkpoint-5/model.safetensors"),
    ],
)
def test_which_file_of_a_folder(tmp_path, names, first):
    """As transformers prefers them; which of them was read is told by its values."""
    for seed, name in enumerate(names.split()):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith(".json"):
            write(tmp_path, state(seed), "bin" if ".bin" in name else "safetensors", name=name)
        elif name.endswith(".safetensors"):
            save_file(state(seed), path)
        else:
            torch.save(state(seed), path)
    table = read_checkpoint(tmp_path)
    assert_same(table, state(names.split().index(first)))
    assert table.source == str(tmp_path / first)
    others = [name for name in names.split() if name != first]
    assert table.notes == ((f"{tmp_path} also holds {others[0]}",) if others else ())


def test_links_of_a_cache_are_followed(tmp_path):
    write(tmp_path / "blobs", state())
    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(os.listdir(tmp_path / "blobs"))):
        os.rename(tmp_path / "blobs" / file, tmp_path / "blobs" / str(number))
        (snapshot / file).symlink_to(f"../../blobs/{number}")
    assert_same(read_checkpoint(snapshot), state())
    assert_same(read_checkpoint(snapshot / "model.safetensors.index.json"), state())


def test_a_run_is_no_checkpoint(tmp_path):
    for step in (9, 10):
        write(tmp_path / f"checkpoint-{step}", state())
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: a folder of several checkpoints, not one (got 2, from {tmp_path}/checkpoint-9 to"
        f" {tmp_path}/checkpoint-10). Remedy: give one of them; freezekit audit FOLDER takes them all, in the"
        " order of training"
    )


def rename(weight_map, shard):
    weight_map["0.bias"] = shard


EDITS = {
    "parent": (lambda m: rename(m, "../x.safetensors"), r"hostile: it names a file outside.*got \.\./x"),
    "absolute": (lambda m: rename(m, "/etc/passwd"), "names a file outside its folder"),
    "below": (lambda m: rename(m, "sub/x.safetensors"), "names a file outside its folder"),
    "backslash": (lambda m: rename(m, "..\\x.safetensors"), "names a file outside its folder"),
    "drive": (lambda m: rename(m, "C:x.safetensors"), "names a file outside its folder"),
    "nul": (lambda m: rename(m, "x\0.safetensors"), r"names a file outside its folder.*x\\x00"),
    "empty name": (lambda m: rename(m, ""), "names a file outside its folder"),
    "dots": (lambda m: rename(m, ".."), "names a file outside its folder"),
    "terminal": (lambda m: rename(m, "\x1b[31m"), r"1 of the 3 shards .* missing.*got no \\x1b"),
    "surrogate": (lambda m: rename(m, "\ud800"), "missing|damaged"),
    "long name": (lambda m: rename(m, "x" * 300), "names a file outside its folder"),
    "number": (lambda m: rename(m, 5), "the name of a shard is text"),
    "list": (lambda m: rename(m, ["x"]), "the name of a shard is text"),
    "missing": (lambda m: rename(m, "gone"), r"1 of the 3 shards .* missing .got no gone\).*download"),
    "itself": (lambda m: rename(m, "model.safetensors.index.json"), "no file of tensors .got another index"),
    "config": (lambda m: rename(m, "config.json"), r"config\.json: JSON, not a checkpoint"),
    "folder": (lambda m: rename(m, "sub"), "not a regular file .got a directory"),
    "fifo": (lambda m: rename(m, "fifo"), "not a regular file .got a FIFO"),
    "loop": (lambda m: rename(m, "loop"), r"1 of the 3 shards that it lists are missing"),
    "device": (lambda m: rename(m, "zero"), "not a regular file .got a device"),
    "other shard": (
        lambda m: rename(m, f"{SHARDS[1]}.safetensors"),
        "2.safetensors: the index and its shard do not fit: a tensor is not in it .got 0.bias",
    ),
    "no such tensor": (
        lambda m: m.update(more=f"{SHARDS[1]}.safetensors"),
        "do not fit: a tensor is not in it .got more",
    ),
    "nothing": (dict.clear, "holds no tensors"),
}


@pytest.mark.parametrize("name", EDITS)
def test_hostile_index(tmp_path, name):
    edit, says = EDITS[name]
    path = write(tmp_path / "a", state(), edit=edit)
    (tmp_path / "a" / "sub").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"a": 1}')
    (tmp_path / "a" / "zero").symlink_to("/dev/zero")
    (tmp_path / "a" / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "a" / "fifo")
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=says) as caught:
        read_checkpoint(path)
    assert time.perf_counter() - start < 2
    assert str(caught.value).startswith(str(tmp_path / "a"))
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == 3


def test_nothing_outside_the_folder_is_opened(tmp_path, monkeypatch):
    """Not even to find out that it is no shard."""
    path = write(tmp_path / "a", state(), edit=EDITS["parent"][0])
    save_file(state(), tmp_path / "x.safetensors")
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or real(path, *rest))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_checkpoint(path)
    assert {os.path.dirname(os.path.abspath(name)) for name in opened} == {str(tmp_path / "a")}


def test_a_tensor_in_two_shards(tmp_path):
    write(tmp_path / "a", state())
    shard = tmp_path / "a" / f"{SHARDS[1]}.safetensors"
    save_file(load_file(shard) | {"0.bias": torch.ones(4)}, shard)
    with pytest.raises(CheckpointError, match="hostile: a tensor is in two shards .got 0.bias"):
        read_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"weight_map": {"a": "x", "a": "y"}}', "no key is in it twice"),
        ('{"weight_map": {}, "weight_map": {"a": "x"}}', "no key is in it twice"),
        ('{"weight_map": ["a"]}', "its weight_map is an object"),
        ('{"metadata": "weight_map", "weight_map": null}', "its weight_map is an object"),
        ('{"weight_map": {"a": "x"', "it is not JSON"),
        ('{"weight_map": ' + "[" * 100_000, "not JSON"),
        ('{"weight_map": {"a": "x"}, "metadata": {"total_size": NaN}}', "numbers are finite"),
        ('{"weight_map": {"a": "x"}, "metadata": {"total_size": ' + "9" * 10_000 + "}}", "numbers are sizes"),
        ('{"weight_map": {"' + "a" * 5_000 + '": "gone"}}', "missing"),
    ],
)
def test_index_that_is_no_index(tmp_path, text, says):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(tmp_path)


def test_index_in_no_encoding(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"\xff": "x"}}')
    with pytest.raises(CheckpointError, match="not UTF-8 text"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("count", [200_000, 1_000_000])
def test_an_index_of_a_million_entries(tmp_path, count):
    """Of which a part can be read, and none of it has shards."""
    entries = ",".join(f'"model.layers.{index}.weight":"shard-{index}"' for index in range(count))
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{entries}}}}}')
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"too long for a shard index|too many shards .got 200000"):
        read_checkpoint(tmp_path)
    assert time.process_time() - start < 2


def test_memory_of_a_long_index(tmp_path, monkeypatch):
    weight_map = {f"model.layers.{index}.{'m' * 180}.weight": "gone" for index in range(150_000)}
    text = json.dumps({"weight_map": weight_map})
    assert 30 * 2**20 < len(text) < 32 * 2**20
    (tmp_path / "model.safetensors.index.json").write_text(text)
    del text, weight_map
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="1 of the 1 shards"):
        read_checkpoint(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()


def test_changed_while_read(tmp_path):
    path = write(tmp_path / "a", state())
    table = read_checkpoint(path)
    write(tmp_path / "a", state(1))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: changed while reading"):
        table["0.bias"].read()


def test_bin_shard_that_runs_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    write(tmp_path / "a", state(), "bin")
    torch.save({"0.bias": Payload()}, tmp_path / "a" / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model-00001-of-00002\.bin: .*nothing was executed"):
        read_checkpoint(tmp_path / "a")
    assert not (tmp_path / "ran").exists()


def test_only_what_is_asked_for_is_read(tmp_path):
    tensors = {"big": torch.randn(2_000_000), "small": torch.randn(3)}
    write(tmp_path / "a", tensors)
    tracemalloc.start()
    assert read_checkpoint(tmp_path / "a")["small"].read() == tensors["small"].numpy().tobytes()
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# DeepSpeed


def deepspeed(folder, names, module=None):
    folder.mkdir(parents=True)
    for name in names.split():
        torch.save({"module": module or state(), "global_steps": 100, "optimizer": None}, folder / name)
    (folder.parent / "latest").write_text(folder.name)


def test_deepspeed_whole(tmp_path):
    optim = "zero_pp_rank_0_mp_rank_00_optim_states.pt zero_pp_rank_1_mp_rank_00_optim_states.pt"
    deepspeed(tmp_path / "a" / "global_step100", f"mp_rank_00_model_states.pt {optim}")
    for given in (tmp_path / "a", tmp_path / "a" / "global_step100"):
        table = read_checkpoint(given)
        assert_same(table, state())
        assert table.source == str(tmp_path / "a" / "global_step100" / "mp_rank_00_model_states.pt")


def test_deepspeed_zero_3(tmp_path):
    """Its parameters are gone from the model states, the running statistics are not."""
    module = {
        name: tensor if name.endswith(("mean", "var", "tracked")) else torch.empty(0)
        for name, tensor in state().items()
    }
    names = " ".join(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1, 10))
    deepspeed(tmp_path / "a" / "global_step7", names, module)
    table = read_checkpoint(tmp_path / "a")
    assert list(table) == list(state())
    assert table["1.running_mean"].read() == state()["1.running_mean"].numpy().tobytes()
    reason = "placeholder of a parameter that ZeRO-3 split over the ranks: python zero_to_fp32.py FOLDER FILE"
    assert table["0.weight"].unsupported.startswith(reason)
    with pytest.raises(CheckpointError, match="the values of 0.weight cannot be read.*zero_to_fp32.py"):
        table["0.weight"].read()
    said = "ZeRO-3 split 6 parameters over the ranks, which were not read: python zero_to_fp32.py FOLDER FILE"
    assert table.notes == (f"{said} joins them",)


@pytest.mark.parametrize(
    "names",
    [
        "mp_rank_00_model_states.pt mp_rank_01_model_states.pt",
        "layer_00-model_states.pt layer_01-model_states.pt mp_rank_00_model_states.pt",
    ],
)
def test_deepspeed_split_model(tmp_path, names):
    deepspeed(tmp_path / "a" / "global_step7", names)
    with pytest.raises(CheckpointError, match="a DeepSpeed checkpoint of a model split by layers"):
        read_checkpoint(tmp_path / "a")


def test_index_too_long(tmp_path):
    path = write(tmp_path / "a", state())
    with open(path, "ab") as file:
        file.truncate(sharded._MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match="too long for a shard index .got 33554433 bytes"):
        read_checkpoint(path)
