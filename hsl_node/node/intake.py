"""What arrives at this node: checked by `receive.py`, then admitted, journalled and answered, in that order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from hsl_node.errors import FederationMismatch, escaped
from hsl_node.federation.names import Digest, FileName, Peer, Round
from hsl_node.host.log_limit import LOG_LINES_PER_MINUTE, LogLimit
from hsl_node.node.alarms import Alarms
from hsl_node.node.equivocation import Equivocations
from hsl_node.node.here import Here, Keys
from hsl_node.node.machine import Happened, Machine
from hsl_node.node.signing import software
from hsl_node.sync.inbox import receive
from hsl_node.sync.inbox.receive import Arrival, Refusal
from hsl_node.sync.manifest import claim_of, content_digest
from hsl_node.sync.round import Arrived, Phase
from hsl_node.weights.checkpoint_file import Schema

log = logging.getLogger(__name__)

RESCAN_S = 30.0  # the embedded inbox announces every arrival; this is the safety net
RESCAN_DIRECTORY_S = 1.0  # an inbox that another server writes has to be looked at
AGAIN_S = 1.0  # before the next look, where the last one found what is known; an honest sender seldom repeats itself
SWEEP_S = 3600.0  # how often forgotten parts are collected


@dataclass(eq=False)
class Intake:
    """The inbox of one node, as a task per peer."""

    here: Here
    keys: Keys
    alarms: Alarms
    machine: Machine
    schema: Schema
    equivocations: Equivocations
    taken: Callable[[Peer], None]  # told whose checkpoint, or statement, was just taken
    misses: Callable[[FileName], None] = lambda data: None  # told of data whose manifest is here, alone

    def __post_init__(self) -> None:
        self._wake = {p: asyncio.Event() for p in self.here.others}
        self._lines = LogLimit(LOG_LINES_PER_MINUTE)  # in log and journal
        self.keys.changed.append(lambda peers, ours: self.wake())
        self.machine.moved_on.append(self.wake)  # what waited one round ahead may be acceptable now

    def wake(self, *peers: Peer) -> None:
        """Look into these inboxes now; no peer named: all of them."""
        for peer in peers or tuple(self._wake):
            self._wake[peer].set()

    async def watch(self, peer: Peer) -> None:
        """Take in what this peer has put into our inbox, for ever."""
        wake = self._wake[peer]
        swept = float("-inf")
        while True:
            wake.clear()
            self._lines.flush()
            if self.keys.ring.is_revoked(peer):  # nothing of it is even looked at
                await wake.wait()
                continue
            if time.monotonic() - swept > SWEEP_S:
                swept = time.monotonic()
                await asyncio.to_thread(
                    receive.collect_parts,
                    peer,
                    homes=self.here.homes,
                    claimed=self.here.layout.claimed,
                    current=self.machine.state.round,
                    now=time.time(),
                )
            again = False
            search = self._search(
                peer, software(self.here.journal, self.here.federation.plan.method), self._signed(peer)
            )
            found = await asyncio.to_thread(receive.scan, search)
            for data in search.missing:
                self.misses(data)
            for item in found:
                if self.keys.ring.is_revoked(peer):  # while it was read; it stays where it is, unanswered
                    break
                again |= await self._arrived(item) if isinstance(item, Arrival) else self._refused(item)
            if again:
                await asyncio.sleep(AGAIN_S)
            with contextlib.suppress(TimeoutError):
                # Not `wait_for`: before Python 3.12 it loses a cancellation that comes together with what it waits for.
                async with asyncio.timeout(RESCAN_S if self.here.embedded else RESCAN_DIRECTORY_S):
                    await wake.wait()

    def _signed(self, peer: Peer) -> dict[Round, Digest]:
        """Its manifests of the open rounds that are here; the opening statement may be corrected."""
        journal, current = self.here.journal, self.machine.state.round
        known = {round: journal.manifest(round, peer) for round in (current, current + 1) if round > 0}
        return {round: content_digest(row["content"]) for round, row in known.items() if row}

    def _of_this_round(self) -> Collection[Digest]:
        """Manifests that the round, or the next, has already, with their checkpoints."""
        state = self.machine.state
        return [claim.manifest for claim in (*state.have.values(), *state.early.values())]

    def _search(self, peer: Peer, software: str, signed: Mapping[Round, Digest]) -> receive.Search:
        here = self.here
        return receive.Search(
            sender=peer,
            me=here.me,
            homes=here.homes,
            layout=here.layout,
            federation=here.federation,
            keyring=self.keys.ring,
            current=self.machine.state.round,
            schema=self.schema,
            anchor=here.federation.anchor.fingerprint if here.federation.anchor else None,
            foreign=not here.embedded,
            software=software,
            signed=signed,
            taken=self._of_this_round(),
        )

    async def _arrived(self, arrival: Arrival) -> bool:
        """Take it. Gives whether its sender had told us of this round before."""
        here, peer, manifest, state = self.here, arrival.sender, arrival.manifest, self.machine.state
        if self._starts_elsewhere(arrival):
            return False
        if manifest.digest in self._of_this_round():
            self.alarms.settle(f"setup {peer}")
            self._answer(arrival, "accepted", "")
            return True
        known = here.journal.manifest(manifest.round, peer)
        # After the end the closing statements are complete: whoever signs more goes on alone.
        ended = state.phase is Phase.FINISHED and manifest.round > state.round
        second = known is not None and content_digest(known["content"]) != manifest.digest and manifest.round > 0
        late = known is not None and not second and manifest.round < state.round  # fused while this was being checked
        if (ended or second or late) and arrival.data is not None:
            arrival.data.unlink(missing_ok=True)
        if ended:
            self._answer(arrival, "ended", f"the run has ended with round {state.round - 1}")
            return True
        self.alarms.settle(f"setup {peer}")
        if late:
            self._answer(arrival, "accepted", "")
            return True
        if known is None:  # what was taken before can be sent again as often as its sender likes
            self.alarms.settle(f"refused {peer}")
        elif second:
            self._prove(known["document"], arrival)
            return True
        if arrival.data is not None:
            await asyncio.to_thread(here.store.admit, arrival.data, manifest.round, peer)
        if self._lines.allows(f"{peer} (arrivals)"):
            told = {"peer": peer, "round": manifest.round, "bytes": manifest.bytes, "sha256": manifest.sha256}
            log.info("checkpoint verified", extra=told)
        record = partial(
            here.journal.record_manifest, manifest.round, peer, manifest.sha256, arrival.document, manifest.content()
        )
        self.machine.tell(Happened(Arrived(claim_of(manifest)), (record,)))
        self._answer(arrival, "accepted", "")
        self.taken(peer)
        return known is not None

    def _starts_elsewhere(self, arrival: Arrival) -> bool:
        """Before round 1: a peer that would start from another model is refused, and both sides are told."""
        peer, manifest, state = arrival.sender, arrival.manifest, self.machine.state
        if manifest.round > 0 or state.round > 0 or manifest.base == state.base:
            return False
        text = (
            f"initial weights differ: {peer} {manifest.base[:12]} ({escaped(manifest.software)}), "
            f"{self.here.me} {state.base[:12]} ({software(self.here.journal, self.here.federation.plan.method)})"
        )
        self.alarms.sound(f"setup {peer}", text, "same hsl-node version and backbone_weights file at both sites")
        self._answer(arrival, "initial", text)
        return True

    def _refused(self, refusal: Refusal) -> bool:
        """Say why to our operator, and to the sender where its signature held.

        Gives whether its sender had told us of this round before.
        """
        here, peer, manifest, error = self.here, refusal.sender, refusal.manifest, refusal.error
        if manifest is not None and refusal.code in ("round", "equivocation"):
            if refusal.code == "round" and manifest.round >= self.machine.state.round:
                return False  # not yet ours: it stays, and the next scan after the window moved takes it
            known = here.journal.manifest(manifest.round, peer)
            if known is not None and content_digest(known["content"]) == manifest.digest:  # our receipt was lost
                self._answer(refusal, "accepted", "")
                return True
            if known is not None and manifest.round > 0:
                self._prove(known["document"], refusal)
                return True
            if known is not None:
                fix = "restore its state directory from backup, or start a new federation: this one has begun"
                self.alarms.sound(f"setup {peer}", f"{peer} was set up anew after the run began", fix)
                return False
        if self._lines.allows(peer):
            told = {"peer": peer, "file": refusal.name, "code": refusal.code, "reason": escaped(error.message)}
            log.warning("refused", extra=told)
            here.journal.note("warning", f"refused {refusal.code}", f"{peer}: {escaped(error.message)}")
        if isinstance(error, FederationMismatch):
            self.alarms.sound(f"setup {peer}", escaped(error.message), error.remedy)
            told_why = f"{error.message}; {error.remedy}"  # to be mended together: the sender is told how
        else:
            fix = (
                error.remedy or f"nothing here: the file was not taken; ask {peer} for its hsl-node logs if it goes on"
            )
            text = f"{peer} sent what fails a check ({refusal.code}): {escaped(error.message)}"
            self.alarms.sound(f"refused {peer}", text, fix)
            told_why = error.message
        if refusal.about is not None:
            self._answer(refusal, refusal.code, told_why)
        return False

    def _answer(self, item: Arrival | Refusal, code: str, text: str) -> None:
        about = item.about if isinstance(item, Refusal) else item.manifest
        assert about is not None
        receive.answer(
            item.sender,
            about,
            homes=self.here.homes,
            me=self.here.me,
            identity=self.keys.identity,
            accepted=code == "accepted",
            code=code,
            text=text,
        )

    def _prove(self, first: bytes, second: Arrival | Refusal) -> None:
        """Two signed, different manifests of one round: keep both, act on it, then let go of the second."""
        assert second.manifest is not None and second.document is not None
        self.equivocations.keep(first, second.manifest, second.document)
        self._answer(second, "equivocation", "two different manifests were signed for this round")
