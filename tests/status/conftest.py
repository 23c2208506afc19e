"""What the tests of the status share."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsl_node.admin import enrol


@pytest.fixture
def state(tmp_path: Path) -> Path:
    enrol.init(tmp_path / "ash", name="ash", address="127.0.0.1:9001", listen=None, data=None)
    return tmp_path / "ash"
