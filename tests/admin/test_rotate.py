"""A node's key is replaced in the midst of a run: no round is lost, old and new key both count until it is finished."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from boxes import inbox, on_loop
from cluster import WAIT_S, Cluster
from command_line import run
from faulty_disk import Recorder
from federations import Members, make_federation
from plain_inbox import with_a_plain_inbox
from two_faces import at, deliver, face
from two_faces import begin as play

from hsl_node.admin import backup, doctor, enrol, keys, ping, rotate
from hsl_node.errors import (
    FederationMismatch,
    HslError,
    KeyRefused,
    LocalStateError,
    NotRunning,
    PeerDataError,
    TransportError,
    UsageError,
)
from hsl_node.federation import config, identity, keyring, strings
from hsl_node.federation.config import PeerCard
from hsl_node.federation.identity import MANIFEST_NAMESPACE, Identity, verify
from hsl_node.federation.keyring import Keyring, KeyringFile, sign_update
from hsl_node.federation.names import Digest, Peer
from hsl_node.federation.plan import Plan
from hsl_node.federation.strings import fingerprint
from hsl_node.host import control, durable
from hsl_node.node.peers import links
from hsl_node.node.peers.links import Asking
from hsl_node.status import page
from hsl_node.sync import round as machine
from hsl_node.sync.send.deliver import Transfer
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.layout import Layout
from hsl_node.sync.store.store import Store
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.login import RefusedKey
from hsl_node.sync.wire.transport import Client, Transport

NAMES = ("ash", "birch", "cedar")
PLAN = Plan(method="fedavg", rounds=5, epochs_per_round=2, plateau_rounds=100)
ASH, BIRCH = Peer("ash"), Peer("birch")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    with Cluster(tmp_path_factory.mktemp("undisturbed"), NAMES, PLAN) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        return cluster.fused("ash")


def join_anew(cluster: Cluster, folder: Path) -> None:
    """ash and birch stop, agree on another federation file of the cards that they have now, and start."""
    cards = []
    for name in NAMES[:2]:
        assert cluster.stop(name) == 0
        cards.append(folder / f"{name}.card")
        cards[-1].write_text(config.card_text(enrol.card_of(state(cluster, name))))
    agreed = enrol.create(name="cluster, again", cards=cards, plan=PLAN, anchor=None)
    (folder / "new.toml").write_text(config.federation_text(agreed))
    for name in NAMES[:2]:
        enrol.join(state(cluster, name), folder / "new.toml", replace=True)
    cluster.start_all()


def state(cluster: Cluster, name: str) -> Path:
    return cluster.layout(name).state


def signed_by(cluster: Cluster, at: str, key: str) -> set[int]:
    """Rounds whose manifest of ash, as `at` keeps it, was signed with this key."""
    journal = Journal.read_only(cluster.layout(at).journal)
    try:
        found = {m["round"]: journal.manifest(m["round"], ASH) for m in journal.rows("manifests") if m["peer"] == "ash"}
    finally:
        journal.close()
    rounds = set()
    for round, kept in found.items():
        assert kept is not None
        try:
            verify(kept["document"], key, MANIFEST_NAMESPACE)
            rounds.add(round)
        except PeerDataError:
            pass
    return rounds


def end_when_settled(cluster: Cluster, name: str) -> None:
    """`peer update --finish`, as often as it says "not yet"."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            assert rotate.end(state(cluster, name), "ash").live
            return
        except UsageError:
            raise
        except HslError as exc:
            assert "old key" in exc.message and time.monotonic() < deadline, exc
            time.sleep(0.1)


