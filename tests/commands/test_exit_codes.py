"""The command line when something goes wrong: exit codes, errors in words, and a bug that stays a bug."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import CLI, commands, made, run, shell

from hsl_node import errors
from hsl_node.cli import _explain, main
from hsl_node.commands.app import app
from hsl_node.host import permissions
from hsl_node.host.layout import Layout
from hsl_node.host.terminal import print_json


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
        (["predict", "-x.png"], 2, "is given as ./-NAME"),
        (["peer", "update", "f", "--fingerprint", "0123", "4567"], 2, "a value with spaces in it stands in quotes"),
        (["status", "--state"], 2, "--state needs a folder after it"),
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
    Layout(tmp_path).event_log.parent.mkdir()
    Layout(tmp_path).event_log.write_text('{"event": "here"}\n')
    command = [*CLI, "--state", str(tmp_path), "logs", "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "here" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()


def test_a_reader_that_goes_away_is_no_bug(tmp_path: Path) -> None:
    Layout(tmp_path).event_log.parent.mkdir()
    Layout(tmp_path).event_log.write_text('{"event": "line"}\n' * 20_000)
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


def test_stop_does_not_advise_to_start_what_is_stopped(tmp_path: Path) -> None:
    """A stopped node is what was asked for; a folder that holds no node is another matter."""
    stopped = shell("--state", made(tmp_path / "ash"), "stop")
    assert stopped.returncode == 3 and "there is nothing to stop" in stopped.stderr and "start" not in stopped.stderr
    elsewhere = shell("--state", tmp_path / "asch", "pause")
    assert elsewhere.returncode == 3 and "which holds no node.toml" in elsewhere.stderr
    assert "Or point --state at the right folder" in elsewhere.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("round show seven", "'seven' given, a whole number is expected"),
        ("logs -n ten", "'ten' given, a whole number is expected"),
        ("demo --hospitals 1", "needs 2 or more"),
        ("stop --timeout soon", "'soon' given, a number is expected"),
        ("inbox provision --for ftp", "'ftp' is not one of 'openssh', 'sftpgo'"),
    ],
)
def test_a_wrong_value_of_an_option_is_told_in_the_products_words(words: str, said: str) -> None:
    """The parser takes the validation library's sentences: "Input should be a valid integer, unable to parse"."""
    done = run(*words.split())
    assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.stderr
    assert "Input should" not in done.stderr and "Value error" not in done.stderr
