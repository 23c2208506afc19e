"""The round machine under every interleaving we can think of. `simulation.py` says what can happen."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

from hypothesis import event, given, settings
from hypothesis import strategies as st
from simulation import World, digest_of, honest_fusion

from hsl_node.sync.names import Digest, Peer
from hsl_node.sync.round import Claim, Phase

PEERS = tuple(Peer(p) for p in ("ash", "birch", "cedar", "durmast", "elm"))
federations = st.integers(2, 5).map(lambda n: PEERS[:n])
# Short schedules that shrink well, and long ones that reach the last round.
picks = st.one_of(
    st.lists(st.integers(0, 9999), max_size=200),
    st.builds(lambda seed, n: schedule(seed, n), st.integers(0, 2**32), st.integers(100, 500)),
)


def schedule(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(10_000), k=n)


def require_one_outcome(world: World) -> None:
    """Everybody finished, with the same bytes after every round, having signed one checkpoint for each."""
    states = world.states()
    assert {p: s.phase for p, s in states.items()} == dict.fromkeys(states, Phase.FINISHED)
    assert all(len(digests) == 1 for digests in world.published.values())
    assert all(len(set(by_peer.values())) == 1 for by_peer in world.fused.values())
    assert len({(s.base, s.round) for s in states.values()}) == 1
    assert not any(s.owed for s in states.values())


@given(federations, st.integers(1, 3), picks, st.data())
@settings(max_examples=100)
def test_every_peer_ends_with_the_same_bytes_whatever_the_order_and_whoever_crashes(peers, rounds, picks, data):
    """Late, doubled and lost messages, crashes at any point, training that gives other bytes when it is repeated."""
    first = st.one_of(st.none(), st.integers(1, 3))
    plateau_from = {p: r for p in peers if (r := data.draw(first, label=f"{p} plateaus in round")) is not None}
    world = World(peers, rounds, plateau_from=plateau_from).run(picks).settle()
    event(f"crashes: {min(world.crashes, 9)}")
    require_one_outcome(world)
    plateau = max(plateau_from.values()) if len(plateau_from) == len(peers) else rounds
    assert len(world.fused) == min(rounds, plateau), "all decide alike when to stop"


@given(federations, st.integers(1, 3), picks, st.data())
@settings(max_examples=60)
def test_a_peer_that_signs_two_checkpoints_is_named_by_all_and_nobody_finishes(peers, rounds, picks, data):
    culprit = data.draw(st.sampled_from(peers))
    at = data.draw(st.integers(1, rounds))
    fooled = data.draw(st.sets(st.sampled_from([p for p in peers if p != culprit]), min_size=1))

    def two_faces(receiver: Peer, claim: Claim) -> list[Claim]:
        return [other_face(claim) if claim.round == at and receiver in fooled else claim]

    world = World(peers, rounds, culprit=culprit, lie=two_faces).run(picks).settle()
    assert len(world.published[culprit, at]) > 0
    require_halted_naming(world, culprit)


@given(federations, st.integers(1, 3), picks, st.data())
@settings(max_examples=60)
def test_a_peer_that_fuses_into_other_bytes_is_named_by_all_and_nobody_finishes(peers, rounds, picks, data):
    culprit = data.draw(st.sampled_from(peers))

    def fusion(peer: Peer, inputs: Mapping[Peer, Digest]) -> Digest:
        right = honest_fusion(peer, inputs)
        return digest_of("flipped bit", right) if peer == culprit else right

    world = World(peers, rounds, culprit=culprit, fusion=fusion).run(picks).settle()
    require_halted_naming(world, culprit)


@given(st.integers(3, 5).map(lambda n: PEERS[:n]), st.integers(1, 3), picks, st.data())
@settings(max_examples=60)
def test_where_one_peer_alone_sees_both_faces_nobody_is_left_waiting(peers, rounds, picks, data):
    """Shown one after the other to one witness; who halts names the culprit, or the witness, who does."""
    culprit, witness = data.draw(st.permutations(peers))[:2]
    at = data.draw(st.integers(1, rounds))

    def two_faces(receiver: Peer, claim: Claim) -> list[Claim]:
        return [claim, other_face(claim)] if claim.round == at and receiver == witness else [claim]

    world = World(peers, rounds, culprit=culprit, lie=two_faces).run(picks).settle()
    honest = {p: s for p, s in world.states().items() if p != culprit}
    finished = {p for p, s in honest.items() if s.phase is Phase.FINISHED}
    halted = {p for p, s in honest.items() if s.phase is Phase.HALTED}
    assert finished | halted == set(honest), "nobody waits"
    assert not finished or len({s.base for s in honest.values()}) == 1, "who finished has what everybody has"
    assert not finished - {witness} or not halted - {witness}
    if halted:
        assert culprit in honest[witness].reason
    assert all(culprit in honest[p].reason or witness in honest[p].reason for p in halted)
    event("halted" if halted - {witness} else "finished")


def other_face(claim: Claim) -> Claim:
    """Another checkpoint for the same round, with everything else the same."""
    return replace(claim, sha256=digest_of("other", claim.sha256))


def require_halted_naming(world: World, culprit: Peer) -> None:
    honest = {p: s for p, s in world.states().items() if p != culprit}
    assert {p: s.phase for p, s in honest.items()} == dict.fromkeys(honest, Phase.HALTED)
    for peer, state in honest.items():
        assert culprit in state.reason, f"{peer} says: {state.reason}"


def test_a_node_that_saves_after_publishing_is_caught_by_this_simulation():
    """The check can fail: the same schedules break the promise for careless nodes and keep it for ours."""
    broken = 0
    for seed in range(60):
        require_one_outcome(World(PEERS[:3], 2).run(schedule(seed, 300)).settle())
        try:
            require_one_outcome(World(PEERS[:3], 2, careless=True).run(schedule(seed, 300)).settle())
        except (AssertionError, KeyError):
            broken += 1
    assert broken > 5
