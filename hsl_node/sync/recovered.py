"""Where a node goes on that lost its state, from what its peers hold. Claims in, a state of the round out. Pure.

    the highest round that I signed, as far as anybody knows ──► COLLECT in it, with my claim (AGREE, HALTED: likewise)
    signed, but nobody kept its checkpoint                   ──► TRAIN in it: only the same bytes may be sent
    nothing signed                                           ──► the beginning

That is the earliest state in which I can have been, and a later one follows from it with the bytes it had before: what
the others signed for that round and the next is still kept by them, since nobody passes the barrier without me. My own
manifest says what the round started from. What I signed and nobody ever got is signed anew, which nobody can tell.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.sync.round import Claim, Phase, State


def recovered(
    fresh: State,
    claims: Mapping[Round, Mapping[Peer, Claim]],
    at: Mapping[Peer, Round],
    kept: Collection[Digest],
) -> State:
    """The state to go on from.

    `fresh`: as of a node that begins. `claims`: verified manifests by round, mine included. `at`: the round that each
    of the others is in. `kept`: digests of the checkpoints of mine that are in my outbox (again).
    """
    me = fresh.me
    mine = {round: of[me] for round, of in claims.items() if me in of}
    if not mine:
        return fresh
    last = max(mine)
    claim = mine[last]
    state = replace(fresh, round=last, base=claim.base, inputs=dict(claim.inputs))
    if claim.statement:
        state = replace(state, phase=Phase.HALTED if claim.halted else Phase.AGREE)
        if claim.halted:
            state = replace(state, reason=f"this node had halted in round {last} before its state was lost")
    elif claim.sha256 in kept:
        state = replace(state, phase=Phase.COLLECT)
    else:
        return replace(state, phase=Phase.TRAIN, signed=True, owed=_owed(fresh, mine, at, kept, last - 1))
    return replace(state, have={me: claim}, owed=_owed(fresh, mine, at, kept, last))


def _owed(
    fresh: State, mine: Mapping[Round, Claim], at: Mapping[Peer, Round], kept: Collection[Digest], until: Round
) -> frozenset[tuple[Round, Peer]]:
    """My last one to everybody (who has it, has its receipt ready), the one before to who is still in that round."""
    last = max(mine)
    others = [p for p in fresh.peers if p != fresh.me]
    owed = {(last, p) for p in others}
    before = mine.get(last - 1)
    if before is not None and (before.statement or before.sha256 in kept):
        owed |= {(last - 1, p) for p in others if at.get(p, last) < last}
    return frozenset((round, p) for round, p in owed if round <= until)


def relied_on(state: State) -> frozenset[tuple[Round, Peer]]:
    """Checkpoints that must lie in outbox or inbox for this state to go on: (round, whose)."""
    have = {(state.round, c.peer) for c in state.have.values() if not c.statement}
    early = {(state.round + 1, c.peer) for c in state.early.values() if not c.statement}
    if state.phase in (Phase.AGREE, Phase.FINISHED, Phase.HALTED):
        have = {(round, peer) for round, peer in have if peer == state.me}
    return frozenset(have | early | {(round, state.me) for round, _ in state.owed})
