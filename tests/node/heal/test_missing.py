"""Fetching what is not on its way here: beside an intake that looks at any moment, over lines that break, from peers
that come and go. With real daemons: test_recovery_without.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
from claims import START, checkpoint
from cluster import Cluster
from faulty_disk import FaultyDisk
from inbox_site import ASH, BIRCH, CEDAR, ROUND, Site, make_site
from two_faces import PLAN, TRAINER, at, begin, face, signed

from hsl_node.errors import PeerDataError, TransportError
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import PARTS, RECEIPTS, Digest, FileName, Kind, Peer
from hsl_node.host import durable
from hsl_node.host.durable import Disk
from hsl_node.node.alarms import Alarms
from hsl_node.node.heal import fetch_missing
from hsl_node.node.peers import links
from hsl_node.node.peers.links import Asking
from hsl_node.node.peers.pacing import Turns
from hsl_node.node.peers.place import place
from hsl_node.sync.ask import fetch_file
from hsl_node.sync.inbox.receive import Arrival, Refusal
from hsl_node.sync.inbox.server import Incoming
from hsl_node.sync.offer import Listed, Offer
from hsl_node.sync.round import Phase
from hsl_node.sync.store.layout import Layout

BLOCK = 1000


@pytest.fixture(params=["embedded", "foreign"])
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Site:
    return make_site(tmp_path, request.param)


class Link:
    """Gives a file block by block. `between` is called before each; after `breaks` blocks the line is dead."""

    def __init__(self, data: bytes, between: Callable[[], object] = lambda: None, breaks: int | None = None) -> None:
        self.data, self.between, self.breaks = data, between, breaks
        self.asked: list[int] = []

    async def read(self, path: str, offset: int, count: int) -> bytes:
        await asyncio.to_thread(self.between)
        if self.breaks is not None and len(self.asked) == self.breaks:
            raise TransportError("the line is dead")
        self.asked.append(offset)
        return self.data[offset : offset + min(count, BLOCK)]


class Near(Asking):
    """Asks over a link of the test's."""

    def __init__(self, node: Any, link: Link) -> None:
        super().__init__(node)
        self.link = link

    def connected(self, peer: Peer, patience: Any = None) -> Any:
        return contextlib.nullcontext(self.link)


def node_of(site: Site, link: Link) -> Any:
    """What `place` needs of a node: ash, with birch's inbox."""
    layout = Layout(site.root)
    layout.make()
    node = SimpleNamespace(
        layout=layout,
        intake=SimpleNamespace(homes=site.homes),
        known_schema=lambda: site.schema,
        asking=None,
        alarms=Alarms(),
        server=None,
        set_back=SimpleNamespace(listed=frozenset),
    )
    node.asking = Near(node, link)
    return node


def offer_of(site: Site, *digests: str) -> Offer:
    return Offer(
        federation=site.members.federation.digest, peer=CEDAR, asker="ash", nonce="0" * 16, recovering=False,
        round=ROUND, phase="collect", twice=False, manifests=[], files=sorted(digests),
    )  # fmt: skip


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

    node = node_of(site, Link(data, between=scan))
    (site.homes / BIRCH / RECEIPTS / str(manifest.file_name().of(Kind.RECEIPT))).write_text("of before the loss")
    monkeypatch.setattr(durable, "disk", Scanning(scan))
    offers = {CEDAR: offer_of(site, manifest.sha256)}
    assert asyncio.run(place(node, manifest, site.sign(manifest), offers))
    assert len(scans) > 12 and not [item for item in found if isinstance(item, Refusal)]
    (arrival,) = site.scan()
    assert isinstance(arrival, Arrival) and arrival.manifest == manifest
    assert arrival.data is not None and arrival.data.read_bytes() == data
    left = [p for f in (PARTS, RECEIPTS) for p in (site.homes / BIRCH / f).iterdir()]
    assert not left and not [p for p in node.layout.fetched.rglob("*") if p.is_file()]


