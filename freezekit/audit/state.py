"""StateTable: a model's or a file's tensors as plain data, the waist both arms of an audit meet at.

Nothing here imports torch, so that a checkpoint can be audited without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "DTYPE_SIZES",
    "STATS",
    "OptimizerState",
    "Role",
    "Root",
    "StateTable",
    "TensorState",
    "Training",
    "counter_value",
    "decode",
    "joined",
    "role_of",
]

Role = Literal["running_mean", "running_var", "num_batches_tracked", "parameter", "buffer", "attribute"]

#: what a norm layer keeps of the batches it has seen
STATS = ("running_mean", "running_var", "num_batches_tracked")

#: dtypes whose values can be read, as torch names them, with their size in bytes
DTYPE_SIZES: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1,
    "complex32": 4, "complex64": 8, "complex128": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorState:
    """One tensor: what it is called, what it is for, and how to get its bytes.

    Args:
        name: dotted name, as in ``state_dict()``.
        role: what the tensor is for.
        dtype: torch's name without ``torch.``, one of :data:`DTYPE_SIZES` unless ``unsupported`` is set.
        shape: sizes, outermost first.
        read: returns the values as little-endian, C-contiguous bytes; may read a file.
        unsupported: why the values cannot be read (``"sparse layout"``), or ``None``.
        sha256: digest of what ``read`` would return, where that is all that is known of the values.
    """

    name: str
    role: Role
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], bytes] = field(repr=False, compare=False)
    unsupported: str | None = None
    sha256: str | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def values(self) -> npt.NDArray[np.float64]:
        """Return the values as float64 (the real part of complex ones), in the tensor's shape."""
        return decode(self.read(), self.dtype).reshape(self.shape)


def decode(raw: bytes, dtype: str) -> npt.NDArray[np.float64]:
    """Return values that lie one after the other as float64: of complex ones the real part.

    >>> decode(bytes([0x80, 0x3F, 0, 0]), "bfloat16")
    array([1., 0.])
    """
    array: npt.NDArray[Any]
    if dtype == "bfloat16":
        array = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    elif dtype == "float8_e5m2":  # the upper byte of a float16
        array = (np.frombuffer(raw, "u1").astype("<u2") << 8).view("<f2")
    elif dtype in _FLOAT8:
        array = _FLOAT8[dtype][np.frombuffer(raw, "u1")]
    elif dtype == "complex32":
        array = np.frombuffer(raw, "<f2")[::2]
    else:
        array = np.frombuffer(raw, _LITTLE[dtype])
        if array.dtype == np.float64:
            return array.astype(np.float64, copy=False)
    with np.errstate(invalid="ignore"):  # a damaged file may hold a signalling NaN
        return np.asarray(array.real, dtype=np.float64)


#: dtypes that numpy has too
_LITTLE = {
    name: np.dtype(name).newbyteorder("<")
    for name in DTYPE_SIZES
    if not name.startswith(("bfloat", "float8", "complex32"))
}


def _float8(fraction_bits: int, bias: int, nan: int) -> npt.NDArray[np.float64]:
    """Return the values of all codes of a sign, an exponent and a fraction, where no code is infinite.

    Args:
        fraction_bits: how many of the eight.
        bias: of the exponent.
        nan: the code that is NaN, whose sign says nothing unless it is 128, which would be -0.
    """
    code = np.arange(256)
    exponent, fraction = (
        (code & 127) >> fraction_bits,
        (code & (1 << fraction_bits) - 1) / (1 << fraction_bits),
    )
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    value = np.where(code > 127, -value, value)
    return np.where((code == nan) | (code == (nan | 128)), np.nan, value)


_FLOAT8 = {
    "float8_e4m3fn": _float8(3, 7, 127),
    "float8_e4m3fnuz": _float8(3, 8, 128),
    "float8_e5m2fnuz": _float8(2, 16, 128),
    "float8_e8m0fnu": np.append(2.0 ** np.arange(-127.0, 128.0), np.nan),
}


def role_of(name: str, dtype: str) -> Role:
    """Tell a tensor's role by its name, for files, which do not say what is a parameter.

    A whole number cannot be trained, so an integer tensor is a buffer; any other is taken for a parameter.

    >>> role_of("layer1.0.bn1.running_mean", "float32"), role_of("attn.relative_position_index", "int64")
    ('running_mean', 'buffer')
    """
    last = name.rpartition(".")[2]
    if last in STATS:
        return last  # type: ignore[return-value]  # one of the three literals just tested for
    return "parameter" if dtype.startswith(("float", "bfloat", "complex")) else "buffer"


