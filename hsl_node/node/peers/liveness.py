"""Is each peer alive, down, paused, or on another federation file? By signs of life that both give in one request.

Whoever's turn comes first asks; the other has learnt as much and asks later, so a pair costs one login in `every_s`. A
login of a peer, or a connection that carries our checkpoint, is a sign of life as well, though it says less. How it
looks on the wire: `sync/life.py`. Rounds know nothing of this: it is for people.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field

from hsl_node.errors import HslError, PeerDataError
from hsl_node.federation.identity import LIFE_NAMESPACE
from hsl_node.federation.names import RECEIPTS, Peer
from hsl_node.host.units import duration
from hsl_node.node.alarms import Alarms
from hsl_node.node.here import Here, Keys
from hsl_node.node.peers.links import Links
from hsl_node.status import snapshot as schema
from hsl_node.sync.life import (
    AT_MAX,
    PAUSED_MAX_S,
    Life,
    Sign,
    ask,
    asking_path,
    file_name,
    file_path,
    judged,
    off,
    other_federation,
    wrong_clocks,
)
from hsl_node.sync.store.plain_files import open_folder, open_plain
from hsl_node.sync.wire.transport import OperationFailed, Patience, Transport

log = logging.getLogger(__name__)

LOOK_S = 2.0
SHORTEST_S, EACH_PEER_S = 60.0, 5.0  # between two signs of a pair: a node asks one of 64 peers every 10 s on average
MISSED = 2.5  # intervals without a sign, after which a peer is called down
AT_ONCE = 8
OLD_S = 3600.0  # whoever did not understand the question is only greeted for so long: an older version logs each
WAITS = Patience(connect_s=15, answer_s=15)


@dataclass
class _Seen:
    """One peer. Times are monotonic."""

    due: float
    heard: float | None = None
    said: tuple[float, Sign] | None = None  # its last sign, and when it came
    gives_signs: bool = True  # False: an earlier version, or another program's inbox without one
    silent_until: float = 0.0  # till then it is not asked for its sign
    file_at: int = -1  # what the newest sign in its inbox said; an older one is no news
    here_since: float = field(default_factory=time.monotonic)


class Liveness:
    def __init__(
        self,
        here: Here,
        keys: Keys,
        alarms: Alarms,
        links: Links,
        paused_s: Callable[[], float | None],
        connected: Callable[[], Collection[Peer]],
        needs: Callable[[Peer], bool],
        clock: Callable[[], float] = lambda: time.monotonic(),
    ) -> None:
        """`paused_s`: for how long this node is paused. `connected`: peers with a live connection, either way.

        `needs`: must this node still hear of that peer, for the run to go on? Else its silence is no alarm.
        """
        self._here, self._keys, self._alarms, self._links = here, keys, alarms, links
        self._paused_s, self._connected, self._needs, self._clock = paused_s, connected, needs, clock
        self._alarm_s = here.federation.plan.silence_alarm_minutes * 60.0
        self.every_s = min(max(SHORTEST_S, EACH_PEER_S * len(here.others)), self._alarm_s / 3)
        self._peers = {peer: _Seen(clock(), here_since=clock()) for peer in here.others}
        self._asking: set[Peer] = set()
        self._rng = random.Random()
        self._wake = asyncio.Event()
        self._laid = -1e9
        self.on_our_file = {peer: asyncio.Event() for peer in here.others}  # cleared while it is on another

    # ------------------------------------------------------------------ what is heard

    def heard(self, peer: Peer) -> None:
        """A login, or a delivery: it lives."""
        self._peers[peer].heard = self._clock()

    def said(self, peer: Peer, sign: Sign) -> None:
        """It gave its sign, on a connection of its own or on ours."""
        self.federation_of(peer, sign.fed8)
        if sign.at is None:
            return
        seen, now = self._peers[peer], self._clock()
        seen.heard, seen.said, seen.gives_signs, seen.silent_until = now, (now, sign), True, 0.0
        seen.due = now + self.every_s * self._rng.uniform(1.0, 1.3)  # else both ask at once
        self._tell_clocks()
        self._tell(peer)

    def federation_of(self, peer: Peer, fed8: str) -> None:
        """What its sign, or a name that it used, says of the federation file that it joined."""
        ours = self._here.federation.fed8
        if fed8 != ours:
            self._alarms.sound(f"federation {peer}", *other_federation(peer, fed8, ours))
            self.on_our_file[peer].clear()
        elif f"federation {peer}" in self._alarms:
            self._alarms.settle(f"federation {peer}")
            self.on_our_file[peer].set()

    def my_sign(self) -> Sign:
        paused_s = self._paused_s()
        paused = None if paused_s is None else min(max(0, int(paused_s)), PAUSED_MAX_S)
        return Sign(self._here.federation.fed8, min(max(0, int(time.time())), AT_MAX), paused)

    def document(self) -> bytes:
        """My sign, signed: what an asker reads."""
        sign = self.my_sign()
        life = Life(
            federation=self._here.federation.digest, peer=self._here.me, at=sign.at or 0, paused_s=sign.paused_s
        )
        return self._keys.identity.sign(life.content(), LIFE_NAMESPACE)

    def exchanged(self, peer: Peer, sign: Sign) -> bytes:
        """A peer asks and says its own; gives mine."""
        self.said(peer, sign)
        return self.document()

    # ------------------------------------------------------------------ asking

    def tell_all(self) -> None:
        """Something has changed that the others should see now: this node starts, is paused, goes on."""
        self._laid = -1e9
        for seen in self._peers.values():
            seen.due = self._clock()
        self._wake.set()

    async def watch(self) -> None:
        """For ever: ask whose turn it is, and judge what has been heard."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                self._wake.clear()
                self._lay()
                for peer in self._due()[: AT_ONCE - len(tasks)]:
                    tasks.add(task := asyncio.create_task(self._ask(peer), name=f"sign of life {peer}"))
                    task.add_done_callback(tasks.discard)
                for peer in self._peers:
                    self._tell(peer)
                self._tell_clocks()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._wake.wait()
        finally:
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _due(self) -> list[Peer]:
        """Whose turn it is, the longest first. A third connection to a peer would cut its first: then it waits."""
        now, ring = self._clock(), self._keys.ring
        due = [p for p, seen in self._peers.items() if seen.due <= now and p not in self._asking]
        return sorted((p for p in due if not self._links.open[p] and not ring.is_revoked(p)), key=self._due_at)

    def _due_at(self, peer: Peer) -> float:
        return self._peers[peer].due

    async def _ask(self, peer: Peer) -> None:
        """One question; nothing is logged of one that fails: that is what the alarm is for, and pushes say why."""
        seen = self._peers[peer]
        seen.due = self._clock() + self.every_s * self._rng.uniform(1.0, 1.3)
        self._asking.add(peer)
        try:
            async with self._links.connected(peer, WAITS) as link:
                if not self._foreign(peer):
                    with suppress(OperationFailed):  # an answer too: a connection that was kept shows nothing by itself
                        await link.size(RECEIPTS)
                    self.heard(peer)  # whoever serves with its own key is there, whatever it says
                await self.greet(link, peer)
        except HslError:
            pass
        except Exception:  # whatever a peer's link does, it ends no node
            log.exception("asking broke", extra={"peer": peer})
        finally:
            self._asking.discard(peer)

    async def greet(self, link: Transport, peer: Peer) -> None:
        """Give my sign and take that of the peer at the other end.

        Raises:
            TransportError: the link broke.
            PeerDataError: what is shown is not its sign.
        """
        seen, foreign = self._peers[peer], self._foreign(peer)
        if self._clock() < seen.silent_until:
            return
        try:
            path = file_path(peer) if foreign else asking_path(self.my_sign())
            life = await ask(link, path, peer, self._keys.ring.keys(peer))
        except OperationFailed:
            # An earlier version, or nothing laid there yet. Its own server's answer is a sign of life all the same.
            seen.gives_signs = not foreign or seen.said is not None
            seen.silent_until = 0.0 if foreign else self._clock() + OLD_S
            return
        if not foreign or life.at > seen.file_at:
            seen.file_at = life.at
            self.said(peer, life.sign())

    def _foreign(self, peer: Peer) -> bool:
        """Its inbox is another program's, which is there while the node is not."""
        return self._here.federation.get(peer).host_key is not None

    def _lay(self) -> None:
        """Where our inbox is another program's, whoever asks there finds my sign as a file. It is not durable: the next
        one comes soon, and half of one is no sign."""
        if self._here.embedded or self._clock() - self._laid < self.every_s:
            return
        self._laid = self._clock()
        document = self.document()
        for peer in self._here.others:
            with suppress(OSError, PeerDataError), open_folder(self._here.homes, peer, RECEIPTS) as folder:
                name = file_name(self._here.me)
                descriptor = open_plain(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, folder)
                try:
                    os.fchmod(descriptor, 0o644)  # as receipts: the account of the sender reads it
                    os.write(descriptor, document)
                finally:
                    os.close(descriptor)

    # ------------------------------------------------------------------ what follows

    def silent_s(self, peer: Peer) -> float | None:
        """Since its last sign of life of any kind; None: none since this process began."""
        if peer in self._connected():
            self.heard(peer)
        heard = self._peers[peer].heard
        return None if heard is None else self._clock() - heard

    def _paused_for(self, peer: Peer) -> float | None:
        said = self._peers[peer].said
        return None if said is None or said[1].paused_s is None else said[1].paused_s + self._clock() - said[0]

    def ahead_s(self, peer: Peer) -> float | None:
        """By how much its clock is ahead of this node's as that is set now."""
        said = self._peers[peer].said
        return None if said is None else (said[1].at or 0) + (self._clock() - said[0]) - time.time()

    def of(self, peer: Peer) -> schema.Life:
        """What `status` tells."""
        seen, silent_s, paused_s = self._peers[peer], self.silent_s(peer), self._paused_for(peer)
        began = self._clock() - seen.here_since
        word: str = judged(silent_s, paused_s is not None, seen.gives_signs, MISSED * self.every_s)
        if silent_s is None and word == "down" and began < MISSED * self.every_s:
            word = "unknown"  # this node has just begun to ask
        since_s = {"down": silent_s, "paused": paused_s}.get(word)
        said = seen.said
        return schema.Life(
            state=word,
            since=None if since_s is None else time.time() - since_s,
            heard=None if silent_s is None else time.time() - silent_s,
            federation=said[1].fed8 if said else None,
            clock_s=None if said is None else round(self.ahead_s(peer) or 0.0, 1),
        )

    def _tell(self, peer: Peer) -> None:
        """Alarms of one peer that has been silent, or paused, for longer than the plan allows."""
        seen, alarms, minutes = self._peers[peer], self._alarms, f"{self._alarm_s / 60:.0f} min"
        silent_s, paused_s = self.silent_s(peer), self._paused_for(peer)
        for_s = self._clock() - seen.here_since if silent_s is None else silent_s
        needed = self._needs(peer) and not self._keys.ring.is_revoked(peer)
        silent = paused = None
        if needed and for_s >= self._alarm_s and seen.gives_signs:
            last = "since this node started" if silent_s is None else f"for {duration(for_s)}"
            fix = f"call {peer}: does its machine run, its node, its network? `hsl-node peer ping {peer}` tries once"
            silent = (f"no sign of life of {peer} {last}; the plan allows {minutes}", fix)
        elif needed and paused_s is not None and paused_s >= self._alarm_s:
            text = f"{peer} is paused by its operator for {duration(paused_s)}; all wait for it"
            paused = (text, f"call {peer}; over there: hsl-node resume")
        alarms.sound_or_settle(f"silent {peer}", silent, since=time.time() - for_s)
        alarms.sound_or_settle(f"peer paused {peer}", paused, since=time.time() - (paused_s or 0.0))

    def _tell_clocks(self) -> None:
        known = {p: ahead for p in self._peers if (ahead := self.ahead_s(p)) is not None}
        mine, others = wrong_clocks(known)
        text = f"the clock of this machine is {off(mine)} most of the hospitals' ({len(known)} asked)"
        fix = "set it: `timedatectl` says whether NTP runs. No round depends on it"
        self._alarms.sound_or_settle("clock", (text, fix) if mine else None)
        whom = "most of the others'" if len(known) > 1 else "the one here; which is right?"
        for peer in self._peers:
            text = f"the clock of {peer} is {off(others.get(peer, 0.0))} {whom}"
            fix = f"tell {peer}: `timedatectl`, or your NTP client, there. No round depends on it"
            self._alarms.sound_or_settle(f"clock {peer}", (text, fix) if peer in others else None)
