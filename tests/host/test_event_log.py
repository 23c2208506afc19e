"""The log file and its human twin: fields kept, strings made safe, rotation and a full disk survived."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hsl_node.errors import NotInitialised
from hsl_node.host import event_log
from hsl_node.host.layout import Layout

log = logging.getLogger("hsl_node.tests")


@pytest.fixture(autouse=True)
def undisturbed_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.fixture
def human(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What went to stderr since the last call."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)

    def said() -> str:
        written()
        return capfd.readouterr().err

    return said


def written() -> None:
    """Until the threads have written all that was logged."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def lines(state: Path) -> list[dict[str, Any]]:
    written()
    return [json.loads(line) for line in Layout(state).event_log.read_text().splitlines()]


def test_an_event_is_one_json_line_with_its_fields_and_one_human_line(tmp_path: Path, human: Callable[[], str]) -> None:
    event_log.setup(tmp_path)
    log.info("checkpoint verified", extra={"peer": "ash", "round": 7, "bytes": 94_700_000})
    (event,) = lines(tmp_path)
    assert event["event"] == "checkpoint verified" and event["level"] == "info"
    assert (event["peer"], event["round"], event["bytes"]) == ("ash", 7, 94_700_000)
    assert human().endswith("INFO    checkpoint verified  peer=ash round=7 bytes=94700000\n")


def test_the_file_is_private(tmp_path: Path, human: Callable[[], str]) -> None:
    event_log.setup(tmp_path)
    assert Layout(tmp_path).event_log.stat().st_mode & 0o777 == 0o600


def test_setting_up_twice_does_not_say_everything_twice(tmp_path: Path, human: Callable[[], str]) -> None:
    event_log.setup(tmp_path)
    event_log.setup(tmp_path)
    log.info("once")
    assert len(lines(tmp_path)) == 1 and human().count("once") == 1


def test_threat_20_a_peers_string_can_neither_colour_nor_break_a_line(tmp_path: Path, human: Callable[[], str]) -> None:
    event_log.setup(tmp_path)
    log.warning("refused", extra={"reason": "bad\x1b[31m\nERROR forged\x00"})
    said = human()
    assert "\x1b" not in said and said.count("\n") == 1
    assert lines(tmp_path)[0]["reason"] == "bad\\x1b[31m\\nERROR forged\\x00"


def test_threat_20_a_very_long_string_is_cut(tmp_path: Path, human: Callable[[], str]) -> None:
    event_log.setup(tmp_path)
    log.warning("refused", extra={"reason": "x" * 10**6})
    assert len(lines(tmp_path)[0]["reason"]) == event_log.TEXT_MAX


def test_a_traceback_shows_code_but_no_values(tmp_path: Path, human: Callable[[], str]) -> None:
    event_log.setup(tmp_path)
    patient = "".join(["Doe,", " Jane"])
    try:
        len(patient) / 0
    except ZeroDivisionError:
        log.exception("bug")
    (event,) = lines(tmp_path)
    assert event["traceback"][-1] == "ZeroDivisionError: division by zero"
    said = human()
    assert "\n  Traceback" in said and patient not in said and patient not in json.dumps(event)


