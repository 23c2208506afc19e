"""What the tests of healing share."""

from __future__ import annotations

import pytest
from cluster import Cluster
from federations import FederationOf, Members
from lost_disk import NAMES, PLAN
from ports import free_ports
from recovering import BIRCH, CEDAR


@pytest.fixture
def members(federation_of: FederationOf) -> Members:
    ports = free_ports(2)
    return federation_of(3, addresses={p: f"127.0.0.1:{n}" for p, n in zip((BIRCH, CEDAR), ports, strict=True)})


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The digests of a run in which nobody loses anything."""
    with Cluster(tmp_path_factory.mktemp("undisturbed"), NAMES, PLAN) as cluster:
        cluster.start_all()
        cluster.wait_finished()
        return cluster.fused("ash")
