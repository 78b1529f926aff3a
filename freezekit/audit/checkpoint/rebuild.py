"""The functions by which torch pickles a tensor, as descriptions instead of calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.checkpoint.inert import GlobalRef, Opaque, StorageRef, TensorRef
from freezekit.audit.state import DTYPE_SIZES

__all__ = [
    "STORAGE_SIZES",
    "describe_storage",
    "holds_tensor",
    "rebuild",
    "storage_dtype",
    "usual_tensor",
    "with_state",
]

_MODULES = frozenset(("torch._utils", "torch._tensor", "torch.tensor"))
_STORAGE_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8", "QUInt8Storage": "quint8", "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
}  # fmt: skip
#: the bytes that elements take in a storage, of dtypes that cannot be read too
STORAGE_SIZES = {**DTYPE_SIZES, "qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}
#: attributes of a tensor that are its values
_VALUES = frozenset(("data", "real", "imag"))
#: items of a tuple that may be a shape
_MAX_LOOKED_AT = 64
_UNSUPPORTED = {
    "_rebuild_sparse_tensor": "sparse layout",
    "_rebuild_sparse_csr_tensor": "sparse layout",
    "_rebuild_qtensor": "quantised tensor",
    "_rebuild_nested_tensor": "nested tensor",
    "_rebuild_meta_tensor_no_storage": "meta tensor, saved without values",
    "_rebuild_wrapper_subclass": "tensor subclass that wraps others",
    "_rebuild_device_tensor_from_numpy": "device tensor kept as a numpy array",
    "_rebuild_device_tensor_from_cpu_tensor": "device tensor",
    "_rebuild_xla_tensor": "device tensor kept as a numpy array",
}


def storage_dtype(name: str) -> str:
    """Return the dtype that a storage class holds, or the class's own name if it is unknown.

    >>> storage_dtype("FloatStorage"), storage_dtype("MyStorage")
    ('float32', 'MyStorage')
    """
    return _STORAGE_DTYPES.get(name.rpartition(".")[2], name)


def describe_storage(
    known: dict[str, StorageRef], kind: Any, key: Any, location: Any, numel: Any, view: Any = None
) -> StorageRef:
    """Return the storage that a persistent id names, and note the first mention of each by its key.

    Raises:
        TypeError: it names none.
        ValueError: it names one by another dtype than before.
    """
    texts = isinstance(key, str) and isinstance(location, str) and isinstance(kind, GlobalRef)
    if not texts or type(numel) is not int or numel < 0:
        raise TypeError("a storage is described wrongly")
    start = view[1] if isinstance(view, tuple) and len(view) == 3 else 0
    if type(start) is not int or start < 0:
        raise TypeError("a storage's view is described wrongly")
    storage = StorageRef(key, storage_dtype(kind.name), numel, location, start)
    # torch takes the first dtype for all, and never saves two, but of what has no memory
    if known.setdefault(key, storage).dtype != storage.dtype and numel and location != "meta":
        raise ValueError("a storage has two dtypes")
    return storage


def rebuild(function: GlobalRef, args: tuple[Any, ...]) -> TensorRef | None:
    """Describe the tensor that a call would rebuild.

    Args:
        function: what is called.
        args: its arguments.

    Returns:
        The tensor, or ``None`` if the call makes no tensor.

    Raises:
        ValueError: too few arguments.
    """
    name = function.name
    if str(function) in (
        "torch.nn.parameter.UninitializedParameter",
        "torch.nn.parameter.UninitializedBuffer",
    ):
        return _unreadable("uninitialised, saved without values", args)
    if function.module not in _MODULES or not name.startswith("_rebuild_"):
        return None
    if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        if not args or not isinstance(args[0], TensorRef):
            return _unreadable("parameter of an unknown kind of tensor", args)
        return with_state(replace(args[0], is_parameter=True), args[3:4])
    if name == "_rebuild_tensor":
        return _tensor(*_first(args, 4))
    if name == "_rebuild_tensor_v2":
        return _lazily(_tensor(*_first(args, 4)), args[6:7])
    if name == "_rebuild_tensor_v3":
        dtype = _first(args, 7)[6]
        return _lazily(replace(_tensor(*args[:4]), dtype=_dtype(dtype)), args[7:8])
    return _unreadable(_UNSUPPORTED.get(name, f"made by {printable(str(function))}"), args)


def usual_tensor(args: tuple[Any, ...]) -> TensorRef | None:
    """Return what ``_rebuild_tensor_v2`` makes of its usual arguments, or ``None`` for others."""
    if len(args) != 6 or type(args[0]) is not StorageRef or args[0].location == "meta":
        return None
    storage, offset, shape, stride = args[:4]
    return TensorRef(storage, offset, shape, stride, storage.dtype)


def _first(args: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    if len(args) < count:
        raise ValueError(f"a tensor is rebuilt from {len(args)} arguments")
    return args[:count]


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRef:
    if not isinstance(
        storage, StorageRef
    ):  # such as an Opaque, where a plain pickle carries the bytes itself
        return _unreadable("its values are not in a storage of the file", (shape,))
    reason = "meta tensor, saved without values" if storage.location == "meta" else None
    return TensorRef(storage, offset, shape, stride, storage.dtype, unsupported=reason)


def with_state(tensor: TensorRef, state: tuple[Any, ...]) -> TensorRef:
    """Return a tensor that a state is set on: attributes, which do not change it, or other values.

    Args:
        tensor: as it was rebuilt.
        state: what is set, if anything is.
    """
    parts = state[0] if state and isinstance(state[0], tuple) else state
    harmless = all(part is None or (isinstance(part, dict) and _VALUES.isdisjoint(part)) for part in parts)
    return tensor if harmless else replace(tensor, unsupported="tensor that is given other values once made")


def _lazily(tensor: TensorRef, metadata: tuple[Any, ...]) -> TensorRef:
    flags = metadata[0] if metadata and isinstance(metadata[0], dict) else {}
    if flags.get("conj") or flags.get("neg"):
        return replace(tensor, unsupported="lazily conjugated or negated tensor")
    return tensor


def _unreadable(reason: str, args: tuple[Any, ...]) -> TensorRef:
    """Return a tensor without values, with what its arguments tell of dtype and shape."""
    # a long one is no shape, and one that is named many times would be looked through each time
    tuples = [arg for arg in args if isinstance(arg, tuple) and len(arg) <= _MAX_LOOKED_AT]
    flat = [inner for arg in tuples for inner in arg if isinstance(inner, tuple)]
    flat = [inner for inner in flat if len(inner) <= _MAX_LOOKED_AT]
    shapes = [arg for arg in (*tuples, *flat) if all(type(n) is int for n in arg)]
    dtypes = [_dtype(arg) for arg in args if isinstance(arg, GlobalRef) and arg.module == "torch"]
    storages = [arg.dtype for arg in args if isinstance(arg, StorageRef)]
    inner = [value.dtype for arg in tuples for value in arg if isinstance(value, TensorRef)]
    dtype = next(iter([*storages, *reversed(inner), *dtypes]), "unknown")
    return TensorRef(None, 0, shapes[0] if shapes else (), (), dtype, unsupported=reason)


def _dtype(ref: Any) -> str:
    known = isinstance(ref, GlobalRef) and ref.module == "torch"
    return str(ref.name) if known and isinstance(ref, GlobalRef) else "unknown"


def holds_tensor(value: object) -> bool:
    """Tell whether an opaque object is a kind of tensor, by what it was made from or is called."""
    if not isinstance(value, Opaque) or value.made_by is None:
        return False
    last = value.made_by.name.rpartition(".")[2]
    from_one = any(isinstance(arg, TensorRef | StorageRef) for arg in value.args)
    return from_one or last.endswith(("Tensor", "Parameter", "Buffer"))
