"""What this node owes the others: one push at a time to each peer, older rounds first, until it accepts."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Collection

from hsl_node.errors import Altered, LocalStateError, escaped
from hsl_node.federation.names import FileName, Kind, Peer, Round
from hsl_node.host import units
from hsl_node.host.pace import Pace
from hsl_node.node.alarms import Alarms
from hsl_node.node.here import Here, Keys
from hsl_node.node.machine import Happened
from hsl_node.node.peers.links import Links
from hsl_node.node.peers.liveness import Liveness
from hsl_node.sync.manifest import Receipt
from hsl_node.sync.round import Delivered, Push
from hsl_node.sync.send.deliver import Parcel, Transfer
from hsl_node.sync.send.push import push, wait_for_peer
from hsl_node.weights.whole import state_of

log = logging.getLogger(__name__)

# A peer refused us; a person may mend the reason at either site meanwhile. A checkpoint is sent anew each time: not
# 95 MB a minute to a peer that never takes it.
REFUSED = Pace(60, 3600)
_OTHER = re.compile(r": another federation, ours is ([0-9a-f]{8})")  # what the inbox of a node says (`home.py`)


class Delivery:
    """The sending side of one node; `transfers` is its live view."""

    def __init__(self, here: Here, keys: Keys, alarms: Alarms, links: Links, liveness: Liveness) -> None:
        self._here = here
        self._liveness = liveness
        self._keys = keys
        self._alarms = alarms
        self._links = links
        self.transfers = {p: Transfer(peer=p, toll=links.tolls[p]) for p in here.others}
        self._wake = {p: asyncio.Event() for p in here.others}
        self._one_at_a_time = {p: asyncio.Lock() for p in here.others}
        keys.changed.append(self._keys_changed)

    def _keys_changed(self, peers: Collection[Peer], ours: bool) -> None:
        for peer in set(peers) - {self._here.me}:
            self.wake(peer)

    def wake(self, peer: Peer) -> None:
        """The peer is there: whatever waits for it goes now."""
        self._wake[peer].set()

    async def push(self, action: Push) -> Happened:
        """Deliver one round's checkpoint (or statement) to one peer, however long that takes."""
        peer, journal = action.peer, self._here.journal
        async with self._one_at_a_time[peer]:
            parcel = self._parcel(action.round)
            transfer = self.transfers[peer]
            began = time.monotonic()
            try:
                receipt = await self._until_accepted(parcel, peer)
            finally:  # also when this round need not be delivered any more
                self._alarms.settle(f"refused by {peer}")
                self._alarms.settle(f"loses {peer}")
            self._liveness.federation_of(peer, self._here.federation.fed8)
            seconds = time.monotonic() - began
            log.info("delivered", extra={"peer": peer, "round": action.round, "bytes": parcel.bytes})
            return Happened(
                Delivered(peer, action.round),
                (
                    lambda: journal.record_receipt(
                        action.round, peer, receipt.accepted, receipt.code, receipt.text, transfer.receipt
                    ),
                    lambda: journal.record_transfer(
                        action.round, peer, "sent", parcel.bytes, transfer.resent_bytes, transfer.retries, seconds
                    ),
                ),
            )

    async def _until_accepted(self, parcel: Parcel, peer: Peer) -> Receipt:
        here, ring, round = self._here, self._keys.ring, parcel.name.round
        refusals, waits = 0, _Waits(self._liveness, self._alarms, self.transfers[peer])
        while True:
            receipt = await push(
                here.federation.get(peer),
                parcel,
                me=here.me,
                identity=self._keys.identity,
                federation=here.federation,
                client=here.config.client,
                transfer=self.transfers[peer],
                wake=self._wake[peer],
                rng=random.Random(),
                keys=ring.keys(peer),  # their change ends this task and begins it anew
                host_keys=ring.host_keys(here.federation.get(peer)),
                refused=self._links.refused[peer],
                on_lost=self._lost,
                wait=waits.wait,
            )
            if receipt.accepted:
                return receipt
            text = f"{peer} refuses this node's round {round} ({receipt.code}): {escaped(receipt.text)}"
            refusals += 1
            wait_s = REFUSED.after(refusals if parcel.bytes else 1)
            fix = f"settle it with that hospital; this node tries again every {wait_s / 60:.0f} min"
            self._alarms.sound(f"refused by {peer}", text, fix)
            await asyncio.sleep(wait_s)

    def _lost(self, transfer: Transfer) -> None:
        peer, lost = transfer.peer, units.size(transfer.lost_bytes)
        text = f"the inbox of {peer} has taken and lost {lost} of this node's round {transfer.round}"
        fix = f"{peer} must look at its inbox's disk and at what removes files there; this node sends ever more rarely"
        self._alarms.sound(f"loses {peer}", text, fix)

    def _parcel(self, round: Round) -> Parcel:
        here = self._here
        signed, manifest = here.journal.signed(round), here.journal.manifest(round, here.me)
        if signed is None or manifest is None:
            raise LocalStateError(f"round {round} is owed but was never signed", remedy="restore the journal")
        sha256, document = signed
        size = int(manifest["content"]["bytes"])
        if size and (how := state_of(here.layout.outbox(round), size=size)) != "whole":
            raise Altered(f"this node's checkpoint of round {round}, {here.layout.outbox(round)}, is {how}")
        return Parcel(
            name=FileName(here.federation.fed8, round, here.me, sha256, Kind.DATA),
            data=here.layout.outbox(round) if size else None,
            bytes=size,
            manifest=document,
        )


class _Waits:
    """Of one push: longer and longer where the peer has joined another federation file, until it has joined ours."""

    def __init__(self, liveness: Liveness, alarms: Alarms, transfer: Transfer) -> None:
        self._liveness, self._alarms, self._transfer, self._tries = liveness, alarms, transfer, 0

    async def wait(self, seconds: float, wake: asyncio.Event, *, at_least: float) -> None:
        peer = self._transfer.peer
        if said := _OTHER.search(self._transfer.last_error):  # an earlier version gives no sign of life
            self._liveness.federation_of(peer, said[1])
        elsewhere = f"federation {peer}" in self._alarms
        self._tries = self._tries + 1 if elsewhere else 0
        if longer := REFUSED.after(self._tries):
            seconds, at_least = longer, 0
            self._transfer.next_try = time.monotonic() + seconds
            wake = self._liveness.on_our_file[peer]  # its logins are no reason to try
        await wait_for_peer(seconds, wake, at_least=at_least)
