"""What the tests of the node share."""

from __future__ import annotations

from pathlib import Path

import pytest
from inbox_site import Site, make_site


@pytest.fixture(params=["embedded", "foreign"])
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Site:
    return make_site(tmp_path, request.param)
