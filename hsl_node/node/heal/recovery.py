"""A node that may have lost something of its state asks its peers what it has signed, before it signs anything.

Lost, or set back: a restored backup, a disk that is gone, a rolled back or cloned machine. Signing a round for the
second time with other content looks like fraud to the peers and halts everybody. So such a node waits until all
peers have answered, takes from them what it needs, and writes a state from which the round goes on (`recovered.py`).
Every other node asks before each signature whoever can be reached (`before_signing.py`): a set back that nobody
noticed shows there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from hsl_node.errors import (
    Equivocation,
    HslError,
    KeyRefused,
    LocalStateError,
    PeerDataError,
    TransportError,
    escaped,
)
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import ROUND_MAX, Digest, Peer, Round
from hsl_node.host import systemd
from hsl_node.host.durable import Step
from hsl_node.host.pace import Pace
from hsl_node.node.alarms import Alarms
from hsl_node.node.heal import damage
from hsl_node.node.heal.counting import Held, counting, forged
from hsl_node.node.heal.counting import held as held_of
from hsl_node.node.heal.mark import Mark, machine_id
from hsl_node.node.here import Here, Keys
from hsl_node.node.peers.fetch import Fetch, HeldUp, Slow
from hsl_node.node.peers.links import Links
from hsl_node.node.peers.place import place
from hsl_node.sync import evidence
from hsl_node.sync import round as machine
from hsl_node.sync.ask import read_documents
from hsl_node.sync.findings import givers_of_document, unread
from hsl_node.sync.manifest import Manifest, claim_of, content_digest
from hsl_node.sync.offer import Listed, Offer
from hsl_node.sync.recovered import recovered
from hsl_node.sync.round import Claim, Phase
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.wire.transport import OperationFailed
from hsl_node.weights.whole import holds

log = logging.getLogger(__name__)

RETRY = Pace(1, 30)  # a peer that comes back and connects is asked at once
LOOK_AGAIN = 3  # times, where a checkpoint of ours is promised to nobody: a peer may just be looking at it
LOOK_AGAIN_PACE = Pace(2, 30)  # after the first LOOK_AGAIN failures


class Recovery:
    def __init__(
        self,
        here: Here,
        keys: Keys,
        alarms: Alarms,
        links: Links,
        fetch: Fetch,
        called: Callable[[Peer], asyncio.Event],
    ) -> None:
        """`called`: set when this peer connects to us."""
        self._here = here
        self._keys = keys
        self._alarms = alarms
        self._links = links
        self._fetch = fetch
        self._called = called
        self._mark = Mark("")
        self._unanswered: dict[Peer, str] = {}  # and why
        self._held_up: dict[Peer, str] = {}  # who has answered and still keeps us waiting
        self._begun_again: dict[Peer, str] = {}  # because of whom, and why
        self._broke: Counter[bytes] = Counter()  # how often this document's checkpoint could not be had
        self._fetching: dict[Peer, str] = {}  # who gives a file at this moment, and how far it is
        self._lists: dict[Peer, bytes] = {}  # what each answered, signed
        self._fixes: dict[Peer, str] = {}  # of the unanswered, where a key is the reason: what to do about it

    @property
    def waiting(self) -> dict[Peer, str]:
        """For whom, and why."""
        return {**self._fetching, **self._begun_again, **self._held_up, **self._unanswered}

    async def run(self, initial: Digest, mark: Mark) -> None:
        """Ask all peers; leave a journal and files from which the round goes on.

        Raises:
            Equivocation: two different manifests of one round carry this node's signature.
            LocalStateError: what it started from is not what its own manifests say.
        """
        self._mark = mark
        log.warning("recovering", extra={"reason": mark.why})
        systemd.notify("READY=1", "STATUS=asking the peers what this node has signed")
        asked = tuple(p for p in self._here.others if p not in mark.without)
        self._unanswered = dict.fromkeys(asked, "not asked yet")
        self._tell()
        looks, failures, lists_broke = 0, 0, False
        while True:
            offers = {o.peer: o for o in await asyncio.gather(*(self._answer_of(p) for p in asked))}
            in_lists = True
            try:
                held = await self.manifests(offers)
                in_lists = False
                if lists_broke:
                    self._begun_again = {}
                state, missing = await self._state(initial, offers, held)
                if not missing or looks == LOOK_AGAIN:
                    await self._bring(state, offers, held)
                    break
                looks += 1
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._alarms.sound("disk", f"no room for what the peers keep for this node: {exc}", "free some space")
            except TransportError as exc:
                log.warning("a recovery is begun again", extra={"reason": escaped(exc.message)})
                failures, lists_broke = failures + 1, in_lists
                if isinstance(exc, HeldUp):  # named until this is over, or something else breaks
                    self._begun_again = {exc.peer: exc.message}
                    self._tell()
            await asyncio.sleep(LOOK_AGAIN_PACE.after(1 + max(failures - LOOK_AGAIN, 0)))
        self._write(state, initial, held, mark)
        self._alarms.settle("recovering")
        self._alarms.settle("disk")
        log.warning("recovered", extra={"round": state.round, "phase": str(state.phase), "base": state.base[:12]})

    def _hold_up(self, peer: Peer, why: str) -> None:
        self._held_up[peer] = why
        self._tell()

    def _tell(self) -> None:
        fixes = [self._fixes[p] for p in sorted(self._fixes)]  # whoever has such a peer left out signs rounds again
        still = {**self._begun_again, **self._held_up, **self._unanswered}
        if not still:  # then nobody must be left out: what one gives slowly, another one may have
            fixes.append("nothing is to be done: from a peer that is slow it goes on to another one with the same file")
        elif still.keys() != self._fixes.keys():
            fixes.append(
                "see that those hospitals' nodes run. For one that cannot answer, after a word with that hospital: "
                "`hsl-node stop`, then `hsl-node recover --from-peers --without NAME`"
            )
        text = (
            f"this node asks its peers what it has signed, since {self._mark.why}. It signs nothing before all have "
            f"answered. Still to answer: {_names(still)}"
        )
        if self._fetching:
            text += f". Now fetching from: {_names(self._fetching)}"
        self._alarms.sound("recovering", text, "; ".join(fixes))

    def _show(self, giver: Peer, how_far: str) -> None:
        self._fetching = {giver: how_far}
        self._tell()

    def _show_none(self) -> None:
        self._fetching = {}
        self._tell()

    async def _get(self, sha256: Digest, target: Path, offers: Mapping[str, Offer]) -> bool:
        """See `Fetch.get`. All who may have it have answered: nobody else is to be hoped for, however slow they are."""
        while True:
            with contextlib.suppress(Slow):
                try:
                    return await self._fetch.get(sha256, target, offers, self._show)
                finally:
                    self._show_none()

    async def _answer_of(self, peer: Peer) -> Offer:
        """Asked until it answers."""
        wake = self._called(peer)
        for pause_s in RETRY.waits():
            wake.clear()
            try:
                offer, self._lists[peer] = await self._links.signed_offer_of(peer)
                self._fixes.pop(peer, None)
                if not offer.twice:
                    self._unanswered.pop(peer, None)
                    self._tell()
                    return offer
                why = "it sees another process with this node's key at work: stop that one"
            except OperationFailed:
                why = "its inbox offers nothing: another SFTP server, or an older hsl-node"
            except HslError as exc:
                why = escaped(exc.message)
                self._fixes.pop(peer, None)
                if isinstance(exc, KeyRefused):
                    self._fixes[peer] = exc.remedy
            except Exception as exc:  # whatever a peer's link does, it is no answer
                log.exception("asking broke", extra={"peer": peer})
                why = f"{type(exc).__name__}: {escaped(str(exc))}"
            self._unanswered[peer] = why
            self._tell()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await wake.wait()
            if wake.is_set():
                await asyncio.sleep(RETRY.first_s)  # two nodes must not wake each other at the speed of the network
        raise AssertionError("it waits without end")

    async def manifests(self, offers: Mapping[str, Offer]) -> dict[str, Held]:
        """Every verified manifest that the answers name, by the sha256 of the document; those of the journal too.

        Raises:
            Equivocation: two different ones of one round carry this node's signature.
            HeldUp: a peer does not give what it lists, or what it gives does not fit what another one signed.
        """
        named = {(m.round, Peer(m.peer)) for offer in offers.values() for m in offer.manifests}
        held = await asyncio.to_thread(_known, self._here.layout.journal, self._keys.ring, self._here.me, named)
        for offer in offers.values():
            await self._read(offer, held)
        counts = await asyncio.to_thread(self._counting, held)
        self._tell_forged(held, counts, offers)
        self._require_one_signature(counts, offers)
        for one in counts.values():
            self._require_fitting(one, counts, offers)
        return counts

    async def _read(self, offer: Offer, held: dict[str, Held]) -> None:
        """Raises: HeldUp: this peer's link broke, or it does not give a signature of this node that it lists."""
        here, ring, peer = self._here, self._keys.ring, Peer(offer.peer)
        wanted = unread(offer, held, here.federation.peers)

        def take(listed: Listed, manifest: Manifest, document: bytes) -> None:
            held[listed.document] = held_of(manifest, document, ring)

        def passes(listed: Listed, error: HslError) -> bool:
            """It has restarted since, say, and listed that in its last life; what I may have signed never passes."""
            if listed.peer == here.me and isinstance(error, OperationFailed):
                raise HeldUp(peer, f"it lists this node's signature of round {listed.round}, and does not give it")
            return True

        try:
            if wanted:
                await read_documents(
                    self._links.connected(peer),
                    peer,
                    wanted,
                    here.federation,
                    ring.chain,
                    most=None,
                    take=take,
                    passes=passes,
                    passed="not taken",
                    progress=lambda done: self._hold_up(peer, f"its list is being read: {done} of {len(wanted)}"),
                )
        except HeldUp:
            raise
        except HslError as exc:
            raise HeldUp(peer, f"its list could not be read: {escaped(exc.message)}") from exc
        finally:
            self._held_up.pop(peer, None)
            self._tell()

    def _counting(self, held: Mapping[str, Held]) -> dict[str, Held]:
        me = self._here.me

        def known(round: Round, peer: Peer) -> dict[str, Any] | None:
            """Not what was brought by hand: see `_known`."""
            return journal.manifest(round, peer) if peer != me or journal.signed(round) is not None else None

        with Journal.read_only(self._here.layout.journal) as journal:  # in a thread
            return counting(held, self._keys.ring, me, known)

    def _tell_forged(self, held: Mapping[str, Held], counts: Mapping[str, Held], offers: Mapping[str, Offer]) -> None:
        """It is not taken, and holds nothing up; but somebody signs with a key that was replaced."""
        found: dict[Peer, set[str]] = {}
        for one in forged(held, counts):
            found.setdefault(one.peer, set()).update(_givers(one, offers))
        for peer, givers in sorted(found.items()):
            who = " and ".join(sorted(givers)) or "this node's journal"
            whom = " and ".join(sorted({*givers, peer} - {self._here.me}))
            self._alarms.sound(
                f"old key {peer}",
                f"{who} keeps a manifest of {peer} that a replaced key of {peer} signed and that does not fit what the "
                "newer key signed: it is not taken",
                f"somebody has that old key and uses it: call {whom}",
            )

    def _require_fitting(self, mine: Held, held: Mapping[str, Held], offers: Mapping[str, Offer]) -> None:
        """Whoever finds a replaced key on an old disk can sign anything. What I signed fits what the others signed.

        Raises:
            HeldUp: it does not; a person must find out who says something wrong.
        """
        round = mine.round - 1
        if mine.peer != self._here.me or not mine.doubtful or round < 1:
            return
        for offer in offers.values():
            named = mine.manifest.inputs.get(offer.peer)
            theirs = {h.manifest.digest for h in held.values() if (h.peer, h.manifest.round) == (offer.peer, round)}
            if known := self._here.journal.manifest(round, Peer(offer.peer)):  # of a round that nobody names any more
                theirs.add(content_digest(known["content"]))
            if named not in theirs and not offer.recovering:
                givers = _givers(mine, offers)
                raise HeldUp(
                    offer.peer,
                    f"its manifest of round {round} is not the one that this node's signature of round {round + 1} "
                    f"names, which {' and '.join(givers) or 'this node'} keeps and which was made with a key that has "
                    "been replaced since: one of them is wrong, or somebody has that key",
                )

    def _require_one_signature(self, held: Mapping[str, Held], offers: Mapping[str, Offer]) -> None:
        """
        Raises:
            Equivocation: two different ones of one round carry this node's signature.
            HeldUp: so it looks, but a key that was replaced made one of them, or both.
        """
        first: dict[Round, Held] = {}
        for one in held.values():
            round = one.round
            if one.peer != self._here.me or round == 0:
                continue
            before = first.setdefault(round, one)
            if before.manifest.digest == one.manifest.digest:
                continue
            for doubtful in (before, one):
                if doubtful.doubtful:
                    givers = sorted({*_givers(before, offers), *_givers(one, offers)})
                    raise HeldUp(
                        next(iter(_givers(doubtful, offers) or givers), ""),
                        f"{' and '.join(givers)} keep two different manifests of this node's round {round}, made with "
                        "a key that has been replaced since: somebody has that key, and one of them is forged",
                    )
            both = (before.document, one.document)
            evidence.keep(self._here.store, self._keys.ring, round, one.peer, both, own=True)
            raise Equivocation(
                f"two different manifests of round {round} carry this node's signature: a clone or an old copy of "
                "it has signed one of them; both are in evidence/",
                remedy="find and stop the other copy; then agree with the other hospitals on a new federation",
            )

    async def _state(
        self, initial: Digest, offers: Mapping[str, Offer], held: Mapping[str, Held]
    ) -> tuple[machine.State, bool]:
        """The state to go on from, its own files in place; and whether a checkpoint of mine is nowhere to be had."""
        here = self._here
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
        if not has_base and state.phase is not Phase.COLLECT:
            raise LocalStateError(
                f"no peer has the fused model of round {last - 1} ({mine[last].base[:12]}) any more",
                remedy=f"copy it from a peer's backup to {here.layout.fused(last - 1)}, then start again",
            )
        return state, state.phase is Phase.TRAIN

    async def _is_whole(self, state: machine.State) -> bool:
        """Is everything there that the saved state relies on?"""
        here = self._here
        relied_on = damage.files_of(here.journal, here.layout, state)
        if relied_on is None:
            return False
        files = {path: sha256 for path, (sha256, _) in relied_on.items()}
        if state.phase in (Phase.TRAIN, Phase.AGREE, Phase.FINISHED):  # what it trains from, or validates at the end
            files[here.layout.fused(state.round - 1)] = state.base
        return await asyncio.to_thread(lambda: all(holds(path, sha256) for path, sha256 in files.items()))

    async def _bring(self, state: machine.State, offers: Mapping[str, Offer], held: Mapping[str, Held]) -> None:
        """What the others signed for this round and the next, into their inboxes here, as if they had just sent it.

        They may have our receipt for it and not send it again. The usual intake checks, admits and answers it. What
        cannot be had in `LOOK_AGAIN` times is left to `fetch_missing.py`: whoever lists it then holds up a round, by
        name, and not the end of this recovery.

        Raises:
            HeldUp: a file that is listed could not be fetched.
        """
        here = self._here
        known = {(c.peer, c.round) for c in (*state.have.values(), *state.early.values())}
        for one in held.values():
            manifest, peer = one.manifest, one.peer
            # A peer is at most one round ahead. Whoever lists a hundred more must not fill this disk.
            if peer == here.me or (peer, manifest.round) in known or abs(manifest.round - state.round) > 1:
                continue
            if manifest.round == state.round - 1:
                pinned = state.inputs.get(peer) == manifest.digest
                if pinned and not manifest.statement:  # kept for its owner, should that one lose its disk next
                    await self._or_later(one, self._get(one.sha256, here.layout.inbox(manifest.round, peer), offers))
                continue
            known.add((peer, manifest.round))  # another one of that round proves something, and needs no checkpoint
            try:  # where nobody has it, its sender recovers too, and will send it
                await self._or_later(one, place(here, self._fetch, manifest, one.document, offers, self._show))
            finally:
                self._show_none()

    async def _or_later(self, one: Held, fetched: Awaitable[bool]) -> None:
        try:
            await fetched
        except HeldUp as exc:
            self._broke[one.document] += 1
            if self._broke[one.document] < LOOK_AGAIN:
                raise
            log.warning("left for later", extra={"peer": one.peer, "round": one.round, "reason": escaped(exc.message)})

    def _write(self, state: machine.State, initial: Digest, held: Mapping[str, Held], mark: Mark) -> None:
        """All of it at once: before this the node has no state, after it the round goes on."""
        here, journal = self._here, self._here.journal
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
            text = f"{mark.why}; goes on in round {state.round}, {state.phase}"
            journal.note("warning", "recovered", text)


