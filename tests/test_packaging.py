"""What is shipped, and that importing it changes nothing."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import freezekit

ROOT = Path(__file__).parent.parent
NAME = f"freezekit-{freezekit.__version__}"


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a distribution as pip and build do, by hatchling, but without an environment of its own."""
    script = "import sys, hatchling.build as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    command = [sys.executable, "-c", script, f"build_{kind}", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source, check=True)
    return target / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dist")


@pytest.fixture(scope="module")
def wheel(place: Path) -> dict[str, bytes]:
    return content(build("wheel", ROOT, place))


@pytest.fixture(scope="module")
def unpacked(place: Path) -> Path:
    with tarfile.open(build("sdist", ROOT, place)) as archive:
        archive.extractall(place, filter="data")
    return place / NAME


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def package() -> set[str]:
    paths = (path for path in (ROOT / "freezekit").rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}


def test_the_wheel_is_the_package_and_nothing_else(wheel: dict[str, bytes]) -> None:
    info = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    assert set(wheel) == package() | {f"{NAME}.dist-info/{name}" for name in info}
    assert {f"freezekit/report/{name}" for name in ("page.js", "page.css", "schema.json")} < set(wheel)
    assert "freezekit/py.typed" in wheel
    for name in package():
        assert wheel[name] == (ROOT / name).read_bytes(), name


def test_what_the_metadata_says(wheel: dict[str, bytes]) -> None:
    metadata = Parser().parsestr(wheel[f"{NAME}.dist-info/METADATA"].decode())
    assert (metadata["Name"], metadata["Version"]) == ("freezekit", freezekit.__version__)
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("MIT", ">=3.10")
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert [need.partition(">=")[0] for need in needs] == ["click", "numpy", "rich", "torch"]
    hooks = {"accelerate", "fastai", "ignite", "lightning", "transformers"}
    assert set(metadata.get_all("Provides-Extra")) == hooks | {"demo", "dev", "recipes", "test", "vision"}
    assert b"freezekit = freezekit.cli:main" in wheel[f"{NAME}.dist-info/entry_points.txt"]


def test_the_sdist_builds_the_same_wheel_again(unpacked: Path, wheel: dict[str, bytes]) -> None:
    top = {"LICENSE", "PKG-INFO", "README.md", "freezekit", "pyproject.toml", "recipes", "tests"}
    assert {path.name for path in unpacked.iterdir()} - {".gitignore"} == top
    assert not list(unpacked.rglob("__pycache__"))
    again = unpacked / "again"
    again.mkdir()
    assert content(build("wheel", unpacked, again)) == wheel


STATE = """
import atexit, gc, locale, logging, os, random, signal, sys, threading, warnings

def state():
    seen = {
        "warnings": list(warnings.filters), "showwarning": warnings.showwarning,
        "environment": dict(os.environ), "folder": os.getcwd(), "locale": locale.setlocale(locale.LC_ALL),
        "threads": threading.enumerate(), "random": random.getstate(), "gc": gc.get_threshold(),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "logging": (logging.root.level, list(logging.root.handlers), logging.lastResort),
        "hooks": (sys.excepthook, sys.displayhook, list(sys.path), list(sys.meta_path), list(sys.path_hooks)),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()), "exit": atexit._ncallbacks(),
    }
    own = logging.getLogger("freezekit")
    seen["own logging"] = (own.level, list(own.handlers), own.propagate)
    if (torch := sys.modules.get("torch")) is not None:
        numpy, optim = sys.modules["numpy"], sys.modules["torch.optim.optimizer"]
        seen["torch"] = (
            torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_num_interop_threads(),
            torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark, torch.backends.mkldnn.enabled,
            torch.nn.Module.__setattr__, torch.nn.Module.__call__, torch.nn.Module.load_state_dict,
            dict(torch.nn.modules.module._global_forward_hooks),
            dict(torch.nn.modules.module._global_forward_pre_hooks),
            dict(optim._global_optimizer_post_hooks), dict(optim._global_optimizer_pre_hooks),
        )
        seen["numpy"] = (str(numpy.random.get_state()), numpy.geterr(), numpy.get_printoptions())
    return seen

done = []

def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            done.append((event, path))
    elif event.startswith(("socket.", "subprocess.", "urllib.", "shutil.", "tempfile.")) or event in (
        "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.putenv", "os.unsetenv", "os.chdir", "os.system",
        "os.fork", "os.exec", "os.posix_spawn", "os.chmod", "os.link", "os.symlink", "os.truncate",
    ):
        done.append((event, arguments))
"""

FIRST = "import freezekit\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
EVERY = "import freezekit, freezekit.cli\nfor name in freezekit.__all__: getattr(freezekit, name)"


@pytest.mark.parametrize(
    ("before", "code"),
    [
        ("", FIRST),
        ("import numpy, rich.console, click, torch, torch.optim.swa_utils", EVERY),
    ],
    ids=["freezekit", "every name"],
)
def test_importing_changes_nothing(before: str, code: str, tmp_path: Path) -> None:
    script = f"{STATE}\n{before}\nearlier = state()\nsys.addaudithook(watch)\n{code}\nlater = state()\n"
    script += "assert not done, done\n"
    script += "assert earlier == later, [k for k in later if later[k] != earlier.get(k)]\n"
    command = [sys.executable, "-B", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr
    assert not list(tmp_path.iterdir())


def test_importing_loads_next_to_nothing() -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import freezekit; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True)
    assert not {"typing", "re", "enum", "dataclasses", "pathlib"} & set(out.stdout.split())


@pytest.mark.parametrize(
    "effect",
    [
        "warnings.simplefilter('ignore')", "os.environ['X'] = '1'", "random.seed(0)", "logging.basicConfig()",
        "logging.getLogger('freezekit').addHandler(logging.NullHandler())", "atexit.register(print)",
        "sys.path.append('x')", "threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "open('made', 'w').close()", "import socket; socket.socket()", "os.mkdir('made')",
    ],
)  # fmt: skip
def test_the_test_above_sees(effect: str, tmp_path: Path) -> None:
    script = f"{STATE}\nearlier = state()\nsys.addaudithook(watch)\n{effect}\n"
    script += "print(bool(done) or state() != earlier)\nos._exit(sys.stdout.flush() or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "True\n", done.stderr
