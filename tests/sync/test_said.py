"""The numbers that a peer signs beside its checkpoint: exactly those that the method's card declares, within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from inbox_site import Site, make_site

from hsl_node.errors import PeerDataError
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.methods import Card, Said
from hsl_node.federation.plan import Plan
from hsl_node.sync.inbox.receive import Arrival, Refusal
from hsl_node.sync.manifest import parse_manifest

SAYS = Card("counting", "", "", says=(Said("steps", 1, 1e6), Said("evenness", 0, 1)))
RIGHT = {"steps": 7.0, "evenness": 0.5}


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Site]:
    """ash and birch of a federation whose method says two numbers."""
    monkeypatch.setattr(Plan, "card", property(lambda plan: SAYS))
    yield make_site(tmp_path, "embedded")


def found(site: Site, said: dict[str, Any], **changes: Any) -> Arrival | Refusal:
    data = None if changes.get("bytes") == 0 else site.good_data()
    manifest = site.manifest(site.good_data(), said=said, **changes)
    site.deliver(data, manifest)
    (item,) = site.scan()
    return item


def test_the_declared_numbers_arrive_with_the_checkpoint(site):
    arrival = found(site, RIGHT)
    assert isinstance(arrival, Arrival) and arrival.manifest.said == RIGHT


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({}, "says nothing beside its checkpoint"),
        ({"steps": 7.0}, "says steps beside its checkpoint"),
        ({**RIGHT, "weight": 1.0}, "says evenness, steps, weight beside"),
        ({**RIGHT, "steps": 0.0}, "says steps 0; "),
        ({**RIGHT, "steps": 1e6 + 1}, "from 1 to 1e+06"),
        ({**RIGHT, "evenness": -1e-9}, "says evenness -1e-09"),
        ({**RIGHT, "evenness": 1.5}, "from 0 to 1"),
    ],
)
def test_threat_09_other_numbers_or_beyond_their_bounds_are_refused(site, said, words):
    refusal = found(site, said)
    assert isinstance(refusal, Refusal) and refusal.code == "said" and words in refusal.error.message
    assert isinstance(found(site, RIGHT), Arrival)


def test_a_statement_says_none(site):
    sha256 = "b" * 64
    refusal = found(site, RIGHT, bytes=0, sha256=sha256, base=sha256, halted=True)
    assert (
        isinstance(refusal, Refusal) and refusal.code == "said" and "a statement has nothing" in refusal.error.message
    )


@pytest.mark.parametrize(
    "said",
    [None, [], {"steps": "7"}, {"steps": None}, {"steps": True}, {"steps": 7}, {"Steps": 7.0}, {"": 7.0},
     {"s" * 33: 7.0}, {"ste ps": 7.0}],
    ids=repr,
)  # fmt: skip
def test_threat_09_each_number_has_one_spelling_and_its_name_is_a_word(site, said):
    content = {**site.manifest(site.good_data()).content(), "said": said}
    with pytest.raises(PeerDataError) as refusal:
        parse_manifest(canonical_json(content) + b"\n")
    assert refusal.value.code == "manifest"


@pytest.mark.parametrize("word", [b"NaN", b"Infinity", b"1e999"])
def test_threat_09_a_number_that_is_none_is_refused(site, word):
    line = canonical_json({**site.manifest(site.good_data()).content(), "said": RIGHT}) + b"\n"
    with pytest.raises(PeerDataError):
        parse_manifest(line.replace(b"7.0", word))
