"""`hsl-node verify`: what is kept is checked once more; each damage is named; ssh-keygen confirms the export."""

from __future__ import annotations

import gc
import json
import shutil
import sqlite3
import subprocess
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from cluster import Cluster
from command_line import code, run

from hsl_node.admin import archive, doctor, enrol, rotate, verify
from hsl_node.errors import LocalStateError, NotInitialised
from hsl_node.federation import config
from hsl_node.federation.identity import MANIFEST_NAMESPACE, load
from hsl_node.federation.names import Peer, Round
from hsl_node.federation.plan import Plan
from hsl_node.federation.strings import fingerprint
from hsl_node.host.layout import Layout
from hsl_node.sync import manifest as manifest_module
from hsl_node.sync.manifest import Manifest, content_digest, parse_manifest
from hsl_node.sync.store.journal import Journal

PLAN = Plan(method="fedavg", fusion="weighted_mean", rounds=3, epochs_per_round=2, plateau_rounds=100)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State directory of ash after a run of three rounds with birch, in which ash replaced its key before the start."""
    with Cluster(tmp_path_factory.mktemp("run"), ("ash", "birch"), PLAN) as cluster:
        ash, birch = (cluster.layout(n).state for n in ("ash", "birch"))
        begun = rotate.begin(ash)
        rotate.take(birch, begun.file, fingerprint(begun.update.new))
        cluster.finish_in_step("ash", "birch")
        for name in cluster.names:
            assert cluster.stop(name) == 0
        return ash


@pytest.fixture
def state(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "ash", ignore=shutil.ignore_patterns("*.sock")))


def test_a_sound_node_is_found_sound_and_each_round_says_who_contributed(state: Path) -> None:
    found = verify.examine(state)
    assert found.defects == []
    assert sorted(found.rounds) == [0, 1, 2, 3, 4]
    for number in (1, 2, 3):
        assert set(found.rounds[Round(number)].contributors) == {"ash", "birch"}
    assert found.rounds[Round(3)].recomputed and found.rounds[Round(3)].files == 2
    assert not found.rounds[Round(1)].recomputed, "its inputs are pruned by now"
    assert found.documents == 5 * 2 + 5  # manifests of both, receipts of birch
    done = run("--state", str(state), "verify")
    assert done.exit_code == 0 and "15 signed documents checked: all is as signed" in done.stdout
    assert done.stdout.count("computed again") >= 1


def test_stock_ssh_keygen_confirms_every_exported_document(state: Path, tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    done = run("--state", str(state), "verify", "--export", str(folder))
    assert done.exit_code == 0
    listed = [line.split() for line in (folder / "index").read_text().splitlines()]
    assert len(listed) == 16  # and the key update
    for signer, namespace, name in listed:
        command = ["ssh-keygen", "-Y", "verify", "-f", str(folder / "allowed_signers"), "-I", signer, "-n", namespace]
        with open(folder / name, "rb") as line:
            checked = subprocess.run([*command, "-s", str(folder / f"{name}.sig")], stdin=line, capture_output=True)
        assert checked.returncode == 0, (name, checked.stderr)
        json.loads((folder / name).read_text())
    assert checked_by_script(folder) == (0, "16 of 16 documents good\n")
    (folder / listed[0][2]).write_text("{}\n")
    code_, told = checked_by_script(folder)
    assert code_ == 1 and told.startswith(f"BAD: {listed[0][2]}") and told.endswith("15 of 16 documents good\n")
    assert code(run("--state", str(state), "verify", "--export", str(folder))) == 2, "never over another export"


def checked_by_script(folder: Path) -> tuple[int, str]:
    done = subprocess.run(["sh", str(folder / "check.sh")], capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize("harm", ["index removed", "index cut", "index empty", "index doubled", "document removed",
                                  "signature removed", "signers removed"])  # fmt: skip
def test_the_script_of_an_export_fails_where_anything_of_it_is_missing(state: Path, tmp_path: Path, harm: str) -> None:
    """It was silent, and exit code 0, without an index: nothing was checked, and all seemed well."""
    folder = tmp_path / "audit"
    assert run("--state", str(state), "verify", "--export", str(folder)).exit_code == 0
    index = folder / "index"
    lines = index.read_text().splitlines(keepends=True)
    name = lines[0].split()[2]
    match harm:
        case "index removed":
            index.unlink()
        case "index cut":
            index.write_text("".join(lines[:-1]))
        case "index empty":
            index.write_text("")
        case "index doubled":
            index.write_text("".join([*lines[:-1], lines[0]]))
        case "document removed":
            (folder / name).unlink()
        case "signature removed":
            (folder / f"{name}.sig").unlink()
        case "signers removed":
            (folder / "allowed_signers").unlink()
    code_, told = checked_by_script(folder)
    assert code_ == 1 and "BAD: " in told and (harm == "index doubled" or "16 of 16" not in told)


def sql(state: Path, *commands: str) -> None:
    with sqlite3.connect(state / "journal.sqlite3") as db:
        for command in commands:
            assert db.execute(command).rowcount > 0, command


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_manifest(state: Path) -> None:
    """birch's manifest of round 2, altered and signed by ash: the signature is good, the signer wrong."""
    key = load(Layout(state).key)
    with sqlite3.connect(state / "journal.sqlite3") as db:
        (text,) = db.execute("SELECT content FROM manifests WHERE round = 2 AND peer = 'birch'").fetchone()
        content = json.loads(text) | {"samples": 999}
        document = key.sign(content, MANIFEST_NAMESPACE)
        db.execute("UPDATE manifests SET document = ?, content = ? WHERE round = 2 AND peer = 'birch'",
                   (document, json.dumps(content)))  # fmt: skip


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit in an input": (lambda s: flip_byte(Layout(s).inbox(Round(3), Peer("birch"))), "the file of birch"),
    "a flipped bit in my checkpoint": (lambda s: flip_byte(Layout(s).outbox(Round(3))), "the file of ash"),
    "a flipped bit in a fused model": (lambda s: flip_byte(Layout(s).fused(Round(3))), "the fused model has"),
    "another fused digest": (
        lambda s: sql(s, f"UPDATE fused SET sha256 = '{'a' * 64}' WHERE round = 2"), "stands on"),
    "a manifest that another signed": (other_manifest, "round 2: manifest of birch: the signature does not verify"),
    "a column changed": (
        lambda s: sql(s, f"UPDATE manifests SET sha256 = '{'b' * 64}' WHERE round = 1 AND peer = 'birch'"),
        "the journal's columns are not what was signed"),
    "a receipt of another round": (
        lambda s: sql(s, "DELETE FROM receipts WHERE round = 1", "UPDATE receipts SET round = 1 WHERE round = 2"),
        "round 1: receipt of birch: the journal's columns"),
    "a receipt torn": (
        lambda s: sql(s, "UPDATE receipts SET document = x'00' WHERE round = 1"), "round 1: receipt of birch"),
    "what I signed changed": (
        lambda s: sql(s, "UPDATE signed SET document = x'00' WHERE round = 2"), "what this node signed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_damage_is_named_and_exits_14(state: Path, kind: str) -> None:
    damage, words = DAMAGE[kind]
    damage(state)
    done = run("--state", str(state), "verify")
    assert code(done) == 14
    assert words in done.stdout, done.stdout
    assert not json.loads(run("--state", str(state), "verify", "--json").stdout)["ok"]


def test_a_checkpoint_that_is_pruned_while_it_is_fused_again_is_no_defect(state: Path) -> None:
    """The hashing of a whole round takes long enough for the daemon to finish the next one."""
    layout, federation = Layout(state), config.load_federation(state)
    peers = {peer: layout.checkpoint(Round(3), peer, Peer("ash")) for peer in federation.peers}
    those = Round(3), peers, dict.fromkeys(peers, 1), {peer: {} for peer in peers}, federation
    assert verify._fused_again(layout, *those) is not None
    peers[Peer("birch")].unlink()
    assert verify._fused_again(layout, *those) is None


def test_an_export_that_is_cut_short_is_not_in_the_way_of_the_next(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "audit"

    def failing(*_: object) -> None:
        assert list(out.iterdir()), "documents were written before"
        raise LocalStateError("the disk fails", remedy="look at it")

    with monkeypatch.context() as patch:
        patch.setattr(verify, "_files", failing)
        assert code(run("--state", str(state), "verify", "--export", str(out))) == 15
    assert not out.exists()
    assert code(run("--state", str(state), "verify", "--export", str(out))) == 0


def test_a_document_that_was_lost_is_named_with_what_it_would_show_and_is_no_defect(state: Path) -> None:
    """As after a loss of two disks: nobody had birch's manifest of round 2 any more. The models agree."""
    sql(state, "DELETE FROM manifests WHERE round = 2 AND peer = 'birch'")
    done = run("--state", str(state), "verify")
    assert code(done) == 0, done.output
    assert "LOST    round 2: the manifest of birch" in done.stdout and "DEFECT" not in done.stdout
    assert "what is here is as signed" in done.stdout
    found = json.loads(run("--state", str(state), "verify", "--json").stdout)
    assert found["ok"] and len(found["lost"]) == 1


@pytest.mark.parametrize("harm", ["gone", "altered"])
def test_a_best_or_last_fused_model_that_is_lost_is_named_by_every_command_with_a_way_back(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """The best one here was said to be "as recorded", and to be at the peers: each of them keeps its own best."""
    sql(state, "UPDATE fused SET score = round = 2")
    sql(state, "DELETE FROM own")
    for number in (2, 3):
        path = Layout(state).fused(Round(number))
        path.unlink() if harm == "gone" else flip_byte(path)
    why = {2: "the best on this hospital's validation images", 3: "the last one"}
    how = {2: "is not there", 3: "is not there"} if harm == "gone" else dict.fromkeys(why, "altered")
    back = f"`hsl-node --state {state} start` (where the daemon runs, `hsl-node --state {state} stop` first)"

    done = run("--state", str(state), "verify")
    assert code(done) == (0 if harm == "gone" else 14)
    for number, words in why.items():
        if harm == "gone":
            (line,) = [
                x for x in done.stdout.splitlines() if x.startswith(f"LOST    the fused model of round {number}")
            ]
            assert words in line and how[number] in line and back in line
        else:
            (line,) = [
                x for x in done.stdout.splitlines() if x.startswith(f"DEFECT  round {number}: the fused model has")
            ]
            assert back in line
    assert done.stdout.count(" lost\n") == (2 if harm == "gone" else 0) and "as recorded" in done.stdout

    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    (check,) = [c for c in doctor.examine(state) if c.name == "models"]
    assert check.outcome == "warning" and back in check.fix
    assert all(f"round {number} ({words})" in check.text for number, words in why.items())

    made = run("--state", str(state), "backup", str(tmp_path / "b.tar"))
    assert made.exit_code == 0
    for number, words in why.items():
        assert f"not in it: the fused model of round {number} ({words})" in made.stdout and back in made.stdout
    assert not [name for name in archive.read_index(tmp_path / "b.tar").files if name.startswith("fused/")]


@pytest.mark.parametrize("harm", ["gone", "altered"])
def test_an_own_model_that_is_lost_is_named_and_that_nobody_else_has_it(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """The best on validation: of the stand-in trainer that of its last round."""
    path = Layout(state).own(3)
    path.unlink() if harm == "gone" else flip_byte(path)
    back = f"No other hospital has it: `tar -xf BACKUP -C {state} trainer/own_r000003.safetensors`"

    done = run("--state", str(state), "verify")
    assert code(done) == (0 if harm == "gone" else 14)
    begins = (
        "LOST    this hospital's own model of round 3 (the best on" if harm == "gone" else "DEFECT  round 3: this node"
    )
    (line,) = [x for x in done.stdout.splitlines() if x.startswith(begins)]
    assert back in line and "hsl-node start" not in line

    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    (check,) = [c for c in doctor.examine(state) if c.name == "models"]
    assert check.outcome == "warning" and back in check.fix and "own model of round 3" in check.text

    made = run("--state", str(state), "backup", str(tmp_path / "b.tar"))
    assert "not in it: this hospital's own model of round 3" in made.stdout and back in made.stdout
    assert not [name for name in archive.read_index(tmp_path / "b.tar").files if "own_" in name]


def test_a_peer_that_fused_something_else_is_named(state: Path) -> None:
    """The input of ash that birch's manifest of round 3 names is not the one kept here: its own signature proves it."""
    key = load(Layout(state).key)
    with sqlite3.connect(state / "journal.sqlite3") as db:
        (text,) = db.execute("SELECT content FROM manifests WHERE round = 2 AND peer = 'ash'").fetchone()
        content = json.loads(text) | {"samples": 999}
        document = key.sign(content, MANIFEST_NAMESPACE)
        db.execute("UPDATE manifests SET document = ?, content = ? WHERE round = 2 AND peer = 'ash'",
                   (document, json.dumps(content)))  # fmt: skip
        db.execute("UPDATE signed SET document = ? WHERE round = 2", (document,))
    assert [d for d in verify.examine(state).defects if "file" not in d] == [
        f"round 3: {peer} fused another input of ash than the one kept here" for peer in ("ash", "birch")
    ]


def test_defects_are_told_round_by_round(state: Path) -> None:
    """Round 1 of birch came last, as after a recovery."""
    sql(state, "UPDATE manifests SET rowid = rowid + 100, sha256 = 'x' WHERE round = 1 AND peer = 'birch'",
        "UPDATE manifests SET sha256 = 'x' WHERE round = 2 AND peer = 'birch'",
        "UPDATE receipts SET document = x'00' WHERE round = 1",
        f"UPDATE fused SET sha256 = '{'a' * 64}' WHERE round = 0")  # fmt: skip
    told = [d.partition(",")[0].partition(" stands")[0] for d in verify.examine(state).defects]
    assert [t.partition(": the ")[0] for t in told[:7]] == [
        "round 0: ash", "round 0: birch", "round 0",  # its file, too
        "round 1: manifest of birch", "round 1: receipt of birch", "round 1: ash", "round 1: birch",
    ]  # fmt: skip
    assert told[7].startswith("round 2: manifest of birch")


def test_of_a_long_journal_each_document_is_read_and_digested_once_and_two_rounds_are_in_memory(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, 64 peers x 1,000 rounds were all in memory at once, and each digest was made once for each peer."""
    made = read = most = 0
    alive: weakref.WeakValueDictionary[int, Manifest] = weakref.WeakValueDictionary()

    def parsed(line: bytes) -> Manifest:
        nonlocal read, most
        manifest = alive[read] = parse_manifest(line)
        read += 1
        gc.collect()
        most = max(most, len(alive))
        return manifest

    def digested(content: Mapping[str, object]) -> str:
        nonlocal made
        made += 1
        return content_digest(content)

    queries: list[str] = []
    opened = Journal.read_only

    def traced(path: Path) -> Journal:
        journal = opened(path)
        journal._db.set_trace_callback(queries.append)
        return journal

    monkeypatch.setattr(verify, "parse_manifest", parsed)
    monkeypatch.setattr(manifest_module, "content_digest", digested)
    monkeypatch.setattr(Journal, "read_only", traced)
    seen: list[tuple[int, int]] = []
    found = verify.examine(state, lambda done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(1, 6)]
    assert made == read == 10 and most <= 4, "of two peers in rounds 0 to 4"
    documents = [q for q in queries if "manifests" in q and "*" in q]
    assert len(documents) == 5 and all(" WHERE round = " in q for q in documents)
    assert found.documents == 15


def test_a_run_in_past_says_what_it_is_and_can_be_looked_at_in_a_copy(state: Path, tmp_path: Path) -> None:
    """It proposed `hsl-node init`."""
    federation = config.load_federation(state)
    other = tmp_path / "federation.toml"
    other.write_text(config.federation_text(federation.model_copy(update={"name": "another"})))
    (state / "keyring.toml").rename(tmp_path / "keyring.toml")
    shutil.copy(tmp_path / "keyring.toml", state)
    enrol.join(state, other, replace=True)
    (past,) = (state / "past").iterdir()
    for words in (("status",), ("verify",), ("export", "--out", str(tmp_path / "model")), ("backup", "x.tar")):
        refused = run("--state", str(past), *words)
        assert isinstance(refused.exception, NotInitialised), words
        assert "earlier federation" in refused.exception.remedy and "init" not in refused.exception.remedy
        assert f"from {state} into the copy" in refused.exception.remedy
    copy = Path(shutil.copytree(past, tmp_path / "copy"))
    for name in ("node.toml", "keyring.toml"):
        shutil.copy(state / name, copy)
    done = run("--state", str(copy), "verify")
    assert code(done) == 0 and "all is as signed" in done.stdout
    assert run("--state", str(copy), "status").exit_code == 3, "it shows the run"
