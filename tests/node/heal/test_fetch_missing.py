"""Fetching what is not on its way here: beside an intake that looks at any moment, from peers that come and go.

With real daemons: test_recovery_without.py.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
from claims import START, checkpoint
from cluster import Cluster
from givers import Giver, Link, asking_of, fetch_over, here_of, missing_of, offer_by, offer_of
from inbox_site import ASH, BIRCH, CEDAR, ROUND, Site
from two_faces import PLAN, TRAINER, at, begin, face, signed

from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import PARTS, RECEIPTS, Digest, FileName, Kind, Peer
from hsl_node.host import durable
from hsl_node.host.durable import Disk
from hsl_node.node.alarms import Alarms
from hsl_node.node.heal import fetch_missing
from hsl_node.node.peers.place import place
from hsl_node.sync.inbox.receive import Arrival, Refusal
from hsl_node.sync.inbox.server import Incoming
from hsl_node.sync.offer import Listed
from hsl_node.sync.round import Phase


class Scanning(Disk):
    """Everything that may be seen between two operations of the disk is seen."""

    def __init__(self, scan: Callable[[], object]) -> None:
        self.scan = scan

    def open(self, path: Path | str, flags: int, mode: int = 0o777, *, folder: int | None = None) -> int:
        self.scan()
        return super().open(path, flags, mode, folder=folder)

    def file(self, descriptor: int) -> BinaryIO:
        self.scan()
        return super().file(descriptor)

    def fsync(self, descriptor: int) -> None:
        self.scan()
        super().fsync(descriptor)

    def rename(self, old: Path | str, new: Path | str, **folders: int | None) -> None:
        self.scan()
        super().rename(old, new, **folders)


# ---------------------------------------------------------------- beside the intake


def test_threat_13_an_intake_that_looks_at_any_moment_neither_breaks_a_fetch_nor_blames_its_sender(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rescan of every 30 s (every second where another server is the inbox) meets every state of the fetch."""
    data = site.good_data()
    manifest, scans, found = site.manifest(data), [], list[Arrival | Refusal]()

    def scan() -> None:
        with monkeypatch.context() as real:
            real.setattr(durable, "disk", Disk())
            scans.append(1)
            found.extend(site.scan())

    here = here_of(site)
    fetch = fetch_over(here, site, Link(data, between=scan))
    (site.homes / BIRCH / RECEIPTS / str(manifest.file_name().of(Kind.RECEIPT))).write_text("of before the loss")
    monkeypatch.setattr(durable, "disk", Scanning(scan))
    offers = {CEDAR: offer_of(site, manifest.sha256)}
    assert asyncio.run(place(here, fetch, manifest, site.sign(manifest), offers))
    assert len(scans) > 12 and not [item for item in found if isinstance(item, Refusal)]
    (arrival,) = site.scan()
    assert isinstance(arrival, Arrival) and arrival.manifest == manifest
    assert arrival.data is not None and arrival.data.read_bytes() == data
    left = [p for f in (PARTS, RECEIPTS) for p in (site.homes / BIRCH / f).iterdir()]
    assert not left and not [p for p in here.layout.fetched.rglob("*") if p.is_file()]


def test_a_delivery_that_comes_while_the_same_checkpoint_is_fetched_is_taken(site: Site) -> None:
    data = site.good_data()
    manifest, found = site.manifest(data), list[Arrival | Refusal]()

    def deliver_once() -> None:
        if not found:
            site.deliver(data, manifest)
            found.extend(site.scan())

    here = here_of(site)
    fetch = fetch_over(here, site, Link(data, between=deliver_once))
    assert asyncio.run(place(here, fetch, manifest, site.sign(manifest), {CEDAR: offer_of(site, manifest.sha256)}))
    found.extend(site.scan())
    assert [isinstance(item, Arrival) for item in found] == [True, True]
    assert {item.data.read_bytes() for item in found if isinstance(item, Arrival) and item.data} == {data}


def test_a_statement_is_placed_alone_and_what_nobody_has_is_not(site: Site) -> None:
    data = site.good_data()
    here, manifest = here_of(site), site.manifest(data)
    fetch = fetch_over(here, site, Link(data))
    assert not asyncio.run(place(here, fetch, manifest, site.sign(manifest), {CEDAR: offer_of(site)}))
    assert site.scan() == [] and not list(site.inbox.iterdir())
    statement = site.manifest(b"", sha256="b" * 64, halted=True)
    assert asyncio.run(place(here, fetch, statement, site.sign(statement), {}))
    (arrival,) = site.scan()
    assert isinstance(arrival, Arrival) and arrival.manifest == statement


