"""The command line as its users meet it: help, exit codes, errors in words, and a bug that stays a bug."""

from __future__ import annotations

import asyncio
import errno
import functools
import hashlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncssh
import numpy as np
import pytest
import typer
from cluster import WAIT_S, Cluster
from PIL import Image
from ports import free_ports
from test_enrol import federation_file, made, run

from hsl_node import errors
from hsl_node.admin import doctor, enrol
from hsl_node.admin.ping import ping
from hsl_node.cli import _explain, main
from hsl_node.commands.app import app
from hsl_node.errors import DataError, LocalStateError, UsageError
from hsl_node.federation import config, identity, node_toml, strings
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.names import Digest, Peer
from hsl_node.federation.plan import Plan
from hsl_node.host import event_log, permissions
from hsl_node.host.hints import addressed, command, default_state
from hsl_node.host.terminal import print_json
from hsl_node.node.alarms import Alarms
from hsl_node.node.pulse import Pulse
from hsl_node.status import history
from hsl_node.sync.store.layout import Layout
from hsl_node.sync.store.room import Quota
from hsl_node.sync.store.store import Store

CLI = [sys.executable, "-m", "hsl_node"]


def shell(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program as a process: what a script sees."""
    return subprocess.run(
        [*CLI, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def commands() -> Iterator[list[str]]:
    """Every command there is, as its words."""

    def walk(group: typer.Typer, words: list[str]) -> Iterator[list[str]]:
        for one in group.registered_commands:
            assert one.callback is not None
            yield [*words, one.name or one.callback.__name__.replace("_", "-")]
        for inner in group.registered_groups:
            assert inner.typer_instance is not None and inner.name is not None
            yield from walk(inner.typer_instance, [*words, inner.name])

    return walk(app, [])


COMMANDS = sorted(" ".join(words) for words in commands())


def test_the_commands_are_these() -> None:
    single = (
        "init card start stop status pause resume logs doctor version evaluate predict export report demo "
        "backup restore recover verify"
    )
    grouped = {
        "federation": "create show join diff", "peer": "list ping revoke update", "key": "rotate updates",
        "anchor": "build verify", "data": "check",
        "round": "history show", "inbox": "provision",
    }  # fmt: skip
    expected = [
        *single.split(),
        "support-bundle",
        *(f"{group} {word}" for group, words in grouped.items() for word in words.split()),
    ]
    assert sorted(expected) == COMMANDS


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_explains_itself_with_an_example_that_names_it(words: str) -> None:
    done = run(*words.split(), "--help")
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    assert f"Example: hsl-node {words}" in text
    summary = done.stdout.splitlines()[2].strip()
    assert summary.endswith(".") and len(summary) < 80, "the first sentence is what the list of commands shows"


@pytest.mark.parametrize("words", COMMANDS)
def test_what_the_example_of_a_command_says_can_be_parsed(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options and arguments of the example exist: the help never shows what would be a usage error."""
    example = " ".join(run(*words.split(), "--help").stdout.split()).split("Example: hsl-node ")[1].split(" > ")[0]
    *groups, name = words.split()
    group = app
    for word in groups:
        group = next(g.typer_instance for g in group.registered_groups if g.name == word)  # type: ignore[misc]
    for one in group.registered_commands:
        if (one.name or one.callback.__name__) == name:  # type: ignore[union-attr]
            monkeypatch.setattr(one, "callback", _same_signature(one.callback))
    done = run(*shlex.split(example))
    assert done.exit_code == 0 and done.stdout == "parsed\n", done.output


def _same_signature(callback: Callable[..., Any] | None) -> Callable[..., Any]:
    assert callback is not None

    @functools.wraps(callback)
    def parsed(**options: Any) -> None:
        print("parsed")

    return parsed


def test_without_arguments_it_shows_the_help() -> None:
    done = shell()
    assert done.returncode == 2 and "Usage: hsl-node" in done.stderr


@pytest.mark.parametrize("words", [[], ["federation"], ["anchor"]])
def test_the_list_of_commands_fits_80_columns_without_cutting_a_sentence_short(words: list[str]) -> None:
    lines = shell(*words, "--help", COLUMNS="80").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("...") and not line.startswith("Usage")]


