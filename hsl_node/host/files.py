"""A small file written once; whose state directory it is; is there one at all?"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hsl_node.errors import NotInitialised, UsageError
from hsl_node.host import durable, permissions, wrong_paths
from hsl_node.host.durable import Step
from hsl_node.host.hints import nothing_here
from hsl_node.host.layout import Layout


def write_new(
    path: Path, text: str, *, mode: int = 0o644, replace: bool = False, step: Step = Step.FILE_RESULT
) -> None:
    """Write a small file so that it is there whole or not at all.

    Raises:
        UsageError: it exists, and `replace` is not set.
    """
    if not replace:
        require_new(path)
    else:
        wrong_paths.require_place(path)
    try:
        durable.write(path, text.encode("utf-8"), step, mode=mode)
    except OSError as exc:
        exc.filename = exc.filename or str(path)  # a full disk names no file by itself
        raise


def require_new(path: Path) -> None:
    """Raises: UsageError: it exists, or no file can be written there."""
    if path.exists():
        raise UsageError(f"{path} exists already; nothing was changed", remedy="name another one, or remove this one")
    wrong_paths.require_place(path)


def require_owner(state: Path) -> None:
    """Files made here by another user could not be read by the daemon.

    Raises:
        UsageError: the state directory belongs to somebody else.
    """
    with contextlib.suppress(FileNotFoundError):
        if state.stat().st_uid != os.geteuid():
            name = permissions.owner(state)
            raise UsageError(
                f"{state} belongs to user {name}", remedy=f"run this as that user: sudo -u {name} hsl-node ..."
            )


def is_initialised(state: Path) -> bool:
    return Layout(state).node_toml.exists()


def require_initialised(state: Path) -> None:
    """Raises: NotInitialised."""
    if not is_initialised(state):
        raise NotInitialised(f"{state} holds no node.toml", remedy=nothing_here(state))
