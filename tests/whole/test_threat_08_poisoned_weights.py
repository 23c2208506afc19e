"""Threats 8, 9: finite but poisoned weights, false counts. Real HSL training, small; the node's own fusion."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster import Cluster
from learning import blobs, site, small_plan

from hsl_node.federation.names import Digest, Peer
from hsl_node.federation.plan import Plan
from hsl_node.host import control
from hsl_node.node.alarms import Alarms
from hsl_node.node.poisoning import fuse_watched, record_fusion, record_validation, renew
from hsl_node.results import report
from hsl_node.status import history
from hsl_node.sync.store.journal import Journal
from hsl_node.train.checkpoint import Worth
from hsl_node.train.data.dataset import Dataset
from hsl_node.train.loop import train_round, validated
from hsl_node.train.methods import method_of
from hsl_node.train.scoring import open_model, validate
from hsl_node.train.site import initial_weights
from hsl_node.train.start import StartFiles
from hsl_node.weights.checkpoint_file import read_schema, read_weights, write_weights
from hsl_node.weights.whole import sha256_of

ASH, BIRCH, CEDAR = Peer("ash"), Peer("birch"), Peer("cedar")
SIZES = {ASH: 96, BIRCH: 48, CEDAR: 64}  # training images
BRIGHTNESS = {ASH: 1.0, BIRCH: 0.7, CEDAR: 0.85}  # unlike machines
ROUNDS = 4
LIES_FROM_ROUND_TWO_ON = """
import sys
from hsl_node.node.signing import Signing
if sys.argv[1].endswith("birch"):
    true = Signing._manifest
    def lie(self, round, *rest):
        manifest = true(self, round, *rest)
        return manifest.model_copy(update={"samples": 10**8}) if round >= 2 else manifest
    Signing._manifest = lie
