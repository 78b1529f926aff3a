"""Tells what a pickle would run if it were loaded: which callables are data types, and which are weapons."""

from __future__ import annotations

import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from functools import lru_cache

from freezekit.audit.checkpoint.inert import GlobalRef

__all__ = ["canonical", "is_compiled", "is_foreign", "is_harmful", "is_weapon"]

#: modules that newer Pythons have dropped, or that are only there on another system
_STDLIB = sys.stdlib_module_names | {"distutils", "imp", "asyncore", "pipes", "crypt", "commands", "popen2"}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: the standard library's data types; anything else of the standard library is harmful to call
_HARMLESS: dict[str, frozenset[str]] = {
    "builtins": _words(
        "set frozenset list dict tuple int float bool str bytes bytearray complex object slice range"
    ),
    "collections": _words("OrderedDict defaultdict Counter deque ChainMap UserDict UserList UserString"),
    "datetime": _words("date datetime time timedelta timezone"),
    "pathlib": _words("Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"),
    "pathlib._local": _words("Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"),
    "decimal": _words("Decimal Context"),
    "fractions": _words("Fraction"),
    "uuid": _words("UUID SafeUUID"),
    "argparse": _words("Namespace"),
    "types": _words("SimpleNamespace MappingProxyType GenericAlias"),
    "functools": _words("partial"),
    "copyreg": _words("_reconstructor __newobj__ __newobj_ex__"),
    "_codecs": _words("encode"),
    "re": _words("_compile"),
    "array": _words("array _array_reconstructor"),
    "itertools": _words("count repeat chain cycle"),
    "random": _words("Random"),
    "logging": _words("getLogger"),  # how a logger, which whole modules may keep, is pickled
    "enum": _words("Enum IntEnum Flag IntFlag"),
    "_io": _words("BytesIO StringIO"),
    "contextlib": _words("nullcontext"),
    "dataclasses": _words("Field _MISSING_TYPE _HAS_DEFAULT_FACTORY_CLASS"),
    "inspect": _words("Parameter Signature _ParameterKind"),
    "string": _words("Template"),
    "configparser": _words("ConfigParser RawConfigParser"),
    "statistics": _words("NormalDist"),
    "ipaddress": _words("IPv4Address IPv6Address IPv4Network IPv6Network"),
    "urllib.parse": _words("ParseResult SplitResult"),
    "zoneinfo": _words("ZoneInfo ZoneInfo._unpickle"),
    "time": _words("struct_time"),
    "platform": _words("uname_result"),
    "posix": _words("uname_result stat_result"),
    "os": _words("uname_result stat_result terminal_size"),
    "signal": _words("Signals Handlers"),
    "socket": _words("AddressFamily SocketKind"),
    "http": _words("HTTPStatus HTTPMethod"),
    "multiprocessing.context": _words("DefaultContext SpawnContext ForkContext ForkServerContext"),
}

#: so plainly weapons that even handing one to a harmless callable counts
_WEAPON_MODULES = _words(
    "os posix nt subprocess sys shutil socket runpy importlib ctypes pty pickle marshal code codeop timeit"
    " pdb bdb webbrowser multiprocessing concurrent asyncio commands popen2 imp"
)
_WEAPON_BUILTINS = _words(
    "eval exec execfile compile __import__ setattr delattr open input breakpoint globals locals vars map"
    " filter"
)
_WEAPON_NAMES = _words(
    "system popen Popen eval exec execfile __import__ import_module run_path run_module CDLL PyDLL"
    " check_output check_call getoutput getstatusoutput runstring read_pickle unsafe_load"
)
#: third-party packages whose callables rebuild or fetch code
_CODE_LOADERS = _words(
    "cloudpickle dill pip setuptools pkg_resources IPython joblib jsonpickle requests urllib3"
)

