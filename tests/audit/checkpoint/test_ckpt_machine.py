"""The pickle machine gives what pickle gives, opcode for opcode, and fails in no other way than it should."""

import io
import pickle
import pickletools
import struct

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from freezekit.audit.checkpoint.decoding import PickleBytes
from freezekit.audit.checkpoint.inert import Key, Opaque
from freezekit.audit.checkpoint.limits import Limits
from freezekit.audit.checkpoint.pickle_machine import LimitedReader, PickleDamageError, unpickle
from freezekit.errors import CheckpointError

RELAXED = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)

texts = st.text(st.characters(), max_size=300)
keys = st.one_of(
    texts, st.integers(), st.booleans(), st.none(), st.binary(max_size=5), st.tuples(st.integers())
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**5000), 2**5000),
    st.floats(),
    texts,
    st.binary(max_size=300),
)
data = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=6),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(keys, inner, max_size=6),
        st.lists(inner, max_size=3).map(lambda items: [items, items, (items, items)]),
    ),
    max_leaves=20,
)


def plain(value):
    """What a pickle describes, with its keys as they were, and types told apart as equality does not."""
    if isinstance(value, dict):
        return [
            (plain(key.value if isinstance(key, Key) else key), plain(item)) for key, item in value.items()
        ]
    if isinstance(value, Opaque):  # how protocols without an opcode for them write bytes
        assert str(value.made_by) in ("_codecs.encode", "builtins.bytes")
        return plain(value.args[0].encode(value.args[1]) if value.args else b"")
    if isinstance(value, list | tuple):
        return type(value).__name__, [plain(item) for item in value]
    return type(value).__name__, repr(value)


def oldest(value):
    """A pickle of the oldest opcodes of numbers, which no pickler writes any more, in a tuple."""
    return b"(" + value + b"t."


@pytest.mark.parametrize("protocol", range(6))
@RELAXED
@given(value=data)
def test_plain_data(protocol, value):
    raw = pickle.dumps(value, protocol)
    stream = io.BytesIO(b"before" + raw + b"behind")
    stream.seek(6)
    assert plain(unpickle(stream).root) == plain(pickle.loads(raw))
    assert stream.read() == b"behind"


@pytest.mark.parametrize("protocol", range(6))
def test_what_crosses_the_windows(protocol):
    value = [{str(i): ("x" * (i % 999), i**7, b"y" * (i % 300), float(i))} for i in range(2000)]
    value += ["é" * 70_000, b"z" * 200_000, "\U0001f600" * 40_000, 2**300_000]
    raw = pickle.dumps(value, protocol) if protocol > 1 else pickle.dumps(value[:-1], protocol)
    stream = io.BytesIO(raw + b"behind")
    found = unpickle(LimitedReader(stream, len(raw) + 6)).root
    assert plain(found[:2003]) == plain(pickle.loads(raw)[:2003])
    assert found[2003:] == pickle.loads(raw)[2003:]
    assert stream.read() == b"behind"


@pytest.mark.parametrize(
    "raw",
    [
        b"I00\n", b"I01\n", b"I0\n", b"I1\n", b"I-5\n", b"I0x1f\n", b"I 7\n", b"I1_000\n", b"I123456789012\n",
        b"L5L\n", b"L-7\n", b"L0x10L\n", b"L0L\n", b"F1.5\n", b"Fnan\n", b"F-inf\n", b"F1e5\n",
        b"S'a\\x41\\n'\n", b'S"it\'s"\n', b"S''\n", b"Va\\u20ac\\n\n", b"V\n", b"T\x02\x00\x00\x00ab",
        b"U\x01a",
        b"\x8a\x00", b"\x8a\x02\xff\x00", b"\x8a\x01\x80", b"\x8b\x03\x00\x00\x00\x00\x00\x80",
        b"Np5\n0g5\n", b"Nq\x05h\x05", b"Nr\x05\x00\x01\x00j\x05\x00\x01\x00", b"N\x94h\x00", b"(1",
        b"((t1", b"N0",
        b"(N0(0", b"N2", b"(I1\nI2\nd", b"(I1\nI2\nl", b"]Ka", b"](K\x01K\x02e", b"}K\x01K\x02s",
        b"}(K\x01K\x02u",
        b"K\x01\x85", b"K\x01K\x02\x86", b"K\x01K\x02K\x03\x87", b"G@\t!\xfbTD-\x18", b"J\xff\xff\xff\xff",
        b"M\xff\xff",
        b"\x8e\x02\x00\x00\x00\x00\x00\x00\x00ab", b"\x96\x02\x00\x00\x00\x00\x00\x00\x00ab",
        b"\x8d\x02\x00\x00\x00\x00\x00\x00\x00ab", b"B\x01\x00\x00\x00a", b"C\x01a",
        b"X\x03\x00\x00\x00\xed\xa0\x80",
        b"\x8c\x01a", b"\x80\x05", b"\x95\x01\x00\x00\x00\x00\x00\x00\x00N",
    ],
)  # fmt: skip
def test_each_opcode_as_pickle_has_it(raw):
    raw = oldest(raw)
    try:
        expected = pickle.loads(raw)
    except Exception:
        with pytest.raises(PickleDamageError):
            unpickle(io.BytesIO(raw))
        return
    assert plain(unpickle(io.BytesIO(raw)).root) == plain(expected)


