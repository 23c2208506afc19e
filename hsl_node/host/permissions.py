"""What this user may not use of a state directory: whose it is, and what mends it. Loads fast.

A copy, or a restore, made as root leaves files that the daemon's user can neither read nor replace.
"""

from __future__ import annotations

import os
import pwd
import shlex
from collections.abc import Sequence
from pathlib import Path

from hsl_node.errors import LocalStateError, escaped
from hsl_node.host.layout import Layout

NAMED = 3  # of what cannot be used; one command mends them all
_FOLDER = os.R_OK | os.W_OK | os.X_OK
_READ_ONLY = Layout(Path()).keys.name  # the daemon writes nothing there
_NOT_NEEDED = (Layout(Path()).past.name, "lost+found")  # earlier runs; what every new ext4 volume has, of root


def is_read_only(folder: Path) -> bool:
    """Is its file system mounted so?"""
    try:
        return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def read_only(path: Path) -> LocalStateError:
    """The error for a state directory, or what is in it, on such a file system."""
    mount = f"$(findmnt -no TARGET -T {shlex.quote(str(path))})"
    return LocalStateError(
        f"{path}: its file system is mounted read-only",
        remedy="`dmesg` says why: a disk that fails, often. `hsl-node backup --to FOLDER` (on another disk), `status`, "
        f"`verify` and `report` work meanwhile; where the disk is sound, as root: mount -o remount,rw {mount}",
    )


def unusable(state: Path) -> list[Path]:
    """All that the daemon needs below `state` and that this user may not read; folders also that it may not write.

    A file of somebody else, made as our files are, with mode 0600, can't be read either.
    """
    found = [] if os.access(state, _FOLDER) else [state]
    for where, folders, names in os.walk(state):
        if Path(where) == state:
            folders[:] = [f for f in folders if f not in _NOT_NEEDED]
        for name in folders:
            found += _unless(Path(where, name), _FOLDER & ~os.W_OK if name == _READ_ONLY else _FOLDER)
        for name in names:
            found += _unless(Path(where, name), os.R_OK)
    return found


def _unless(path: Path, mode: int) -> list[Path]:
    return [path] if not os.access(path, mode) and os.path.exists(path) else []  # it may be gone by now


def told(state: Path, paths: Sequence[Path]) -> LocalStateError:
    """The error for what `unusable` found."""
    if is_read_only(paths[0]):
        return read_only(state)
    shown = [f"{_within(path, state)} (of {owner(path)})" for path in paths[:NAMED]]
    more = [f"and {len(paths) - NAMED} more"] if len(paths) > NAMED else []
    text = f"user {me()} may not read or write: {', '.join([*shown, *more])}"
    return LocalStateError(text, remedy=remedy(state, paths[0]))


def denied(path: Path, state: Path | None = None) -> LocalStateError:
    """The error where using `path` gave EACCES."""
    closed = (p for p in reversed(path.parents) if not os.access(p, os.X_OK))
    there = (p for p in (path, *path.parents) if os.path.lexists(p))  # a file to be made: its folder is at fault
    culprit = next(closed, None) or next(there)
    if is_read_only(culprit) and os.access(culprit, os.R_OK):
        return read_only(path)
    state = state or next((p for p in path.parents if os.path.exists(Layout(p).node_toml)), None)
    text = f"user {me()} may not use {path}"
    text += f": {culprit} belongs to {owner(culprit)}" if culprit != path else f", which belongs to {owner(path)}"
    if state is None or not path.is_relative_to(state):
        chown = f"as root: chown {shlex.quote(me())} {shlex.quote(str(culprit))}, or give another file"
        return LocalStateError(text, remedy=chown)
    return LocalStateError(text, remedy=remedy(state, culprit))


def remedy(state: Path, path: Path) -> str:
    if not os.path.lexists(state):
        return f"give --state, or HSL_NODE_STATE, with a folder that {me()} may write to"
    place, daemon = shlex.quote(str(state)), owner(state)
    if daemon != me():  # who is at fault, this user or the owner?
        return (
            f"run this as {daemon}: sudo -u {shlex.quote(daemon)} hsl-node ...; or, where the daemon runs as {me()}, "
            f"as root: chown -R {shlex.quote(me())} {place}"
        )
    if owner(path) == me():
        return f"chmod -R u+rwX {place}"
    return f"as root: chown -R {shlex.quote(me())} {place}"


def owner(path: Path) -> str:
    """The name of a file's owner, or #NUMBER; "somebody else" where even that cannot be seen."""
    try:
        return _name(path.stat().st_uid)
    except OSError:
        return "somebody else"


def me() -> str:
    return _name(os.geteuid())


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"#{user}"


def _within(path: Path, state: Path) -> str:
    name = "." if path == state else path.relative_to(state).as_posix()
    return escaped(f"{name}/" if os.path.isdir(path) else name, 80)
