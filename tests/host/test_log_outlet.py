"""A place that takes no log lines holds nobody up: what it misses is counted, and told where the gap is."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hsl_node.host import log_outlet
from hsl_node.host.log_outlet import NobodyReads, Outlet

Events = list[dict[str, Any]]


def gap(count: int) -> dict[str, Any]:
    return {"missing": count}


def numbered(count: int) -> Events:
    return [{"n": n} for n in range(count)]


class Valve:
    """A place to write to, shut at first."""

    def __init__(self) -> None:
        self.got: Events = []
        self.opened = threading.Event()
        self.tried = threading.Event()

    def write(self, event: dict[str, Any]) -> None:
        self.tried.set()
        assert self.opened.wait(60)
        self.got.append(event)


@pytest.fixture
def ten_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_outlet, "WAITING_MAX", 10)


def test_all_events_come_in_their_order() -> None:
    got: Events = []
    outlet = Outlet("test", got.append, gap)
    for event in numbered(500):
        outlet.take(event)
    assert outlet.flush(60)
    assert got == numbered(500) and outlet.find_blocked() is None


def test_a_place_that_takes_nothing_holds_nobody_up_and_the_gap_is_told_in_its_place(ten_wait: None) -> None:
    valve = Valve()
    outlet = Outlet("test", valve.write, gap)
    outlet.take({"n": 0})
    assert valve.tried.wait(60)  # the thread has taken this one off the queue, and stands
    for event in numbered(31)[1:]:
        outlet.take(event)
    blocked = outlet.find_blocked()
    assert blocked is not None and (blocked.outlet, blocked.left_out) == ("test", 20)
    assert not outlet.flush(0)
    valve.opened.set()
    assert outlet.flush(60)
    outlet.take({"n": "next"})
    assert outlet.flush(60)
    assert valve.got == [*numbered(11), {"missing": 20}, {"n": "next"}]
    assert outlet.find_blocked() is None


def test_a_slow_write_is_told_though_nothing_is_left_out_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_outlet, "STUCK_S", -1.0)
    valve = Valve()
    outlet = Outlet("test", valve.write, gap)
    assert outlet.find_blocked() is None, "nothing to write is no trouble"
    outlet.take({"n": 0})
    assert valve.tried.wait(60)
    blocked = outlet.find_blocked()
    assert blocked is not None and blocked.left_out == 0
    valve.opened.set()
    assert outlet.flush(60) and outlet.find_blocked() is None


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("a bug in one line")])
def test_what_cannot_be_written_is_counted_and_the_next_that_can_tells_it(error: Exception) -> None:
    got: Events = []

    def write(event: dict[str, Any]) -> None:
        if full:
            raise error
        got.append(event)

    full, outlet = True, Outlet("test", write, gap)
    for event in numbered(3):
        outlet.take(event)
    assert outlet.flush(60)
    blocked = outlet.find_blocked()
    assert blocked is not None and blocked.left_out == 3
    full = False
    outlet.take({"n": "next"})
    assert outlet.flush(60)
    assert got == [{"missing": 3}, {"n": "next"}] and outlet.find_blocked() is None


def test_a_place_that_nobody_reads_any_more_is_left_alone() -> None:
    """A closed terminal is no trouble that a person should see to."""
    tried: Events = []

    def write(event: dict[str, Any]) -> None:
        tried.append(event)
        raise NobodyReads("gone")

    outlet = Outlet("test", write, gap)
    for event in numbered(3):
        outlet.take(event)
        assert outlet.flush(60)
    assert tried == numbered(1) and outlet.gone and outlet.find_blocked() is None


def test_work_is_done_between_the_events_that_were_taken_before_and_after() -> None:
    got: Events = []
    outlet = Outlet("test", got.append, gap)
    outlet.take({"n": 0})
    work: Callable[[], object] = lambda: got.append({"work": len(got)})  # noqa: E731
    outlet.do(work)
    outlet.take({"n": 1})
    assert outlet.flush(60)
    assert got == [{"n": 0}, {"work": 1}, {"n": 1}]
