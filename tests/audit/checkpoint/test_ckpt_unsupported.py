"""What is no checkpoint is told by its content, in one line that says what to do instead."""

import gzip
import io
import lzma
import pickle
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from hostile import build_hostile as build

from freezekit.audit.checkpoint import read_checkpoint
from freezekit.errors import CheckpointError

EXPORTED = "use the PyTorch checkpoint it was exported from"
CONVERTED = "use the PyTorch checkpoint it was converted from"
AGAIN = "download or copy the file again"
PATH = "check the path"
NEW_LINK = "get a new link, or the right to use it, and download the file again"
RE_SAVE = "load it where it came from and save model.state_dict() with torch.save or safetensors"
JOBLIB = "load it with joblib, if you trust it, and save the PyTorch model's state_dict() with torch.save"
SCRIPTED = "m = torch.jit.load(FILE); torch.save(m.state_dict(), 'state.pt'); then give state.pt"
GIVE = "give a .pt, .pth or .safetensors file"


def copy(tool):
    there = "copy its weights into the PyTorch model, and torch.save(model.state_dict(), FILE)"
    return f"load it with {tool}, {there}"


def inside(how):
    return f"unpack it first ({how}) and give the file inside"


# protobuf, msgpack, flatbuffers and tables, as little of them as is needed


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


NODE = field(1, b"x") + field(2, b"y") + field(4, b"Relu")
GRAPH = field(1, NODE) + field(2, b"main") + field(5, field(1, 3) + field(2, 1) + field(9, bytes(9000)))
ONNX = field(1, 8) + field(2, b"pytorch") + field(3, b"2.14.0") + field(7, GRAPH) + field(8, field(2, 17))
ONNX_OTHER_ORDER = field(8, field(2, 17)) + field(7, field(1, NODE)) + field(1, 8)
EXTERNAL = field(1, b"location") + field(2, b"weights.bin")
ONNX_EXTERNAL = field(1, 10) + field(7, field(5, field(1, 3) + field(13, EXTERNAL) + field(14, 1)))
COREML = field(1, 4) + field(2, field(1, field(1, b"image") + field(3, b"\x2a\0"))) + field(500, bytes(6000))
COREML_LONG = field(1, 7) + field(2, field(1, field(1, b"image") + field(2, b"x" * 5000)))
SAVED_MODEL = field(1, 1) + field(2, field(1, field(4, b"serve")) + field(2, bytes(5000)))
GRAPH_DEF = field(1, field(1, b"input") + field(2, b"Placeholder")) + field(
    1, field(1, b"w") + field(2, b"Const")
)
MINDSPORE = field(
    1, field(1, b"conv.weight") + field(2, field(1, 64) + field(2, b"Float32") + field(3, bytes(9999)))
)
MINDIR = field(1, b"0.1.1") + field(2, b"MindSpore") + field(3, b"2.3.0") + field(7, GRAPH)
FLAX = b"\x82" + b"\xa6params" + b"\x81\xa5dense\x81\xa6kernel" + b"\xc7\x10\x01" + bytes(16)
FLAX_FLAT = b"\xde\x00\x11\xd9\x21" + b"layers.0.attention.query.kernel__" + b"\xc8\x00\x10\x01" + bytes(16)
TF_INDEX = bytes(300) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
DRIVE = (
    "<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>"
    "Google Drive can't scan this file for viruses.</body></html>"
)
HF_PAGE = '<!doctype html>\n<html class=""><head><meta content="Hugging Face"><link href="https://huggingface.co/x">'
GITHUB = '<!DOCTYPE html>\n<html lang="en"><head><link rel="x" href="https://github.githubassets.com">GitHub'
DENIED = '<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code><Message>No</Message></Error>'
OPENVINO = '<?xml version="1.0"?>\n<net name="torch_jit" version="11">\n\t<layers>'
REFUSAL = "a server's refusal, saved in place of the file"
PAGE = "an HTML or XML page, not a checkpoint: probably an error page saved in its place"


