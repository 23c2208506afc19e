"""`hsl-node status`: with a daemon, with the daemon down, where the journal speaks, and on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import CLI
from control_server import serving
from snapshots import NOW, line_of, snapshot

from hsl_node.admin import support_bundle
from hsl_node.cli import main, plain_status
from hsl_node.errors import NotInitialised, NotRunning
from hsl_node.federation.names import Digest, Peer
from hsl_node.federation.plan import Plan
from hsl_node.host.layout import Layout
from hsl_node.node.alarms import Alarms
from hsl_node.node.training import Training
from hsl_node.status import history
from hsl_node.status.page import fetch
from hsl_node.status.recorded import from_journal
from hsl_node.sync.store.store import Store


def status(state: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*CLI, "--state", str(state), "status", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def in_round_2(state: Path) -> None:
    """A journal in which round 1 is fused, round 2 trained and delivered to birch; cedar's has not come."""
    store = Store(Layout(state))
    journal = store.journal
    content = {"score": 0.8, "said": {}, "bytes": 5_000_000, "samples": 10, "software": "x"}
    for round, name, auc in ((1, "ash", 0.7), (1, "birch", 0.6), (2, "ash", 0.75), (2, "birch", 0.65)):
        journal.record_manifest(round, Peer(name), "d" * 64, b"", content | {"score": auc})
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
    assert line_of(lines, "birch").split()[1:7] == ["-", "delivered", "5.0", "MB,", "AUC", "0.650"]
    assert line_of(lines, "own model").split()[2:] == ["0.700", "0.750"]


def test_daemon_down_json_has_the_keys_of_the_live_one_and_exits_3(state: Path) -> None:
    in_round_2(state)
    done = status(state, "--json")
    assert done.returncode == 3
    found = json.loads(done.stdout)
    assert (found["schema"], found["state"], found["node"], found["epoch"]) == (1, "stopped", "ash", None)
    assert found["waiting_for"] == ["cedar"] and found["federation"]["hash"] == "abcdef01"
    why = "fused model of round 1: best validation AUC here, 0.900"
    model = {"kind": "fused", "round": 1, "sha256": "f" * 64, "score": 0.9, "why": why}
    assert found["model"] == model and line_of(status(state).stdout.splitlines(), "your model").endswith(why)
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
    content = {
        "score": 0.8,
        "said": {},
        "bytes": 5,
        "samples": 1,
        "software": "x",
        "inputs": {n: "e" * 64 for n in ("ash", *names)},
    }
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
    here: Any = SimpleNamespace(
        journal=journal, layout=Layout(Path("nowhere")), federation=SimpleNamespace(plan=Plan())
    )
    training = Training(here, alarms := Alarms(), None)
    event = {"event": "initialised", "images": {"train": 1}, "versions": {"torch": "2"}, "device": "cpu"}
    for warnings in (["a", "b", "c"], ["b"], ["b", "d"], []):
        training._heard({**event, "warnings": warnings})
        assert [a["text"] for a in alarms.listing()] == warnings


def test_never_started_is_said_and_exits_3(state: Path) -> None:
    done = status(state)
    assert done.returncode == 3 and "has not been started here" in done.stdout
    assert "next: give your card to the others" in done.stdout and "federation join FILE" in done.stdout


def test_a_node_that_has_joined_or_is_to_recover_is_told_what_comes_next(state: Path) -> None:
    Layout(state).federation_toml.write_text("")
    assert "doctor" in from_journal(state).next and "start" in from_journal(state).next
    store = Store(Layout(state))
    store.journal.set_meta("recover", '{"why": "asked to", "without": []}')
    store.close()
    assert "asks its peers" in from_journal(state).next
    in_round_2(state)
    store = Store(Layout(state))
    store.journal.set_meta("recover", "null")
    store.close()
    assert from_journal(state).next == ""


def test_where_nothing_is_the_remedies_for_a_loss_stand_before_init(tmp_path: Path) -> None:
    said = " ".join(status(tmp_path).stderr.split())
    assert said.index("restore FILE") < said.index("recover --from-peers") < said.index("init`")


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


FORMS = [
    ([], ["status"]),
    ([], ["status", "--json"]),
    ([], ["status", "--check"]),
    ([], ["status", "--check", "--json"]),
    (["--state", "elsewhere"], ["status", "--check"]),
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
        (["status", "--check"], {"check": True}),
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
        (["status", "--check"], "[]"),
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
