"""From what the peers hold to the state to go on from, case by case. Pure; in any order: test_round_simulation.py."""

from __future__ import annotations

from dataclasses import replace

from claims import ASH, BIRCH, CEDAR, FUSED1, START, checkpoint, sha, statement

from hsl_node.sync.clones import RUNS_MAX, Runs
from hsl_node.sync.recovered import recovered, relied_on
from hsl_node.sync.round import Arrived, Phase, Proven, Push, Train, Trained, from_json, step, to_json, todo

INPUTS = {p: sha(p, 1) for p in (ASH, BIRCH, CEDAR)}
MINE1, MINE2 = checkpoint(ASH), checkpoint(ASH, 2, base=FUSED1, inputs=INPUTS)
AT2 = {BIRCH: 2, CEDAR: 2}


def test_who_signed_nothing_begins() -> None:
    assert recovered(START, {0: {BIRCH: statement(BIRCH)}}, {BIRCH: 0, CEDAR: 0}, ()) == START


def test_the_opening_statement_alone_means_the_opening() -> None:
    state = recovered(START, {0: {ASH: statement(ASH)}}, {BIRCH: 0, CEDAR: 0}, ())
    assert (state.phase, state.round, state.missing) == (Phase.AGREE, 0, (BIRCH, CEDAR))


def test_the_last_round_that_i_signed_is_gone_on_with_from_my_own_manifest() -> None:
    state = recovered(START, {1: {ASH: MINE1}, 2: {ASH: MINE2}}, AT2, {MINE2.sha256})
    assert (state.phase, state.round, state.base, state.inputs) == (Phase.COLLECT, 2, FUSED1, INPUTS)
    assert state.have == {ASH: MINE2}
    assert todo(state) == (Push(2, BIRCH), Push(2, CEDAR)), "not trained again"


def test_who_is_still_in_the_round_before_gets_that_one_first() -> None:
    kept = {MINE1.sha256, MINE2.sha256}
    state = recovered(START, {1: {ASH: MINE1}, 2: {ASH: MINE2}}, {BIRCH: 1, CEDAR: 2}, kept)
    assert todo(state) == (Push(1, BIRCH), Push(2, BIRCH), Push(2, CEDAR))


def test_a_signed_checkpoint_that_nobody_has_is_trained_again_from_the_same_base() -> None:
    state = recovered(START, {2: {ASH: MINE2}}, AT2, ())
    assert todo(state) == (Train(2, FUSED1),)
    assert state.inputs == INPUTS


def test_who_signed_a_round_whose_checkpoint_is_gone_states_nothing_else_for_it() -> None:
    """A peer halts meanwhile: a statement of mine would be my second manifest of that round."""
    state = recovered(START, {2: {ASH: MINE2}}, AT2, ())
    state, actions = step(state, Arrived(statement(BIRCH, 2, FUSED1, INPUTS, halted=True)))
    assert state.phase is Phase.HALTED and actions == ()
    assert from_json(to_json(state)) == state and todo(from_json(to_json(state))) == ()


def test_who_signed_a_round_whose_checkpoint_is_gone_trains_it_whatever_it_learns() -> None:
    """The others may have what it signed, and fuse it: it fuses too, and halts in the next round."""
    state = recovered(START, {2: {ASH: MINE2}}, AT2, ())
    state, actions = step(state, Proven(CEDAR, 2))
    assert "cedar signed two" in state.reason and actions == (Train(2, FUSED1),)
    state, actions = step(state, Trained(MINE2))
    assert state.phase is Phase.COLLECT and not state.signed
    assert actions == (Push(2, BIRCH), Push(2, CEDAR))


def test_the_statement_after_the_last_planned_round_is_the_end() -> None:
    end = statement(ASH, 3, base=FUSED1, inputs=INPUTS)
    state = recovered(START, {3: {ASH: end}}, {BIRCH: 3, CEDAR: 3}, ())
    assert (state.phase, state.base) == (Phase.AGREE, FUSED1)


def test_a_statement_that_says_so_means_that_i_had_halted() -> None:
    halted = statement(ASH, 2, base=FUSED1, inputs=INPUTS, halted=True)
    state = recovered(START, {2: {ASH: halted}}, AT2, ())
    assert (state.phase, state.round) == (Phase.HALTED, 2)
    assert "halted in round 2" in state.reason
    assert from_json(to_json(state)) == state


def test_a_state_relies_on_the_checkpoints_it_has_and_owes() -> None:
    state = recovered(START, {1: {ASH: MINE1}, 2: {ASH: MINE2}}, {BIRCH: 1, CEDAR: 2}, {MINE1.sha256, MINE2.sha256})
    early = replace(state, early={BIRCH: checkpoint(BIRCH, 3)})
    assert relied_on(early) == {(1, ASH), (2, ASH), (3, BIRCH)}


def test_a_state_relies_on_what_it_will_fuse_and_after_that_on_its_own_alone() -> None:
    """Whose checkpoint of the round must lie in the inbox: everybody's until it is fused, nobody's once it is over."""
    state = replace(START, round=2, base=FUSED1, inputs=INPUTS, have={ASH: MINE2, BIRCH: checkpoint(BIRCH, 2)})
    for phase in (Phase.TRAIN, Phase.COLLECT, Phase.FUSE):
        assert relied_on(replace(state, phase=phase)) == {(2, ASH), (2, BIRCH)}, phase
    for phase in (Phase.AGREE, Phase.FINISHED, Phase.HALTED):
        assert relied_on(replace(state, phase=phase)) == {(2, ASH)}, phase


def seen(runs: Runs, run: str) -> bool:
    return runs.seen(run, runs.login())


def test_threat_12_a_process_that_comes_back_after_another_one_is_one_of_two() -> None:
    runs = Runs()
    assert [seen(runs, r) for r in ("a", "a", "b", "b")] == [False] * 4, "a restart is none"
    assert [seen(runs, r) for r in ("a", "b", "a")] == [True] * 3
    assert not seen(runs, "c"), "one was stopped and the other restarted"
    assert seen(runs, "b"), "the other one lives after all"


def test_a_dead_process_whose_login_arrives_after_its_successors_is_not_one_of_two() -> None:
    """Held up by the network: a last packet of the login, or the first request after it."""
    runs = Runs()
    assert not seen(runs, "a")
    early = runs.login()  # a's, which asks for something only later
    assert not seen(runs, "b")
    runs.login()  # a's as well, and nobody lives to answer it
    assert [seen(runs, "b"), runs.seen("a", early), seen(runs, "b")] == [False] * 3


def test_a_peer_that_restarts_for_ever_takes_no_memory() -> None:
    runs = Runs()
    for number in range(10 * RUNS_MAX):
        assert not seen(runs, f"{number}")
    assert len(runs._spans) == RUNS_MAX
