"""One attempt to deliver one checkpoint over one connection; the other end is `receive.py`. Every step is idempotent.

Whatever the peer's server says is taken as a hint about its disk, never as the truth: only a receipt signed with the
peer's pinned key ends a delivery.
"""

from __future__ import annotations

import asyncio
import builtins
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hsl_node.errors import Altered, TransportError, escaped
from hsl_node.federation.config import Federation, PeerCard
from hsl_node.federation.names import INBOX, PARTS, FileName, Kind, Peer, Round
from hsl_node.host.pace import Pace
from hsl_node.sync.manifest import Receipt
from hsl_node.sync.send.receipts import Answer, Receipts
from hsl_node.sync.wire.toll import Toll
from hsl_node.sync.wire.transport import BLOCK_BYTES, OperationFailed, Source, Transport
from hsl_node.weights.whole import holds

log = logging.getLogger(__name__)

REWIND_BLOCKS = 2  # sent again on resuming, as servers may write in parallel: <= 765 KiB with the torn block
RECEIPT = Pace(first_s=0.05, longest_s=5.0, growth=1.5)  # looking for one
SILENCE_MAX_S = 600.0  # the peer took the files and gives no receipt: after that it is asked, by the manifest alone
# After each whole copy that brought no receipt, the next one: in 20 min, in 40, then every hour. A peer that
# never answers must not cost a checkpoint every ten minutes; one that lost its disk waits 20 min for it.
LOST = Pace(first_s=1200.0, longest_s=3600.0)
OLD_REFUSAL_S = 60.0  # the files are taken, but the receipt is still the refusal from before: by now that is the answer
LOOKS_AFTER_TAKEN = 8  # in 2 s: a manifest of a past round is gone a moment before it is answered
ANEW_MAX = 2  # how often a torn file is sent once more from its first byte
# The receiver checks size and hash first: any later code is about what we meant to send; again would be no help.
TORN_CODES = frozenset({"size", "sha256"})
RATE_S = 2.0  # a transfer's rate is that of its last seconds

State = Literal["idle", "connecting", "sending", "waiting for receipt", "done", "waiting to retry", "refused"]


@dataclass(frozen=True)
class Parcel:
    """What goes to every peer in one round."""

    name: FileName  # of the data; a manifest without data has the name that its data would have
    data: Path | None
    bytes: int
    manifest: builtins.bytes  # the signed document


@dataclass
class Transfer:
    """The live view of one push, for status. Times are `time.monotonic`."""

    peer: Peer
    round: Round = 0
    state: State = "idle"
    since: float = 0.0  # when `state` was entered
    sent: int = 0  # bytes of the data file that lie at the peer
    total: int = 0
    resumed_from: int = 0
    most: int = 0  # of `sent`, over all attempts: only what goes beyond it is progress
    resent_bytes: int = 0  # that lay there before
    lost_bytes: int = 0  # of those, that were taken and then gone: not what resuming sends again
    retries: int = 0
    last_error: str = ""
    next_try: float | None = None
    receipt: bytes = b""  # the signed document that ended it, to keep
    toll: Toll = field(default_factory=Toll, repr=False, compare=False)  # the peer's, for each connection to it
    _mark: tuple[float, int] = (0.0, 0)  # (time, sent) some seconds ago
    _rate: float = 0.0

    def begin(self, parcel: Parcel) -> None:
        self.round, self.total = parcel.name.round, parcel.bytes
        self.sent = self.resumed_from = self.most = self.resent_bytes = self.lost_bytes = self.retries = 0
        self.last_error = ""
        self.enter("idle")

    def enter(self, state: State) -> None:
        self.state, self.since, self.next_try = state, time.monotonic(), None
        self._mark, self._rate = (self.since, self.sent), 0.0

    def progress(self, end: int) -> None:
        """All bytes up to `end` are acknowledged."""
        if time.monotonic() - self._mark[0] >= RATE_S:
            self._rate = self.rate_bytes_per_s
            self._mark = (time.monotonic(), self.sent)
        self.sent = end
        self.most = max(self.most, end)

    @property
    def rate_bytes_per_s(self) -> float:
        """Falls towards 0 by itself when nothing moves."""
        seconds = time.monotonic() - self._mark[0]
        if seconds < RATE_S and self._rate:
            return self._rate
        return (self.sent - self._mark[1]) / max(seconds, 0.1)


@dataclass
class Known:
    """What earlier attempts of this process found out about the peer's side."""

    placed: bool = False  # the data was in inbox/, whole: if it is gone now, the peer has taken it
    committed: float | None = None  # data and manifest are at the peer since (monotonic)
    silent: bool = False  # it had both and gave no receipt for too long: send both, whatever seems to be there
    silences: int = 0  # in a row since the data was sent
    copies: int = 1  # of the whole data that were taken so
    old_refusal: bytes | None = None  # the receipt of an earlier delivery: not the answer to this one
    anew: int = 0  # times that a torn file was sent again from its start

    def start_over(self, old_refusal: bytes | None) -> None:
        self.placed, self.committed, self.old_refusal = False, None, old_refusal


