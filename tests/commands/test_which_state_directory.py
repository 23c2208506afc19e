"""Which state directory a command works on, and how a hint names it."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import made, shell

from hsl_node.admin import doctor, enrol
from hsl_node.host.hints import addressed, command, default_state, nothing_here


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


def test_a_services_directory_that_may_not_be_looked_at_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume that another user mounted denies even that to everybody else."""

    class Closed:
        def is_dir(self) -> bool:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr("hsl_node.host.hints.SYSTEM_STATE", Closed())
    assert default_state() == tmp_path / ".local" / "state" / "hsl-node"


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
    enrol.init(there, name="ash", address="127.0.0.1:9001", listen=None, data=tmp_path)
    assert f"{us} start`" in shell("pause", "--state", there).stderr
    assert f"{us} federation join FILE`" in shell("--state", there, "peer", "list").stderr
    checks = {check.name: check for check in doctor.examine(there)}
    assert f"{us} data check`" in checks["images"].text
    assert f"{us} federation join FILE`" in checks["federation"].fix


def test_where_the_state_is_as_usual_a_hint_is_short(tmp_path: Path) -> None:
    done = shell("status", HSL_NODE_STATE=str(tmp_path))
    assert done.returncode == 10 and "`hsl-node init`" in done.stderr


def test_a_node_in_the_home_stays_the_one_that_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`init` by root before the service's directory was there; once somebody made it, `status` said "no node here"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    system, own = tmp_path / "system", tmp_path / ".local" / "state" / "hsl-node"
    monkeypatch.setattr("hsl_node.host.hints.SYSTEM_STATE", system)
    made(own)
    system.mkdir()
    assert default_state() == own
    made(system, "birch", 9002)
    assert default_state() == system, "the service's own node comes first"
    (system / "node.toml").unlink()
    assert f"a node is at {own}: --state {own}" in nothing_here(system)
