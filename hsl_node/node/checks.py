"""May a daemon start here: federation, anchor set, images, port. Asked by `doctor`, and by `start` before all else."""

from __future__ import annotations

import os
from pathlib import Path

from hsl_node.errors import (
    ConfigError,
    DataUnavailable,
    FederationMismatch,
    LocalStateError,
)
from hsl_node.federation.config import Federation, require_unedited
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.federation.strings import split_address
from hsl_node.host.layout import Layout
from hsl_node.host.units import size
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.room import ample_mib, holds_one
from hsl_node.sync.wire.sockets import listening
from hsl_node.weights.whole import sha256_of


def require_anchor(path: Path, federation: Federation) -> None:
    """Raises: FederationMismatch: `path` is not the anchor set of this federation."""
    if federation.anchor is None:
        raise FederationMismatch(
            f"federation {federation.name!r} uses no anchor set", remedy="its method needs none: leave it out"
        )
    found = sha256_of(path)
    if found != federation.anchor.fingerprint:
        raise FederationMismatch(
            f"{path} is not the anchor set {federation.anchor.name!r} of federation {federation.name!r}: its sha256 "
            f"begins {found[:12]}, the federation's {federation.anchor.fingerprint[:12]}",
            remedy="get the file from whoever made the federation; it is the same for everybody",
        )


def require_same_federation(journal: Journal, federation: Federation, me: str, layout: Layout) -> None:
    """The joined file is as it was joined, and the journal this node's.

    Raises:
        FederationMismatch: rounds of another federation are in the journal, or it is another hospital's.
        ConfigError: nothing has begun under federation.toml, and it was edited.
    """
    saved, before = journal.state(), journal.meta("federation")
    if saved is not None and saved["me"] != me:
        raise FederationMismatch(
            f"{layout.journal} is that of {saved['me']}, and this node is {me}: files of two nodes are mixed here",
            remedy=f"take nothing of {saved['me']} into this folder. `hsl-node --state NEW restore BACKUP` makes "
            "another one of a backup of this node; without one: docs/administrator/lost-disk.md",
        )
    if saved is not None and before != federation.digest and saved["round"] > 0:
        raise FederationMismatch(
            f"this journal belongs to federation {str(before)[:8]}, federation.toml is now {federation.fed8}",
            remedy="join the old file again, or start the new federation in a new state directory",
        )
    if before != federation.digest:
        require_unedited(layout.federation_toml, federation)


def require_own_anchor(state: Path, node: NodeConfig, federation: Federation) -> None:
    """Raises: ConfigError: the federation's anchor set is not here. FederationMismatch: it is another one."""
    if federation.anchor is None:
        return
    path, wanted = node.anchor or Layout(state).anchor, federation.anchor
    if not path.exists():
        raise ConfigError(
            f"no anchor set at {path}; the federation uses {wanted.name!r}",
            remedy="every other hospital has the same file (anchor.safetensors in its state directory): ask one "
            f"for it and put it there. The right one has the fingerprint (sha256sum) {wanted.fingerprint}",
        )
    require_anchor(path, federation)


def require_images(path: Path) -> None:
    """What a moment shows of data.path: a folder that is not empty, or a file, that this user may read.

    Raises:
        DataUnavailable
    """
    try:
        if path.is_dir():
            with os.scandir(path) as entries:
                if next(entries, None) is None:
                    raise DataUnavailable(f"{path} is empty", remedy="is the share mounted?")
        else:
            with path.open("rb") as file:
                file.read(1)
    except OSError as exc:
        raise unreadable(path, exc) from exc


def require_quota(node: NodeConfig, checkpoint_bytes: int) -> None:
    """Raises: ConfigError: no checkpoint of this plan fits into what one peer may use of this inbox."""
    mib = node.inbox.quota_set
    if node.inbox.kind == "embedded" and not holds_one(mib, checkpoint_bytes):
        raise ConfigError(
            f"a checkpoint of this plan has {size(checkpoint_bytes)}, which inbox.quota_mib = {mib} never lets in",
            remedy=f"set inbox.quota_mib = {ample_mib(checkpoint_bytes)} in node.toml, or remove that line",
        )


def unreadable(path: Path, error: OSError) -> DataUnavailable:
    remedy = "check data.path in node.toml, that its share is mounted, and the rights of this user"
    return DataUnavailable(f"{path} cannot be read: {error.strerror}", remedy=remedy)


def require_port(listen: str) -> None:
    """Bind it and let go of it again.

    Raises:
        LocalStateError: another program has it, or the address is not this machine's.
    """
    host, port = split_address(listen)
    try:
        listening(host, port).close()
    except OSError as exc:
        raise LocalStateError(
            f"{listen}: cannot listen there: {exc.strerror}",
            remedy=f"`ss -ltnp 'sport = :{port}'` shows who has the port; or set listen in node.toml",
        ) from exc


def mapping_needed(node: NodeConfig) -> str:
    """Says so where the inbox listens on another port than the one that the others are told; else empty."""
    listens, told = split_address(node.listen)[1], split_address(node.address)[1]
    if node.inbox.kind != "embedded" or listens in (0, told):
        return ""
    return (
        f"the inbox listens on port {listens}, the other hospitals connect to {told}: right only where a router, a "
        "firewall or a container maps the one to the other"
    )


MAPPING_FIX = "if nothing does, make listen and address in node.toml agree, and restart"
