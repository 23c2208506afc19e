"""Fetching one file: over lines that break, from givers that are slow, and from wrong ones."""

from __future__ import annotations

import asyncio
import errno
import hashlib
from pathlib import Path

import pytest
from faulty_disk import FaultyDisk
from givers import BLOCK, DATA, SHA, Giver, Link, asking_of, got
from inbox_site import BIRCH, CEDAR, Site

from hsl_node.errors import PeerDataError, TransportError
from hsl_node.federation.names import Digest
from hsl_node.host import durable
from hsl_node.node.peers import fetch as fetch_module
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
        assert [a["code"] for a in asks._alarms.listing()] == ["wrong bytes birch"]
        assert await got(asks, site, files[1]) == files[1]
        assert (birch.turns, cedar.turns) == (1, 2)

    asyncio.run(story())


def test_threat_23_what_the_own_disk_spoilt_of_a_fetch_is_fetched_again_and_its_giver_not_blamed(site: Site) -> None:
    async def story() -> None:
        asks, files = asking_of(site, Giver(), Giver())
        sha256 = hashlib.sha256(files[0]).hexdigest()
        part = asks._here.layout.fetched / CEDAR / sha256
        part.parent.mkdir(parents=True)
        for content in (b"x" * BLOCK, b"x" * len(files[0])):
            part.write_bytes(content)
            assert await got(asks, site, files[0], CEDAR) == files[0]
            assert not asks._alarms.listing() and not part.exists()
            (site.root / "here" / sha256[:8]).unlink()

    asyncio.run(story())


def test_threat_18_who_gives_what_it_lists_or_after_another_round_is_asked_like_the_others(site: Site) -> None:
    async def story() -> None:
        asks, files = asking_of(site, birch := Giver(), Giver())
        right = dict(birch.files)
        birch.files = {name: b"rubbish" for name in right}
        assert await got(asks, site, files[0]) == files[0]
        assert asks._alarms.listing()
        birch.files = right
        assert await got(asks, site, files[1], BIRCH) == files[1]
        assert not asks._alarms.listing() and asks._last(BIRCH) == (False, 0, BIRCH)
        asks._slow[BIRCH] = 1000
        assert asks._turn_s(BIRCH, 0) == fetch_module.LONGEST_TURN * fetch_module.FAIR_S, "and not for days"
        asks.forget()
        assert asks._last(BIRCH) == (False, 0, BIRCH)

    asyncio.run(story())


def test_threat_25_a_slow_line_that_is_the_only_one_is_not_cut(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        asks, files = asking_of(site, Giver(), Giver())
        monkeypatch.setattr(fetch_module, "FAIR_S", -1e9)  # any turn is over before it begins
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