@dataclass(frozen=True)
class Root:
    """A place in a file where the state of a model lies: ``"state_dict"``, ``"ema.module"``.

    Args:
        path: keys that lead there, joined by dots; ``""`` is the file's whole object.
        tensors: how many tensors it has.
        norms: how many layers with running statistics.
    """

    path: str
    tensors: int
    norms: int


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer in a file held, and how often it stepped; nothing of its momenta but their shapes.

    Args:
        path: where in the file's object it was found.
        groups: for each parameter group the keys of its parameters, in order: numbers or names.
        names: by key, the parameter's name where the file tells it.
        shapes: by key, the sizes of its momentum or average, where there is one.
        steps: by key, how often it was stepped, where that is counted.
    """

    path: str
    groups: tuple[tuple[int | str, ...], ...]
    names: Mapping[int | str, str] = field(default_factory=dict)
    shapes: Mapping[int | str, tuple[int, ...]] = field(default_factory=dict)
    steps: Mapping[int | str, TensorState | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """What a file tells of the training that it was saved in.

    Args:
        step: optimizer steps so far, where told.
        epoch: epochs so far, where told.
        optimizers: the optimizers' states.
    """

    step: int | None = None
    epoch: int | None = None
    optimizers: tuple[OptimizerState, ...] = ()


def counter_value(counter: TensorState | None) -> int | None:
    """Return ``num_batches_tracked`` as a number, or ``None`` where it is absent or no whole number."""
    if counter is None or counter.unsupported or counter.numel != 1:
        return None
    if counter.dtype.startswith(("int", "uint")):  # float64 has not all the digits of int64
        return int.from_bytes(counter.read(), "little", signed=counter.dtype.startswith("int"))
    value = float(counter.values().ravel()[0])
    whole = value.is_integer() and not counter.dtype.startswith("complex")
    return int(value) if whole else None


def joined(layer: str, own: str) -> str:
    """Return the name of a layer's own tensor; the model itself is ``""``."""
    return f"{layer}.{own}" if layer else own


class StateTable(Mapping[str, TensorState]):
    """Tensors by name, in the order of the model or file they come from.

    Args:
        tensors: the tensors; a name given twice is an error.
        source: where they come from, for messages: a path or ``"model"``.
        notes: what a reader has to say about the source, one line each.
        manifest: text of the manifest that the source holds, or ``None``.
        report: text of the report of a live audit that it holds, or ``None``.
        root: where in the source these tensors were found.
        roots: all the places in the source that hold a model's state, this one included.
        training: what the source tells of its training.

    >>> table = StateTable([TensorState("w", "parameter", "float32", (2,), lambda: bytes(8))], source="model")
    >>> table["w"].values()
    array([0., 0.])
    """

    def __init__(
        self,
        tensors: list[TensorState],
        source: str,
        notes: tuple[str, ...] = (),
        manifest: str | None = None,
        report: str | None = None,
        root: str = "",
        roots: tuple[Root, ...] = (),
        training: Training | None = None,
    ) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        if len(self._tensors) != len(tensors):
            raise ValueError(f"{source}: a tensor name is given twice")
        self.source = source
        self.notes = notes
        self.manifest = manifest
        self.report = report
        self.root = root
        self.roots = roots
        self.training = training or Training()
        self._counts: dict[str, int | None] = {}

    def with_tensors(self, tensors: list[TensorState]) -> StateTable:
        """Return the same table with other tensors: renamed, or some of them."""
        return StateTable(
            tensors, self.source, self.notes, self.manifest, self.report, self.root, self.roots, self.training
        )

    def __getitem__(self, name: str) -> TensorState:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def count(self, layer: str) -> int | None:
        """Return a layer's ``num_batches_tracked``, or ``None`` where it is absent or no number."""
        if layer not in self._counts:
            self._counts[layer] = counter_value(self.get(joined(layer, "num_batches_tracked")))
        return self._counts[layer]

    def norm_layers(self) -> list[str]:
        """Return the prefixes of the layers that keep running statistics, in order."""
        means = [name.rpartition(".") for name, t in self.items() if t.role == "running_mean"]
        # a name that starts with a dot is no layer's: "" is the model itself
        return [p for p, dot, _ in means if bool(p) == bool(dot) and f"{p}{dot}running_var" in self]
