"""Whom to ask, and when: pauses that double, and who shows itself is asked soon."""

from __future__ import annotations

from inbox_site import BIRCH

from hsl_node.host.pace import Pace
from hsl_node.node.peers.pacing import Turns

ASKED_AT = 1000.0


def turns_of(*, reached: bool, times: int = 9) -> Turns:
    """birch has been asked so often that it is left alone for 600 s; last at ASKED_AT."""
    turns = Turns(Pace(4, 600), 5.0)
    turns.ask(BIRCH, 0.0)
    for _ in range(times):
        turns.begin(BIRCH)
        turns.asked(BIRCH, ASKED_AT, reached=reached)
    return turns


def next_turn(turns: Turns) -> float:
    low, high = 0.0, 10_000.0
    while high - low > 0.5:
        middle = (low + high) / 2
        low, high = (low, middle) if turns.due(middle) else (middle, high)
    return round(high)


def test_pauses_double_up_to_the_longest() -> None:
    seen = [next_turn(turns_of(reached=True, times=n)) - ASKED_AT for n in range(1, 10)]
    assert seen == [4, 8, 16, 32, 64, 128, 256, 512, 600]


def test_a_peer_that_was_down_is_asked_soon_after_it_connects_however_long_it_was_away() -> None:
    turns = turns_of(reached=False)
    assert next_turn(turns) == ASKED_AT + 600
    turns.connected(BIRCH, ASKED_AT + 100)
    assert next_turn(turns) == ASKED_AT + 105


def test_a_peer_that_connects_while_it_is_asked_in_vain_is_asked_soon() -> None:
    turns = turns_of(reached=False)
    turns.begin(BIRCH)
    turns.connected(BIRCH, 2000.0)
    turns.asked(BIRCH, 2030.0, reached=False)
    assert next_turn(turns) == 2035


def test_a_peer_that_answers_and_connects_again_and_again_is_not_asked_more_often() -> None:
    turns = turns_of(reached=True)
    for second in range(500):
        turns.connected(BIRCH, ASKED_AT + second)
    assert next_turn(turns) == ASKED_AT + 600


def test_who_is_not_to_be_asked_is_forgotten() -> None:
    turns = turns_of(reached=False)
    turns.keep(())
    turns.connected(BIRCH, 2000.0)
    assert BIRCH not in turns and turns.due(10_000.0) == []
    turns.ask(BIRCH, 3000.0)
    turns.asked(BIRCH, 3000.0, reached=True)
    assert next_turn(turns) == 3004, "pauses begin anew"
