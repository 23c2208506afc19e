"""Fetching one file: over lines that break, from givers that are slow, and from wrong ones."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
from pathlib import Path

import pytest
from faulty_disk import FaultyDisk
from givers import BLOCK, DATA, SHA, Giver, Link, asking_of, got
from inbox_site import BIRCH, CEDAR, Site

from hsl_node.errors import PeerDataError, TransportError
from hsl_node.federation.names import Digest, Peer
from hsl_node.host import durable
from hsl_node.node.peers.fetch import HeldUp, Slow
from hsl_node.sync.ask import fetch_file


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


def test_threat_05_from_a_giver_that_drips_it_goes_on_to_the_next_who_is_asked_first_from_then_on(site: Site) -> None:
    async def story() -> None:
        birch, cedar = Giver(stalls=1), Giver()
        asks, files = asking_of(site, birch, cedar)
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
        assert [a["code"] for a in asks.alarms.listing()] == ["wrong bytes birch"]
        assert await got(asks, site, files[1]) == files[1]
        assert (birch.turns, cedar.turns) == (1, 2)

    asyncio.run(story())


def test_threat_23_what_the_own_disk_spoilt_of_a_fetch_is_fetched_again_and_its_giver_not_blamed(site: Site) -> None:
    async def story() -> None:
        asks, files = asking_of(site, Giver(), Giver())
        sha256 = hashlib.sha256(files[0]).hexdigest()
        part = asks.here.layout.fetched / CEDAR / sha256
        part.parent.mkdir(parents=True)
        for content in (b"x" * BLOCK, b"x" * len(files[0])):
            part.write_bytes(content)
            assert await got(asks, site, files[0], CEDAR) == files[0]
            assert not asks.alarms.listing() and not part.exists()
            (site.root / "here" / sha256[:8]).unlink()

    asyncio.run(story())


def test_threat_18_who_gives_what_it_lists_or_after_another_round_is_asked_like_the_others(site: Site) -> None:
    async def story() -> None:
        asks, files = asking_of(site, birch := Giver(), Giver())
        right = dict(birch.files)
        birch.files = {name: b"rubbish" for name in right}
        assert await got(asks, site, files[0]) == files[0]
        assert asks.alarms.listing()
        birch.files = right
        assert await got(asks, site, files[1], BIRCH) == files[1]
        assert not asks.alarms.listing()
        birch.files = {name: b"rubbish" for name in right}
        for file in (site.root / "here").iterdir():
            file.unlink()
        assert await got(asks, site, files[1]) == files[1] and asks._last == {BIRCH}
        asks.forget()
        assert not asks._last

    asyncio.run(story())


@pytest.mark.parametrize("givers", [(CEDAR,), (BIRCH, CEDAR)], ids=["one", "two"])
def test_threat_25_slow_lines_have_turns_until_one_has_given_all_of_it(site: Site, givers: tuple[Peer, ...]) -> None:
    """None gives the whole file in one turn: it is there because what a turn brought is kept."""

    async def story() -> None:
        birch, cedar = Giver(), Giver()
        asks, files = asking_of(site, birch, cedar)
        birch.stalls = cedar.stalls = len(files[0]) // BLOCK // 2
        assert len(files[0]) > BLOCK * (birch.stalls or 0) > 0
        with pytest.raises(Slow, match="took longer than 1 s"):
            await got(asks, site, files[0], *givers)
        with contextlib.suppress(Slow):
            await got(asks, site, files[0], *givers)
        assert await got(asks, site, files[0], *givers) == files[0]
        assert cedar.turns >= 2 and birch.turns >= 2 * (len(givers) - 1)

    asyncio.run(story())


def test_threat_25_whose_line_broke_is_named_though_another_one_is_only_slow(site: Site) -> None:
    async def story() -> None:
        asks, files = asking_of(site, Giver(stalls=1), Giver(stalls=1))
        asks.givers[BIRCH].breaks = True
        for broken, slow in ((BIRCH, CEDAR), (CEDAR, BIRCH)):
            asks.givers[broken].breaks, asks.givers[slow].breaks = True, False
            with pytest.raises(HeldUp, match="the link broke while it gave") as held_up:
                await got(asks, site, files[0])
            assert held_up.value.peer == broken

    asyncio.run(story())
