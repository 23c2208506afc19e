"""A peer's checkpoint that is at other peers and not on its way here: taken before this node lost its state, say.

    its sender's manifest of the next round is here     it sends older rounds first, so it has a receipt that we forgot
    anybody's manifest of the next round is here,       that one has fused it; its sender may think that we are
    and nothing has come for a minute                   checking what it sent before the loss, and send it much later
    a peer lists it, and nothing comes for a minute     its sender may have our receipt: this state was set back

A recovery takes such checkpoints from the peers (`recovery.py`); but nobody else may have had it then, or its sender
could not be asked.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.host.pace import Pace
from hsl_node.node.alarms import Alarms
from hsl_node.node.heal.set_back import SetBack
from hsl_node.node.here import Here, Keys
from hsl_node.node.machine import Machine
from hsl_node.node.peers.fetch import Fetch
from hsl_node.node.peers.links import Links, answer
from hsl_node.node.peers.pacing import Turns
from hsl_node.node.peers.place import place
from hsl_node.sync.ask import read_documents
from hsl_node.sync.findings import lacking
from hsl_node.sync.inbox.server import Incoming
from hsl_node.sync.offer import Offer
from hsl_node.sync.round import Phase

LOOK_S = 2.0
PATIENCE_S = 60.0  # a checkpoint that is being checked, or between two attempts, comes by itself
# What arrives is not asked for while it grows by so much in such a time: to hold a part open costs its sender nothing.
# A line of 0.1 Mbit/s may be dead for three minutes of it, and sends again for one what lay here before.
GROWTH_BYTES, STILL_S = 256 * 1024, 300.0
PAUSE = Pace(4, 600)  # between two questions to one peer
AFTER_CONNECT_S = 5.0  # a peer that was down is there again


@dataclass
class FetchMissing:
    here: Here
    keys: Keys
    alarms: Alarms
    links: Links
    fetch: Fetch
    machine: Machine
    set_back: SetBack
    incoming: Callable[[Round], Sequence[Incoming]]  # what arrives of a round just now
    placed: Callable[[Peer], None]  # something lies in this peer's inbox here
    recovered: bool = False  # before this; what a recovery half fetched is gone on with
    clock: Callable[[], float] = lambda: time.monotonic()  # the simulation has its own

    def __post_init__(self) -> None:
        self._turns = Turns(PAUSE, AFTER_CONNECT_S)
        self._came: set[Peer] = set()  # who has connected to this node since it started
        self._since: dict[Peer, float] = {}  # who is waited for though others have fused it
        self._lost: tuple[Peer, ...] = ()
        self._shown: dict[Peer, Digest] = {}  # of these, another peer has shown the manifest: what it names
        self._grown: dict[tuple[Round, Peer], tuple[float, int]] = {}  # when it grew, the longest that it was
        self._have_fused: frozenset[Peer] = frozenset()
        self._left = True  # something half fetched, by an earlier process perhaps, or a recovery
        self._clears_from = self.clock() + (PATIENCE_S if self.recovered else 0)

    def connected(self, peer: Peer) -> None:
        """A peer that could not be asked may be asked now."""
        self._turns.connected(peer, self.clock())
        self._came.add(peer)

    @property
    def at_work(self) -> bool:
        """It fetches, or has something half fetched to clear."""
        return bool(self._lost) or self._left

    async def watch(self) -> None:
        """For ever: fetch what is not on its way from whoever has it."""
        while True:
            self.look()
            if self._left and not self._lost and self.clock() >= self._clears_from:
                await self._clear()
            due = [g for g in self._turns.due(self.clock()) if not self.keys.ring.is_revoked(g)]
            if self._lost and due:
                await self._ask(due)
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Who is lost now, and whom to ask. Also where something has arrived: an alarm ends with its cause."""
        others, now = self.here.others, self.clock()
        elsewhere = self._elsewhere(self._coming(now))
        self._since = {p: self._since.get(p, now) for p in elsewhere}
        lost = tuple(p for p, certain in elsewhere.items() if certain or now - self._since[p] >= PATIENCE_S)
        have_fused = frozenset(self.machine.state.early)
        self._turns.keep(others if lost else ())
        for giver in others:
            # Only what is new counts: a peer that has fused since has all that we lack.
            if lost and (
                giver not in self._turns or set(lost) - set(self._lost) or giver in have_fused - self._have_fused
            ):
                self._turns.ask(giver, now)
        self._lost, self._have_fused = lost, have_fused
        self._shown = {p: digest for p, digest in self._shown.items() if p in lost}
        for peer in others:
            if peer not in lost:
                self.alarms.settle(f"lost {peer}")
        self._tell({p for p in lost if elsewhere[p]})

    def _coming(self, now: float) -> frozenset[Peer]:
        """Whose checkpoint of this round arrives and grew lately: beyond what ever lay here of one."""
        round, coming = self.machine.state.round, set()
        self._grown = {key: grown for key, grown in self._grown.items() if key[0] == round}
        for part in self.incoming(round):
            peer = part.name.peer
            if part.name.sha256 != self._shown.get(peer, part.name.sha256):
                continue  # its sender has signed another one
            grew_at, longest = self._grown.get((round, peer), (float("-inf"), 0))
            if part.bytes >= longest + GROWTH_BYTES:
                grew_at = now
                self._grown[round, peer] = now, part.bytes
            if now - grew_at < STILL_S:
                coming.add(peer)
        return frozenset(coming)

    def _tell(self, certain: Collection[Peer]) -> None:
        """Only what is certain: that somebody says it has fused a checkpoint does not mean that there is one."""
        for peer in sorted({*certain, *self._shown}):
            fix = "see that the other hospitals' nodes run; where none of them can be asked, restore a backup"
            if peer not in self._came:  # a site that can only connect outward takes part in this way
                fix = (
                    f"nothing, while rounds go on: {peer} has not connected to this node since the start, and what it "
                    "sends is fetched. Where it should connect, see what keeps it from this node's address"
                )
            text = f"the checkpoint of {peer} is at other peers and not on its way here: they are asked for it"
            self.alarms.sound(f"lost {peer}", text, fix)

    async def _ask(self, givers: Sequence[Peer]) -> None:
        """Take from these peers what they have of what is lost; each file from whoever gives it in good time."""
        self._left = True
        for giver in givers:
            self._turns.begin(giver)
        offers, at_hand = await self.links.offers_of(givers)
        for giver in sorted(offers):
            reached, _ = await answer(giver, self._fetch(giver, offers))
            if not reached:
                at_hand.discard(giver)
        for giver in givers:
            self._turns.asked(giver, self.clock(), reached=giver in at_hand)

    async def _fetch(self, giver: Peer, offers: Mapping[Peer, Offer]) -> None:
        here, round = self.here, self.machine.state.round
        placed: set[str] = set()  # one of each peer: whoever lists a hundred more must not fill this disk
        # By name, whoever is asked: a giver's next turn goes on with the file that its last one was not enough for.
        for listed in sorted(lacking(offers[giver], round, self._lost), key=lambda listed: listed.peer):
            if listed.peer in self._lost and listed.peer not in placed:  # some may have come meanwhile
                link, keys = self.links.connected(giver), self.keys.ring.keys
                [(manifest, document)] = await read_documents(link, giver, [listed], here.federation, keys)
                self._shown[Peer(listed.peer)] = Digest(manifest.sha256)
                self._tell(())
                if await place(here, self.fetch, manifest, document, offers):
                    placed.add(listed.peer)
                    self.placed(Peer(listed.peer))

    def _elsewhere(self, coming: Collection[Peer]) -> dict[Peer, bool]:
        """Whom this node waits for though others have its checkpoint; True: it will not be sent again."""
        state, listed = self.machine.state, self.set_back.listed()
        if state.phase is Phase.HALTED or state.me not in state.have or not (state.early or listed):
            return {}
        # Who says that it has fused other manifests than those here has not fused what we wait for; but a peer that is
        # in the next round itself sends older rounds first.
        here = {p: claim.manifest for p, claim in state.have.items()}
        fused = any(all(c.inputs.get(p, d) == d for p, d in here.items()) for c in state.early.values())
        missing = (p for p in state.missing if p not in coming and not self.keys.ring.is_revoked(p))
        return {p: p in state.early for p in missing if fused or p in state.early or p in listed}

    async def _clear(self) -> None:
        """What was half fetched and nobody lacks any more. What cannot be removed is told, and tried again."""
        failed = await asyncio.to_thread(_emptied, self.here.layout.fetched)
        self._left = failed is not None
        if failed is None:
            self.alarms.settle("fetched")
        else:
            text = f"{failed.filename or self.here.layout.fetched} cannot be removed: {failed.strerror or failed}"
            self.alarms.sound("fetched", text, "it only takes room: remove it, or mend its owner and rights")


def _emptied(folder: Path) -> OSError | None:
    """Whatever lies there, also what nobody here has put there. Gives what kept some of it."""
    failed = None
    for path in folder.iterdir() if folder.exists() else ():
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as exc:
            failed = exc
    return failed
