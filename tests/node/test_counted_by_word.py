"""Numbers that a peer says of itself, and by which a fusion counts, are a lever: the alarms look at them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.names import Digest, Peer
from hsl_node.node.alarms import Alarms
from hsl_node.node.poisoning import record_fusion, record_validation, renew, weights_of
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.influence import Figures, changed_numbers, largest_weight

ASH, BIRCH, CEDAR = PEERS = (Peer("ash"), Peer("birch"), Peer("cedar"))
PLAIN = dict.fromkeys(PEERS, Figures(norm=1.0, statistics=0.1, cosine=0.9, agreement=0.9, opposed=()))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.create(tmp_path / "journal.sqlite3") as journal:
        yield journal


def steps(*numbers: float) -> dict[Peer, dict[str, float]]:
    return {peer: {"steps": number} for peer, number in zip(PEERS, numbers, strict=True)}


def fuse(journal: Journal, round: int, said: Mapping[Peer, Mapping[str, float]], images: Mapping[Peer, int]) -> Alarms:
    for peer in PEERS:
        content = {"samples": images[peer], "said": said[peer], "bytes": 9, "score": 0.5}
        journal.record_manifest(round, peer, "a" * 64, b"", content)
    with journal.transaction():
        journal.record_fused(round, Digest(f"{round:064x}"))
        record_fusion(journal, round, PLAIN, images, said, weights_of("nova", images, said), epochs=5)
    renew(journal, alarms := Alarms(), ASH, PEERS)
    return alarms


def told(alarms: Alarms) -> dict[str, str]:
    return {alarm["code"]: alarm["text"] for alarm in alarms.listing()}


IMAGES = {ASH: 100, BIRCH: 100, CEDAR: 100}


def test_threat_09_who_says_a_single_step_is_most_of_fednovas_model_and_is_named(journal):
    """c_k = p_k / a_k x sum p_j a_j: of 100, 100 and 1 step the last has 100 of 102 parts."""
    assert told(fuse(journal, 1, steps(100, 100, 100), IMAGES)) == {}
    found = told(fuse(journal, 2, steps(100, 100, 1), IMAGES))
    assert found == {
        "said cedar": "round 2, cedar: it said steps 100 in round 1 and 1 in round 2",
        "share cedar": "round 2, cedar: by what it says of itself (steps 1) it is 98 % of the fused model",
    }
    assert [n["code"] for n in journal.rows("notes")] == ["said", "share"]


def test_steps_change_by_as_much_as_a_round_has_epochs_without_an_alarm(journal):
    """The best epoch was the last of 5, then the first: 5 times as many steps; twice that is the limit."""
    fuse(journal, 1, steps(50, 50, 50), IMAGES)
    assert told(fuse(journal, 2, steps(10, 50, 50), IMAGES)) == {"share ash": (
        "round 2, this node: by what it says of itself (steps 10) it is 71.4 % of the fused model"
    )}  # fmt: skip
    assert "said birch" not in told(fuse(journal, 3, steps(10, 5, 50), IMAGES))  # exactly ten times
    assert "said cedar" in told(fuse(journal, 4, steps(10, 5, 4.9), IMAGES))


def test_threat_09_a_number_of_images_is_looked_at_beside_what_is_said(journal):
    """Of FedNova both count; who most of the model is follows from both, not from the images alone."""
    fuse(journal, 1, steps(50, 50, 50), IMAGES)
    found = told(fuse(journal, 2, steps(50, 50, 50), {**IMAGES, BIRCH: 1000}))
    assert found["images birch"] == "round 2, birch: it said 100 images in round 1 and 1,000 in round 2"
    assert found["share birch"].endswith("(steps 50) it is 83.3 % of the fused model")


def test_evenness_that_falls_to_nothing_is_a_change():
    before, now = ({ASH: {"evenness": e}} for e in (0.9, 0.0))
    assert changed_numbers(now, before, 3, 10) == {ASH: "it said evenness 0.9 in round 2 and 0 in round 3"}
    assert changed_numbers(before, before, 3, 10) == changed_numbers(now, {}, 3, 10) == {}


def test_of_two_hospitals_one_always_has_half():
    assert largest_weight({ASH: 0.9, BIRCH: 0.1}, {ASH: {"steps": 1.0}, BIRCH: {"steps": 9.0}}) == {}


def test_threat_09_robust_rules_count_by_nothing_that_a_peer_says_of_itself():
    """And `weights_of` knows the others' weights without the updates, but for FedCOME, which counts by images."""
    for name, rule in FUSION_RULES.items():
        if rule.robust:
            assert not rule.said and not rule.by_images
        weights = weights_of(name, IMAGES, {p: dict.fromkeys(rule.said, 0.5) for p in PEERS})
        assert set(weights) == (set(PEERS) if rule.said else set())


# ------------------------------------------------------------------ the validation gate


@pytest.mark.parametrize(
    ("fused", "again", "before", "before_again", "alarms"),
    [
        (0.5, None, 0.9, None, ["validation"]),
        (0.5, 0.89, 0.9, None, []),  # its statistics are no hospital's; recalibrated it is as good as before
        (0.5, 0.5, 0.6, 0.9, ["validation"]),  # a fall from what the model before was worth, recalibrated
        (0.5, 0.5, 0.52, None, []),  # not below the one before
        (-0.5, None, 0.9, None, []),  # no AUC: nobody knows how far chance moves it
    ],
)
def test_the_gate_compares_what_a_fused_model_is_worth_when_it_is_used(
    journal, fused, again, before, before_again, alarms
):
    journal.record_fused(1, Digest("1" * 64))
    journal.record_validation(1, before, 0.3, (before_again, None if before_again is None else 0.3))
    journal.record_manifest(2, ASH, "a" * 64, b"", {"score": 0.92, "said": {}, "bytes": 9})
    recalibrated = None if again is None else {"score": again, "loss": 0.4}
    event = {"event": "validated", "round": 2, "score": fused, "loss": 0.9, "recalibrated": recalibrated,
             "labels": [40, 40]}  # fmt: skip
    record_validation(journal, ASH, event)
    assert [note["code"] for note in journal.rows("notes")] == alarms
