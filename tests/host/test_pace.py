"""Ever longer waits, by hand."""

from __future__ import annotations

from itertools import islice

from hsl_node.host.pace import Pace


def test_a_wait_doubles_up_to_the_longest_and_stays_there():
    assert [Pace(1, 60).after(n) for n in range(9)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert [*islice(Pace(1, 60).waits(), 3)] == [1, 2, 4]


def test_a_wait_may_grow_by_another_factor():
    assert [Pace(60, 3600, growth=10).after(n) for n in range(5)] == [0, 60, 600, 3600, 3600]


def test_for_ever_is_no_overflow():
    assert Pace(1, 60, growth=10).after(10**9) == 60
