"""A node that may have lost something of its state asks its peers what it has signed, before it signs anything.

Lost, or set back: a restored backup, a disk that is gone, a rolled back or cloned machine. Signing a round for the
second time with other content looks like fraud to the peers and halts everybody. So such a node waits until all
peers have answered, takes from them what it needs, and writes a state from which the round goes on (`recovered.py`).
Every other node asks before each signature whoever can be reached (`before_signing.py`): a set back that nobody
noticed shows there.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hsl_node.errors import HslError, KeyRefused, LocalStateError, TransportError, escaped
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.methods import Need
from hsl_node.federation.names import ROUND_MAX, Digest, Peer, Round
from hsl_node.host import systemd
from hsl_node.host.durable import Step
from hsl_node.host.pace import Pace
from hsl_node.node.alarms import Alarms
from hsl_node.node.heal import damage
from hsl_node.node.heal.counting import Held
from hsl_node.node.heal.gather import Gather
from hsl_node.node.heal.mark import Mark, machine_id
from hsl_node.node.heal.waiting import Waiting
from hsl_node.node.here import Here, Keys
from hsl_node.node.peers.fetch import Fetch, HeldUp, Slow
from hsl_node.node.peers.links import Links
from hsl_node.node.peers.place import place
from hsl_node.sync import evidence
from hsl_node.sync import round as machine
from hsl_node.sync.manifest import claim_of
from hsl_node.sync.offer import Offer
from hsl_node.sync.recovered import recovered
from hsl_node.sync.round import Claim, Phase
from hsl_node.sync.store.exchange import left_by
from hsl_node.sync.wire.transport import OperationFailed
from hsl_node.weights.whole import holds

log = logging.getLogger(__name__)

RETRY = Pace(1, 30)
LOOK_AGAIN = 3  # times, where a checkpoint of ours is promised to nobody: a peer may just be looking at it


@dataclass
class Recovery:
    here: Here
    keys: Keys
    alarms: Alarms
    links: Links
    fetch: Fetch
    mark: Mark

    def __post_init__(self) -> None:
        self._asked = tuple(p for p in self.here.others if p not in self.mark.without)
        self.waiting = Waiting(self.alarms, self.mark.why, self._asked, self.fetch.file_bytes)
        self._gather = Gather(self.here, self.keys, self.alarms, self.links, self.waiting)
        self._lists: dict[Peer, bytes] = {}  # what each answered, signed

    async def run(self, initial: Digest) -> None:
        """Ask all peers; leave a journal and files from which the round goes on.

        Raises:
            Equivocation: two different manifests of one round carry this node's signature.
            LocalStateError: what it started from is not what its own manifests say.
        """
        log.warning("recovering", extra={"reason": self.mark.why})
        systemd.notify("READY=1", "STATUS=asking the peers what this node has signed")
        self.waiting.tell()
        looks, lists_broke = 0, False
        for pause_s in RETRY.waits():
            offers = {Peer(o.peer): o for o in await asyncio.gather(*(self._answer_of(p) for p in self._asked))}
            in_lists = True
            try:
                held = await self._gather.manifests(offers)
                in_lists = False
                if lists_broke:
                    self.waiting.begin_again({})
                state, missing = await self._state(initial, offers, held)
                if not missing or looks == LOOK_AGAIN:
                    await self._bring(state, offers, held)
                    break
                looks += 1
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self.alarms.sound("disk", f"no room for what the peers keep for this node: {exc}", "free some space")
            except TransportError as exc:
                log.warning("a recovery is begun again", extra={"reason": escaped(exc.message)})
                lists_broke = in_lists
                if isinstance(exc, HeldUp):  # named until this is over, or something else breaks
                    self.waiting.begin_again({exc.peer: exc.message})
            await asyncio.sleep(pause_s)
        self._write(state, initial, held)
        self.alarms.settle("recovering")
        self.alarms.settle("disk")
        log.warning("recovered", extra={"round": state.round, "phase": str(state.phase), "base": state.base[:12]})

    async def _get(self, sha256: Digest, target: Path, offers: Mapping[Peer, Offer]) -> bool:
        """See `Fetch.get`. All who may have it have answered: nobody else is to be hoped for, however slow they are."""
        while True:
            try:
                return await self.fetch.get(sha256, target, offers, self.waiting.fetch)
            except Slow:
                await asyncio.sleep(RETRY.first_s)
            finally:
                self.waiting.fetched()

    async def _answer_of(self, peer: Peer) -> Offer:
        """Asked until it answers."""
        for pause_s in RETRY.waits():
            fix = ""
            try:
                offer, self._lists[peer] = await self.links.signed_offer_of(peer)
                if not offer.twice:
                    self.waiting.go_on(peer)
                    return offer
                why = "it sees another process with this node's key at work: stop that one"
            except OperationFailed:
                why = "its inbox offers nothing: another SFTP server, or an older hsl-node"
            except HslError as exc:
                why = escaped(exc.message)
                fix = exc.remedy if isinstance(exc, KeyRefused) else ""
            except Exception as exc:  # whatever a peer's link does, it is no answer
                log.exception("asking broke", extra={"peer": peer})
                why = f"{type(exc).__name__}: {escaped(str(exc))}"
            self.waiting.hold_up(peer, why, fix)
            await asyncio.sleep(pause_s)
        raise AssertionError("it waits without end")

    async def _state(
        self, initial: Digest, offers: Mapping[Peer, Offer], held: Mapping[str, Held]
    ) -> tuple[machine.State, bool]:
        """The state to go on from, its own files in place; and whether a checkpoint of mine is nowhere to be had."""
        here = self.here
        saved = here.journal.state()
        claims: dict[Round, dict[Peer, Claim]] = {}
        for one in held.values():
            claims.setdefault(one.manifest.round, {})[one.peer] = claim_of(one.manifest)
        mine = {round: of[here.me] for round, of in claims.items() if here.me in of}
        signed = here.journal.last_signed()
        if saved is not None and max(mine, default=-1) <= (-1 if signed is None else signed):
            state = machine.from_json(saved)
            if state.round > 0 and await self._is_whole(state):
                return state, False
        fresh = machine.State(me=here.me, peers=here.federation.peers, rounds=here.federation.plan.rounds, base=initial)
        if not mine:
            return fresh, False
        last = max(mine)
        if last <= 1 and mine[last].base != initial:
            raise LocalStateError(
                f"this node signed round {last} from weights {mine[last].base[:12]}, here they are {initial[:12]}",
                remedy="install the hsl-node version and the backbone_weights file that it had before",
            )
        kept = set()
        for round in (last - 1, last):
            claim = mine.get(round)
            if claim and not claim.statement and await self._get(claim.sha256, here.layout.outbox(round), offers):
                kept.add(claim.sha256)
        has_base = last < 2 or await self._get(mine[last].base, here.layout.fused(last - 1), offers)
        at = {Peer(o.peer): _round_of(o, held.values()) for o in offers.values()}
        state = recovered(fresh, claims, at, kept)
        if not has_base and (state.phase is not Phase.COLLECT or FUSION_RULES[here.federation.plan.rule].needs_base):
            raise LocalStateError(
                f"no peer has the fused model of round {last - 1} ({mine[last].base[:12]}) any more",
                remedy=f"copy it from a peer's backup to {here.layout.fused(last - 1)}, then start again",
            )
        return state, state.phase is Phase.TRAIN

    async def _is_whole(self, state: machine.State) -> bool:
        """Is everything there that the saved state relies on?"""
        here = self.here
        relied_on = damage.files_of(here.journal, here.layout, state)
        if relied_on is None:
            return False
        files = {path: sha256 for path, (sha256, _) in relied_on.items()}
        plan, before = here.federation.plan, state.phase in (Phase.TRAIN, Phase.AGREE, Phase.FINISHED)
        if before or FUSION_RULES[plan.rule].needs_base:  # what it trains from, validates at the end, or fuses from
            files[here.layout.fused(state.round - 1)] = state.base
        if before and Need.FULL_SET in plan.card.needs:
            files |= left_by(here.journal, here.layout, here.me, Round(state.round - 1)).full_set.values()
        return await asyncio.to_thread(lambda: all(holds(path, sha256) for path, sha256 in files.items()))

    async def _bring(self, state: machine.State, offers: Mapping[Peer, Offer], held: Mapping[str, Held]) -> None:
        """What the others signed for this round and the next, into their inboxes here, as if they had just sent it.

        They may have our receipt for it and not send it again. The usual intake checks, admits and answers it. What
        does not come at once is left to `fetch_missing.py`: whoever lists it then holds up a round, by name, and not
        the end of this recovery. What they signed for the round before is kept for its owner, who may lose its disk
        next; it is not tried again.
        """
        here = self.here
        known = {(c.peer, c.round) for c in (*state.have.values(), *state.early.values())}
        for one in held.values():
            # A peer is at most one round ahead. Whoever lists a hundred more must not fill this disk.
            if one.peer == here.me or (one.peer, one.round) in known or abs(one.round - state.round) > 1:
                continue
            before = one.round == state.round - 1
            if before and (one.manifest.statement or state.inputs.get(one.peer) != one.manifest.digest):
                continue
            known.add((one.peer, one.round))  # another one of that round proves something, and needs no checkpoint
            try:  # where nobody has it, its sender recovers too, and will send it
                if before:
                    target = here.layout.inbox(one.round, one.peer)
                    await self.fetch.get(one.sha256, target, offers, self.waiting.fetch)
                else:
                    await place(here, self.fetch, one.manifest, one.document, offers, self.waiting.fetch)
            except TransportError as exc:
                reason = escaped(exc.message)
                log.warning("left for later", extra={"peer": one.peer, "round": one.round, "reason": reason})
            finally:
                self.waiting.fetched()

    def _write(self, state: machine.State, initial: Digest, held: Mapping[str, Held]) -> None:
        """All of it at once: before this the node has no state, after it the round goes on."""
        here, journal = self.here, self.here.journal
        with journal.transaction(Step.RECOVERY_STATE):
            journal.set_meta("federation", here.federation.digest)
            journal.set_meta("instance", _instance_of(held.values(), here.me) or secrets.token_hex(8))
            journal.set_meta("machine", machine_id())
            journal.set_meta("recover", "")
            evidence.keep_told(journal, self._lists)
            journal.record_fused(0, initial)
            for one in held.values():
                manifest = one.manifest
                if one.peer == here.me:
                    journal.record_signed(manifest.round, one.sha256, one.document)
                    if manifest.round > 1:
                        journal.record_fused(manifest.round - 1, Digest(manifest.base))
                if one.peer == here.me or manifest.round < state.round:
                    journal.record_manifest(manifest.round, one.peer, one.sha256, one.document, manifest.content())
            for row in journal.documents(Round(ROUND_MAX + 1), here.me):  # brought by hand, and does not count
                if hashlib.sha256(row["document"]).hexdigest() not in held:
                    journal.forget_manifest(Round(row["content"]["round"]), here.me)
            journal.save_state(machine.to_json(state))
            journal.record_phase(state.round, state.phase)
            text = f"{self.mark.why}; goes on in round {state.round}, {state.phase}"
            if here.federation.plan.card.keeps and not here.layout.own_files():
                text += "; the tensors that this hospital keeps to itself are lost, and begin anew"
            journal.note("warning", "recovered", text)


def _round_of(offer: Offer, held: Iterable[Held]) -> Round:
    """Where a peer is: what it says, or, where it recovers too, the last round that anybody has of it."""
    return max([offer.round, *(h.manifest.round for h in held if h.peer == offer.peer)])


def _instance_of(held: Iterable[Held], me: Peer) -> str:
    """The same as before: what was signed, reached only a peer that could not be asked and is trained again to the
    same bytes, then is the same manifest again, and not a second one.
    """
    mine = [h.manifest for h in held if h.peer == me]
    return max(mine, key=lambda m: m.round).instance if mine else ""
