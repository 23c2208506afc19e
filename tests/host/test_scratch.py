"""A folder of a command: gone with it, or with the next one where it was killed; never under one that lives."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster

from hsl_node.federation.plan import Plan
from hsl_node.host import scratch

HOLD = """
import sys
from pathlib import Path
from hsl_node.host.scratch import scratch
with scratch(Path(sys.argv[1]), "work-") as folder:
    (folder / "file").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


def other(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that works in such a folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_killed_commands_folder_goes_with_the_next_and_a_living_ones_stays(tmp_path: Path) -> None:
    living, kept = other(tmp_path)
    killed, left = other(tmp_path)
    killed.kill()
    killed.wait()
    assert (left / "file").exists()
    (tmp_path / "mine").mkdir()
    with scratch.scratch(tmp_path, "work-") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert set(tmp_path.iterdir()) == {tmp_path / "mine", kept, folder}
    living.communicate("", timeout=60)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_a_folder_goes_though_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), scratch.scratch(tmp_path, "work-"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["made", "opened"])
def test_a_folder_that_another_command_clears_before_it_is_held_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Between its making and its lock nothing tells that somebody lives."""
    patched = os.open if moment == "made" else fcntl.flock
    name = (os, "open") if moment == "made" else (fcntl, "flock")
    cleared: list[Path] = []

    def first(*args: object) -> object:
        if not cleared:
            cleared.extend(tmp_path.iterdir())
            monkeypatch.setattr(*name, patched)
            scratch.clear(tmp_path, "work-")
        return patched(*args)  # type: ignore[operator]

    monkeypatch.setattr(*name, first)
    with scratch.scratch(tmp_path, "work-") as folder:
        assert list(tmp_path.iterdir()) == [folder]
        assert cleared and folder not in cleared


def test_without_locks_nothing_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / "work-old").mkdir()
    with scratch.scratch(tmp_path, "work-") as folder:
        assert folder.exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "work-old"]


def test_a_start_clears_what_a_killed_verify_left(tmp_path: Path) -> None:
    with Cluster(
        tmp_path, ("ash", "birch"), Plan(method="fedavg", rounds=1, epochs_per_round=1), trainer=[]
    ) as cluster:
        left = cluster.layout("ash").state / "run" / "verify-dead"
        left.mkdir()
        cluster.start("ash")
        cluster.wait_until("ash", lambda s: s["waiting_for"] == ["birch"], "started")
        assert not left.exists()
