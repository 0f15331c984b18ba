"""Imports only go down, and heavy packages stay where they belong: one table, enforced by reading the source.

A new module needs a place in `LAYERS`. `top` lists what it may import at its head besides the standard library; inside
functions anything may be imported late, except by the runtime, which never touches torch or transformers.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "lightkv_export"
SOURCE = Path(__file__).parent.parent / PACKAGE


@dataclass(frozen=True)
class Layer:
    """`modules` may import each other (without a cycle) and every layer above them in `LAYERS`."""

    modules: frozenset[str]
    top: frozenset[str] = frozenset()

    @classmethod
    def of(cls, modules: str, top: str = "") -> Layer:
        return cls(frozenset(modules.split()), frozenset(top.split()))


# The lowest layer first. `__init__` is the package itself (its version).
LAYERS = (
    Layer.of(
        "__init__ errors filesystem windows shapes recipe flops solver schedule targets fit advice manifest"
        " manifest_checks manifest_json bundle tolerances frozen_sets digests resume steps"
    ),
    Layer.of("engines"),
    Layer.of("runtime", "numpy tokenizers PIL jinja2 onnxruntime"),
    Layer.of("stages", "numpy torch"),
    Layer.of("segment rotary", "torch transformers"),
    Layer.of("checkpoint families", "numpy"),
    Layer.of("reference", "torch transformers"),
    Layer.of(
        "export_plan sizes assets skeleton trace lower weights graph_files",
        "numpy torch onnx onnx_ir onnxscript safetensors",
    ),
    Layer.of("lint build", "numpy onnx"),
    Layer.of("pipeline", "numpy torch onnx onnx_ir"),
    Layer.of("verify verify_cases verify_set bench evaluate drawing report doctor", "numpy PIL"),
    Layer.of("cli __main__", "rich"),
)
LIGHT = LAYERS[0].modules
FORBIDDEN_IN_RUNTIME = {"torch", "transformers"}


@dataclass
class Imports:
    """What one module imports: our own modules (of which `own_top` at its head), other packages at its head or late."""

    own: set[str] = field(default_factory=set)
    own_top: set[str] = field(default_factory=set)
    top: set[str] = field(default_factory=set)
    late: set[str] = field(default_factory=set)


def _imports(path: Path, name: str) -> Imports:
    found = Imports()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for n in ast.walk(f)}
    types_only = {id(n) for block in ast.walk(tree) if _is_type_checking(block) for n in ast.walk(block)}
    for node in ast.walk(tree):
        for target in _targets(node, name, is_package=path.name == "__init__.py"):
            root = target.partition(".")[0]
            if root == PACKAGE:
                found.own.add(target)
                if id(node) not in late:
                    found.own_top.add(target)
            elif root not in sys.stdlib_module_names and id(node) not in types_only:
                (found.late if id(node) in late else found.top).add(root)
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _targets(node: ast.AST, name: str, *, is_package: bool) -> list[str]:
    """Dotted names that an import statement may load; of `from package import x`, both the package and x."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    parent = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
    base = ".".join([*parent, *([node.module] if node.module else [])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)] if base.startswith(PACKAGE) else [base]


def _all_modules() -> dict[str, Imports]:
    modules = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = _imports(path, name)
    for imports in modules.values():  # `from x import y`: y counts where it is a module, and x.__init__ always runs
        imports.own &= modules.keys()
        imports.own_top &= modules.keys()
    return modules


MODULES = _all_modules()


def _key(name: str) -> str:
    """The table's name of a module: the first part below the package."""
    return [*name.split("."), "__init__"][1]


def _level(name: str) -> int:
    for level, layer in enumerate(LAYERS):
        if _key(name) in layer.modules:
            return level
    pytest.fail(f"module {name} has no place in LAYERS of {Path(__file__).name}: add it to the layer where it belongs")


def _reach(start: str) -> set[str]:
    """Every module of ours that importing `start` may load, late imports included."""
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += MODULES[name].own
    return seen


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    above = [other for other in MODULES[name].own if _level(other) > _level(name)]
    assert not above, f"{name} (layer {_level(name)}) imports {above}, which stand above it"


@pytest.mark.parametrize("name", MODULES)
def test_only_the_table_allows_heavy_imports_at_the_top(name):
    extra = MODULES[name].top - LAYERS[_level(name)].top
    assert not extra, f"{name} imports {sorted(extra)} at its head; import late, or change the table with a reason"


def test_there_is_no_import_cycle_at_the_top():
    """Late imports may point back (a registry that loads its members), within a layer."""
    graph = {}
    for name, imports in MODULES.items():  # `from package.x import y` inside package.x names its parent: no cycle
        graph[name] = {other for other in imports.own_top if not f"{name}.".startswith(f"{other}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", [name for name in MODULES if _key(name) == "runtime"])
def test_the_runtime_never_reaches_torch(name):
    for other in _reach(name):
        heavy = (MODULES[other].top | MODULES[other].late) & FORBIDDEN_IN_RUNTIME
        assert not heavy, f"{name} reaches {other}, which imports {sorted(heavy)}"


@pytest.mark.parametrize("name", [name for name in MODULES if _key(name) in LIGHT])
def test_the_light_modules_need_the_standard_library_alone(name):
    assert not MODULES[name].top
    assert MODULES[name].late <= {"tomli", "tomllib"}  # tomllib joined the standard library in Python 3.11


@pytest.mark.parametrize(
    ("source", "own", "top", "late"),
    [
        ("import torch.nn", set(), {"torch"}, set()),
        ("def f():\n    from torch import nn", set(), set(), {"torch"}),
        ("if TYPE_CHECKING:\n    import torch", set(), set(), set()),
        ("import os.path", set(), set(), set()),
        ("from . import x", {f"{PACKAGE}.a", f"{PACKAGE}.a.x"}, set(), set()),
        ("from ..errors import E", {f"{PACKAGE}.errors", f"{PACKAGE}.errors.E"}, set(), set()),
        (f"from {PACKAGE} import flops", {PACKAGE, f"{PACKAGE}.flops"}, set(), set()),
    ],
)
def test_the_reader_sees_every_kind_of_import(tmp_path, source, own, top, late):
    file = tmp_path / "module.py"
    file.write_text(source)
    assert _imports(file, f"{PACKAGE}.a.module") == Imports(own, own, top, late)
