"""What this node owes the others, and what it tells its operator about it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from federations import make_federation
from parts import Parts

from hsl_node.federation.names import Digest, Peer
from hsl_node.node import delivery as module
from hsl_node.node.delivery import Delivery
from hsl_node.sync.manifest import Receipt
from hsl_node.sync.round import Push
from hsl_node.sync.send.deliver import Transfer

ASH, BIRCH = Peer("ash"), Peer("birch")


def test_a_refusal_is_no_longer_an_alarm_when_the_round_need_not_be_delivered_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = make_federation(2)
    parts = Parts(members, tmp_path, ASH)
    journal = parts.store.journal
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

    async def story() -> None:
        task = asyncio.create_task(Delivery(*parts.all, parts.liveness).push(Push(0, BIRCH)))
        async with asyncio.timeout(60):
            await refused.wait()
        await asyncio.sleep(0)
        assert "refused by birch" in parts.alarms
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert parts.alarms.listing() == []

    asyncio.run(story())
    parts.close()


def test_to_a_peer_on_another_federation_file_the_pauses_grow_and_its_joining_ours_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 tries in 79 s, each waking the other side."""
    parts = Parts(make_federation(2), tmp_path, ASH)
    waited: list[tuple[float, bool]] = []

    async def wait(seconds: float, wake: asyncio.Event, *, at_least: float) -> None:
        waited.append((seconds, wake is its_login))

    monkeypatch.setattr(module, "wait_for_peer", wait)
    its_login, transfer = asyncio.Event(), Transfer(BIRCH)
    waits = module._Waits(parts.liveness, parts.alarms, transfer)

    async def story() -> None:
        await waits.wait(0.5, its_login, at_least=0)
        said = "asking for a file's size was refused: federation: receipts/...: another federation, ours is 5adf52bc"
        transfer.last_error = said
        for _ in range(8):
            await waits.wait(0.5, its_login, at_least=0)
        assert "federation birch" in parts.alarms
        transfer.last_error = ""
        parts.liveness.federation_of(BIRCH, parts.here.federation.fed8)
        await waits.wait(0.5, its_login, at_least=0)

    asyncio.run(story())
    assert waited == [(0.5, True), *((s, False) for s in (60, 120, 240, 480, 960, 1920, 3600, 3600)), (0.5, True)]
    parts.close()
