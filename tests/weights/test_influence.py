"""Signs of poisoned weights, by numbers worked out by hand: what an update's figures are, and what is unusual."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

from hsl_node.federation.names import Digest, Peer
from hsl_node.node.alarms import Alarms
from hsl_node.node.poisoning import (
    ROUNDS_LOUD,
    fell,
    fuse_watched,
    record_fusion,
    record_validation,
    renew,
    standard_error,
)
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.checkpoint_file import Array, Schema, read_chunk, schema_of, write_weights
from hsl_node.weights.fuse_files import fuse_files
from hsl_node.weights.influence import (
    NORM_LIMIT,
    PART_SHARE,
    Figures,
    Influence,
    changed_counts,
    largest_share,
    unusual,
)

ASH, BIRCH, CEDAR = Peer("ash"), Peer("birch"), Peer("cedar")
PEERS = (ASH, BIRCH, CEDAR)


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def figures_of(tmp_path: Path, base: dict[str, Array], *weights: dict[str, Array]) -> dict[Peer, Figures]:
    """Through the real fusion of files."""
    write_weights(tmp_path / "base", base)
    paths = {p: tmp_path / p for p, w in zip(PEERS, weights, strict=False)}
    for path, w in zip(paths.values(), weights, strict=True):
        write_weights(path, w)
    return fuse_watched("mean", paths, dict.fromkeys(paths, 1), schema_of(base), tmp_path / "base", tmp_path / "fused")[
        1
    ]


def test_norm_and_cosine_are_those_of_the_change_since_the_rounds_beginning(tmp_path):
    """Updates (3, 4), (0, 2), (0, 3): the others of ash add up to (0, 5), so its cosine is 20 / (5 x 5)."""
    base = {"head.w": f32(10, 20)}
    found = figures_of(tmp_path, base, {"head.w": f32(13, 24)}, {"head.w": f32(10, 22)}, {"head.w": f32(10, 23)})
    assert [found[p].norm for p in PEERS] == pytest.approx([5, 2, 3])
    assert found[ASH].cosine == pytest.approx(0.8)
    assert found[ASH].agreement == pytest.approx(1)  # (0, 2) and (0, 3)
    assert found[BIRCH].cosine == pytest.approx(14 / (2 * math.hypot(3, 7)))
    assert found[BIRCH].agreement == pytest.approx(0.8)


def test_what_a_method_sends_beside_weights_hides_no_update_that_points_against_the_others(tmp_path):
    """Mixtures as FedDpS sends them, a hundred times as long as the updates; of ash's weights the sign is flipped."""
    base = {"head.w": f32(0, 0), "mean": f32(0, 0, 0)}
    mixtures = np.eye(3, dtype=np.float32) * 100
    updates = (f32(-1, -1), f32(1, 1), f32(1, 1.5))
    weights = [{"head.w": w, "mean": m} for w, m in zip(updates, mixtures, strict=True)]
    found = figures_of(tmp_path, base, *weights)
    assert found[ASH].norm == pytest.approx(math.sqrt(2)) and found[ASH].cosine is not None
    assert found[ASH].cosine < -0.9 and found[ASH].agreement > 0.9 and list(unusual(found, [])) == [ASH]
    prototypes = figures_of(tmp_path, {"prototypes": f32(0)}, {"prototypes": f32(3)}, {"prototypes": f32(1)})
    assert prototypes[ASH].norm == 3  # FedKTL sends nothing else


def test_running_statistics_are_kept_apart_and_counters_left_out(tmp_path):
    base = {"n.running_var": f32(1), "n.running_mean": f32(0), "n.weight": f32(0), "n.batches": np.array([0])}
    one = {"n.running_var": f32(4), "n.running_mean": f32(4), "n.weight": f32(2), "n.batches": np.array([10**9])}
    found = figures_of(tmp_path, base, one, {**base, "n.weight": f32(1)})
    assert (found[ASH].norm, found[ASH].statistics) == (2, 5)
    assert found[BIRCH].statistics == 0


