"""Who may import whom (ARCHITECTURE.md, map). Read from the source, so a lazy import inside a function counts too."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hsl_node

PACKAGE = Path(hsl_node.__file__).parent
# Of builtins, files and numpy, by name alone: a P file has no other use for these words.
NOT_PURE = {
    "open", "print", "input", "exec", "eval", "__import__", "read", "write", "seek", "flush",
    "random", "load", "loadtxt", "genfromtxt", "fromfile", "memmap", "save", "savez", "savetxt", "tofile",
}  # fmt: skip
TRAIN_MAY_TAKE_FROM_SYNC = {"names", "tensors", "manifest", "fusion", "durable"}


@cache
def architecture() -> str:
    """Read when it is asked for: a copy of package and tests, as `mutations.py` makes it, has none."""
    return (Path(__file__).resolve().parent.parent / "ARCHITECTURE.md").read_text()


@cache
def sources() -> dict[str, ast.Module]:
    """Module name -> its syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(
            path.read_text(), filename=str(path)
        )
    return found


def imports(tree: ast.AST, *, lazy: bool = True, types: bool = True) -> Iterator[str]:
    """Everything a module imports, as dotted names. Without `lazy` what its functions import when they are called is
    left out, without `types` what only the type checker reads."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                assert node.level == 0, "relative imports hide who imports whom"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not lazy:
                pass
            case ast.If(test=ast.Name("TYPE_CHECKING")) if not types:
                for other in node.orelse:
                    yield from imports(other, lazy=lazy, types=types)
            case _:
                yield from imports(node, lazy=lazy, types=types)


def offenders(package: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, tree in sources().items()
        if f"{module}.".startswith(f"hsl_node.{package}.")
        for name in imports(tree)
        if any(f"{name}.".startswith(f"{f}.") for f in forbidden)
    ]


def test_the_walk_sees_the_package():
    """Else every rule below would hold of nothing."""
    assert {"hsl_node.sync.round", "hsl_node.train.loop", "hsl_node.config"} <= sources().keys()
    assert "torch" in {name.partition(".")[0] for name in imports(sources()["hsl_node.train.loop"])}


def test_sync_knows_neither_train_nor_torch():
    assert offenders("sync", ("hsl_node.train", "torch", "torchvision", "sklearn")) == []


def test_train_never_touches_the_wire_or_the_nodes_key():
    assert offenders("train", ("asyncssh", "paramiko", "socket", "hsl_node.identity", "hsl_node.node")) == []


def test_train_takes_only_names_manifests_tensors_fusion_and_durable_files_from_sync():
    taken = [
        (module, name)
        for module, tree in sources().items()
        if module.startswith("hsl_node.train")
        for name in imports(tree)
        if name.startswith("hsl_node.sync")
    ]
    assert taken, "the rule would hold of nothing"
    assert [t for t in taken if t[1].split(".")[2] not in TRAIN_MAY_TAKE_FROM_SYNC] == []


def pure() -> list[str]:
    """Modules with a P in the map of ARCHITECTURE."""
    folder, found = "", []
    for line in architecture().partition("## Map")[2].partition("```\n\n")[0].splitlines():
        if entry := re.match(r"[├└]─ (\w+)(/?)", line):
            folder = f"{entry[1]}." if entry[2] else ""
        found += [f"hsl_node.{folder}{name}" for name in re.findall(r"(\w+)\.py +P ", line)]
    return found


def impurities(module: str, tree: ast.AST, allowed: set[str]) -> list[str]:
    """What a P file imports or calls that it may not; `allowed`: libraries and modules of ours."""
    names = list(imports(tree, types=False))
    imported = [
        f"{module} imports {name}"
        for name in names
        if not {name, name.rpartition(".")[0], name.partition(".")[0]} & (allowed | {"__future__"})
    ]
    words = {word for name in names for word in name.split(".")}
    words |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    words |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return imported + [f"{module} uses {word}" for word in sorted(words & NOT_PURE)]


def test_the_map_marks_the_pure_files():
    """Else the rule below would hold of nothing; and every P is read."""
    assert {"hsl_node.errors", "hsl_node.sync.round", "hsl_node.sync.plateau", "hsl_node.train.metrics"} <= set(pure())
    assert set(pure()) <= sources().keys()
    assert len(pure()) == len(re.findall(r" P  ", architecture().partition("## Map")[2].partition("```\n\n")[0]))


def test_a_pure_file_reaches_only_pure_files_and_what_computes():
    """Of ours only P files, so by induction nothing else is reached."""
    statement = architecture().partition("only what computes (")[2].partition(")")[0]
    allowed = {*re.findall(r"`(\w+)`", statement), *pure()}
    assert {"numpy", "re"} <= allowed
    assert [found for module in pure() for found in impurities(module, sources()[module], allowed)] == []


@pytest.mark.parametrize(
    "code",
    [
        "import os",
        "def f():\n    import time",
        "from hsl_node import config",
        "from hsl_node.sync.tensors import read_chunk",
        "from numpy.random import default_rng",
        "import numpy as np\nnp.random.default_rng()",
        "open('x')",
        "def f(file): return file.read()",
    ],
)
def test_what_a_pure_file_may_not_do_is_found(code):
    assert impurities("m", ast.parse(code), {"numpy", "hsl_node.errors"}) != []


def test_what_a_pure_file_imports_for_types_alone_does_not_count():
    code = "if TYPE_CHECKING:\n    from hsl_node.config import Plan\nfrom hsl_node.errors import HslError"
    assert impurities("m", ast.parse(code), {"hsl_node.errors"}) == []


def test_errors_import_nothing_of_ours():
    assert [name for name in imports(sources()["hsl_node.errors"]) if name.startswith("hsl_node")] == []


def test_nothing_imports_in_a_circle():
    known = sources().keys()
    graph = {
        module: {
            target
            for name in imports(tree, lazy=False, types=False)
            for target in (name, name.rpartition(".")[0])
            if target in known and target != module and not tree_is_package(target)
        }
        for module, tree in sources().items()
    }
    assert circle_in(graph) is None
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None, "the search finds one"


def tree_is_package(module: str) -> bool:
    """`hsl_node` itself is imported by everybody for its version, and imports nothing."""
    return (PACKAGE.parent / Path(*module.split("."))).is_dir()


def circle_in(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str] | None:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return None
        for target in sorted(graph[module]):
            if found := visit(target, [*way, module]):
                return found
        done.add(module)
        return None

    return next((found for module in sorted(graph) if (found := visit(module, []))), None)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("hsl_node.node", {"torch", "torchvision", "sklearn", "matplotlib", "hsl_node.train.model"}),
        ("hsl_node.cli", {"torch", "numpy", "asyncssh", "paramiko", "pydantic", "typer", "rich", "asyncio"}),
        (
            "hsl_node.commands.status",
            {"torch", "numpy", "asyncssh", "paramiko", "pydantic", "typer", "rich", "asyncio"},
        ),
        ("hsl_node.commands.app", {"torch", "numpy", "asyncssh", "paramiko", "pydantic", "rich", "asyncio", "sklearn"}),
        ("hsl_node.control", {"torch", "asyncssh", "pydantic", "numpy"}),
        ("hsl_node.train.data", {"torch", "asyncssh", "paramiko"}),
        ("hsl_node.train.worker", {"asyncssh", "paramiko", "matplotlib"}),
    ],
)
def test_at_run_time_a_process_loads_only_what_it_needs(module, absent):
    """The supervisor stays small and survives a CUDA crash; `status` starts at once; the trainer holds no key."""
    code = f"import sys, {module}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert module in loaded
    assert loaded & absent == set()
