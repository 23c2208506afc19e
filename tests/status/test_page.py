"""The text of the status page: what is wrong comes first, it fits 80 columns, and any part may be unknown."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from snapshots import NOW, line_of, peer, snapshot

from hsl_node.host.units import age, duration, progress, size, table
from hsl_node.node.poisoning import SIGNS
from hsl_node.status.page import _SIGNS, Look, fetch, render
from hsl_node.status.snapshot import Snapshot, from_json, leaving


def page(look: Look = Look(), **more: Any) -> list[str]:
    return render(from_json(snapshot(**more)), now=NOW, look=look).splitlines()


# ------------------------------------------------------------------ the text


def test_warnings_come_first_with_what_to_do() -> None:
    lines = page()
    assert lines[0].startswith("! kyoto sent what fails a check (sha256)")
    assert lines[2] == "  what to do: kept in quarantine; the peer is asked for it again"
    assert lines.index("") < next(i for i, line in enumerate(lines) if line.startswith("mercy"))


def test_signs_are_the_alarms_that_only_may_mean_something() -> None:
    assert {*_SIGNS} == {*SIGNS, "validation"}


def test_a_run_that_ended_early_says_why() -> None:
    complete = lambda r: line_of(page(round=r, rounds=60, phase="finished", state="finished"), "round")  # noqa: E731
    assert complete(61) == "round        60 of 60 fused; the run is complete"
    assert complete(9) == "round        8 of 60 fused; the run is complete: all had reached their plateau"


def test_what_stops_the_node_stands_above_signs_that_a_person_is_to_judge(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ["halted", "influence ash", "validation", "room", "influence birch", "keys ash", "disk", "paused"]
    warnings = [{"code": code, "text": code, "since": None, "fix": ""} for code in order]
    monkeypatch.setattr("hsl_node.status.page.ask", lambda state, op: {"status": snapshot(warnings=warnings)})
    shown = [w.code for w in fetch(state).warnings]
    assert shown == ["halted", "room", "keys ash", "disk", "paused", "influence ash", "validation", "influence birch"]


def test_it_says_whom_it_waits_for_and_since_when() -> None:
    lines = page()
    assert line_of(lines, "mercy").startswith("mercy  waiting since ") and "(14 min)" in line_of(lines, "mercy")
    assert line_of(lines, "waiting for") == "waiting for  st-josef-krankenhaus, ucl, kyoto, for 14 min"


def test_each_peer_has_its_bytes_its_rate_and_its_trouble() -> None:
    lines = page()
    assert line_of(lines, "ucl").split() == [
        "ucl",
        "-",
        "12.0/94.7",
        "MB",
        "3.1",
        "MB/s",
        "60.0/94.7",
        "MB",
        "500",
        "kB/s",
        "2",
        "s",
    ]
    assert line_of(lines, "charite").split()[1:] == [
        "-",
        "94.7",
        "MB",
        "delivered",
        "94.7",
        "MB,",
        "AUC",
        "0.853",
        "now",
    ]
    legend = "AUC: that hospital's checkpoint of this round on its own validation images, as"
    assert legend in lines and lines[lines.index(legend) + 1] == "it says"
    at = lines.index(line_of(lines, "st-jose"))
    trouble = " ".join(line.strip() for line in lines[at + 1 : at + 3])
    assert "Connection refused" in trouble and "next try in 42 s" in trouble and "1.0 MB sent twice" in trouble


@pytest.mark.parametrize(
    ("life", "word", "below"),
    [
        ({"state": "alive", "heard": NOW - 20}, "alive", ""),
        ({"state": "down", "since": NOW - 480}, "down", "  └ no sign of life since "),
        ({"state": "paused", "since": NOW - 7200}, "paused", "  └ paused by its operator since "),
        ({"state": "unknown"}, "unknown", ""),
    ],
)
def test_each_peer_is_alive_down_paused_or_unknown_and_when_it_was_seen_last_is_told_beside_that(
    life: dict[str, Any], word: str, below: str
) -> None:
    lines = page(peers=[peer("ada", {}, {}, life=life), peer("bob", {}, {})])
    at = lines.index(line_of(lines, "ada"))
    assert lines[at].split()[:2] == ["ada", word] and lines[at].endswith("11 min")
    if below:
        assert lines[at + 1].startswith(below) and lines[at + 1].endswith(
            {"down": "(8 min)", "paused": "(2 h 00 min)"}[word]
        )
    else:
        assert lines[at + 1].startswith("bob")


def test_last_aucs_stand_in_columns_of_rounds() -> None:
    lines = page()
    at = lines.index("validation AUC on this site's images")
    assert [line.split()[-3:] for line in lines[at + 1 : at + 4]] == [
        ["1", "2", "3"],
        ["0.810", "0.820", "0.830"],
        ["0.840", "0.850", "-"],
    ]


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("bars", [False, True])
def test_no_line_is_wider_than_the_terminal(width: int, bars: bool) -> None:
    long = "a" + "n" * 30 + "z"
    many = [{"round": r, "own": 0.5, "fused": 0.5} for r in range(1, 100)]
    lines = page(Look(width=width, bars=bars), node=long, peers=[*snapshot()["peers"], peer(long, {}, {})], scores=many)
    assert max(len(line) for line in lines) <= max(width, 75)


def test_columns_are_aligned() -> None:
    lines = page()
    header = line_of(lines, "peer")
    for name in ("charite", "ucl", "kyoto"):
        row = line_of(lines, name)
        for title in ("sent", "received", "last seen"):
            at = header.index(title)
            assert row[at] != " " and row[at - 1] == " "


def test_without_colour_there_is_no_escape_and_with_it_the_text_is_the_same() -> None:
    plain, coloured = "\n".join(page()), "\n".join(page(Look(colour=True)))
    assert "\x1b" not in plain
    assert coloured != plain and re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


def test_a_terminal_without_unicode_gets_ascii_bars() -> None:
    assert "[" not in "\n".join(page(Look(unicode=False, bars=True), peers=snapshot()["peers"][2:])).replace(
        "\\x1b[", ""
    )
    "\n".join(page(Look(unicode=False, bars=True), peers=snapshot()["peers"][2:])).encode("ascii")


def test_threat_20_what_peers_choose_cannot_move_the_cursor() -> None:
    evil = "\x1b[2J\r\nnot a row\u202e"
    lines = page(
        warnings=[{"code": "x", "text": evil, "since": None, "fix": evil}],
        peers=[peer("ash", {"state": "waiting to retry", "last_error": evil, "next_try_s": 1.0}, {})],
        federation=snapshot()["federation"] | {"name": evil, "task": evil},
    )
    assert not any(unicodedata.category(c).startswith("C") for line in lines for c in line)
    assert not any(line.strip() == "not a row" for line in lines)


@pytest.mark.parametrize(
    "bare", ["epoch", "busy", "disk", "device", "trainer", "last_fused", "model", "waiting_since", "since"]
)
def test_any_part_may_be_unknown(bare: str) -> None:
    assert page(**{bare: None})


def test_a_fresh_daemon_has_little_to_say_and_says_it() -> None:
    lines = page(
        state="starting", round=None, phase=None, peers=[], scores=[], warnings=[], waiting_for=[], epoch=None,
        busy=None, last_fused=None, model=None, disk=None, device=None, instance=None,
    )  # fmt: skip
    assert lines[0].startswith("mercy  starting") and "round        not begun" in lines


@pytest.mark.parametrize(
    ("state", "said"),
    [("starting", "being taken up where the journal left it"), ("recovering", "known when the peers")],
)
def test_a_node_that_was_in_a_round_before_does_not_say_that_none_has_begun(state: str, said: str) -> None:
    assert line_of(page(state=state, round=None, phase=None), "round").removeprefix("round").strip().startswith(said)


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (94_700_000, "94.7 MB"), (999_960_000, "1.0 GB")]
)
def test_sizes(count: int, shown: str) -> None:
    assert size(count) == shown


def test_durations_and_progress() -> None:
    assert [duration(s) for s in (0.4, 119, 120, 7200, 7260, 86400 * 3 + 3600 * 4)] == [
        "0 s", "119 s", "2 min", "2 h 00 min", "2 h 01 min", "3 d 4 h",
    ]  # fmt: skip
    assert [age(s) for s in (-5, 119, 121, 7200, 48 * 3600)] == ["0 s", "119 s", "2 min", "2 h", "2 d"]
    assert progress(45_200_000, 94_700_000) == "45.2/94.7 MB" and progress(0, 150_000_000) == "0/150 MB"


def test_threat_20_a_table_shows_no_cell_that_a_terminal_obeys() -> None:
    """A journal may hold receipts from before their codes were looked at."""
    shown = table(("peer", "receipt"), [("birch", "\x1b[2J\x07ok\nfake"), ("cedar", "accepted")])
    assert shown.split("\n") == ["peer   receipt", "birch  \\x1b[2J\\x07ok\\nfake", "cedar  accepted"]


# ------------------------------------------------------------------ schema 1


def test_the_json_of_a_snapshot_has_its_keys_in_their_order_and_is_read_back_as_it_was() -> None:
    found = from_json(snapshot())
    assert json.dumps(found.as_json()) == json.dumps(snapshot())
    assert from_json(json.loads(json.dumps(from_json(snapshot()).as_json()))) == from_json(snapshot())
    revoked = from_json(snapshot(peers=[peer("ash", {}, {}, revoked=False)]))
    assert list(revoked.as_json()["peers"][0])[:5] == ["name", "address", "fingerprint", "revoked", "connected"]


def test_what_another_version_of_the_daemon_tells_or_leaves_out_is_no_error() -> None:
    """While hsl-node is upgraded the old daemon runs on."""
    told = snapshot(novelty={"a": [1]}) | {"disk": {"free": 7, "need": None, "used": 3}}
    del told["still_to_do"]
    assert from_json(told) == from_json(snapshot(still_to_do=None, disk={"free": 7, "need": None}))


def test_threat_19_of_a_snapshot_no_free_text_may_leave() -> None:
    """Else a path in a warning would be in the support bundle. Who adds a field decides, here too."""
    names = {key for part in parts_of(from_json(snapshot()).as_json()) for key in part} | {"how", "at"}
    stays = {"reason", "task", "event", "what", "address", "last_error", "text", "fix", "next"}
    assert names - leaving(Snapshot) == stays
    untold = {"revoked", "deliver_to", "validate", "heard", "clock_s"}
    assert leaving(Snapshot) - names == untold, "that one has none to tell"


def parts_of(value: Any) -> list[dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(value, list | tuple):
        return [part for one in value for part in parts_of(one)]
    return [value, *(part for one in value.values() for part in parts_of(one))] if isinstance(value, dict) else []


def test_the_page_of_a_stopped_node_says_how_old_it_is() -> None:
    first = page(state="stopped", since=NOW - 3 * 86400)[0]
    assert first.startswith("not running") and re.search(r"last written \d{4}-\d\d-\d\d \d\d:\d\d \(3 d ago\)", first)


# ------------------------------------------------------------------ a screen that does not scroll


def alarms(count: int) -> list[dict[str, Any]]:
    return [{"code": f"x {n}", "text": f"alarm {n} " + "words " * 30, "since": NOW - 60, "fix": "do " * 40}
            for n in range(count)]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("hospitals", [1, 4, 63])
def test_a_screen_of_24_lines_holds_the_page_however_many_alarms_and_hospitals(count: int, hospitals: int) -> None:
    row = snapshot()["peers"][1]
    many = from_json(snapshot(warnings=alarms(count), peers=[row | {"name": f"p{n}"} for n in range(hospitals)]))
    lines = render(many, now=NOW, look=Look(bars=True), height=22).splitlines()
    assert len(lines) <= 22
    assert line_of(lines, "mercy") and line_of(lines, "waiting for") and line_of(lines, "peer") and line_of(lines, "p0")
    if count:
        assert lines[0].startswith("! alarm 0 words")
    if count == 40:
        assert any(re.fullmatch(r"and \d\d more alarms; `hsl-node status` has all", line) for line in lines)
    if hospitals == 63:
        assert any(re.fullmatch(r"and \d\d more hospitals", line) for line in lines)


def test_what_is_left_out_on_a_small_screen_is_counted_right() -> None:
    few = from_json(snapshot(warnings=alarms(6), peers=[peer("ada", {}, {})], scores=[]))
    whole = render(few, now=NOW).splitlines()
    assert render(few, now=NOW, height=len(whole)).splitlines() == whole
    lines = render(few, now=NOW, height=len(whole) - len(alarms(6)) * 4).splitlines()
    shown = [line for line in lines if line.startswith("! ")]
    rest = next((int(line.split()[1]) for line in lines if line.startswith("and ")), 0)
    assert len(shown) + rest == 6 and all(line.endswith(" …") for line in shown)