"""


def hospital(peer: Peer, flipped: bool) -> Dataset:
    train = SIZES[peer]
    images, labels = blobs(train + 48, seed=train)
    images = (images * BRIGHTNESS[peer]).astype(np.uint8)
    labels = np.where(np.random.default_rng(train).random(len(labels)) < 0.1, 1 - labels, labels)  # no set is perfect
    split = np.repeat(np.array([0, 1], np.int8), [train, 48])
    return Dataset(images, 1 - labels if flipped else labels, split, tuple(f"{n:064x}" for n in range(len(images))))


def federation(folder: Path, flipped: Peer | None = None, rounds: int = ROUNDS) -> Journal:
    """All rounds of three hospitals; gives the journal of ash."""
    plan = small_plan(rounds=rounds, epochs_per_round=2)
    sites = {p: site(plan, hospital(p, flipped == p), p) for p in SIZES}
    journal = Journal.create(folder / "journal.sqlite3")
    initial_weights(folder, plan, method_of(plan.method), folder / "fused0")
    schema = read_schema(folder / "fused0")
    for round in range(1, rounds + 1):
        base, out = folder / f"fused{round - 1}", folder / f"fused{round}"
        paths = {p: folder / f"r{round}_{p}" for p in SIZES}
        for peer, path in paths.items():
            done = train_round(
                sites[peer],
                folder=folder / peer,
                files=StartFiles(round, base, sha256_of(base)),
                out=path,
                own=folder / f"own_{peer}",
                report=lambda _: None,
            )
            if peer == ASH and done.best is not None:
                journal.record_manifest(round, ASH, done.best.sha256, b"", {"score": done.best.validation.score})
        digest, figures = fuse_watched(plan.rule, paths, SIZES, schema, base, out)
        journal.record_fused(round, Digest(digest))
        record_fusion(journal, round, figures)
        event = validated(
            sites[ASH], round, Worth(validate(sites[ASH], open_model(out, plan, sites[ASH].hardware)[1]), None)
        )
        journal.record_validation(round, event["score"], event["loss"])
        record_validation(journal, ASH, event)
    return journal


def alarms_of(journal: Journal) -> dict[str, str]:
    alarms = Alarms()
    renew(journal, alarms, ASH, sorted(SIZES))
    return {a["code"]: a["text"] for a in alarms.listing()}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    federation(folder).close()
    return folder


def test_threat_08_unlike_but_honest_hospitals_raise_no_alarm(honest: Path) -> None:
    with Journal.read_only(honest / "journal.sqlite3") as journal:
        assert alarms_of(journal) == {}
        assert journal.rows("notes") == []
        assert all(len((journal.influence(r) or {})["peers"]) == 3 for r in range(1, ROUNDS + 1))


@pytest.mark.sample(3)
@pytest.mark.parametrize("round", range(1, ROUNDS + 1))
@pytest.mark.parametrize("culprit", SIZES)
@pytest.mark.parametrize(("times", "sign"), [(100, "norm"), (-1, "points against the others'")])
def test_threat_08_a_magnified_or_reversed_update_is_named_at_once(
    tmp_path: Path, honest: Path, times: float, sign: str, culprit: Peer, round: int
) -> None:
    """Honest until this round; then the culprit sends base + times x (what it learned)."""
    (tmp_path / "journal.sqlite3").write_bytes((honest / "journal.sqlite3").read_bytes())
    paths = {p: honest / f"r{round}_{p}" for p in SIZES}
    base, learned = read_weights(honest / f"fused{round - 1}"), read_weights(paths[culprit])
    paths[culprit] = tmp_path / "poisoned"
    sent = {n: base[n] + np.float32(times) * (w - base[n]) if w.dtype.kind == "f" else w for n, w in learned.items()}
    write_weights(paths[culprit], sent)
    schema = read_schema(paths[culprit])
    _, figures = fuse_watched("mean", paths, SIZES, schema, honest / f"fused{round - 1}", tmp_path / "fused")
    with Journal.create(tmp_path / "journal.sqlite3") as journal:
        record_fusion(journal, round, figures)
        found = alarms_of(journal)
    assert list(found) == [f"influence {culprit}"]
    assert sign in found[f"influence {culprit}"]


@pytest.mark.sample(2)
@pytest.mark.parametrize("culprit", [BIRCH, ASH])
def test_threat_08_a_peer_with_flipped_labels_is_named_by_the_fifth_round(tmp_path: Path, culprit: Peer) -> None:
    """The smallest hospital and the largest; its own node is told as well."""
    journal = federation(tmp_path, flipped=culprit, rounds=5)
    found = alarms_of(journal)
    journal.close()
    assert list(found) == [f"influence {culprit}"]
    assert re.search("points? against the others'", found[f"influence {culprit}"])  # its whole update, or parts of it


@contextmanager
def poisoned_by_birch(folder: Path, times: str) -> Iterator[Cluster]:
    """Three daemons under the plain mean. What birch learns is multiplied; the others' trainers can diverge from it."""
    plan = Plan(method="fedavg", fusion="mean", rounds=2, epochs_per_round=1, plateau_rounds=100)
    with Cluster(folder, sorted(SIZES), plan) as cluster:
        cluster.trainer = ["--times", times]
        cluster.start(BIRCH)
        cluster.trainer = ["--fragile"]
        cluster.start(ASH)
        cluster.start(CEDAR)
        yield cluster


def test_threat_08_a_checkpoint_beyond_all_bounds_reaches_no_fusion_and_ends_no_daemon(tmp_path: Path) -> None:
    """birch hands out finite values of 1e38: refused by name, with a receipt."""
    with poisoned_by_birch(tmp_path, "1e37") as cluster:
        for peer in (ASH, CEDAR):
            status = cluster.wait_until(
                peer, lambda s: any(w["code"] == "refused birch" for w in s["warnings"]), "refused"
            )
            assert "(magnitude)" in next(w["text"] for w in status["warnings"] if w["code"] == "refused birch")
            status = cluster.wait_until(peer, lambda s: s["waiting_for"] == ["birch"], "waits for birch alone")
            assert status["last_fused"] is None
        cluster.wait_until(BIRCH, lambda s: all(p["sent"]["state"] == "refused" for p in s["peers"]), "told by both")


def test_threat_08_a_fused_model_that_overflows_ends_no_daemon_and_names_the_poisoner(tmp_path: Path) -> None:
    """Within the bound, and still too much. The daemons stay, at each start, and go on when they are told to."""
    with poisoned_by_birch(tmp_path, "1e7") as cluster:
        for peer in (ASH, CEDAR):
            require_named(cluster.wait_until(peer, diverged, "diverged"))
        assert cluster.stop(ASH) == 0
        cluster.start(ASH)
        require_named(cluster.wait_until(ASH, diverged, "diverged again"))
        assert cluster.stop(ASH) == 0
        cluster.trainer = []
        cluster.start(ASH)
        cluster.wait_until(ASH, lambda s: s["round"] == 2 and s["phase"] == "collect", "trained, once it could")