_TORCH_CODE_LOADERS = tuple(
    f"torch.{name}"
    for name in sorted(
        _words(
            "hub jit package ops classes testing _dynamo _inductor multiprocessing distributed.rpc"
            " distributed.elastic distributed.run utils.cpp_extension utils.model_zoo utils.collect_env"
            " utils.bottleneck utils.benchmark"
        )
    )
)
#: what torch.compile wraps a module in: these classes hold data, and only their methods run code
_COMPILED = frozenset(
    f"torch._dynamo.{name}" for name in ("eval_frame", "convert_frame", "hooks", "repro.after_dynamo")
)
#: torch's classes whose making opens, or whose state unpickles, what it is given
_TORCH_OPENERS = _words(
    "PyTorchFileReader PyTorchFileWriter FileStore TCPStore SummaryWriter FileWriter EventFileWriter"
    " FileBaton FileSystemReader FileSystemWriter PT2ArchiveReader PT2ArchiveWriter"
    " _DataPipeSerializationWrapper _IterDataPipeSerializationWrapper _MapDataPipeSerializationWrapper"
    " MPIStore ScriptModuleSerializer FileOpener FileLister FileSystem PackageImporter PackageExporter"
)
#: torch functions that checkpoints call; its classes, which start with a capital, are taken for data
_TORCH_FUNCTIONS = _words("device dtype _get_layout tensor as_tensor from_numpy zeros ones empty full arange")
_NUMPY_NAMES = re.compile(
    r"_reconstruct|scalar|_frombuffer|dtype|ndarray|matrix|recarray|record|_mareconstruct|void|(bool|str|bytes|object)_?"
    r"|u?int(c|p|8|16|32|64)?|u?(byte|short|longlong|long)|(float|complex|datetime|timedelta)\d*|c?longdouble|half|single|c?double"
    r"|__(randomstate|generator|bit_generator)_ctor|__pyx_unpickle_\w+|_?[A-Z]\w*"
)


def canonical(module: str, name: str) -> GlobalRef:
    """Return the global under its Python 3 name: protocol 2 files may say ``__builtin__`` or ``copy_reg``."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return GlobalRef("operator" if module == "_operator" else module, name)


@lru_cache(4096)  # one name may be handed to calls a million times
def is_weapon(ref: GlobalRef) -> bool:
    """Tell whether the global runs code or touches the system, so that no data has a reason to name it."""
    ref = _through_modules(ref)
    top = ref.module.partition(".")[0]
    if top == "builtins":
        return ref.name in _WEAPON_BUILTINS
    return top in _WEAPON_MODULES or ref.name.rpartition(".")[2] in _WEAPON_NAMES


def is_harmful(ref: GlobalRef) -> bool:
    """Tell whether calling the global could run anything but the making of data.

    Code outside torch and the standard library is not judged: it is not imported here, and it is noted.
    """
    ref = _through_modules(ref)
    top = ref.module.partition(".")[0]
    if top in _STDLIB:
        if ref.module == "builtins" and ref.name.endswith(("Error", "Exception", "Warning")):
            return "." in ref.name
        return ref.name not in _HARMLESS.get(ref.module, frozenset())
    if is_weapon(ref) or top in _CODE_LOADERS:
        return True
    if top == "torch":
        return _torch_harmful(ref)
    if top == "numpy":
        loaders = ref.module.startswith(("numpy.testing", "numpy.distutils", "numpy.f2py"))
        loaders |= ref.name.rpartition(".")[2] in ("DataSource", "Repository", "NpzFile")
        return loaders or _NUMPY_NAMES.fullmatch(ref.name) is None
    return False


def is_foreign(ref: GlobalRef) -> bool:
    """Tell whether the global is neither torch's, nor numpy's, nor the standard library's data."""
    top = ref.module.partition(".")[0]
    return is_weapon(ref) or (top not in ("torch", "numpy") and top not in _STDLIB)


def is_compiled(ref: GlobalRef) -> bool:
    """Tell whether the global is a class that ``torch.compile`` wraps a module in."""
    return ref.module in _COMPILED and _is_class(ref.name)


def _is_class(name: str) -> bool:
    return name.rpartition(".")[2].lstrip("_")[:1].isupper()


def _torch_harmful(ref: GlobalRef) -> bool:
    if is_compiled(ref):
        return False
    if any(ref.module == loader or ref.module.startswith(loader + ".") for loader in _TORCH_CODE_LOADERS):
        return True
    path = f"{ref.module}.{ref.name}"
    if any(path.startswith(loader + ".") for loader in _TORCH_CODE_LOADERS):
        return True
    last = ref.name.rpartition(".")[2]
    if last in _TORCH_OPENERS:
        return True
    return not (_is_class(last) or last in _TORCH_FUNCTIONS or last.startswith("_rebuild_"))


def _through_modules(ref: GlobalRef) -> GlobalRef:
    """Follow a name like ``serialization.os.system`` to the standard library module that it reaches."""
    parts = ref.name.split(".")
    for index in range(len(parts) - 1, 0, -1):
        if parts[index - 1] in _STDLIB:
            return GlobalRef(parts[index - 1], ".".join(parts[index:]))
    return ref
