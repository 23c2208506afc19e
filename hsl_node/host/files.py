"""A small file written once; whose state directory it is; is there one at all?"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hsl_node.errors import NotInitialised, UsageError
from hsl_node.host import durable, permissions
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
    durable.write(path, text.encode("utf-8"), step, mode=mode)


def require_new(path: Path) -> None:
    """Raises: UsageError: it exists."""
    if path.exists():
        raise UsageError(f"{path} exists already; nothing was changed", remedy="name another one, or remove this one")


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


def require_initialised(state: Path) -> None:
    """Raises: NotInitialised."""
    if not Layout(state).node_toml.exists():
        raise NotInitialised(f"{state} holds no node.toml", remedy=nothing_here(state))
