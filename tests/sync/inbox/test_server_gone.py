"""What a peer has written here and something else takes away is noticed here, not only by its sender."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from asyncssh.sftp import SFTPNoSuchFile
from boxes import BIRCH, DATA, DATA_BYTES, Box, inbox, on_loop, put

from hsl_node.federation.names import Peer, Round


def watched(box: Box) -> list[tuple[Peer, int]]:
    gone: list[tuple[Peer, int]] = []
    box.server.home(BIRCH).on_gone = lambda peer, count: gone.append((peer, count))
    return gone


@on_loop
async def test_a_part_that_vanishes_is_noticed_when_its_sender_looks_or_renames(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        gone, part = watched(box), f"parts/{box.name().as_part()}"
        for look in (client.stat(part), client.rename(part, f"inbox/{box.name()}")):
            async with client.open(part, "xb") as file:
                await file.write(DATA[:100])
            (box.homes / BIRCH / part).unlink()
            with pytest.raises(SFTPNoSuchFile):
                await look
        assert gone == [(BIRCH, 100), (BIRCH, 100)]


@on_loop
async def test_what_the_sender_removes_or_delivers_is_not_gone(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        gone, part = watched(box), f"parts/{box.name().as_part()}"
        with pytest.raises(SFTPNoSuchFile):
            await client.stat(part)  # nothing was ever there
        async with client.open(part, "xb") as file:
            await file.write(DATA[:100])
        await client.remove(part)
        with pytest.raises(SFTPNoSuchFile):
            await client.stat(part)
        await put(client, box.name(), DATA)
        with pytest.raises(SFTPNoSuchFile):
            await client.stat(part)
        assert gone == []


@on_loop
async def test_a_checkpoint_that_came_and_is_nowhere_when_its_manifest_is_read_is_gone(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        gone, home = watched(box), box.server.home(BIRCH)
        home.misses(box.name())
        assert gone == [], "a manifest alone: its sender never brought the data"
        await put(client, box.name(), DATA)
        home.misses(box.name())
        home.misses(box.name())
        assert gone == [(BIRCH, DATA_BYTES)], "told once"


@on_loop
async def test_what_came_in_earlier_rounds_is_not_remembered_for_ever(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        home, first = box.server.home(BIRCH), box.name()
        for round in range(1, 6):
            name = replace(first, round=Round(round))
            await put(client, name, DATA)
            (box.homes / BIRCH / "inbox" / str(name)).unlink()  # taken in
        assert {name.round for name in home._brought} == {4, 5}
