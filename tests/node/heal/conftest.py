"""What the tests of healing share."""

from __future__ import annotations

import pytest
from federations import FederationOf, Members
from ports import free_ports
from recovering import BIRCH, CEDAR


@pytest.fixture
def members(federation_of: FederationOf) -> Members:
    ports = free_ports(2)
    return federation_of(3, addresses={p: f"127.0.0.1:{n}" for p, n in zip((BIRCH, CEDAR), ports, strict=True)})
