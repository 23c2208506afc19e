"""The round machine where peers disagree, lie or stop: who is named, and how the others find out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from claims import (
    ASH,
    BIRCH,
    CEDAR,
    FUSED1,
    INITIAL,
    INPUTS1,
    INPUTS2,
    OTHER,
    START,
    after,
    agreed,
    checkpoint,
    collecting,
    last_agreement,
    second_round,
    statement,
)
from simulation import plain_fusion, signed, weighted_fusion

from hsl_node.federation.names import Peer, Round
from hsl_node.sync.round import (
    Arrived,
    Claim,
    Declare,
    Fused,
    Phase,
    Proven,
    Push,
    State,
    Train,
    Trained,
    step,
    todo,
)


def test_a_peer_that_fused_from_other_manifests_halts_the_node_and_the_reason_names_whose():
    theirs = {**INPUTS1, CEDAR: OTHER}
    state = after(second_round(), Arrived(checkpoint(BIRCH, 2, FUSED1, theirs)))
    assert state.phase is Phase.HALTED
    assert "in round 1 birch fused from other manifests than this node, those of cedar:" in state.reason
    assert "compare `hsl-node round show 1` at both sites" in state.reason


def test_threat_28_a_peer_that_fused_the_same_into_other_bytes_is_named_with_its_software():
    state = after(second_round(), Arrived(checkpoint(BIRCH, 2, OTHER, INPUTS1, software="hsl-node 9, torch 1")))
    assert state.phase is Phase.HALTED
    assert "round 1: birch fused the same checkpoints into other bytes" in state.reason
    assert "hsl-node 9, torch 1" in state.reason


def test_threat_20_what_a_peer_says_of_its_software_is_escaped_in_the_reason():
    state = after(second_round(), Arrived(checkpoint(BIRCH, 2, OTHER, INPUTS1, software="\x1b[2Jall is well")))
    assert "\\x1b[2Jall is well" in state.reason


def test_a_disagreement_that_came_early_shows_as_soon_as_its_round_begins():
    state = after(collecting(), Arrived(checkpoint(BIRCH)), Arrived(checkpoint(BIRCH, 2, OTHER, INPUTS1)))
    assert state.phase is Phase.COLLECT
    state = after(state, Arrived(checkpoint(CEDAR)), Fused(1, FUSED1))
    assert state.phase is Phase.HALTED
    assert "birch" in state.reason


@pytest.mark.parametrize(
    "second",
    [
        replace(checkpoint(BIRCH), sha256=OTHER),
        replace(checkpoint(BIRCH), samples=7),  # moves a weighted mean
        replace(checkpoint(BIRCH), plateau=True),  # moves the end of the run
        replace(checkpoint(BIRCH), base=OTHER),
    ],
    ids=["checkpoint", "samples", "plateau", "base"],
)
def test_threat_11_two_different_claims_of_one_peer_about_one_round_halt_the_node(second):
    state = after(agreed(), Arrived(checkpoint(BIRCH)), Arrived(second))
    assert state.phase is Phase.HALTED
    assert "birch signed two different" in state.reason


def test_two_manifests_that_differ_in_nothing_the_machine_reads_halt_the_node_too():
    """The other peers name the one that they have: they would halt for it a round later."""
    second = replace(checkpoint(BIRCH), manifest=OTHER)
    state = after(agreed(), Arrived(checkpoint(BIRCH)), Arrived(second))
    assert state.phase is Phase.HALTED
    assert "birch signed two different manifests of one checkpoint" in state.reason


# ------------------------------------------------------------------ a liar: cedar tells ash and birch different things


def told(me: Peer, cedar: Claim, fusion=weighted_fusion, plateau: bool = False, rounds: Round = 2) -> State:
    """The state after round 1, in which cedar sent this claim."""
    ash, birch = (signed(replace(checkpoint(p, plateau=plateau), samples=10)) for p in (ASH, BIRCH))
    mine, theirs = (ash, birch) if me == ASH else (birch, ash)
    state = replace(START, me=me, rounds=rounds)
    state = after(state, Trained(statement(me)), *(Arrived(statement(p)) for p in START.peers if p != me))
    state = after(state, Trained(mine), Arrived(theirs), Arrived(cedar))
    contributions = {p: (c.sha256, c.samples) for p, c in state.have.items()}
    return after(state, Fused(1, fusion(me, contributions)))


def next_claim(state: State) -> Claim:
    """What this node signs next: its checkpoint, the closing statement, or that it halted."""
    halted = state.phase is Phase.HALTED
    if halted or state.phase is Phase.AGREE:
        return statement(state.me, state.round, state.base, dict(state.inputs), halted)
    return checkpoint(state.me, state.round, state.base, dict(state.inputs))


LIGHT, HEAVY = (signed(replace(checkpoint(CEDAR), samples=n)) for n in (10, 1000))


@pytest.mark.parametrize("rounds", [1, 2], ids=["last round", "before"])
@pytest.mark.parametrize("fusion", [weighted_fusion, plain_fusion], ids=["other bytes", "same bytes"])
def test_a_peer_that_signs_different_sample_counts_to_two_others_is_named_by_both(fusion, rounds):
    ash, birch = told(ASH, LIGHT, fusion, rounds=rounds), told(BIRCH, HEAVY, fusion, rounds=rounds)
    assert (ash.base == birch.base) == (fusion is plain_fusion)
    for mine, other in ((ash, birch), (birch, ash)):
        state = after(mine, Arrived(next_claim(other)))
        assert (state.phase, state.round) == (Phase.HALTED, 2)
        assert f"{other.me} fused from other manifests than this node, those of cedar:" in state.reason


def test_a_peer_that_signs_different_plateau_flags_to_two_others_is_named_by_both():
    """For ash the run has ended, for birch it goes on: neither of them is to blame."""
    ended, goes_on = (signed(replace(checkpoint(CEDAR, plateau=p), samples=10)) for p in (True, False))
    ash, birch = told(ASH, ended, plateau=True), told(BIRCH, goes_on, plateau=True)
    assert (ash.phase, birch.phase) == (Phase.AGREE, Phase.TRAIN)
    assert ash.base == birch.base
    first, second = after(ash, Arrived(next_claim(birch))), after(birch, Arrived(next_claim(ash)))
    for state in (first, second):
        assert (state.phase, state.round) == (Phase.HALTED, 2)
        assert "than this node, those of cedar:" in state.reason
    after_statement = after(birch, Trained(next_claim(birch)), Arrived(next_claim(ash)))
    assert after_statement.phase is Phase.HALTED, "its checkpoint is signed: the full set will not come any more"
    assert "those of cedar:" in after_statement.reason


def test_the_honest_are_not_named_where_all_had_the_same_manifests():
    ash, birch = told(ASH, LIGHT), told(BIRCH, LIGHT)
    assert after(ash, Arrived(next_claim(birch))).reason == ""


def test_a_different_last_fusion_halts_the_node():
    state = after(last_agreement(), Arrived(statement(CEDAR, 3, FUSED1, INPUTS2)))
    assert state.phase is Phase.HALTED
    assert "cedar" in state.reason


def test_a_peer_that_goes_on_where_the_run_ended_here_halts_the_node():
    state = after(last_agreement(), Arrived(checkpoint(CEDAR, 3, OTHER, INPUTS2)))
    assert state.phase is Phase.HALTED
    assert "cedar went on after round 2" in state.reason


def test_a_peer_that_stopped_halts_the_node_and_says_where_to_ask():
    state = after(second_round(), Arrived(statement(CEDAR, 2, FUSED1, INPUTS1, halted=True)))
    assert state.phase is Phase.HALTED
    assert "cedar stopped in round 2" in state.reason


def test_a_peer_that_ended_the_run_where_it_goes_on_here_halts_the_node():
    state = after(second_round(), Arrived(statement(CEDAR, 2, FUSED1, INPUTS1)))
    assert state.phase is Phase.HALTED
    assert "cedar ended the run after round 1" in state.reason


@pytest.mark.parametrize("closed", [False, True], ids=["before my statement", "after my statement"])
def test_a_peer_that_stopped_in_the_last_agreement_has_not_agreed(closed):
    """Same model, same manifests: without the flag its statement would be taken for a closing one."""
    state = last_agreement()
    if closed:
        state = after(state, Trained(statement(ASH, 3, OTHER, INPUTS2)))
    state = after(state, Arrived(statement(BIRCH, 3, OTHER, INPUTS2)))
    state = after(state, Arrived(statement(CEDAR, 3, OTHER, INPUTS2, halted=True)))
    assert state.phase is Phase.HALTED
    assert "cedar stopped in round 3" in state.reason


# ------------------------------------------------------------------ halting so that the others find out


def test_a_halted_node_states_where_it_stands_instead_of_its_checkpoint():
    state = after(second_round(), Arrived(checkpoint(BIRCH, 2, OTHER, INPUTS1)))
    assert Declare(2, FUSED1) in todo(state)
    assert not any(isinstance(a, Train) for a in todo(state))
    assert after(state, Trained(statement(ASH, 2, FUSED1, INPUTS1))) == state, "it has to say that it halted"
    state = after(state, Trained(statement(ASH, 2, FUSED1, INPUTS1, halted=True)))
    assert {Push(2, BIRCH), Push(2, CEDAR)} <= set(todo(state))
    assert not any(isinstance(a, Declare) for a in todo(state))


def test_an_objection_after_my_checkpoint_is_signed_halts_in_the_next_round():
    """The others may fuse round 2 and go on: only a statement about round 3 can tell them."""
    state = after(second_round(), Trained(checkpoint(ASH, 2, FUSED1, INPUTS1)))
    state = after(state, Arrived(checkpoint(BIRCH, 2, OTHER, INPUTS1)))
    assert state.phase is Phase.COLLECT
    assert "birch" in state.reason
    state = after(state, Arrived(checkpoint(CEDAR, 2, FUSED1, INPUTS1)))
    assert state.phase is Phase.FUSE
    state = after(state, Fused(2, OTHER))
    assert (state.phase, state.round) == (Phase.HALTED, 3)
    assert Declare(3, OTHER) in todo(state)


def test_an_objecting_node_halts_at_once_when_the_full_set_cannot_come_any_more():
    state = after(second_round(), Trained(checkpoint(ASH, 2, FUSED1, INPUTS1)))
    state = after(state, Arrived(statement(BIRCH, 2, OTHER, INPUTS1, halted=True)))  # halted, and on other bytes
    assert state.phase is Phase.HALTED
    assert "birch fused the same checkpoints into other bytes" in state.reason


def test_a_halted_node_still_learns_who_the_culprit_is():
    """Cedar stopped first; birch's checkpoint, a moment later, shows why."""
    state = after(second_round(), Arrived(statement(CEDAR, 2, FUSED1, INPUTS1, halted=True)))
    assert "birch" not in state.reason
    state = after(state, Arrived(checkpoint(BIRCH, 2, OTHER, INPUTS1)))
    assert "birch fused the same checkpoints into other bytes" in state.reason


