"""The house is built as docs/architecture.md says: each floor imports only what lies below it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top to the ground, as in the table of docs/architecture.md.
FLOORS = (
    "cli",
    "speech",
    "training",
    "models",
    "triton_kernels",
    "measure",
    "decoding",
    "engines",
    "ops",
    "weights",
    "checks",
)
GROUND = ("assets", "atomic", "_native", "_torch_ops", "_torch_ops_cuda")  # import nothing of kvspn
# What a folder of csrc may include of the others; csrc/tests and the examples are users of the ABI.
INCLUDES = {
    "include": set(),
    "common": {"include", "common"},
    "cpu": {"include", "common", "cpu"},
    "cuda": {"include", "common", "cuda"},
    "bindings": {"include", "bindings"},
    "tests": {"include", "common", "tests"},
}


def sources() -> dict[str, Path]:
    """Every module of the package by its name."""
    paths = [*ROOT.glob("kvspn/**/*.py"), *ROOT.glob("triton_kernels/*.py")]
    found = {}
    for path in paths:
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        parts = ["kvspn", *parts] if parts[0] == "triton_kernels" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, everywhere: bool) -> Iterator[str]:
    """The modules of kvspn that a module imports when it runs; `everywhere`: inside of functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("kvspn."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kvspn":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports(node, everywhere)


MODULES = sources()
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}


def floor(module: str) -> int | None:
    """How far from the top a module lies; None for the package itself, which loads everything lazily."""
    room = module.removeprefix("kvspn").strip(".").partition(".")[0]
    if room in ("", "__main__"):
        return None
    return len(FLOORS) if room in GROUND else FLOORS.index(room)


def upward(module: str, tree: ast.AST) -> list[str]:
    """The imports of a module that lead to a floor above its own."""
    own = floor(module)
    if own is None:
        return []
    floors = ((other, floor(other)) for other in imports(tree, everywhere=True))
    return [other for other, its in floors if its is not None and its < own]


@pytest.mark.parametrize("module", sorted(TREES))
def test_no_import_runs_upwards(module: str) -> None:
    assert upward(module, TREES[module]) == []


def test_an_import_that_runs_upwards_is_found() -> None:
    inside = ast.parse("def f():\n    from kvspn.engines import engine\n    from kvspn.models import folder")
    assert upward("kvspn.ops.made_up", inside) == ["kvspn.engines", "kvspn.models.folder"]
    assert upward("kvspn.models.made_up", inside) == []
    assert upward("kvspn.speech.made_up", ast.parse("import kvspn.cli.demo")) == ["kvspn.cli.demo"]
    only_types = ast.parse("if TYPE_CHECKING:\n    from kvspn.models import folder")
    assert upward("kvspn.ops.made_up", only_types) == []


def test_no_circle_of_imports() -> None:
    # Importing a part of a package runs the package's own __init__, which may import the part in turn.
    graph = {name: set(imports(tree, everywhere=False)) - {name} for name, tree in TREES.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_every_room_is_on_the_map() -> None:
    rooms = {path.name for path in (ROOT / "kvspn").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= {*FLOORS, *GROUND}
    table = (ROOT / "docs/architecture.md").read_text("utf-8").partition("## Floors")[2].partition("\n## ")[0]
    named = re.findall(r"^\|[^|]*\| `(?:kvspn/)?(\w+)(?:\.py)?` \|", table, flags=re.MULTILINE)
    assert named == list(FLOORS)


CXX = sorted(path for path in ROOT.glob("csrc/*/*") if path.suffix in (".h", ".cpp", ".cu"))


@pytest.mark.parametrize("path", CXX, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_includes_of_csrc(path: Path) -> None:
    folder = path.parent.name
    included = re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text("utf-8"), flags=re.MULTILINE)
    own = {name.partition("/")[0] for name in included if (ROOT / "csrc" / name).exists()}
    assert own <= INCLUDES[folder], f"{path.name} includes {own - INCLUDES[folder]}"
    if folder != "bindings":
        foreign = [name for name in included if re.match(r"(torch|pybind11|ATen|c10)/|Python\.h", name)]
        assert not foreign, f"{path.name} includes {foreign}"
