"""A node's key is replaced in the midst of a run: no round is lost, old and new key both count until it is finished."""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import WAIT_S, Cluster
from command_line import run
from federations import ASH, BIRCH
from key_change import NAMES, PLAN, end_when_settled, next_of, sent, signed_by, state, wait_delivered
from plain_inbox import with_a_plain_inbox
from two_faces import at, deliver, face
from two_faces import begin as play

from hsl_node.admin import backup, doctor, enrol, keys, ping, rotate
from hsl_node.errors import (
    FederationMismatch,
    HslError,
    KeyRefused,
    LocalStateError,
    TransportError,
)
from hsl_node.federation import config, identity, keyring
from hsl_node.federation.names import Digest
from hsl_node.federation.strings import fingerprint
from hsl_node.host import control
from hsl_node.sync import round as machine
from hsl_node.sync.store.store import Store


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


@pytest.mark.sample(2, "key changes")
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


@pytest.mark.sample(2, "key changes")
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
            and "docs/administrator/keys.md" in warning["fix"]
        )
        peer = examined(monkeypatch, cluster, "ash", "peer birch")
        assert peer.exit_code == 12 and "restore a newer one" in peer.fix

        join_anew(cluster, tmp_path)
        cluster.wait_finished()
        assert cluster.fused("ash") == cluster.fused("birch")


@pytest.mark.sample(2, "key changes")
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


@pytest.mark.sample(2, "key changes")
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


@pytest.mark.sample(2, "key changes")
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


@pytest.mark.sample(2, "key changes")
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


@pytest.mark.sample(2, "key changes")
def test_a_key_changed_after_a_halt_is_finished_at_the_peers(tmp_path: Path) -> None:
    """cedar, played by the test, tells both that it stopped in round 1: they halt and sign nothing more."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        ash, birch = state(cluster, "ash"), state(cluster, "birch")
        play(cluster)
        checkpoint, _ = face(cluster, 1.0)
        base = checkpoint.content["base"]
        halted = at(cluster, "ash").manifest(checkpoint.content, sha256=base, bytes=0, score=None, halted=True)
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


@pytest.mark.sample(2, "key changes")
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


@pytest.mark.sample(2, "key changes")
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


@pytest.mark.sample(2, "key changes")
def test_a_new_key_that_is_lost_costs_no_round_and_the_next_federation_changes_keys_again(tmp_path: Path) -> None:
    """The way that the refusal and keys.md name: the run ends with the old key, which birch alone lets in."""
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
