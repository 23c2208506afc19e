"""Every alarm code that the source can give, read from its syntax tree. What varies in one (a peer, a number) is `*`.

Five ways lead to a code, and a new one in any of them is found:

    alarms.sound(CODE, ...), sound_or_settle    the running daemon
    journal.note(level, CODE, ...)              what `status` shows of a daemon that is down
    StatusWarning(CODE, ...)                    made where a snapshot is made
    found[CODE] = ...  in warnings_of           the keys
    CODE is a name, or a call                   `ELSEWHERE` says what it stands for
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

# An argument that is neither a string nor a constant of the same package -> the codes that it stands for.
ELSEWHERE: Mapping[str, frozenset[str]] = {
    "code": frozenset(
        {"diverged", "unvalidated", "influence *", "images *", "said *", "share *", "validation", "keys *", "revoked *"}
    ),
    "harm.model.code": frozenset({"fused *", "own *"}),
    "n['code']": frozenset(),  # a note of the journal, which is found where it is written
}


class Unknown(Exception):
    """An alarm's code is made in a way that nobody has told here."""


def codes(sources: Mapping[str, str], *, notes: bool = True) -> set[str]:
    """Of all these files (name -> text). Without `notes`: only what `sound` is given.

    Raises:
        Unknown: a code is neither text nor in ELSEWHERE.
    """
    trees = {name: ast.parse(text) for name, text in sources.items()}
    constants = {t.id: n.value.value for tree in trees.values() for n in tree.body if isinstance(n, ast.Assign)
                 for t in n.targets if isinstance(t, ast.Name)
                 and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)}  # fmt: skip
    found: set[str] = set()
    for name, tree in trees.items():
        for argument in _arguments(tree, notes):
            found |= _codes_of(argument, constants, f"{name}:{argument.lineno}")
    return found


def sounded(sources: Mapping[str, str]) -> set[str]:
    """Of the running daemon alone; without what varies in them."""
    return {code.removesuffix(" *") for code in codes(sources, notes=False)}


def of_package(package: Path) -> dict[str, str]:
    return {p.relative_to(package).as_posix(): p.read_text("utf-8") for p in sorted(package.rglob("*.py"))}


def _arguments(tree: ast.Module, notes: bool) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="sound" | "sound_or_settle"), args=[code, *_]):
                yield code
            case ast.Call() if not notes:
                pass
            case ast.Call(func=ast.Attribute(attr="note", value=ast.Name(id="journal") | ast.Attribute(
                          attr="journal" | "_journal")), args=[_, code, _]):  # fmt: skip
                yield code
            case ast.Call(func=ast.Name(id="StatusWarning"), args=[code, *_]):
                yield code
            case ast.FunctionDef(name="warnings_of"):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Assign):
                        yield from (t.slice for t in inner.targets if isinstance(t, ast.Subscript))


def _codes_of(argument: ast.expr, constants: Mapping[str, str], where: str) -> set[str]:
    match argument:
        case ast.Constant(value=str(code)):
            return {code}
        case ast.JoinedStr(values=parts):
            return {"".join(str(p.value) if isinstance(p, ast.Constant) else "*" for p in parts)}
        case ast.Name(id=name) if name in constants:
            return {constants[name]}
    if (known := ELSEWHERE.get(ast.unparse(argument))) is None:
        raise Unknown(f"{where}: {ast.unparse(argument)}")
    return set(known)
