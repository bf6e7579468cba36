"""Python files of the user's own, imported as a script would be: with the files beside them, and without our command line."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_neighbours: set[str] = set()  # modules that were found beside the file that was imported last


@contextlib.contextmanager
def importable(where: str) -> Iterator[None]:
    """What lies beside FILE.py, or in the working folder for a MODULE, comes first while it is imported and its function runs.

    Afterwards it comes last: what the user imports in a function is still found, and no file of theirs shadows what a library
    imports late. Of two files in two folders each has its own neighbours, whatever their names are.
    """
    folder = Path(where).resolve().parent if where.endswith(".py") else Path.cwd()
    for name in list(sys.modules):
        if name.partition(".")[0] in _neighbours:
            del sys.modules[name]
    _neighbours.clear()
    before, argv = set(sys.modules), sys.argv
    places = list(dict.fromkeys([str(folder), str(_root(folder))]))  # of a package also the folder that holds it
    sys.path[:0] = places
    sys.argv = [where]  # a file that parses its command line finds none, not ours
    try:
        yield
    finally:
        sys.argv = argv
        for place in places:
            sys.path.remove(place)
            if place not in sys.path:
                sys.path.append(place)
        new = {name.partition(".")[0] for name in set(sys.modules) - before} - {name.partition(".")[0] for name in before}
        _neighbours.update(name for name in new if _lies_in(name, places))


def _lies_in(name: str, places: list[str]) -> bool:
    module = sys.modules.get(name)
    found = [file for file in [getattr(module, "__file__", None), *getattr(module, "__path__", ())] if file]
    return any(str(parent) in places for file in found[:1] for parent in list(Path(file).resolve().parents)[:2])


def _root(folder: Path) -> Path:
    """The folder from which the package that this folder is can be imported; itself where it is none."""
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def module_of(where: str) -> ModuleType:
    """The module of a name or of FILE.py, executed anew; call it within `importable`."""
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where).resolve()
    if _is_relative(path):  # only as a part of its package can it say `from . import layers`
        return importlib.import_module(".".join(path.relative_to(_root(path.parent)).with_suffix("").parts))
    name = path.stem
    if name in sys.modules:  # such as jax, or the same name in another folder
        name = f"{name}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, where  # noqa: PT018 - a name that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickles of the file look for it
    spec.loader.exec_module(module)
    return module


def _is_relative(path: Path) -> bool:
    """Whether the file of a package imports its neighbours by a dot."""
    if not (path.parent / "__init__.py").is_file():
        return False
    imports = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.ImportFrom))
    return any(node.level for node in imports)
