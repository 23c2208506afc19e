"""What the daemon tells its trainer of the last exchange, and what it keeps of what the trainer says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from federations import make_federation
from parts import Parts
from recovering import Site

from hsl_node.errors import Altered
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.methods import CARDS, Card, Need
from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.federation.plan import Plan
from hsl_node.host.pace import Pace
from hsl_node.node.heal.fetch_models import FetchModels
from hsl_node.node.training import Training
from hsl_node.sync.candidates import Candidate
from hsl_node.sync.round import Phase, State
from hsl_node.sync.store.store import Store
from hsl_node.weights.whole import sha256_of

ASH, BIRCH, CEDAR = Peer("ash"), Peer("birch"), Peer("cedar")
BASE = Digest("b" * 64)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    """ash has fused round 3 of three hospitals; what each said is in the journal, their checkpoints and own_r3 here."""
    parts = Parts(make_federation(3), tmp_path / "ash", ASH)
    journal, layout = parts.here.journal, parts.here.layout
    for number, peer in enumerate((CEDAR, ASH, BIRCH)):
        path = layout.checkpoint(3, peer, ASH)
        path.parent.mkdir(exist_ok=True)
        path.write_text(peer)
        content = {"bytes": 9, "samples": 10 + number, "said": {"steps": 7.0 + number}, "score": 0.5}
        journal.record_manifest(3, peer, sha256_of(path), b"", content)
    journal.record_manifest(4, BIRCH, BASE, b"", {"bytes": 9, "samples": 99, "said": {"steps": 99.0}, "score": 0.5})
    layout.own(3).write_text("all tensors")
    journal.record_own(3, sha256_of(layout.own(3)), 0.8, 0.5)
    yield parts
    parts.close()


def start(parts: Parts, round: int, card: Card | None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    if card is not None:
        monkeypatch.setattr(Plan, "card", property(lambda plan: card))
    training = Training(parts.here, parts.alarms, None)
    return asyncio.run(training._start(Round(round), BASE))


def codes(parts: Parts) -> dict[str, str]:
    return {alarm["code"]: alarm["text"] for alarm in parts.alarms.listing()}


def test_a_job_says_what_each_peer_said_in_the_exchange_that_made_its_base(parts, monkeypatch):
    layout = parts.here.layout
    assert start(parts, 3, None, monkeypatch) == {
        "base": str(layout.fused(3)),
        "base_sha256": BASE,
        "said": {"ash": {"steps": 8.0}, "birch": {"steps": 9.0}, "cedar": {"steps": 7.0}},
        "samples": {"ash": 11, "birch": 12, "cedar": 10},
        "full_set": {},
        "mine": str(layout.own(3)),
        "mine_sha256": sha256_of(layout.own(3)),
    }
    assert codes(parts) == {}


def test_it_is_the_same_after_a_restart(parts, monkeypatch):
    before = start(parts, 3, None, monkeypatch)
    parts.store.close()
    parts.here.store = parts.store = Store(parts.here.layout)
    assert start(parts, 3, None, monkeypatch) == before


def test_the_first_round_begins_with_nothing_but_the_initial_weights(parts, monkeypatch):
    found = start(parts, 0, Card("x", "", "", private=True, needs=frozenset({Need.FULL_SET})), monkeypatch)
    assert {key: found[key] for key in ("said", "samples", "full_set", "mine", "mine_sha256")} == {
        "said": {}, "samples": {}, "full_set": {}, "mine": None, "mine_sha256": None,
    }  # fmt: skip
    assert codes(parts) == {}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_whether_own_files_belong_to_fused_models_is_what_the_card_says(parts, monkeypatch, card):
    """Backups, `verify` and the pruning of old files go by it: sync/store/models.py."""
    monkeypatch.setattr(Plan, "card", property(lambda plan: card))
    event = {"event": "initialised", "images": {"train": 9}, "versions": {"torch": "x"}, "device": "cpu"}
    Training(parts.here, parts.alarms, None)._heard(event)
    assert parts.here.journal.meta("private") == ("1" if card.private or Need.OWN in card.needs else "0")


def test_a_statement_is_no_part_of_an_exchange(parts, monkeypatch):
    parts.here.journal.record_manifest(3, CEDAR, BASE, b"", {"bytes": 0, "samples": 1, "said": {}, "score": None})
    assert start(parts, 3, None, monkeypatch)["samples"] == {"ash": 11, "birch": 12}


def test_a_method_that_reads_the_peers_checkpoints_is_given_them_whole(parts, monkeypatch):
    card, layout = Card("x", "", "", needs=frozenset({Need.FULL_SET})), parts.here.layout
    found = start(parts, 3, card, monkeypatch)["full_set"]
    assert found == {p: str(layout.checkpoint(3, p, ASH)) for p in (ASH, BIRCH, CEDAR)}
    layout.checkpoint(3, BIRCH, ASH).write_text("bircH")
    with pytest.raises(Altered, match="the checkpoint of birch in round 3, is gone or altered"):  # the peers heal it
        start(parts, 3, card, monkeypatch)


@pytest.mark.parametrize("harm", ["gone", "altered", "not in the journal"])
def test_lost_private_tensors_begin_anew_and_that_is_said_loudly(parts, monkeypatch, harm):
    layout, card = parts.here.layout, Card("x", "", "", private=True)
    if harm == "gone":
        layout.own(3).unlink()
    elif harm == "altered":
        layout.own(3).write_text("All tensors")
    else:  # with the disk of an earlier state
        parts.here.journal._write("DELETE FROM own", ())
    for _ in range(2):
        found = start(parts, 3, card, monkeypatch)
        assert (found["mine"], found["mine_sha256"]) == (None, None)
    assert codes(parts) == {
        "own": "the tensors of round 3 that only this hospital has are lost (trainer/own_r000003.safetensors): it goes "
        "on without them, and what it keeps to itself begins anew"
    }
    assert [n["code"] for n in parts.here.journal.rows("notes")] == ["own"]


@pytest.mark.parametrize("harm", ["gone", "altered", "not in the journal"])
def test_of_private_tensors_that_are_lost_the_last_that_a_backup_had_go_on(parts, monkeypatch, harm):
    """A backup is seldom of the last round: what learned for fifty rounds is not thrown away for the last two."""
    layout, journal, card = parts.here.layout, parts.here.journal, Card("x", "", "", private=True)
    for round in (1, 2):
        layout.own(round).write_text(f"all tensors of round {round}")
        journal.record_own(round, sha256_of(layout.own(round)), 0.8, 0.5)
    if harm == "not in the journal":  # as it was in the backup
        journal._write("DELETE FROM own WHERE round = 3", ())
    elif harm == "gone":
        layout.own(3).unlink()
    else:
        layout.own(3).write_text("All tensors")
    found = start(parts, 3, card, monkeypatch)
    assert (found["mine"], found["mine_sha256"]) == (str(layout.own(2)), sha256_of(layout.own(2)))
    assert codes(parts)["own"].endswith("(trainer/own_r000003.safetensors): it goes on with those of round 2")
    assert start(parts, 3, Card("x", "", ""), monkeypatch)["mine"] is None, "where all tensors travel nothing is lost"
    assert codes(parts) == {}


def test_that_alarm_ends_with_the_round_that_has_its_own_again(parts, monkeypatch):
    layout, card = parts.here.layout, Card("x", "", "", private=True)
    training = Training(parts.here, parts.alarms, None)
    monkeypatch.setattr(Plan, "card", property(lambda plan: card))
    asyncio.run(training._start(Round(4), BASE))
    assert "own" in codes(parts)
    layout.own(5).write_text("learned again")
    parts.here.journal.record_own(5, sha256_of(layout.own(5)), 0.7, 0.5)
    asyncio.run(training._start(Round(5), BASE))
    assert codes(parts) == {}


def test_where_all_tensors_travel_a_lost_own_file_is_no_alarm_of_the_round(parts, monkeypatch):
    parts.here.layout.own(3).unlink()
    found = start(parts, 3, None, monkeypatch)
    assert found["mine"] is None and codes(parts) == {}


def test_what_the_trainer_says_of_its_models_is_in_the_journal(parts):
    journal = parts.here.journal
    training = Training(parts.here, parts.alarms, None)
    journal.record_fused(Round(3), BASE)
    again = {"score": 0.7, "loss": 0.4}
    for event in (
        {"event": "validated", "round": 3, "score": 0.6, "loss": 0.5, "recalibrated": again, "labels": [5, 5]},
        {"event": "trained", "round": 4, "own_sha256": "4" * 64, "score": 0.65, "loss": 0.45},
    ):
        training._heard(event)
        training._heard(event)  # a trainer that was started again says so once more
    (row,) = journal.rows("fused")
    assert [row[k] for k in ("score", "loss", "recalibrated_score", "recalibrated_loss", "validated")] == [
        0.6, 0.5, 0.7, 0.4, 1,
    ]  # fmt: skip
    assert journal.own_digests()[Round(4)] == "4" * 64
    assert journal.best_model() == Candidate("own", 3, sha256_of(parts.here.layout.own(3)), 0.8, 0.5)
    assert journal.best_model("recalibrated") == Candidate("recalibrated", 3, BASE, 0.7, 0.4)


def test_of_a_lost_own_model_the_daemon_says_that_no_peer_has_it_and_asks_none(parts, monkeypatch):
    """It is told until it is put back, as of a backup."""
    asked: list[object] = []
    state = State(ASH, (ASH, BIRCH, CEDAR), 9, BASE, phase=Phase.TRAIN, round=6)
    parts.here.journal.save_state({"phase": "train", "round": 6})
    monkeypatch.setattr(parts.links, "offers_of", lambda peers: asked.append(peers))
    fetch: Any = None
    models = FetchModels(*parts.all, fetch, lambda: state, lambda: False)
    path = parts.here.layout.own(3)
    copy = path.rename(path.with_suffix(".backup"))

    told_of, sound = asyncio.Event(), parts.alarms.sound
    monkeypatch.setattr(parts.alarms, "sound", lambda *words: (sound(*words), told_of.set()))

    async def story() -> None:
        mending = asyncio.create_task(models.mend())
        await told_of.wait()
        told = codes(parts)["own 3"]
        assert "this hospital's own model of round 3 (the best on this hospital's validation images) is lost" in told
        copy.rename(path)
        await mending

    monkeypatch.setattr("hsl_node.node.heal.fetch_models.RETRY", Pace(0.01, 0.01))
    asyncio.run(story())
    assert asked == [] and codes(parts) == {}


@pytest.mark.parametrize("kept", [False, True])
def test_a_recovery_from_a_lost_disk_says_that_what_the_hospital_kept_to_itself_is_lost(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(Plan, "card", property(lambda plan: Card("x", "", "", private=True)))
    members = make_federation(3)
    site = Site(members, tmp_path / "ash", Keyring.of(members.federation))
    if kept:  # of a backup
        site.parts.here.layout.own(3).write_text("all tensors")
    site.recovery._write(State(ASH, members.peers, 9, BASE, phase=Phase.COLLECT, round=4), BASE, {})
    (note,) = site.journal.rows("notes")
    assert note["text"].startswith("its disk was lost; goes on in round 4, collect")
    lost = "the tensors that this hospital keeps to itself are lost, and begin anew"
    assert note["text"].endswith(lost) != kept
    site.parts.close()