def test_threat_05_a_lost_checkpoint_comes_from_whoever_gives_it_in_good_time(site: Site) -> None:
    """ash lacks birch's; birch, which is asked first, gives a list, the manifest, and then hangs. cedar has it too."""

    async def story() -> None:
        birch, cedar = Giver(), Giver()
        asks, (data, _) = asking_of(site, birch, cedar)
        manifest = site.manifest(data)
        document = site.sign(manifest)
        digest = hashlib.sha256(document).hexdigest()
        listed = Listed(peer=BIRCH, round=ROUND, sha256=manifest.sha256, document=digest)
        for peer, giver in asks.givers.items():
            giver.documents[digest] = document
            update = {"manifests": [listed]}
            asks.offers[peer] = offer_by(site, peer, manifest.sha256).model_copy(update=update)
        birch.stalls = 1
        state = replace(START, phase=Phase.COLLECT, round=ROUND, have={ASH: checkpoint(ASH), CEDAR: checkpoint(CEDAR)})
        keys = SimpleNamespace(ring=Keyring.of(site.members.federation))
        watch, alarms = missing_of(lambda: state, here=asks.here, keys=keys, links=asks, fetch=asks)
        watch._lost = (BIRCH,)
        async with asyncio.timeout(60):
            await watch._ask([BIRCH, CEDAR])
        arrival = site.scan()[0]
        assert isinstance(arrival, Arrival) and arrival.manifest == manifest
        assert "lost birch" in alarms, "its manifest was shown"

    asyncio.run(story())


def test_threat_03_of_one_peer_one_checkpoint_is_fetched_however_many_manifests_a_giver_lists(site: Site) -> None:
    """cedar has made three with birch, of one round. Each is signed by birch, and each checkpoint would be kept."""

    async def story() -> None:
        cedar = Giver()
        asks, _ = asking_of(site, Giver(), cedar)
        listed = []
        for value in (1.0, 2.0, 3.0):
            data = site.good_data(value)
            manifest = site.manifest(data)
            document = site.sign(manifest)
            digest = hashlib.sha256(document).hexdigest()
            cedar.files[manifest.sha256], cedar.documents[digest] = data, document
            listed.append(Listed(peer=BIRCH, round=ROUND, sha256=manifest.sha256, document=digest))
        offer = offer_by(site, CEDAR, *(m.sha256 for m in listed)).model_copy(update={"manifests": listed})
        state = replace(START, phase=Phase.COLLECT, round=ROUND, have={ASH: checkpoint(ASH), CEDAR: checkpoint(CEDAR)})
        keys = SimpleNamespace(ring=Keyring.of(site.members.federation))
        watch, _ = missing_of(lambda: state, here=asks.here, keys=keys, links=asks, fetch=asks)
        watch._lost = (BIRCH,)
        await watch._fetch(CEDAR, {CEDAR: offer})
        (placed,) = site.inbox.iterdir()
        assert listed[0].sha256 in placed.name
        assert len([p for p in asks.here.layout.claimed.rglob("*") if p.is_file()]) == 1

    asyncio.run(story())


# ---------------------------------------------------------------- what lies where it is fetched to


async def cleared(here: Any, alarms: Alarms, monkeypatch: pytest.MonkeyPatch, until: Callable[[], bool]) -> None:
    """The watch of a node that lacks nothing, until it has come so far."""
    monkeypatch.setattr(fetch_missing, "LOOK_S", 0.0)
    here.others = ()
    missing, _ = missing_of(lambda: replace(START, phase=Phase.COLLECT, round=ROUND), here=here, alarms=alarms)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        watch = group.create_task(missing.watch())
        while not until():
            assert not watch.done()
            await asyncio.sleep(0)
        watch.cancel()


