"""What a person should know is there when they look, and the log holds what else happened."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from hsl_node.federation.names import Peer
from hsl_node.host.log_limit import LOG_LINES_PER_MINUTE
from hsl_node.node.alarms import QUIET_S, Alarms
from hsl_node.node.daemon import Daemon
from hsl_node.sync.clones import Runs


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(caplog: pytest.LogCaptureFixture) -> Clock:
    caplog.set_level(logging.INFO, "hsl_node")
    return Clock()


def flap(alarms: Alarms, clock: Clock, code: str, times: int) -> None:
    for number in range(times):
        alarms.sound(code, f"reason {number}", "call them")
        clock.now += 0.1
        alarms.settle(code)


def test_what_was_raised_once_ends_with_its_cause(clock: Clock) -> None:
    alarms = Alarms(clock)
    alarms.sound("refused cedar", "bad", "call them")
    alarms.sound("refused cedar", "worse", "call them")
    (shown,) = alarms.listing()
    assert (shown["code"], shown["text"]) == ("refused cedar", "worse")
    alarms.settle("refused cedar")
    assert alarms.listing() == [] and "refused cedar" not in alarms


@pytest.mark.parametrize("code", ["refused cedar", "twice cedar", "twice", "refused by cedar", "lost cedar"])
def test_threat_20_what_a_peer_raises_and_settles_without_end_is_one_alarm_that_stays_and_few_lines(
    clock: Clock, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    """300 times in 30 s were 600 lines and, whenever somebody looked, most often nothing."""
    alarms = Alarms(clock)
    alarms.sound(code, "reason", "call them")
    first = alarms.listing()[0]["since"]
    alarms.settle(code)
    flap(alarms, clock, code, 299)
    assert code not in alarms, "it is not so now"
    (shown,) = alarms.listing()
    assert shown["text"].startswith("raised 300 times, over, ") and shown["text"].endswith(": reason 298")
    assert (shown["since"], shown["fix"]) == (first, "call them")
    events = [r.getMessage() for r in caplog.records]
    assert events == ["warning", "settled", "warning"]

    clock.now += QUIET_S - 1
    assert alarms.listing()
    alarms.sound(code, "again", "call them")
    assert [a["text"] for a in alarms.listing()] == ["raised 301 times: again"], "now it is so"
    alarms.settle(code)
    clock.now += QUIET_S
    alarms.expire()
    assert alarms.listing() == [] and len(caplog.records) == 4
    assert caplog.records[-1].getMessage() == "settled" and caplog.records[-1].__dict__["times"] == 301
    flap(alarms, clock, code, 1)
    assert alarms.listing() == [], "it begins anew"


def test_threat_20_an_alarm_has_so_many_lines_a_minute_and_the_rest_is_a_number(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """What is this node's own ends when it is mended, however often it came."""
    alarms = Alarms(clock)
    flap(alarms, clock, "disk", 100)
    assert alarms.listing() == [] and len(caplog.records) == LOG_LINES_PER_MINUTE
    alarms.sound("room", "little", "free some space")
    assert caplog.records[-1].__dict__["code"] == "room", "another alarm is not muted"
    clock.now += 60
    alarms.expire()
    told = caplog.records[-1].__dict__
    assert (told["msg"], told["about"], told["lines"]) == ("and more like these", "alarm disk", 180)


def test_threat_26_a_new_process_ends_the_alarm_of_a_clone_only_when_the_two_were_quiet_for_a_while(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """cedar logs in by turns as one process and as a new one: each new one settled the alarm."""
    node: Any = SimpleNamespace(alarms=Alarms(clock))
    runs, new = Runs(), iter(range(10**6))

    def log_in(run: str) -> None:
        clock.now += 1
        Daemon._seen_twice(node, Peer("cedar"), runs.seen(run, runs.login()))

    for run in ("one", "two", "one"):
        log_in(run)
    assert "twice cedar" in node.alarms
    for _ in range(50):
        log_in(f"new {next(new)}")
        assert len(node.alarms.listing()) == 1
        log_in("one")
    assert [r.getMessage() for r in caplog.records] == ["warning"]

    log_in("restarted")
    (shown,) = node.alarms.listing()
    assert "over, shown until it was quiet for 5 minutes" in shown["text"]
    clock.now += QUIET_S / 2
    log_in("restarted")  # does not put it off
    clock.now += QUIET_S / 2
    assert node.alarms.listing() == []


def test_an_alarm_of_a_clone_that_came_once_is_held_as_well(clock: Clock) -> None:
    node: Any = SimpleNamespace(alarms=Alarms(clock))
    Daemon._seen_twice(node, Peer("cedar"), True)
    Daemon._seen_twice(node, Peer("cedar"), False)
    assert node.alarms.listing()
    clock.now += QUIET_S
    assert not node.alarms.listing()
