"""A real daemon and signals: a reload ends nothing and takes what it can, others do nothing, an end names its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import WAIT_S, Cluster, warned

from hsl_node.federation.node_toml import NodeConfig
from hsl_node.federation.plan import Plan
from hsl_node.host import control
from hsl_node.node.reload import renewed

PLAN = Plan(method="fedavg", fusion="mean", rounds=1, epochs_per_round=1)
NAMES = ("ash", "birch")


def text_of(status: dict[str, Any], code: str) -> str:
    return next((w["text"] for w in status["warnings"] if w["code"] == code), "")


def test_a_reload_takes_what_it_can_names_what_waits_and_opens_the_log_anew(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        process, layout = cluster.start("ash"), cluster.layout("ash")
        cluster.wait_until("ash", lambda s: s["waiting_for"] == ["birch"], "waiting for birch")
        right = layout.node_toml.read_text()
        moved = layout.event_log.rename(layout.log / "moved.log")
        layout.node_toml.write_text(f'client = "paramiko"\n{right}\n[inbox]\nquota_mib = 64\n[train]\nthreads = 3\n')
        process.send_signal(signal.SIGHUP)
        told = cluster.wait_until("ash", lambda s: warned(s, "reload"), "the alarm about what waits")
        assert text_of(told, "reload").endswith("not taken before a restart: train.threads")
        layout.node_toml.write_text(f"colour = 1\n{right}")
        process.send_signal(signal.SIGHUP)
        told = cluster.wait_until("ash", lambda s: "not taken: " in text_of(s, "reload"), "the alarm about the file")
        assert "colour" in text_of(told, "reload") and "What to do" not in text_of(told, "reload")
        layout.node_toml.write_text(right)
        process.send_signal(signal.SIGHUP)
        cluster.wait_until("ash", lambda s: not warned(s, "reload"), "no alarm any more")
        assert process.poll() is None
        assert cluster.stop("ash") == 0  # then all lines are written, by whatever thread
        assert "reloaded" in layout.event_log.read_text() and "reloaded" not in moved.read_text()


def test_what_counts_after_a_reload_is_the_new_value_of_what_may_change_alone() -> None:
    running = NodeConfig(name="ash", address="ash.example.org:1")
    found = NodeConfig.model_validate(
        {"name": "ash", "address": "elsewhere.example.org:1", "client": "paramiko", "inbox": {"quota_mib": 64}}
    )
    taken, waiting = renewed(running, found)
    assert (taken.client, taken.inbox.quota_mib, taken.address) == ("paramiko", 64, "ash.example.org:1")
    assert waiting == ["address"]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_signals_that_nobody_expects_end_neither_daemon_nor_trainer(tmp_path: Path, name: str) -> None:
    number = signal.Signals[name]
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        process = cluster.start("ash")
        told = cluster.wait_until("ash", lambda s: s["waiting_for"] == ["birch"], "waiting for birch")
        process.send_signal(number)
        os.kill(told["trainer"]["pid"], number)
        later = cluster.status("ash")
        assert (later["pid"], later["trainer"]["pid"], later["trainer"]["restarts"]) == (
            process.pid,
            told["trainer"]["pid"],
            0,
        )


def shown(state: Path) -> str:
    command = [sys.executable, "-m", "hsl_node", "--state", str(state), "status"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def test_an_ordered_end_says_who_asked_for_it(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        state = cluster.layout("ash").state
        for number in (signal.SIGTERM, signal.SIGINT, None):
            process = cluster.start("ash")
            cluster.wait_until("ash", lambda s: s["waiting_for"] == ["birch"], "waiting for birch")
            if number is None:
                control.stop(state, WAIT_S)
            else:
                process.send_signal(number)
            assert process.wait(WAIT_S) == 0
            by = number.name if number else "`hsl-node stop`"
            first = shown(state).splitlines()[0]
            assert first.startswith("not running  stopped ") and first.endswith(f" ago), asked by {by}")
