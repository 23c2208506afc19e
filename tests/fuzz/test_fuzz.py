"""Everything that reads bytes from outside, given documents that are a little wrong, and bytes that are nothing at all.

The targets are those of `make fuzz`, which searches longer and learns from coverage (tests/fuzz/).
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import TARGETS

chance = st.randoms(use_true_random=False)
bounded = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
without_headers = pytest.mark.parametrize("name", [name for name in TARGETS if name != "header"])
HEADER = TARGETS["header"]


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_is_a_valid_document(name: str) -> None:
    """Else the mutations below would start from rubbish."""
    assert all(TARGETS[name].accepts(seed) for seed in TARGETS[name].seeds)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_yield_other_documents_of_which_some_are_valid_and_most_are_not(name: str) -> None:
    """Only then do they reach what lies behind the first check."""
    rng, target = random.Random(1), TARGETS[name]
    made = [target.mutate(rng.choice(target.seeds), rng) for _ in range(300)]
    valid = sum(target.accepts(document) for document in made)
    assert 0 < valid < 200
    assert len(set(made)) > 100


@without_headers
@given(chance=chance)
@bounded
def test_a_document_that_is_a_little_wrong_is_refused_or_means_what_it_says(name: str, chance: random.Random) -> None:
    target = TARGETS[name]
    target.accepts(target.mutate(chance.choice(target.seeds), chance))


@without_headers
@given(data=st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
@bounded
def test_bytes_that_are_no_document_are_refused(name: str, data: bytes) -> None:
    valid = TARGETS[name].accepts(data)
    assert not valid or name == "plan"  # an empty plan, or a comment, is the plan of defaults


@given(chance)
@bounded
def test_threat_06_a_header_that_is_a_little_wrong_is_refused_or_means_what_it_says(chance: random.Random) -> None:
    HEADER.accepts(HEADER.mutate(chance.choice(HEADER.seeds), chance))


@given(st.binary(max_size=300))
@bounded
def test_threat_06_a_header_of_any_bytes_is_refused_or_means_what_it_says(text: bytes) -> None:
    HEADER.accepts(text)
    HEADER.accepts(len(text).to_bytes(8, "little") + text)