def test_a_delivery_that_comes_while_the_same_checkpoint_is_fetched_is_taken(site: Site) -> None:
    data = site.good_data()
    manifest, found = site.manifest(data), list[Arrival | Refusal]()

    def deliver_once() -> None:
        if not found:
            site.deliver(data, manifest)
            found.extend(site.scan())

    node = node_of(site, Link(data, between=deliver_once))
    assert asyncio.run(place(node, manifest, site.sign(manifest), {CEDAR: offer_of(site, manifest.sha256)}))
    found.extend(site.scan())
    assert [isinstance(item, Arrival) for item in found] == [True, True]
    assert {item.data.read_bytes() for item in found if isinstance(item, Arrival) and item.data} == {data}


def test_a_statement_is_placed_alone_and_what_nobody_has_is_not(site: Site) -> None:
    data = site.good_data()
    node, manifest = node_of(site, Link(data)), site.manifest(data)
    assert not asyncio.run(place(node, manifest, site.sign(manifest), {CEDAR: offer_of(site)}))
    assert site.scan() == [] and not list(site.inbox.iterdir())
    statement = site.manifest(b"", sha256="b" * 64, halted=True)
    assert asyncio.run(place(node, statement, site.sign(statement), {}))
    (arrival,) = site.scan()
    assert isinstance(arrival, Arrival) and arrival.manifest == statement


# ---------------------------------------------------------------- lines that break

DATA = bytes(range(256)) * 20  # 5120 bytes: 6 blocks
SHA = Digest(hashlib.sha256(DATA).hexdigest())


def fetch(root: Path, link: Link, giver: str = "cedar", sha256: Digest = SHA) -> Path:
    asyncio.run(fetch_file(link, sha256, len(DATA), root / "fetched" / giver, root / "here" / "file"))  # type: ignore[arg-type]
    return root / "here" / "file"


def parts(root: Path) -> dict[str, int]:
    return {f"{p.parent.name}/{p.name[:4]}": p.stat().st_size for p in root.glob("fetched/*/*")}


def test_a_fetch_goes_on_where_the_line_broke(tmp_path: Path) -> None:
    with pytest.raises(TransportError):
        fetch(tmp_path, Link(DATA, breaks=4))
    assert parts(tmp_path) == {f"cedar/{SHA[:4]}": 4 * BLOCK} and not list((tmp_path / "here").iterdir())
    again = Link(DATA)
    assert fetch(tmp_path, again).read_bytes() == DATA
    assert again.asked == [4 * BLOCK, 5 * BLOCK] and parts(tmp_path) == {}


def test_threat_13_what_one_peer_began_with_rubbish_no_other_peer_has_to_complete(tmp_path: Path) -> None:
    with pytest.raises(TransportError):
        fetch(tmp_path, Link(bytes(len(DATA)), breaks=2), giver="birch")
    assert fetch(tmp_path, Link(DATA), giver="cedar").read_bytes() == DATA
    with pytest.raises(PeerDataError):
        fetch(tmp_path, Link(bytes(len(DATA))), giver="birch")
    assert parts(tmp_path) == {}, "rubbish is not gone on with"
    assert fetch(tmp_path, Link(DATA), giver="birch").read_bytes() == DATA


def test_threat_03_a_giver_that_always_breaks_off_fills_the_disk_with_one_file_at_most(tmp_path: Path) -> None:
    for number in range(5):
        with pytest.raises(TransportError):
            fetch(tmp_path, Link(DATA, breaks=5), sha256=Digest(f"{number:064x}"))
        assert len(parts(tmp_path)) == 1


@pytest.mark.parametrize(("operation", "code"), [("write", errno.ENOSPC), ("fsync", errno.EIO), ("rename", errno.EIO)])
def test_threat_23_what_the_disk_may_not_have_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, code: int
) -> None:
    """A full disk gets its room back; after a failed fsync the bytes that can be read may never have reached it."""
    disk = FaultyDisk(operation, 1, code)
    monkeypatch.setattr(durable, "disk", disk)
    with pytest.raises((OSError, durable.DiskFailed)):
        fetch(tmp_path, Link(DATA))
    assert disk.fired and parts(tmp_path) == {} and not list((tmp_path / "here").iterdir())


# ---------------------------------------------------------------- slow givers, and wrong ones


class Giver:
    """A peer that gives what is in `files`; after `stalls` blocks of a connection it hangs."""

    def __init__(self, stalls: int | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.documents: dict[str, bytes] = {}  # in one read
        self.stalls, self.turns, self.given = stalls, 0, 0

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Giver]:
        self.turns, self.given = self.turns + 1, 0
        yield self

    async def read(self, path: str, offset: int, count: int) -> bytes:
        if self.given == self.stalls:
            await asyncio.Event().wait()
        self.given += 1
        name = path.rpartition("/")[2]
        return self.documents.get(name) or self.files[name][offset : offset + min(count, BLOCK)]


