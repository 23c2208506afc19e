"""kill -9 at every named point of every durable step (`host/durable.py`): what comes out is what it would have been.

Real daemons with the stand-in trainer; the trainer's own steps with the real one; `init`, `join`, `key` and `peer` as
commands.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import learning
import pytest
from cluster import WAIT_S
from crash_points import (
    NAMES,
    PLAN,
    TRAINER,
    Killed,
    _begin,
    command,
    digests_at_the_end,
    documents,
    federation_in,
    held_in_round_1,
    killed_at,
    undisturbed_run,
)
from trainer_process import state_of

from hsl_node.admin import archive, backup, enrol, recover
from hsl_node.federation import config, identity, keyring, node_toml
from hsl_node.federation.names import Digest
from hsl_node.federation.strings import fingerprint
from hsl_node.host import control, files
from hsl_node.host.durable import POINTS, Step
from hsl_node.host.layout import Layout
from hsl_node.node.heal import mark as recover_mark
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.store import Store
from hsl_node.train.data import anchor as anchors

# In the order in which one round comes to them, so that a daemon killed at each in turn needs few rounds.
IN_A_DAEMON = (
    Step.START_JOURNAL, Step.START_INITIAL, Step.START_STATE, Step.JOURNAL_NOTE, Step.SENDER_SIGN,
    Step.RECEIVER_REFUSED, Step.RECEIVER_PART, Step.RECEIVER_COMMIT, Step.RECEIVER_CLAIM, Step.RECEIVER_VERIFIED,
    Step.RECEIVER_ADMIT, Step.RECEIVER_RECORD, Step.RECEIVER_RECEIPT, Step.RECEIVER_RELEASE, Step.SENDER_DELIVERED,
    Step.TRAINER_OUTBOX, Step.FUSION_WRITE, Step.FUSION_RECORD, Step.FUSION_PRUNE,
)  # fmt: skip
WORKER = (
    Step.TRAINER_DIGESTS, Step.TRAINER_LEDGER, Step.TRAINER_IMAGES, Step.START_INITIAL, Step.TRAINER_BEST,
    Step.TRAINER_EPOCH, Step.TRAINER_OWN, Step.TRAINER_OUTBOX,
)  # fmt: skip
INIT = (Step.INIT_KEY, Step.INIT_CARD, Step.INIT_SETTINGS)
JOIN = (Step.JOIN_SET_ASIDE, Step.JOIN_ANCHOR, Step.JOIN_FEDERATION)
KEYS = (Step.KEYS_RING, Step.KEYS_SWITCH)
RECOVERY = (Step.RECOVERY_FETCH, Step.RECOVERY_PLACE, Step.RECOVERY_STATE)
BACKUP = (Step.BACKUP_WRITE,)
RESTORE = (Step.RESTORE_UNPACK, Step.RESTORE_PLACE)
FILES = (Step.RECEIVER_EVIDENCE, Step.FILE_WEIGHTS, Step.FILE_RESULT)
IN_PLACE = (":renamed", ":after")  # the file that is written is there


def points_of(*steps: Step) -> list[str]:
    return [point for step in steps for point in step.points]


def once(step: Step, last: str) -> list[str]:
    """What is written once, and taken as it lies from then on: it dies at `renamed` or at `after`, not at both."""
    return [point for point in step.points if point.endswith(("before", "renaming", last))]


def test_every_registered_point_is_reached_in_this_file() -> None:
    """Each test below fails where its point is not; together they leave none out."""
    reached = points_of(*IN_A_DAEMON, *WORKER, *INIT, *JOIN, *KEYS, *RECOVERY, *BACKUP, *RESTORE, *FILES)
    assert set(reached) == set(POINTS)


TURNS = 4  # parts of what follows; in each, all points of some steps


@pytest.mark.sample(4)
@pytest.mark.parametrize("part", range(TURNS))
def test_a_daemon_killed_at_every_point_in_turn_ends_with_the_same_bytes(tmp_path: Path, part: int) -> None:
    """One federation; each start of ash ends at the next point, until it has died at all of them."""
    rounds = 10  # about twice what it takes: how many points one round passes before the next kill is chance
    expected = undisturbed_run(tmp_path / "undisturbed", rounds)
    few = -(-len(IN_A_DAEMON) // TURNS)
    with federation_in(tmp_path / "killed", rounds) as cluster:
        cluster.start("birch")
        for number, point in enumerate(points_of(*IN_A_DAEMON[part * few : (part + 1) * few])):
            killed_at(cluster, point, tmp_path / f"mark{number}")
            if point == "start.initial:renamed":
                cluster.layout("ash").fused(0).unlink()  # else its next point is passed no more
        cluster.start("ash")
        assert digests_at_the_end(cluster) == expected


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("point", points_of(*IN_A_DAEMON))
@pytest.mark.parametrize("passage", [1, 2])
def test_a_daemon_killed_once_at_a_point_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: dict[int, str], point: str, passage: int
) -> None:
    if passage > 1 and point.startswith(("start.", "receiver.refused")):
        pytest.skip("passed once in a life")
    with federation_in(tmp_path / "nodes", 2) as cluster:
        cluster.start("birch")
        killed_at(cluster, f"{point}#{passage}" if passage > 1 else point, tmp_path / "mark")
        cluster.start("ash")
        assert digests_at_the_end(cluster) == undisturbed


def test_what_a_daemon_had_signed_when_it_was_killed_is_what_it_delivers(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """Killed right after the signature of round 1, before anybody was told: the very same document goes out."""
    with federation_in(tmp_path, 2) as cluster:
        cluster.start("birch")
        killed_at(cluster, f"{Step.SENDER_SIGN.points[-1]}#2", tmp_path / "mark")  # the first is its statement
        before = documents(cluster, "ash", 1)
        assert before["signed"] == before["ash"]
        assert "ash" not in documents(cluster, "birch", 1)
        cluster.trainer = ["--seed", "99", "--times", "1.5", *TRAINER]  # would give other bytes
        cluster.hold("ash", 2)
        cluster.start("ash")
        cluster.wait_until("birch", lambda s: s["round"] == 2 and s["phase"] == "collect", "round 1 fused")
        cluster.kill("ash")
        cluster.trainer = TRAINER
        cluster.release("ash")
        cluster.start("ash")
        assert digests_at_the_end(cluster) == undisturbed
        after = documents(cluster, "ash", 1)
        assert (after["signed"], after["ash"]) == (before["signed"], before["ash"])
        assert documents(cluster, "birch", 1)["ash"] == before["signed"]


# ------------------------------------------------------------------ one process, begun by a fork


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[..., int | None]]:
    """Run a function in a process of its own, with a point to die at or without; gives its exit code.

    Forked from a server that has imported everything and run nothing: no threads, and no second for imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hsl_node.cli", "hsl_node.admin.enrol", "hsl_node.train.worker", "learning"])

    def run(body: Callable[..., None], *arguments: Any, crash: str = "") -> int | None:
        process = context.Process(target=_begin, args=(crash, body, *arguments))
        process.start()
        process.join(WAIT_S)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode

    yield run