def test_the_help_names_every_command_once_under_its_panel() -> None:
    shown = [line.split()[0] for line in shell("--help").stdout.splitlines() if line.startswith("  ") and line.split()]
    for word in {words.split()[0] for words in COMMANDS}:
        assert shown.count(word) == 1, word


# ------------------------------------------------------------------ exit codes


def test_the_exit_codes_are_the_documented_ones() -> None:
    documented = {"NotRunning": 3, "NotInitialised": 10, "AlreadyRunning": 11, "KeyRefused": 12, "TransportError": 13,
                  "PeerDataError": 14, "LocalStateError": 15, "WaitTimeout": 16, "FederationMismatch": 17,
                  "ConfigError": 78, "UsageError": 2, "HslError": 1}  # fmt: skip
    assert {name: getattr(errors, name).exit_code for name in documented} == documented


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["frobnicate"], 2, "No such command"),
        (["status", "--frobnicate"], 2, "No such option"),
        (["init"], 2, "Missing option '--name'"),
        (["status"], 10, "holds no node.toml"),
        (["stop"], 3, "no hsl-node is running"),
        (["pause"], 3, "no hsl-node is running"),
        (["logs"], 10, "no log at"),
        (["start"], 10, "holds no node.toml"),
        (["round", "history"], 10, "no journal at"),
        (["doctor"], 10, ""),
        (["federation", "show", "absent.toml"], 78, "no such file"),
        (["init", "--name", "Mercy", "--address", "x"], 2, "is not a peer name"),
        (["anchor", "build", "--out", "x"], 2, "--digits"),
    ],
)
def test_what_goes_wrong_has_words_on_stderr_and_an_exit_code(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    done = shell("--state", tmp_path / "none", *arguments)
    assert done.returncode == code
    assert said in done.stderr and "Traceback" not in done.stderr
    if code not in (2, 10) or said.startswith("holds"):
        assert done.stderr.startswith("Error: ") and "\nWhat to do: " in done.stderr


def test_threat_27_a_configuration_error_names_file_line_key_and_remedy_and_exits_78(tmp_path: Path) -> None:
    state = made(tmp_path / "ash")
    text = (state / "node.toml").read_text().replace("address =", "adress =")
    (state / "node.toml").write_text(text)
    done = shell("--state", state, "start")
    assert done.returncode == 78
    line = next(n for n, line in enumerate(text.splitlines(), 1) if line.startswith("adress"))
    assert f"{state / 'node.toml'}:{line}: unknown key 'adress'; did you mean 'address'?" in done.stderr
    assert "What to do: " in done.stderr


def test_threat_20_json_and_errors_hold_nothing_that_a_terminal_obeys(tmp_path: Path, capsys: Any) -> None:
    """Also what is no ESC: some terminals begin a command with U+009B."""
    hostile = "\x1b[8m\x9b2J\x07\u202e"
    print_json({"software": hostile})
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "hsl-node.log").write_text(json.dumps({"event": hostile}, ensure_ascii=False) + "\n")
    shown = [capsys.readouterr().out, run("--state", tmp_path, "logs", "--json").stdout]
    for text in shown:
        assert text.isascii() and text.replace("\n", "").isprintable() and hostile in json.loads(text).values()
    assert _explain(errors.PeerDataError(f"one {hostile}\ntwo", code="x", remedy=hostile), tmp_path) == 14
    said = capsys.readouterr().err
    assert said.replace("\n", "").isprintable() and said.count("\n") == 3


