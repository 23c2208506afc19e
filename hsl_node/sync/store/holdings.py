"""What each sender's home takes of the disk; and, where the disk is full, whose unfinished files go first."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from hsl_node.federation.names import INBOX, PARTS, Peer
from hsl_node.sync.store.plain_files import open_folder, unlink

log = logging.getLogger(__name__)


def held(homes: Path, folders: tuple[str, ...] = (PARTS, INBOX)) -> dict[Peer, int]:
    """Bytes on the disk in these folders of each sender; whoever has none there is left out."""
    found: dict[Peer, int] = {}
    for name in os.listdir(homes):
        for folder in folders:
            with suppress(OSError), open_folder(homes, Peer(name), folder) as descriptor:
                for file in os.listdir(descriptor):
                    with suppress(FileNotFoundError):  # claimed or renamed meanwhile
                        status = os.stat(file, dir_fd=descriptor, follow_symlinks=False)
                        found[Peer(name)] = found.get(Peer(name), 0) + status.st_blocks * 512
    return {peer: count for peer, count in found.items() if count}


def drop_parts(homes: Path, least: int) -> None:
    """Below `least` bytes free: delete unfinished files, of the sender that holds most of them first, until it is met.

    No part grows on such a disk, and its sender brings it again. Only while no inbox is open.
    """
    of = held(homes, (PARTS,))
    for peer in sorted(of, key=lambda p: (-of[p], p)):
        if shutil.disk_usage(homes).free >= least:
            return
        with open_folder(homes, peer, PARTS) as parts:
            files = sum(unlink(name, parts) for name in os.listdir(parts))
        log.warning(
            "unfinished files dropped, the disk is full", extra={"peer": peer, "files": files, "bytes": of[peer]}
        )