def test_a_part_is_opposed_where_the_others_agree_and_this_peer_points_away(tmp_path):
    """In `a` cedar is against two who agree; in `b` the others don't agree; in `c` all agree."""
    base = {"a.w": f32(0, 0), "b.w": f32(0, 0), "c.w": f32(0, 0)}
    found = figures_of(
        tmp_path,
        base,
        {"a.w": f32(1, 0), "b.w": f32(1, 0), "c.w": f32(1, 1)},
        {"a.w": f32(1, 0), "b.w": f32(-1, 0.1), "c.w": f32(1, 1)},
        {"a.w": f32(-3, 4), "b.w": f32(0, -1), "c.w": f32(2, 2)},
    )
    assert found[CEDAR].opposed == (("a", pytest.approx(-0.6)),)
    assert found[ASH].opposed == found[BIRCH].opposed == ()


def test_updates_of_any_finite_size_have_finite_figures(tmp_path):
    top = float(np.finfo(np.float32).max)
    base = {"a.w": f32(0, 0), "d.w": np.zeros(2)}
    huge = {"a.w": f32(top, -top), "d.w": np.array([1e308, 1e308])}
    found = figures_of(tmp_path, base, huge, base, {"a.w": f32(1, 0), "d.w": np.zeros(2)})
    assert all(math.isfinite(f.norm) and (f.cosine is None or -1 <= f.cosine <= 1) for f in found.values())
    assert found[CEDAR].norm == 1
    assert ASH in unusual(found, [])


def test_watching_changes_no_byte_and_the_chunks_make_no_difference(tmp_path):
    rng = np.random.default_rng(1)
    base = {"a.w": rng.standard_normal(700_001, dtype=np.float32), "n": np.array(4)}
    paths = {p: tmp_path / p for p in PEERS}
    for path in paths.values():
        write_weights(path, {"a.w": rng.standard_normal(700_001, dtype=np.float32), "n": np.array(5)})
    write_weights(tmp_path / "base", base)
    schema, samples = schema_of(base), dict.fromkeys(PEERS, 1)
    alone = fuse_files("median", paths, samples, schema, tmp_path / "alone")
    watched, found = fuse_watched("median", paths, samples, schema, tmp_path / "base", tmp_path / "watched")
    assert watched == alone
    whole = at_once(schema, tmp_path)
    assert found[ASH].norm == pytest.approx(whole[ASH].norm, rel=1e-6)
    assert found[ASH].cosine == pytest.approx(whole[ASH].cosine, rel=1e-4)


def at_once(schema: Schema, folder: Path) -> dict[Peer, Figures]:
    with (
        open(folder / "base", "rb") as base,
        open(folder / "ash", "rb") as a,
        open(folder / "birch", "rb") as b,
        open(folder / "cedar", "rb") as c,
    ):
        influence = Influence(PEERS)
        for spec in schema.tensors:
            count = math.prod(spec.shape)
            before, *chunks = (read_chunk(f, spec, 0, count) for f in (base, a, b, c))
            influence.see(spec.name, before, chunks)
    return influence.figures()


def test_a_fusion_goes_on_where_the_rounds_beginning_is_gone(tmp_path):
    weights = {"w": f32(1)}
    paths = {p: tmp_path / p for p in PEERS}
    for path in paths.values():
        write_weights(path, weights)
    _, found = fuse_watched(
        "mean", paths, dict.fromkeys(PEERS, 1), schema_of(weights), tmp_path / "gone", tmp_path / "fused"
    )
    assert found == {}
    assert (tmp_path / "fused").exists()


# ------------------------------------------------------------------ what is unusual


def plain(norm: float = 1.0, **other: object) -> Figures:
    return Figures(**{"norm": norm, "statistics": 1.0, "cosine": 0.8, "agreement": 0.6, "opposed": (), **other})  # type: ignore[arg-type]


def test_a_norm_is_compared_with_the_others_norms_of_some_rounds():
    """In a round where the others hardly moved, one who did is not unusual, since all have moved so far before."""
    before = [dict.fromkeys(PEERS, plain(1.0))]
    assert unusual({ASH: plain(1.0), BIRCH: plain(0.1), CEDAR: plain(0.1)}, before) == {}
    assert set(unusual({ASH: plain(NORM_LIMIT * 1.01), BIRCH: plain(1), CEDAR: plain(1)}, before)) == {ASH}