async def deliver(
    link: Transport,
    parcel: Parcel,
    *,
    card: PeerCard,
    federation: Federation,
    transfer: Transfer,
    known: Known,
    keys: Sequence[str] | None = None,
) -> Receipt:
    """Bring data and manifest into the peer's inbox and fetch its receipt, signed and about exactly this parcel.

    `keys`: those that may sign for the peer; None: the one of its card.

    Raises:
        TransportError: this connection leads no further, try another one with the same `known`.
        Altered: our checkpoint is not what was signed.
        LocalStateError: our checkpoint file cannot be read.
    """
    receipts = Receipts(link, parcel.name, card, federation, (card.key,) if keys is None else keys)
    while True:
        answer = await receipts.find(other_than=known.old_refusal)
        if answer and not answer.receipt.accepted and known.committed is None:
            # From before a restart, of us or of the peer. What was wrong may be settled now: ask again.
            known.old_refusal, answer = answer.document, None
        if answer is None:
            await _bring(link, parcel, transfer, known)
            transfer.enter("waiting for receipt")
            answer = await _wait_for_receipt(link, receipts, parcel, transfer, known)
        receipt, transfer.receipt = answer.receipt, answer.document
        if receipt.code in TORN_CODES:
            await asyncio.to_thread(_require_whole, parcel)
        if receipt.accepted:
            transfer.sent = transfer.total
            return receipt
        if receipt.code == "round" and await link.size(_inbox(parcel, Kind.MANIFEST)) is not None:
            transfer.last_error = f"{card.name} is not yet in round {parcel.name.round}; it keeps the checkpoint"
            if known.old_refusal is not None:  # said before: a hostile server has no end of such answers
                await asyncio.sleep(RECEIPT.longest_s)
            known.old_refusal = answer.document
        elif receipt.code in TORN_CODES and known.anew < ANEW_MAX:
            transfer.last_error = f"{card.name} found the file torn ({receipt.code}); sending it anew"
            log.warning("checkpoint arrived torn", extra={"peer": card.name, "code": receipt.code})
            known.anew += 1
            known.start_over(answer.document)
            transfer.resent_bytes += transfer.sent
            transfer.sent = 0
            await _clear(link, parcel)
        else:
            return receipt


async def answers_with(link: Transport, parcel: Parcel, *, card: PeerCard, federation: Federation, key: str) -> bool:
    """Have the peer answer once more to what it has accepted: does it sign with `key` now? Waits for its answer.

    Brings the manifest alone. What signs a receipt is the peer's daemon, also where the inbox is another program's.

    Raises:
        TransportError: the link broke.
    """
    receipts = Receipts(link, parcel.name, card, federation, (key,))
    if await receipts.find():
        return True
    await _bring_manifest(link, parcel)
    taken = 0
    for pause_s in RECEIPT.waits():
        taken += await link.size(_inbox(parcel, Kind.MANIFEST)) is None
        if await receipts.find():
            return True
        if taken > LOOKS_AFTER_TAKEN:
            break
        await asyncio.sleep(pause_s)
    return False


def _require_whole(parcel: Parcel) -> None:
    """Was it torn on its way, or here? Raises: Altered."""
    if parcel.data is not None and not holds(parcel.data, parcel.name.sha256):
        raise Altered(f"this node's checkpoint of round {parcel.name.round}, {parcel.data}, is altered on this disk")


async def _bring(link: Transport, parcel: Parcel, transfer: Transfer, known: Known) -> None:
    """Data, then manifest, each only where it is not there yet. The manifest is the commit record."""
    if parcel.data is not None:
        there = await link.size(_inbox(parcel, Kind.DATA))
        # The peer takes data only together with its manifest, and lets go of the manifest with the receipt. Data that
        # we placed and that is gone, or a manifest without its data, both mean that the peer has everything.
        gone = there is None and not known.silent
        if gone and (known.placed or await link.size(_inbox(parcel, Kind.MANIFEST)) == len(parcel.manifest)):
            known.committed = known.committed or time.monotonic()
            transfer.sent = parcel.bytes
            return
        if there != parcel.bytes:
            await _place(link, parcel.name, parcel.data, parcel.bytes, in_the_way=there, transfer=transfer)
        transfer.sent = parcel.bytes
        known.placed = True
    elif known.committed is not None:
        return
    await _bring_manifest(link, parcel)
    known.committed, known.silent = time.monotonic(), False


async def _bring_manifest(link: Transport, parcel: Parcel) -> None:
    name, size = parcel.name.of(Kind.MANIFEST), len(parcel.manifest)
    there = await link.size(_inbox(parcel, Kind.MANIFEST))
    if there != size:
        await _place(link, name, parcel.manifest, size, in_the_way=there, transfer=Transfer(name.peer))


