"""What this node owes the others, and what it tells its operator about it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from federations import make_federation

from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Digest, Peer
from hsl_node.node import delivery as module
from hsl_node.node.alarms import Alarms
from hsl_node.node.delivery import Delivery
from hsl_node.sync.manifest import Receipt
from hsl_node.sync.round import Push
from hsl_node.sync.store.journal import Journal

ASH, BIRCH = Peer("ash"), Peer("birch")


def test_a_refusal_is_no_longer_an_alarm_when_the_round_need_not_be_delivered_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = make_federation(2)
    journal = Journal.create(tmp_path / "journal.sqlite3")
    with journal.transaction():
        journal.record_signed(0, Digest("a" * 64), b"signed")
        journal.record_manifest(0, ASH, Digest("a" * 64), b"signed", {"bytes": 0})
    refused = asyncio.Event()

    async def refuse(*arguments: Any, **options: Any) -> Receipt:
        refused.set()
        return Receipt(
            federation=members.federation.digest, round=0, peer=ASH, sha256="a" * 64, receiver=BIRCH,
            accepted=False, code="setup", text="another anchor",
        )  # fmt: skip

    monkeypatch.setattr(module, "push", refuse)
    node: Any = SimpleNamespace(
        me=ASH, others=(BIRCH,), federation=members.federation, identity=members.identities[ASH],
        config=SimpleNamespace(client="asyncssh"), alarms=Alarms(), journal=journal,
        keyring=Keyring.of(members.federation), refused={BIRCH: None},
    )  # fmt: skip

    async def story() -> None:
        task = asyncio.create_task(Delivery(node).push(Push(0, BIRCH)))
        async with asyncio.timeout(60):
            await refused.wait()
        await asyncio.sleep(0)
        assert "refused by birch" in node.alarms
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert node.alarms.listing() == []

    asyncio.run(story())
    journal.close()