def test_whatever_lies_among_what_was_half_fetched_goes_and_nothing_beyond_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, a link to a folder, a link to nowhere, a pipe, a folder in a folder; it ended the daemon."""
    here, alarms = here_of(site), Alarms()
    fetched, elsewhere = here.layout.fetched, site.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (fetched / "cedar" / "deeper").mkdir(parents=True)
    (fetched / "README").write_text("put here by hand")
    (fetched / "link").symlink_to(elsewhere)
    (fetched / "broken").symlink_to("nowhere")
    os.mkfifo(fetched / "pipe")
    asyncio.run(cleared(here, alarms, monkeypatch, lambda: not any(fetched.iterdir())))
    assert (elsewhere / "kept").exists() and not alarms.listing()


def test_what_cannot_be_removed_is_named_and_removed_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that somebody has made immutable, say; what can be removed is."""
    here, alarms, tries = here_of(site), Alarms(), []
    stuck, unlink = here.layout.fetched / "stuck", Path.unlink
    stuck.touch()
    (here.layout.fetched / "other").touch()

    def held(path: Path, *args: Any) -> None:
        if path == stuck and len(tries) < 3:
            tries.append(path)
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        unlink(path, *args)

    monkeypatch.setattr(Path, "unlink", held)
    told: list[str] = []
    sound = alarms.sound
    monkeypatch.setattr(alarms, "sound", lambda code, text, fix: (told.append(text), sound(code, text, fix)))
    asyncio.run(cleared(here, alarms, monkeypatch, lambda: not stuck.exists() and not alarms.listing()))
    assert told == [f"{stuck} cannot be removed: Operation not permitted"] * 3
    assert not any(here.layout.fetched.iterdir())


# ---------------------------------------------------------------- what is lost


def test_an_arrival_ends_the_alarm_at_once_and_who_has_fused_since_is_asked_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ash lacks cedar's checkpoint, which birch has fused. The intake says so after each arrival."""
    monkeypatch.setattr(fetch_missing, "PATIENCE_S", 0.0)
    state = replace(START, phase=Phase.COLLECT, round=1, have={ASH: checkpoint(ASH), BIRCH: checkpoint(BIRCH)})
    watch, alarms = missing_of(lambda: state)
    watch.look()
    assert alarms.listing() == [], "nobody has fused it: it comes by itself"

    state = replace(state, early={BIRCH: checkpoint(BIRCH, 2)})
    watch.look()
    assert alarms.listing() == [], "birch says so; nobody has shown it"
    now = time.monotonic()
    assert watch._turns.due(now) == [BIRCH, CEDAR]
    for giver in (BIRCH, CEDAR):
        watch._turns.asked(giver, now, reached=True)
    watch.look()
    assert watch._turns.due(now + 1) == [], "nothing is new"

    state = replace(state, early={**state.early, CEDAR: checkpoint(CEDAR, 2)})
    watch.look()
    assert watch._turns.due(time.monotonic()) == [CEDAR]
    assert "lost cedar" in alarms, "cedar is in the next round, so it has our receipt"
    (alarm,) = alarms.listing()
    assert "cedar has not connected to this node since the start" in alarm["fix"] and "backup" not in alarm["fix"]
    watch.connected(CEDAR)
    watch.look()
    (alarm,) = alarms.listing()
    assert alarm["fix"].endswith("where none of them can be asked, restore a backup")

    state = replace(state, have={**state.have, CEDAR: checkpoint(CEDAR)})
    watch.look()
    assert alarms.listing() == [] and watch._turns.due(now + 10_000) == []


