"""What the tests of the commands share: a node that has lived."""

from __future__ import annotations

from pathlib import Path

import pytest
from backups import PLAN
from cluster import Cluster

from hsl_node.admin import backup


@pytest.fixture(scope="session")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory after a whole run, and a backup of it made while the daemon ran: DIR/ash, DIR/ash.tar."""
    folder = tmp_path_factory.mktemp("lived")
    with Cluster(folder, ("ash", "birch"), PLAN) as cluster:
        (cluster.layout("ash").state / "splits.json").write_text('{"version": 1, "splits": {}}')
        cluster.start_all()
        cluster.wait_finished()
        backup.backup(folder / "ash", folder / "ash.tar")
        assert cluster.stop("ash") == 0
    return folder