def train_a_round(state: Path) -> None:
    """The jobs of a trainer, in its own process."""
    from hsl_node.train.worker import Worker

    worker = Worker(state, lambda event: None)
    base = state / "fused" / "r000000.safetensors"
    worker.run({"job": "init", "out": str(base)})
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    files = {"out": str(state / "r1.safetensors"), "own": str(Layout(state).own(1))}
    worker.run({"job": "train", "round": 1, "base": str(base), "base_sha256": digest, **files})


@pytest.fixture(scope="module")
def trained_round(tmp_path_factory: pytest.TempPathFactory, fresh: Callable[..., int | None]) -> tuple[Path, Path]:
    """A state that has trained a round undisturbed, and one that has not begun."""
    expected = state_of(tmp_path_factory.mktemp("undisturbed"))
    assert fresh(train_a_round, expected) == 0
    return expected, state_of(tmp_path_factory.mktemp("template"))


@pytest.mark.sample(7)
@pytest.mark.parametrize("point", points_of(*WORKER))
def test_a_trainer_killed_at_any_point_ends_with_the_same_bytes(
    tmp_path: Path, fresh: Callable[..., int | None], trained_round: tuple[Path, Path], point: str
) -> None:
    expected, template = trained_round
    state, mark = tmp_path / "state", tmp_path / "mark"
    shutil.copytree(template, state)
    assert (fresh(train_a_round, state, crash=f"{point} {mark}"), mark.exists()) == (-signal.SIGKILL, True)
    assert fresh(train_a_round, state) == 0
    assert (state / "r1.safetensors").read_bytes() == (expected / "r1.safetensors").read_bytes()
    assert learning.same_bytes(state / "trainer", expected / "trainer")
    assert (state / "splits.json").read_bytes() == (expected / "splits.json").read_bytes()