class Several(Asking):
    def __init__(self, node: Any, givers: Mapping[Peer, Giver]) -> None:
        super().__init__(node)
        self.givers = givers
        self.hurry: dict[Peer, float] = {}  # part of a turn that it really gets
        self.offers: dict[Peer, Offer] = {}

    def connected(self, peer: Peer, patience: Any = None) -> Any:
        return self.givers[peer].connected()

    async def offer_of(self, peer: Peer, patience: Any = None) -> Offer:
        return self.offers[peer]

    def _turn_s(self, giver: Peer, size: int) -> float:
        return super()._turn_s(giver, size) * self.hurry.get(giver, 1.0)


def asking_of(site: Site, birch: Giver, cedar: Giver) -> tuple[Several, list[bytes]]:
    """Both list two files, which both have. A turn is long for who does not stall."""
    node = node_of(site, Link(b""))
    node.alarms = Alarms()
    files = [site.good_data(), site.good_data(2.0)]
    for giver in (birch, cedar):
        giver.files |= {hashlib.sha256(data).hexdigest(): data for data in files}
    return Several(node, {BIRCH: birch, CEDAR: cedar}), files


async def got(asks: Several, site: Site, data: bytes, *givers: Peer, **how: Any) -> bytes:
    """The file that is fetched; a giver that hangs for ever is given up after a while by the test, too."""
    sha256 = Digest(hashlib.sha256(data).hexdigest())
    target = site.root / "here" / sha256[:8]
    async with asyncio.timeout(60):
        assert await asks.get(sha256, target, {p: offer_by(site, p, sha256) for p in givers or (BIRCH, CEDAR)}, **how)
    return target.read_bytes()


def offer_by(site: Site, peer: Peer, *digests: str) -> Offer:
    return offer_of(site, *digests).model_copy(update={"peer": peer})


def test_threat_05_from_a_giver_that_drips_it_goes_on_to_the_next_who_is_asked_first_from_then_on(site: Site) -> None:
    async def story() -> None:
        birch, cedar = Giver(stalls=1), Giver()
        asks, files = asking_of(site, birch, cedar)
        asks.hurry = {BIRCH: 0.001}
        assert await got(asks, site, files[0]) == files[0]
        assert (birch.turns, cedar.turns) == (1, 1)
        assert await got(asks, site, files[1]) == files[1]
        assert (birch.turns, cedar.turns) == (1, 2), "birch is not waited for again"

    asyncio.run(story())


def test_threat_18_whose_bytes_are_wrong_is_named_and_asked_last_from_then_on(site: Site) -> None:
    async def story() -> None:
        birch, cedar = Giver(), Giver()
        asks, files = asking_of(site, birch, cedar)
        birch.files = {name: data[:-1] + bytes([data[-1] ^ 1]) for name, data in birch.files.items()}
        assert await got(asks, site, files[0]) == files[0]
        assert [a["code"] for a in asks._node.alarms.listing()] == ["wrong bytes birch"]
        assert await got(asks, site, files[1]) == files[1]
        assert (birch.turns, cedar.turns) == (1, 2)

    asyncio.run(story())


def test_threat_23_what_the_own_disk_spoilt_of_a_fetch_is_fetched_again_and_its_giver_not_blamed(site: Site) -> None:
    async def story() -> None:
        asks, files = asking_of(site, Giver(), Giver())
        sha256 = hashlib.sha256(files[0]).hexdigest()
        part = asks._node.layout.fetched / CEDAR / sha256
        part.parent.mkdir(parents=True)
        for content in (b"x" * BLOCK, b"x" * len(files[0])):
            part.write_bytes(content)
            assert await got(asks, site, files[0], CEDAR) == files[0]
            assert not asks._node.alarms.listing() and not part.exists()
            (site.root / "here" / sha256[:8]).unlink()

    asyncio.run(story())


