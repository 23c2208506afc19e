"""A checkpoint that is gone, or altered at rest, is noticed before anything is made of it, and healed by the peers.

Threats 22 and 23. Real daemons with the stand-in trainer; what the trainer does about its own files: test_loop.py.
"""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cluster import WAIT_S, Cluster
from weights import weights

from hsl_node.admin import recover
from hsl_node.errors import Altered
from hsl_node.federation.names import Peer
from hsl_node.federation.plan import Plan
from hsl_node.host.durable import Step
from hsl_node.host.layout import Layout
from hsl_node.node.alarms import Alarms
from hsl_node.node.daemon import Daemon
from hsl_node.node.heal import damage
from hsl_node.node.heal import mark as recover_mark
from hsl_node.node.heal.mark import ALTERED
from hsl_node.node.poisoning import fuse_watched
from hsl_node.node.tasks import Tasks
from hsl_node.status import page
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.wire import transport
from hsl_node.sync.wire.transport import Source
from hsl_node.weights import fuse_files as fuse_module
from hsl_node.weights import whole
from hsl_node.weights.checkpoint_file import schema_of, write_weights
from hsl_node.weights.fuse_files import fuse_files
from hsl_node.weights.whole import sha256_of

PLAN = Plan(method="fedavg", fusion="mean", rounds=2, epochs_per_round=2, plateau_rounds=100)
NAMES = ("ash", "birch", "cedar")
TRAINER = ["--bytes", "20000"]
BIRCH = Peer("birch")


def flip(path: Path, at: int = -100) -> None:
    """One bit, as a disk does it."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


Harm = Callable[[Path], None]
HARMS: dict[str, Harm] = {"altered": flip, "cut short": cut, "gone": Path.unlink}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    with Cluster(tmp_path_factory.mktemp("undisturbed"), NAMES, PLAN, trainer=TRAINER) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        return cluster.fused("ash")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, NAMES, PLAN, trainer=TRAINER) as cluster:
        yield cluster


def require_healed(cluster: Cluster, undisturbed: dict[int, str]) -> None:
    cluster.wait_finished()
    for name in NAMES:
        assert cluster.fused(name) == undisturbed
        assert sha256_of(cluster.layout(name).fused(2)) == undisturbed[2]
        assert not list((cluster.layout(name).state / "evidence").iterdir())
    (warning,) = [w for w in cluster.status("ash")["warnings"] if w["code"] == "altered"]
    assert "disk" in warning["text"] and "smartctl" in warning["fix"]


def ends_and_names(cluster: Cluster, path: Path) -> None:
    """The next start of ash ends by itself, and says which file and what now."""
    assert cluster.start("ash").wait(WAIT_S) == 15
    assert str(path) in cluster.output("ash")
    assert "fetches the right bytes from its peers" in cluster.output("ash")


# ------------------------------------------------------------------ the fusion


@pytest.mark.sample(4, "altered files")
@pytest.mark.parametrize("whose", ["birch", "ash"])
@pytest.mark.parametrize("harm", HARMS)
def test_threat_23_a_checkpoint_altered_on_the_disk_is_never_fused_and_comes_again_from_the_peers(
    cluster: Cluster, undisturbed: dict[int, str], whose: str, harm: str
) -> None:
    """Of another peer (inbox/) or its own (outbox/). One bit of it halted everybody, for good."""
    cluster.start("birch")
    cluster.start("cedar")
    cluster.crash("ash", "fusion.write:before")
    layout = cluster.layout("ash")
    path = layout.outbox(1) if whose == "ash" else layout.inbox(1, BIRCH)
    HARMS[harm](path)
    if harm == "altered":  # whole by its size: it shows where it is read
        ends_and_names(cluster, path)
        assert not layout.fused(1).exists()
    cluster.start("ash")
    require_healed(cluster, undisturbed)


@pytest.mark.parametrize("harm", ["altered", "gone"])
def test_threat_23_a_checkpoint_that_the_next_round_is_trained_with_comes_again_from_the_peers(
    tmp_path: Path, harm: str
) -> None:
    """FedDpS and others read everybody's of the last round, which a fusion is done with."""
    plan = Plan(method="feddps", fusion="mean", rounds=2, epochs_per_round=2, plateau_rounds=100)
    with Cluster(tmp_path, NAMES, plan, trainer=TRAINER) as cluster:
        cluster.start("birch")
        cluster.start("cedar")
        cluster.crash("ash", "fusion.prune:before")  # it has fused round 1
        path = cluster.layout("ash").inbox(1, BIRCH)
        HARMS[harm](path)
        ends_and_names(cluster, path)
        cluster.start("ash")
        cluster.wait_finished()
        require_healed(cluster, cluster.fused("birch"))


