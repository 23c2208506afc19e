"""The plateau rule: when a hospital has nothing more to gain, by the best of what it could use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsl_node.federation.names import Digest, Peer
from hsl_node.sync.candidates import best_scores
from hsl_node.sync.plateau import plateaued
from hsl_node.sync.store.journal import Journal

ASH = Peer("ash")
some_scores = st.lists(st.none() | st.floats(-1e3, 1e3), max_size=12)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([], False),
        ([0.8, 0.8, 0.8], False),  # only two rounds could have improved
        ([0.8, 0.8, 0.8, 0.8], True),
        ([0.8, 0.803, 0.8035, 0.8039], True),  # 0.8 x 1.005 = 0.804: none reaches it
        ([0.8, 0.8, 0.8, 0.805], False),  # 0.6 % better in the last
        ([0.8, 0.9, 0.8, 0.8], False),  # 0.9 is one of the last three
        ([0.8, 0.9, 0.8, 0.8, 0.8], True),
        ([0.8, 0.9, 0.7, 0.75, 0.8], True),  # climbs again, but never past the best
        ([0.8, 0.803, 0.806, 0.809], False),  # each round under half a percent, together over one
        ([0.5, 0.5, 0.5, None], False),  # undefined can't show a plateau
        ([0.5, None, 0.5, 0.5], False),
        ([None, None, None, None], False),
        ([None, 0.8, 0.8, 0.8, 0.8], True),
        ([0.8, None, 0.8, 0.8, 0.8], True),
        ([-0.8, -0.8, -0.8, -0.8], True),  # a task whose score is a loss with a minus before it
        ([-0.8, -0.79, -0.79, -0.79], False),  # 1.25 % better
        ([-0.8, -0.81, -0.82, -0.83], True),  # worse
    ],
)
def test_three_rounds_whose_best_is_not_half_a_percent_better_than_before_are_a_plateau(scores, expected):
    assert plateaued(scores, rounds=3, improvement=0.005) is expected


def test_an_improvement_of_exactly_the_threshold_is_no_plateau():
    assert plateaued([0.5, 0.75], rounds=1, improvement=0.5) is False
    assert plateaued([0.5, 0.74], rounds=1, improvement=0.5) is True


@given(st.floats(0.01, 0.7), st.integers(1, 30))
def test_a_steady_rise_of_0_45_percent_a_round_goes_on(first, rounds):
    """It was called a plateau in round 4, in each of which there was something to gain."""
    scores = [first * 1.0045**n for n in range(rounds)]
    assert not plateaued(scores, rounds=3, improvement=0.005)


@given(some_scores, st.integers(1, 4), st.floats(0, 0.1), st.permutations(range(4)))
def test_only_the_best_of_the_last_rounds_counts_and_not_their_order(scores, rounds, improvement, order):
    last = scores[-rounds:]
    turned = scores[: len(scores) - len(last)] + [last[n] for n in order if n < len(last)]
    found = [plateaued(s, rounds=rounds, improvement=improvement) for s in (scores, turned)]
    assert found[0] is found[1]


@given(some_scores, st.integers(1, 4), st.floats(0, 0.1), st.floats(0.001, 1000))
def test_a_plateau_ends_where_the_last_round_is_better_than_all_by_far(scores, rounds, improvement, more):
    known = [abs(s) for s in scores if s is not None]
    assert not plateaued([*scores, max(known, default=0.0) * 3 + more], rounds=rounds, improvement=improvement)


def test_of_each_round_the_best_of_what_the_hospital_could_use_counts(tmp_path):
    """Own, fused or recalibrated: a fused model that is worse than the own one does not hide that the own one gains."""
    with Journal.create(tmp_path / "journal.sqlite3") as journal:
        for round, own in ((1, 0.7), (2, 0.8), (3, None), (4, 0.6)):
            journal.record_manifest(round, ASH, "a" * 64, b"", {"score": own, "bytes": 9})
        journal.record_manifest(5, ASH, "a" * 64, b"", {"score": None, "bytes": 0})  # a statement
        for round, fused, again in ((0, 0.99, 0.99), (1, 0.5, 0.75), (2, 0.5, 0.6), (3, None, None)):
            journal.record_fused(round, Digest(f"{round}" * 64))
            journal.record_validation(round, fused, 0.5, (again, None if again is None else 0.5))
        found = best_scores(journal.scores_of(ASH), journal.candidates())
        assert found == {1: 0.75, 2: 0.8, 3: None, 4: 0.6}
