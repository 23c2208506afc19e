"""Every place of the command line that takes a path, and what becomes of a command that is given a wrong one.

Found in the application itself, so that a new command is tried too. As a program (`python path_options.py WORLD
PATH`) it tries all of them in one process and prints the outcomes as JSON: for another user, or a mount namespace.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from hsl_node.cli import main
from hsl_node.commands.app import app

# What a command needs beside the path that is wrong; of the others their own good values, by the parameter's name.
WORDS: dict[str, list[str]] = {
    "init": ["--name", "elm", "--address", "127.0.0.1:9009"],
    "federation create": ["--name", "trees", "--card", "{ash}/ash.card", "--set", "method=fedavg"],
    "demo": ["--hospitals", "2"],
    "backup": [],
    "recover": ["--from-peers"],
    "anchor build": ["--classes", "benign,malignant", "--image-size", "16", "-n", "4"],
    "inbox provision": ["--for", "openssh"],
    "key rotate": ["--finish", "--force"],
}
GOOD = {
    ("federation create", "card"): "{birch}/birch.card",
    ("federation create", "out"): "{world}/new.toml",
    ("federation join", "file"): "{world}/trees.toml",
    ("federation diff", "first"): "{world}/trees.toml",
    ("anchor build", "out"): "{world}/new.safetensors",
    ("anchor build", "data"): "{world}/images",
    ("restore", "file"): "{world}/ash.tar",
    ("predict", "images"): "{world}/images/benign/0.png",
    ("export", "out"): "{world}/model",
    ("demo", "data"): "{world}/table.csv",
}
ALSO = {("peer update", "card")}  # a path, or with --finish a name
FRESH = ("init", "restore")  # they make a state directory


@dataclass(frozen=True)
class Slot:
    """One place of the command line where a path stands."""

    command: str
    param: str
    option: str  # "" of an argument

    def __str__(self) -> str:
        return f"{self.command} {self.option or self.param.upper()}"


def commands() -> Iterator[tuple[str, Any]]:
    def walk(group: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from walk(command, (*words, name))
            else:
                yield " ".join((*words, name)), command

    return walk(typer.main.get_command(app), ())


def slots() -> list[Slot]:
    """`--state`, which every command has, and the command's own."""
    found = []
    for name, command in commands():
        found.append(Slot(name, "state", "--state"))
        for param in command.params:
            if _takes_path(param) or (name, param.name) in ALSO:
                option = param.opts[0] if param.opts[0].startswith("-") else ""
                found.append(Slot(name, str(param.name), option))
    return found


def _takes_path(param: Any) -> bool:
    return param.type_descriptor.annotation is Path


def line(slot: Slot, path: str, world: Path) -> list[str]:
    """The words of a command whose `slot` holds `path`, and whose other paths are good."""
    command = dict(commands())[slot.command]
    state = world / ("fresh" if slot.command in FRESH else "ash")
    words = ["--state", path if slot.param == "state" else str(state), *slot.command.split()]
    words += WORDS.get(slot.command, [])
    after: list[str] = []
    for param in command.params:
        good = GOOD.get((slot.command, str(param.name)))
        value = path if param.name == slot.param else good
        needed = param.required or param.name == slot.param or (param.name == "data" and slot.command == "anchor build")
        if value is None and param.required and _takes_path(param):
            value = str(world / "missing")  # a new command's other path
        if value is None or not needed or (slot.param == "state" and good is None):
            continue
        if param.opts[0].startswith("-"):
            words += [param.opts[0], value]
        else:
            after.append(value)
    if slot == Slot("demo", "data", "--data"):
        words += ["--group-by", "site"]
    if slot.command == "peer" and not after:
        after = ["birch"]
    if slot.command in ("peer revoke", "peer ping", "round show"):
        after = ["7" if slot.command == "round show" else "birch"]
    if slot.command == "peer update" and slot.param == "state":
        after = [str(world / "missing")]
    places = {"world": world, "ash": world / "ash", "birch": world / "birch"}
    return [word.format(**places) for word in (*words, *after)]


