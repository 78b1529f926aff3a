"""Tells what a file is that holds no PyTorch tensors, by its content, and what to do instead."""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection
from typing import NamedTuple

__all__ = ["Other", "other_folder", "other_format", "other_pickle", "text_format"]


class Other(NamedTuple):
    """What a file is instead of a checkpoint.

    Args:
        what: as a sentence without its full stop.
        remedy: what to do.
        got: what of the file's content shows it; as it is in the file.
    """

    what: str
    remedy: str
    got: str | None = None


_EXPORTED = "use the PyTorch checkpoint it was exported from"
_AGAIN = "download or copy the file again"
_INSIDE = "unpack it first ({}) and give the file inside"
_COPY = "load it with {}, copy its weights into the PyTorch model, and torch.save(model.state_dict(), FILE)"
_TENSORFLOW = _COPY.format("TensorFlow")
# the module is kept: the tensors of a flatbuffer lie in its memory
_SCRIPTED = "m = torch.jit.load(FILE); torch.save(m.state_dict(), 'state.pt'); then give state.pt"
_JOBLIB = "load it with joblib, if you trust it, and save the PyTorch model's state_dict() with torch.save"
_NEW_LINK = "get a new link, or the right to use it, and download the file again"
_TAR = "if you trust its source: torch.save(torch.load(FILE, weights_only=False), NEW), then give NEW"

#: where a file has which bytes, what to call it, what to do instead
_MARKS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a git-LFS pointer, not the file itself", "run `git lfs pull`"),
    (0, b"# xet version", "a Xet pointer, not the file itself", "get the file with `hf download REPO FILE`"),
    (0, b"PK\x05\x06", "an empty zip archive", "save the checkpoint again"),
    (
        0,
        b"PK\x07\x08",
        "the first part of a zip archive in several parts",
        "join them first (zip -s 0 FILE.zip --out WHOLE.zip) and give the whole",
    ),
    (0, b"\x1f\x8b", "compressed with gzip", _INSIDE.format("gunzip, tar xzf")),
    (0, b"\x1f\x9d", "compressed with compress", _INSIDE.format("uncompress")),
    (0, b"BZh", "compressed with bzip2", _INSIDE.format("bunzip2")),
    (0, b"\xfd7zXZ\x00", "compressed with xz", _INSIDE.format("unxz")),
    (0, b"\x5d\x00\x00", "compressed with lzma", _INSIDE.format("unlzma")),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", _INSIDE.format("unzstd")),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", _INSIDE.format("unlz4")),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _INSIDE.format("7z x")),
    (0, b"Rar!\x1a\x07", "a rar archive", _INSIDE.format("unrar x")),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, h5py)", _COPY.format("Keras or h5py")),
    (512, b"\x89HDF\r\n\x1a\n", "an HDF5 file (MATLAB)", _COPY.format("h5py")),
    (0, b"MATLAB 5.0 MAT-file", "a MATLAB file", _COPY.format("scipy.io.loadmat")),
    (0, b"GGUF", "a GGUF file (llama.cpp)", "use the safetensors file it was converted from"),
    (0, b"lmgg", "a GGML file (whisper.cpp)", "use the PyTorch checkpoint it was converted from"),
    (0, b"fmgg", "a GGML file (llama.cpp)", "use the PyTorch checkpoint it was converted from"),
    (0, b"tjgg", "a GGML file (llama.cpp)", "use the PyTorch checkpoint it was converted from"),
    (0, b"\x93NUMPY", "a numpy array (.npy)", "save a state dict with torch.save or safetensors"),
    (4, b"TFL3", "a TensorFlow Lite model", _EXPORTED),
    (4, b"ORTM", "an ONNX Runtime model (.ort)", _EXPORTED),
    (4, b"PTMF", "a PyTorch Mobile model in a flatbuffer", _SCRIPTED),
    (4, b"ET12", "an ExecuTorch program (.pte)", _EXPORTED),
    (0, b"ftrt", "a TensorRT engine", _EXPORTED),
    (0, b"ptrt", "a TensorRT engine", _EXPORTED),
    (0, b"\x0c\xdb\x3a\x2a", "a part of an Orbax checkpoint (JAX)", _COPY.format("orbax.checkpoint")),
    (0, b"%PDF-", "a PDF document", "check the path"),
    (0, b"\x89PNG\r\n", "a PNG image", "check the path"),
    (0, b"\xff\xd8\xff", "a JPEG image", "check the path"),
    (0, b"GIF8", "a GIF image", "check the path"),
    (0, b"RIFF", "an image, a sound or a video (RIFF)", "check the path"),
    (0, b"\x7fELF", "compiled code (ELF)", _EXPORTED.replace("exported", "compiled")),
    (0, b"MZ", "a Windows program or library", "check the path"),
    (0, b"#!", "a script", "check the path"),
    (0, b"L\x00\x00\x00\x01\x14\x02\x00", "a Windows shortcut (.lnk)", "give the file that it points to"),
    (
        0,
        b"\x00\x05\x16\x07",
        "what macOS keeps beside a file (._NAME)",
        "give the file whose name has no ._ in front",
    ),
)
#: the last bytes of a table of leveldb
_TF_INDEX = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
#: what servers send in place of a file, as the whole text
_REFUSALS = (
    "Entry not found", "Repository not found", "Invalid username or password", "Invalid credentials",
    "Access to model", "Access to this resource", "Unauthorized", "Forbidden", "Not Found", "404: Not Found",
    "404 page not found", "Access denied", "Access Denied", "Too Many Requests", "Revision not found",
)  # fmt: skip
_ONNX_FIELDS = {1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26}
_MINDSPORE_DTYPE = re.compile(rb"(B?Float|U?Int|Bool|Complex|BFloat)\d*")