def test_systemd_gets_the_priority_and_adds_the_time_itself(
    tmp_path: Path, human: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1234")
    event_log.setup(tmp_path)
    log.error("halted", extra={"reason": "peers disagree"})
    assert human() == "<3>halted  reason=peers disagree\n"


def test_a_full_disk_costs_the_line_and_nothing_else(tmp_path: Path, human: Callable[[], str]) -> None:
    Layout(tmp_path).event_log.parent.mkdir()
    Layout(tmp_path).event_log.symlink_to("/dev/full")
    event_log.setup(tmp_path)
    log.info("still here")
    said = human()
    assert "still here" in said and "Traceback" not in said


def test_a_torn_line_is_not_glued_to_the_next(tmp_path: Path, human: Callable[[], str]) -> None:
    Layout(tmp_path).event_log.parent.mkdir()
    Layout(tmp_path).event_log.write_text('{"event": "to')
    event_log.setup(tmp_path)
    log.info("whole")
    written()
    assert [event["event"] for event in event_log.tail(tmp_path, 5)] == ['{"event": "to', "whole"]


def test_after_it_was_moved_away_the_log_begins_a_new_file(tmp_path: Path, human: Callable[[], str]) -> None:
    event_log.setup(tmp_path)
    log.info("before")
    written()
    moved = Layout(tmp_path).event_log.rename(tmp_path / "moved")
    event_log.reopen()
    log.info("after")
    assert [e["event"] for e in lines(tmp_path)] == ["after"]
    assert json.loads(moved.read_text())["event"] == "before"


def test_a_closed_stderr_costs_nothing_but_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A terminal that was closed, `hsl-node start 2>&1 | head`: nobody needs to see to that."""
    before, (reader, pipe) = os.dup(2), os.pipe()
    os.close(reader)
    os.dup2(pipe, 2)
    try:
        event_log.setup(tmp_path)
        log.info("first")
        written()
        log.info("second")
        assert [e["event"] for e in lines(tmp_path)][::2] == ["first", "second"]
        assert event_log.blocked() == []
        event_log.finish()
        os.write(2, b"whatever the interpreter says last breaks nothing")
    finally:
        os.dup2(before, 2)
        for descriptor in (before, pipe):
            os.close(descriptor)


def test_what_is_said_after_the_end_of_the_log_waits_for_no_reader_either(tmp_path: Path) -> None:
    """The last error of a start that logged nothing, into a pipe that was full before."""
    before, (reader, pipe) = os.dup(2), os.pipe()
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"." * 4096)
    os.set_blocking(pipe, True)
    os.dup2(pipe, 2)
    try:
        event_log.setup(tmp_path)
        event_log.finish()
        os.write(2, b"Error: nobody hears it")
        assert os.readlink("/proc/self/fd/2") == "/dev/null"
    finally:
        os.dup2(before, 2)
        for descriptor in (before, reader, pipe):
            os.close(descriptor)


def test_the_last_events_reach_back_across_rotated_files(
    tmp_path: Path, human: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "FILE_MAX_BYTES", 600)
    event_log.setup(tmp_path)
    for n in range(20):
        log.info("event", extra={"n": n})
    written()
    assert Layout(tmp_path).event_log.with_name("hsl-node.log.1").exists()
    assert [event["n"] for event in event_log.tail(tmp_path, 12)] == list(range(8, 20))


def test_a_file_that_is_turned_over_meanwhile_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Layout(tmp_path).event_log
    path.parent.mkdir()
    path.write_text('{"n": 2}\n')
    path.with_name("hsl-node.log.1").write_text('{"n": 1}\n')
    really = Path.open

    def turned_over(self: Path, *args: Any, **options: Any) -> Any:
        file = really(self, *args, **options)
        if self.name.endswith(".1") and self.stat().st_size and path.stat().st_size:
            self.rename(path.with_name("hsl-node.log.2"))
            path.rename(self)
            path.touch()
        return file

    monkeypatch.setattr(Path, "open", turned_over)
    assert event_log.tail(tmp_path, 2)[-1] == {"n": 2}
    assert path.with_name("hsl-node.log.2").exists(), "it was turned over"


def test_a_line_torn_by_a_power_cut_is_shown_as_it_is(tmp_path: Path) -> None:
    Layout(tmp_path).event_log.parent.mkdir()
    Layout(tmp_path).event_log.write_text('{"event": "whole"}\n{"event": "to\x1brn')
    assert [event["event"] for event in event_log.tail(tmp_path, 5)] == ["whole", '{"event": "to\\x1brn']


def test_without_a_log_it_says_that_nothing_ran_here(tmp_path: Path) -> None:
    with pytest.raises(NotInitialised, match="no log at"):
        event_log.tail(tmp_path, 5)


def test_following_loses_no_event_over_rotations(
    tmp_path: Path, human: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "FILE_MAX_BYTES", 2000)
    event_log.setup(tmp_path)
    got: list[int] = []
    heard = threading.Event()

    def read() -> None:
        for event in event_log.follow(tmp_path):
            got.append(event["n"])
            heard.set()
            if event["n"] == 39:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while not heard.wait(0.02):  # it begins at the end of the file, whenever it opens it
        log.info("first", extra={"n": -1})
    for n in range(40):
        heard.clear()
        log.info("event", extra={"n": n})
        while got[-1] != n:
            assert heard.wait(30), f"event {n} was never seen"
            heard.clear()
    reader.join(30)
    assert [n for n in got if n >= 0] == list(range(40))
    assert Layout(tmp_path).event_log.with_name("hsl-node.log.1").exists(), "no rotation happened"
