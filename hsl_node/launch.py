"""All that must be right before a daemon starts: configuration, membership, key, anchor, lock, port. Then the node."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hsl_node import config, identity
from hsl_node.config import Federation, NodeConfig
from hsl_node.errors import ConfigError, FederationMismatch, LocalStateError
from hsl_node.memory import keep_freed_memory
from hsl_node.node import Node
from hsl_node.port import require_port
from hsl_node.sync import keyring
from hsl_node.sync.store import Layout, Store
from hsl_node.sync.tensors import sha256_of

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def run(state: Path, trainer_command: list[str] | None = None) -> int:
    """The daemon in the foreground; gives its exit code. `trainer_command` stands in for the trainer in tests.

    Raises:
        HslError: what ended it, with its own exit code.
    """
    node_config = config.load_node(state)
    federation = config.load_federation(state)
    me = replace(identity.load(identity.find_key(Layout(state).key)), run=secrets.token_hex(8))
    keyring.require_mine(keyring.load(state, federation), node_config.name, me.public)
    _require_anchor(state, node_config, federation)
    if federation.plan.method == "local":
        raise ConfigError(
            'the plan says method = "local", which never fuses: there is nothing to exchange',
            remedy="agree on hsl or fedavg; for each hospital's model without the others: `hsl-node evaluate --alone`",
        )
    os.umask(0o077)
    keep_freed_memory()
    with _disk_named(state):
        store = Store(Layout(state))
        gc.freeze()  # what the imports made stays for good: later collections need not look at it
        try:
            if node_config.inbox.kind == "embedded":
                require_port(node_config.listen)  # before the trainer: after it, this fault would cost minutes
            return asyncio.run(_run(node_config, federation, me, store, trainer_command))
        finally:
            store.close()


@contextmanager
def _disk_named(state: Path) -> Iterator[None]:
    """A disk that fails where nothing can act on it ends the process, with the exit code that says so."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in DISK_ERRORS:
            raise
        remedy = "free some space or mend the disk; the next start goes on from the journal"
        raise LocalStateError(f"the disk of {state} cannot be written: {exc.strerror}", remedy=remedy) from exc


async def _run(
    node_config: NodeConfig,
    federation: Federation,
    me: identity.Identity,
    store: Store,
    trainer_command: list[str] | None,
) -> int:
    return await Node(node_config, federation, me, store, trainer_command=trainer_command).run()


def _require_anchor(state: Path, node_config: NodeConfig, federation: Federation) -> None:
    if federation.anchor is None:
        return
    path = node_config.anchor or Layout(state).anchor
    if not path.exists():
        raise ConfigError(
            f"no anchor set at {path}; the federation uses {federation.anchor.name!r}",
            remedy=f"copy the anchor file there (fingerprint {federation.anchor.fingerprint[:12]}...)",
        )
    found = sha256_of(path)
    if found != federation.anchor.fingerprint:
        raise FederationMismatch(
            f"{path} has fingerprint {found[:12]}, the federation's anchor set {federation.anchor.fingerprint[:12]}",
            remedy="copy the anchor file of the federation; `hsl-node anchor verify` compares",
        )
