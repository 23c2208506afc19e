"""The sample of a campaign that `make test` runs: never nothing, the same for the same seed, all of them in turn."""

from __future__ import annotations

import pytest
from sample import in_sample


@pytest.mark.parametrize(("cases", "one_in"), [(1, 6), (5, 6), (6, 6), (67, 6), (100, 20), (3, 1)])
def test_each_case_has_its_turn_once(cases: int, one_in: int) -> None:
    days = min(cases, one_in)
    samples = [in_sample(cases, one_in, "campaign", seed) for seed in range(739_000, 739_000 + days)]
    assert [sum(turns) for turns in zip(*samples, strict=True)] == [1] * cases
    assert {sum(sample) for sample in samples} <= {cases // days, -(-cases // days)}
    assert samples[0] == in_sample(cases, one_in, "campaign", 739_000 + days)


def test_a_sample_of_two_lists_is_not_all_of_one_value() -> None:
    """Of 6 x 4 cases in their order, each fourth would have the same one of four values."""
    sample = [at for at, chosen in enumerate(in_sample(24, 4, "campaign", 0)) if chosen]
    assert len(sample) == 6 and len({at % 4 for at in sample}) > 1
