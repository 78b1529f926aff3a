"""Follows a pickle's opcodes and builds inert data from them: nothing is imported, nothing is called."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from freezekit.audit.checkpoint.calls import as_tuple, call, check_adding, check_state, fill
from freezekit.audit.checkpoint.container import printable
from freezekit.audit.checkpoint.decoding import AGAIN, PickleBytes, PickleDamageError
from freezekit.audit.checkpoint.inert import GlobalRef, Opaque, StorageRef, TensorRef
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.rebuild import describe_storage, with_state
from freezekit.audit.checkpoint.verdicts import canonical, is_foreign

__all__ = ["LimitedReader", "PickleDamageError", "Unpickled", "unpickle"]

#: a real pickler numbers its memo from 0 up
_MAX_MEMO_INDEX = 2**32
_MAX_NAME = 1_000

# what things cost, in about bytes of memory; a byte of opcodes counts too, for what it leaves on the stack
_BYTE, _MEMO, _TUPLE, _CONTAINER, _ITEM, _CALL = 10, 80, 48, 64, 100, 200
#: for the time that the rarer opcodes take, and for an object, a global: none is part of a tensor
_HANDLED, _OBJECT = 64, 600
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error)

_INT32, _UINT32 = struct.Struct("<i").unpack_from, struct.Struct("<I").unpack_from
_UINT16, _FLOAT = struct.Struct("<H").unpack_from, struct.Struct(">d").unpack_from


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


@dataclass(frozen=True, slots=True)
class LimitedReader:
    """A pickle somewhere in a stream.

    Args:
        stream: an open file, at the pickle's start.
        remaining: bytes from here to its end.
    """

    stream: IO[bytes]
    remaining: int


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
    if not isinstance(stream, LimitedReader):
        here = stream.tell()
        stream = LimitedReader(stream, stream.seek(0, os.SEEK_END) - here)
        stream.stream.seek(here)
    machine = _Machine(plain, limits, PickleBytes(stream.stream, stream.remaining, limits))
    try:
        root = machine.run()
    except _DAMAGE as error:
        got = printable(str(error) or type(error).__name__)
        raise PickleDamageError(
            "truncated or damaged: its pickle cannot be followed", got=got, remedy=AGAIN
        ) from error
    return Unpickled(root, tuple(machine.foreign), machine.storages)


class _Machine:
    """The pickle virtual machine, with inert results."""

    def __init__(self, plain: bool, limits: Limits, source: PickleBytes) -> None:
        self.plain = plain
        self.room = limits.pickle_work
        self.source = source
        self.position = 0  # behind the last argument of any length
        self.work = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}  # a dict, so that a huge index allocates nothing
        self.globals: dict[tuple[str, str], GlobalRef] = {}
        self.foreign: dict[str, None] = {}
        self.storages: dict[str, StorageRef] = {}

    def run(self) -> Any:
        """Follow the opcodes up to STOP and return what is on top.

        One loop with the opcodes that tensors are made of, most frequent first: a call for each of them
        would cost more than all they do.
        """
        source, memo, stack, marks = self.source, self.memo, self.stack, self.marks
        data, position, safe = source.data, 0, source.safe
        while True:
            if position > safe:
                position = self.refill(position)
                data, safe = source.data, source.safe
            code = data[position]
            position += 1
            if code == 0x72:  # LONG_BINPUT
                memo[_UINT32(data, position)[0]] = stack[-1]
                position += 4
            elif code == 0x71:  # BINPUT
                memo[data[position]] = stack[-1]
                position += 1
            elif code == 0x68:  # BINGET
                stack.append(memo[data[position]])
                position += 1
            elif code == 0x4B:  # BININT1
                stack.append(data[position])
                position += 1
            elif code == 0x28:  # MARK
                marks.append(stack)
                self.stack = stack = []
                self.work += _CONTAINER
            elif code == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif code == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
                self.work += _TUPLE
            elif code == 0x74:  # TUPLE
                items = tuple(stack)
                self.stack = stack = marks.pop()
                stack.append(items)
            elif code == 0x52:  # REDUCE
                args = stack.pop()
                stack.append(self.call(stack.pop(), args))
            elif code in (0x58, 0x8C):  # BINUNICODE, SHORT_BINUNICODE
                if code == 0x58:
                    start = position + 4
                    length = _UINT32(data, position)[0]
                else:
                    start = position + 1
                    length = data[position]
                if length < 256 and start + length <= safe:
                    position = start + length
                    stack.append(str(data[start:position], "utf-8", "surrogatepass"))
                    self.work += _CONTAINER
                else:
                    stack.append(self.argument(code, position))
                    data, position, safe = source.data, self.position, source.safe
            elif code == 0x51:  # BINPERSID
                stack.append(self.persistent(stack.pop()))
            elif code == 0x6A:  # LONG_BINGET
                stack.append(memo[_UINT32(data, position)[0]])
                position += 4
            elif code == 0x89:  # NEWFALSE
                stack.append(False)
            elif code == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif code == 0x4A:  # BININT
                stack.append(_INT32(data, position)[0])
                position += 4
            elif code == 0x4D:  # BININT2
                stack.append(_UINT16(data, position)[0])
                position += 2
            elif code == 0x86:  # TUPLE2
                last = stack.pop()
                stack[-1] = (stack[-1], last)
                self.work += _TUPLE
            elif code == 0x4E:  # NONE
                stack.append(None)
            elif code == 0x88:  # NEWTRUE
                stack.append(True)
            elif code == 0x7D:  # EMPTY_DICT
                stack.append({})
                self.work += _CONTAINER
            elif code == 0x5D:  # EMPTY_LIST
                stack.append([])
                self.work += _CONTAINER
            elif code == 0x47:  # BINFLOAT
                stack.append(_FLOAT(data, position)[0])
                position += 8
            elif code == 0x2E:  # STOP
                root = stack.pop()
                source.finish(position)
                return root
            else:
                handler = _HANDLERS.get(code)
                if handler is not None:
                    self.work += _HANDLED
                    handler(self)
                else:
                    self.with_argument(code, self.argument(code, position))
                    data, position, safe = source.data, self.position, source.safe
                stack = self.stack

    def refill(self, position: int) -> int:
        """Have more bytes to follow, if what was followed did not cost too much."""
        self.check(position)
        return self.source.more(position)

    def check(self, position: int = 0) -> None:
        """Refuse a pickle that would fill the memory, or take minutes."""
        followed = self.source.dropped + position
        if self.work + _BYTE * followed + _MEMO * len(self.memo) > self.room:
            got = f"a cost of more than {self.room}, where that of a tensor is about 1500"
            raise Limits.hit("its pickle describes more than a checkpoint's does", got)

    def argument(self, code: int, position: int) -> Any:
        """Decode an argument of any length, and remember where it ends."""
        value, self.position = self.source.argument(code, position)
        if isinstance(value, str | bytes | bytearray):  # its bytes are no opcodes, but are kept
            wide = isinstance(value, str) and not value.isascii()
            self.work += len(value) * ((6 if wide else 2) - _BYTE) + _CONTAINER
            self.check(self.position)
        return value

    def with_argument(self, code: int, value: Any) -> None:
        """Follow an opcode that has an argument."""
        if code == 0x63:  # GLOBAL
            self.name(*value)
        elif code == 0x69:  # INST
            items = self.pop_mark()
            self.name(*value)
            self.stack.append(self.call(self.stack.pop(), tuple(items)))
        elif code == 0x70:  # PUT
            self.put(value)
        elif code == 0x67:  # GET
            self.stack.append(self.memo[value])
        elif code == 0x50:  # PERSID
            self.stack.append(self.persistent(value))
        elif code in (0x82, 0x83, 0x84):  # EXT1, EXT2, EXT4: registered at run time, so it could be anything
            self.stack.append(GlobalRef("copyreg", f"extension {value}"))
            self.work += _CALL
        elif code not in (0x80, 0x95):  # PROTO, FRAME
            self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pop(self) -> None:
        if self.stack:
            del self.stack[-1]
        else:
            self.pop_mark()

    def put(self, index: int) -> None:
        if not 0 <= index < _MAX_MEMO_INDEX:
            raise ValueError("memo index out of range")
        self.memo[index] = self.stack[-1]

    def add_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            check_adding(target)
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
        self.work += _ITEM * (len(flat) + 1)
        if self.work > self.room:
            self.check()
        fill(target, zip(flat[::2], flat[1::2], strict=True))

    def set_item(self) -> None:
        value = self.stack.pop()
        self.set_items([self.stack.pop(), value])

    def tuple3(self) -> None:
        first, second, third = self.stack[-3:]
        self.stack[-3:] = [(first, second, third)]
        self.work += _TUPLE

    def list_of_marked(self) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def dict_of_marked(self) -> None:
        flat = self.pop_mark()
        self.stack.append({})
        self.set_items(flat)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a global's name is no text")
        self.name(module, name)

    def name(self, module: str, name: str) -> None:
        ref = self.globals.get((module, name))
        if ref is None:
            if len(module) + len(name) > _MAX_NAME:  # what judges it takes its parts apart
                raise ValueError("a global's name is too long")
            self.work += _OBJECT
            ref = self.globals[module, name] = canonical(module, name)
            if is_foreign(ref) and len(self.foreign) < 1000:
                self.foreign[str(ref)] = None
        self.stack.append(ref)

    def call(self, function: Any, args: Any) -> Any:
        # what a call is handed is looked through and may be copied, however often it is handed on
        self.work += _CALL
        if type(args) is tuple and len(args) < 20:
            for arg in args:
                if type(arg) in (tuple, list, dict) and len(arg) > 8:
                    self.work += _ITEM * len(arg)
        elif isinstance(args, tuple):
            sizes = [len(arg) for arg in args if isinstance(arg, tuple | list | dict)]
            self.work += _ITEM * (len(args) + sum(sizes))
        if self.work > self.room:
            self.check()
        made = call(function, args, self.plain)
        if type(made) is Opaque:
            self.work += _OBJECT
        return made

    def reduce(self) -> None:
        args = self.stack.pop()
        self.stack.append(self.call(self.stack.pop(), args))

    def new_object_ex(self) -> None:
        keywords, args = self.stack.pop(), self.stack.pop()
        self.work += _ITEM * len(as_tuple(args))
        self.stack.append(self.call(self.stack.pop(), (*args, keywords) if keywords else args))

    def object_(self) -> None:
        cls, *args = self.pop_mark()
        self.stack.append(self.call(cls, tuple(args)))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        check_state(target, state)
        if isinstance(target, Opaque):
            target.state = state
        if isinstance(target, TensorRef):
            target.unsupported = with_state(target, (state,)).unsupported

    def persistent(self, pid: Any) -> Any:
        self.work += _CALL
        if not isinstance(pid, tuple) or not pid:
            return Opaque(None, (pid,))
        if pid[0] == "module" and len(pid) > 1:  # a class with its source code, for whole legacy modules
            return pid[1]
        if pid[0] == "storage" and len(pid) in (5, 6):
            return describe_storage(self.storages, *pid[1:])
        raise TypeError("a persistent id of unknown kind")


_HANDLERS: dict[int, Callable[[_Machine], None]] = {
    0x30: _Machine.pop,  # POP
    0x31: lambda machine: machine.pop_mark().clear(),  # POP_MARK
    0x32: lambda machine: machine.stack.append(machine.stack[-1]),  # DUP
    0x8F: lambda machine: machine.stack.append([]),  # EMPTY_SET: its items need not be hashable here
    0x6C: _Machine.list_of_marked,  # LIST
    0x91: _Machine.list_of_marked,  # FROZENSET
    0x87: _Machine.tuple3,  # TUPLE3
    0x64: _Machine.dict_of_marked,  # DICT
    0x61: lambda machine: machine.add_items([machine.stack.pop()]),  # APPEND
    0x65: lambda machine: machine.add_items(machine.pop_mark()),  # APPENDS
    0x90: lambda machine: machine.add_items(machine.pop_mark()),  # ADDITEMS
    0x73: _Machine.set_item,  # SETITEM
    0x75: lambda machine: machine.set_items(machine.pop_mark()),  # SETITEMS
    0x93: _Machine.stack_global,  # STACK_GLOBAL
    0x81: _Machine.reduce,  # NEWOBJ
    0x92: _Machine.new_object_ex,  # NEWOBJ_EX
    0x6F: _Machine.object_,  # OBJ
    0x62: _Machine.build,  # BUILD
    0x97: lambda machine: machine.stack.append(Opaque(None)),  # NEXT_BUFFER
    0x98: lambda _: None,  # READONLY_BUFFER
}
