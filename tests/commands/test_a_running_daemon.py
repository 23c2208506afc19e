"""`status`, `pause`, `resume` and `stop` of a daemon that runs."""

from __future__ import annotations

from pathlib import Path

from cluster import Cluster
from command_line import shell

from hsl_node.federation.plan import Plan


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
    from control_server import daemon

    with daemon(tmp_path, saves_for_s=60) as process:
        done = shell("--state", tmp_path, "stop", "--no-wait")
        assert (done.returncode, done.stdout) == (0, "stopping: the daemon was asked to leave\n")
        assert process.poll() is None
        process.kill()


def test_stop_waits_only_as_long_as_it_was_told(tmp_path: Path) -> None:
    from control_server import daemon

    with daemon(tmp_path, saves_for_s=60) as process:
        done = shell("--state", tmp_path, "stop", "--timeout", "0.2")
        assert done.returncode == 16 and "still running" in done.stderr and done.stdout == ""
        process.kill()