def test_threat_09_who_says_that_it_fused_other_manifests_than_those_here_gives_no_alarm_about_an_honest_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cedar claims the next round in the midst of this one; birch trains. Nobody is asked, nothing is said of birch."""
    monkeypatch.setattr(fetch_missing, "PATIENCE_S", 0.0)
    invented: dict[Peer, Digest] = dict.fromkeys((ASH, BIRCH, CEDAR), Digest("f" * 64))
    state = replace(START, phase=Phase.COLLECT, round=1, have={p: checkpoint(p) for p in (ASH, CEDAR)})
    state = replace(state, early={CEDAR: checkpoint(CEDAR, 2, inputs=invented)})
    watch, alarms = missing_of(lambda: state)
    watch.look()
    assert alarms.listing() == [] and watch._turns.due(time.monotonic() + 10_000) == []

    right = {**invented, **{p: claim.manifest for p, claim in state.have.items()}}
    state = replace(state, early={CEDAR: checkpoint(CEDAR, 2, inputs=right)})
    watch.look()
    assert watch._turns.due(time.monotonic()) == [BIRCH, CEDAR] and alarms.listing() == [], "asked for, not told"


# ---------------------------------------------------------------- what is on its way


class Inbox:
    """ash's, into which cedar writes; ash lacks cedar's checkpoint of round 1, which birch has fused."""

    def __init__(self) -> None:
        self.now, self.parts = 1000.0, list[Incoming]()
        self.state = replace(
            START, phase=Phase.COLLECT, round=1, have={p: checkpoint(p) for p in (ASH, BIRCH)},
            early={BIRCH: checkpoint(BIRCH, 2)},
        )  # fmt: skip
        self.missing, _ = missing_of(lambda: self.state, incoming=self.incoming, clock=lambda: self.now)

    def incoming(self, round: int) -> list[Incoming]:
        return [part for part in self.parts if part.name.round == round]

    def holds(self, size: int, sha256: str = "a" * 64) -> None:
        """This much of it lies here; cedar holds the part open."""
        name = FileName("0" * 8, 1, CEDAR, Digest(sha256), Kind.DATA, part=True)
        self.parts = [Incoming(name, size, 95_000_000, 0.0)]

    def lost_after(self, seconds: float, growth: Callable[[], object] = lambda: None) -> bool:
        """Is it asked for, at the end of this time?"""
        end = self.now + seconds
        while self.now < end:
            self.now += fetch_missing.LOOK_S
            growth()
            self.missing.look()
        return self.missing._lost == (CEDAR,)


def test_threat_05_a_part_that_is_held_open_and_does_not_grow_is_not_waited_for() -> None:
    box = Inbox()
    box.holds(1)
    assert box.lost_after(fetch_missing.PATIENCE_S + fetch_missing.LOOK_S), "a byte is nothing"

    box = Inbox()
    box.holds(10_000_000)
    assert not box.lost_after(fetch_missing.STILL_S)
    assert box.lost_after(fetch_missing.PATIENCE_S + fetch_missing.LOOK_S)
    box.holds(0)  # removed, and begun anew
    assert box.lost_after(2)
    box.holds(10_000_000)
    assert box.lost_after(2), "so much was here before"
    box.holds(10_000_000 + fetch_missing.GROWTH_BYTES, "b" * 64)
    assert not box.lost_after(2)


def test_a_slow_line_that_is_dead_for_three_minutes_is_waited_for() -> None:
    """0.1 Mbit/s, in blocks of 256 KiB; then nothing, a new connection, and what lay here is sent once more."""
    box, rate, block = Inbox(), 12_500.0, 256 * 1024
    began = box.now

    def grows() -> None:
        box.holds(int((box.now - began) * rate) // block * block)

    assert not box.lost_after(30, grows) and not box.lost_after(600, grows)
    assert not box.lost_after(180 + 3 * block / rate)
    began += 180 + 3 * block / rate
    assert not box.lost_after(600, grows)


def test_threat_05_another_checkpoint_than_the_one_that_was_shown_is_not_waited_for() -> None:
    box = Inbox()
    assert box.lost_after(fetch_missing.PATIENCE_S + fetch_missing.LOOK_S)
    box.missing._shown[CEDAR] = Digest("a" * 64)  # birch gave cedar's manifest
    box.holds(50_000_000, "b" * 64)
    assert box.lost_after(2)
    box.holds(fetch_missing.GROWTH_BYTES, "a" * 64)
    assert not box.lost_after(2)


def test_what_grew_in_the_round_before_says_nothing_of_this_one() -> None:
    box = Inbox()
    box.holds(95_000_000)
    box.missing.look()
    box.state = replace(box.state, round=2)
    box.parts = [replace(p, bytes=fetch_missing.GROWTH_BYTES, name=replace(p.name, round=2)) for p in box.parts]
    assert not box.lost_after(2 * fetch_missing.PATIENCE_S)
    assert len(box.missing._grown) == 1


def test_threat_05_a_manifest_held_open_at_one_peer_does_not_keep_it_from_what_another_has(tmp_path: Path) -> None:
    """cedar gives its checkpoint to ash alone, and writes a byte to birch."""
    prelude = "import hsl_node.node.heal.fetch_missing as m; m.PATIENCE_S, m.LOOK_S = 1.0, 0.2"
    with Cluster(tmp_path, ("ash", "birch", "cedar"), PLAN, trainer=TRAINER, prelude=prelude) as cluster:

        async def story() -> None:
            manifest, data = await asyncio.to_thread(face, cluster, 1.0)
            await asyncio.to_thread(signed, cluster, "birch", 1)
            part = f"parts/{manifest.name.as_part()}"
            async with at(cluster, "birch").sftp() as client, client.open(part, "xb") as file:
                await file.write(b"x")
                await at(cluster, "ash").deliver(manifest, data)
                await asyncio.to_thread(cluster.wait_until, "birch", lambda s: s["round"] == 2, "has it from ash")
                await client.stat("parts")  # held all the time

        begin(cluster)
        asyncio.run(story())
