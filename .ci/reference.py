"""Builds the API reference from the docstrings: python .ci/reference.py FOLDER.

It holds the public names only. A warning, a reference that leads nowhere and a name left out make it fail.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pdoc
from pdoc.doc import Class, Doc, Module
from pdoc.render_helpers import possible_sources, qualname_candidates

import freezekit
from freezekit.audit import findings

PAGES = ["freezekit", "freezekit.nn.functional", "freezekit.audit.findings", "freezekit.hooks"]
TORCH = re.compile(r"\btorch\.(nn|optim)\.(?:modules\.)?\w+\.(?=[A-Z])")
NESTED = re.compile(r"(<a [^>]*>[^<]*)<a [^>]*>([^<]*)</a>(?=[^<]*</a>)")  # pdoc's link in an address
ROLE = re.compile(r":(?:mod|func|data|class|meth|attr|exc):`([^`]+)`")


def show_public_names() -> None:
    """Let pdoc show things by the names users have for them, and private bases not at all."""
    findings.__all__ = [name for name in findings.__all__ if name not in freezekit.__all__]
    bases, formatted = Class.bases.func, inspect.formatannotation  # type: ignore[attr-defined]

    def public_bases(cls: Class) -> Any:
        return [(*base[:2], TORCH.sub(r"torch.\1.", base[2])) for base in bases(cls) if base[1][0] != "_"]

    def public_types(*args: Any, **kwargs: Any) -> str:
        return TORCH.sub(r"torch.\1.", formatted(*args, **kwargs))

    inspect.formatannotation = pdoc.doc.formatannotation = public_types

    def own_members(cls: Class) -> list[Doc[Any]]:
        own = {(cls.modulename, cls.qualname), cls.taken_from}
        found = [
            member
            for (module, base), members in cls._members_by_origin.items()
            if (module, base) in own or (module.startswith("freezekit.") and base.startswith("_"))
            for member in members
        ]
        for member in found:
            if member.name == "__init__" and not member.obj.__doc__:
                member.docstring = ""  # and not torch's
        return found

    for name, function in {"bases": public_bases, "own_members": own_members}.items():
        setattr(Class, name, prop := cached_property(function))
        prop.__set_name__(Class, name)


def documented(doc: Doc[Any]) -> Iterator[Doc[Any]]:
    """Give a module or class, and all that its page says of it."""
    yield doc
    for member in getattr(doc, "own_members", ()):
        if not isinstance(member, Module) and not member.name.startswith("_"):
            yield from documented(member)


def main(folder: Path) -> None:
    """Write the pages, and check them."""
    warnings.simplefilter("error")
    show_public_names()
    pdoc.render.configure(docformat="google", show_source=False)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # in the clone pdoc asks which of two is meant
    pdoc.pdoc(*PAGES, output_directory=folder)
    pages = {
        ".".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.html")
    }
    pages.pop("index")
    there = {name: set(re.findall(r'id="([^"]+)"', path.read_text())) for name, path in pages.items()}

    def is_link(target: str, doc: Doc[Any]) -> bool:
        """Tell whether a reference in a docstring leads to something that is shown."""
        if not there[doc.modulename].isdisjoint(qualname_candidates(target, doc.qualname)):
            return True
        try:
            return any(
                name in there and rest in {"", *there[name]} for name, rest in possible_sources(there, target)
            )
        except ValueError:  # in no module
            return False

    wrong = []
    for name, path in pages.items():
        text = NESTED.sub(r"\1\2", path.read_text())
        inherited = set(re.findall(r'href="#([^"]+)"', text)) - there[name]  # which is not shown
        for target in inherited:
            text = re.sub(rf'<a href="#{re.escape(target)}">([^<]*)</a>', r"\1", text)
        path.write_text(text)
        module = Module.from_name(name)
        public = set(getattr(module.obj, "__all__", ())) - {other.rpartition(".")[2] for other in pages}
        wrong += [f"{name}: {left} is left out" for left in public - there[name]]
        private = [shown for shown in there[name] if re.search(r"(^|\.)_(?!_init__)", shown)]
        wrong += [f"{name}: {shown} is private" for shown in private]
        for doc in documented(module):
            lost = [target for target in ROLE.findall(doc.docstring) if not is_link(target, doc)]
            wrong += [f"{doc.fullname}: {target} leads nowhere" for target in lost]
    print(f"{len(pages)} pages in {folder}: {', '.join(sorted(pages))}")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