def other_format(head: bytes, tail: bytes, size: int) -> Other | None:
    """Return what the file is, or ``None`` if it is none of the formats that are known.

    Args:
        head: its first 4096 bytes.
        tail: its last ones.
        size: its length.
    """
    if head.startswith(b"\x1f\x8b") and (page := _page(_unpacked(head, 16 + zlib.MAX_WBITS))) is not None:
        return page._replace(what=f"{page.what}, compressed with gzip")
    for offset, mark, name, remedy in _MARKS:
        if head.startswith(mark, offset):
            return Other(f"not supported: {name}", remedy)
    if head.startswith(b"ustar", 257):
        first = head[:100].rstrip(b"\0")
        if first in (b"sys_info", b"pickle", b"storages", b"tensors"):
            return Other("not supported: a tar archive of torch 0.1", _TAR)
        return Other("not supported: a tar archive", _INSIDE.format("tar xf"))
    if tail.endswith(_TF_INDEX):
        return Other("not supported: the index of a TensorFlow checkpoint", _TENSORFLOW)
    if b"joblib.numpy_pickle" in head:
        return Other("not supported: a joblib file (scikit-learn)", _JOBLIB)
    if head[0] == 0x78 and _unpacked(head, zlib.MAX_WBITS):
        return Other("not supported: compressed with zlib, as joblib does", _JOBLIB)
    if len(head) >= 512 and not head.strip(b"\0") and not tail.strip(b"\0"):
        what = "not a checkpoint: zeros at its beginning and end, as an interrupted download leaves"
        return Other(what, _AGAIN)
    return _page(head) or _wide_text(head) or _msgpack(head) or _protobuf_file(head, size)


def text_format(head: bytes) -> Other | None:
    """Return what a text is that is no pickle, or ``None`` if the file is no text."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else the head ends in the middle of a letter
            return None
        text = head[: error.start].decode("utf-8-sig")
    if not text.strip() or not all(char.isprintable() or char in "\t\r\n\f" for char in text):
        return None
    start = text.strip().splitlines()[0][:40]
    if start.startswith("model_checkpoint_path:"):
        what = "not supported: the list of checkpoints that TensorFlow keeps beside them"
        return Other(what, _TENSORFLOW, start)
    if start.startswith(_REFUSALS):
        return Other("a server's refusal, saved in place of the file", _NEW_LINK, start)
    what = "a text, not a checkpoint: neither a torch nor a safetensors file"
    return Other(what, "give a .pt, .pth or .safetensors file", start)


def other_pickle(keys: Collection[object], maker: str) -> Other | None:
    """Return what wrote a plain pickle, by its keys if it is a dict, or by the class of its object."""
    if "StructuredToParameterName@@" in keys:
        return Other("not supported: parameters of PaddlePaddle (.pdparams)", _COPY.format("paddle.load"))
    if maker.startswith("sklearn."):
        what = "not supported: a model of scikit-learn"
        return Other(what, "it has no PyTorch tensors; give a PyTorch checkpoint")
    return None


def other_folder(names: Collection[str]) -> Other | None:
    """Return what a folder is, by the names in it, if it is another library's checkpoint."""
    if any(name.endswith((".safetensors", ".pt", ".pth", ".ckpt")) for name in names):
        return None
    if "saved_model.pb" in names or "saved_model.pbtxt" in names:
        return Other("not supported: a TensorFlow SavedModel", _TENSORFLOW)
    if any(name.endswith(".index") and f"{name[:-6]}.data-00000-of-00001" in names for name in names):
        return Other("not supported: a TensorFlow checkpoint", _TENSORFLOW)
    if "manifest.ocdbt" in names or "_CHECKPOINT_METADATA" in names or "_METADATA" in names:
        return Other("not supported: an Orbax checkpoint (JAX)", _COPY.format("orbax.checkpoint"))
    if "Manifest.json" in names and "Data" in names:
        return Other("not supported: a Core ML package (.mlpackage)", _EXPORTED)
    if any(name.endswith(".xml") and f"{name[:-4]}.bin" in names for name in names):
        return Other("not supported: an OpenVINO model (.xml and .bin)", _EXPORTED)
    return None