def test_one_huge_update_makes_no_other_peer_unusual():
    assert set(unusual({ASH: plain(1000), BIRCH: plain(1), CEDAR: plain(1)}, [])) == {ASH}
    assert set(unusual({ASH: plain(1000), BIRCH: plain(1)}, [])) == {ASH}


def test_statistics_alone_can_be_unusual():
    found = unusual({ASH: plain(statistics=50.0), BIRCH: plain(), CEDAR: plain()}, [])
    assert "normalisation statistics has norm 50, the others' median is 1" in found[ASH]


def test_one_against_others_who_do_not_agree_is_not_unusual():
    now = {ASH: plain(cosine=-0.5, agreement=-0.1), BIRCH: plain(), CEDAR: plain()}
    assert unusual(now, []) == {}
    assert set(unusual({**now, ASH: plain(cosine=-0.5, agreement=0.4)}, [])) == {ASH}


def test_opposed_parts_are_unusual_from_the_third_round_in_a_row_on():
    opposed = {ASH: plain(opposed=(("skip", -0.1), ("tower", -0.3))), BIRCH: plain(), CEDAR: plain()}
    honest = dict.fromkeys(PEERS, plain())
    assert unusual(opposed, []) == {}
    assert unusual(opposed, [opposed]) == {}
    assert unusual(opposed, [opposed, honest]) == {}
    assert unusual(opposed, [opposed, honest, opposed]) == {}
    assert "skip -0.10, tower -0.30" in unusual(opposed, [honest, opposed, opposed])[ASH]


def test_of_two_hospitals_none_is_the_odd_one():
    """Each is all others of the other; a direction says nothing of who is wrong. A huge update still does."""
    against = plain(cosine=-0.9, agreement=1.0, opposed=(("encoder", -0.9),))
    two = {ASH: against, BIRCH: against}
    assert unusual(two, [two, two, two]) == {}
    assert set(unusual({ASH: plain(1000), BIRCH: plain(1)}, [])) == {ASH}


def test_a_part_of_a_few_numbers_is_not_opposed_whatever_its_direction(tmp_path):
    """A gate of an honest small hospital turned for 20 rounds on end."""
    base = {"gate.w": f32(0), "encoder.w": f32(0, 0)}
    one = {"gate.w": f32(1), "encoder.w": f32(10, 0)}
    for gate, opposed in ((-1.9, ()), (-2.1, (("gate", pytest.approx(-1.0)),))):
        found = figures_of(tmp_path, base, one, one, {"gate.w": f32(gate), "encoder.w": f32(10, 0)})
        share = abs(gate) / np.hypot(gate, 10)
        assert (share >= PART_SHARE) == bool(opposed) and found[CEDAR].opposed == opposed


# ------------------------------------------------------------------ numbers of images


def counts(*numbers: int) -> dict[Peer, int]:
    return dict(zip(PEERS, numbers, strict=False))


def test_threat_09_who_counts_more_than_half_of_all_images_is_named_with_its_share():
    found = largest_share(counts(250, 250, 1000))
    assert found == {CEDAR: "it counts 1,000 of 1,500 images, 66.7 % of the fused model"}
    assert largest_share(counts(500, 500, 1000)) == {}  # half is not more than half
    assert largest_share(counts(500, 1000)) == {}  # of two, one always has


def test_threat_09_a_number_of_images_that_more_than_doubled_or_halved_at_once_is_named():
    assert changed_counts(counts(100, 100, 100), counts(100, 50, 200), 3) == {}
    assert changed_counts(counts(100, 100, 100), {}, 3) == {}  # a journal that was lost
    assert changed_counts(counts(99, 101, 100), counts(200, 50, 100), 3) == {
        ASH: "it said 200 images in round 2 and 99 in round 3",
        BIRCH: "it said 50 images in round 2 and 101 in round 3",
    }
    assert set(changed_counts(counts(15, 10**8), counts(15, 15), 3)) == {BIRCH}  # of two peers as well


