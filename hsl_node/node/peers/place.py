"""A checkpoint that was fetched is put into its sender's inbox here, as if just delivered: the intake checks it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from hsl_node.federation.names import INBOX, PARTS, RECEIPTS, FileName, Kind, Peer
from hsl_node.host import durable
from hsl_node.host.durable import Step
from hsl_node.node.here import Here
from hsl_node.node.peers.fetch import Fetch, Tell
from hsl_node.sync.manifest import Manifest
from hsl_node.sync.offer import Offer
from hsl_node.sync.store.plain_files import open_folder, unlink


async def place(
    here: Here,
    fetch: Fetch,
    manifest: Manifest,
    document: bytes,
    offers: Mapping[Peer, Offer],
    tell: Tell = lambda giver, sha256, at: None,
) -> bool:
    """Put a peer's manifest into its inbox here, and its checkpoint where the intake would bring it, as if just come.

    The usual intake checks, admits and answers it; it may look at any moment and removes what it does not know.
    `tell`: see `Fetch.get`. False: nobody has the checkpoint.
    """
    peer, name = Peer(manifest.peer), manifest.file_name()
    data = here.layout.claimed / peer / str(name.of(Kind.DATA))
    if not manifest.statement and not await fetch.get(name.sha256, data, offers, tell):
        return False
    await asyncio.to_thread(_put, here.homes, peer, name, document)
    return True


def _put(homes: Path, peer: Peer, name: FileName, document: bytes) -> None:
    """By way of parts/, like a delivery."""
    with open_folder(homes, peer, RECEIPTS) as receipts:
        unlink(str(name.of(Kind.RECEIPT)), receipts)
    with (
        open_folder(homes, peer, PARTS) as parts,
        open_folder(homes, peer, INBOX) as inbox,
        durable.replacing(str(name), Step.RECOVERY_PLACE, folder=inbox, by_way_of=parts) as file,
    ):
        file.write(document)