def inputs(folder: Path) -> dict[Peer, Path]:
    paths = {Peer(p): folder / f"{p}.safetensors" for p in ("ash", "birch")}
    for number, path in enumerate(paths.values()):
        write_weights(path, weights(number + 1.0))
    return paths


@pytest.mark.parametrize("at", [-1, 8 + 3, 8 + 700])
def test_threat_23_a_fusion_compares_every_byte_that_it_reads_before_its_file_is_in_place(
    tmp_path: Path, at: int
) -> None:
    paths, out = inputs(tmp_path), tmp_path / "fused.safetensors"
    schema, expected = schema_of(weights()), {p: sha256_of(path) for p, path in paths.items()}
    samples = dict.fromkeys(paths, 1)
    digest = fuse_files("mean", paths, samples, schema, out, expected=expected)
    assert digest == sha256_of(out)
    out.unlink()
    flip(paths[BIRCH], at)
    with pytest.raises(Altered, match=r"the checkpoint of birch, .*birch\.safetensors, is altered on"):
        fuse_files("mean", paths, samples, schema, out, expected=expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ash.safetensors", "birch.safetensors"]


def unreadable(*args: object) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


class Unreadable(io.FileIO):
    read = unreadable


def test_threat_23_a_sector_that_cannot_be_read_is_as_good_as_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commonest fault of a disk: the file is there, whole by its size, and its bytes do not come."""
    paths, out = inputs(tmp_path), tmp_path / "fused.safetensors"
    monkeypatch.setattr(fuse_module, "read_chunk", unreadable)
    with pytest.raises(Altered, match="not readable any more on this disk"):
        fuse_files("mean", paths, dict.fromkeys(paths, 1), schema_of(weights()), out)
    with monkeypatch.context() as one:
        one.setattr(transport, "open", lambda *args, **more: Unreadable(paths[BIRCH]), raising=False)
        with pytest.raises(Altered, match="cannot be read any more"):
            Source(paths[BIRCH]).read(0)
    monkeypatch.setattr(whole, "sha256_of", unreadable)
    assert not whole.holds(paths[BIRCH], "0" * 64)


def test_threat_23_one_altered_file_counts_once_however_many_pushes_meet_it(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.make()
    with Journal.create(layout.journal) as journal:
        daemon: Any = SimpleNamespace(
            _fatal=None, _stopping=asyncio.Event(), here=SimpleNamespace(layout=layout, journal=journal),
            state=SimpleNamespace(round=3),
        )  # fmt: skip

        async def meets_it() -> None:
            raise Altered("gone")

        async def story() -> None:
            tasks = Tasks(partial(Daemon._failed, daemon))
            for key in ("push birch", "push cedar", "fuse 3"):
                tasks.spawn(key, meets_it())
            await asyncio.sleep(0.01)
            assert not tasks.items() and isinstance(daemon._fatal, Altered)

        asyncio.run(story())
        assert json.loads(journal.meta(ALTERED) or "")["rounds"] == [3]


def test_threat_23_no_figures_are_taken_from_a_fused_model_that_is_altered(tmp_path: Path) -> None:
    """They would look like poison, and name an honest peer; the fusion itself needs no base."""
    paths, base, out = inputs(tmp_path), tmp_path / "base.safetensors", tmp_path / "fused.safetensors"
    right = write_weights(base, weights(0.5))
    expected = {p: sha256_of(path) for p, path in paths.items()}
    arguments: Any = ("mean", paths, dict.fromkeys(paths, 1), schema_of(weights()), base, out, None, expected, right)
    digest, figures = fuse_watched(*arguments)
    assert set(figures) == set(paths)
    for harm in HARMS.values():
        write_weights(base, weights(0.5))
        harm(base) if harm is not cut else base.write_bytes(base.read_bytes()[:-1])
        assert fuse_watched(*arguments) == (digest, {})


# ------------------------------------------------------------------ what is sent, trained from, validated


@pytest.mark.sample(4, "altered files")
def test_threat_23_an_own_checkpoint_altered_before_anybody_has_it_is_made_again_to_the_same_bytes(
    cluster: Cluster, undisturbed: dict[int, str]
) -> None:
    """It is found by the receiver's refusal; nobody else can give it back."""
    for name in ("birch", "cedar"):
        cluster.start(name)
        cluster.hold(name)
    cluster.crash("ash", "sender.sign:after#2")  # the first was its statement
    flip(cluster.layout("ash").outbox(1))
    ends_and_names(cluster, cluster.layout("ash").outbox(1))
    cluster.start("ash")
    for name in ("birch", "cedar"):
        cluster.release(name)
    require_healed(cluster, undisturbed)


@pytest.mark.sample(4, "altered files")
def test_threat_23_initial_weights_that_a_killed_process_left_are_made_anew(
    cluster: Cluster, undisturbed: dict[int, str]
) -> None:
    """No journal knows their digest, and nobody could tell that the disk has altered them."""
    cluster.crash("ash", Step.START_STATE.points[0])
    flip(cluster.layout("ash").fused(0))
    require_same_from_the_start(cluster, undisturbed)


@pytest.mark.sample(4, "altered files")
def test_threat_23_initial_weights_that_are_altered_before_they_are_noted_are_noted_as_they_were_made(
    tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """Else this node would stand on other weights than all others, for good."""
    with Cluster(tmp_path, NAMES, PLAN, trainer=TRAINER, prelude=FLIPPED) as cluster:
        for name in ("birch", "cedar"):
            cluster.start(name)
        ends_and_names(cluster, cluster.layout("ash").fused(0))
        require_same_from_the_start(cluster, undisturbed)


FLIPPED = """
import pathlib, sys
import hsl_node.node.daemon as node
read = node.read_schema

def read_schema(path):
    mark = pathlib.Path(sys.argv[1]).parent / "flipped"
    if sys.argv[1].endswith("/ash") and not mark.exists():
        mark.touch()
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    return read(path)

node.read_schema = read_schema
"""


def require_same_from_the_start(cluster: Cluster, undisturbed: dict[int, str]) -> None:
    for name in NAMES:
        if name not in cluster.processes or cluster.processes[name].poll() is not None:
            cluster.start(name)
    cluster.wait_finished()
    for name in NAMES:
        assert cluster.fused(name) == undisturbed
        assert sha256_of(cluster.layout(name).fused(0)) == undisturbed[0]


@pytest.mark.sample(4, "altered files")
@pytest.mark.parametrize("harm", ["altered", "gone"])
@pytest.mark.parametrize("round", [1, 2])
def test_threat_23_a_fused_model_that_is_altered_is_not_trained_from(
    cluster: Cluster, undisturbed: dict[int, str], harm: str, round: int
) -> None:
    """Round 1 starts from the initial weights, which every node can make; round 2 from what it fused."""
    cluster.hold("ash", round)
    cluster.start_all()
    cluster.wait_until("ash", lambda s: (s["round"], s["phase"]) == (round, "train"), "training")
    cluster.kill("ash")
    path = cluster.layout("ash").fused(round - 1)
    HARMS[harm](path)
    cluster.release("ash")
    if (harm, round) == ("altered", 2):
        ends_and_names(cluster, path)
    cluster.start("ash")
    cluster.wait_finished()
    assert cluster.fused("ash") == cluster.fused("birch") == undisturbed
    assert sha256_of(path) == undisturbed[round - 1]


@pytest.mark.sample(4, "altered files")
@pytest.mark.parametrize("harm", ["altered", "gone"])
def test_threat_23_a_fused_model_that_is_altered_is_not_fused_from(tmp_path: Path, harm: str) -> None:
    """By a rule that counts from it; round 2 is fused from what round 1 fused."""
    with Cluster(tmp_path, NAMES, PLAN.model_copy(update={"fusion": "come"}), trainer=TRAINER) as cluster:
        cluster.start("birch")
        cluster.start("cedar")
        cluster.crash("ash", "fusion.write:before#2")
        path = cluster.layout("ash").fused(1)
        HARMS[harm](path)
        ends_and_names(cluster, path)
        assert not cluster.layout("ash").fused(2).exists()
        cluster.start("ash")
        cluster.wait_finished()
        assert cluster.fused("ash") == cluster.fused("birch") == cluster.fused("cedar")
        assert sha256_of(path) == cluster.fused("birch")[1]


@pytest.mark.sample(4, "altered files")
def test_threat_23_the_last_fused_model_is_what_was_agreed_on_or_is_fetched(
    cluster: Cluster, undisturbed: dict[int, str]
) -> None:
    """It is the result: no round to come would notice."""
    cluster.start("birch")
    cluster.start("cedar")
    cluster.crash("ash", "fusion.prune:before#2")
    flip(cluster.layout("ash").fused(2))
    ends_and_names(cluster, cluster.layout("ash").fused(2))
    cluster.start("ash")
    require_healed(cluster, undisturbed)


# ------------------------------------------------------------------ at the start


@pytest.mark.sample(4, "altered files")
@pytest.mark.parametrize("whose", ["birch", "ash"])
def test_threat_22_a_start_without_a_checkpoint_that_it_relies_on_asks_the_peers_by_itself(
    cluster: Cluster, undisturbed: dict[int, str], whose: str
) -> None:
    """Nobody needs to know of `recover --from-peers`, and no start ends with an error."""
    cluster.hold("cedar")
    cluster.start_all()
    cluster.wait_until("ash", lambda s: s["phase"] == "collect" and s["waiting_for"] == ["cedar"], "has birch's")
    cluster.wait_until("birch", lambda s: s["phase"] == "collect" and s["waiting_for"] == ["cedar"], "has ash's")
    cluster.kill("ash")
    layout = cluster.layout("ash")
    (layout.outbox(1) if whose == "ash" else layout.inbox(1, BIRCH)).unlink()
    cluster.start("ash")
    cluster.wait_until("ash", lambda s: s["round"] == 1 and s["waiting_for"] == ["cedar"], "has it again")
    cluster.release("cedar")
    require_healed(cluster, undisturbed)


# ------------------------------------------------------------------ again and again


def test_threat_23_a_disk_that_alters_files_again_and_again_is_told_of_and_recovered_from_ever_more_slowly(
    tmp_path: Path,
) -> None:
    journal, alarms = Journal.create(tmp_path / "journal.sqlite3"), Alarms()
    assert damage.renew(journal, alarms, 1) == 0 and not alarms.listing()
    pauses = []
    for _ in range(5):
        damage.found(journal, 3, "inbox/r000003/birch.safetensors")
        pauses.append(damage.renew(journal, alarms, 3))
    assert pauses == [0, 60, 600, 3600, 3600]
    (alarm,) = alarms.listing()
    assert "5 times within" in alarm["text"] and "birch.safetensors" in alarm["text"] and "smartctl" in alarm["fix"]
    mark = recover_mark.find_mark(journal)
    assert mark is not None and "birch.safetensors" in mark.why
    assert damage.renew(journal, alarms, 7) == 3600
    assert damage.renew(journal, alarms, 8) == 0 and not alarms.listing(), "five rounds went well"
    journal.close()


@pytest.mark.sample(4, "altered files")
def test_threat_23_a_node_whose_disk_fails_for_the_third_time_waits_loudly_until_its_operator_acts(
    cluster: Cluster, undisturbed: dict[int, str]
) -> None:
    cluster.start("birch")
    cluster.start("cedar")
    cluster.crash("ash", "fusion.write:before")
    state = cluster.layout("ash").state
    with Journal.create(Layout(state).journal) as journal:
        for _ in range(3):
            damage.found(journal, 1, "inbox/r000001/birch.safetensors")
    cluster.start("ash")
    status = cluster.wait_until("ash", lambda s: any(w["code"] == "altered" for w in s["warnings"]), "loud")
    assert "3 times within" in status["warnings"][0]["text"]
    assert status["phase"] is None, "it goes on with nothing yet"
    assert cluster.stop("ash") == 0
    recover.prepare(state)
    cluster.start("ash")
    cluster.wait_finished()
    assert cluster.fused("ash") == undisturbed


# ------------------------------------------------------------------ after the run: what people take results from


def validated(cluster: Cluster, name: str) -> None:
    """Nothing of the run reads the last fused model from here on."""
    cluster.wait_until(name, lambda s: s["scores"][-1]["fused"] is not None, "its last fused model is validated")


def codes(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {w["code"]: w for w in status["warnings"]}


@pytest.mark.sample(4, "altered files")
@pytest.mark.parametrize("harm", ["altered", "gone"])
def test_threat_23_a_result_that_is_lost_after_the_run_is_told_of_and_comes_back_from_a_peer(
    tmp_path: Path, undisturbed: dict[int, str], harm: str
) -> None:
    """The last fused model, and the best one here, which another hospital keeps as one of the last."""
    prelude = "from hsl_node.node.heal import fetch_models; fetch_models.RETRY = fetch_models.Pace(0.2, 0.5)"
    with Cluster(tmp_path, NAMES, PLAN, trainer=TRAINER, prelude=prelude) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        for name in NAMES:
            validated(cluster, name)
            assert cluster.stop(name) == 0
        layout = cluster.layout("ash")
        with sqlite3.connect(layout.journal) as db:
            db.execute("UPDATE fused SET score = round = 1")
            db.execute("DELETE FROM own")
        for round in (1, 2):
            HARMS[harm](layout.fused(round))
        if harm == "gone":
            assert {"fused 1", "fused 2"} <= codes(page.fetch(layout.state).as_json()).keys(), (
                "also while the daemon is down"
            )
        cluster.start("ash")
        told = codes(cluster.wait_until("ash", lambda s: {"fused 1", "fused 2"} <= codes(s).keys(), "told"))
        assert "best on this hospital's validation images" in told["fused 1"]["text"], told
        assert "(the last one)" in told["fused 2"]["text"] and str(layout.fused(2)) in told["fused 2"]["text"]
        assert ("is not there" in told["fused 2"]["text"]) == (harm == "gone")
        assert f"tar -xf BACKUP -C {layout.state} fused/r000002.safetensors" in told["fused 2"]["fix"]
        cluster.start("birch")
        cluster.wait_until("ash", lambda s: not {"fused 1", "fused 2"} & codes(s).keys(), "both are back")
        assert {r: sha256_of(layout.fused(r)) for r in (1, 2)} == {r: undisturbed[r] for r in (1, 2)}
        assert cluster.status("ash")["state"] == "finished"


@pytest.mark.sample(4, "altered files")
def test_threat_23_a_best_model_that_nobody_has_is_told_of_during_the_run_until_it_is_put_back(tmp_path: Path) -> None:
    """Each hospital's best is the earliest of those equal: the first, which nothing of the run reads in round 4."""
    plan, prelude = (
        PLAN.model_copy(update={"rounds": 4}),
        "from hsl_node.node.heal import fetch_models; fetch_models.RETRY = fetch_models.Pace(1, 1)\n"
        "fetch_models.LOOK_S = 0.2",
    )
    with Cluster(tmp_path, ("ash", "birch"), plan, trainer=TRAINER, prelude=prelude) as cluster:
        cluster.hold("ash", 4)
        cluster.start_all()
        cluster.wait_until("ash", lambda s: (s["round"], s["phase"]) == (4, "train"), "in its fourth round")
        cluster.kill("ash")
        path = cluster.layout("ash").fused(1)
        copy = path.rename(tmp_path / "of a backup")
        cluster.layout("birch").fused(1).unlink()
        cluster.start("ash")
        told = codes(cluster.wait_until("ash", lambda s: "fused 1" in codes(s), "told"))["fused 1"]
        assert told["text"].endswith(f"is lost: {path} is not there") and "tar -xf BACKUP" in told["fix"]
        copy.rename(path)
        cluster.wait_until("ash", lambda s: "fused 1" not in codes(s), "it is seen that it is back")
        path.rename(copy)
        cluster.wait_until("ash", lambda s: "fused 1" in codes(s), "lost again while the daemon runs")
        copy.rename(path)
        cluster.wait_until("ash", lambda s: "fused 1" not in codes(s), "and back")
        cluster.release("ash")
        cluster.wait_finished()
        assert cluster.fused("ash") == cluster.fused("birch")
