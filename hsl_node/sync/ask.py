"""The asker's side of `offer.py`: fetch a peer's list and what it names. Nothing counts before its sha256 agrees."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from hsl_node.errors import FederationMismatch, HslError, PeerDataError, TransportError
from hsl_node.federation.config import Federation
from hsl_node.federation.identity import MANIFEST_NAMESPACE, verify
from hsl_node.federation.names import Digest, Peer
from hsl_node.host import durable
from hsl_node.host.durable import Step
from hsl_node.host.log_limit import one_line
from hsl_node.sync.manifest import MANIFEST_MAX_BYTES, Manifest, parse_manifest
from hsl_node.sync.offer import OFFER_MAX_BYTES, Listed, Offer, file_path, parse_offer, state_path
from hsl_node.sync.wire.transport import BLOCK_BYTES, OperationFailed, Transport

READ_MAX = 16  # documents of one list; a hostile one names hundreds

assert OFFER_MAX_BYTES <= BLOCK_BYTES  # one request, so one list


async def ask(
    link: Transport, federation: Federation, *, peer: Peer, me: Peer, keys: Sequence[str]
) -> tuple[Offer, bytes]:
    """What the peer at the other end keeps for us, signed with one of `keys`; and the signed document itself.

    Raises:
        TransportError: the link broke; `OperationFailed`: its server offers nothing, as another program's does.
        PeerDataError: the answer is not the peer's.
    """
    nonce = secrets.token_hex(8)
    document = await link.read(state_path(nonce), 0, OFFER_MAX_BYTES)
    return parse_offer(document, federation, peer=peer, asker=me, nonce=nonce, keys=keys), document


async def fetch_manifest(
    link: Transport, listed: Listed, federation: Federation, keys: Sequence[str]
) -> tuple[Manifest, bytes]:
    """A manifest that a list names, signed with one of `keys`. Raises: see `read_documents`."""
    document = await link.read(file_path(listed.document), 0, MANIFEST_MAX_BYTES)
    if hashlib.sha256(document).hexdigest() != listed.document:
        raise PeerDataError("a manifest is not the one that the list names", code="sha256")
    manifest = parse_manifest(verify(document, keys, MANIFEST_NAMESPACE))
    if manifest.federation != federation.digest:
        raise FederationMismatch(f"a manifest of federation {manifest.federation[:8]}")
    if (manifest.peer, manifest.round, manifest.sha256) != (listed.peer, listed.round, listed.sha256):
        raise PeerDataError("a manifest is about something else than the list says", code="manifest")
    return manifest, document


async def read_documents(
    connected: AbstractAsyncContextManager[Transport],
    giver: Peer,
    wanted: Iterable[Listed],
    federation: Federation,
    keys: Callable[[str], Sequence[str]],
    *,
    most: int | None = READ_MAX,
    take: Callable[[Listed, Manifest, bytes], bool | None] = lambda listed, manifest, document: None,
    passes: Callable[[Listed, HslError], bool] = lambda listed, error: False,
    passed: str = "proves nothing",
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[Manifest, bytes]]:
    """The first `most` of what is wanted of a giver's list, one after the other, until `take`, shown each, says enough.

    `keys(peer)`: one of them must have signed. What `passes` lets pass of what follows is one line of log, `passed`.
    `progress(n)`: so many are done, and the next is read.

    Raises:
        OperationFailed, PeerDataError, FederationMismatch: not given; not what the list says; of another federation.
        TransportError, KeyRefused: it cannot be asked, or the link broke; that never passes.
    """
    read = []
    async with one_line(passed, giver) as worthless, connected as link:
        for done, listed in enumerate(islice(wanted, most)):
            progress(done)
            try:
                read.append(await fetch_manifest(link, listed, federation, keys(listed.peer)))
            except (OperationFailed, PeerDataError, FederationMismatch) as exc:
                if not passes(listed, exc):
                    raise
                worthless(exc)
                continue
            if take(listed, *read[-1]):
                break
    return read


async def fetch_file(
    link: Transport,
    sha256: Digest,
    size: int,
    folder: Path,
    target: Path,
    progress: Callable[[int], None] = lambda at: None,
) -> None:
    """A checkpoint or fused model of `size` bytes, to `target`, durably: whole, with this sha256, or not at all.

    It grows in `folder`, one for each giver and never of more than one file: what a link that breaks, or a call that is
    cancelled, leaves there is gone on with by the next call for the same file. Nobody continues what another giver may
    have begun with rubbish. `progress(n)`: the first `n` bytes are here.

    Raises:
        TransportError, OperationFailed: see `ask`.
        PeerDataError: it is something else.
    """
    part = folder / sha256
    for each in (folder, target.parent):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
    for other in folder.iterdir():
        if other != part:
            other.unlink()
    with durable.passing(Step.RECOVERY_FETCH):
        try:
            descriptor = durable.disk.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            with durable.disk.file(descriptor) as file:
                for digest in (await asyncio.to_thread(_digest_of, file), hashlib.sha256()):
                    resumed = file.tell() > 0
                    progress(file.tell())
                    while (at := file.tell()) < size and (
                        block := await link.read(file_path(sha256), at, min(BLOCK_BYTES, size - at))
                    ):
                        digest.update(block)
                        await asyncio.to_thread(file.write, block)
                        progress(at + len(block))
                    if digest.hexdigest() == sha256 or not resumed:
                        break
                    # Our own disk may have spoilt what lay here: once more from its start, before the giver is named.
                    file.seek(0)
                    file.truncate()
                if digest.hexdigest() != sha256:
                    found = digest.hexdigest()[:12]
                    raise PeerDataError(f"what is offered as {sha256[:12]} has sha256 {found}", code="sha256")
                file.flush()
                durable.sync(file.fileno(), part.name)
            durable.rename(part, target)
        except (TransportError, asyncio.CancelledError):
            raise  # what has come may be gone on with
        except BaseException:  # rubbish, no room, or bytes that the disk may not have
            with suppress(OSError):
                durable.disk.unlink(part)
            raise
        durable.renamed(Step.RECOVERY_FETCH)
        durable.sync_folder(target.parent)


def _digest_of(file: BinaryIO) -> hashlib._Hash:
    """Of what is there already; leaves the file at its end."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    return digest
