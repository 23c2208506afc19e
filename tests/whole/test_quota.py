"""An inbox too small for the plan's checkpoints, or emptied by a scanner: refused at once, or told at its own site."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, final_digests, peer, warned
from command_line import federation_file, made

from hsl_node.admin import doctor, enrol
from hsl_node.errors import ConfigError
from hsl_node.federation.node_toml import InboxConfig, NodeConfig
from hsl_node.federation.plan import Plan
from hsl_node.host.layout import Layout
from hsl_node.node import launch
from hsl_node.node.checks import require_quota
from hsl_node.sync.store.room import ample_mib, quota_bytes
from hsl_node.train.methods import method_of
from hsl_node.train.site import checkpoint_bytes, initial_weights

MIB, GIB = 2**20, 2**30
PLAN = Plan(method="fedavg", fusion="mean", rounds=1, epochs_per_round=1)
NAMES = ("ash", "birch")
# A stand-in's checkpoint has some kilobytes: with a quota of 64 "MiB" one byte too few, else as it is.
TIGHT = """
from hsl_node.node import inbox_alarms
inbox_alarms.quota_bytes = lambda mib, size: size - 1 if mib == 64 else 16 * size + 2**20
"""
# Takes each checkpoint away that is being written, while there is a file "scanner" in the state directory.
SCANNER = """
import os, sys
from hsl_node.sync.inbox import home
_open = home.Home.open_part
async def scanned(self, name, *, create):
    file = await _open(self, name, create=create)
    if name.kind is home.Kind.DATA and os.path.exists(sys.argv[1] + "/scanner"):
        os.unlink(self.homes / self.peer / "parts" / str(name))
    return file
home.Home.open_part = scanned
"""


def node(quota_mib: int | None, **more: Any) -> NodeConfig:
    inbox = InboxConfig(**({} if quota_mib is None else {"quota_mib": quota_mib}), **more)
    return NodeConfig(name="ash", address="ash.example.org:8922", inbox=inbox)


def test_the_quota_follows_from_the_model_where_node_toml_says_nothing() -> None:
    assert node(None).inbox.quota_set is None and node(4096).inbox.quota_set == 4096
    assert quota_bytes(None, 95 * MIB) == 4 * GIB
    assert quota_bytes(None, 5 * GIB) == 20 * GIB + MIB == ample_mib(5 * GIB) * MIB
    assert quota_bytes(64, 5 * GIB) == 64 * MIB


def test_a_quota_in_which_no_checkpoint_fits_is_refused_with_the_number_to_write(tmp_path: Path) -> None:
    require_quota(node(None), 5 * GIB)
    require_quota(node(65), 64 * MIB)
    require_quota(node(64, kind="directory", directory=tmp_path), 5 * GIB)  # another program's inbox
    with pytest.raises(ConfigError, match=r"has 5.4 GB, which inbox.quota_mib = 4096 never lets in") as refused:
        require_quota(node(4096), 5 * GIB)
    assert "inbox.quota_mib = 20481 in node.toml" in refused.value.remedy
    require_quota(node(20481), 5 * GIB)


@pytest.mark.parametrize("plan", [Plan(), Plan(method="fedavg", backbone="tiny")], ids=["hsl", "tiny"])
def test_a_checkpoints_size_is_known_from_the_plan_alone(tmp_path: Path, plan: Plan) -> None:
    initial_weights(tmp_path, plan, method_of(plan.method), path := tmp_path / "initial.safetensors")
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert checkpoint_bytes(plan) == path.stat().st_size - header


def test_join_doctor_and_start_refuse_it(tmp_path: Path) -> None:
    ash, birch = made(tmp_path / "ash"), made(tmp_path / "birch", "birch", 9002)
    file = federation_file(tmp_path, ash, birch, backbone="resnet50")
    settings = Layout(ash).node_toml
    enrol.join(ash, file)
    settings.write_text(re.sub(r"(?m)^# quota_mib = 4096", "quota_mib = 64", settings.read_text()))
    with pytest.raises(ConfigError, match=r"has 94\.\d MB, which inbox.quota_mib = 64 never lets in"):
        enrol.join(ash, file)
    disk = next(check for check in doctor.examine(ash) if check.name == "disk")
    assert (disk.outcome, disk.exit_code) == ("failed", 78) and "inbox.quota_mib = 64" in disk.text
    with Layout(ash).fused(0).open("wb") as initial:
        initial.truncate(95 * MIB)
    with pytest.raises(ConfigError, match=r"inbox.quota_mib = 64 never lets in"):
        launch.run(ash)


def test_a_peer_that_finds_no_room_is_told_at_this_site_and_goes_on_after_a_reload(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN, prelude=TIGHT) as cluster:
        settings = cluster.layout("ash").node_toml
        right = settings.read_text()
        settings.write_text(f"{right}\n[inbox]\nquota_mib = 64\n")
        cluster.start_all()
        told = cluster.wait_until("ash", lambda s: warned(s, "quota birch"), "the alarm")
        (alarm,) = [w for w in told["warnings"] if w["code"] == "quota birch"]
        assert "birch cannot deliver" in alarm["text"] and "(inbox.quota_mib)" in alarm["text"]
        sender = cluster.wait_until("birch", lambda s: peer(s, "ash")["sent"]["retries"] >= 2, "a second try")
        assert "was refused" in peer(sender, "ash")["sent"]["last_error"]
        settings.write_text(right)
        cluster.processes["ash"].send_signal(signal.SIGHUP)
        cluster.wait_finished()
        assert len(final_digests(cluster)) == 2


def test_a_scanner_that_takes_what_arrives_is_told_at_its_own_site(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN, prelude=SCANNER) as cluster:
        scanner = cluster.layout("ash").state / "scanner"
        scanner.touch()
        cluster.start_all()
        told = cluster.wait_until("ash", lambda s: warned(s, "gone birch"), "the alarm")
        (alarm,) = [w for w in told["warnings"] if w["code"] == "gone birch"]
        assert "that birch had delivered are gone from this node's disk" in alarm["text"]
        assert str(cluster.layout("ash").homes) in alarm["fix"]
        assert not warned(cluster.status("birch"), "gone ash")
        scanner.unlink()
        cluster.wait_finished()
        assert warned(cluster.status("ash"), "gone birch"), "shown until it was quiet for five minutes"
