"""What unpickling calls by itself: methods that a file gives to an object, and classes that open or call."""

import build_hostile as build
import pytest

from freezekit.audit.checkpoint import read_checkpoint
from freezekit.errors import CheckpointError

_TEXT, _GLOB = build.text, build.glob
_NEW = _GLOB("types", "SimpleNamespace") + b")R"
_SYSTEM = _GLOB("os", "system")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (_NEW + b"}" + _TEXT("__setstate__") + _SYSTEM + b"sb" + _TEXT("cmd") + b"b", "a __setstate__"),
        (_NEW + b"N}" + _TEXT("__setstate__") + _SYSTEM + b"s\x86b" + _TEXT("cmd") + b"b", "a __setstate__"),
        (
            _GLOB("collections", "OrderedDict") + b")R}" + _TEXT("__setstate__") + _SYSTEM + b"sb",
            "a __setstate__",
        ),
        (_GLOB("pkg", "Cfg") + b")R" + _TEXT("__setstate__") + _SYSTEM + b"s}b", "a __setstate__"),
        (
            _NEW + b"}" + _TEXT("append") + _SYSTEM + b"sb" + _TEXT("cmd") + b"a",
            "a method of an object's own",
        ),
        (
            _NEW + b"}" + _TEXT("extend") + _SYSTEM + b"sb(" + _TEXT("cmd") + b"e",
            "a method of an object's own",
        ),
        (
            _GLOB("torch", "Tensor") + b"N}" + _TEXT("x") + _SYSTEM + b"s\x86b",
            "new attributes of torch.Tensor",
        ),
        (
            build.call(
                _GLOB("torch._dynamo.eval_frame", "OptimizedModule"),
                _NEW,
                _GLOB("torch.serialization", "load"),
            ),
            "OptimizedModule",
        ),
        (build.call(_GLOB("torch", "PyTorchFileWriter"), _TEXT("a")), "PyTorchFileWriter"),
        (
            _GLOB("torch.utils.data.datapipes.datapipe", "_MapDataPipeSerializationWrapper") + b")\x81",
            "Wrapper",
        ),
        (build.call(_GLOB("functools", "reduce"), _SYSTEM, b"]" + _TEXT("a") + b"a"), "os.system"),
        (build.call(_GLOB("builtins", "iter"), _GLOB("torch", "load"), b"N"), "builtins.iter"),
    ],
)
def test_what_unpickling_calls_by_itself(body, says, tmp_path):
    build.write_zip(tmp_path / "a", b"}(" + _TEXT("w") + build.tensor() + _TEXT("x") + body + b"u")
    with pytest.raises(CheckpointError, match=f"loading it would run .*{says}"):
        read_checkpoint(tmp_path / "a")