@pytest.mark.parametrize("mine", [False, True])
def test_threat_11_proof_that_was_fetched_halts_the_node_where_the_others_can_be_told(mine):
    """Before my checkpoint is signed at once; after it with the next round, which its full set begins."""
    state = replace(START, phase=Phase.TRAIN, round=1)
    if mine:
        state, _ = step(state, Trained(checkpoint(ASH)))
    state, actions = step(state, Proven(CEDAR, 1))
    assert "cedar signed two different manifests for round 1" in state.reason
    assert (state.phase is Phase.HALTED) != mine
    assert not any(isinstance(a, Train) for a in actions)
    again, _ = step(state, Proven(CEDAR, 1))
    assert again == state, "said twice"


@pytest.mark.parametrize("peer", [CEDAR, ASH])
def test_threat_11_proof_of_a_round_long_past_halts_the_node_whoever_signed_it(peer):
    """Who sees it later must not decide otherwise than who saw it at once; ASH is this node."""
    state, _ = step(replace(START, phase=Phase.TRAIN, round=7), Proven(peer, 2))
    assert state.phase is Phase.HALTED
    assert "signed two different manifests for round 2" in state.reason


def test_proof_that_comes_after_the_end_stops_nothing():
    state = replace(START, phase=Phase.FINISHED, round=3)
    assert step(state, Proven(CEDAR, 3))[0] == state