def tar(**members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def of_torch_0_1(values):
    """What ``torch.save({"w": tensor})`` wrote then."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return 2 if thing is values else None

    whole = io.BytesIO()
    Pickler(whole, 2).dump({"w": values})
    storages = pickle.dumps(1, 2) + pickle.dumps((1, "cpu", torch.FloatStorage), 2)
    storages += struct.pack(f"<q{len(values)}f", len(values), *values) + pickle.dumps([], 2)
    tensors = pickle.dumps(1, 2) + pickle.dumps((2, 1, torch.FloatTensor), 2)
    tensors += struct.pack("<iiqqq", 1, 0, len(values), 1, 0)
    members = {"sys_info": pickle.dumps({}, 2), "pickle": whole.getvalue()}
    return tar(**members, storages=storages, tensors=tensors)


def npy():
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, w=np.ones(3))
    return buffer.getvalue()


PADDLE = {"fc.weight": np.ones(2), "StructuredToParameterName@@": {"fc.weight": "linear_0.w_0"}}


class LogisticRegression:
    """As scikit-learn has it."""

    __module__ = "sklearn.linear_model._logistic"


def sklearn_model():
    body = build.glob(LogisticRegression.__module__, LogisticRegression.__name__) + b")\x81"
    return build.pickled(body + build.mapping(C=build.number(1)) + b"b")


def table(what, *rows):
    return [(name, content, f"{what}{name_}", remedy) for name, content, name_, remedy in rows]


SUPPORTED = table(
    "not supported: ",
    ("onnx", ONNX, "a protobuf file (ONNX)", EXPORTED),
    ("onnx in another order", ONNX_OTHER_ORDER, "a protobuf file (ONNX)", EXPORTED),
    ("onnx with external data", ONNX_EXTERNAL, "a protobuf file (ONNX)", EXPORTED),
    ("ort", b"\x18\0\0\0ORTM" + bytes(20), "an ONNX Runtime model (.ort)", EXPORTED),
    ("tflite", b"\x1c\0\0\0TFL3" + bytes(20), "a TensorFlow Lite model", EXPORTED),
    ("executorch", b"\x3c\0\0\0ET12eh00" + bytes(20), "an ExecuTorch program (.pte)", EXPORTED),
    ("mobile flatbuffer", b"\x3c\0\0\0PTMF" + bytes(20), "a PyTorch Mobile model in a flatbuffer", SCRIPTED),
    ("saved_model.pb", SAVED_MODEL, "a TensorFlow SavedModel (saved_model.pb)", copy("TensorFlow")),
    ("tf graph", GRAPH_DEF, "a TensorFlow graph (.pb)", copy("TensorFlow")),
    ("tf index", TF_INDEX, "the index of a TensorFlow checkpoint", copy("TensorFlow")),
    ("hdf5", b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file (Keras, h5py)", copy("Keras or h5py")),
    ("matlab", b"MATLAB 5.0 MAT-file, Platform" + bytes(99), "a MATLAB file", copy("scipy.io.loadmat")),
    (
        "matlab 7.3",
        b"MATLAB 7.3 MAT-file" + bytes(493) + b"\x89HDF\r\n\x1a\n",
        "an HDF5 file (MATLAB)",
        copy("h5py"),
    ),
    ("flax", FLAX, "a msgpack file (Flax, JAX)", copy("flax.serialization")),
    ("flax, flat", FLAX_FLAT, "a msgpack file (Flax, JAX)", copy("flax.serialization")),
    (
        "orbax",
        b"\x0c\xdb\x3a\x2a" + bytes(99),
        "a part of an Orbax checkpoint (JAX)",
        copy("orbax.checkpoint"),
    ),
    (
        "gguf",
        b"GGUF\x03" + bytes(99),
        "a GGUF file (llama.cpp)",
        "use the safetensors file it was converted from",
    ),
    (
        "ggml",
        b"lmgg" + bytes(99),
        "a GGML file (whisper.cpp)",
        CONVERTED,
    ),
    ("coreml", COREML, "a Core ML model (.mlmodel)", EXPORTED),
    ("coreml, long", COREML_LONG, "a Core ML model (.mlmodel)", EXPORTED),
    ("npy", npy(), "a numpy array (.npy)", "save a state dict with torch.save or safetensors"),
    ("npz", npz(), "numpy arrays (.npz)", RE_SAVE),
    ("paddle", pickle.dumps(PADDLE), "parameters of PaddlePaddle (.pdparams)", copy("paddle.load")),
    ("mindspore", MINDSPORE, "a MindSpore checkpoint", copy("mindspore.load_checkpoint")),
    ("mindir", MINDIR, "a MindSpore model (.mindir)", EXPORTED),
    ("tensorrt", b"ftrt" + bytes(99), "a TensorRT engine", EXPORTED),
    ("openvino", OPENVINO.encode(), "an OpenVINO model (.xml and .bin)", EXPORTED),
    (
        "sklearn",
        sklearn_model(),
        "a model of scikit-learn",
        "it has no PyTorch tensors; give a PyTorch checkpoint",
    ),
    (
        "joblib",
        b"\x80\x05\x95\x10\0\0\0\0\0\0\0\x8c\x13joblib.numpy_pickle\x94" + bytes(50),
        "a joblib file (scikit-learn)",
        JOBLIB,
    ),
    (
        "joblib, compressed",
        zlib.compress(b"\x80\x05" + bytes(99), 3),
        "compressed with zlib, as joblib does",
        JOBLIB,
    ),
    (
        "torch 0.1",
        of_torch_0_1([1.5, -2.0, 3.25]),
        "a tar archive of torch 0.1",
        "if you trust its source: torch.save(torch.load(FILE, weights_only=False), NEW), then give NEW",
    ),
    ("tar", tar(weights=b"x"), "a tar archive", inside("tar xf")),
    ("gzip", gzip.compress(b"x" * 99), "compressed with gzip", inside("gunzip, tar xzf")),
    ("bzip2", b"BZh91AY&SY" + bytes(9), "compressed with bzip2", inside("bunzip2")),
    ("xz", lzma.compress(b"x"), "compressed with xz", inside("unxz")),
    ("lzma", lzma.compress(b"x", lzma.FORMAT_ALONE), "compressed with lzma", inside("unlzma")),
    ("zstd", b"\x28\xb5\x2f\xfd" + bytes(9), "compressed with zstd", inside("unzstd")),
    ("lz4", b"\x04\x22\x4d\x18" + bytes(9), "compressed with lz4", inside("unlz4")),
    ("7z", b"7z\xbc\xaf\x27\x1c" + bytes(9), "a 7z archive", inside("7z x")),
    ("rar", b"Rar!\x1a\x07\x01\0" + bytes(9), "a rar archive", inside("unrar x")),
    (
        "lfs",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 13\n",
        "a git-LFS pointer, not the file itself",
        "run `git lfs pull`",
    ),
    (
        "xet",
        b"# xet version 0\nfilesize = 12\nhash = '00'\n",
        "a Xet pointer, not the file itself",
        "get the file with `hf download REPO FILE`",
    ),
    ("pdf", b"%PDF-1.7\n" + bytes(9), "a PDF document", PATH),
    ("png", b"\x89PNG\r\n\x1a\n" + bytes(9), "a PNG image", PATH),
    ("jpeg", b"\xff\xd8\xff\xe0" + bytes(9), "a JPEG image", PATH),
    ("gif", b"GIF89a" + bytes(9), "a GIF image", PATH),
    ("script", b"#!/bin/sh\nwget x\n", "a script", PATH),
    (
        "elf",
        b"\x7fELF\x02" + bytes(9),
        "compiled code (ELF)",
        EXPORTED.replace("exported", "compiled"),
    ),
    ("exe", b"MZ\x90\0" + bytes(9), "a Windows program or library", PATH),
    (
        "lnk",
        b"L\0\0\0\x01\x14\x02\0" + bytes(99),
        "a Windows shortcut (.lnk)",
        "give the file that it points to",
    ),
    (
        "apple double",
        b"\0\x05\x16\x07\0\x02\0\0Mac OS X" + bytes(50),
        "what macOS keeps beside a file (._NAME)",
        "give the file whose name has no ._ in front",
    ),
    (
        "zip in parts",
        b"PK\x07\x08PK\x03\x04" + bytes(50),
        "the first part of a zip archive in several parts",
        "join them first (zip -s 0 FILE.zip --out WHOLE.zip) and give the whole",
    ),
    (
        "keras",
        build.zip_bytes([("metadata.json", b"{}"), ("config.json", b"{}"), ("model.weights.h5", b"x")]),
        "a Keras model (.keras)",
        "load it with Keras, copy its weights into the PyTorch model, and save model.state_dict()",
    ),
    (
        "torchscript 1.0",
        build.zip_bytes([("m/version", b"1"), ("m/model.json", b"{}"), ("m/tensors/0", b"x")]),
        "a TorchScript file of torch 1.2 or before",
        SCRIPTED,
    ),
)
OTHERS = table(
    "",
    ("html", b"\n<html><body>404</body></html>", f"{PAGE} (got '<html><body>404</body></html>')", AGAIN),
    (
        "html, gzip",
        gzip.compress(b"<html>404</html>"),
        f"{PAGE}, compressed with gzip (got '<html>404</html>')",
        AGAIN,
    ),
    (
        "google drive",
        DRIVE.encode(),
        "an HTML or XML page: Google Drive's, which asks before it sends big files "
        "(got '<!DOCTYPE html><html><head><title>Google')",
        "press Download anyway in a browser, or use gdown",
    ),
    (
        "hugging face",
        HF_PAGE.encode(),
        "an HTML or XML page: the one that Hugging Face shows about the file "
        "(got '<!doctype html>\\n<html class=\"\"><head><me')",
        "`hf download REPO FILE`, or the link with /resolve/ in place of /blob/",
    ),
    (
        "github",
        GITHUB.encode(),
        "an HTML or XML page: the one that GitHub shows about the file "
        "(got '<!DOCTYPE html>\\n<html lang=\"en\"><head><l')",
        "download it by its Raw link",
    ),
    ("s3", DENIED.encode(), "an HTML or XML page: a storage service's refusal (got AccessDenied)", NEW_LINK),
    ("hf text", b"Entry not found", f"{REFUSAL} (got Entry not found)", NEW_LINK),
    (
        "hf text 2",
        b"Repository not found",
        f"{REFUSAL} (got Repository not found)",
        NEW_LINK,
    ),
    ("raw text", b"404: Not Found", f"{REFUSAL} (got 404: Not Found)", NEW_LINK),
    (
        "json",
        b'{"error":"Repository not found"}',
        "JSON, not a checkpoint: probably an error message saved in its place "
        "(got '{\"error\":\"Repository not found\"}')",
        AGAIN,
    ),
    (
        "tf list",
        b'model_checkpoint_path: "model.ckpt-1"\n',
        "not supported: the list of checkpoints that TensorFlow keeps beside them "
        '(got model_checkpoint_path: "model.ckpt-1")',
        copy("TensorFlow"),
    ),
    (
        "zeros",
        bytes(100_000),
        "not a checkpoint: zeros at its beginning and end, as an interrupted download leaves",
        AGAIN,
    ),
    (
        "utf-16",
        '{"a": 1}'.encode("utf-16"),
        "a text in UTF-16, not a checkpoint: > in PowerShell makes such of any output (got {\"a\": 1})",
        "let the program write the file itself (-o FILE)",
    ),
    (
        "csv",
        b"epoch,loss\n1,0.5\n",
        "a text, not a checkpoint: neither a torch nor a safetensors file (got epoch,loss)",
        GIVE,
    ),
    (
        "yaml",
        "modèle:\n  depth: 18\n".encode(),
        "a text, not a checkpoint: neither a torch nor a safetensors file (got modèle:)",
        GIVE,
    ),
    (
        "raw values",
        np.linspace(1, 2, 2000, dtype=np.float32).tobytes(),
        "not a checkpoint: neither a torch nor a safetensors file "
        r"(got a file that starts with b'\x00\x00\x80?d\x10\x80?')",
        GIVE,
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "what", "remedy"), SUPPORTED + OTHERS, ids=[row[0] for row in SUPPORTED + OTHERS]
)
def test_says_what_it_is_and_what_to_do(name, content, what, remedy, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == f"{path}: {what}. Remedy: {remedy}"
    assert caught.value.exit_code == 3
    assert str(caught.value).isprintable()


FOLDERS = [
    ("a TensorFlow SavedModel", copy("TensorFlow"), ["saved_model.pb", "variables", "fingerprint.pb"]),
    ("a TensorFlow checkpoint", copy("TensorFlow"), ["checkpoint", "m-1.index", "m-1.data-00000-of-00001"]),
    ("an Orbax checkpoint (JAX)", copy("orbax.checkpoint"), ["_METADATA", "d", "manifest.ocdbt"]),
    ("a Core ML package (.mlpackage)", EXPORTED, ["Manifest.json", "Data"]),
    ("an OpenVINO model (.xml and .bin)", EXPORTED, ["openvino_model.xml", "openvino_model.bin"]),
]


@pytest.mark.parametrize(("what", "remedy", "names"), FOLDERS)
def test_folders(what, remedy, names, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    assert str(caught.value) == f"{tmp_path}: not supported: {what}. Remedy: {remedy}"


def test_a_folder_with_a_checkpoint_beside_is_no_such_folder(tmp_path):
    for name in ("saved_model.pb", "model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_a_download_that_was_broken_off(part, tmp_path):
    torch.save({"w": torch.randn(1000)}, tmp_path / "whole")
    raw = (tmp_path / "whole").read_bytes()
    for padded in (b"", bytes(int(len(raw) * (1 - part)))):
        (tmp_path / "a.crdownload").write_bytes(raw[: int(len(raw) * part)] + padded)
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(tmp_path / "a.crdownload")
        assert str(caught.value) == (
            f"{tmp_path}/a.crdownload: truncated or damaged: the zip archive's directory at its end cannot "
            f"be read (got no record of its end). Remedy: {AGAIN}"
        )


@pytest.mark.filterwarnings("ignore")
def test_the_remedy_for_torch_0_1_works(tmp_path):
    (tmp_path / "old").write_bytes(of_torch_0_1([1.5, -2.0, 3.25]))
    torch.save(torch.load(tmp_path / "old", weights_only=False), tmp_path / "new")
    assert read_checkpoint(tmp_path / "new")["w"].values().tolist() == [1.5, -2.0, 3.25]


@pytest.mark.filterwarnings("ignore")
def test_the_remedy_for_a_flatbuffer_works(tmp_path):
    layer = torch.nn.BatchNorm1d(3)
    layer.running_mean += 2
    file = str(tmp_path / "a.ptl")
    torch.jit.script(layer)._save_for_lite_interpreter(file, _use_flatbuffer=True)
    with pytest.raises(CheckpointError, match="PyTorch Mobile model in a flatbuffer"):
        read_checkpoint(file)
    module = torch.jit.load(file)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    assert read_checkpoint(tmp_path / "state.pt")["running_mean"].values().tolist() == [2, 2, 2]


def test_real_onnx(tmp_path):
    helper = pytest.importorskip("onnx").helper
    value = helper.make_tensor_value_info("x", 1, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["x"])], "g", [value], [value])
    for named in ({}, {"producer_name": "pytorch", "doc_string": "ä"}):
        (tmp_path / "a").write_bytes(helper.make_model(graph, **named).SerializeToString())
        with pytest.raises(CheckpointError, match=r"a protobuf file \(ONNX\)"):
            read_checkpoint(tmp_path / "a")


def test_what_is_none_of_them_is_not_called_so(tmp_path):
    """Nothing that is read is taken for another format, whatever its first bytes, and no noise is named."""
    generator = np.random.default_rng(0)
    called = {}
    for index in range(2000):
        content = generator.bytes(int(generator.integers(1, 300)))
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(tmp_path / "a")
        if "not supported" in str(caught.value):
            called[index] = str(caught.value)
    assert len(called) <= 2  # two bytes may be anything's


def test_protocol_0_is_still_looked_into(tmp_path):
    """It is text, but one that runs code."""
    (tmp_path / "a").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match="would run posix.system"):
        read_checkpoint(tmp_path / "a")
    (tmp_path / "a").write_bytes(pickle.dumps({"lr": 0.1}, protocol=0))
    with pytest.raises(CheckpointError, match="plain pickle, .*got a dict with 'lr'"):
        read_checkpoint(tmp_path / "a")