def _names(peers: Mapping[Peer, str]) -> str:
    return "; ".join(f"{peer} ({why})" for peer, why in sorted(peers.items())) or "nobody"


def _known(path: Path, ring: Keyring, me: Peer, named: Collection[tuple[Round, Peer]]) -> dict[str, Held]:
    """What the journal holds of what matters, however many rounds there were, by the sha256 of the document.

    The rounds since my last but one, what `signed` lacks of mine, and the rounds and peers that are `named`: what an
    answer lists and is here is not asked for, and what it says otherwise is seen.
    """
    found = []
    with Journal.read_only(path) as journal:  # in a thread: parsing takes a while
        since = (journal.last_signed() or 1) - 1
        rows = journal.documents(since, me)
        rows += [row for round, peer in sorted(named) if round < since and (row := journal.manifest(round, peer))]
        for row in rows:
            manifest = Manifest.model_validate(row["content"])
            if manifest.federation != ring.federation.digest:
                continue
            # What was brought by hand (`by_hand.py`) is worth as much as what a peer lists.
            certain = manifest.peer != me or journal.signed(Round(manifest.round)) is not None
            try:
                found.append(held_of(manifest, row["document"], ring, certain=certain))
            except PeerDataError:  # with a key that an older keyring.toml, put back, does not know
                found.append(Held(manifest, row["document"], certain=True))
    return {hashlib.sha256(h.document).hexdigest(): h for h in found}


def _givers(one: Held, offers: Mapping[str, Offer]) -> list[Peer]:
    return givers_of_document(hashlib.sha256(one.document).hexdigest(), offers)


def _round_of(offer: Offer, held: Iterable[Held]) -> Round:
    """Where a peer is: what it says, or, where it recovers too, the last round that anybody has of it."""
    return max([offer.round, *(h.manifest.round for h in held if h.peer == offer.peer)])


def _instance_of(held: Iterable[Held], me: Peer) -> str:
    """The same as before: what was signed, reached only a peer that could not be asked and is trained again to the
    same bytes, then is the same manifest again, and not a second one.
    """
    mine = [h.manifest for h in held if h.peer == me]
    return max(mine, key=lambda m: m.round).instance if mine else ""
