"""All that must be right before a daemon starts: configuration, membership, key, anchor, lock, port. Then the node."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from hsl_node.errors import AlreadyRunning, DataError, HslError, LocalStateError
from hsl_node.federation import config, identity, keyring, node_toml
from hsl_node.host import bare_host, event_log, wrong_paths
from hsl_node.host.layout import Layout
from hsl_node.host.malloc import keep_freed_memory
from hsl_node.node import checks
from hsl_node.node.checks import require_images, require_port, require_quota, require_same_federation
from hsl_node.node.daemon import Daemon
from hsl_node.node.snapshot import snapshot
from hsl_node.status import last_words
from hsl_node.sync.round import Phase
from hsl_node.sync.store.store import Store

log = logging.getLogger(__name__)

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def run(state: Path, trainer_command: list[str] | None = None) -> int:
    """The daemon in the foreground; gives its exit code. `trainer_command` stands in for the trainer in tests.

    Raises:
        HslError: what ended it, with its own exit code.
    """
    bare_host.complete()
    for sign in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):  # a closed terminal; `systemctl kill -s` to everybody
        signal.signal(sign, signal.SIG_IGN)  # the trainer inherits it; the daemon reloads at SIGHUP once it runs
    try:
        with _disk_named(state):
            return _checked(state, trainer_command)
    except AlreadyRunning:
        raise  # log and journal are the other one's
    except Exception as exc:
        _leave_word(state, exc)
        raise
    finally:
        event_log.finish()


def _leave_word(state: Path, error: Exception) -> None:
    """Why it ended, where people look when the console is gone: `hsl-node logs`, `hsl-node status`."""
    text, fix = last_words.said(error)
    bug = None if isinstance(error, HslError) else error
    log.error("ended", extra={"reason": text, "what_to_do": fix}, exc_info=bug)
    if Layout(state).journal.exists():
        with suppress(HslError, OSError):
            store = Store(Layout(state))
            try:
                last_words.note(store.journal, error)
            finally:
                store.close()


def _checked(state: Path, trainer_command: list[str] | None) -> int:
    node_config = node_toml.load_node(state)
    images = node_config.data.path
    federation = config.load_federation(state)
    me = replace(identity.load(identity.find_key(Layout(state).key)), run=secrets.token_hex(8))
    keyring.require_mine(keyring.load(state, federation), node_config.name, me.public)
    checks.require_own_anchor(state, node_config, federation)
    if (initial := Layout(state).fused(0)).exists():  # else the daemon asks, once the trainer has made it
        require_quota(node_config, initial.stat().st_size)
    os.umask(0o077)
    keep_freed_memory()
    store = Store(Layout(state))
    gc.freeze()  # what the imports made stays for good: later collections need not look at it
    try:
        require_same_federation(store.journal, federation, node_config.name, Layout(state))
        if node_config.inbox.kind == "embedded":
            require_port(node_config.listen)  # before the trainer: after it, this fault would cost minutes
        saved = store.journal.state()
        if images is not None and not (saved and saved["phase"] == Phase.FINISHED):
            require_images(images)  # else it would show only when training is next due, and the others wait then
        with _share_named(images):
            return asyncio.run(Daemon(node_config, federation, me, store, snapshot, trainer_command).run())
    finally:
        store.close()


@contextmanager
def _disk_named(state: Path) -> Iterator[None]:
    """A disk that fails, or somebody else's file, where nothing can act on it ends the process with its code."""
    try:
        yield
    except PermissionError as exc:
        raise wrong_paths.explained(exc, state) from exc
    except OSError as exc:
        if exc.errno not in DISK_ERRORS:
            raise
        remedy = "free some space or mend the disk; the next start goes on from the journal"
        raise LocalStateError(f"the disk of {state} cannot be written: {exc.strerror}", remedy=remedy) from exc


@contextmanager
def _share_named(images: Path | None) -> Iterator[None]:
    """Images that cannot be used because their share has gone meanwhile: a later start may find it again."""
    try:
        yield
    except DataError:
        if images is not None:
            require_images(images)
        raise
