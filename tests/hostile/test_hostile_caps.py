"""What amplifies: a few bytes that ask for minutes or gigabytes end in 2 s of CPU and 200 MB."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import build_hostile as build
import pytest

_M = 2**20
_LIST = b"](" + b"N" * 200_000 + b"eq\x010"
_DICT = b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(100_000)) + b"uq\x010"
_CTOR = build.glob("builtins", "list") + b"q\x020"
_KEY = b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b"q\x010"

BODIES = {
    "laughs": b"]q\x000" + b"".join(b"](h\x00h\x00h\x00h\x00h\x00eq\x000" for _ in range(100_000)) + b"h\x00",
    "nested_lists": b"]" * 2_000_000 + b"a" * 1_999_999,
    "nested_tuples": b"N" + b"\x85" * 8_000_000,
    "nested_dicts": b"}" + b"K\x01}" * 1_000_000 + b"s" * 1_000_000,
    "marks": b"(" * 5_000_000,
    "dicts": b"]" + b"(" + b"}" * 5_000_000 + b"e",
    "memo": b"N" + b"\x94" * 5_000_000,
    "memo_far": b"N" + b"".join(b"r" + struct.pack("<I", i << 12) for i in range(1_000_000)),
    "list_of_list": _LIST + _CTOR + b"](" + b"h\x02h\x01\x85R" * 100_000 + b"e",
    "dict_of_dict": _DICT
    + build.glob("collections", "OrderedDict")
    + b"q\x020"
    + b"]("
    + b"h\x02h\x01\x85R" * 100_000
    + b"e",
    "huge_arguments": b"("
    + b"N" * 500_000
    + b"tq\x01"
    + build.glob("pkg", "F")
    + b"q\x020"
    + b"h\x02h\x01R0" * 100_000,
    "huge_keys": _KEY + b"}(" + b"h\x01N" * 1_000_000 + b"u",
    "huge_number": b"\x8b" + struct.pack("<i", 20 * _M) + b"\x7f" * 20 * _M,
    "digits": b"I" + b"9" * 4000 + b"\n0" + b"]" + b"(" + (b"L" + b"7" * 4200 + b"L\n") * 3000 + b"e",
    "wide_text": build.text("\U0001f600" + "a" * 25 * _M),
    "colliding_keys": b"}("
    + b"".join(b"\x8a\x08" + struct.pack("<q", i << 44) + b"N" for i in range(2**15))
    + b"u",
    "globals": b"](" + b"".join(b"cpkg%07d\nname%07d\n" % (i, i) for i in range(500_000)) + b"e",
    "calls": build.glob("pkg", "F") + b"q\x010" + b"](" + b"h\x01)R" * 2_000_000 + b"e",
    "layers": build.glob("torch._tensor", "_rebuild_from_type_v2")
    + b"q\x010)q\x020"
    + b"(h\x01Nh\x02tq\x020" * 200_000
    + b"h\x01h\x02R" * 1000,
    "pops": b"N0" * 8_000_000,
    "gets": b"Nq\x00" + b"h\x00" * 8_000_000,
    "dups": build.text("x" * _M) + b"2" * 8_000_000,
    "frozensets": b"((\x91" * 2_000_000,
    "tensors": b"}(" + b"".join(build.text(f"k{i}") + b"h\x05" for i in range(500_000)) + b"u",
    "attributes": build.glob("pkg", "F") + b")R" + b"}}b" * 2_000_000,
    "keys": build.mapping() + b"(" + b"".join(build.text(f"k{i}") + b"N" for i in range(1_000_000)) + b"u",
}

CODE = """
import json, re, sys, time
from freezekit.audit.checkpoint import read_checkpoint
from freezekit.errors import CheckpointError
before = time.process_time()
said = None
try:
    for tensor in read_checkpoint(sys.argv[1]).values():
        tensor.read()
except CheckpointError as error:
    said = str(error)
spent = time.process_time() - before
# the peak that getrusage tells would be that of the tests, from before this process became another program
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
print(json.dumps([spent, peak, said]))
"""


def measure(path):
    root = str(Path(__file__).parents[2])
    out = subprocess.run(
        [sys.executable, "-c", CODE, path], capture_output=True, text=True, cwd=root, timeout=120, check=True
    )
    return json.loads(out.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="its memory is told by Linux only")
@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", BODIES)
def test_costs_little(name, form, tmp_path):
    body = build.tensor(of=None if form == "zip" else build.legacy_storage()) + b"q\x05q\xff0" + BODIES[name]
    if form == "zip":
        build.write_zip(tmp_path / "a", body)
    else:
        (tmp_path / "a").write_bytes(build.legacy_bytes(body))
    seconds, megabytes, said = measure(tmp_path / "a")
    assert seconds < 2
    assert megabytes < 200
    assert said is None or said.isprintable()
