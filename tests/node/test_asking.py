"""Before a node signs, it asks whether anybody holds a signature of its own that its journal does not know.

The peer is the test, behind a real inbox server; of the daemon there is what asks. Real daemons: test_recovery.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from asked_peer import BIRCH, Site, manifest, run
from boxes import on_loop
from federations import ASH, FederationOf, make_federation
from hostile import until
from memory_file import in_memory
from parts import Parts
from ports import free_ports

from hsl_node.errors import (
    KeyRefused,
    LocalStateError,
    TransportError,
)
from hsl_node.federation.config import PeerCard
from hsl_node.federation.identity import MANIFEST_NAMESPACE
from hsl_node.federation.names import Peer
from hsl_node.host.pace import Pace
from hsl_node.node import before_signing
from hsl_node.node.peers import links
from hsl_node.sync import ask
from hsl_node.sync.wire.transport import Transport


@pytest.fixture
def site(federation_of: FederationOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(before_signing, "RETRY", Pace(0.01, 0.02))
    monkeypatch.setattr(before_signing, "SOON_S", 0.05, raising=False)
    (port,) = free_ports(1)
    return Site(federation_of(2, addresses={BIRCH: f"127.0.0.1:{port}"}), port, tmp_path)


def test_threat_12_a_signature_that_is_shown_stops_the_node(site: Site) -> None:
    async def story() -> None:
        async with site:
            with pytest.raises(LocalStateError, match="this node was set back"):
                await site.before_signing().check()
            assert site.journal.meta("recover")

    run(story)


def test_threat_12_a_signature_that_is_listed_and_cannot_be_read_is_waited_for(site: Site) -> None:
    """A link that breaks between the list and the proof must not let the node sign a round again."""

    async def story() -> None:
        async with site:
            site.shown = None
            check = asyncio.create_task(site.before_signing().check())
            await until(lambda: site.reads >= 3)
            assert not check.done() and "not shown" in site.alarms
            site.shown = site.document
            with pytest.raises(LocalStateError, match="this node was set back"):
                await check

    run(story)


def test_threat_12_who_listed_a_signature_and_is_gone_is_waited_for_too(site: Site) -> None:
    async def story() -> None:
        async with site:
            site.shown = None
            asks = site.before_signing()
            check = asyncio.create_task(asks.check())
            await until(lambda: "not shown" in site.alarms)
            await site.server.stop()
            before = asks.asked
            await until(lambda: asks.asked > before + 3)
            assert not check.done() and "not shown" in site.alarms
            site.listing = False
            await site.start()
            await check
            assert "not shown" not in site.alarms

    run(story)


def test_threat_12_a_kept_connection_that_leads_nowhere_is_no_reason_to_sign_unasked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that was set back, memory and all, has connections that look alive, and peers that know more."""

    async def nowhere(*_: object) -> bytes:
        raise TransportError("nothing moved for 10 s")

    async def story() -> None:
        async with site:
            site.listing = False
            asks = site.before_signing()
            await asks.check()
            kept = asks.links.refused[BIRCH]._kept
            assert kept is not None and kept.link.alive()
            monkeypatch.setattr(kept.link, "read", nowhere)
            site.listing = True
            with pytest.raises(LocalStateError, match="this node was set back"):
                await asks.check()

    run(story)


def test_threat_12_a_list_that_never_ends_holds_no_signature_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before_signing, "LIST_S", 0.05)

    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    async def story() -> None:
        async with site:
            monkeypatch.setattr(links, "ask", never)
            async with asyncio.timeout(30):
                await site.before_signing().check()

    run(story)


def test_threat_12_what_this_node_never_signed_does_not_stop_it(site: Site) -> None:
    async def story() -> None:
        async with site:
            key = site.members.identities[BIRCH]
            site.document = site.shown = key.sign(manifest(site.members, 7).content(), MANIFEST_NAMESPACE)
            await site.before_signing().check()
            assert site.reads and not site.journal.meta("recover") and not site.alarms.listing()

    run(story)


@pytest.mark.parametrize("shown", [b"", b"nonsense"])
def test_threat_12_something_else_than_what_is_listed_is_not_shown(site: Site, shown: bytes) -> None:
    """What is listed may be there all the same, and nobody has seen it."""

    async def story() -> None:
        async with site:
            site.shown = shown
            asks = site.before_signing()
            check = asyncio.create_task(asks.check())
            await until(lambda: check.done() or asks.asked > 3)
            assert not check.done() and asks.waiting_for == (BIRCH,) and "not shown" in site.alarms
            site.listing = False
            await check
            assert "not shown" not in site.alarms and not site.journal.meta("recover")

    run(story)


