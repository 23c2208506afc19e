"""Which models are kept for people, as the journal says; and what is said of one that is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hsl_node.federation.names import Digest
from hsl_node.host.layout import Layout
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.models import BESIDE, BEST, Harm, harm_of, kept, models
from hsl_node.weights.whole import sha256_of


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "state")
    layout.make()
    return layout


@pytest.fixture
def journal(layout: Layout) -> Iterator[Journal]:
    """Own and fused models are best in round 2, recalibrated ones, and so all, in 3; the run is in round 5."""
    with Journal.create(layout.journal) as journal:
        for round, own, fused, again in (
            (1, 0.95, 0.5, 0.6),  # before any fusion: no candidate
            (2, 0.8, 0.75, 0.76),
            (3, 0.6, 0.7, 0.9),
            (4, 0.6, 0.6, 0.6),
        ):
            for path in (layout.own(round), layout.fused(round)):
                path.write_text(path.name)
            journal.record_own(round, sha256_of(layout.own(round)), own, 0.5)
            journal.record_fused(round, sha256_of(layout.fused(round)))
            journal.record_validation(round, fused, 0.5, (again, 0.5))
        journal.save_state({"phase": "train", "round": 5})
        yield journal


def test_of_own_fused_and_recalibrated_models_the_best_is_kept_and_which_is_the_hospitals_is_said(journal, layout):
    found = models(journal)
    assert [(m.kind, m.round, m.path(layout).name, m.why) for m in found] == [
        ("fused", 2, "r000002.safetensors", "the best fused one there"),
        ("own", 2, "own_r000002.safetensors", "the best own one there"),
        ("recalibrated", 3, "r000003.safetensors", BEST),
    ]
    assert kept(found) == ({2, 3}, {2})
    best = journal.best_model()
    assert best is not None and (best.kind, best.round, best.score) == ("recalibrated", 3, 0.9)
    assert [m.code for m in found] == ["fused 2", "own 2", "fused 3"]


def test_one_file_is_kept_once_for_all_its_reasons(journal, layout):
    journal.record_validation(3, 0.85, 0.5, (0.9, 0.5))
    journal.save_state({"phase": "finished", "round": 4})
    own, fused = models(journal)
    assert (own.kind, own.round) == ("own", 2)
    assert (fused.kind, fused.round, fused.why) == (
        "recalibrated", 3, f"{BEST}, and the best fused one there, and the last one",
    )  # fmt: skip


def test_where_tensors_are_private_the_own_file_of_each_fused_model_is_kept_too(journal):
    journal.set_meta("private", "1")
    found = models(journal)
    assert kept(found) == ({2, 3}, {2, 3})
    assert [m.why for m in found if m.kind == "own"] == [f"the best own one there, and {BESIDE}", BESIDE]


def test_a_fused_model_whose_private_tensors_were_lost_with_a_disk_is_not_the_hospitals_model(journal):
    """It was validated beside older ones, and could be neither scored nor exported."""
    journal._write("DELETE FROM own WHERE round = 3", ())
    best = journal.best_model()
    assert best is not None and (best.kind, best.round) == ("recalibrated", 3), "where all tensors travel it is whole"
    journal.set_meta("private", "1")
    best = journal.best_model()
    assert best is not None and (best.kind, best.round) == ("own", 2)
    assert kept(models(journal)) == ({2}, {2})


def test_before_the_first_round_nothing_is_kept(layout):
    with Journal.create(layout.journal) as journal:
        journal.record_fused(0, Digest("0" * 64))
        assert models(journal) == []


def test_of_an_own_model_that_is_lost_it_is_said_that_no_peer_has_it(journal, layout):
    layout.own(2).unlink()
    fused, own, _ = sorted(models(journal), key=lambda model: (model.round, model.kind))
    harm = harm_of(layout, own)
    assert isinstance(harm, Harm) and harm_of(layout, fused) is None
    assert harm.text(layout).startswith("this hospital's own model of round 2 (the best own one there) is lost: ")
    assert harm.fix(layout).startswith("No other hospital has it: `tar -xf BACKUP -C ")
    assert "trainer/own_r000002.safetensors`" in harm.fix(layout) and "hsl-node start" not in harm.fix(layout)


def test_an_own_model_that_is_altered_is_told(journal, layout):
    layout.own(2).write_text("something else")
    harm = harm_of(layout, next(m for m in models(journal) if m.kind == "own"))
    assert harm is not None and "is altered" in harm.text(layout) and harm_of(layout, harm.model, whole=False) is None
