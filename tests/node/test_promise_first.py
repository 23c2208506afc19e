"""Real daemons, watched from inside at the two moments of a promise: the journal on disk holds it already.

A trainer that makes the same bytes again hides a promise that came too late, so a kill would not show it here. Instead
a second connection to the journal is opened at those moments: it sees what is committed, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from cluster import Cluster

from hsl_node.federation.plan import Plan

PLAN = Plan(method="fedavg", fusion="mean", rounds=1, epochs_per_round=1, plateau_rounds=100)
NAMES = ("ash", "birch")
ROUNDS = {"0", "1", "2"}  # opening statement, checkpoint, closing statement
WATCHED = """
import os, sqlite3, sys
from hsl_node.node import delivery
from hsl_node.sync.inbox import receive

def on_disk(query, *values):
    db = sqlite3.connect(f"file:{sys.argv[1]}/journal.sqlite3?mode=ro", uri=True)
    try:
        return db.execute(query, values).fetchone()
    finally:
        db.close()

def seen(what, round, row, document):
    with open(os.path.join(sys.argv[1], "watched"), "a") as file:
        file.write(f"{what} {round} {'held' if row and row[0] == document else 'too early'}\\n")

push, answer = delivery.push, receive.answer

async def watched_push(card, parcel, **rest):
    round = parcel.name.round
    seen("published", round, on_disk("SELECT document FROM signed WHERE round = ?", round), parcel.manifest)
    return await push(card, parcel, **rest)

def watched_answer(sender, manifest, **rest):
    if rest["accepted"]:
        row = on_disk("SELECT sha256 FROM manifests WHERE round = ? AND peer = ?", manifest.round, sender)
        seen("acknowledged", manifest.round, row, manifest.sha256)
    answer(sender, manifest, **rest)

delivery.push, receive.answer = watched_push, watched_answer
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[tuple[str, str, str]]]:
    """What each daemon saw in a whole run: (published or acknowledged, round, held or too early)."""
    with Cluster(tmp_path_factory.mktemp("watched"), NAMES, PLAN, prelude=WATCHED) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        found = {}
        for name in NAMES:
            lines = (cluster.layout(name).state / "watched").read_text().splitlines()
            found[name] = [(what, round, how) for what, round, how in (line.split(" ", 2) for line in lines)]
        return found


def moments(watched: list[tuple[str, str, str]], what: str) -> list[tuple[str, str]]:
    found = [(round, how) for kind, round, how in watched if kind == what]
    assert {round for round, _ in found} == ROUNDS, "every promise of the run was watched"
    return found


@pytest.mark.parametrize("name", NAMES)
def test_threat_12_nothing_is_published_before_the_journal_on_disk_holds_its_signature(
    watched: Mapping[str, list[tuple[str, str, str]]], name: str
) -> None:
    assert [m for m in moments(watched[name], "published") if m[1] != "held"] == []


@pytest.mark.parametrize("name", NAMES)
def test_threat_22_a_receipt_is_given_only_for_what_the_journal_on_disk_holds(
    watched: Mapping[str, list[tuple[str, str, str]]], name: str
) -> None:
    assert [m for m in moments(watched[name], "acknowledged") if m[1] != "held"] == []
