"""The whole round. `step(state, event) -> (state, actions)`. Pure.

    AGREE ──► TRAIN ──► COLLECT ──► FUSE ──► TRAIN ... ──► AGREE ──► FINISHED        (any) ──► HALTED
    round 0    1          1          1        2            last + 1

In AGREE every peer states, signed, which model it stands on, before the first round and after the last: a wrong
anchor, plan or initial model shows before hours of training, and the last fusion is compared like all before it.
What is compared are the digests of whole manifests, so that a peer cannot tell one its checkpoint with other samples
or another plateau flag than the next.

A node that halts states, as `halted`, the round it stopped in, and goes on delivering, so that every peer halts
too and can name who differs, instead of waiting for ever for a checkpoint that will not come. Where it has
signed its checkpoint of the round already, it halts on entering the next one: see `_object`.

The actions are a function of the state alone (`todo`). So a restart needs no case of its own: load the state, do what
is to do. The driver saves the new state *before* it performs any action, and every action is idempotent; an action
that is under way already is not started twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from hsl_node.errors import UnexpectedEvent, escaped
from hsl_node.federation.names import Digest, Peer, Round

REASON_MAX_CHARS = 4000  # a hostile peer gives reasons without end; the first ones tell who it is


class Phase(StrEnum):
    AGREE = "agree"  # state which model we stand on; wait for the same statement of everybody
    TRAIN = "train"  # local epochs
    COLLECT = "collect"  # publish mine; wait for the full set
    FUSE = "fuse"
    FINISHED = "finished"
    HALTED = "halted"  # peers disagree: a person must look; evidence is kept; the others are still told


@dataclass(frozen=True)
class Claim:
    """What one peer's verified manifest says about one round."""

    peer: Peer
    round: Round
    sha256: Digest  # its checkpoint; a statement repeats `base`
    base: Digest  # the fused model it started the round from
    inputs: Mapping[Peer, Digest]  # the full set it fused into `base`, as digests of manifests
    manifest: Digest  # of all that it says, as `inputs` of the next round name it
    samples: int = 1
    plateau: bool = False
    statement: bool = False  # AGREE, HALTED: no checkpoint comes with it
    halted: bool = False  # a statement that it stopped, not that the run begins or ended
    software: str = ""


@dataclass(frozen=True)
class State:
    me: Peer
    peers: tuple[Peer, ...]  # all, sorted, me included
    rounds: Round  # planned
    base: Digest  # the model this round starts from: initial weights, then the last fusion
    phase: Phase = Phase.AGREE
    round: Round = 0
    inputs: Mapping[Peer, Digest] = field(default_factory=dict)  # the full set behind `base`: digests of manifests
    have: Mapping[Peer, Claim] = field(default_factory=dict)  # verified claims of this round, mine included
    early: Mapping[Peer, Claim] = field(default_factory=dict)  # of the next one: a peer is at most one ahead
    owed: frozenset[tuple[Round, Peer]] = frozenset()  # deliveries without a receipt, of this and the last round
    signed: bool = False  # in TRAIN after a loss: this round is signed, its checkpoint gone; only the same bytes may go
    reason: str = ""  # why HALTED, or why it will be on entering the next round; names who

    @property
    def missing(self) -> tuple[Peer, ...]:
        return tuple(p for p in self.peers if p not in self.have)


# ------------------------------------------------------------------ events: what happened


@dataclass(frozen=True)
class Trained:
    """My checkpoint (or, in AGREE and HALTED, my statement) of this round is on disk. `claim.peer` is me."""

    claim: Claim


@dataclass(frozen=True)
class Arrived:
    """A peer's checkpoint passed every check and is on disk."""

    claim: Claim


@dataclass(frozen=True)
class Fused:
    round: Round
    digest: Digest


@dataclass(frozen=True)
class Delivered:
    """`peer` sent its signed receipt for my checkpoint of `round`."""

    peer: Peer
    round: Round


@dataclass(frozen=True)
class Proven:
    """Two different manifests of one round, both signed by `peer`, lie in evidence/: see `equivocation.py`."""

    peer: Peer
    round: Round


@dataclass(frozen=True)
class Forgotten:
    """`peer` has lost my checkpoint of `round` after its receipt, and cannot ask me for it: see `set_back.py`."""

    peer: Peer
    round: Round


Event = Trained | Arrived | Fused | Delivered | Proven | Forgotten

# ------------------------------------------------------------------ actions: what to do


@dataclass(frozen=True)
class Declare:
    """Sign a statement of the model we stand on; answer with Trained."""

    round: Round
    base: Digest


@dataclass(frozen=True)
class Train:
    """Train the round's epochs from `base`; answer with Trained."""

    round: Round
    base: Digest


@dataclass(frozen=True)
class Push:
    """Deliver my checkpoint of `round` to `peer`; answer with Delivered."""

    round: Round
    peer: Peer