def test_ctrl_c_exits_130(tmp_path: Path) -> None:
    event_log.log_path(tmp_path).parent.mkdir()
    event_log.log_path(tmp_path).write_text('{"event": "here"}\n')
    command = [*CLI, "--state", str(tmp_path), "logs", "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "here" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()


def test_a_reader_that_goes_away_is_no_bug(tmp_path: Path) -> None:
    event_log.log_path(tmp_path).parent.mkdir()
    event_log.log_path(tmp_path).write_text('{"event": "line"}\n' * 20_000)
    command = f"{' '.join(CLI)} --state {tmp_path} logs -n 20000 | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


def test_threat_19_a_bug_shows_its_traceback_without_the_values_of_variables() -> None:
    code = textwrap.dedent("""
        import sys
        from hsl_node.status import page
        from hsl_node.cli import main
        def broken(state):
            patient = "".join(["Doe", "Jane"])
            raise ZeroDivisionError("bug")
        page.fetch = broken
        main(["status"])
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ZeroDivisionError: bug") and "DoeJane" not in done.stderr


@pytest.mark.parametrize("code", ["ENOSPC", "EACCES", "EROFS", "EIO"])
def test_a_full_or_closed_disk_is_told_in_words(code: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    number = getattr(errno, code)

    def broken(state: Path) -> dict[str, Any]:
        raise OSError(number, os.strerror(number), "/srv/state")

    monkeypatch.setattr("hsl_node.status.page.fetch", broken)
    with pytest.raises(SystemExit) as caught:
        main(["status"])
    assert caught.value.code == 15
    said = capsys.readouterr().err
    told = f"Error: user {permissions.me()} may not use /srv/state: " if code == "EACCES" else "Error: /srv/state: "
    assert told in said and "What to do: " in said


def test_nothing_is_ever_asked_for() -> None:
    """Without a terminal a prompt would hang a script for ever: no option has one."""
    options = 0
    for words in commands():
        found: Any = typer.main.get_command(app)
        for word in words:
            found = found.commands[word]
        options += len(found.params)
        assert not [param.name for param in found.params if getattr(param, "prompt", None)]
    assert options > 40, "looked at nothing"


# ------------------------------------------------------------------ which state directory


def test_the_state_directory_may_be_named_before_or_after_the_command(tmp_path: Path) -> None:
    state = made(tmp_path / "ash")
    card = (state / "ash.card").read_text()
    assert shell("--state", state, "card").stdout == card
    assert shell("card", "--state", state).stdout == card
    assert shell("card", f"--state={state}").stdout == card
    assert shell("card", HSL_NODE_STATE=str(state)).stdout == card


def test_the_default_is_the_services_directory_if_it_is_ours_else_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    system = tmp_path / "system"
    monkeypatch.setattr("hsl_node.host.hints.SYSTEM_STATE", system)
    own = tmp_path / ".local" / "state" / "hsl-node"
    assert default_state() == own
    system.mkdir()
    assert default_state() == system
    monkeypatch.setattr("os.geteuid", lambda: system.stat().st_uid + 1)
    assert default_state() == own


def test_hints_name_the_state_directory_only_where_it_is_not_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HSL_NODE_STATE", str(tmp_path))
    assert command(tmp_path) == "hsl-node"
    assert command(tmp_path / "x") == f"hsl-node --state {tmp_path / 'x'}"


def test_a_hint_can_be_copied_as_it_stands_where_the_state_is_elsewhere(tmp_path: Path) -> None:
    there = tmp_path / "my state"
    us = f"`hsl-node --state '{there}'"
    assert addressed("`hsl-node stop`, or stop it", there) == f"{us} stop`, or stop it"
    assert addressed("hsl-node status there says why", there) == "hsl-node status there says why"
    lost = shell("--state", there, "status").stderr
    assert f"{us} init`" in lost and f"{us} restore FILE`" in lost
    assert f"{us} start`" in shell("pause", "--state", there).stderr
    enrol.init(there, name="ash", address="127.0.0.1:9001", listen=None, data=tmp_path)
    assert f"{us} federation join federation.toml`" in shell("--state", there, "peer", "list").stderr
    checks = {check.name: check for check in doctor.examine(there)}
    assert f"{us} data check`" in checks["images"].text
    assert f"{us} federation join federation.toml`" in checks["federation"].fix


def test_where_the_state_is_as_usual_a_hint_is_short(tmp_path: Path) -> None:
    done = shell("status", HSL_NODE_STATE=str(tmp_path))
    assert done.returncode == 10 and "`hsl-node init`" in done.stderr


# ------------------------------------------------------------------ images and anchor


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder per class, 20 images each."""
    rng = np.random.default_rng(1)
    for label in ("benign", "malignant"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for n in range(20):
            pixels = rng.integers(0, 255, (20, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{n}.png")
    return tmp_path / "images"


def test_data_check_counts_and_draws(tmp_path: Path, images: Path) -> None:
    state = tmp_path / "ash"
    enrol.init(state, name="ash", address="127.0.0.1:9001", listen=None, data=images)
    sheet = tmp_path / "sheet.png"
    options = ("--classes", "benign,malignant", "--image-size", "16")
    done = run("--state", state, "data", "check", *options, "--contact-sheet", sheet)
    assert done.exit_code == 0, done.output
    benign = next(line for line in done.stdout.splitlines() if line.startswith("benign"))
    assert benign.split() == ["benign", "12", "2", "6", "20"]
    assert done.stdout.rstrip().endswith(f"wrote {sheet}") and Image.open(sheet).width > 100
    found = json.loads(run("--state", state, "data", "check", *options, "--json").stdout)
    assert found["ok"] and found["images"] == 40


def test_data_check_says_what_prevents_training_and_exits_78(tmp_path: Path, images: Path) -> None:
    (images / "benign" / "0.png").write_bytes(b"no picture")
    state = tmp_path / "ash"
    enrol.init(state, name="ash", address="127.0.0.1:9001", listen=None, data=images)
    done = run("--state", state, "data", "check", "--classes", "benign,malignant", "--image-size", "16")
    assert done.exit_code == 78
    assert "problem: 1 images cannot be read" in done.stdout and "unreadable: " in done.stdout
    assert "not ready to train" in done.stdout


def test_anchor_build_makes_the_same_file_from_the_same_images(tmp_path: Path, images: Path) -> None:
    for name in ("a", "b"):
        options = ("--data", images, "--classes", "benign,malignant", "-n", "5", "--image-size", "16")
        done = run("anchor", "build", *options, "--out", tmp_path / name)
        assert done.exit_code == 0 and "10 images of 16 px" in done.stdout
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = run("anchor", "build", "--digits", "--out", tmp_path / "a")
    assert isinstance(again.exception, UsageError) and "nothing was changed" in str(again.exception)


# ------------------------------------------------------------------ rounds


def test_anchor_build_reads_a_table_with_names_of_its_own_as_its_errors_say(tmp_path: Path, images: Path) -> None:
    """Whoever builds an anchor set has no node.toml for it: each error names the option that helps."""
    table = tmp_path / "public.csv"
    rows = [f"{file.relative_to(tmp_path)},{file.parent.name},none" for file in sorted(images.rglob("*.png"))]
    table.write_text("\n".join(["file,dx,split", *rows]))
    words: list[str | Path] = ["anchor", "build", "--data", table, "--image-size", "16", "--out", tmp_path / "a"]
    for advice, then in (
        ("--column path=", ["--column", "path=file"]),
        ("--column label=", ["--column", "label=dx"]),
        ("--column split=", ["--column", "split="]),
        ("--classes: benign, malignant", ["--classes", "benign,malignant"]),
    ):
        done = run(*words, "--classes", "good,bad")
        assert isinstance(done.exception, DataError)
        assert advice in done.exception.remedy and "node.toml" not in str(done.exception), done.exception
        words += then
    assert "40 images of 16 px" in run(*words).stdout
    wrong = run("anchor", "build", "--data", table, "--classes", "a,b", "--out", tmp_path / "b", "--column", "dx")
    assert isinstance(wrong.exception, UsageError) and "--column label=dx" in wrong.exception.remedy


def test_round_history_and_show_read_the_journal(tmp_path: Path) -> None:
    state = made(tmp_path / "ash")
    journal = (store := Store(Layout(state))).journal
    journal.save_state({"me": "ash", "round": 1})
    content = {"bytes": 5_000_000, "samples": 10, "software": "x\x1b[31m\x9b2J"}
    for peer, auc in (("ash", 0.75), ("birch", None)):
        journal.record_manifest(1, Peer(peer), "d" * 64, b"", {**content, "auc": auc})
    journal.record_phase(0, "agree")
    for phase in ("train", "collect", "fuse"):
        journal.record_phase(1, phase)
    journal.record_epoch(1, 1, {"epoch": 1, "auc": 0.71, "loss_primary": 0.5})
    journal.record_receipt(1, Peer("birch"), True, "accepted", "", b"")
    journal.record_transfer(1, Peer("birch"), "sent", 5_000_000, 1_000_000, 2, 4.0)
    journal.record_fused(1, Digest("f" * 64))
    journal.record_validation(1, 0.9, 0.1)
    store.close()
    (line,) = run("--state", state, "round", "history").stdout.splitlines()[1:]
    assert line.split()[0] == "1" and line.split()[-8:] == ["6.0", "MB", "5.0", "MB", "0.750", "0.900", "f" * 12, "-"]
    shown = run("--state", state, "round", "show", "1").stdout
    birch = next(line for line in shown.splitlines() if line.startswith("birch "))
    signed = hashlib.sha256(canonical_json({**content, "auc": None}) + b"\n").hexdigest()[:12]
    assert birch.split() == ["birch", "d" * 12, signed, "-", "10", "-", "-", "accepted", "5.0", "MB", "4.0", "s", "2"]
    assert shown.replace("\n", "").isprintable() and "0.71" in shown
    plain = run("--state", state, "round", "show", "1", "--json").stdout
    assert json.loads(plain)["auc_fused"] == 0.9
    assert plain.isascii() and json.loads(plain)["peers"][0]["software"] == content["software"]
    assert isinstance(run("--state", state, "round", "show", "2").exception, UsageError)
    assert [r["round"] for r in history.rounds(state)] == [1]


def test_round_history_says_which_rounds_were_lost() -> None:
    """Rounds 1 and 2 went with a disk, round 4 between a backup and its restoration."""
    one = {"began": 0.0, "sha256": None, "auc_own": None, "auc_fused": None, "sent_bytes": 0, "received_bytes": 0}
    rounds = [{**one, "round": n, "seconds": dict.fromkeys(history.PHASES), "unusual": {}} for n in (3, 5)]
    assert history.text(rounds).splitlines()[-1].startswith("not in this journal: rounds 1, 2, 4, lost")
    assert "not in this journal" not in history.text([{**rounds[0], "round": 1}])


# ------------------------------------------------------------------ doctor and ping


@pytest.fixture
def two(tmp_path: Path, images: Path) -> tuple[Path, Path]:
    """ash and birch, enrolled with each other, on free ports."""
    states = []
    for name in ("ash", "birch"):
        address = f"127.0.0.1:{free_ports(1)[0]}"
        enrol.init(tmp_path / name, name=name, address=address, listen=address, data=images)
        states.append(tmp_path / name)
    path = federation_file(tmp_path, *states, classes=("benign", "malignant"))
    for state in states:
        enrol.join(state, path)
    return states[0], states[1]


def outcomes(state: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    return {check.name: check.outcome for check in doctor.examine(state)}


def beside(state: Path, work: Callable[[], Any], members: config.Federation | None = None) -> Any:
    """Do something while the real inbox of this node listens."""
    from hsl_node.sync.inbox.server import InboxServer

    node = node_toml.load_node(state)

    async def serving() -> Any:
        server = InboxServer(
            identity=identity.load(Layout(state).key), federation=members or config.load_federation(state),
            me=Peer(node.name), homes=Layout(state).homes, data_bytes=1000, on_commit=lambda peer: None,
            on_connect=lambda peer: None, on_fatal=lambda error: None,
        )  # fmt: skip
        await server.start(*strings.split_address(node.listen))
        try:
            return await asyncio.to_thread(work)
        finally:
            await server.stop()

    return asyncio.run(serving())


def test_doctor_finds_a_key_that_is_not_the_pinned_one(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that answers is not yet the peer."""
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    ash, birch = two
    pinned = strings.fingerprint(identity.load(Layout(birch).key).public)
    Layout(birch).key.unlink()
    identity.generate(Layout(birch).key)
    (check,) = [c for c in beside(birch, lambda: doctor.examine(ash)) if c.name == "peer birch"]
    assert (check.outcome, check.exit_code) == ("failed", 12)
    assert pinned in check.text and "peer update" in check.fix


def test_doctor_finds_a_sound_node_sound(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checks = beside(two[1], lambda: outcomes(two[0], monkeypatch))
    assert set(checks.values()) == {"ok"} and "peer birch" in checks
    assert doctor.exit_code(doctor.examine(two[0])) == 13, "birch is away now"


def test_doctor_proves_that_torch_computes() -> None:
    assert " on " in doctor._torch("auto")


@pytest.mark.parametrize(
    ("fault", "check", "code"),
    [
        (lambda s: s.chmod(0o755), "state directory", 15),
        (lambda s: (s / "node.toml").write_text("nmae = 1"), "settings", 78),
        (lambda s: Layout(s).key.chmod(0o644), "key", 15),
        (lambda s: Layout(s).key.unlink(), "key", 10),
        (lambda s: (s / "federation.toml").unlink(), "federation", 10),
        (lambda s: _edit(s / "node.toml", 'address = "127', 'address = "128'), "federation", 78),
        (lambda s: _edit(s / "node.toml", "/images", "/imagse"), "images", 15),
        (lambda s: _edit(s / "node.toml", 'listen = "127', 'listen = "192.0.2.1:1" # "'), "port", 15),
    ],
)
def test_doctor_names_what_is_broken(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], object], check: str, code: int
) -> None:
    fault(two[0])
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    checks = doctor.examine(two[0])
    first = next(c for c in checks if c.outcome == "failed")
    assert (first.name, first.exit_code) == (check, code) and first.fix
    assert doctor.exit_code(checks) == code
    assert first.fix.split()[0] in doctor.text(checks, colour=False)


@pytest.mark.parametrize("free", [3_900_000, 136_000_000, 268_500_000, 10**12])
def test_the_disk_is_not_sound_while_the_daemon_says_that_it_takes_no_checkpoint_in(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """Doctor, status, and the daemon's two alarms go by the same figures."""
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    monkeypatch.setattr("hsl_node.sync.store.store.shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    store, node = Store(Layout(two[0])), config.load_federation(two[0])
    with closing(store):
        store.layout.fused(0).write_bytes(bytes(100_000))
        daemon: Any = SimpleNamespace(
            store=store,
            layout=store.layout,
            schema=SimpleNamespace(file_bytes=100_000),
            federation=node,
            config=node_toml.load_node(two[0]),
            alarms=Alarms(),
        )
        Pulse(daemon)._watch_room()
        (disk,) = [c for c in doctor.examine(two[0]) if c.name == "disk"]
        refuses = "room" in daemon.alarms
        try:
            store.require_room(100_000, 2, Quota.reserve_bytes)
            starts = True
        except LocalStateError:
            starts = False
    assert (disk.outcome == "ok") == (starts and not refuses) == (free == 10**12), disk
    if refuses:
        assert disk.text == daemon.alarms.listing()[0]["text"] and disk.fix


def test_a_taken_port_has_the_same_exit_code_and_words_from_doctor_and_start(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(strings.split_address(node_toml.load_node(two[0]).listen)):
        monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
        check = next(c for c in doctor.examine(two[0]) if c.name == "port")
        started = shell("--state", two[0], "start")
    assert (check.outcome, check.exit_code, started.returncode) == ("failed", 15, 15)
    assert check.text in started.stderr and check.fix in started.stderr
    assert not (two[0] / "log" / "trainer.log").exists() and not Layout(two[0]).fused(0).exists()


def test_a_port_that_only_a_mapping_makes_right_is_noted(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    (port,) = free_ports(1)
    _edit(two[0] / "node.toml", f'listen = "{node_toml.load_node(two[0]).listen}"', f'listen = "127.0.0.1:{port}"')
    check = next(c for c in doctor.examine(two[0]) if c.name == "port")
    told = strings.split_address(node_toml.load_node(two[0]).address)[1]
    assert check.outcome == "warning" and str(port) in check.text and str(told) in check.text and check.fix


def test_the_note_about_the_ports_goes_when_a_peer_comes_in(tmp_path: Path) -> None:
    """Behind a mapping (here: birch is told the port where ash really listens) it is no fault."""
    with Cluster(tmp_path, ("ash", "birch"), Plan(method="fedavg", rounds=1, epochs_per_round=1)) as cluster:
        settings = cluster.layout("ash").state / "node.toml"
        _edit(settings, f'address = "127.0.0.1:{cluster.ports["ash"]}"', 'address = "127.0.0.1:1"')
        cluster.start("ash")
        noted = lambda s: any(w["code"] == "ports" for w in s["warnings"])  # noqa: E731
        cluster.wait_until("ash", lambda s: s["waiting_for"] == ["birch"], "waiting for birch")
        assert noted(cluster.status("ash"))
        cluster.start("birch")
        cluster.wait_finished()
        assert not noted(cluster.status("ash"))


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _another_key() -> str:
    return identity.Identity(asyncssh.generate_private_key("ssh-ed25519")).public


@pytest.mark.parametrize(
    ("fault", "check", "code"),
    [
        (lambda s: Layout(s).journal.write_bytes(random.Random(1).randbytes(8192)), "journal", 15),
        (lambda s: _edit(s / "federation.toml", "rounds = 1", "rounds = 2"), "journal", 17),
    ],
)
def test_what_start_refuses_doctor_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], object], check: str, code: int
) -> None:
    """A journal that is none any more, and a federation.toml that was edited in mid-run."""
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    with Cluster(tmp_path, ("ash", "birch"), Plan(method="fedavg", rounds=1, epochs_per_round=1)) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        assert cluster.stop("ash") == 0
        state = cluster.layout("ash").state
        sound = {c.name: c.outcome for c in doctor.examine(state)}
        assert sound["journal"] == "ok"
        for beside in state.glob("journal.sqlite3-*"):
            beside.unlink()
        fault(state)
        failed = next(c for c in doctor.examine(state) if c.name == check)
        assert (failed.outcome, failed.exit_code) == ("failed", code) and failed.fix
        assert cluster.start("ash").wait(WAIT_S) == code
        assert failed.text in cluster.output("ash")


def test_ping_logs_in_at_the_real_inbox_and_tells_refusal_from_absence(two: tuple[Path, Path]) -> None:
    ash, birch = two
    federation = config.load_federation(birch)
    serve = lambda members: beside(birch, lambda: ping(ash, []), members)  # noqa: E731
    (answer,) = serve(federation)
    assert answer.exit_code == 0 and answer.seconds > 0
    stranger = federation.get("ash").model_copy(update={"key": _another_key()})
    (answer,) = serve(federation.model_copy(update={"peer": (stranger, federation.get("birch"))}))
    assert answer.exit_code == 12 and "does not accept our key" in answer.error
    (answer,) = ping(ash, ["birch"])
    assert answer.exit_code == 13
    with pytest.raises(UsageError, match="is this node"):
        ping(ash, ["ash"])


# ------------------------------------------------------------------ a running daemon


def test_start_status_pause_resume_stop(tmp_path: Path) -> None:
    with Cluster(tmp_path, ("ash", "birch"), Plan(method="fedavg", rounds=1, epochs_per_round=1)) as cluster:
        state = cluster.layout("ash").state
        cluster.start("ash")
        cluster.wait_until("ash", lambda s: s["waiting_for"] == ["birch"], "waiting for birch")
        shown = shell("--state", state, "status")
        assert shown.returncode == 0 and "waiting for  birch" in shown.stdout
        second = shell("--state", state, "start")
        assert second.returncode == 11 and "holds" in second.stderr
        assert "it was not paused" in shell("--state", state, "resume").stdout
        assert shell("--state", state, "pause").stdout.startswith("paused: ")
        assert shell("--state", state, "pause").stdout.startswith("it is paused already: ")
        cluster.start("birch")
        paused = cluster.wait_until("ash", lambda s: s["state"] == "paused", "paused in round 1")
        (warning,) = [w for w in paused["warnings"] if w["code"] == "paused"]
        (later,) = [w for w in cluster.status("ash")["warnings"] if w["code"] == "paused"]
        assert warning["since"] == later["since"] <= paused["since"], "since it was asked to, not since it is looked at"
        assert shell("--state", state, "resume").stdout == "resumed\n"
        done = lambda s: s["state"] == "finished" and s["still_to_do"] is None  # noqa: E731
        cluster.wait_until("ash", done, "the end of the run")
        assert "nothing to pause" in shell("--state", state, "pause").stdout
        stopped = shell("--state", state, "stop")
        assert (stopped.returncode, stopped.stdout) == (0, "stopped: the daemon has left\n"), stopped.stderr
        assert cluster.processes["ash"].poll() == 0
        after = shell("--state", state, "status")
        assert after.returncode == 3 and "1 of 1 fused; the run is complete" in after.stdout
        assert shell("--state", state, "stop").returncode == 3


def test_stop_without_waiting_returns_while_the_daemon_still_saves(tmp_path: Path) -> None:
    from test_control import daemon

    with daemon(tmp_path, saves_for_s=60) as process:
        done = shell("--state", tmp_path, "stop", "--no-wait")
        assert (done.returncode, done.stdout) == (0, "stopping: the daemon was asked to leave\n")
        assert process.poll() is None
        process.kill()


def test_stop_waits_only_as_long_as_it_was_told(tmp_path: Path) -> None:
    from test_control import daemon

    with daemon(tmp_path, saves_for_s=60) as process:
        done = shell("--state", tmp_path, "stop", "--timeout", "0.2")
        assert done.returncode == 16 and "still running" in done.stderr and done.stdout == ""
        process.kill()
