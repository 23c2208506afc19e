"""Real daemons where a host lacks what most have: an account, a home, a locale, open standard streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster, final_digests

from hsl_node.federation.plan import Plan

PLAN = Plan(method="fedavg", fusion="mean", rounds=1, epochs_per_round=1)
NAMES = ("ash", "birch")
ACCOUNT = ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME")
# As in a container that runs with `--user 12345`: no entry in passwd, and nothing in the environment.
NO_ACCOUNT = f"""
import os, pwd
def _none(user):
    raise KeyError(f"getpwuid(): uid not found: {{user}}")
pwd.getpwuid = _none
for name in {ACCOUNT}:
    os.environ.pop(name, None)
"""


@pytest.mark.parametrize("client", ["asyncssh", "paramiko"])
def test_a_user_without_account_and_home_takes_part(tmp_path: Path, client: str) -> None:
    with Cluster(tmp_path, NAMES, PLAN, prelude=NO_ACCOUNT, node={"client": client}) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        assert len(final_digests(cluster)) == 2
        assert [cluster.stop(name) for name in NAMES] == [0, 0]


def test_a_command_of_such_a_user_needs_neither(tmp_path: Path) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        code = f"{NO_ACCOUNT}\nfrom hsl_node.cli import main\nmain({list(words)})"
        environment = {k: v for k, v in os.environ.items() if k not in ("HSL_NODE_STATE", "XDG_STATE_HOME")}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    state = str(tmp_path / "state")
    made = command("--state", state, "init", "--name", "ash", "--address", "ash.example.org:8922")
    assert made.returncode == 0, made.stderr
    assert command("--state", state, "status").returncode == 3
    # Without --state: the service's directory is the only one that such a user can mean.
    missing = command("status")
    assert (missing.returncode, "/var/lib/hsl-node" in missing.stderr) == (10, True), missing.stderr