@pytest.mark.parametrize("kind", ["rubbish", "of birch"])
def test_threat_12_who_lists_hundreds_of_our_signatures_that_are_none_is_named_and_few_are_read(
    site: Site, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Each read may take as long as a peer's patience lasts: a thousand held the victim up for hours, with no name."""

    async def story() -> None:
        site.more = [f"{number:064x}" for number in range(500)]
        if kind == "of birch":  # each is what the list names
            key = site.members.identities[BIRCH]
            site.document = site.shown = key.sign(manifest(site.members, 7).content(), MANIFEST_NAMESPACE)
            site.more = [hashlib.sha256(site.document).hexdigest()] * 500
            monkeypatch.setattr(site, "offer", opens_all(site))
        async with site:
            asks = site.before_signing()
            check = asyncio.create_task(asks.check())
            await until(lambda: check.done() or asks.asked > 3)
            assert not check.done() and asks.waiting_for == (BIRCH,) and "not shown" in site.alarms
            assert 0 < site.reads <= asks.asked * ask.READ_MAX
            site.listing = False
            await check

    run(story)


def opens_all(site: Site) -> Callable[[Peer, str, bool], int]:
    offer = site.offer

    def opened(asker: Peer, name: str, twice: bool) -> int:
        if len(name) < 64:
            return offer(asker, name, twice)
        site.reads += 1
        assert site.shown is not None
        return in_memory(site.shown)

    return opened


def test_threat_12_who_answers_slowly_is_named_while_it_is_waited_for_and_not_for_long(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing comes of what it lists; the alarm stands before the first answer, and one list has a limit in all."""
    reading, seen = asyncio.Event(), []

    async def never(*args: object) -> None:
        seen.append("not shown" in site.alarms)
        reading.set()
        await asyncio.Event().wait()

    async def story() -> None:
        async with site:
            monkeypatch.setattr(ask, "fetch_manifest", never)
            asks = site.before_signing()
            check = asyncio.create_task(asks.check())
            await reading.wait()
            assert seen == [True]
            await until(lambda: asks.waiting_for)
            assert asks.waiting_for == (BIRCH,) and len(seen) == 1, "named before it has answered"
            check.cancel()
            await asyncio.gather(check, return_exceptions=True)

            monkeypatch.setattr(before_signing, "READ_S", 0.05)
            check = asyncio.create_task(asks.check())
            await until(lambda: len(seen) > 3)
            assert not check.done() and asks.waiting_for == (BIRCH,)
            site.listing = False
            await check

    run(story)


def test_threat_20_a_list_of_what_this_node_never_signed_is_one_line_in_the_log(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of it was a line: 1250 fit into a list, and a list is read again and again."""

    async def story() -> None:
        key = site.members.identities[BIRCH]
        site.document = site.shown = key.sign(manifest(site.members, 7).content(), MANIFEST_NAMESPACE)
        site.more = [hashlib.sha256(site.document).hexdigest()] * (ask.READ_MAX - 1)
        monkeypatch.setattr(site, "offer", opens_all(site))
        async with site:
            await site.before_signing().check()

    run(story)
    (told,) = [r for r in caplog.records if r.getMessage() == "proves nothing"]
    assert (told.__dict__["peer"], told.__dict__["count"]) == (BIRCH, ask.READ_MAX)
    assert site.reads == ask.READ_MAX


@on_loop
async def test_a_refused_key_is_left_alone_but_its_reason_stays_until_another_key_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = 0

    @contextlib.asynccontextmanager
    async def connect(card: PeerCard, *arguments: Any, **more: Any) -> AsyncIterator[Transport]:
        nonlocal times
        times += 1
        raise KeyRefused(f"{card.name} shows another host key", remedy="take its update file")
        yield

    monkeypatch.setattr(links, "connect", connect)
    members = make_federation(2)
    parts = Parts(members, tmp_path, ASH)
    asks = parts.links
    for question in (asks.offer_of(BIRCH), asks.connected(BIRCH).__aenter__()):
        with pytest.raises(KeyRefused, match="another host key") as refused:
            await question
        assert refused.value.remedy == "take its update file"
    assert times == 1
    parts.keys.change(parts.keys.ring, members.identities[BIRCH])
    with pytest.raises(KeyRefused):
        await asks.offer_of(BIRCH)
    assert times == 2
    parts.close()
