"""Who may import whom. Read from the source: an import inside a function counts, and one for types alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache

import pytest
from sources import PACKAGE, imports, sources

# Of builtins, files and numpy, by name alone: a pure file has no other use for these words.
NOT_PURE = {
    "open", "print", "input", "exec", "eval", "__import__", "read", "write", "seek", "flush",
    "random", "load", "loadtxt", "genfromtxt", "fromfile", "memmap", "save", "savez", "savetxt", "tofile",
}  # fmt: skip
# Who may import whom: each only what stands to its left, also for types and inside functions. One on a line with others
# knows nothing of these.
LAYERS = [
    {"errors"},
    {"host"},
    {"federation"},
    {"weights"},
    {"sync", "train"},
    {"status"},
    {"results", "web", "study"},
    {"node"},
    {"admin"},
    {"demo"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
# A pure file's own libraries; of ours it reaches only pure files, so by induction nothing else is reached.
WHAT_COMPUTES = {
    "base64", "binascii", "collections", "dataclasses", "enum", "functools", "hashlib", "itertools", "json", "math",
    "re", "typing", "numpy", "pydantic",
}  # fmt: skip


def ours(module: str) -> set[str]:
    """The modules of this package that a module imports; a package counts where only its __init__ is meant."""
    known = sources().keys() - {"hsl_node"}  # imported by everybody for its version, and imports nothing
    return {
        name if name in known else name.rpartition(".")[0]
        for name in imports(sources()[module])
        if name in known or name.rpartition(".")[0] in known
    }


def layer_of(module: str) -> int:
    package = module.split(".")[1]
    return next(number for number, layer in enumerate(LAYERS) if package in layer)


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
    assert {"hsl_node.sync.round", "hsl_node.train.loop", "hsl_node.federation.config"} <= sources().keys()
    assert "torch" in {name.partition(".")[0] for name in imports(sources()["hsl_node.train.loop"])}
    assert "hsl_node.sync.round" in ours("hsl_node.sync.recovered")


def test_each_package_imports_only_packages_to_its_left():
    packages = {module.split(".")[1] for module in sources() if module != "hsl_node"}
    assert packages <= set().union(*LAYERS), "a new package gets its layer"
    upward = [
        f"{module} imports {target}"
        for module in sources()
        if module != "hsl_node"
        for target in ours(module)
        if module.split(".")[1] != target.split(".")[1] and layer_of(target) >= layer_of(module)
    ]
    assert upward == []


def test_only_four_files_lie_at_the_top():
    assert {p.name for p in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py", "errors.py"}


def test_neither_the_exchange_nor_the_daemon_knows_torch():
    assert offenders("sync", ("torch", "torchvision", "sklearn")) == []
    assert offenders("node", ("torch", "torchvision", "sklearn", "hsl_node.train", "hsl_node.results")) == []


def test_train_never_touches_the_wire_or_the_nodes_key():
    assert offenders("train", ("asyncssh", "paramiko", "socket", "hsl_node.federation.identity")) == []


@cache
def pure() -> tuple[str, ...]:
    """Modules whose docstring's first paragraph ends with "Pure."."""
    promises = {module: (ast.get_docstring(tree) or "").partition("\n\n")[0] for module, tree in sources().items()}
    return tuple(module for module, promise in promises.items() if promise.endswith("Pure."))


def impurities(module: str, tree: ast.AST, allowed: set[str]) -> list[str]:
    """What a pure file imports or calls that it may not; `allowed`: libraries and modules of ours."""
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


def test_the_files_that_decide_are_pure():
    """Else the rule below would hold of nothing."""
    assert {"hsl_node.errors", "hsl_node.sync.round", "hsl_node.sync.plateau", "hsl_node.train.tasks.metrics"} <= {
        *pure()
    }


def test_a_pure_file_reaches_only_pure_files_and_what_computes():
    allowed = {*WHAT_COMPUTES, *pure()}
    assert [found for module in pure() for found in impurities(module, sources()[module], allowed)] == []


@pytest.mark.parametrize(
    "code",
    [
        "import os",
        "def f():\n    import time",
        "from hsl_node import config",
        "from hsl_node.weights.checkpoint_file import read_chunk",
        "from numpy.random import default_rng",
        "import numpy as np\nnp.random.default_rng()",
        "open('x')",
        "def f(file): return file.read()",
    ],
)
def test_what_a_pure_file_may_not_do_is_found(code):
    assert impurities("m", ast.parse(code), {"numpy", "hsl_node.errors"}) != []


def test_what_a_pure_file_imports_for_types_alone_does_not_count():
    code = "if TYPE_CHECKING:\n    from hsl_node.federation.config import Plan\nfrom hsl_node.errors import HslError"
    assert impurities("m", ast.parse(code), {"hsl_node.errors"}) == []


def test_errors_import_nothing_of_ours():
    assert [name for name in imports(sources()["hsl_node.errors"]) if name.startswith("hsl_node")] == []


def test_nothing_imports_in_a_circle():
    """Of files; types and lazy imports counted."""
    assert circles_in({module: ours(module) for module in sources()}) == []
    assert circles_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}], "the search finds one"


def circles_in(graph: dict[str, set[str]]) -> list[set[str]]:
    """Modules that reach one another; the smallest set first."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        todo = [start]
        while todo:
            for target in graph[todo.pop()] - found:
                found.add(target)
                todo.append(target)
        return found

    reach = {module: reached(module) for module in graph}
    circles = {frozenset({m, *(o for o in reach[m] if m in reach[o])}) for m in graph if m in reach[m]}
    return sorted((set(c) for c in circles), key=lambda c: (len(c), sorted(c)))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("hsl_node.node.daemon", {"torch", "torchvision", "sklearn", "matplotlib", "hsl_node.train"}),
        ("hsl_node.cli", {"torch", "numpy", "asyncssh", "paramiko", "pydantic", "typer", "rich", "asyncio"}),
        (
            "hsl_node.commands.status",
            {"torch", "numpy", "asyncssh", "paramiko", "pydantic", "typer", "rich", "asyncio"},
        ),
        ("hsl_node.commands.app", {"torch", "numpy", "asyncssh", "paramiko", "pydantic", "rich", "asyncio", "sklearn"}),
        ("hsl_node.host.control", {"torch", "asyncssh", "pydantic", "numpy"}),
        ("hsl_node.train.data.dataset", {"torch", "asyncssh", "paramiko"}),
        ("hsl_node.train.worker", {"asyncssh", "paramiko", "matplotlib"}),
    ],
)
def test_at_run_time_a_process_loads_only_what_it_needs(module, absent):
    """The daemon stays small and survives a CUDA crash; `status` starts at once; the trainer holds no key."""
    code = f"import sys, {module}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert module in loaded
    assert loaded & absent == set()


def test_the_layers_stand_in_the_architecture_as_here():
    (line,) = re.findall(r"^    (errors < .*)$", (PACKAGE.parent / "ARCHITECTURE.md").read_text(), re.M)
    assert [set(layer.split(" | ")) for layer in line.split(" < ")] == LAYERS[:-1]  # without __main__, which is cli