def test_threat_08_a_job_that_diverged_is_tried_again_by_pause_and_resume(tmp_path: Path) -> None:
    plan = Plan(method="fedavg", fusion="mean", rounds=2, epochs_per_round=1, plateau_rounds=100)
    with Cluster(tmp_path, sorted(SIZES)[:2], plan, trainer=["--fragile"]) as cluster:
        cluster.start(ASH)
        cluster.trainer = ["--times", "1e7"]
        cluster.start(BIRCH)
        cluster.wait_until(ASH, diverged, "diverged")
        for op in ("pause", "resume"):
            control.ask(cluster.layout(ASH).state, op)
        cluster.wait_until(
            ASH,
            lambda s: sum(n["code"] == "diverged" for n in notes(cluster)) >= 2 and s["state"] == "degraded",
            "again",
        )


def notes(cluster: Cluster) -> list[dict[str, object]]:
    with Journal.read_only(cluster.layout(ASH).journal) as journal:
        return journal.rows("notes")


def diverged(status: dict[str, Any]) -> bool:
    return any(w["code"] == "diverged" for w in status["warnings"])


def require_named(status: dict[str, Any]) -> None:
    assert status["state"] == "degraded"
    warning = next(w for w in status["warnings"] if w["code"] == "diverged")
    assert "the fused model of round 1 is spoilt" in warning["text"]
    assert "birch: its update has norm" in warning["text"]
    assert "hsl-node resume" in warning["fix"]


def test_threat_08_daemons_name_the_culprit_everywhere_and_finish_with_one_model(tmp_path: Path) -> None:
    """Loud in status, journal and history; nothing is stopped."""
    plan = Plan(method="fedavg", fusion="median", rounds=2, epochs_per_round=2, plateau_rounds=100)
    with Cluster(tmp_path, sorted(SIZES), plan) as cluster:
        cluster.trainer = ["--times", "100"]
        cluster.start(BIRCH)
        cluster.trainer = ()
        cluster.start(ASH)
        cluster.start(CEDAR)
        cluster.wait_finished()
        digests = [cluster.fused(p) for p in SIZES]
        assert digests[0] == digests[1] == digests[2]
        for peer in SIZES:
            warnings = [w for w in cluster.status(peer)["warnings"] if w["code"].startswith("influence")]
            assert [w["code"] for w in warnings] == ["influence birch"]
        rounds = history.rounds(cluster.layout(ASH).state)
        assert [list(r["unusual"]) for r in rounds] == [["birch"], ["birch"]]
        page = history.round_text(history.round_of(cluster.layout(ASH).state, 1))
        assert "birch: its update has norm" in page
        out = report.build([cluster.layout(ASH).state], tmp_path / "report.html").read_text()
        assert out.count('class="bad" title="its update has norm') == 2
        assert "round 1, birch: its update has norm" in out


def test_threat_09_a_peer_that_takes_a_weighted_mean_over_by_its_number_of_images_is_named_everywhere(
    tmp_path: Path,
) -> None:
    """Its own node says so too. Nothing is stopped: the number may be true."""
    plan = Plan(method="fedavg", fusion="weighted_mean", rounds=2, epochs_per_round=1, plateau_rounds=100)
    with Cluster(tmp_path, sorted(SIZES), plan, prelude=LIES_FROM_ROUND_TWO_ON) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        assert len({str(cluster.fused(p)) for p in SIZES}) == 1
        for peer in SIZES:
            told = {w["code"]: w["text"] for w in cluster.status(peer)["warnings"]}
            assert set(told) == {"images birch", "share birch"}
            assert "images in round 1 and 100,000,000 in round 2" in told["images birch"]
            assert "it counts 100,000,000 of 100,0" in told["share birch"]
        page = history.round_text(history.round_of(cluster.layout(ASH).state, 2))
        assert "birch: it said" in page and "it counts 100,000,000" in page
        out = report.build([cluster.layout(ASH).state], tmp_path / "report.html").read_text()
        assert 'class="bad" title="it said ' in out
        assert "round 2, birch: it counts 100,000,000" in out
