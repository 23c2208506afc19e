"""Who may import whom (ARCHITECTURE.md, map). Read from the source, so a lazy import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hsl_node

PACKAGE = Path(hsl_node.__file__).parent
PURE = ("errors", "sync.names", "sync.round", "sync.manifest", "sync.fusion", "train.metrics")
IMPURE = {"os", "io", "socket", "time", "datetime", "random", "secrets", "pathlib", "subprocess", "asyncio", "torch"}
TRAIN_MAY_TAKE_FROM_SYNC = {"names", "tensors", "manifest", "fusion", "durable"}


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


def imports(tree: ast.AST, *, lazy: bool = True) -> Iterator[str]:
    """Everything a module imports, as dotted names; `lazy=False`: only what is imported when it is loaded."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                assert node.level == 0, "relative imports hide who imports whom"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not lazy:
                pass
            case ast.If() if not lazy and "TYPE_CHECKING" in ast.dump(node.test):
                pass
            case _:
                yield from imports(node, lazy=lazy)


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


@pytest.mark.parametrize("name", PURE)
def test_a_pure_file_imports_no_file_socket_clock_randomness_or_torch(name):
    used = {imported.partition(".")[0] for imported in imports(sources()[f"hsl_node.{name}"])}
    assert used & IMPURE == set()


@pytest.mark.parametrize("name", PURE)
def test_a_pure_file_opens_nothing(name):
    calls = {
        n.func.id
        for n in ast.walk(sources()[f"hsl_node.{name}"])
        if isinstance(n, ast.Call)
        if isinstance(n.func, ast.Name)
    }
    assert calls & {"open", "print", "input", "exec", "eval", "__import__"} == set()


def test_errors_import_nothing_of_ours():
    assert [name for name in imports(sources()["hsl_node.errors"]) if name.startswith("hsl_node")] == []


def test_nothing_imports_in_a_circle():
    known = sources().keys()
    graph = {
        module: {
            target
            for name in imports(tree, lazy=False)
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