# ------------------------------------------------------------------ the validation gate


def test_the_standard_error_is_that_of_hanley_and_mcneil():
    """3 positives, 5 negatives: Q1 = 2/3, Q2 = 0.7111, so (0.16 + 2 x 0.02667 + 4 x 0.07111) / 15 is the variance."""
    assert standard_error(0.8, [5, 3]) == pytest.approx(math.sqrt(0.033185), rel=1e-4)


def test_the_standard_error_of_a_guessing_model_is_that_of_the_rank_sum():
    """For an AUC of 0.5 the Mann-Whitney statistic's variance is known exactly: (m + n + 1) / 12 mn."""
    assert standard_error(0.5, [4, 4]) == pytest.approx(math.sqrt(9 / (12 * 16)))
    assert standard_error(0.5, [30, 7]) == pytest.approx(math.sqrt(38 / (12 * 210)))


def test_more_classes_have_the_mean_error_of_each_against_the_rest():
    each = [standard_error(0.8, [20 - n, n]) for n in (10, 6, 4)]
    assert standard_error(0.8, [10, 6, 4]) == pytest.approx(sum(each) / 3)
    assert standard_error(0.8, [10, 0, 6]) == pytest.approx(
        (standard_error(0.8, [6, 10]) + standard_error(0.8, [10, 6])) / 2
    )
    assert standard_error(0.8, [0, 16, 0]) == standard_error(0.8, [16, 0]) == standard_error(0.8, [0, 0]) == math.inf


@pytest.mark.parametrize(
    ("fused", "own", "last", "images", "alarm"),
    [
        (0.60, 0.85, 0.85, 50, True),
        (0.60, 0.85, 0.85, 5, False),  # five of each class: an AUC of 0.6 may be chance
        (0.60, 0.85, 0.62, 50, False),  # as before: a hospital unlike the others
        (0.60, 0.62, 0.85, 50, False),  # its own model is no better
        (0.90, 0.85, 0.85, 50, False),
    ],
)
def test_the_gate_wants_a_fall_below_both_by_more_than_chance(fused, own, last, images, alarm):
    assert fell(fused, own, last, [images, images]) is alarm


def test_a_class_without_validation_images_never_alarms():
    assert not fell(0.1, 0.9, 0.9, [0, 50])


# ------------------------------------------------------------------ journal and alarms


@pytest.fixture
def journal(tmp_path):
    with Journal.create(tmp_path / "journal.sqlite3") as journal:
        yield journal


def fuse_round(journal: Journal, round: int, found: dict[Peer, Figures]) -> None:
    with journal.transaction():
        journal.record_fused(round, Digest(f"{round:064x}"))
        record_fusion(journal, round, found)


def test_an_alarm_that_stood_before_a_restart_is_as_old_as_it_is_and_no_new_warning_in_the_log(
    journal, monkeypatch, caplog
):
    caplog.set_level("INFO", "hsl_node")
    alarms = Alarms()
    fuse_round(journal, 1, {**dict.fromkeys(PEERS, plain()), CEDAR: plain(97)})
    renew(journal, alarms, ASH, PEERS)
    (before,) = alarms.listing()
    assert [(r.levelname, r.msg) for r in caplog.records if r.name == "hsl_node.node.alarms"] == [
        ("WARNING", "warning")
    ]
    caplog.clear()
    now = time.time()
    monkeypatch.setattr("hsl_node.node.alarms.time.time", lambda: now + 86_400)
    alarms = Alarms()  # the next day, restarted
    renew(journal, alarms, ASH, PEERS)
    (after,) = alarms.listing()
    assert abs(after["since"] - before["since"]) < 3600
    assert [(r.levelname, r.msg) for r in caplog.records if r.name == "hsl_node.node.alarms"] == [
        ("INFO", "warning, still")
    ]