async def _place(
    link: Transport,
    name: FileName,
    content: Path | bytes,
    size: int,
    *,
    in_the_way: int | None,
    transfer: Transfer,
) -> None:
    """One file into inbox/ by way of parts/, going on where an earlier attempt ended."""
    part, final = f"{PARTS}/{name.as_part()}", f"{INBOX}/{name}"
    if in_the_way is not None:
        await link.remove(final)  # of another size: no rename of ours put it there
    offset, create = await _resume_point(link, part, content, size, transfer)
    transfer.sent = transfer.resumed_from = offset
    transfer.enter("sending")
    await link.write(part, content, offset, create=create, progress=transfer.progress)
    arrived = await link.size(part)
    if arrived != size:  # a full disk may show here only
        raise TransportError(f"the server kept {arrived} of the {size} bytes of {name.kind}")
    try:
        await link.rename(part, final)
    except OperationFailed:
        # "Failure" says little: an earlier rename whose answer was lost may have done it.
        if await link.size(final) != size or await link.size(part) is not None:
            raise


async def _resume_point(
    link: Transport, part: str, content: Path | bytes, size: int, transfer: Transfer
) -> tuple[int, bool]:
    """Where to go on in a part, and whether to create it. A part that is no prefix of ours is removed."""
    present = await link.size(part)
    lost = max(0, transfer.sent - (present or 0))
    transfer.lost_bytes += lost
    transfer.resent_bytes += lost
    if present is None:
        return 0, True
    offset = max(0, present // BLOCK_BYTES - REWIND_BLOCKS) * BLOCK_BYTES
    usable = present <= size and (not offset or await _same_block(link, part, content, offset - BLOCK_BYTES))
    transfer.resent_bytes += present - offset if usable else present
    transfer.lost_bytes += 0 if usable else min(present, transfer.sent)
    if usable:
        return offset, False
    await link.remove(part)
    return 0, True


async def _same_block(link: Transport, part: str, content: Path | bytes, start: int) -> bool:
    """Does the last block before the resume point hold our bytes? True also where the server lets nobody read."""
    source = await asyncio.to_thread(Source, content)
    try:
        ours = (await asyncio.to_thread(source.read, start))[0]
    finally:
        source.close()
    try:
        return await link.read(part, start, BLOCK_BYTES) == ours
    except OperationFailed:
        return True  # the receiver's hash decides


async def _clear(link: Transport, parcel: Parcel) -> None:
    """Remove what may be left of a file that arrived torn."""
    for kind in (Kind.DATA, Kind.MANIFEST):
        for path in (f"{PARTS}/{parcel.name.of(kind).as_part()}", _inbox(parcel, kind)):
            if await link.size(path) is None:
                continue
            try:
                await link.remove(path)
            except OperationFailed:
                if await link.size(path) is not None:  # else the receiver was faster
                    raise


async def _wait_for_receipt(
    link: Transport, receipts: Receipts, parcel: Parcel, transfer: Transfer, known: Known
) -> Answer:
    """Look again and again while the connection lives; not for ever if the peer took the files and fell silent.

    Silence has many reasons. Data that still lies there was not taken yet. Else the receipt may be lost, and a peer
    that has the data answers to its manifest again: that costs 2 KB. Only a peer that does not answer to it either,
    and again and again, is taken to have lost the data.
    """
    pauses_s = RECEIPT.waits()
    while True:
        answer = await receipts.find(other_than=known.old_refusal)
        if answer:
            return answer
        if receipts.problem:
            transfer.last_error = escaped(receipts.problem)
        await asyncio.sleep(next(pauses_s))
        now = time.monotonic()
        silence = now - (known.committed or now)
        if known.old_refusal and silence > OLD_REFUSAL_S and await link.size(_inbox(parcel, Kind.MANIFEST)) is None:
            known.old_refusal = None
        elif silence > SILENCE_MAX_S:
            known.committed = now
            if parcel.data is not None and await link.size(_inbox(parcel, Kind.DATA)) is None:
                known.silences += 1
            else:
                known.silences = 0  # not taken yet: its daemon is down, or a round behind
            lost_s = known.silences * SILENCE_MAX_S
            if lost_s < LOST.after(known.copies):
                await _bring_manifest(link, parcel)
                continue
            known.start_over(known.old_refusal)
            known.silent = True
            known.silences, known.copies = 0, known.copies + 1
            transfer.resent_bytes += transfer.sent
            transfer.sent = 0
            why = f" ({escaped(receipts.problem)})" if receipts.problem else ""
            raise TransportError(f"no receipt {lost_s / 60:.0f} min after the files were taken{why}: sending them anew")


def _inbox(parcel: Parcel, kind: Kind) -> str:
    return f"{INBOX}/{parcel.name.of(kind)}"
