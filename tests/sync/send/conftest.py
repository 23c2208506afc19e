"""What the tests of sending share."""

from __future__ import annotations

import pytest
from one_parcel import (
    Looks,
)

from hsl_node.sync.send.receipts import Answer, Receipts


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """What each look for a receipt has found."""
    found: Looks = []
    find = Receipts.find

    async def noted(self: Receipts, *, other_than: bytes | None = None) -> Answer | None:
        found.append(await find(self, other_than=other_than))
        return found[-1]

    monkeypatch.setattr(Receipts, "find", noted)
    return found