def by_genops(raw):
    """What the standard library's decoder splits off, with the arguments that it decodes."""
    return [(ord(op.code), arg) for op, arg, _ in pickletools.genops(raw) if arg is not None]


#: the decoder of the standard library takes some of these for decimal or ASCII, which pickle does not
LOOSE = frozenset(map(ord, "ILTUSFVgpci"))


@RELAXED
@given(value=data, protocol=st.integers(0, 5))
def test_arguments_are_those_of_pickletools(value, protocol):
    raw = pickle.dumps(value, protocol)
    source = PickleBytes(io.BytesIO(raw), len(raw), Limits.DEFAULT)
    source.more(0)
    dropped = 0
    for op, arg, place in pickletools.genops(raw):
        try:
            found, end = source.argument(ord(op.code), place - dropped + 1)
        except KeyError:  # it has none, or a machine's loop decodes it
            continue
        assert dropped == source.dropped
        if ord(op.code) not in LOOSE:
            assert (type(found), repr(found)) == (type(arg), repr(arg))
        assert end + dropped > place


COMMON = pickle.dumps({"a": [1, 2.5, "x", (b"y", None)], "b": {3: True}, "c": 2**70}, 2)


@settings(RELAXED, max_examples=500)
@example(changes=[], cut=0, protocol=0)
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 3),
    protocol=st.integers(0, 5),
)
def test_mutations_never_give_another_value(changes, cut, protocol):
    raw = bytearray(
        pickle.dumps({"a": [1, 2.5, "x", (b"y", None)], "b": {3: True}, "c": 2**70, "d": "x" * 70}, protocol)
    )
    for place, byte in changes:
        raw[place % len(raw)] = byte
    del raw[len(raw) - cut :]
    found = or_refused(bytes(raw))
    if found is REFUSED or any(op.name in NAMING for op, _, _ in pickletools.genops(bytes(raw))):
        return
    try:
        expected = pickle.loads(bytes(raw))
    except Exception:  # a surrogate in a number, a memo index too high for it: refusing more is no harm
        return
    assert plain(found) == plain(expected)


REFUSED = object()


def or_refused(raw):
    refusal = None
    try:
        return unpickle(io.BytesIO(raw), limits=Limits(pickle_bytes=10**6)).root
    except CheckpointError as error:
        refusal = str(error)
    assert refusal.isprintable()
    return REFUSED


NAMING = frozenset(
    (
        "GLOBAL", "STACK_GLOBAL", "INST", "EMPTY_SET", "FROZENSET", "PERSID", "BINPERSID", "REDUCE", "OBJ",
        "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BUILD", "NEXT_BUFFER", "READONLY_BUFFER",
    )
)  # fmt: skip


@settings(RELAXED, max_examples=500)
@given(raw=st.binary(max_size=60))
def test_any_bytes_fail_as_they_should(raw):
    or_refused(raw + b".")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"X\xff\xff\xff\x7f", "lies beyond the file's end .*2147483647 bytes with 1 left"),
        (b"\x8e" + b"\xff" * 8, "beyond the file's end"),
        (b"\x96" + b"\xff" * 7 + b"\x00", "beyond the file's end"),
        (b"T\xff\xff\xff\xff", "a negative length"),
        (b"\x8b\xff\xff\xff\xff", "a negative length"),
        (b"\x80\x06N", "unsupported pickle protocol"),
        (b"\x95" + b"\xff" * 8 + b"N", "a frame ends beyond"),
        (b"I" + b"9" * 5000 + b"\n", "too many digits"),
        (b"L" + b"9" * 1_000_000 + b"L\n", "too many digits"),
        (b"Np-1\n", "memo index out of range"),
        (b"h\x05", "cannot be followed"),
        (b"c" + b"a." * 600 + b"\nb\n", "name is too long"),
        (b"\x00", "cannot be followed"),
        (b"S'a\n", "without its quotes"),
    ],
)  # fmt: skip
def test_refusals(raw, says):
    with pytest.raises(PickleDamageError, match=says):
        unpickle(io.BytesIO(raw + b"."))


@pytest.mark.parametrize("cut", range(1, len(COMMON)))
def test_truncated(cut):
    with pytest.raises(PickleDamageError, match="truncated or damaged"):
        unpickle(io.BytesIO(COMMON[:cut]))


def test_a_number_with_millions_of_binary_digits_is_read():
    raw = b"\x8b" + struct.pack("<i", 2**20) + b"\x01" * 2**20
    assert unpickle(io.BytesIO(raw + b".")).root.bit_length() == 2**23 - 7


def test_caps_say_how_to_lift_them():
    raw = pickle.dumps([[f"{i:050}"] for i in range(5000)], 0)
    for limits in (Limits(pickle_work=10_000), Limits(pickle_bytes=70_000)):
        with pytest.raises(CheckpointError, match="--no-limits reads it all the same"):
            unpickle(io.BytesIO(raw), limits=limits)
    assert unpickle(io.BytesIO(raw), limits=Limits.NONE).root == pickle.loads(raw)
