"""What is written about one peer is bounded, and what was left out is told."""

from __future__ import annotations

import logging

import pytest

from hsl_node.host.log_limit import LOG_LINES_PER_MINUTE, LogLimit


def test_threat_20_a_peer_gets_twenty_lines_a_minute_and_the_rest_is_told_as_a_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 100.0
    lines = LogLimit(LOG_LINES_PER_MINUTE, clock=lambda: now)
    assert sum(lines.allows("birch") for _ in range(1000)) == 20
    assert lines.allows("cedar")  # is not muted by what birch does
    now += 59
    assert not lines.allows("birch")
    lines.flush()
    assert caplog.records == []
    now += 1
    lines.flush()  # nobody has to come back for it
    (told,) = caplog.records
    assert (told.levelno, told.getMessage()) == (logging.WARNING, "and more like these")
    assert (told.__dict__["about"], told.__dict__["lines"]) == ("birch", 981)
    lines.flush()
    assert len(caplog.records) == 1
    assert lines.allows("birch")