def test_a_second_closing_statement_after_the_end_stops_nothing():
    known = statement(CEDAR, 3, FUSED1, INPUTS1)
    state = replace(START, phase=Phase.FINISHED, round=3, base=FUSED1, have={CEDAR: known})
    assert step(state, Arrived(signed(replace(known, samples=7))))[0] == state


def test_threat_11_what_is_signed_for_a_round_after_the_end_stops_nothing():
    state = replace(START, rounds=9, phase=Phase.FINISHED, round=3, base=FUSED1)  # ended early: by a plateau
    for digest in (OTHER, INITIAL):
        assert step(state, Arrived(replace(checkpoint(CEDAR, 4, FUSED1, INPUTS1), sha256=digest)))[0] == state


def test_a_halted_node_names_a_peer_whose_second_face_comes_later():
    birch = checkpoint(BIRCH, 2, FUSED1, INPUTS1)
    state = after(second_round(), Arrived(birch), Arrived(statement(CEDAR, 2, FUSED1, INPUTS1, halted=True)))
    assert "birch" not in state.reason
    state = after(state, Arrived(signed(replace(birch, samples=7))))
    assert "birch signed two different manifests of one checkpoint" in state.reason


def test_a_halted_node_takes_no_further_step():
    halted = after(second_round(), Arrived(checkpoint(BIRCH, 2, OTHER, INPUTS1)))
    for event in (Fused(2, OTHER), Trained(checkpoint(ASH, 1)), Arrived(checkpoint(CEDAR, 3, OTHER, INPUTS1))):
        assert after(halted, event) == halted