@dataclass(frozen=True)
class Fuse:
    """Fuse the full set; answer with Fused."""

    round: Round
    inputs: Mapping[Peer, Digest]  # checkpoints


Action = Declare | Train | Push | Fuse


def todo(state: State) -> tuple[Action, ...]:
    """Everything that is to be done in this state. A restart begins here."""
    pushes = tuple(Push(round, peer) for round, peer in sorted(state.owed))
    match state.phase:
        case Phase.AGREE | Phase.HALTED if state.me not in state.have and not state.signed:
            return (Declare(state.round, state.base), *pushes)
        case Phase.TRAIN:
            return (Train(state.round, state.base), *pushes)
        case Phase.FUSE:
            return (Fuse(state.round, {p: c.sha256 for p, c in sorted(state.have.items())}), *pushes)
        case _:  # AGREE and HALTED with my statement made, COLLECT, FINISHED: deliver and wait
            return pushes


def step(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """One event in, the next state and everything to do in it out.

    Raises:
        UnexpectedEvent: the event cannot happen in this state; a bug, not a peer's fault.
    """
    new = _next(state, event)
    return new, todo(new)


def _next(state: State, event: Event) -> State:
    match state.phase, event:
        case _, Delivered(peer, round):
            return replace(state, owed=state.owed - {(round, peer)})
        case _, Forgotten(peer, round):
            return replace(state, owed=state.owed | {(round, peer)})

        case ((Phase.TRAIN | Phase.AGREE | Phase.HALTED), Trained(claim)) if _is_mine(state, claim):
            others = {(state.round, p) for p in state.peers if p != state.me}
            state = replace(state, have={**state.have, state.me: claim}, owed=state.owed | others, signed=False)
            return _advance(replace(state, phase=Phase.COLLECT) if state.phase is Phase.TRAIN else state)
        case _, Trained(claim) if state.have.get(state.me) == claim:
            return state  # said twice

        case Phase.FINISHED, Proven():
            return state  # the model is agreed on by all
        case Phase.FINISHED, Arrived():
            return state  # said twice, in other words, or of a round that will not be: of no consequence any more
        case Phase.HALTED, Proven(peer, round):
            return _halt(state, _proven(peer, round))
        case _, Proven(peer, round):
            return _object(state, _proven(peer, round))

        case Phase.HALTED, Arrived(claim) if claim.round == state.round:
            return _learn_more(state, claim)
        case Phase.HALTED, _:
            return state  # what was under way when we stopped

        case _, Arrived(claim) if claim.round == state.round:
            return _advance(_receive(state, claim))
        case _, Arrived(claim) if claim.round == state.round + 1:
            return _receive_early(state, claim)
        case _, Arrived(claim) if claim.round < state.round:
            return state  # late: that round is fused here already

        case Phase.FUSE, Fused(round, digest) if round == state.round:
            return _next_round(state, digest)
        case _, Fused(round, _) if round < state.round:
            return state  # said twice

        case _:
            raise UnexpectedEvent(f"{event} in {state.phase} of round {state.round}", remedy="report this with the log")


def _receive(state: State, claim: Claim) -> State:
    known = state.have.get(claim.peer)
    if state.round == 0 and state.phase is Phase.AGREE:
        # Before the first round nothing is at stake: a peer that was set up anew may correct its statement.
        if claim.base != state.base:
            return state  # refused and named by the receiver's check; we go on waiting
        return replace(state, have={**state.have, claim.peer: claim})
    if known is not None:
        return state if known == claim else _object(state, _two_faces(known, claim))
    state = replace(state, have={**state.have, claim.peer: claim}, owed=_still_owed(state, claim))
    reason = _other_base(state, claim)
    if claim.halted or claim.statement != (state.phase is Phase.AGREE):
        return _halt(state, reason or _other_end(claim))  # there will be no full set
    return _object(state, reason) if reason else state


def _receive_early(state: State, claim: Claim) -> State:
    known = state.early.get(claim.peer)
    if known is not None:
        return state if known == claim else _object(state, _two_faces(known, claim))
    return replace(state, early={**state.early, claim.peer: claim}, owed=_still_owed(state, claim))


def _learn_more(state: State, claim: Claim) -> State:
    """Halted: our reason may be a peer that merely halted before us; what still arrives may name the culprit."""
    known = state.have.get(claim.peer)
    if known is not None:
        return state if known == claim else _halt(state, _two_faces(known, claim))
    state = replace(state, have={**state.have, claim.peer: claim}, owed=_still_owed(state, claim))
    return _halt(state, reason) if (reason := _other_base(state, claim)) else state


def _still_owed(state: State, claim: Claim) -> frozenset[tuple[Round, Peer]]:
    """Who starts round r has fused round r-1, so it holds my checkpoints before r: as good as a receipt."""
    return frozenset((r, p) for r, p in state.owed if p != claim.peer or r >= claim.round)


def _advance(state: State) -> State:
    """Leave COLLECT or AGREE when the full set is there."""
    if state.missing:
        return state
    match state.phase:
        case Phase.COLLECT:
            return replace(state, phase=Phase.FUSE)
        case Phase.AGREE if state.round == 0:
            return _enter(replace(state, phase=Phase.TRAIN, round=1, have={}, early={}), state.early)
        case Phase.AGREE:
            return replace(state, phase=Phase.FINISHED)
        case _:
            return state


def _next_round(state: State, digest: Digest) -> State:
    done = state.round >= state.rounds or all(c.plateau for c in state.have.values())
    return _enter(
        replace(
            state,
            phase=Phase.AGREE if done else Phase.TRAIN,
            round=state.round + 1,
            base=digest,
            inputs={p: c.manifest for p, c in sorted(state.have.items())},
            have={},
            early={},
            owed=frozenset(
                (r, p) for r, p in state.owed if r == state.round
            ),  # older ones have arrived: see _still_owed
        ),
        state.early,
    )


def _enter(state: State, early: Mapping[Peer, Claim]) -> State:
    """Take in what came one round early, now that we know what it must be based on."""
    if state.reason:
        state = _halt(state, state.reason)  # now it can be said: see `_object`
    for claim in early.values():
        state = _learn_more(state, claim) if state.phase is Phase.HALTED else _receive(state, claim)
    return state


def _other_base(state: State, claim: Claim) -> str:
    """Why this claim shows that peers fused different things, naming who; empty when all is well."""
    if claim.base == state.base and dict(claim.inputs) == dict(state.inputs):
        return ""
    differing = [p for p in state.peers if claim.inputs.get(p) != state.inputs.get(p)]
    if differing:
        return (
            f"in round {claim.round - 1} {claim.peer} fused from other manifests than this node, those of "
            f"{', '.join(differing)}: compare `hsl-node round show {claim.round - 1}` at both sites; who signed "
            "two is the one whose manifests differ there"
        )
    return (
        f"round {claim.round - 1}: {claim.peer} fused the same checkpoints into other bytes "
        f"({claim.base[:12]}, here {state.base[:12]}); software there: {escaped(claim.software) or 'unknown'}"
    )


def _other_end(claim: Claim) -> str:
    if claim.halted:
        return f"{claim.peer} stopped in round {claim.round} without a checkpoint: `hsl-node status` there says why"
    if claim.statement:
        return f"{claim.peer} ended the run after round {claim.round - 1}, where it goes on for this node"
    return f"{claim.peer} went on after round {claim.round - 1}, where the run ended for this node"


def _two_faces(known: Claim, claim: Claim) -> str:
    """Other samples or another plateau flag count too: they would move a weighted mean or the end of the run."""
    what = "checkpoints" if known.sha256 != claim.sha256 else "manifests of one checkpoint"
    return (
        f"{claim.peer} signed two different {what} for round {claim.round}: the first manifest is {known.manifest[:12]}"
    )


def _proven(peer: Peer, round: Round) -> str:
    return f"{peer} signed two different manifests for round {round}: both are in evidence/"


def _object(state: State, reason: str) -> State:
    """Halt where the others can be told.

    My signature for this round may stand under a checkpoint already. The others would then fuse it, go on, and wait
    for the next one for ever. So I fuse too and halt in the next round, with a statement that lists what I fused.
    """
    if state.round == 0 or state.signed or (state.phase in (Phase.COLLECT, Phase.FUSE) and state.me in state.have):
        return replace(state, reason=_joined(state.reason, reason))
    return _halt(state, reason)


def _halt(state: State, reason: str) -> State:
    return replace(state, phase=Phase.HALTED, reason=_joined(state.reason, reason))


def _joined(known: str, more: str) -> str:
    if more in known or len(known) > REASON_MAX_CHARS:
        return known
    return f"{known}; {more}" if known else more


def _is_mine(state: State, claim: Claim) -> bool:
    return (
        claim.peer == state.me
        and claim.round == state.round
        and claim.base == state.base
        and claim.halted == (state.phase is Phase.HALTED)
        and state.me not in state.have
    )


# ------------------------------------------------------------------ the state as JSON, for the journal


def to_json(state: State) -> dict[str, Any]:
    return {**asdict(state), "owed": sorted(list(pair) for pair in state.owed)}


def from_json(content: dict[str, Any]) -> State:
    return State(
        **{
            **content,
            "peers": tuple(content["peers"]),
            "phase": Phase(content["phase"]),
            "have": {p: Claim(**c) for p, c in content["have"].items()},
            "early": {p: Claim(**c) for p, c in content["early"].items()},
            "owed": frozenset((r, p) for r, p in content["owed"]),
        }
    )
