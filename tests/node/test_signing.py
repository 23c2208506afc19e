"""Nothing is signed before the peers were asked: neither a round's checkpoint nor the closing statement.

A whole node without its trainer, before its next signature; its peer is the test, behind a real inbox server. The look
at the start has shown nothing: what the peer lists later must be found by the question that comes before the signature.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from asked_peer import BIRCH, ME, Site, run
from federations import FederationOf
from hostile import until
from ports import free_ports
from weights import weights

from hsl_node.errors import ConfigError, LocalStateError
from hsl_node.federation.identity import MANIFEST_NAMESPACE
from hsl_node.federation.names import Digest, Round
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.host.layout import Layout
from hsl_node.host.pace import Pace
from hsl_node.node import before_signing
from hsl_node.node.daemon import Daemon, Running
from hsl_node.node.machine import Machine
from hsl_node.node.peers.fetch import Fetch
from hsl_node.node.trainer import Trainer
from hsl_node.sync.round import Phase, State, to_json
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.store import Store
from hsl_node.weights.checkpoint_file import schema_of, write_weights

BASE = Digest("b" * 64)
ROUND = 7  # of the signature that the peer may list; the journal here knows none of it
BEFORE = {
    "checkpoint": State(me=ME, peers=(ME, BIRCH), rounds=20, base=BASE, phase=Phase.TRAIN, round=ROUND),
    "closing": State(me=ME, peers=(ME, BIRCH), rounds=ROUND - 1, base=BASE, phase=Phase.AGREE, round=ROUND),
}


@pytest.fixture
def site(federation_of: FederationOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(before_signing, "RETRY", Pace(0.01, 0.02))
    (port,) = free_ports(1)
    site = Site(federation_of(2, addresses={BIRCH: f"127.0.0.1:{port}"}), port, tmp_path)
    site.listing = False
    return site


@asynccontextmanager
async def node_before(site: Site, state: State) -> AsyncIterator[Before]:
    """It has started in this state, and nobody objected."""
    config = NodeConfig(name=ME, address="127.0.0.1:9", listen=f"127.0.0.1:{free_ports(1)[0]}")
    store = Store(Layout(site.folder / "before"))
    daemon = Daemon(config, site.members.federation, site.members.identities[ME], store, lambda daemon: {})
    daemon.training.trainer = cast(Trainer, SimpleNamespace(run=trained, stop=nothing))
    store.journal.set_meta("instance", "f" * 16)
    store.journal.set_meta("samples", "10")
    schema = schema_of(weights())
    fetch = Fetch(daemon.here, daemon.alarms, daemon.links, schema.file_bytes)
    before = Before(daemon, Running(daemon, schema, fetch, state))
    before.running.machine._wanted = lambda state: {}  # it does what the test tells it, no more
    try:
        await before.running.before_signing.check()
        yield before
    finally:
        daemon._stopping.set()
        await daemon._end()
        store.close()


async def trained(job: dict[str, Any]) -> dict[str, Any]:
    out = Path(job["out"])
    digest = write_weights(out, weights())
    return {"sha256": digest, "bytes": out.stat().st_size, "samples": 10, "score": 0.5, "said": {}}


async def nothing() -> None:
    pass


@dataclass
class Before:
    daemon: Daemon
    running: Running

    @property
    def journal(self) -> Journal:
        return self.daemon.here.journal

    @property
    def layout(self) -> Layout:
        return self.daemon.here.layout

    @property
    def machine(self) -> Machine:
        return self.running.machine


async def signs(node: Before) -> None:
    """What it does next, by its state."""
    wanted = Running._wanted(node.running, node.machine.state)
    await node.machine._do(next(iter(wanted.values())))


@pytest.fixture(params=BEFORE)
def before(request: pytest.FixtureRequest) -> State:
    return BEFORE[request.param]


def test_threat_12_a_signature_that_a_peer_lists_after_the_start_ends_the_node_before_it_signs(
    site: Site, before: State
) -> None:
    async def story() -> None:
        async with site, node_before(site, before) as node:
            site.listing = True
            with pytest.raises(LocalStateError, match="this node was set back"):
                await signs(node)
            assert node.journal.signed(ROUND) is None and node.machine.state == before
            assert node.journal.meta("recover")

    run(story)


def test_a_number_that_every_peer_would_refuse_is_not_signed(site: Site) -> None:
    """A signature is for good: the run would stand still at every hospital."""

    async def story() -> None:
        async with site, node_before(site, BEFORE["checkpoint"]) as node:
            event = await trained({"out": str(node.layout.outbox(ROUND))})
            with pytest.raises(ConfigError, match=r"this node says steps beside its checkpoint; .* nothing was signed"):
                await node.running.signing.trained(Round(ROUND), {**event, "said": {"steps": 3}})
            assert node.journal.signed(ROUND) is None

    run(story)


def test_threat_12_signing_waits_until_what_a_peer_lists_is_settled(site: Site, before: State) -> None:
    """What is listed and not shown may be there all the same."""

    async def story() -> None:
        async with site, node_before(site, before) as node:
            site.listing, site.shown = True, None
            signing = asyncio.ensure_future(signs(node))
            await until(lambda: signing.done() or site.reads >= 3)
            try:
                assert not signing.done() and node.journal.signed(ROUND) is None
                site.listing = False
                await signing
                assert node.journal.signed(ROUND) is not None and ME in node.machine.state.have
            finally:
                signing.cancel()

    run(story)


def test_threat_12_a_round_that_is_trained_again_is_published_as_it_was_signed(site: Site) -> None:
    """The same bytes, and a manifest that differs: only the first one may leave the node."""

    async def story() -> None:
        state = BEFORE["checkpoint"]
        async with site, node_before(site, state) as node:
            event = await trained({"out": str(node.layout.outbox(ROUND))})
            figures = event["sha256"], event["bytes"], event["samples"] + 1, event["score"]
            first = node.running.signing._manifest(Round(ROUND), *figures).content()
            document = node.daemon.keys.identity.sign(first, MANIFEST_NAMESPACE)
            node.journal.record_signed(Round(ROUND), event["sha256"], document)
            node.machine.state = replace(state, signed=True)
            await signs(node)
            row = node.journal.manifest(Round(ROUND), ME)
            assert row is not None and row["document"] == document and node.journal.signed(ROUND)[1] == document
            assert node.machine.state.have[ME].samples == event["samples"] + 1

    run(story)


def test_threat_12_a_node_that_signs_nothing_finds_at_its_start_that_it_was_set_back(site: Site) -> None:
    """It is paused, say, or waits for others: what it receives until its next signature would be thrown away."""

    async def story() -> None:
        state = BEFORE["checkpoint"]
        async with site, node_before(site, state) as node:
            for round in (0, ROUND - 1):
                digest = write_weights(node.layout.fused(round), weights())
            node.journal.set_meta("federation", node.daemon.here.federation.digest)
            node.journal.save_state(to_json(state))
            node.journal.record_fused(Round(0), digest)
            node.daemon.paused = True
            site.listing = True
            await node.daemon._begin()
            assert "ask all" in node.daemon.tasks, "nobody is asked"
            await until(node.daemon._stopping.is_set)
            assert isinstance(node.daemon._fatal, LocalStateError) and "this node was set back" in str(
                node.daemon._fatal
            )

    run(story)
