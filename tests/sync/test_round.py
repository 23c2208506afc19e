"""Each transition of the round machine by hand. All of them together, in any order: test_round_simulation.py."""

from __future__ import annotations

import json
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
    fusing,
    last_agreement,
    second_round,
    sha,
    statement,
)
from simulation import signed

from hsl_node.errors import UnexpectedEvent
from hsl_node.sync.round import (
    Arrived,
    Declare,
    Delivered,
    Forgotten,
    Fuse,
    Fused,
    Phase,
    Push,
    Train,
    Trained,
    from_json,
    step,
    to_json,
    todo,
)


def test_a_new_node_first_states_which_model_it_stands_on():
    assert (START.phase, START.round) == (Phase.AGREE, 0)
    assert todo(START) == (Declare(0, INITIAL),)


def test_my_statement_goes_to_every_other_peer():
    state, actions = step(START, Trained(statement(ASH)))
    assert actions == (Push(0, BIRCH), Push(0, CEDAR))
    assert state.phase is Phase.AGREE


def test_training_starts_when_everybody_stated_the_same_model():
    state = agreed()
    assert (state.phase, state.round) == (Phase.TRAIN, 1)
    assert Train(1, INITIAL) in todo(state)


def test_training_does_not_wait_for_the_receipts_of_the_statement():
    assert todo(agreed()) == (Train(1, INITIAL), Push(0, BIRCH), Push(0, CEDAR))


def test_threat_28_a_statement_about_another_initial_model_does_not_count():
    state = after(START, Trained(statement(ASH)), Arrived(statement(BIRCH)), Arrived(statement(CEDAR, 0, OTHER)))
    assert (state.phase, state.missing) == (Phase.AGREE, (CEDAR,))


def test_a_peer_that_was_set_up_anew_may_correct_its_statement_before_the_first_round():
    state = after(START, Trained(statement(ASH)), Arrived(statement(CEDAR, 0, OTHER)), Arrived(statement(BIRCH)))
    state = after(state, Arrived(statement(CEDAR)))
    assert (state.phase, state.round) == (Phase.TRAIN, 1)


def test_a_trained_checkpoint_is_pushed_and_the_full_set_awaited():
    state, actions = step(agreed(), Trained(checkpoint(ASH)))
    assert state.phase is Phase.COLLECT
    assert state.missing == (BIRCH, CEDAR)
    assert {Push(1, BIRCH), Push(1, CEDAR)} <= set(actions)
    assert not any(isinstance(a, Train) for a in actions)


def test_the_full_set_is_fused_in_one_action_that_names_every_checkpoint():
    assert Fuse(1, {p: sha(p, 1) for p in (ASH, BIRCH, CEDAR)}) in todo(fusing())


def test_checkpoints_that_arrive_while_this_node_still_trains_are_kept():
    state = after(agreed(), Arrived(checkpoint(CEDAR)), Arrived(checkpoint(BIRCH)))
    assert (state.phase, state.missing) == (Phase.TRAIN, (ASH,))
    assert after(state, Trained(checkpoint(ASH))).phase is Phase.FUSE


def test_the_next_round_trains_from_the_fused_model_and_remembers_the_manifests_behind_it():
    state = second_round()
    assert (state.phase, state.round, state.base) == (Phase.TRAIN, 2, FUSED1)
    assert state.inputs == INPUTS1
    assert not set(INPUTS1.values()) & {sha(p, 1) for p in (ASH, BIRCH, CEDAR)}
    assert state.have == {}


def test_after_the_planned_rounds_the_last_fusion_is_agreed_upon():
    state = last_agreement()
    assert (state.phase, state.round) == (Phase.AGREE, 3)
    assert Declare(3, OTHER) in todo(state)


def test_the_run_is_finished_when_all_state_the_same_last_fusion():
    state = after(last_agreement(), *(Arrived(statement(p, 3, OTHER, INPUTS2)) for p in (BIRCH, CEDAR)))
    assert state.phase is Phase.AGREE
    state = after(state, Trained(statement(ASH, 3, OTHER, INPUTS2)))
    assert state.phase is Phase.FINISHED


def test_a_finished_node_still_delivers_what_it_owes():
    state = after(last_agreement(), Trained(statement(ASH, 3, OTHER, INPUTS2)))
    state = after(state, *(Arrived(statement(p, 3, OTHER, INPUTS2)) for p in (BIRCH, CEDAR)))
    assert todo(state) == (Push(3, BIRCH), Push(3, CEDAR))
    assert todo(after(state, Delivered(BIRCH, 3), Delivered(CEDAR, 3))) == ()


@pytest.mark.parametrize(("plateaus", "phase"), [("all", Phase.AGREE), ("all but one", Phase.TRAIN)])
def test_the_run_ends_early_only_when_every_peer_has_plateaued(plateaus, phase):
    state = after(agreed(), Trained(checkpoint(ASH, plateau=True)), Arrived(checkpoint(BIRCH, plateau=True)))
    state = after(state, Arrived(checkpoint(CEDAR, plateau=plateaus == "all")), Fused(1, FUSED1))
    assert (state.phase, state.round) == (phase, 2)


# ------------------------------------------------------------------ early, late, twice


