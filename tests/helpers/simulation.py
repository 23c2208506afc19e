"""A whole federation on paper: the real round machine, fake network, disks, training and fusion.

Everything that happens is one entry of `World.choices()`; a test picks from it in any order it likes, so messages
come late, twice or never, and nodes lose everything they had not saved. Afterwards `settle` repairs every fault and
lets all run to the end.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.sync.recovered import recovered
from hsl_node.sync.round import (
    Action,
    Arrived,
    Claim,
    Declare,
    Delivered,
    Event,
    Fuse,
    Fused,
    Phase,
    Proven,
    Push,
    State,
    Train,
    Trained,
    from_json,
    step,
    to_json,
    todo,
)

INITIAL = Digest(hashlib.sha256(b"initial weights").hexdigest())


def digest_of(*parts: object) -> Digest:
    return Digest(hashlib.sha256(repr(parts).encode()).hexdigest())


def honest_claims(receiver: Peer, claim: Claim) -> Sequence[Claim]:
    return [claim]


def signed(claim: Claim) -> Claim:
    """With the digest of its manifest: whatever else it says."""
    content = {key: value for key, value in asdict(claim).items() if key != "manifest"}
    return replace(claim, manifest=digest_of(sorted(content.items())))


Contributions = Mapping[Peer, tuple[Digest, int]]  # checkpoint and sample count


def weighted_fusion(peer: Peer, contributions: Contributions) -> Digest:
    return digest_of("fused", sorted(contributions.items()))


def plain_fusion(peer: Peer, contributions: Contributions) -> Digest:
    """Sample counts leave the model as it is."""
    return digest_of("fused", sorted((p, sha256) for p, (sha256, _) in contributions.items()))


def claim_of(*what: Any, **more: Any) -> Claim:
    return signed(Claim(*what, manifest=Digest(""), **more))


@dataclass(frozen=True)
class Answer:
    """A receipt that is still to be written: only after the state that contains the claim is saved."""

    peer: Peer
    round: Round


@dataclass(frozen=True)
class Message:
    sender: Peer
    receiver: Peer
    content: Claim | Round  # a checkpoint with its manifest, or the receipt for that round

    @property
    def key(self) -> tuple[object, ...]:
        what = (self.content.round, self.content.manifest) if isinstance(self.content, Claim) else self.content
        return self.sender, self.receiver, what


@dataclass
class Disk:
    """What a crash leaves behind."""

    state: str
    mine: dict[Round, Claim] = field(default_factory=dict)  # signed manifests
    inbox: dict[tuple[Round, Peer], Digest] = field(default_factory=dict)  # checkpoint files
    claims: dict[tuple[Round, Peer], Claim] = field(default_factory=dict)  # verified manifests of the others
    evidence: set[tuple[Round, Peer]] = field(default_factory=set)  # of which two lie there, signed by one peer


@dataclass
class Node:
    disk: Disk
    state: State | None = None  # None: not running
    mine: dict[Round, Claim] = field(default_factory=dict)
    work: list[Action | Answer] = field(default_factory=list)
    saved: bool = True
    lost: bool = False  # its disk is gone; it must ask the others before it goes on
    lives: int = 0  # training is not reproducible here: after a crash it gives other bytes


Choice = tuple[Any, ...]  # a function and what to call it with


class World:
    """`careless`: nodes save some time after they have published, not before. Wrong on purpose.

    `lie(receiver, claim)` is what `culprit` sends instead of the truth; `fusion` is how a peer fuses. `compare`: nodes
    read each other's manifests at any moment, as equivocation.py does where it has reason to.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        rounds: Round,
        *,
        plateau_from: Mapping[Peer, Round] | None = None,
        careless: bool = False,
        culprit: Peer | None = None,
        lie: Callable[[Peer, Claim], Sequence[Claim]] = honest_claims,
        fusion: Callable[[Peer, Contributions], Digest] = weighted_fusion,
        disks_fail: bool = False,
        compare: bool = False,
    ) -> None:
        self.rounds = rounds
        self.plateau_from = plateau_from or {}
        self.careless, self.culprit, self.lie, self.fusion = careless, culprit, lie, fusion
        self.network: list[Message] = []
        self.published: dict[tuple[Peer, Round], set[Digest]] = defaultdict(set)  # digests of manifests
        self.fused: dict[Round, dict[Peer, Digest]] = defaultdict(dict)
        self.named: dict[Peer, Round] = {}  # the round in which a peer first names the culprit
        self.crashes = self.losses = self.proofs = 0
        self.disks_fail, self.compare = disks_fail, compare
        self.nodes: dict[Peer, Node] = {}
        for me in peers:
            state = State(me=me, peers=tuple(sorted(peers)), rounds=rounds, base=INITIAL)
            self.nodes[me] = Node(Disk(json.dumps(to_json(state))))
            self._start(me)

    # -------------------------------------------------------------- what can happen now

    def choices(self) -> list[Choice]:
        found: list[Choice] = []
        for me, node in self.nodes.items():
            if node.state is None:
                if not node.lost or self._all_answer(me):
                    found.append((self._start, me))
                continue
            found += [(self._perform, me, work) for work in node.work]
            if not node.saved:
                found.append((self._save, me))
            found.append((self._crash, me))
            if self.disks_fail and not any(n.lost for n in self.nodes.values()):
                found.append((self._lose, me))
            if self.compare:
                found += [(self._prove, me, *one) for one in sorted(self._differing(me))]
                found += [(self._keep_and_crash, me, *one) for one in sorted(self._differing(me))]
        for message in {m.key: m for m in self.network}.values():
            found.append((self._deliver, message))
            found.append((self.network.append, message))  # it comes twice
            found.append((self.network.remove, message))  # it never comes
        return found

    def run(self, picks: Sequence[int]) -> World:
        """Any interleaving: each number picks one of the things that can happen at that moment."""
        for pick in picks:
            choices = self.choices()
            happens, *what = choices[pick % len(choices)]
            happens(*what)
        return self

    def settle(self) -> World:
        """No more faults: everybody runs, every message arrives, until nothing is left to do."""
        for _ in range(100):
            resting = all(n.state is not None and n.saved and not n.work for n in self.nodes.values())
            if resting and not self.network and not self._prove_all():
                return self
            for me in sorted(self.nodes, key=lambda p: self.nodes[p].lost):  # it needs the others' answers
                node = self.nodes[me]
                if node.state is None:
                    self._start(me)
                for work in list(node.work):
                    if work in node.work:
                        self._perform(me, work)
                self._save(me)
            for message in list(self.network):
                self._deliver(message)
        raise AssertionError("the federation never comes to rest")

    def states(self) -> dict[Peer, State]:
        return {p: n.state for p, n in self.nodes.items() if n.state is not None}

    # -------------------------------------------------------------- one node's driver, as daemon.py is

    def _handle(self, me: Peer, event: Event) -> None:
        node = self.nodes[me]
        assert node.state is not None
        node.state, actions = step(node.state, event)
        node.saved = False
        if self.culprit and self.culprit in node.state.reason:
            self.named.setdefault(me, node.state.round)
        if not self.careless:
            self._save(me)
        node.work = [*actions, *(w for w in node.work if isinstance(w, Answer))]

    def _perform(self, me: Peer, work: Action | Answer) -> None:
        node = self.nodes[me]
        assert node.state is not None
        match work:
            case Declare(round, base):
                halted = node.state.phase is Phase.HALTED
                self._trained(me, claim_of(me, round, base, base, node.state.inputs, statement=True, halted=halted))
            case Train(round, base):
                plateau = round >= self.plateau_from.get(me, 10**6)
                sha256 = digest_of("trained", me, round, base, node.lives)
                self._trained(me, claim_of(me, round, sha256, base, node.state.inputs, samples=10, plateau=plateau))
            case Push(round, peer):
                if self.disks_fail and any(r < round for r, p in node.state.owed if p == peer):
                    return  # as delivery.py: older rounds first, so who has a round of mine has those before it
                says = self.lie if me == self.culprit else honest_claims
                for claim in says(peer, node.mine[round]):
                    if not self.disks_fail:
                        self.published[me, round].add(claim.manifest)
                    self.network.append(Message(me, peer, claim))  # tried again until the receipt is there
            case Fuse(round, inputs):
                for peer, sha256 in inputs.items():
                    assert peer == me or node.disk.inbox[round, peer] == sha256, "fuses what it does not hold"
                digest = self.fusion(me, {p: (d, node.state.have[p].samples) for p, d in inputs.items()})
                self.fused[round][me] = digest
                self._handle(me, Fused(round, digest))
            case Answer(peer, round):
                node.work.remove(work)
                self.network.append(Message(me, peer, round))

    def _trained(self, me: Peer, claim: Claim) -> None:
        self.nodes[me].mine[claim.round] = claim
        self._handle(me, Trained(claim))

    def _deliver(self, message: Message) -> None:
        self.network.remove(message)
        node = self.nodes[message.receiver]
        if node.state is None:
            return
        if not isinstance(message.content, Claim):
            self._handle(message.receiver, Delivered(message.sender, message.content))
            return
        claim = message.content
        # What was lost on its way together with its sender's disk was never seen: it may be signed anew.
        self.published[message.sender, claim.round].add(claim.manifest)
        assert claim.round <= node.state.round + 1, "a peer is at most one round ahead"
        known = node.disk.claims.get((claim.round, claim.peer))
        if known is not None and known.manifest != claim.manifest and claim.round > 0:
            self._prove(message.receiver, claim.round, claim.peer)
        elif claim.round >= node.state.round:
            if not claim.statement:
                node.disk.inbox.setdefault((claim.round, claim.peer), claim.sha256)
            node.disk.claims.setdefault((claim.round, claim.peer), claim)
            self._handle(message.receiver, Arrived(claim))
        node.work.append(Answer(claim.peer, claim.round))

    def _save(self, me: Peer) -> None:
        node = self.nodes[me]
        if node.state is not None:
            node.disk = replace(node.disk, state=json.dumps(to_json(node.state)), mine=dict(node.mine))
            node.saved = True

    def restart_all(self) -> None:
        for me in self.nodes:
            self._crash(me)
            self._start(me)

    def _crash(self, me: Peer) -> None:
        node = self.nodes[me]
        node.state, node.work, node.saved = None, [], True
        self.crashes += 1

    def _lose(self, me: Peer) -> None:
        """The disk is gone. What it had delivered and nobody has looked at yet stays in the others' inboxes."""
        self._crash(me)
        self.nodes[me].disk = Disk("")
        self.nodes[me].lost = True
        self.losses += 1

    def _differing(self, me: Peer) -> set[tuple[Round, Peer]]:
        """What another honest node holds otherwise than this one; an opening statement may be corrected."""
        mine = self.nodes[me].disk
        others = [n for p, n in self.nodes.items() if p not in (me, self.culprit) and n.state is not None]
        return {
            key
            for other in others
            for key, claim in other.disk.claims.items()
            if me != self.culprit and key[0] > 0 and key not in mine.evidence
            if key in mine.claims and mine.claims[key].manifest != claim.manifest
        }

    def _prove_all(self) -> bool:
        """Who has halted asks all the others."""
        halted = [p for p, n in self.nodes.items() if self.compare and n.state and n.state.phase is Phase.HALTED]
        found = [(me, *one) for me in halted for one in sorted(self._differing(me))]
        for proof in found:
            self._prove(*proof)
        return bool(found)

    def _keep_and_crash(self, me: Peer, round: Round, peer: Peer) -> None:
        """Before the round machine has the word of it."""
        self.nodes[me].disk.evidence.add((round, peer))
        self._crash(me)

    def _prove(self, me: Peer, round: Round, peer: Peer) -> None:
        self.nodes[me].disk.evidence.add((round, peer))
        self.proofs += 1
        self._handle(me, Proven(peer, round))

    def _all_answer(self, me: Peer) -> bool:
        return all(n.state is not None for p, n in self.nodes.items() if p != me)

    def _recover(self, me: Peer) -> None:
        """As recovery.py does it: ask, compute, fetch, save."""
        node = self.nodes[me]
        others = {p: n for p, n in self.nodes.items() if p != me}
        claims: dict[Round, dict[Peer, Claim]] = defaultdict(dict)
        for peer, other in others.items():
            for (round, whose), claim in other.disk.claims.items():
                claims[round].setdefault(whose, claim)
            for round, claim in other.mine.items():
                claims[round][peer] = claim
        kept = {d for n in others.values() for (r, p), d in n.disk.inbox.items() if p == me and r >= _round(n) - 1}
        for message in self.network:
            if message.sender == me and isinstance(message.content, Claim):  # delivered, not looked at
                claims[message.content.round][me] = message.content
                kept.add(message.content.sha256)
        fresh = State(me=me, peers=tuple(sorted(self.nodes)), rounds=self.rounds, base=INITIAL)
        state = recovered(fresh, claims, {p: _round(n) for p, n in others.items()}, kept)
        node.state, node.lost, node.lives = state, False, node.lives + 1
        node.mine = {round: of[me] for round, of in claims.items() if me in of}
        node.work = list(todo(state))
        node.disk.claims = {(round, p): c for round, of in claims.items() for p, c in of.items() if p != me}
        for peer, other in others.items():  # kept for their owners, should one lose its disk next
            before = other.mine.get(state.round - 1)
            if before and not before.statement and before.round >= _round(other) - 1:
                node.disk.inbox[before.round, peer] = before.sha256
        self._save(me)
        for round in (state.round, state.round + 1):
            for peer, other in others.items():
                if peer in claims[round] and node.state.round + 1 >= round:
                    assert round >= _round(other) - 1, "a peer no longer keeps what is needed"
                    message = Message(peer, me, claims[round][peer])
                    self.network.append(message)
                    self._deliver(message)

    def _start(self, me: Peer) -> None:
        node = self.nodes[me]
        if node.lost:
            return self._recover(me)
        node.state, node.mine = from_json(json.loads(node.disk.state)), dict(node.disk.mine)
        node.work = list(todo(node.state))
        node.lives += 1
        for round, peer in sorted(node.disk.evidence):
            self._handle(me, Proven(peer, round))


def _round(node: Node) -> Round:
    assert node.state is not None, "everybody has answered"
    return node.state.round
