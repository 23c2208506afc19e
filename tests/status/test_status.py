"""The status page: what is wrong comes first, it fits 80 columns, and with the daemon down the journal speaks."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from control_server import serving
from snapshots import NOW, peer, snapshot

from hsl_node.admin import enrol, support_bundle
from hsl_node.cli import main, plain_status
from hsl_node.errors import NotInitialised, NotRunning
from hsl_node.federation.names import Digest, Peer
from hsl_node.host.units import age, duration, progress, size, table
from hsl_node.node.alarms import Alarms
from hsl_node.node.training import Training
from hsl_node.status import history
from hsl_node.status.page import Look, fetch, render
from hsl_node.status.recorded import from_journal
from hsl_node.status.snapshot import Snapshot, from_json, leaving
from hsl_node.sync.store.layout import Layout
from hsl_node.sync.store.store import Store

CLI = [sys.executable, "-m", "hsl_node"]


def page(look: Look = Look(), **more: Any) -> list[str]:
    return render(from_json(snapshot(**more)), now=NOW, look=look).splitlines()


def line_of(lines: list[str], start: str) -> str:
    return next(line for line in lines if line.startswith(start))


# ------------------------------------------------------------------ the text


def test_warnings_come_first_with_what_to_do() -> None:
    lines = page()
    assert lines[0].startswith("! kyoto sent what fails a check (sha256)")
    assert lines[2] == "  what to do: kept in quarantine; the peer is asked for it again"
    assert lines.index("") < next(i for i, line in enumerate(lines) if line.startswith("mercy"))


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
        "94.7",
        "MB",
        "delivered",
        "94.7",
        "MB",
        "verified",
        "0.853",
        "now",
    ]
    at = lines.index(line_of(lines, "st-jose"))
    trouble = " ".join(line.strip() for line in lines[at + 1 : at + 3])
    assert "Connection refused" in trouble and "next try in 42 s" in trouble and "1.0 MB sent twice" in trouble


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
    many = [{"round": r, "local": 0.5, "fused": 0.5} for r in range(1, 100)]
    lines = page(Look(width=width, bars=bars), node=long, peers=[*snapshot()["peers"], peer(long, {}, {})], aucs=many)
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
    "bare", ["epoch", "busy", "disk", "device", "trainer", "last_fused", "best", "waiting_since", "since"]
)
def test_any_part_may_be_unknown(bare: str) -> None:
    assert page(**{bare: None})


def test_a_fresh_daemon_has_little_to_say_and_says_it() -> None:
    lines = page(
        state="starting", round=None, phase=None, peers=[], aucs=[], warnings=[], waiting_for=[], epoch=None, busy=None,
        last_fused=None, best=None, disk=None, device=None, instance=None,
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
    stays = {"reason", "task", "event", "what", "address", "last_error", "text", "fix"}
    assert names - leaving(Snapshot) == stays
    assert leaving(Snapshot) - names == {"revoked", "deliver_to", "validate"}, "that one has none to tell"


def parts_of(value: Any) -> list[dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(value, list | tuple):
        return [part for one in value for part in parts_of(one)]
    return [value, *(part for one in value.values() for part in parts_of(one))] if isinstance(value, dict) else []


# ------------------------------------------------------------------ with the daemon down


@pytest.fixture
def state(tmp_path: Path) -> Path:
    enrol.init(tmp_path / "ash", name="ash", address="127.0.0.1:9001", listen=None, data=None)
    return tmp_path / "ash"


def status(state: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*CLI, "--state", str(state), "status", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def in_round_2(state: Path) -> None:
    """A journal in which round 1 is fused, round 2 trained and delivered to birch; cedar's has not come."""
    store = Store(Layout(state))
    journal = store.journal
    content = {"auc": 0.8, "bytes": 5_000_000, "samples": 10, "software": "x"}
    for round, name, auc in ((1, "ash", 0.7), (1, "birch", 0.6), (2, "ash", 0.75), (2, "birch", 0.65)):
        journal.record_manifest(round, Peer(name), "d" * 64, b"", content | {"auc": auc})
    journal.record_fused(1, Digest("f" * 64))
    journal.record_validation(1, 0.9, 0.1)
    journal.record_receipt(2, Peer("birch"), True, "accepted", "", b"")
    journal.record_phase(2, "collect")
    journal.note("warning", "refused sha256", "cedar: wrong digest")
    journal.set_meta("federation", "abcdef01" + "0" * 56)
    claims = {n: {"sha256": "d" * 64} for n in ("ash", "birch")}
    journal.save_state(
        {"me": "ash", "peers": ["ash", "birch", "cedar"], "rounds": 3, "round": 2, "phase": "collect", "reason": "",
         "have": claims, "owed": [[2, "cedar"]]}
    )  # fmt: skip
    store.close()