def test_an_alarm_names_peer_and_numbers_survives_a_restart_and_fades_after_some_rounds(journal):
    honest = dict.fromkeys(PEERS, plain())
    fuse_round(journal, 1, honest)
    fuse_round(journal, 2, {**honest, CEDAR: plain(97)})
    for start in range(2):  # a restart knows the journal alone
        alarms = Alarms()
        renew(journal, alarms, ASH, PEERS)
        (alarm,) = alarms.listing()
        assert "round 2, cedar: its update has norm 97, the others' median is 1" in alarm["text"], start
        assert "ask cedar" in alarm["fix"]
        assert "round show 2" in alarm["fix"]
    assert [(n["level"], n["code"]) for n in journal.rows("notes")] == [("warning", "influence")]
    for round in range(3, 3 + ROUNDS_LOUD):
        renew(journal, alarms, ASH, PEERS)
        assert "influence cedar" in alarms
        fuse_round(journal, round, honest)
    renew(journal, alarms, ASH, PEERS)
    assert alarms.listing() == []


def test_threat_09_alarms_of_images_survive_a_restart_and_a_share_is_noted_once_while_it_stays_as_it_is(journal):
    honest = dict.fromkeys(PEERS, plain())
    for round, count in ((1, 15), (2, 15), (3, 10**8), (4, 10**8), (5, 10**8)):
        images = counts(15, 10, count)
        for peer, number in images.items():
            journal.record_manifest(round, peer, "a" * 64, b"", {"samples": number})
        with journal.transaction():
            journal.record_fused(round, Digest(f"{round:064x}"))
            record_fusion(journal, round, honest, images)
        alarms = Alarms()  # a restart knows the journal alone
        renew(journal, alarms, ASH, PEERS)
        jump = "round 3, cedar: it said 15 images in round 2 and 100,000,000 in round 3"
        share = f"round {round}, cedar: it counts 100,000,000 of 100,000,025 images, 100 % of the fused model"
        told = {a["code"]: a["text"] for a in alarms.listing()}
        assert told == ({} if round < 3 else {"images cedar": jump, "share cedar": share})
    assert all('fusion = "mean"' in a["fix"] for a in alarms.listing())
    assert [n["code"] for n in journal.rows("notes")] == ["images", "share"]


def test_threat_09_where_peers_count_the_same_no_number_of_images_raises_an_alarm(journal):
    with journal.transaction():
        journal.record_fused(1, Digest("a" * 64))
        record_fusion(journal, 1, dict.fromkeys(PEERS, plain()))
    alarms = Alarms()
    renew(journal, alarms, ASH, PEERS)
    assert alarms.listing() == []


def test_a_node_whose_own_update_is_unusual_is_told_to_look_at_its_own_data(journal):
    fuse_round(journal, 1, {ASH: plain(97), BIRCH: plain(), CEDAR: plain()})
    alarms = Alarms()
    renew(journal, alarms, ASH, PEERS)
    assert "this node: its update has norm 97" in alarms.listing()[0]["text"]
    assert "ask your own site" in alarms.listing()[0]["fix"]


def test_a_fall_of_the_validation_auc_is_told_once_and_names_the_least_like_the_others(journal):
    fuse_round(journal, 1, dict.fromkeys(PEERS, plain()))
    journal.record_validation(1, 0.9, 0.3)
    journal.record_manifest(2, ASH, "a" * 64, b"", {"score": 0.92})
    fuse_round(journal, 2, {ASH: plain(), BIRCH: plain(cosine=0.1), CEDAR: plain()})
    event = {"event": "validated", "round": 2, "score": 0.5, "loss": 0.9, "labels": [40, 40]}
    for _ in range(2):
        record_validation(journal, ASH, event)
    (note,) = journal.rows("notes")
    assert "validation AUC 0.500 here (standard error 0.065), this site's own model 0.920" in note["text"]
    assert "that of birch, cosine 0.10" in note["text"]
    alarms = Alarms()
    renew(journal, alarms, ASH, PEERS)
    assert "validation" in alarms


def test_a_trainer_that_tells_no_counts_raises_no_alarm(journal):
    record_validation(journal, ASH, {"event": "validated", "round": 2, "score": 0.5, "loss": 0.9})
    assert journal.rows("notes") == []
