"""Daemons whose stderr nobody reads, or whose log's disk is full: they go on, answer, say so, and leave when told."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cluster import Cluster, final_digests, warned

from hsl_node.federation.plan import Plan
from hsl_node.host import control

PLAN = Plan(method="fedavg", fusion="mean", rounds=2, epochs_per_round=1)
NAMES = ("ash", "birch")
# stderr is a pipe that is full from the start; this process holds its reading end too, so it never breaks.
FULL_PIPE = """
import os, sys
pipe = os.open(sys.argv[1] + "/stderr.fifo", os.O_RDWR | os.O_NONBLOCK)
try:
    while True:
        os.write(pipe, b"." * 4096)
except BlockingIOError:
    os.set_blocking(pipe, True)
os.dup2(pipe, 2)
"""
BRISK = """
from hsl_node.host import log_outlet
from hsl_node.node import pulse
pulse.PULSE_S, log_outlet.WAITING_MAX = 0.1, 10
"""


def test_stderr_that_nobody_reads_stops_neither_rounds_nor_status_nor_stop(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN, prelude=FULL_PIPE + BRISK) as cluster:
        fifos = {name: cluster.layout(name).state / "stderr.fifo" for name in NAMES}
        for fifo in fifos.values():
            os.mkfifo(fifo)
        cluster.start_all()
        cluster.wait_finished()
        final_digests(cluster)
        told = cluster.wait_until("ash", lambda s: warned(s, "log"), "alarm")
        (alarm,) = [w["text"] for w in told["warnings"] if w["code"] == "log"]
        assert alarm.startswith("stderr has taken no log line for ") and "left out so far" in alarm
        # Read again: the gap is told in it, and the alarm goes.
        with open(os.open(fifos["ash"], os.O_RDWR), encoding="utf-8", buffering=1) as reader:
            for line in reader:
                if "log lines are missing here" in line:
                    break
        assert "lines=" in line
        cluster.wait_until("ash", lambda s: not warned(s, "log"), "no alarm any more")
        # birch's is full still: it leaves all the same.
        control.stop(cluster.layout("birch").state, 60)
        assert cluster.processes["birch"].wait(60) == 0
        log = cluster.layout("birch").event_log.read_text().splitlines()
        events = [json.loads(line)["event"] for line in log]
        assert "started" in events and "stopping" in events


def test_a_full_disk_of_the_log_file_is_an_alarm_and_stderr_has_the_lines(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN, prelude=BRISK) as cluster:
        cluster.layout("ash").event_log.symlink_to("/dev/full")
        cluster.start_all()
        cluster.wait_finished()
        told = cluster.wait_until("ash", lambda s: warned(s, "log"), "alarm")
        assert any(w["text"].startswith("log/hsl-node.log has taken no log line") for w in told["warnings"])
        assert cluster.stop("ash") == 0
        assert "stopping" in cluster.output("ash")
