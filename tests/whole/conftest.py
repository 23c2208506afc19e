"""What the tests with whole disks share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from writers import WRITERS, Body


@pytest.fixture(params=sorted(WRITERS))
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Body, Callable[[Path], object], object]:
    """A folder with the old file, how the new one is written, how to look, and what an undisturbed write gives."""
    old, new, look = WRITERS[request.param]
    for name in ("folder", "undisturbed"):
        (tmp_path / name).mkdir(mode=0o700)
        old(tmp_path / name)
    new(tmp_path / "undisturbed")
    assert look(tmp_path / "folder") != look(tmp_path / "undisturbed")
    return tmp_path / "folder", new, look, look(tmp_path / "undisturbed")
