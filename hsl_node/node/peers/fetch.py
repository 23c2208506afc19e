"""One file from whoever gives it in good time: what is half here is gone on with, who is slow or wrong comes last."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hsl_node.errors import KeyRefused, PeerDataError, TransportError, escaped
from hsl_node.federation.names import Digest, Peer
from hsl_node.host import durable
from hsl_node.node.alarms import Alarms
from hsl_node.node.here import Here
from hsl_node.node.peers.links import Links
from hsl_node.sync.ask import fetch_file
from hsl_node.sync.findings import givers_of_file
from hsl_node.sync.offer import Offer
from hsl_node.sync.wire.transport import OperationFailed
from hsl_node.weights.whole import holds

log = logging.getLogger(__name__)

FAIR_S, FAIR_BYTES_PER_S = 60.0, 256 * 1024  # a file takes no longer from a fair giver; then the next has its turn

Tell = Callable[[Peer, Digest, int], None]  # (giver, which file, bytes of it that are here)


class HeldUp(TransportError):
    """One peer keeps us from going on; the operator must know which, and why."""

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(why)
        self.peer = Peer(peer)


class Slow(TransportError):
    """The turns of all who have the file are over; what each gave is kept, and gone on with by the next call."""


@dataclass
class Fetch:
    here: Here
    alarms: Alarms
    links: Links
    file_bytes: int  # of any checkpoint or fused model

    def __post_init__(self) -> None:
        self._turn_s = FAIR_S + self.file_bytes / FAIR_BYTES_PER_S
        self._last: set[Peer] = set()  # who took longer than that, or gave wrong bytes: asked after the others

    async def get(
        self,
        sha256: Digest,
        target: Path,
        offers: Mapping[Peer, Offer],
        tell: Tell = lambda giver, sha256, at: None,
    ) -> bool:
        """A file that is here already, or that a peer has. False: nobody has it.

        Each giver has one turn, as long as is fair for the size. Who needs longer, or gives wrong bytes, is asked after
        the others from then on. `tell`: with each block.

        Raises:
            HeldUp: nobody else gave it, and the link to one that has it broke.
            Slow: nobody gave it in its turn.
        """
        if await asyncio.to_thread(holds, target, sha256):
            await asyncio.to_thread(durable.accept, target)
            return True
        failed: TransportError | None = None
        for giver in sorted(givers_of_file(sha256, offers), key=lambda giver: (giver in self._last, giver)):
            try:
                async with asyncio.timeout(self._turn_s), self.links.connected(giver) as link:
                    folder = self.here.layout.fetched / giver
                    await fetch_file(link, sha256, self.file_bytes, folder, target, partial(tell, giver, sha256))
                log.info("taken from a peer", extra={"peer": giver, "sha256": sha256[:12]})
                self._excuse(giver)
                return True
            except TimeoutError:
                self._last.add(giver)
                why = f"it took longer than {self._turn_s:.0f} s to give {sha256[:12]}"
                failed = failed or Slow(f"{giver}: {why}")
            except (OperationFailed, PeerDataError, KeyRefused) as exc:  # gone by now, or not what it should be
                why = escaped(exc.message)
                if isinstance(exc, PeerDataError):
                    self._name_wrong(giver, exc)
            except TransportError as exc:
                why = escaped(exc.message)
                failed = HeldUp(giver, f"the link broke while it gave {sha256[:12]}, which it lists: {why}")
            log.warning("not taken", extra={"peer": giver, "reason": why})
        if failed is not None:
            raise failed
        return False

    def _excuse(self, giver: Peer) -> None:
        """It gave what it listed."""
        self._last.discard(giver)
        self.alarms.settle(f"wrong bytes {giver}")

    def forget(self) -> None:
        """Another round is fused: whoever was slow, or gave wrong bytes, is asked like the others again."""
        for giver in self.here.others:
            self._excuse(giver)

    def _name_wrong(self, giver: Peer, error: PeerDataError) -> None:
        self._last.add(giver)
        self.alarms.sound(
            f"wrong bytes {giver}",
            f"{giver} listed a file and gave other bytes ({escaped(error.message)}): it is asked after all others now",
            f"call {giver}: its disk may fail, or somebody changes what its node sends",
        )
