"""The round machine under every interleaving we can think of. `simulation.py` says what can happen."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace

from hypothesis import event, given, settings
from hypothesis import strategies as st
from sample import examples
from simulation import Contributions, World, digest_of, plain_fusion, signed, weighted_fusion

from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.sync.round import Claim, Phase

Face = Callable[[Claim], Claim]  # what a liar signs beside the truth
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
@settings(max_examples=examples(100))
def test_threat_22_every_peer_ends_with_the_same_bytes_whatever_the_order_and_whoever_crashes(
    peers, rounds, picks, data
):
    """Late, doubled and lost messages, crashes at any point, training that gives other bytes when it is repeated."""
    first = st.one_of(st.none(), st.integers(1, 3))
    plateau_from = {p: r for p in peers if (r := data.draw(first, label=f"{p} plateaus in round")) is not None}
    world = World(peers, rounds, plateau_from=plateau_from).run(picks).settle()
    event(f"crashes: {min(world.crashes, 9)}")
    require_one_outcome(world)
    plateau = max(plateau_from.values()) if len(plateau_from) == len(peers) else rounds
    assert len(world.fused) == min(rounds, plateau), "all decide alike when to stop"


@given(federations, st.integers(1, 3), picks, st.data())
@settings(max_examples=examples(150))
def test_threat_12_a_disk_lost_at_any_moment_changes_no_byte(peers, rounds, picks, data):
    """Training is not reproducible here: who signed a round again after its disk was lost would be seen."""
    first = st.one_of(st.none(), st.integers(1, 3))
    plateau_from = {p: r for p in peers if (r := data.draw(first, label=f"{p} plateaus in round")) is not None}
    world = World(peers, rounds, plateau_from=plateau_from, disks_fail=True).run(picks).settle()
    event(f"losses: {min(world.losses, 9)}")
    require_one_outcome(world)


def test_disks_are_lost_in_every_phase_of_the_simulation():
    """The test above would prove little if they were lost at the beginning only."""
    seen = set()

    class Watched(World):
        def _lose(self, me: Peer) -> None:
            seen.add(self.nodes[me].state.phase)
            super()._lose(me)

    for seed in range(100):
        require_one_outcome(Watched(PEERS[:2], 1 + seed % 2, disks_fail=True).run(schedule(seed, 300)).settle())
    assert seen >= {Phase.AGREE, Phase.TRAIN, Phase.COLLECT, Phase.FUSE, Phase.FINISHED}


@given(federations, st.integers(1, 3), picks, st.data())
@settings(max_examples=examples(60))
def test_threat_11_a_peer_that_signs_two_checkpoints_is_named_by_all_and_nobody_finishes(peers, rounds, picks, data):
    culprit = data.draw(st.sampled_from(peers))
    at = data.draw(st.integers(1, rounds))
    fooled = data.draw(st.sets(st.sampled_from([p for p in peers if p != culprit]), min_size=1))

    def two_faces(receiver: Peer, claim: Claim) -> list[Claim]:
        return [other_face(claim) if claim.round == at and receiver in fooled else claim]

    compare = data.draw(st.booleans(), label="they read each other's manifests")
    world = World(peers, rounds, culprit=culprit, lie=two_faces, compare=compare).run(picks).settle()
    assert len(world.published[culprit, at]) > 0
    require_halted_naming(world, culprit)
    require_no_innocent_named_as_a_liar(world)
    require_one_decision(world)
    event(f"proofs: {min(world.proofs, 4)}")


@given(federations, st.integers(1, 3), picks, st.data())
@settings(max_examples=examples(120))
def test_a_peer_that_signs_the_same_checkpoint_with_other_words_is_named_by_all_within_a_round(
    peers, rounds, picks, data
):
    """Another sample count moves a weighted mean, another plateau flag the end of the run for those who believe it.

    Also where neither shows in the fused bytes: the manifests of the next round name all manifests of this one.
    """
    culprit = data.draw(st.sampled_from(peers))
    at = data.draw(st.integers(1, rounds))
    fooled = data.draw(st.sets(st.sampled_from([p for p in peers if p != culprit]), min_size=1))
    face = FACES[what := data.draw(st.sampled_from(["samples", "plateau", "word"]))]
    fusion = data.draw(st.sampled_from([weighted_fusion, plain_fusion]))
    # Where the others have a plateau in that round, the liar's flag alone ends the run, for those whom it tells so.
    ready = data.draw(st.booleans(), label="the others have a plateau then")
    also = data.draw(st.booleans(), label="the liar, too")
    plateau_from = {p: at for p in peers if ready and (p != culprit or also)}

    def lie(receiver: Peer, claim: Claim) -> list[Claim]:
        return [face(claim) if claim.round == at and receiver in fooled else claim]

    compare = data.draw(st.booleans(), label="they read each other's manifests")
    world = World(peers, rounds, plateau_from=plateau_from, culprit=culprit, lie=lie, fusion=fusion, compare=compare)
    world.run(picks).settle()
    assert len(world.published[culprit, at]) == (1 if len(fooled) == len(peers) - 1 else 2), "the lie was told"
    require_halted_naming(world, culprit)
    named = {world.named[p] for p in peers if p != culprit}
    assert max(named) <= at + 1 if compare else named == {at + 1}, "when the next manifests are there, or the proof"
    require_no_innocent_named_as_a_liar(world)
    require_one_decision(world)
    event(f"{what}, the others {'have' if ready else 'have no'} plateau")


@given(federations, st.integers(1, 3), picks, st.data())
@settings(max_examples=examples(60))
def test_threat_28_a_peer_that_fuses_into_other_bytes_is_named_by_all_and_nobody_finishes(peers, rounds, picks, data):
    culprit = data.draw(st.sampled_from(peers))

    def fusion(peer: Peer, contributions: Contributions) -> Digest:
        right = weighted_fusion(peer, contributions)
        return digest_of("flipped bit", right) if peer == culprit else right

    world = World(peers, rounds, culprit=culprit, fusion=fusion).run(picks).settle()
    require_halted_naming(world, culprit)


@given(st.integers(3, 5).map(lambda n: PEERS[:n]), st.integers(1, 3), picks, st.data())
@settings(max_examples=examples(60))
def test_threat_11_where_one_peer_alone_sees_both_faces_nobody_is_left_waiting(peers, rounds, picks, data):
    """Shown one after the other to one witness; who halts names the culprit, or the witness, who does."""
    culprit, witness = data.draw(st.permutations(peers))[:2]
    at = data.draw(st.integers(1, rounds))

    face = FACES[data.draw(st.sampled_from(sorted(FACES)))]

    def two_faces(receiver: Peer, claim: Claim) -> list[Claim]:
        return [claim, face(claim)] if claim.round == at and receiver == witness else [claim]

    compare = data.draw(st.booleans(), label="they read each other's manifests")
    world = World(peers, rounds, culprit=culprit, lie=two_faces, compare=compare).run(picks).settle()
    honest = {p: s for p, s in world.states().items() if p != culprit}
    finished = {p for p, s in honest.items() if s.phase is Phase.FINISHED}
    halted = {p for p, s in honest.items() if s.phase is Phase.HALTED}
    assert finished | halted == set(honest), "nobody waits"
    assert not finished or len({s.base for s in honest.values()}) == 1, "who finished has what everybody has"
    assert not finished - {witness} or not halted - {witness}
    if halted:
        assert culprit in honest[witness].reason
    assert all(culprit in honest[p].reason or witness in honest[p].reason for p in halted)
    require_one_decision(world)
    event("halted" if halted - {witness} else "finished")


def other_face(claim: Claim) -> Claim:
    """Another checkpoint for the same round, with everything else the same."""
    return signed(replace(claim, sha256=digest_of("other", claim.sha256)))


def other_samples(claim: Claim) -> Claim:
    return signed(replace(claim, samples=10 * claim.samples))


def other_plateau(claim: Claim) -> Claim:
    return signed(replace(claim, plateau=not claim.plateau))


def other_word(claim: Claim) -> Claim:
    """Nothing that the fusion or the end of the run depends on."""
    return signed(replace(claim, software="x"))


FACES: dict[str, Face] = {
    "checkpoint": other_face, "samples": other_samples, "plateau": other_plateau, "word": other_word,
}  # fmt: skip


def require_halted_naming(world: World, culprit: Peer) -> None:
    honest = {p: s for p, s in world.states().items() if p != culprit}
    assert {p: s.phase for p, s in honest.items()} == dict.fromkeys(honest, Phase.HALTED)
    for peer, state in honest.items():
        assert culprit in state.reason, f"{peer} says: {state.reason}"


def require_no_innocent_named_as_a_liar(world: World) -> None:
    """That another fused from other manifests may be said of anybody; that somebody signed two, of the liar alone."""
    for peer, state in world.states().items():
        accused = set(re.findall(r"(\w+) signed two different", state.reason))
        assert accused <= {world.culprit}, f"{peer} says: {state.reason}"


def require_one_decision(world: World) -> None:
    """Whoever has a proof has halted for it, whenever it came, unless it had finished. A restart decides likewise."""
    for node in world.nodes.values():
        assert node.state is not None
        for round, peer in node.disk.evidence if node.state.phase is not Phase.FINISHED else ():
            assert f"{peer} signed two different manifests for round {round}" in node.state.reason
    before = world.states()
    world.restart_all()
    assert world.states() == before


def test_proofs_come_by_comparing_and_by_delivery_in_every_order_and_before_a_crash():
    """The tests above would prove little without it."""
    seen = {"in all": 0, "of a past round": 0, "killed before the word": 0}

    class Watched(World):
        def _prove(self, me: Peer, round: Round, peer: Peer) -> None:
            seen["of a past round"] += self.nodes[me].state.round > round
            super()._prove(me, round, peer)

        def _keep_and_crash(self, me: Peer, round: Round, peer: Peer) -> None:
            seen["killed before the word"] += 1
            super()._keep_and_crash(me, round, peer)

    for seed in range(30):

        def two_faces(receiver: Peer, claim: Claim, both: bool = seed % 2 == 0) -> list[Claim]:
            if claim.round != 1 or receiver != "birch":
                return [claim]
            return [claim, other_face(claim)] if both else [other_face(claim)]

        world = Watched(PEERS[:3], 2, culprit=PEERS[0], lie=two_faces, compare=True).run(schedule(seed, 300)).settle()
        require_one_decision(world)
        seen["in all"] += world.proofs
    assert all(count > 5 for count in seen.values()), seen


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
