"""What all tests share: small federations with real keys, where the real images are, hypothesis settings, samples.

members = federation_of(3)              # peers ash, birch, cedar; real ed25519 keys; a plan without anchor
members.federation, members.identities["ash"], members.peers
folder = data_folder("busbra")          # skips the test, with the reason, where the images are not here
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import sample
from federations import FederationOf, make_federation
from hypothesis import HealthCheck, settings
from sources import REPOSITORY

# A busy machine must never decide a test: no deadlines. In CI the same examples every time; elsewhere new ones.
settings.register_profile(
    "default",
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)


settings.register_profile("ci", settings.get_profile("default"), derandomize=True)


settings.load_profile("ci" if os.environ.get("CI") else "default")


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a job in the background ignores Ctrl-C, as its children would
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Several tests run at once, each with its daemons: threads that wait for each other made one of them six times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_report_header() -> str:
    return f"sample of the campaigns: HSL_TEST_SAMPLE={sample.SEED} repeats it, `make test-all` runs all"


@pytest.hookimpl(tryfirst=True)  # before `-m "not full"` leaves any out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    sample.mark_what_is_left_out(items)


@pytest.fixture(scope="session")
def federation_of() -> FederationOf:
    return make_federation


@pytest.fixture(scope="session")
def data_folder() -> Callable[[str], Path]:
    """Folder of real images by name: under $HSL_TEST_DATA, else `../shared/data` beside the repository."""
    root = Path(os.environ.get("HSL_TEST_DATA") or REPOSITORY.parent / "shared" / "data")

    def folder(name: str) -> Path:
        path = root / name
        if not path.is_dir():
            pytest.skip(f"real images {name!r} are not at {root} (set HSL_TEST_DATA)")
        return path

    return folder
