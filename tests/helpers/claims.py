"""What three peers claim in a run of two rounds, and the states of the round machine on its way through it."""

from __future__ import annotations

from simulation import claim_of

from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.sync.round import (
    Arrived,
    Claim,
    Event,
    Fused,
    State,
    Trained,
    step,
)

ASH, BIRCH, CEDAR = Peer("ash"), Peer("birch"), Peer("cedar")
INITIAL, FUSED1, OTHER = Digest("0" * 64), Digest("f" * 64), Digest("e" * 64)
START = State(me=ASH, peers=(ASH, BIRCH, CEDAR), rounds=2, base=INITIAL)


def sha(peer: Peer, round: Round) -> Digest:
    return Digest(f"{peer[0]}{round}".ljust(64, "0"))


def statement(
    peer: Peer,
    round: Round = 0,
    base: Digest = INITIAL,
    inputs: dict[Peer, Digest] | None = None,
    halted: bool = False,
) -> Claim:
    return claim_of(peer, round, base, base, inputs or {}, statement=True, halted=halted)


def checkpoint(
    peer: Peer,
    round: Round = 1,
    base: Digest = INITIAL,
    inputs: dict[Peer, Digest] | None = None,
    plateau: bool = False,
    software: str = "",
) -> Claim:
    return claim_of(peer, round, sha(peer, round), base, inputs or {}, plateau=plateau, software=software)


def after(state: State, *events: Event) -> State:
    for event in events:
        state, _ = step(state, event)
    return state


def agreed() -> State:
    """Round 1, TRAIN: everybody stands on the same initial weights."""
    return after(START, Trained(statement(ASH)), Arrived(statement(BIRCH)), Arrived(statement(CEDAR)))


def collecting() -> State:
    return after(agreed(), Trained(checkpoint(ASH)))


def fusing() -> State:
    return after(collecting(), Arrived(checkpoint(BIRCH)), Arrived(checkpoint(CEDAR)))


INPUTS1 = {p: checkpoint(p, 1).manifest for p in (ASH, BIRCH, CEDAR)}


def second_round() -> State:
    return after(fusing(), Fused(1, FUSED1))


def last_agreement() -> State:
    """After round 2 of 2: state what we ended with."""
    state = after(second_round(), Trained(checkpoint(ASH, 2, FUSED1, INPUTS1)))
    state = after(state, *(Arrived(checkpoint(p, 2, FUSED1, INPUTS1)) for p in (BIRCH, CEDAR)))
    return after(state, Fused(2, OTHER))


INPUTS2 = {p: checkpoint(p, 2, FUSED1, INPUTS1).manifest for p in (ASH, BIRCH, CEDAR)}
