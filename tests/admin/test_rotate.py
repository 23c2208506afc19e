"""`key rotate`, `peer update` and their ends, by state directories: what they say, refuse and survive."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from command_line import run
from faulty_disk import Recorder
from federations import ASH, BIRCH, make_federation, stranger
from key_change import NAMES, PLAN, announced, next_of, state, wait_delivered

from hsl_node.admin import keys, rotate
from hsl_node.errors import (
    LocalStateError,
    NotRunning,
    UsageError,
)
from hsl_node.federation import config, identity, keyring, strings
from hsl_node.federation.strings import fingerprint
from hsl_node.host import control, durable
from hsl_node.host.layout import Layout
from hsl_node.status import page


def test_a_keyring_that_was_tampered_with_stops_the_start(tmp_path: Path) -> None:
    """Whoever edits keyring.toml cannot make another key count: the chain's signatures are checked at every start."""
    with Cluster(tmp_path, NAMES, PLAN) as cluster:
        begun = rotate.begin(state(cluster, "ash"))
        assert not begun.live
        rotate.take(state(cluster, "birch"), begun.file, fingerprint(begun.update.new))
        path = Layout(state(cluster, "birch")).keyring_toml
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
        assert not Layout(state(cluster, "birch")).keyring_toml.exists()


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
            return [w.text for w in page.fetch(birch).warnings]

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
        Layout(birch).keyring_toml.write_text("version = 2\n")
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
            if Layout(after).keyring_toml.exists():
                announced += 1
                assert there
            shutil.rmtree(after)
        disk.close()
        assert announced and lost


def test_a_revoked_peers_change_is_not_listed_as_one() -> None:
    members = make_federation(3)
    ring, document = announced(members)
    found = keyring.warnings_of(ring.updating(document).revoking(BIRCH, "now"), BIRCH, ASH)
    assert list(found) == ["revoked birch"]
