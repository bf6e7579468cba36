"""The walls of the house: imports go down only, in no circle, and no file grows past what can be read at once."""

import ast
from pathlib import Path

import pytest
from tiny import ROOT

# A room may import rooms of lower floors, and of its own. TYPE_CHECKING imports and those within functions count.
FLOORS = (
    {
        *("errors", "options", "files", "provenance", "intervals", "first_dense"),
        *("conv", "parametrisation", "schedule", "images", "trace", "pytrees", "numerics", "forward", "jaxprs"),
    },
    {"mechanisms", "matching", "modules", "parallel", "tensor_files", "metrics", "federated"},
    {"victims", "priors"},
    {
        *("samplers", "attacks", "signal", "problem", "methods", "theory", "algebra"),
        *("auto", "analytic_mean", "expected_masks", "gauss_newton", "refinement", "weighing"),
    },
    {"sweeping", "training"},
    {"auditing"},
    {"commands"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
PACKAGE = ROOT / "gdiff_jax"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
# Within functions: the text form of a mechanism asks theory for its guarantee, which asks the mechanism for its bounds.
ALLOWED = {("mechanisms", "theory")}


def room_of(module):
    return module.split(".")[1]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(p) for p in FILES}


def imports_of(path):
    """Modules of the package that a file imports, wherever in it; the package's own face, and of a folder, apart."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {name for name in found if name in MODULES and name != module_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(module_of(path))
    for name in imports_of(path):
        other = room_of(name)
        assert other == room or FLOOR[other] <= FLOOR[room] or (room, other) in ALLOWED, name


def test_no_file_is_in_a_circle():
    """Faces of folders, which only hand names on, are looked through."""
    graph = {module_of(p): imports_of(p) for p in FILES if p.name != "__init__.py"}
    graph = {name: {i for i in imported if i in graph} for name, imported in graph.items()}
    while free := [name for name, imported in graph.items() if not imported & graph.keys()]:
        for name in free:
            del graph[name]
    assert sorted(graph) == []


@pytest.mark.parametrize("folder", ["gdiff_jax", "experiments", "benchmarks"])
def test_files_can_be_read_at_once(folder):
    lengths = {p.name: len(p.read_text().splitlines()) for p in (ROOT / folder).rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 300} == {}


def test_experiments_hold_launchers_and_studies_alone():
    assert sum(len(p.read_text().splitlines()) for p in Path(ROOT / "experiments").glob("*.py")) < 1500


@pytest.mark.parametrize("folder", ["gdiff_jax", "experiments", "benchmarks"])
def test_files_are_opened_in_an_encoding_that_is_said(folder):
    """The locale's, which is meant otherwise, is ASCII in a container and Latin-1 on a cluster."""
    unsaid = []
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _is_text(node) and not any(k.arg == "encoding" for k in node.keywords):
                unsaid.append(f"{path.name}:{node.lineno}")
    assert unsaid == []


def _is_text(call):
    """Whether a call opens a file as text; `write_text` of a name and a text is a store's."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("open", "fdopen"):
        of = ast.unparse(call.func)
        modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        return of in ("open", "os.fdopen", "path.open") and not any("b" in mode for mode in modes)
    if name in ("run", "Popen", "check_output"):
        return any(k.arg in ("text", "universal_newlines") for k in call.keywords)
    return name == "read_text" or (name == "write_text" and len(call.args) == 1)