def test_a_key_is_replaced_in_mid_run_and_the_models_are_those_of_the_undisturbed_run(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """cedar holds training in round 2 while ash changes its key, so that the change falls into the run for certain."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        cluster.hold("cedar", 2)
        cluster.start_all()
        cluster.wait_until("ash", lambda s: s["round"] == 2 and s["waiting_for"] == ["cedar"], "round 2 signed")
        cluster.wait_until("cedar", lambda s: s["round"] == 2, "round 2")
        begun = rotate.begin(state(cluster, "ash"))
        assert begun.live and rotate.begin(state(cluster, "ash")).update == begun.update, "said again: the same"
        old, new = begun.update.old, begun.update.new

        with pytest.raises(KeyRefused, match="birch"):
            rotate.finish(state(cluster, "ash"))
        for name in ("birch", "cedar"):
            assert rotate.take(state(cluster, name), begun.file, fingerprint(new)).live
            status = cluster.wait_until(name, lambda s: any(w["code"] == "keys ash" for w in s["warnings"]), "told")
            assert fingerprint(new) in str(status["warnings"])
        assert rotate.finish(state(cluster, "ash"))
        assert cluster.status("ash")["fingerprint"] == fingerprint(new)
        assert identity.load(cluster.layout("ash").key).public == new
        with pytest.raises(HslError, match="old key"):
            rotate.end(state(cluster, "birch"), "ash")  # nothing signed with the new key has arrived yet
        cluster.release("cedar")
        for name in ("birch", "cedar"):
            end_when_settled(cluster, name)
            cluster.wait_until(name, lambda s: not any(w["code"] == "keys ash" for w in s["warnings"]), "settled")
        cluster.wait_finished()
        assert [cluster.fused(n) for n in NAMES] == [undisturbed] * 3
        for name in ("birch", "cedar"):
            before, after = signed_by(cluster, name, old), signed_by(cluster, name, new)
            assert before and after and max(before) < min(after) and {1, 6} <= before | after
            assert before | after == set(range(7)), "no round was lost"
        assert len({s["federation"]["hash"] for s in map(cluster.status, NAMES)}) == 1
        for name in NAMES:  # all of it lasts
            assert cluster.stop(name) == 0
            cluster.start(name)
        cluster.wait_finished()


def test_threat_16_a_key_nobody_was_told_of_is_refused_with_both_fingerprints_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    """ash changes its key and only birch knows; cedar refuses it, names both keys, and is in step once it is told."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        cluster.hold("cedar")
        cluster.start_all()
        cluster.wait_until("cedar", lambda s: s["round"] == 1, "round 1")
        begun = rotate.begin(state(cluster, "ash"))
        old, new = fingerprint(begun.update.old), fingerprint(begun.update.new)
        rotate.take(state(cluster, "birch"), begun.file, new)
        assert rotate.finish(state(cluster, "ash"), force=True)
        cluster.release("cedar")
        status = cluster.wait_until("cedar", lambda s: "host key" in sent(s, "ash")["last_error"], "refused")
        assert old in sent(status, "ash")["last_error"] and new in sent(status, "ash")["last_error"]
        cluster.wait_until("birch", lambda s: s["round"] == 2, "birch has all of round 1, cedar's too, and goes on")
        rotate.take(state(cluster, "cedar"), begun.file, new)
        cluster.wait_until("cedar", lambda s: sent(s, "ash")["state"] == "done" or s["round"] > 1, "delivers at once")
        assert cluster.stop("ash") == 0  # its own patience with a peer that refuses its key is 5 minutes
        cluster.start("ash")
        cluster.wait_finished()
        assert len({tuple(cluster.fused(n).items()) for n in NAMES}) == 1


def test_a_backup_older_than_a_peers_new_key_says_so_and_goes_on_when_it_takes_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """birch is restored from before ash changed its key: it names the key, not the way round it, and asks at once."""
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        cluster.start("ash")
        cluster.wait_until("ash", lambda s: s["round"] is not None, "running")
        control.ask(state(cluster, "ash"), "pause")
        cluster.start("birch")
        cluster.wait_until("birch", lambda s: s["round"] == 1 and s["waiting_for"] == ["ash"], "its round 1 is trained")
        file = tmp_path / "birch.tar"
        backup.backup(state(cluster, "birch"), file)
        begun = rotate.begin(state(cluster, "ash"))
        new = fingerprint(begun.update.new)
        rotate.take(state(cluster, "birch"), begun.file, new)
        assert rotate.finish(state(cluster, "ash"))
        cluster.kill("birch")
        start_restored(cluster, "birch", file)
        known = lambda s: any("host key" in w["text"] for w in recovering(s))  # noqa: E731
        (warning,) = recovering(cluster.wait_until("birch", known, "the true cause"))
        assert new in warning["text"] and "peer update" in warning["fix"] and "--without" not in str(warning)
        peer = examined(monkeypatch, cluster, "birch", "peer ash")
        assert (peer.outcome, peer.exit_code) == ("failed", 12) and new in peer.text and "peer update" in peer.fix
        assert rotate.take(state(cluster, "birch"), begun.file, new).live
        control.ask(state(cluster, "ash"), "resume")
        cluster.wait_finished()  # in less than the five minutes that a refused key is left alone
        assert cluster.fused("ash") == cluster.fused("birch")


def test_a_backup_older_than_this_nodes_own_key_change_says_so_and_the_way_without_a_newer_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody lets the old key in, and nobody can sign a way back to it: a new federation file with its card."""
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        cluster.start_all()
        cluster.wait_until("ash", lambda s: s["round"] is not None and s["round"] > 1, "round 1 is done")
        file = tmp_path / "ash.tar"
        backup.backup(state(cluster, "ash"), file)
        begun = rotate.begin(state(cluster, "ash"))
        rotate.take(state(cluster, "birch"), begun.file, fingerprint(begun.update.new))
        assert rotate.finish(state(cluster, "ash"))
        cluster.wait_finished()
        end_when_settled(cluster, "birch")
        cluster.kill("ash")
        start_restored(cluster, "ash", file)
        refused = lambda s: any("our key" in w["text"] for w in recovering(s))  # noqa: E731
        (warning,) = recovering(cluster.wait_until("ash", refused, "its key is refused"))
        assert (
            "changed after that" in warning["fix"]
            and "restore a newer one" in warning["fix"]
            and "README" in warning["fix"]
        )
        peer = examined(monkeypatch, cluster, "ash", "peer birch")
        assert peer.exit_code == 12 and "restore a newer one" in peer.fix

        join_anew(cluster, tmp_path)
        cluster.wait_finished()
        assert cluster.fused("ash") == cluster.fused("birch")


def test_a_backup_from_the_midst_of_this_nodes_key_change_says_how_to_finish_it_and_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new key is in it, and that is the one that the peers let in: nothing has to begin anew."""
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        begun = rotate.begin(state(cluster, "ash"))
        file = tmp_path / "ash.tar"
        backup.backup(state(cluster, "ash"), file)
        rotate.take(state(cluster, "birch"), begun.file, fingerprint(begun.update.new))
        assert rotate.finish(state(cluster, "ash"))
        end_when_settled(cluster, "birch")
        cluster.kill("ash")
        start_restored(cluster, "ash", file)
        refused = lambda s: any("our key" in w["text"] for w in recovering(s))  # noqa: E731
        (warning,) = recovering(cluster.wait_until("ash", refused, "its key is refused"))
        fix = warning["fix"]
        assert "`hsl-node key rotate --finish`" in fix and fix.index("--finish") < fix.index("restore a newer one")
        peer = examined(monkeypatch, cluster, "ash", "peer birch")
        assert peer.exit_code == 12 and "key rotate --finish`" in peer.fix
        assert rotate.finish(state(cluster, "ash"))
        cluster.wait_finished()  # in less than the five minutes that a refused key is left alone
        assert cluster.fused("ash") == cluster.fused("birch")


@pytest.mark.parametrize("changes", [1, 2])
def test_a_lost_disk_after_this_nodes_key_change_comes_back_with_its_own_update_files(
    tmp_path: Path, changes: int
) -> None:
    """Without keyring.toml nothing here says that the key is its own; the advice was to begin the federation anew."""
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        here, mails = state(cluster, "ash"), []
        cluster.start_all()
        cluster.wait_finished()
        for _ in range(changes):
            begun = rotate.begin(here)
            mails.append((begun.file.name, begun.file.read_bytes(), fingerprint(begun.update.new)))
            rotate.take(state(cluster, "birch"), begun.file, mails[-1][2])
            assert rotate.finish(here)
            end_when_settled(cluster, "birch")
        cluster.kill("ash")
        saved = {name: (here / name).read_bytes() for name in ("node.toml", "federation.toml", "keys/node_ed25519")}
        shutil.rmtree(here)
        cluster.layout("ash").make()
        for name, content in saved.items():
            (here / name).write_bytes(content)
        cluster.layout("ash").key.chmod(0o600)

        asked = run("--state", str(here), "recover", "--from-peers")
        assert isinstance(asked.exception, FederationMismatch)
        remedy = asked.exception.remedy
        assert "keyring.toml back" in remedy and "`hsl-node peer update ash_1.update --fingerprint" in remedy
        assert remedy.index("ash_1.update") < remedy.index("ask for a new one"), "what loses nothing comes first"
        for name, content, said in mails:
            (tmp_path / name).write_bytes(content)
            assert (
                run("--state", str(here), "peer", "update", str(tmp_path / name), "--fingerprint", said).exit_code == 0
            )
        assert run("--state", str(here), "key", "rotate", "--finish").exit_code == 0
        counts = keyring.load(here, cluster.federation).keys(ASH)
        assert [fingerprint(key) for key in counts] == [mails[-1][2]], "the new one alone: the old one says nothing new"
        assert run("--state", str(here), "recover", "--from-peers").exit_code == 0
        cluster.start("ash")
        cluster.wait_finished()
        assert cluster.fused("ash") == cluster.fused("birch")


def start_restored(cluster: Cluster, name: str, file: Path) -> None:
    shutil.rmtree(state(cluster, name))
    backup.restore(state(cluster, name), file)
    cluster.layout(name).make()
    cluster.start(name)


def recovering(status: dict[str, Any]) -> list[dict[str, Any]]:
    """The warnings about it."""
    return [w for w in status["warnings"] if w["code"] == "recovering"]


def examined(monkeypatch: pytest.MonkeyPatch, cluster: Cluster, name: str, check: str) -> doctor.Check:
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    return next(c for c in doctor.examine(state(cluster, name)) if c.name == check)


def up_again(cluster: Cluster, name: str) -> None:
    """It knows its state, and others reach it, which comes a moment later."""
    cluster.start(name)
    cluster.wait_until(name, lambda s: s["state"] == "finished", "up again")
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", cluster.ports[name])):
            return
        time.sleep(0.02)
    raise AssertionError(f"{name} does not listen\n{cluster.output(name)}")


def wait_delivered(cluster: Cluster) -> None:
    """Finished, and all have the receipts for their closing statements."""
    cluster.wait_finished()
    last = f"round {cluster.federation.plan.rounds + 1}: accepted"
    for name in cluster.names:
        cluster.wait_until(name, lambda s: all(p["receipt"] == last for p in s["peers"]), last)


def test_a_key_changed_after_the_run_is_finished_at_the_peers_once_its_daemon_uses_it(tmp_path: Path) -> None:
    """Nothing comes after the closing statement: the peer is asked, and an old key that is in use is kept."""
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        ash, birch = state(cluster, "ash"), state(cluster, "birch")
        cluster.start_all()
        wait_delivered(cluster)
        begun = rotate.begin(ash)
        new = begun.update.new
        assert rotate.take(birch, begun.file, fingerprint(new)).live
        refused_end(birch, "answers with its old key")
        with pytest.raises(HslError, match="its old key"):
            rotate.end(birch, "ash")  # the same a second time
        assert rotate.finish(ash)
        assert cluster.stop("ash") == 0
        with pytest.raises(TransportError, match="has to be asked"):
            rotate.end(birch, "ash")
        up_again(cluster, "ash")
        assert rotate.end(birch, "ash").live
        cluster.wait_until("birch", lambda s: not s["warnings"], "settled")
        assert keyring.load(birch, cluster.federation).keys(ASH) == (new,)
        assert [a.error for a in ping.ping(ash, ())] == [a.error for a in ping.ping(birch, ())] == [""]


@pytest.mark.parametrize("client", ["asyncssh", "paramiko"])
def test_a_key_changed_while_the_daemons_are_down_is_finished_when_they_are_back(tmp_path: Path, client: str) -> None:
    """The one who asks needs no daemon of its own."""
    with Cluster(tmp_path, NAMES[:2], PLAN, node={"client": client}) as cluster:
        ash, birch = state(cluster, "ash"), state(cluster, "birch")
        cluster.start_all()
        wait_delivered(cluster)
        for name in NAMES[:2]:
            assert cluster.stop(name) == 0
        begun = rotate.begin(ash)
        rotate.take(birch, begun.file, fingerprint(begun.update.new))
        assert not rotate.finish(ash, force=True)
        up_again(cluster, "ash")
        assert not rotate.end(birch, "ash").live
        assert keyring.load(birch, cluster.federation).keys(ASH) == (begun.update.new,)


def test_a_key_changed_after_a_halt_is_finished_at_the_peers(tmp_path: Path) -> None:
    """cedar, played by the test, tells both that it stopped in round 1: they halt and sign nothing more."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        ash, birch = state(cluster, "ash"), state(cluster, "birch")
        play(cluster)
        checkpoint, _ = face(cluster, 1.0)
        base = checkpoint.content["base"]
        halted = at(cluster, "ash").manifest(checkpoint.content, sha256=base, bytes=0, auc=None, halted=True)
        for name in NAMES[:2]:
            deliver(halted, None, cluster, name)
        for name in NAMES[:2]:
            cluster.wait_until(name, lambda s: s["state"] == "halted", "halted")
        begun = rotate.begin(ash)
        assert rotate.take(birch, begun.file, fingerprint(begun.update.new)).live
        end_refused_when_delivered(cluster, birch)
        assert rotate.finish(ash, force=True), "cedar has no daemon"
        assert rotate.end(birch, "ash").live
        assert keyring.load(birch, cluster.federation).keys(ASH) == (begun.update.new,)


def end_refused_when_delivered(cluster: Cluster, birch: Path) -> None:
    """Until ash has all of birch, that is the reason; then that ash uses its old key."""
    deadline = time.monotonic() + WAIT_S
    while True:
        with pytest.raises(HslError, match="old key") as refused:
            rotate.end(birch, "ash")
        if "answers with its old key" in refused.value.message:
            return
        assert time.monotonic() < deadline, refused.value
        time.sleep(0.1)


def test_a_key_changed_after_the_run_is_finished_at_the_peers_also_where_its_inbox_is_openssh(tmp_path: Path) -> None:
    """Its host key is another and stays; nothing is offered there. What it answers with is signed with its own key."""
    with with_a_plain_inbox(tmp_path) as cluster:
        birch, cedar = state(cluster, "birch"), state(cluster, "cedar")
        cluster.start_all()
        wait_delivered(cluster)
        begun = rotate.begin(cedar)
        for name in NAMES[:2]:
            assert rotate.take(state(cluster, name), begun.file, fingerprint(begun.update.new)).live
        with pytest.raises(HslError, match="its old key"):
            rotate.end(birch, "cedar")
        assert rotate.finish(cedar)
        for name in NAMES[:2]:
            assert rotate.end(state(cluster, name), "cedar").live
        assert keyring.load(birch, cluster.federation).keys("cedar") == (begun.update.new,)


def test_an_old_key_stays_until_something_of_its_peer_has_arrived(tmp_path: Path) -> None:
    """ash has birch's first statement; its own may be under way, signed with the old key: it is never signed again."""
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        birch = state(cluster, "birch")
        begun = rotate.begin(state(cluster, "ash"))
        rotate.take(birch, begun.file, fingerprint(begun.update.new))
        store = Store(cluster.layout("birch"))
        all_delivered = machine.State(me=BIRCH, peers=(ASH, BIRCH), rounds=PLAN.rounds, base=Digest("0" * 64))
        store.journal.save_state(machine.to_json(all_delivered))
        store.close()
        refused_end(birch, "nothing of ash has arrived in this run yet")
        assert keyring.load(birch, cluster.federation).keys(ASH) == (begun.update.new, begun.update.old)


def refused_end(at: Path, why: str) -> None:
    with pytest.raises(HslError, match=why):
        rotate.end(at, "ash")


def test_a_new_key_that_is_lost_costs_no_round_and_the_next_federation_changes_keys_again(tmp_path: Path) -> None:
    """The way that the refusal and the README name: the run ends with the old key, which birch alone lets in."""
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        ash, birch = state(cluster, "ash"), state(cluster, "birch")
        cluster.hold("birch", 2)
        cluster.start_all()
        cluster.wait_until("ash", lambda s: s["round"] == 2 and s["waiting_for"] == ["birch"], "round 2 signed")
        begun = rotate.begin(ash)
        old, lost = begun.update.old, begun.update.new
        rotate.take(birch, begun.file, fingerprint(lost))
        file = tmp_path / "ash.tar"
        backup.backup(ash, file)
        cluster.kill("ash")
        shutil.rmtree(ash)
        backup.restore(ash, file)
        cluster.layout("ash").make()
        next_of(ash).unlink()  # as a backup from before these held it
        with pytest.raises(LocalStateError, match="is not there"):
            rotate.begin(ash)
        with pytest.raises(LocalStateError, match="is not there"):
            rotate.finish(ash, force=True)

        keys.revoke(birch, "ash")
        assert keys.pardon(birch, "ash", fingerprint(old)).keyring.keys(ASH) == (old,), "whoever finds the other one"
        with pytest.raises(HslError, match="old key"):
            rotate.end(birch, "ash")  # it would leave ash without any key
        cluster.start("ash")
        cluster.release("birch")
        cluster.wait_finished()
        assert cluster.fused("ash") == cluster.fused("birch")
        assert signed_by(cluster, "birch", old) == set(range(7)), "no round was lost"

        join_anew(cluster, tmp_path)
        for name in NAMES[:2]:
            cluster.wait_until(name, lambda s: s["round"] is not None, "running")
        begun = rotate.begin(ash)
        assert begun.update.old == old and begun.update.new not in (old, lost)
        rotate.take(birch, begun.file, fingerprint(begun.update.new))
        assert rotate.finish(ash)
        cluster.wait_finished()
        assert cluster.fused("ash") == cluster.fused("birch")
        assert identity.load(cluster.layout("ash").key).public == begun.update.new


@on_loop
async def test_a_refused_key_is_left_alone_but_its_reason_stays_until_another_key_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = 0

    @contextlib.asynccontextmanager
    async def connect(card: PeerCard, *arguments: Any, **more: Any) -> AsyncIterator[Transport]:
        nonlocal times
        times += 1
        raise KeyRefused(f"{card.name} shows another host key", remedy="take its update file")
        yield

    monkeypatch.setattr(links, "connect", connect)
    members = make_federation(2)
    node: Any = SimpleNamespace(
        federation=members.federation, me=ASH, identity=members.identities[ASH],
        config=SimpleNamespace(client="asyncssh"), keyring=Keyring.of(members.federation),
        refused={BIRCH: RefusedKey(BIRCH, random.Random())},
        delivery=SimpleNamespace(transfers={BIRCH: Transfer(BIRCH)}),
    )  # fmt: skip
    for question in (Asking(node).offer_of(BIRCH), Asking(node).connected(BIRCH).__aenter__()):
        with pytest.raises(KeyRefused, match="another host key") as refused:
            await question
        assert refused.value.remedy == "take its update file"
    assert times == 1
    node.refused[BIRCH] = RefusedKey(BIRCH, random.Random())  # `Node.trust`
    with pytest.raises(KeyRefused):
        await Asking(node).offer_of(BIRCH)
    assert times == 2


def sent(status: dict, name: str) -> dict:  # type: ignore[type-arg]
    return next(p["sent"] for p in status["peers"] if p["name"] == name)


# ---------------------------------------------------------------- one connection


@pytest.mark.parametrize("client", ["asyncssh", "paramiko"])
@on_loop
async def test_either_host_key_of_the_overlap_is_taken_and_no_third(tmp_path: Path, client: Client) -> None:
    first, second, third = stranger(), stranger(1), stranger(2)
    async with inbox(tmp_path) as box:
        card = box.members.federation.get("ash").model_copy(update={"address": f"127.0.0.1:{box.port}"})
        me = box.members.identities[BIRCH]
        for shown in (box.members.identities[ASH], first):
            box.server.show(shown)  # for new connections; the port stays
            async with connect(card, BIRCH, me, client=client, host_keys=(first.public, card.key)):
                assert box.server.connected() == {BIRCH}
        with pytest.raises(KeyRefused) as caught:
            async with connect(card, BIRCH, me, client=client, host_keys=(second.public, third.public)):
                raise AssertionError("a key that nobody pinned was taken")
        for key in (first, second, third):
            assert key.fingerprint in caught.value.message


# ---------------------------------------------------------------- the chain of updates


def stranger(number: int = 0) -> Identity:
    return list(make_federation(8).identities.values())[5 + number]


def announced(members: Members, ring: Keyring | None = None) -> tuple[Keyring, str]:
    ring = ring or Keyring.of(members.federation)
    return ring, sign_update(ring, BIRCH, members.identities[BIRCH], stranger().public)


def test_both_keys_count_in_the_overlap_and_the_new_one_alone_after_it() -> None:
    members = make_federation(3)
    ring, document = announced(members)
    old, new = members.federation.get("birch").key, stranger().public
    taken = ring.updating(document)
    assert (ring.keys(BIRCH), taken.keys(BIRCH), taken.finishing(BIRCH).keys(BIRCH)) == ((old,), (new, old), (new,))
    assert taken.finishing(BIRCH).chain(BIRCH) == (new, old), "what the old key signed can still be checked"
    assert taken.host_keys(members.federation.get("birch")) == (new, old)
    assert taken.keys(ASH) == ring.keys(ASH)


def test_the_federations_hash_is_that_of_the_file_whatever_happens_to_keys() -> None:
    members = make_federation(3)
    ring, document = announced(members)
    assert ring.updating(document).federation.digest == members.federation.digest


def test_a_second_change_follows_the_first_and_is_signed_by_its_key() -> None:
    members = make_federation(3)
    ring, document = announced(members)
    ring = ring.updating(document).finishing(BIRCH)
    forged = sign_update(ring, BIRCH, members.identities[BIRCH], stranger(1).public)
    with pytest.raises(PeerDataError, match="its key here is"):
        ring.updating(forged)
    ring = ring.updating(sign_update(ring, BIRCH, stranger(), stranger(1).public))
    assert ring.keys(BIRCH) == (stranger(1).public, stranger().public)
    again = Keyring.of(members.federation, KeyringFile.model_validate(ring.file.model_dump(mode="json")))
    assert again == ring, "read from its file"


@pytest.mark.parametrize("signer", ["ash", "stranger"])
def test_an_update_that_another_key_signed_is_refused(signer: str) -> None:
    members = make_federation(3)
    ring, _ = announced(members)
    key = members.identities[ASH] if signer == "ash" else stranger()
    content = {"version": 1, "federation": members.federation.digest, "peer": "birch", "number": 1,
               "old": members.federation.get("birch").key, "new": stranger(1).public}  # fmt: skip
    forged = key.sign(content, keyring.UPDATE_NAMESPACE).decode()
    with pytest.raises(PeerDataError, match="signature"):
        ring.updating(forged)


def test_a_document_signed_for_another_purpose_is_no_update() -> None:
    members = make_federation(3)
    ring, document = announced(members)
    line = json.loads(document.partition("\n")[0])
    with pytest.raises(PeerDataError, match="signature"):
        ring.updating(members.identities[BIRCH].sign(line, MANIFEST_NAMESPACE).decode())


def test_an_update_of_another_federation_counts_nowhere_else() -> None:
    other = Keyring.of(make_federation(3, name="another grove").federation)
    members = make_federation(3)
    ring, document = announced(members, other)
    with pytest.raises(FederationMismatch, match="was made for"):
        Keyring.of(members.federation).updating(document)
    moved = Keyring.of(members.federation, ring.updating(document).file)
    assert moved.keys(BIRCH) == (members.federation.get("birch").key,)


def test_the_key_of_somebody_else_cannot_be_announced() -> None:
    members = make_federation(3)
    ring = Keyring.of(members.federation)
    document = sign_update(ring, BIRCH, members.identities[BIRCH], members.federation.get("ash").key)
    with pytest.raises(PeerDataError, match="is or was ash's"):
        ring.updating(document)


def test_one_number_has_one_update() -> None:
    members = make_federation(3)
    ring, document = announced(members)
    second = sign_update(ring, BIRCH, members.identities[BIRCH], stranger(1).public)
    taken = ring.updating(document)
    with pytest.raises(UsageError, match="already"):
        taken.updating(document)
    with pytest.raises(UsageError, match="another one"):
        taken.updating(second)


@pytest.mark.parametrize("document", ["", "{}", "[]\n", '{"version": 1}\nx', "\x00", "x" * 100_000, "[" * 5000])
def test_what_is_no_update_is_said_so(document: str) -> None:
    with pytest.raises(PeerDataError, match="not a key update"):
        Keyring.of(make_federation(3).federation).updating(document)


@pytest.mark.parametrize(
    "tail", ["\u2713", "\u0661", " ", "\n", "\u2028", "\x85", "\x1b[8m", "x", "-----END SSH SIGNATURE-----\n"]
)
@pytest.mark.parametrize("where", ["at the end", "before the end line", "in the line"])
def test_an_update_has_one_spelling_and_nothing_behind_it(tail: str, where: str) -> None:
    """It was kept as it came: one letter that is not ASCII, and `verify --export` wrote nothing any more."""
    members = make_federation(3)
    ring, document = announced(members)
    changed = {
        "at the end": document + tail,
        "before the end line": document.replace("\n-----END", tail + "\n-----END"),
        "in the line": document.replace("}\n", "}" + tail + "\n", 1),
    }[where]
    with pytest.raises(PeerDataError, match=r"not a key update|signature"):
        ring.updating(changed)
    assert ring.updating(document).keys(BIRCH)


def test_a_keyring_that_was_tampered_with_stops_the_start(tmp_path: Path) -> None:
    """Whoever edits keyring.toml cannot make another key count: the chain's signatures are checked at every start."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        begun = rotate.begin(state(cluster, "ash"))
        assert not begun.live
        rotate.take(state(cluster, "birch"), begun.file, fingerprint(begun.update.new))
        path = keyring.path_of(state(cluster, "birch"))
        text = path.read_text()
        assert text.count(begun.update.new) == 1
        path.write_text(text.replace(begun.update.new, stranger().public))
        assert cluster.start("birch").wait(60) == 14
        path.write_text(text.replace("version = 1", "version = 1\nrevokked = []"))
        assert cluster.start("birch").wait(60) == 78


def test_nothing_is_taken_without_the_new_keys_fingerprint(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        begun = rotate.begin(state(cluster, "ash"))
        for said in (None, "", fingerprint(begun.update.old)):
            with pytest.raises(UsageError, match="nothing was changed") as refused:
                rotate.take(state(cluster, "birch"), begun.file, said)
            told = str(refused.value)
            assert fingerprint(begun.update.new) not in told, "pasting it would leave the telephone out"
            assert f"peer update {begun.file} --fingerprint WHAT_THEY_READ_ALOUD`" in told
        assert not keyring.path_of(state(cluster, "birch")).exists()


def test_a_fingerprint_is_taken_in_either_form_and_in_no_part_of_one(tmp_path: Path) -> None:
    """What `key rotate` prints to be read aloud is taken; what is none is said to be none, not another's."""
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        begun = rotate.begin(state(cluster, "ash"))
        old, new = begun.update.old, begun.update.new
        aloud = strings.read_aloud(new)
        for said in ("6f38 a13f", aloud[:-1], aloud + " 0", "SHA256:abc", fingerprint(new)[7:], fingerprint(new)[:-1]):
            with pytest.raises(UsageError, match=r"nothing was changed: .* is no whole fingerprint") as refused:
                rotate.take(state(cluster, "birch"), begun.file, said)
            assert "five groups of four" in str(refused.value)
        for said in (strings.read_aloud(old), fingerprint(old), "SHA256:" + fingerprint(new)[7:].swapcase()):
            with pytest.raises(
                UsageError, match=r"nothing was changed: .* is not the fingerprint of the new key of ash"
            ):
                rotate.take(state(cluster, "birch"), begun.file, said)
        for number, said in enumerate((aloud.upper(), f" {fingerprint(new)}\n")):
            assert strings.is_fingerprint_of(said, new), number
        done = run("--state", state(cluster, "birch"), "peer", "update", begun.file, "--fingerprint", aloud)
        assert done.exit_code == 0 and aloud in done.stdout
        keys.revoke(state(cluster, "birch"), "ash")
        for said in ("", "6f38 a13f", strings.read_aloud(cluster.federation.get("birch").key)):
            with pytest.raises(UsageError):
                keys.pardon(state(cluster, "birch"), "ash", said)
        ring = keys.pardon(state(cluster, "birch"), "ash", aloud.replace(" ", "").upper()).keyring
        assert ring.keys(ASH) == (new,)


def test_a_node_that_is_down_says_which_keys_count_now_and_not_which_did(tmp_path: Path) -> None:
    """Two changes of ash, the last one ended while birch's daemon was down: its journal knows nothing of that."""
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        ash, birch = state(cluster, "ash"), state(cluster, "birch")

        def told() -> list[str]:
            return [w["text"] for w in page.fetch(birch)["warnings"]]

        cluster.start_all()
        wait_delivered(cluster)
        for _ in range(2):
            begun = rotate.begin(ash)
            assert rotate.take(birch, begun.file, fingerprint(begun.update.new)).live
            assert rotate.finish(ash)
            assert rotate.end(birch, "ash").live
        last = rotate.begin(ash)
        assert rotate.take(birch, last.file, fingerprint(last.update.new)).live
        (alive,) = told()
        assert cluster.stop("birch") == 0
        assert told() == [alive], "as the live one said it"
        assert fingerprint(last.update.old) in alive and fingerprint(last.update.new) in alive
        assert rotate.finish(ash, force=True)
        rotate.end(birch, "ash")
        assert told() == []
        keys.revoke(birch, "ash")
        (revoked,) = told()
        assert "ash is revoked" in revoked
        keyring.path_of(birch).write_text("version = 2\n")
        (broken,) = told()
        assert "keyring.toml" in broken


def test_a_peer_that_missed_an_update_gets_the_earlier_one_again(tmp_path: Path) -> None:
    """`key rotate` wrote the second over the first, and nothing printed the first again."""
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        ash, birch = state(cluster, "ash"), state(cluster, "birch")
        assert run("--state", ash, "key", "updates").stdout == "this node's key was never changed in this federation\n"
        first = rotate.begin(ash)
        rotate.finish(ash, force=True)
        second = rotate.begin(ash)
        assert (first.file.name, second.file.name) == ("ash_1.update", "ash_2.update")
        with pytest.raises(UsageError, match="has changed its key 2 times, here 0 are known") as refused:
            rotate.take(birch, second.file, fingerprint(second.update.new))
        assert "hsl-node key updates" in refused.value.remedy
        lost = {f: f.read_bytes() for f in (first.file, second.file)}
        for file in lost:
            file.unlink()
        done = run("--state", ash, "key", "updates")
        assert {f: f.read_bytes() for f in lost} == lost
        for begun in (first, second):
            assert str(begun.file) in done.stdout and strings.read_aloud(begun.update.new) in done.stdout
            rotate.take(birch, begun.file, fingerprint(begun.update.new))
        assert keyring.load(birch, cluster.federation).newest(ASH) == second.update.new


def test_a_command_for_here_names_the_state_directory_and_one_for_another_machine_does_not(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        ash, birch = state(cluster, "ash"), state(cluster, "birch")

        def said(at: Path, *words: str | Path) -> str:
            command = [sys.executable, "-m", "hsl_node", "--state", str(at), *map(str, words)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            return done.stdout + done.stderr

        begun = said(ash, "key", "rotate", "--key", cluster.layout("ash").key)
        assert f"here: hsl-node --state {ash} key rotate --finish --key {cluster.layout('ash').key}\n" in begun
        assert "each of them: hsl-node peer update ash_1.update" in begun
        refused = said(ash, "key", "rotate", "--finish")
        assert "each of them runs hsl-node peer update" in refused and str(ash) not in refused
        new = identity.load(ash / "keys" / "node_ed25519.next").fingerprint
        taken = said(birch, "peer", "update", ash / "ash_1.update", "--fingerprint", new)
        assert f"until: hsl-node --state {birch} peer update --finish ash" in taken
        assert f"hsl-node --state {birch} peer revoke ash --undo" in said(birch, "peer", "revoke", "ash")
        undo = said(birch, "peer", "revoke", "ash", "--undo")
        assert "hsl-node card there" in undo and f"{birch} card" not in undo


def test_every_command_shows_the_key_that_counts_now_and_the_files_as_replaced(tmp_path: Path) -> None:
    """To compare by phone: at the node itself and at a peer, in the overlap and after it."""

    def shown(at: str) -> str:
        return run("--state", state(cluster, at), "federation", "show").stdout

    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        old = cluster.federation.get("ash").fingerprint
        assert all("in the file" not in shown(at) for at in NAMES[:2])
        begun = rotate.begin(state(cluster, "ash"))
        new = fingerprint(begun.update.new)
        rotate.take(state(cluster, "birch"), begun.file, new)
        for at in NAMES[:2]:
            assert f"{new}\n" in shown(at) and f"{old}  (in the file; being replaced by the one above)" in shown(at)
        assert not rotate.finish(state(cluster, "ash"), force=True)
        assert not rotate.end(state(cluster, "birch"), "ash").live
        for at in NAMES[:2]:
            lines = shown(at).splitlines()
            (first,) = [n for n, line in enumerate(lines) if line.startswith("ash ")]
            assert lines[first].endswith(new) and lines[first + 1].endswith(
                f"{old}  (in the file; replaced by the one above)"
            )
            json_said = json.loads(run("--state", state(cluster, at), "federation", "show", "--json").stdout)
            assert fingerprint(json_said["keys_now"]["ash"]) == new
            assert new in run("--state", state(cluster, at), "peer", "list").stdout
        file = run("--state", state(cluster, "ash"), "federation", "show", state(cluster, "ash") / "federation.toml")
        assert old in file.stdout and new not in file.stdout, "a file that is named is shown as it is"
        assert new in run("--state", state(cluster, "ash"), "card").stdout
        assert identity.load(cluster.layout("ash").key).fingerprint == new, "doctor's line"


def test_an_old_key_that_was_replaced_does_not_start_a_node(tmp_path: Path) -> None:
    """A backup brings the old key back: said at the start, not found out by refused logins."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        layout: Layout = cluster.layout("ash")
        old = layout.key.read_bytes()
        rotate.begin(layout.state)
        with pytest.raises(NotRunning):
            control.ask(layout.state, "keys")
        assert not rotate.finish(layout.state, force=True)
        card = config.load_card(layout.state / "ash.card")
        assert card.key == identity.load(layout.key).public != cluster.federation.get("ash").key
        layout.key.write_bytes(old)
        assert cluster.start("ash").wait(60) == 17
        assert "was replaced by" in cluster.output("ash")


def test_a_finish_that_was_cut_short_after_the_key_changed_places_is_completed(tmp_path: Path) -> None:
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        layout = cluster.layout("ash")
        begun = rotate.begin(layout.state)
        layout.key.with_name("node_ed25519.next").rename(layout.key)  # and then the power failed
        keyring.require_mine(keyring.load(layout.state, cluster.federation), "ash", begun.update.new)
        rotate.finish(layout.state)  # asks nobody: the new key is the node's already
        assert keyring.load(layout.state, cluster.federation).keys(ASH) == (begun.update.new,)


def test_a_change_that_was_cut_short_there_is_not_begun_anew_and_a_copy_of_its_key_does_no_harm(tmp_path: Path) -> None:
    """`key rotate` made another key then; a copy, out of a backup, could be announced as its own successor."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        ash = state(cluster, "ash")
        begun = rotate.begin(ash)
        shutil.copy(next_of(ash), cluster.layout("ash").key)
        for left in (("node_ed25519", "node_ed25519.next"), ("node_ed25519",)):
            assert tuple(sorted(p.name for p in next_of(ash).parent.iterdir())) == left
            with pytest.raises(UsageError) as refused:
                rotate.begin(ash)
            assert "--finish" in refused.value.remedy
            next_of(ash).unlink(missing_ok=True)
        shutil.copy(cluster.layout("ash").key, next_of(ash))
        rotate.finish(ash)
        assert identity.load(cluster.layout("ash").key).public == begun.update.new
        second = rotate.begin(ash).update
        assert (second.number, second.old) == (2, begun.update.new) and second.new != second.old
        assert identity.load(next_of(ash)).public == second.new


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("instead", ["nothing", "another key"])
def test_no_key_but_the_one_that_was_announced_takes_over(tmp_path: Path, instead: str, elsewhere: bool) -> None:
    """Another one locked the node out for good: it replaced the old key, and nobody had been told of it."""
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        ash, key = state(cluster, "ash"), cluster.layout("ash").key
        if elsewhere:
            (tmp_path / "safe").mkdir()
            key = key.rename(tmp_path / "safe" / "node.key")
        named = key if elsewhere else None
        begun = rotate.begin(ash, named)
        waiting = key.with_name(key.name + ".next")
        waiting.rename(tmp_path / "lost")
        other = identity.generate(waiting) if instead == "another key" else None
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        for call in (
            lambda: rotate.begin(ash, named),
            lambda: rotate.finish(ash, named),
            lambda: rotate.finish(ash, named, force=True),
        ):
            with pytest.raises(LocalStateError, match="nothing was changed") as refused:
                call()
            said = refused.value.message
            assert fingerprint(begun.update.new) in said and str(waiting) in said and said.startswith("ash announced")
            assert (other.fingerprint if other else "is not there") in said
            assert "backup" in refused.value.remedy and fingerprint(begun.update.old) in refused.value.remedy
            assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        (tmp_path / "lost").rename(waiting)
        assert rotate.begin(ash, named).update == begun.update
        assert not rotate.finish(ash, named, force=True)
        assert identity.load(key).public == begun.update.new


def test_no_key_is_announced_that_a_power_loss_could_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that made it was killed before it synced the folder; the next one took the file as it lay."""
    with Cluster(tmp_path, NAMES[:2], PLAN) as cluster:
        ash = state(cluster, "ash")
        disk = Recorder(ash)
        monkeypatch.setattr(durable, "disk", disk)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "sync_folder", lambda folder: None)
            made = identity.generate(next_of(ash))
        assert rotate.begin(ash).update.new == made.public
        made_bytes, announced, lost = next_of(ash).read_bytes(), 0, 0
        for after, _ in disk.after_power_loss(tmp_path / "reboots"):
            there = next_of(after).exists() and next_of(after).read_bytes() == made_bytes
            lost += not there
            if keyring.path_of(after).exists():
                announced += 1
                assert there
            shutil.rmtree(after)
        disk.close()
        assert announced and lost


def next_of(state: Path) -> Path:
    return state / "keys" / "node_ed25519.next"


def test_a_revoked_peers_change_is_not_listed_as_one() -> None:
    members = make_federation(3)
    ring, document = announced(members)
    found = keyring.warnings_of(ring.updating(document).revoking(BIRCH, "now"), BIRCH, ASH)
    assert list(found) == ["revoked birch"]
