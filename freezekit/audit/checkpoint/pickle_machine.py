"""Follows a pickle's opcodes and builds inert data from them: nothing is imported, nothing is called.

Opcodes are split off by the standard library's ``pickletools.genops``, which only decodes them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pickletools import genops
from typing import IO, Any, cast

from freezekit.audit.checkpoint.calls import as_tuple, call, fill
from freezekit.audit.checkpoint.container import printable
from freezekit.audit.checkpoint.inert import GlobalRef, Opaque, StorageRef
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.rebuild import storage_dtype
from freezekit.audit.checkpoint.verdicts import canonical, is_foreign
from freezekit.errors import CheckpointError

__all__ = ["MAX_OPCODES", "MAX_PICKLE_BYTES", "LimitedReader", "PickleDamageError", "Unpickled", "unpickle"]

#: bytes of one pickle; the tensors' values are not in it, so real ones have a few MB at most
MAX_PICKLE_BYTES = 256 * 2**20
#: a tensor takes about 30 opcodes
MAX_OPCODES = 30_000_000
#: a real pickler numbers its memo from 0 up
_MAX_MEMO_INDEX = 2**32
#: only the oldest opcodes are followed by a line of text
_MAX_LINE_BYTES = 2**24

_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "FLOAT", "BINFLOAT",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_IGNORED = frozenset(("PROTO", "FRAME", "READONLY_BUFFER"))


class PickleDamageError(CheckpointError):
    """The bytes are no pickle, or one cut short."""


@dataclass(frozen=True, slots=True)
class Unpickled:
    """What a pickle describes.

    Args:
        root: the object, inert.
        foreign: the code outside torch that it names, in order.
        storages: the first mention of each storage, by its key.
    """

    root: Any
    foreign: tuple[str, ...]
    storages: dict[str, StorageRef]


class LimitedReader:
    """Reads a pickle from a stream; refuses a read longer than what is left of the file before allocating it.

    Args:
        stream: an open file.
        remaining: bytes from here to its end.
    """

    def __init__(self, stream: IO[bytes], remaining: int) -> None:
        self._stream = stream
        self._remaining = remaining
        self._room = MAX_PICKLE_BYTES

    def read(self, size: int) -> bytes:
        """Read ``size`` bytes, or what is left at the very end of the file if only one is asked for."""
        if size > 1:
            self._refuse(size)
        return self._count(self._stream.read(size))

    def readline(self) -> bytes:
        """Read up to a newline."""
        return self._count(self._stream.readline(_MAX_LINE_BYTES))

    def _refuse(self, size: int) -> None:
        if size > self._remaining:
            raise PickleDamageError(
                "truncated or damaged: a length in its pickle lies beyond the file's end",
                got=f"{size} bytes with {self._remaining} left",
            )

    def _count(self, data: bytes) -> bytes:
        self._remaining -= len(data)
        self._room -= len(data)
        if self._room < 0:
            raise CheckpointError("its pickle is too long", got=f"more than {MAX_PICKLE_BYTES} bytes")
        return data


def unpickle(
    stream: IO[bytes] | LimitedReader, *, plain: bool = False, limits: Limits = Limits.DEFAULT
) -> Unpickled:
    """Follow one pickle to its end.

    Args:
        stream: at the pickle's start; left behind its last byte.
        plain: whether it was not written by ``torch.save``; such pickles hold a tensor's values in a call to
            ``torch.storage._load_from_bytes``, which then is no sign of an attack.
        limits: caps on its size and on what following it may cost.

    Raises:
        PickleDamageError: it is cut short, or no pickle.
        CheckpointError: loading it would run code, or it is bigger than any checkpoint's.
    """
    machine = _Machine(plain)
    try:
        root = machine.run(cast("IO[bytes]", stream))
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error, EOFError) as error:
        got = printable(str(error) or type(error).__name__)
        raise PickleDamageError("truncated or damaged: its pickle cannot be followed", got=got) from error
    return Unpickled(root, tuple(machine.foreign), machine.storages)


class _Machine:
    """The pickle virtual machine, with inert results."""

    def __init__(self, plain: bool) -> None:
        self.plain = plain
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}  # a dict, so that a huge index allocates nothing
        self.foreign: dict[str, None] = {}
        self.storages: dict[str, StorageRef] = {}

    def run(self, stream: IO[bytes]) -> Any:
        """Follow the opcodes up to STOP and return what is on top."""
        for opcode, arg, _ in islice(genops(stream), MAX_OPCODES):
            name = opcode.name
            if name in _LITERALS:
                self.stack.append(arg)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name == "STOP":
                return self.stack.pop()
            elif name not in _IGNORED:
                _HANDLERS[name](self, arg)
        raise CheckpointError("its pickle has too many instructions", got=f"more than {MAX_OPCODES}")

    # the stack and the memo

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pop(self, _: Any) -> None:
        if self.stack:
            del self.stack[-1]
        else:
            self.pop_mark()

    def put(self, index: int) -> None:
        if not 0 <= index < _MAX_MEMO_INDEX:
            raise ValueError("memo index out of range")
        self.memo[index] = self.stack[-1]

    # containers

    def add_items(self, items: Iterable[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target.items = target.items if target.items is not None else []
            target = target.items
        if not isinstance(target, list):
            raise TypeError("items are added to what is no list")
        target.extend(items)

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target.mapping = target.mapping if target.mapping is not None else {}
            target = target.mapping
        if not isinstance(target, dict):
            raise TypeError("a key is set in what is no dict")
        fill(target, zip(flat[::2], flat[1::2], strict=True))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("stack underflow")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def dict_of_marked(self, _: Any) -> None:
        flat = self.pop_mark()
        self.stack.append({})
        self.set_items(flat)

    # globals and calls

    def global_(self, arg: Any) -> None:
        module, _, name = str(arg).partition(" ")
        self.name(module, name)

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a global's name is no text")
        self.name(module, name)

    def name(self, module: str, name: str) -> None:
        ref = canonical(module, name)
        if is_foreign(ref) and len(self.foreign) < 1000:
            self.foreign[str(ref)] = None
        self.stack.append(ref)

    def extension(self, code: Any) -> None:
        self.stack.append(
            GlobalRef("copyreg", f"extension {code}")
        )  # registered at run time: could be anything

    def reduce(self, _: Any) -> None:
        args = self.stack.pop()
        self.stack.append(call(self.stack.pop(), args, self.plain))

    def new_object_ex(self, _: Any) -> None:
        keywords, args = self.stack.pop(), self.stack.pop()
        extra = (keywords,) if keywords else ()
        self.stack.append(call(self.stack.pop(), (*as_tuple(args), *extra), self.plain))

    def instance(self, arg: Any) -> None:
        args = self.pop_mark()
        self.global_(arg)
        self.stack.append(call(self.stack.pop(), tuple(args), self.plain))

    def object_(self, _: Any) -> None:
        cls, *args = self.pop_mark()
        self.stack.append(call(cls, tuple(args), self.plain))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target.state = state

    # what torch keeps beside the pickle

    def persistent(self, pid: Any) -> None:
        if not isinstance(pid, tuple) or not pid:
            self.stack.append(Opaque(None, (pid,)))
        elif pid[0] == "module" and len(pid) > 1:  # a class with its source code, for whole legacy modules
            self.stack.append(pid[1])
        elif pid[0] == "storage" and len(pid) in (5, 6):
            self.stack.append(self.storage(*pid[1:]))
        else:
            raise TypeError("a persistent id of unknown kind")

    def storage(self, kind: Any, key: Any, location: Any, numel: Any, view: Any = None) -> StorageRef:
        texts = isinstance(key, str) and isinstance(location, str) and isinstance(kind, GlobalRef)
        if not texts or type(numel) is not int or numel < 0:
            raise TypeError("a storage is described wrongly")
        start = view[1] if isinstance(view, tuple) and len(view) == 3 else 0
        if type(start) is not int or start < 0:
            raise TypeError("a storage's view is described wrongly")
        ref = StorageRef(key, storage_dtype(kind.name), numel, location, start)
        self.storages.setdefault(key, ref)
        return ref


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda machine, _: machine.pop_mark().clear(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "GET": lambda machine, index: machine.push(machine.memo[index]),
    "BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push([]),  # a set's items need not be hashable here
    "LIST": lambda machine, _: machine.push(machine.pop_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.pop_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "DICT": _Machine.dict_of_marked,
    "APPEND": lambda machine, _: machine.add_items([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.add_items(machine.pop_mark()),
    "ADDITEMS": lambda machine, _: machine.add_items(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "EXT1": _Machine.extension,
    "EXT2": _Machine.extension,
    "EXT4": _Machine.extension,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_object_ex,
    "INST": _Machine.instance,
    "OBJ": _Machine.object_,
    "BUILD": _Machine.build,
    "PERSID": _Machine.persistent,
    "BINPERSID": lambda machine, _: machine.persistent(machine.stack.pop()),
    "NEXT_BUFFER": lambda machine, _: machine.push(Opaque(None)),
}
