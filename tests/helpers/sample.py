"""The part of a campaign that `make test` runs: other cases each day, all of them in `make test-all`.

@pytest.mark.sample(6)                  # of the cases of this test a sixth each day
@pytest.mark.sample(3, "lost disks")    # of the cases of all tests that say so, a third
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Sequence
from datetime import date

import pytest

# The workers of pytest-xdist inherit it from the process that starts them: midnight may come between.
SEED = int(os.environ.setdefault("HSL_TEST_SAMPLE", str(date.today().toordinal())))
ALL = "HSL_TEST_ALL" in os.environ  # `make test-all`


def examples(count: int) -> int:
    """How many examples hypothesis tries: a quarter in `make test`, new ones each time."""
    return count if ALL else max(10, count // 4)


def in_sample(cases: int, one_in: int, campaign: str, seed: int = SEED) -> list[bool]:
    """Which of so many cases are in the sample: at least one, and over `one_in` days each has its turn."""
    turns = list(range(cases))
    random.Random(campaign).shuffle(turns)  # else a campaign over two lists would meet one value of a list all day
    one_in = min(one_in, cases)
    return [turn % one_in == seed % one_in for turn in turns]


def mark_what_is_left_out(items: Sequence[pytest.Item]) -> None:
    """Cases of a campaign that are not in the sample are marked `full`."""
    campaigns = defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("sample"):
            one_in, *name = mark.args
            campaigns[one_in, *(name or [item.nodeid.partition("[")[0].rpartition("/")[2]])].append(item)
    for (one_in, name), cases in campaigns.items():
        for item, chosen in zip(cases, in_sample(len(cases), one_in, name), strict=True):
            if not chosen:
                item.add_marker(pytest.mark.full)
