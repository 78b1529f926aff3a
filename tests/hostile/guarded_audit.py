# ruff: noqa: E501  # tables and messages
"""Runs the command line again and again, each time in a forked process that is watched and limited.

Reads a JSON list of arguments a line from stdin; answers with what came of it in a line of JSON: ``code``, ``out``,
``err``, ``cpu`` seconds, ``peak`` bytes, and ``faults``, which are what it had no business with: a file opened
outside the folders of those given and Python's own, or for writing; a program, a socket, an unpickling; torch.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import sysconfig
import tempfile
import traceback
from typing import Any, NoReturn

#: of Python's own, and what the standard library looks at by itself
INSTALLED = (
    sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *filter(None, sys.path),
    *(os.path.realpath(place) for place in sys.path if place), "/etc/localtime", "/usr/share", "/usr/lib/locale",
    "/etc/terminfo", "/lib/terminfo", "/etc/mime.types", "/sys/devices/system/cpu", "/proc/cpuinfo",
)  # fmt: skip
FORBIDDEN = (
    "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.system", "os.startfile", "socket.",
    "ctypes.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod",
    "shutil.", "urllib.", "pickle.", "webbrowser.", "ftplib.", "glob.", "tempfile.",
)  # fmt: skip
LIMIT_ADDRESS_SPACE = 4 * 2**30


class Watch:
    """Notes what is forbidden."""

    def __init__(self, arguments: list[str]) -> None:
        given = [os.path.dirname(os.path.abspath(argument)) for argument in arguments if os.sep in argument]
        self.folders = tuple(os.path.join(folder, "") for folder in (*given, *INSTALLED))
        self.faults: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Be told of an event by the interpreter."""
        if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            flags = arguments[2] if event == "open" else 0
            if not os.path.join(path, "").startswith(self.folders):
                self.faults.append(f"{event} {path!a}")
            if (
                isinstance(flags, int)
                and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                and path != os.devnull
            ):
                self.faults.append(f"write {path!a}")
        elif event == "import" and str(arguments[0]).partition(".")[0] in (
            "torch",
            "cloudpickle",
            "dill",
            "joblib",
        ):
            self.faults.append(f"import {arguments[0]!a}")
        elif event in ("exec", "compile", "marshal.loads", "marshal.load"):
            caller = sys._getframe(1).f_code.co_filename
            if "freezekit" in caller or "pickle" in caller:
                self.faults.append(f"{event} by {caller!a}")
        elif event.startswith(FORBIDDEN):
            self.faults.append(f"{event} {ascii(arguments)[:100]}")


def child(arguments: list[str], out: int, err: int, faults: int) -> NoReturn:
    """Run the command line in this process, and end it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_ADDRESS_SPACE, LIMIT_ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
    from freezekit.cli import main

    watch, code = Watch(arguments), 0
    sys.addaudithook(watch)
    try:
        main(arguments, prog_name="freezekit")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(faults, json.dumps(watch.faults[:20]).encode())
    os._exit(code)


def serve() -> None:
    """Answer until stdin ends."""
    import freezekit.audit.files
    import freezekit.cli
    import freezekit.report.text  # noqa: F401  # imported here once, so that it need not be in each child

    while line := sys.stdin.readline():
        arguments: list[str] = json.loads(line)
        with (
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
            tempfile.TemporaryFile() as faults,
        ):
            pid = os.fork()
            if pid == 0:
                child(arguments, out.fileno(), err.fileno(), faults.fileno())
            _, status, used = os.wait4(pid, 0)
            texts = []
            for file in (out, err, faults):
                file.seek(0)
                texts.append(file.read().decode("utf-8", "backslashreplace"))
        answer = {
            "code": os.waitstatus_to_exitcode(status), "out": texts[0], "err": texts[1],
            "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * 1024,
            "faults": json.loads(texts[2] or '["it did not come to its end"]'),
        }  # fmt: skip
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