def test_threat_18_who_gives_what_it_lists_or_after_another_round_is_asked_like_the_others(site: Site) -> None:
    async def story() -> None:
        asks, files = asking_of(site, birch := Giver(), Giver())
        right = dict(birch.files)
        birch.files = {name: b"rubbish" for name in right}
        assert await got(asks, site, files[0]) == files[0]
        assert asks._node.alarms.listing()
        birch.files = right
        assert await got(asks, site, files[1], BIRCH) == files[1]
        assert not asks._node.alarms.listing() and asks._last(BIRCH) == (False, 0, BIRCH)
        asks._slow[BIRCH] = 1000
        assert asks._turn_s(BIRCH, 0) == 2**links.DOUBLED_MAX * links.FAIR_S, "and not for days"
        asks._node.others = (BIRCH, CEDAR)
        asks.forget()
        assert asks._last(BIRCH) == (False, 0, BIRCH)

    asyncio.run(story())


def test_threat_25_a_slow_line_that_is_the_only_one_is_not_cut(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        asks, files = asking_of(site, Giver(), Giver())
        monkeypatch.setattr(links, "FAIR_S", -1e9)  # any turn is over before it begins
        assert await got(asks, site, files[0], CEDAR) == files[0]

    asyncio.run(story())


def test_threat_25_two_slow_lines_have_turns_until_one_has_given_all_of_it(site: Site) -> None:
    """Neither gives the whole file in one turn: it is there because what a turn brought is kept."""

    async def story() -> None:
        birch, cedar = Giver(), Giver()
        asks, files = asking_of(site, birch, cedar)
        asks.hurry = {BIRCH: 0.001, CEDAR: 0.001}
        birch.stalls = cedar.stalls = len(files[0]) // BLOCK // 2
        assert await got(asks, site, files[0]) == files[0]
        assert birch.turns > 1 and len(files[0]) > BLOCK * (birch.stalls or 0) > 0

    asyncio.run(story())


def test_threat_25_a_turn_ends_also_where_another_may_have_the_file_later(site: Site) -> None:
    async def story() -> None:
        asks, files = asking_of(site, Giver(), Giver(stalls=1))
        asks.hurry = {CEDAR: 0.001}
        assert len(files[0]) > BLOCK
        with pytest.raises(TransportError, match="took longer"):
            await got(asks, site, files[0], CEDAR, patient=False)
        asks.givers[CEDAR].stalls = None
        assert await got(asks, site, files[0], CEDAR) == files[0]

    asyncio.run(story())


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
        birch.stalls, asks.hurry = 1, {BIRCH: 0.001}
        node: Any = asks._node
        state = replace(START, phase=Phase.COLLECT, round=ROUND, have={ASH: checkpoint(ASH), CEDAR: checkpoint(CEDAR)})
        node.asking, node.others, node.server = asks, (BIRCH, CEDAR), None
        node.federation, node.keyring = site.members.federation, Keyring.of(site.members.federation)
        node.known_state, node.intake.wake = lambda: state, lambda peer: None
        watch = fetch_missing.Missing(node)
        watch._lost = (BIRCH,)
        async with asyncio.timeout(60):
            await watch._ask([BIRCH, CEDAR])
        arrival = site.scan()[0]
        assert isinstance(arrival, Arrival) and arrival.manifest == manifest
        assert "lost birch" in node.alarms, "its manifest was shown"

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
        node: Any = asks._node
        state = replace(START, phase=Phase.COLLECT, round=ROUND, have={ASH: checkpoint(ASH), CEDAR: checkpoint(CEDAR)})
        node.asking, node.others, node.server = asks, (BIRCH, CEDAR), None
        node.federation, node.keyring = site.members.federation, Keyring.of(site.members.federation)
        node.known_state, node.intake.wake = lambda: state, lambda peer: None
        watch = fetch_missing.Missing(node)
        watch._lost = (BIRCH,)
        await watch._fetch(CEDAR, {CEDAR: offer})
        (placed,) = site.inbox.iterdir()
        assert listed[0].sha256 in placed.name
        assert len([p for p in node.layout.claimed.rglob("*") if p.is_file()]) == 1

    asyncio.run(story())


# ---------------------------------------------------------------- what lies where it is fetched to


async def cleared(node: Any, monkeypatch: pytest.MonkeyPatch, until: Callable[[], bool]) -> None:
    """The watch of a node that lacks nothing, until it has come so far."""
    monkeypatch.setattr(fetch_missing, "LOOK_S", 0.0)
    node.others, node.keyring = (), None
    node.known_state = lambda: replace(START, phase=Phase.COLLECT, round=ROUND)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        watch = group.create_task(fetch_missing.Missing(node).watch())
        while not until():
            assert not watch.done()
            await asyncio.sleep(0)
        watch.cancel()


def test_whatever_lies_among_what_was_half_fetched_goes_and_nothing_beyond_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, a link to a folder, a link to nowhere, a pipe, a folder in a folder; it ended the daemon."""
    node = node_of(site, Link(b""))
    fetched, elsewhere = node.layout.fetched, site.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (fetched / "cedar" / "deeper").mkdir(parents=True)
    (fetched / "README").write_text("put here by hand")
    (fetched / "link").symlink_to(elsewhere)
    (fetched / "broken").symlink_to("nowhere")
    os.mkfifo(fetched / "pipe")
    asyncio.run(cleared(node, monkeypatch, lambda: not any(fetched.iterdir())))
    assert (elsewhere / "kept").exists() and not node.alarms.listing()


def test_what_cannot_be_removed_is_named_and_removed_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that somebody has made immutable, say; what can be removed is."""
    node, tries = node_of(site, Link(b"")), []
    stuck, unlink = node.layout.fetched / "stuck", Path.unlink
    stuck.touch()
    (node.layout.fetched / "other").touch()

    def held(path: Path, *args: Any) -> None:
        if path == stuck and len(tries) < 3:
            tries.append(path)
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        unlink(path, *args)

    monkeypatch.setattr(Path, "unlink", held)
    told: list[str] = []
    sound = node.alarms.sound
    monkeypatch.setattr(node.alarms, "sound", lambda code, text, fix: (told.append(text), sound(code, text, fix)))
    asyncio.run(cleared(node, monkeypatch, lambda: not stuck.exists() and not node.alarms.listing()))
    assert told == [f"{stuck} cannot be removed: Operation not permitted"] * 3
    assert not any(node.layout.fetched.iterdir())


# ---------------------------------------------------------------- whom to ask, and when

ASKED_AT = 1000.0


def turns_of(*, reached: bool, times: int = 9) -> Turns:
    """birch has been asked so often that it is left alone for 600 s; last at ASKED_AT."""
    turns = Turns((4.0, 600.0), 5.0)
    turns.ask(BIRCH, 0.0)
    for _ in range(times):
        turns.begin(BIRCH)
        turns.asked(BIRCH, ASKED_AT, reached=reached)
    return turns


def next_turn(turns: Turns) -> float:
    low, high = 0.0, 10_000.0
    while high - low > 0.5:
        middle = (low + high) / 2
        low, high = (low, middle) if turns.due(middle) else (middle, high)
    return round(high)


def test_pauses_double_up_to_the_longest() -> None:
    seen = [next_turn(turns_of(reached=True, times=n)) - ASKED_AT for n in range(1, 10)]
    assert seen == [4, 8, 16, 32, 64, 128, 256, 512, 600]


def test_a_peer_that_was_down_is_asked_soon_after_it_connects_however_long_it_was_away() -> None:
    turns = turns_of(reached=False)
    assert next_turn(turns) == ASKED_AT + 600
    turns.connected(BIRCH, ASKED_AT + 100)
    assert next_turn(turns) == ASKED_AT + 105


def test_a_peer_that_connects_while_it_is_asked_in_vain_is_asked_soon() -> None:
    turns = turns_of(reached=False)
    turns.begin(BIRCH)
    turns.connected(BIRCH, 2000.0)
    turns.asked(BIRCH, 2030.0, reached=False)
    assert next_turn(turns) == 2035


def test_a_peer_that_answers_and_connects_again_and_again_is_not_asked_more_often() -> None:
    turns = turns_of(reached=True)
    for second in range(500):
        turns.connected(BIRCH, ASKED_AT + second)
    assert next_turn(turns) == ASKED_AT + 600


def test_who_is_not_to_be_asked_is_forgotten() -> None:
    turns = turns_of(reached=False)
    turns.keep(())
    turns.connected(BIRCH, 2000.0)
    assert BIRCH not in turns and turns.due(10_000.0) == []
    turns.ask(BIRCH, 3000.0)
    turns.asked(BIRCH, 3000.0, reached=True)
    assert next_turn(turns) == 3004, "pauses begin anew"


# ---------------------------------------------------------------- what is lost


def test_an_arrival_ends_the_alarm_at_once_and_who_has_fused_since_is_asked_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ash lacks cedar's checkpoint, which birch has fused. The intake says so after each arrival."""
    monkeypatch.setattr(fetch_missing, "PATIENCE_S", 0.0)
    state = replace(START, phase=Phase.COLLECT, round=1, have={ASH: checkpoint(ASH), BIRCH: checkpoint(BIRCH)})
    node: Any = SimpleNamespace(
        others=(BIRCH, CEDAR), alarms=Alarms(), server=None, known_state=lambda: state,
        keyring=SimpleNamespace(is_revoked=lambda peer: False), set_back=SimpleNamespace(listed=frozenset),
    )  # fmt: skip
    watch = fetch_missing.Missing(node)
    watch.look()
    assert node.alarms.listing() == [], "nobody has fused it: it comes by itself"

    state = replace(state, early={BIRCH: checkpoint(BIRCH, 2)})
    watch.look()
    assert node.alarms.listing() == [], "birch says so; nobody has shown it"
    now = time.monotonic()
    assert watch._turns.due(now) == [BIRCH, CEDAR]
    for giver in node.others:
        watch._turns.asked(giver, now, reached=True)
    watch.look()
    assert watch._turns.due(now + 1) == [], "nothing is new"

    state = replace(state, early={**state.early, CEDAR: checkpoint(CEDAR, 2)})
    watch.look()
    assert watch._turns.due(time.monotonic()) == [CEDAR]
    assert "lost cedar" in node.alarms, "cedar is in the next round, so it has our receipt"

    state = replace(state, have={**state.have, CEDAR: checkpoint(CEDAR)})
    watch.look()
    assert node.alarms.listing() == [] and watch._turns.due(now + 10_000) == []


def test_threat_09_who_says_that_it_fused_other_manifests_than_those_here_gives_no_alarm_about_an_honest_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cedar claims the next round in the midst of this one; birch trains. Nobody is asked, nothing is said of birch."""
    monkeypatch.setattr(fetch_missing, "PATIENCE_S", 0.0)
    invented: dict[Peer, Digest] = dict.fromkeys((ASH, BIRCH, CEDAR), Digest("f" * 64))
    state = replace(START, phase=Phase.COLLECT, round=1, have={p: checkpoint(p) for p in (ASH, CEDAR)})
    state = replace(state, early={CEDAR: checkpoint(CEDAR, 2, inputs=invented)})
    node: Any = SimpleNamespace(
        others=(BIRCH, CEDAR), alarms=Alarms(), server=None, known_state=lambda: state,
        keyring=SimpleNamespace(is_revoked=lambda peer: False), set_back=SimpleNamespace(listed=frozenset),
    )  # fmt: skip
    watch = fetch_missing.Missing(node)
    watch.look()
    assert node.alarms.listing() == [] and watch._turns.due(time.monotonic() + 10_000) == []

    right = {**invented, **{p: claim.manifest for p, claim in state.have.items()}}
    state = replace(state, early={CEDAR: checkpoint(CEDAR, 2, inputs=right)})
    watch.look()
    assert watch._turns.due(time.monotonic()) == [BIRCH, CEDAR] and node.alarms.listing() == [], "asked for, not told"


# ---------------------------------------------------------------- what is on its way


class Inbox:
    """ash's, into which cedar writes; ash lacks cedar's checkpoint of round 1, which birch has fused."""

    def __init__(self) -> None:
        self.now, self.parts = 1000.0, list[Incoming]()
        self.state = replace(
            START, phase=Phase.COLLECT, round=1, have={p: checkpoint(p) for p in (ASH, BIRCH)},
            early={BIRCH: checkpoint(BIRCH, 2)},
        )  # fmt: skip
        node: Any = SimpleNamespace(
            others=(BIRCH, CEDAR), alarms=Alarms(), known_state=lambda: self.state, server=self,
            keyring=SimpleNamespace(is_revoked=lambda peer: False), set_back=SimpleNamespace(listed=frozenset),
        )  # fmt: skip
        self.missing = fetch_missing.Missing(node, clock=lambda: self.now)

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