def wrong(kind: str, folder: Path) -> str:
    """A path of this kind, made in `folder`. "unwritable" and "hidden" need another user, or a mount: see the tests."""
    match kind:
        case "missing":
            return str(folder / "none")
        case "missing folder":
            return str(folder / "none" / "thing")
        case "a folder":
            (folder / "dir" / "inner").mkdir(parents=True, exist_ok=True)
            return str(folder / "dir")
        case "an empty folder":
            (folder / "bare").mkdir(exist_ok=True)
            return str(folder / "bare")
        case "a file":
            (folder / "file").write_text("hello\n")
            return str(folder / "file")
        case "below a file":
            (folder / "file").write_text("hello\n")
            return str(folder / "file" / "thing")
        case "empty":
            (folder / "nothing").touch()
            return str(folder / "nothing")
        case "bytes":
            (folder / "bytes").write_bytes(bytes(range(256)))
            return str(folder / "bytes")
        case "a loop":
            with contextlib.suppress(FileExistsError):
                (folder / "loop").symlink_to("loop")
            return str(folder / "loop")
        case "too long":
            return str(folder / ("x" * 300))
        case "no name":
            return ""
        case "a pipe":
            with contextlib.suppress(FileExistsError):
                os.mkfifo(folder / "pipe")
            return str(folder / "pipe")
        case _:  # one that the test has made
            return str(folder / kind)


KINDS = ("missing", "missing folder", "a folder", "an empty folder", "a file", "below a file", "empty", "bytes",
         "a loop", "too long", "no name")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    slot: str
    path: str
    code: int
    said: str
    traceback: str


def tried(words: list[str]) -> tuple[int, str, str]:
    """Exit code, what was said on stdout and stderr, and the traceback of a bug."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(words)
        except SystemExit as exc:
            return (exc.code if isinstance(exc.code, int) else 1 if exc.code else 0), said.getvalue(), ""
        except BaseException:
            return 1, said.getvalue(), traceback.format_exc()
    raise AssertionError("main always ends in SystemExit")


def attempts(world: Path, kind: str, only: str = "") -> Iterator[Outcome]:
    """Each slot with a path of this kind, each on a fresh copy of `world`."""
    with tamed():
        for number, slot in enumerate(slots()):
            if only not in str(slot):
                continue
            copy = world.with_name(f"{world.name}-{os.getpid()}-{number}")
            shutil.copytree(world, copy, symlinks=True)
            given = world.parent / "given" / str(number)
            if kind in KINDS or kind == "a pipe":
                given.mkdir(parents=True, exist_ok=True)
            path = wrong(kind, given if kind in KINDS or kind == "a pipe" else Path("/"))
            before = os.getcwd()
            os.chdir(copy)
            try:
                code, said, trace = tried(line(slot, path, copy))
            finally:
                os.chdir(before)
                shutil.rmtree(copy, ignore_errors=True)
                shutil.rmtree(given, ignore_errors=True)
            yield Outcome(str(slot), path, code, said, trace)


@contextlib.contextmanager
def tamed() -> Iterator[None]:
    """What would start processes, or take minutes, where nothing refuses before: the demo's daemons, torch's import."""
    from hsl_node.admin import doctor
    from hsl_node.demo import demo

    def running(*args: Any, **options: Any) -> Any:
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.processes, "running", running)
        patch.setattr(demo.processes, "interruptible", lambda: None)
        patch.setattr(demo.setup, "phantom_hospitals", running)
        patch.setattr(doctor, "_torch", lambda device: "not asked")
        yield


if __name__ == "__main__":
    found = [vars(outcome) for outcome in attempts(Path(sys.argv[1]), sys.argv[2], *sys.argv[3:])]
    sys.__stdout__.write(json.dumps(found))  # type: ignore[union-attr]
