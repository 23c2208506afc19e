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


def test_a_closed_standard_stream_is_not_the_next_file_that_is_opened(tmp_path: Path) -> None:
    """Else the log's lines for stderr would go into a checkpoint, or to a peer."""
    code = f"""
import os, sys
for number in (0, 1, 2):
    os.close(number)
sys.stdin = sys.stdout = sys.stderr = None  # as the interpreter starts then
from hsl_node.host import bare_host
bare_host.complete()
print("nobody reads this", file=sys.stderr)
with open({str(tmp_path / "said")!r}, "w") as file:
    file.write(" ".join([str(file.fileno() > 2), *(os.readlink(f"/proc/self/fd/{{n}}") for n in (0, 1, 2))]))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert (tmp_path / "said").read_text() == "True /dev/null /dev/null /dev/null"
    status = f"{sys.executable} -m hsl_node --state {tmp_path} status <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", status]).returncode == 10, "nothing is there, and it can say so to nobody"


# As each daemon finds it; all of them take part to the end.
ODD = {
    "few open files": ("import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))", {}),
    "no folder for temporary files": ("", {"TMPDIR": "/nonexistent/tmp"}),
    "an open umask": ("import os\nos.umask(0)", {}),
    "no locale, and a time zone that nobody knows": (
        "",
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Nowhere/Odd:::"},
    ),
    "a clock before 1970": ("import time\n_now = time.time\ntime.time = lambda: _now() - 67 * 365 * 86_400", {}),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_host_takes_part(tmp_path: Path, odd: str) -> None:
    prelude, environment = ODD[odd]
    root = tmp_path / "Zustände mit Leerzeichen" / ("ü" * 60)  # longer than the name of a socket may be
    root.mkdir(parents=True)
    with Cluster(root, NAMES, PLAN, prelude=prelude) as cluster:
        for name in NAMES:
            cluster.start(name, **environment)
        cluster.wait_finished()
        assert len(final_digests(cluster)) == 2
        assert [cluster.stop(name) for name in NAMES] == [0, 0]
        made = [p for p in cluster.layout("ash").state.rglob("*") if p.name != "output.txt" and p.is_file()]
        ours = [p for p in made if p.name not in ("node.toml", "federation.toml")]  # of this test
        assert [p for p in ours if p.stat().st_mode & 0o077 and "receipts" not in p.parts] == []