@pytest.mark.parametrize("point", points_of(*INIT))
def test_init_killed_anywhere_and_given_again_is_an_init(
    tmp_path: Path, fresh: Callable[..., int | None], point: str
) -> None:
    state, mark = tmp_path / "state", tmp_path / "mark"
    words = ("--state", str(state), "init", "--name", "ash", "--address", "ash.example.org:8922")
    assert (fresh(command, *words, crash=f"{point} {mark}"), mark.exists()) == (-signal.SIGKILL, True)
    key = Layout(state).key.read_bytes() if Layout(state).key.exists() else None
    done = point.startswith("init.settings") and point.endswith(IN_PLACE)
    assert fresh(command, *words) == (2 if done else 0)  # 2: this has been done here before
    assert key in (None, Layout(state).key.read_bytes())
    assert config.load_card(state / "ash.card").key == identity.load(Layout(state).key).public
    assert node_toml.load_node(state).name == "ash"
    assert sorted(p.name for p in (state / "keys").iterdir()) == ["node_ed25519"]
    assert sorted(p.name for p in state.iterdir() if p.is_file()) == ["ash.card", "node.toml"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A state that has trained under one federation, another one's file, and its anchor set."""
    folder = tmp_path_factory.mktemp("trained")
    for name in NAMES:
        enrol.init(folder / name, name=name, address=f"{name}.example.org:8922", listen=None, data=None)
    cards = [folder / name / f"{name}.card" for name in NAMES]
    anchor = folder / "anchor.safetensors"
    anchors.save(learning.anchor(), anchor)
    first = enrol.create(name="first", cards=cards, plan=PLAN, anchor=None)
    second = enrol.create(name="second", cards=cards, plan=learning.small_plan(), anchor=anchor)
    for made in (first, second):
        files.write_new(folder / f"{made.name}.toml", config.federation_text(made))
    state = folder / "ash"
    enrol.join(state, folder / "first.toml")
    store = Store(Layout(state))
    with store.journal.transaction():
        store.journal.set_meta("federation", first.digest)
        store.journal.save_state({"me": "ash", "round": 1})
        store.journal.record_signed(1, Digest("a" * 64), b"document")
    for path in (store.layout.outbox(1), store.layout.fused(0)):
        path.write_bytes(path.parent.name.encode())
    store.close()
    return state, folder / "second.toml", anchor


SET_ASIDE_PASSAGES = 8  # federation.toml, six folders, the journal


@pytest.mark.parametrize(
    "point",
    [f"{p}#{n}" for p in Step.JOIN_SET_ASIDE.points for n in range(1, SET_ASIDE_PASSAGES + 1)]
    + points_of(Step.JOIN_ANCHOR, Step.JOIN_FEDERATION),
)
def test_join_killed_anywhere_and_given_again_is_a_join(
    tmp_path: Path, fresh: Callable[..., int | None], trained: tuple[Path, Path, Path], point: str
) -> None:
    """The old run is set aside whole, in one or two folders; nothing of it stays beside the new federation."""
    template, file, anchor = trained
    state, mark = tmp_path / "ash", tmp_path / "mark"
    shutil.copytree(template, state)
    words = ("--state", str(state), "federation", "join", str(file), "--anchor", str(anchor), "--replace")
    assert (fresh(command, *words, crash=f"{point} {mark}"), mark.exists()) == (-signal.SIGKILL, True)
    assert fresh(command, *words) == 0
    assert config.load_federation(state).name == "second"
    assert Layout(state).anchor.read_bytes() == anchor.read_bytes()
    assert [p for p in state.glob("*/r0*")] == []
    past = Layout(state).past
    assert [p.read_bytes() for p in past.glob("*/outbox/*")] == [b"outbox"]
    assert [p.read_bytes() for p in past.glob("*/fused/*")] == [b"fused"]
    (old,) = past.glob("*/federation.toml")
    assert 'name = "first"' in old.read_text()
    (path,) = past.glob("*/journal.sqlite3")
    before, now = Journal.read_only(path), Journal.create(Layout(state).journal)  # as the next start makes it
    assert before.signed(1) == (Digest("a" * 64), b"document")
    assert now.state() is None and now.signed(1) is None
    before.close()
    now.close()
    assert not list(state.glob("*.tmp"))


def keep_evidence(state: Path) -> None:
    Store(Layout(state)).keep_evidence("r000001_birch_first.manifest", b"proof")


def write_weights(state: Path) -> None:
    anchors.save(learning.anchor(), state / "anchor.safetensors")


def write_result(state: Path) -> None:
    files.write_new(state / "report.html", "ü" * 100, replace=True)


@pytest.mark.parametrize(
    ("step", "body", "name"),
    [
        (Step.RECEIVER_EVIDENCE, keep_evidence, "evidence/r000001_birch_first.manifest"),
        (Step.FILE_WEIGHTS, write_weights, "anchor.safetensors"),
        (Step.FILE_RESULT, write_result, "report.html"),
    ],
)
def test_a_file_is_there_whole_or_not_at_all(
    tmp_path: Path, fresh: Callable[..., int | None], step: Step, body: Callable[[Path], None], name: str
) -> None:
    (tmp_path / "whole").mkdir()
    assert fresh(body, tmp_path / "whole") == 0
    expected = (tmp_path / "whole" / name).read_bytes()
    for point in step.points:
        state, mark = tmp_path / point, tmp_path / f"{point}.mark"
        state.mkdir()
        assert (fresh(body, state, crash=f"{point} {mark}"), mark.exists()) == (-signal.SIGKILL, True)
        assert (state / name).exists() == point.endswith(IN_PLACE)
        assert fresh(body, state) == 0
        assert (state / name).read_bytes() == expected
        assert [p for p in (state / name).parent.iterdir() if p.name.endswith(".tmp")] == []


def test_a_key_change_killed_at_every_point_and_given_again_ends_with_the_same_bytes(
    tmp_path: Path, fresh: Callable[..., int | None], undisturbed: dict[int, str]
) -> None:
    """Each command at both ends dies at each of its points; ash's daemon too, between them."""
    with federation_in(tmp_path / "nodes", 2) as cluster:
        held_in_round_1(cluster)
        killed = Killed(fresh, cluster, tmp_path)
        ash = cluster.layout("ash")
        points = [*once(Step.INIT_KEY, "renamed"), *once(Step.KEYS_RING, "renamed"), *Step.FILE_RESULT.points]
        killed.at("ash", "key", "rotate", points=points)
        assert killed.run("ash", "key", "rotate") == 0
        new = keyring.load(ash.state, cluster.federation).newest("ash")
        old = cluster.federation.get("ash").key

        take = ("peer", "update", str(ash.state / "ash_1.update"), "--fingerprint", fingerprint(new))
        killed.at("birch", *take, points=once(Step.KEYS_RING, "after"))
        assert killed.run("birch", *take) == 2  # it was taken; only the daemon did not know yet
        cluster.wait_until("birch", lambda s: any(w["code"] == "keys ash" for w in s["warnings"]), "told")

        def restart() -> None:
            assert identity.load(ash.key).public in (old, new)
            cluster.kill("ash")
            cluster.start("ash")
            cluster.wait_until("ash", lambda s: s["round"] == 1, "up again")

        finish = ("key", "rotate", "--finish")
        killed.at("ash", *finish, points=points_of(Step.KEYS_SWITCH, Step.FILE_RESULT), then=restart)
        killed.at("ash", *finish, points=once(Step.KEYS_RING, "renamed"))
        assert killed.run("ash", *finish) == 2  # done already
        assert cluster.status("ash")["fingerprint"] == fingerprint(new)
        assert config.load_card(ash.state / "ash.card").key == identity.load(ash.key).public == new
        assert keyring.load(ash.state, cluster.federation).keys("ash") == (new,)
        assert sorted(p.name for p in ash.key.parent.iterdir()) == [ash.key.name]

        control.ask(cluster.layout("birch").state, "resume")
        assert digests_at_the_end(cluster) == undisturbed
        end = ("peer", "update", "--finish", "ash")
        killed.at("birch", *end, points=once(Step.KEYS_RING, "renamed"))
        assert any(w["code"] == "keys ash" for w in cluster.status("birch")["warnings"])
        assert killed.run("birch", *end) == 2
        assert not any(w["code"] == "keys ash" for w in cluster.status("birch")["warnings"])
        assert killed.run("ash", "verify") == killed.run("birch", "verify") == 0


def test_a_revocation_killed_at_every_point_and_given_again_holds_and_so_does_its_end(
    tmp_path: Path, fresh: Callable[..., int | None], undisturbed: dict[int, str]
) -> None:
    """What was written and not told yet is told by the second call, which else would leave the peer its access."""
    with federation_in(tmp_path / "nodes", 2) as cluster:
        held_in_round_1(cluster)
        killed = Killed(fresh, cluster, tmp_path)

        def is_revoked(status: dict[str, Any]) -> bool:
            return bool(next(p["revoked"] for p in status["peers"] if p["name"] == "birch"))

        killed.at("ash", "peer", "revoke", "birch", points=once(Step.KEYS_RING, "renamed"))
        assert not is_revoked(cluster.status("ash")), "the call before died before it could say so"
        assert killed.run("ash", "peer", "revoke", "birch") == 2  # revoked already
        assert is_revoked(cluster.status("ash"))

        undo = ("peer", "revoke", "birch", "--undo", "--fingerprint", cluster.federation.get("birch").fingerprint)
        killed.at("ash", *undo, points=once(Step.KEYS_RING, "after"))
        assert is_revoked(cluster.status("ash"))
        assert killed.run("ash", *undo) == 2
        assert not is_revoked(cluster.status("ash"))

        assert cluster.stop("birch") == 0  # its own patience with a refused key is 5 minutes
        cluster.start("birch")
        cluster.wait_until("birch", lambda s: s["phase"] is not None, "up again")
        control.ask(cluster.layout("birch").state, "resume")
        assert digests_at_the_end(cluster) == undisturbed


# ------------------------------------------------------------------ backup, restore, recover


@pytest.mark.sample(3)
@pytest.mark.parametrize("step", RECOVERY, ids=lambda step: step.label)
def test_a_recovery_killed_at_every_point_goes_on_at_the_next_start(tmp_path: Path, step: Step) -> None:
    with federation_in(tmp_path, 2) as cluster:
        cluster.start_all()
        expected = digests_at_the_end(cluster)
        cluster.kill("ash")
        state = cluster.layout("ash").state
        for number, point in enumerate(step.points):
            for path in state.iterdir():
                if path.name not in ("keys", "node.toml", "federation.toml", "log"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            recover.prepare(state)
            killed_at(cluster, point, tmp_path / f"mark{number}")
            cluster.start("ash")
            assert digests_at_the_end(cluster) == expected, point
            cluster.kill("ash")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A state directory with a federation, and its backup."""
    folder = tmp_path_factory.mktemp("saved")
    for name in NAMES:
        enrol.init(folder / name, name=name, address=f"{name}.example.org:8922", listen=None, data=None)
    cards = [folder / name / f"{name}.card" for name in NAMES]
    made = enrol.create(name="saved", cards=cards, plan=PLAN, anchor=None)
    files.write_new(folder / "federation.toml", config.federation_text(made))
    enrol.join(folder / "ash", folder / "federation.toml")
    backup.backup(folder / "ash", folder / "ash.tar")
    return folder / "ash", folder / "ash.tar"


@pytest.mark.parametrize("point", points_of(*BACKUP))
def test_a_backup_is_there_whole_or_not_at_all(
    tmp_path: Path, fresh: Callable[..., int | None], saved: tuple[Path, Path], point: str
) -> None:
    file, mark = tmp_path / "ash.tar", tmp_path / "mark"
    words = ("--state", str(saved[0]), "backup", str(file))
    assert (fresh(command, *words, crash=f"{point} {mark}"), mark.exists()) == (-signal.SIGKILL, True)
    assert file.exists() == point.endswith(IN_PLACE)
    assert fresh(command, *words) == (2 if point.endswith(IN_PLACE) else 0)
    for folder in ("keys", "fused"):
        (tmp_path / "unpacked" / folder).mkdir(parents=True)
    archive.unpack(file, tmp_path / "unpacked")
    assert file.stat().st_mode & 0o777 == 0o600
    if not point.endswith(IN_PLACE):
        assert not list(tmp_path.glob(".hsl-node-backup-*")), "a copy of the journal stays"


RESTORED = 4  # federation.toml, journal, key, node.toml


@pytest.mark.parametrize(
    "point",
    points_of(Step.RESTORE_UNPACK) + [f"{p}#{n}" for p in Step.RESTORE_PLACE.points for n in range(1, RESTORED + 1)],
)
def test_a_restore_killed_anywhere_and_given_again_is_a_restore(
    tmp_path: Path, fresh: Callable[..., int | None], saved: tuple[Path, Path], point: str
) -> None:
    state, mark = tmp_path / "ash", tmp_path / "mark"
    words = ("--state", str(state), "restore", str(saved[1]))
    assert (fresh(command, *words, crash=f"{point} {mark}"), mark.exists()) == (-signal.SIGKILL, True)
    last = point == f"restore.place:after#{RESTORED}"
    assert (state / "node.toml").exists() == last
    assert fresh(command, *words) == (2 if last else 0)  # 2: a node is there already
    for name in ("node.toml", "federation.toml", archive.KEY):
        assert (state / name).read_bytes() == (saved[0] / name).read_bytes()
    with Journal.read_only(Layout(state).journal) as journal:
        assert recover_mark.find_mark(journal) is not None