def test_daemon_down_says_so_first_and_exits_3(state: Path) -> None:
    in_round_2(state)
    done = status(state)
    lines = done.stdout.splitlines()
    assert done.returncode == 3
    assert lines[0].startswith("not running  below is what the journal knows, last written ")
    assert line_of(lines, "ash") == "ash  stopped"
    assert line_of(lines, "peer").endswith("last file"), "connections are not in the journal"
    assert line_of(lines, "round").endswith("2 of 3, phase collect")
    assert line_of(lines, "waiting for").startswith("waiting for  cedar")
    assert "! cedar: wrong digest" in done.stdout
    assert line_of(lines, "birch").split()[1:6] == ["delivered", "5.0", "MB", "verified", "0.650"]
    assert line_of(lines, "own model").split()[2:] == ["0.700", "0.750"]


def test_daemon_down_json_has_the_keys_of_the_live_one_and_exits_3(state: Path) -> None:
    in_round_2(state)
    done = status(state, "--json")
    assert done.returncode == 3
    found = json.loads(done.stdout)
    assert (found["schema"], found["state"], found["node"], found["epoch"]) == (1, "stopped", "ash", None)
    assert found["waiting_for"] == ["cedar"] and found["federation"]["hash"] == "abcdef01"
    assert found["best"] == {"round": 1, "sha256": "f" * 64}
    assert found.keys() == snapshot().keys()
    assert found["peers"][0].keys() == snapshot()["peers"][0].keys()
    assert found["peers"][0]["sent"].keys() == snapshot()["peers"][0]["sent"].keys()


@pytest.mark.parametrize("read", [lambda s: from_journal(s).as_json(), history.rounds, support_bundle._rounds])
def test_what_is_read_of_a_long_run_takes_no_memory_for_what_is_not_shown(
    state: Path, read: Callable[[Path], dict[str, Any] | list[Any]]
) -> None:
    """Each manifest names all peers: 40 rounds of 40 peers name 64,000, which are 16 MB in memory."""
    in_round_2(state)
    names = [f"p{n}" for n in range(39)]
    content = {"auc": 0.8, "bytes": 5, "samples": 1, "software": "x", "inputs": {n: "e" * 64 for n in ("ash", *names)}}
    store = Store(Layout(state))
    with store.journal.transaction():
        for round in range(3, 43):
            store.journal.record_phase(round, "train")
            for name in ("ash", *names):
                store.journal.record_manifest(round, Peer(name), "d" * 64, b"", content)
    store.journal.save_state((store.journal.state() or {}) | {"peers": ["ash", *names], "round": 42})
    store.close()
    read(state)  # what is imported for it
    tracemalloc.start()
    try:
        found = read(state)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_500_000
    assert len(found) > 3


def test_warnings_about_the_images_end_where_the_next_trainer_gives_fewer() -> None:
    """A trainer that is started anew has looked at the images anew."""
    journal: Any = SimpleNamespace(set_meta=lambda *_: None, transaction=contextlib.nullcontext)
    here: Any = SimpleNamespace(journal=journal, layout=Layout(Path("nowhere")))
    training = Training(here, alarms := Alarms(), None)
    event = {"event": "initialised", "images": {"train": 1}, "versions": {"torch": "2"}, "device": "cpu"}
    for warnings in (["a", "b", "c"], ["b"], ["b", "d"], []):
        training._heard({**event, "warnings": warnings})
        assert [a["text"] for a in alarms.listing()] == warnings


def test_never_started_is_said_and_exits_3(state: Path) -> None:
    done = status(state)
    assert done.returncode == 3 and "has not been started here" in done.stdout


def test_a_halted_run_shows_its_reason_while_down(state: Path) -> None:
    in_round_2(state)
    store = Store(Layout(state))
    store.journal.save_state((store.journal.state() or {}) | {"phase": "halted", "reason": "birch signed two things"})
    store.close()
    assert status(state).stdout.splitlines()[2].startswith("! birch signed two things")


def test_elsewhere_it_is_not_initialised(tmp_path: Path) -> None:
    with pytest.raises(NotInitialised):
        fetch(tmp_path)
    assert status(tmp_path).returncode == 10


def test_the_page_of_a_stopped_node_says_how_old_it_is() -> None:
    first = page(state="stopped", since=NOW - 3 * 86400)[0]
    assert first.startswith("not running") and re.search(r"last written \d{4}-\d\d-\d\d \d\d:\d\d \(3 d ago\)", first)


