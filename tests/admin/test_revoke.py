"""`hsl-node peer revoke`: a peer is cut off by the operator of this node, at once and for good. Real daemons."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, peer
from federations import make_federation
from ports import free_ports
from proxy import Proxy

from hsl_node.admin import keys, provision
from hsl_node.errors import KeyRefused, PeerDataError, UsageError
from hsl_node.federation.identity import MANIFEST_NAMESPACE, verify
from hsl_node.federation.keyring import Keyring, sign_update
from hsl_node.federation.names import Peer
from hsl_node.federation.plan import Plan
from hsl_node.federation.strings import fingerprint
from hsl_node.sync.wire.transport import Login

NAMES = ("ash", "birch", "cedar")
PLAN = Plan(method="fedavg", rounds=2, epochs_per_round=2, plateau_rounds=100)
SIZE = ["--bytes", "1500000"]  # 40 s at 0.3 Mbit/s: once it has begun to arrive the line is held
BIRCH = Peer("birch")


def hsl(cluster: Cluster, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hsl_node", "--state", str(cluster.layout(name).state), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ))


def arriving(received: dict[str, Any]) -> bool:
    """A checkpoint, not the manifest of a statement."""
    return received["state"] == "receiving" and 10_000 < received["bytes"] < received["total"] // 2


def events(cluster: Cluster, name: str, event: str) -> list[dict[str, Any]]:
    lines = (cluster.layout(name).state / "log" / "hsl-node.log").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == event]


def test_threat_17_revoked_during_a_transfer_the_session_ends_and_the_part_never_counts(tmp_path: Path) -> None:
    """ash cuts birch off while its checkpoint arrives; cedar goes on; a restart forgets nothing; undone, all finish."""
    asyncio.run(asyncio.wait_for(revoked_in_mid_transfer(tmp_path), 280))


async def revoked_in_mid_transfer(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    async with Proxy(port) as line:
        line.bits_per_s = 300_000
        via = {"ash": f"127.0.0.1:{line.port}"}
        with Cluster(tmp_path, NAMES, PLAN, trainer=SIZE, via=via, ports={"ash": port}) as cluster:

            def until(name: str, wanted: Callable[[dict[str, Any]], bool], what: str) -> Any:
                return asyncio.to_thread(cluster.wait_until, name, wanted, what)

            cluster.start_all()
            await until("ash", lambda s: arriving(peer(s, "birch")["received"]), "birch's checkpoint arrives")
            line.hole = True  # it stays in mid-transfer
            have = lambda s: all(p["receipt"] == "round 1: accepted" for p in s["peers"])  # noqa: E731
            await until("ash", have, "the others have its own")
            done = await asyncio.to_thread(hsl, cluster, "ash", "peer", "revoke", "birch")
            assert done.returncode == 0, done.stderr
            assert "its sessions are cut" in done.stdout and "federation create" in done.stdout

            await until("ash", lambda s: not peer(s, "birch")["connected"], "birch gone")
            (cut,) = {e["peer"] for e in events(cluster, "ash", "connection of a revoked or replaced key cut")}
            assert cut == "birch"
            line.bits_per_s, line.hole = None, False
            await until("birch", lambda s: "does not accept our key" in peer(s, "ash")["sent"]["last_error"], "refused")

            status = await until("ash", lambda s: s["waiting_for"] == ["birch"], "waiting for birch alone")
            assert peer(status, "cedar")["received"]["state"] == "verified"
            assert peer(status, "birch")["received"]["state"] == peer(status, "birch")["sent"]["state"] == "revoked"
            assert any(w["code"] == "revoked birch" for w in status["warnings"])
            home = cluster.layout("ash").homes / "birch"
            assert list((home / "parts").iterdir()) and not list((home / "inbox").iterdir())
            assert not cluster.layout("ash").inbox(1, BIRCH).exists()
            # birch and cedar had the full set of round 1: they go on, and deliver round 2, to ash too.
            await until("cedar", lambda s: s["round"] == 2 and s["waiting_for"] == ["ash"], "the others deliver")

            assert await asyncio.to_thread(cluster.stop, "ash") == 0
            cluster.start("ash")
            status = await until("ash", lambda s: s["waiting_for"] == ["birch"], "waiting for birch after a restart")
            assert peer(status, "birch")["revoked"] and not peer(status, "birch")["connected"]

            key = cluster.federation.get("birch").fingerprint
            assert (await asyncio.to_thread(hsl, cluster, "ash", "peer", "revoke", "birch", "--undo")).returncode == 2
            undo = ("peer", "revoke", "birch", "--undo", "--fingerprint", key)
            assert (await asyncio.to_thread(hsl, cluster, "ash", *undo)).returncode == 0
            await asyncio.to_thread(cluster.stop, "birch")  # its own patience with a refused key is 5 minutes
            cluster.start("birch")
            await asyncio.to_thread(cluster.wait_finished)
            assert len({tuple(cluster.fused(n).items()) for n in NAMES}) == 1


def test_a_revocation_while_the_daemon_is_down_is_kept_and_listed(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        done = hsl(cluster, "ash", "peer", "revoke", "birch")
        assert done.returncode == 0 and "from its next start on" in done.stdout
        assert "revoked" in hsl(cluster, "ash", "peer", "list").stdout
        (listed,) = [p for p in json.loads(hsl(cluster, "ash", "peer", "list", "--json").stdout) if p["revoked"]]
        assert (listed["name"], listed["keys"]) == ("birch", [])
        assert hsl(cluster, "ash", "peer", "revoke", "birch").returncode == 2, "revoked already"
        assert hsl(cluster, "ash", "peer", "revoke", "ash").returncode == 2, "not oneself"
        assert hsl(cluster, "ash", "peer", "revoke", "elm").returncode == 2, "not a stranger"
        assert hsl(cluster, "ash", "peer", "ping", "birch").returncode != 0
        mode = cluster.layout("ash").keyring_toml.stat().st_mode & 0o777
        assert mode == 0o600


def test_a_peer_whose_keys_are_all_revoked_signs_and_shows_nothing_that_counts() -> None:
    members = make_federation(3)
    ring = Keyring.of(members.federation).revoking(BIRCH, "now")
    document = members.identities[BIRCH].sign({"a": 1}, MANIFEST_NAMESPACE)
    with pytest.raises(PeerDataError) as caught:
        verify(document, ring.keys(BIRCH), MANIFEST_NAMESPACE)
    assert caught.value.code == "revoked"
    login = Login.of(members.federation.get("birch"), Peer("ash"), ring.host_keys(members.federation.get("birch")))
    assert login.host_keys == ()
    assert ring.keys("cedar") == (members.federation.get("cedar").key,)


def test_a_revoked_key_stays_out_under_a_new_federation_file() -> None:
    """Tombstones: the next federation may name the stolen key again by mistake; this node still refuses it."""
    first = make_federation(3)
    ring = Keyring.of(first.federation).revoking(BIRCH, "now")
    second = Keyring.of(make_federation(3, name="the second grove").federation, ring.file)
    assert second.is_revoked(BIRCH) and not second.is_revoked("cedar")


def test_whoever_stole_a_key_cannot_replace_it_by_another_once_it_is_revoked() -> None:
    members = make_federation(4)
    ring = Keyring.of(members.federation)
    stranger = make_federation(5).identities[Peer("elm")]
    forged = sign_update(ring, BIRCH, members.identities[BIRCH], stranger.public)
    with pytest.raises(KeyRefused, match="revoked"):
        ring.revoking(BIRCH, "now").updating(forged)


def test_undo_wants_the_fingerprint_of_the_revoked_key_and_no_other() -> None:
    members = make_federation(3)
    key = {p: fingerprint(i.public) for p, i in members.identities.items()}
    ring = Keyring.of(members.federation).revoking(BIRCH, "now").revoking(Peer("cedar"), "now")
    for said in ("", "SHA256:abc", key[Peer("cedar")]):
        with pytest.raises(UsageError):
            ring.pardoning(BIRCH, said)
    assert not ring.pardoning(BIRCH, key[BIRCH]).is_revoked(BIRCH)
    assert ring.pardoning(BIRCH, key[BIRCH]).is_revoked("cedar")
    with pytest.raises(UsageError, match="no key of birch is revoked here"):
        Keyring.of(members.federation).pardoning(BIRCH, key[BIRCH])


def test_the_script_for_another_server_takes_the_account_away(tmp_path: Path) -> None:
    members = make_federation(3)
    ring = Keyring.of(members.federation).revoking(BIRCH, "now")
    birch, cedar = (members.federation.get(n).key for n in ("birch", "cedar"))
    script = provision.provision(ring, "ash", "openssh", Path("/srv/hsl"), 4096)
    assert f"restrict {birch}" not in script and f"restrict {cedar} cedar" in script
    revoked = script[script.index(f"cat >{provision.REVOKED}.new") :].split("END_OF_FILE")[1]
    assert birch in revoked and cedar not in revoked
    assert "pkill -KILL -u birch" in script and "in cedar) ;;" in script
    users = {u["username"]: u for u in provision.sftpgo_data(ring, provision.logins(
        members.federation, members.federation.get("ash")), Path("/srv/hsl"), 100)["users"]}  # fmt: skip
    assert (users["birch"]["status"], users["birch"]["public_keys"]) == (0, [])
    assert users["cedar"]["status"] == 1


def test_what_a_revocation_means_says_what_to_do_at_a_server_of_another_kind(tmp_path: Path) -> None:
    node = {"inbox": {"kind": "directory", "directory": "/srv/hsl"}}
    with Cluster(tmp_path, NAMES, PLAN, node=node) as cluster:
        state = cluster.layout("ash").state
        text = "\n".join(keys.consequences(state, BIRCH, keys.revoke(state, "birch")))
    assert "hsl-node inbox provision --for openssh --homes /srv/hsl" in text