def test_a_checkpoint_of_the_next_round_waits_until_that_round_begins():
    state = after(collecting(), Arrived(checkpoint(BIRCH)))
    state = after(state, Arrived(checkpoint(BIRCH, 2, FUSED1, INPUTS1)))
    assert state.have[BIRCH] == checkpoint(BIRCH)
    state = after(state, Arrived(checkpoint(CEDAR)), Fused(1, FUSED1))
    assert state.have == {BIRCH: checkpoint(BIRCH, 2, FUSED1, INPUTS1)}
    assert state.early == {}


def test_a_first_checkpoint_that_overtakes_a_statement_waits_too():
    state = after(START, Trained(statement(ASH)), Arrived(statement(BIRCH)), Arrived(checkpoint(BIRCH)))
    state = after(state, Arrived(statement(CEDAR)))
    assert (state.round, state.have) == (1, {BIRCH: checkpoint(BIRCH)})


@pytest.mark.parametrize("late", [statement(BIRCH), checkpoint(BIRCH), replace(checkpoint(BIRCH), sha256=OTHER)])
def test_threat_10_a_late_checkpoint_of_an_old_round_is_ignored(late):
    assert after(second_round(), Arrived(late)) == second_round()


def test_a_checkpoint_that_arrives_twice_counts_once():
    once = after(collecting(), Arrived(checkpoint(BIRCH)))
    assert after(once, Arrived(checkpoint(BIRCH))) == once


def test_what_a_crash_makes_a_peer_deliver_again_is_no_second_face():
    """Neither in this round, nor one round early, nor where this node has halted; also after a restart of ours."""
    early = checkpoint(BIRCH, 2, FUSED1, INPUTS1)
    stopped = after(second_round(), Arrived(statement(CEDAR, 2, FUSED1, INPUTS1, halted=True)), Arrived(early))
    for state, claim in (
        (after(agreed(), Arrived(checkpoint(BIRCH))), checkpoint(BIRCH)),
        (after(collecting(), Arrived(early)), early),
        (stopped, early),
    ):
        restored = from_json(json.loads(json.dumps(to_json(state))))
        assert after(restored, Arrived(signed(claim))) == state


def test_what_a_peer_has_lost_after_its_receipt_is_owed_again_until_the_next_receipt():
    lost = after(collecting(), Delivered(BIRCH, 1), Forgotten(BIRCH, 1))
    assert lost == after(lost, Forgotten(BIRCH, 1)) == collecting()
    ended = replace(lost, phase=Phase.FINISHED)
    assert Push(1, BIRCH) in todo(after(ended, Forgotten(BIRCH, 1)))


def test_results_that_are_said_twice_change_nothing():
    assert after(collecting(), Trained(checkpoint(ASH))) == collecting()
    assert after(second_round(), Fused(1, FUSED1)) == second_round()
    assert after(collecting(), Delivered(BIRCH, 1), Delivered(BIRCH, 1)) == after(collecting(), Delivered(BIRCH, 1))


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (START, Trained(checkpoint(ASH))),  # trained before anybody agreed
        (START, Trained(statement(ASH, 0, OTHER))),  # stands on another model than the state says
        (START, Trained(statement(BIRCH))),  # somebody else's statement as mine
        (START, Trained(statement(ASH, halted=True))),  # says that it halted, and has not
        (agreed(), Fused(1, FUSED1)),  # fused without the full set
        (agreed(), Trained(checkpoint(ASH, 1, OTHER))),  # trained from another base
        (collecting(), Trained(replace(checkpoint(ASH), sha256=OTHER))),  # a second checkpoint for one round
        (agreed(), Arrived(checkpoint(BIRCH, 3))),  # two rounds ahead passed the receiver's window
    ],
)
def test_what_cannot_happen_is_a_named_bug_not_a_silent_state(state, event):
    with pytest.raises(UnexpectedEvent):
        step(state, event)


# ------------------------------------------------------------------ deliveries


def test_a_receipt_ends_the_delivery_to_that_peer_only():
    state = after(agreed(), Delivered(BIRCH, 0))
    assert [a for a in todo(state) if isinstance(a, Push)] == [Push(0, CEDAR)]


def test_a_peers_next_checkpoint_is_as_good_as_its_receipt():
    state = after(collecting(), Arrived(checkpoint(BIRCH)))
    assert Push(0, BIRCH) not in todo(state)
    assert Push(1, BIRCH) in todo(state)


def test_a_checkpoint_two_rounds_on_proves_that_both_earlier_ones_arrived():
    """The peer's round 1 is still under way to us while its round 2 is here."""
    state = after(collecting(), Arrived(checkpoint(BIRCH, 2, FUSED1, INPUTS1)))
    assert [a for a in todo(state) if isinstance(a, Push) and a.peer == BIRCH] == []


def test_an_undelivered_checkpoint_of_the_last_round_is_still_owed_in_the_next():
    assert {Push(1, BIRCH), Push(1, CEDAR)} <= set(todo(second_round()))


# ------------------------------------------------------------------ restart


@pytest.mark.parametrize(
    "state",
    [START, agreed(), collecting(), fusing(), second_round(), last_agreement()],
    ids=lambda s: f"{s.phase}{s.round}",
)
def test_what_is_to_do_after_a_restart_follows_from_the_saved_state_alone(state):
    state = replace(state, early={BIRCH: checkpoint(BIRCH, 9)}, reason="why")
    restored = from_json(json.loads(json.dumps(to_json(state))))
    assert restored == state
    assert todo(restored) == todo(state)