FORMS = [
    ([], ["status"]),
    ([], ["status", "--json"]),
    ([], ["status", "--frobnicate"]),
    ([], ["status", "--json", "--json"]),
    ([], ["status", "--watch"]),
    ([], ["status", "--help"]),
    ([], ["status", "extra"]),
    ([], ["--", "status"]),
    (["--state", "elsewhere"], ["status"]),
    (["--state="], ["status"]),
    (["--state", ""], ["status", "--json"]),
]


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize(("options", "words"), FORMS)
def test_the_short_way_and_the_parser_print_the_same(
    state: Path, options: list[str], words: list[str], alive: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Every form of `status`, through `main` and through the parser: output, errors and exit code."""
    in_round_2(state)
    monkeypatch.setenv("HSL_NODE_STATE", str(state))
    monkeypatch.chdir(state.parent)
    monkeypatch.setattr("time.time", lambda: NOW)
    usage = shutil.disk_usage(state)  # other programs write meanwhile
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr("hsl_node.host.control.ask", ask := Asked(alive))
    monkeypatch.setattr("hsl_node.status.page.ask", ask)
    ways = []
    for short_cut in (True, False):
        monkeypatch.setattr("hsl_node.cli.plain_status", plain_status if short_cut else lambda words: None)
        with pytest.raises(SystemExit) as left:
            main([*options, *words])
        ways.append((left.value.code or 0, capsys.readouterr()))
    assert ways[0] == ways[1]
    assert ways[0][1].out or ways[0][1].err


class Asked:
    """Stands in for the daemon, or for its absence."""

    def __init__(self, alive: bool) -> None:
        self.alive = alive

    def __call__(self, state: Path, op: str) -> dict[str, Any]:
        if not self.alive:
            raise NotRunning("down")
        return {"status": snapshot()}


@pytest.mark.parametrize(
    ("words", "asks"),
    [
        (["status"], {"json": False}),
        (["status", "--json"], {"json": True}),
        (["status", "--watch"], None),
        (["status", "-h"], None),
        (["--json", "status"], None),
        ([], None),
    ],
)
def test_only_the_plain_forms_take_the_short_way(words: list[str], asks: dict[str, bool] | None) -> None:
    assert plain_status(words) == asks


def test_a_reader_that_leaves_early_is_no_bug(state: Path) -> None:
    in_round_2(state)
    ours, theirs = os.pipe()
    os.close(ours)
    for arguments in ([], ["--json"]):
        command = [*CLI, "--state", str(state), "status", *arguments]
        done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (1, "")
    os.close(theirs)


def test_status_and_help_load_nothing_slow(state: Path) -> None:
    in_round_2(state)
    code = (
        "import sys\nfrom hsl_node.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as e: assert e.code in (0, 3), e.code\n"
        "slow = {'torch', 'numpy', 'asyncssh', 'paramiko', 'asyncio', 'rich', 'pydantic', 'typer'}\n"
        "slow |= {'hsl_node.federation.config'}\n"
        "print(sorted(slow & set(sys.modules)), file=sys.stderr)"
    )
    for arguments, loaded in (
        (["status"], "[]"),
        (["status", "--json"], "[]"),
        (["--help"], "['typer']"),
        (["federation", "create", "--help"], "['pydantic', 'typer']"),  # typer has it convert the --state before
        (["version"], "['pydantic', 'typer']"),
    ):
        command = [sys.executable, "-c", code, "--state", str(state), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr.strip() == loaded, arguments


# ------------------------------------------------------------------ with a daemon


async def daemon(op: str, request: dict[str, Any]) -> dict[str, Any]:
    return {"status": snapshot()}


def test_a_running_daemon_is_shown_live_and_exits_0(state: Path) -> None:
    with serving(state, daemon):
        done = status(state)
        assert done.returncode == 0 and "waiting for  st-josef" in done.stdout
        assert json.loads(status(state, "--json").stdout) == snapshot()


def test_into_a_pipe_goes_no_colour(state: Path) -> None:
    with serving(state, daemon):
        assert "\x1b" not in status(state).stdout


def on_a_terminal(command: list[str], until: str, **environment: str) -> tuple[int, str]:
    """Run on a pseudo-terminal until `until` shows; then Ctrl-C. Gives exit code and output."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "50", **environment},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    try:
        while until.encode() not in seen:
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        while block := _read(ours):
            seen += block
        return process.wait(60), seen.decode()
    finally:
        process.kill()
        os.close(ours)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other side is closed
        return b""


def test_watch_draws_bars_until_ctrl_c_and_leaves_with_130(state: Path) -> None:
    with serving(state, daemon):
        code, seen = on_a_terminal([*CLI, "--state", str(state), "status", "--watch"], until="Ctrl-C leaves")
    assert code == 130
    assert "█" in seen and "63%" in seen and "Traceback" not in seen
    assert seen.rstrip().endswith(("\x1b[?25h", "\x1b[?1049l")), "the terminal is left as it was found"


def test_watch_needs_a_terminal(state: Path) -> None:
    done = status(state, "--watch")
    assert done.returncode == 2 and "status --json" in done.stderr


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_colour_unless_no_color_is_set(state: Path, no_color: str, coloured: bool) -> None:
    with serving(state, daemon):
        _, seen = on_a_terminal([*CLI, "--state", str(state), "status"], until="fused", NO_COLOR=no_color)
    assert ("\x1b[" in seen) is coloured