def _page(head: bytes) -> Other | None:
    """Tell pages and other XML, most of which say why there is no file."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"<"):
        return None
    got = repr(text[:40].decode("latin-1"))
    if b"<net " in text and b"version=" in text:
        return Other("not supported: an OpenVINO model (.xml and .bin)", _EXPORTED)
    if (code := re.search(rb"<Error>\s*<Code>(\w{1,60})</Code>", text)) is not None:
        return Other("an HTML or XML page: a storage service's refusal", _NEW_LINK, code[1].decode())
    if b"Google Drive" in text or b"drive.google.com" in text:
        what = "an HTML or XML page: Google Drive's, which asks before it sends big files"
        return Other(what, "press Download anyway in a browser, or use gdown", got)
    if b"huggingface.co" in text or b"Hugging Face" in text:
        what = "an HTML or XML page: the one that Hugging Face shows about the file"
        return Other(what, "`hf download REPO FILE`, or the link with /resolve/ in place of /blob/", got)
    if b"github.com" in text or b"GitHub" in text:
        what = "an HTML or XML page: the one that GitHub shows about the file"
        return Other(what, "download it by its Raw link", got)
    what = "an HTML or XML page, not a checkpoint: probably an error page saved in its place"
    return Other(what, _AGAIN, got)


def _unpacked(head: bytes, form: int) -> bytes:
    try:
        return zlib.decompressobj(form).decompress(head, 4096)
    except zlib.error:
        return b""


def _wide_text(head: bytes) -> Other | None:
    if not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return None
    text = head[: len(head) // 2 * 2].decode("utf-16", "replace").strip()
    if not text[:1].isprintable() or sum(map(str.isascii, text)) < len(text) / 2:
        return None
    what = "a text in UTF-16, not a checkpoint: > in PowerShell makes such of any output"
    return Other(what, "let the program write the file itself (-o FILE)", text[:40])


def _msgpack(head: bytes) -> Other | None:
    """Tell a map of names, as Flax writes it."""
    at = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x81 <= head[0] <= 0x8F else 0)
    if not at or len(head) < at + 2:
        return None
    kind = head[at]
    length, at = (head[at + 1], at + 2) if kind == 0xD9 else (kind - 0xA0, at + 1)
    name, value = head[at : at + length], head[at + length : at + length + 1]
    is_text = (kind == 0xD9 or 0xA1 <= kind <= 0xBF) and name.isascii() and name.decode("ascii").isprintable()
    # another map, or an array
    if is_text and len(name) == length and value and (0x80 <= value[0] <= 0x8F or 0xC7 <= value[0] <= 0xDF):
        return Other("not supported: a msgpack file (Flax, JAX)", _COPY.format("flax.serialization"))
    return None


def _protobuf_file(head: bytes, size: int) -> Other | None:
    fields = _fields(head, size)
    version, second = fields.get(1), fields.get(2)
    if isinstance(version, int) and 0 < version < 100:
        if fields.keys() <= _ONNX_FIELDS and (isinstance(fields.get(7), bytes) or _is_text(second)):
            return Other("not supported: a protobuf file (ONNX)", _EXPORTED)
        if isinstance(second, bytes) and _fields(second, size):
            if version == 1 and fields.keys() == {1, 2}:
                return Other("not supported: a TensorFlow SavedModel (saved_model.pb)", _TENSORFLOW)
            if fields.keys() == {1, 2} or max(fields) >= 200:
                return Other("not supported: a Core ML model (.mlmodel)", _EXPORTED)
    if second == b"MindSpore":
        return Other("not supported: a MindSpore model (.mindir)", _EXPORTED)
    first = _fields(version, size) if isinstance(version, bytes) and fields.keys() == {1} else {}
    if _is_text(first.get(1)):
        value = first.get(2)
        if _is_text(value):
            return Other("not supported: a TensorFlow graph (.pb)", _TENSORFLOW)
        inner = _fields(value, size) if isinstance(value, bytes) else {}
        if isinstance(dtype := inner.get(2), bytes) and _MINDSPORE_DTYPE.fullmatch(dtype):
            what = "not supported: a MindSpore checkpoint"
            return Other(what, _COPY.format("mindspore.load_checkpoint"))
    return None


def _is_text(value: int | bytes | None) -> bool:
    return isinstance(value, bytes) and value.isascii() and value.decode().isprintable() and bool(value)


def _fields(message: bytes, size: int) -> dict[int, int | bytes]:
    """Return the first of each field at a protobuf message's beginning; none if it is no such message."""
    found: dict[int, int | bytes] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        value: int | bytes = b""
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 1:
            at += 8
        elif kind == 2:
            length, at = _varint(message, at)
            value = message[at : at + length]
            at += length
        elif kind == 5:
            at += 4
        if kind in (3, 4, 6, 7) or number == 0 or at > size:
            return {}
        found.setdefault(number, value)
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return a number and where it ends; one that is cut short ends behind the message."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return 8, len(message) + 1
