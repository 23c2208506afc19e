"""The embedded inbox on any other day: deliveries, resumed transfers, full and slow disks."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from asyncssh.sftp import SFTPError
from boxes import BIRCH, CEDAR, DATA, DATA_BYTES, SHA, inbox, on_loop, put
from faulty_disk import FaultyDisk

from hsl_node.errors import LocalStateError
from hsl_node.federation.names import Kind
from hsl_node.host import durable

# ---------------------------------------------------------------- the honest way


@on_loop
async def test_a_delivery_is_announced(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box:
        await box.honest()
        assert box.connects == [CEDAR]
        assert not box.counted.rejected and not box.counted.auth_failures


@on_loop
async def test_data_alone_is_not_announced_but_data_after_its_manifest_is(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        await put(client, box.name(), DATA)
        assert box.commits == []
        late = box.name(round=2)
        await put(client, late.of(Kind.MANIFEST), b"signed")
        await put(client, late, DATA)
        assert box.commits == [BIRCH, BIRCH]


@on_loop
async def test_a_transfer_resumed_over_three_connections_arrives_whole(tmp_path: Path) -> None:
    """A sender goes a few blocks back; equal bytes written again change nothing."""
    async with inbox(tmp_path) as box:
        part = f"parts/{box.name().as_part()}"
        for start, end, mode in ((0, 200_000, "xb"), (150_000, 400_001, "r+b"), (400_001, DATA_BYTES, "r+b")):
            async with box.sftp() as client:
                if start:
                    assert (await client.stat(part)).size >= start
                    async with client.open(part, "rb") as file:  # the prefix check of a careful sender
                        assert await file.read(1000, 1000) == DATA[1000:2000]
                async with client.open(part, mode) as file:
                    await file.write(DATA[start:end], start)
        async with box.sftp() as client:
            await client.rename(part, f"inbox/{box.name()}")
        assert box.delivered() == SHA


@on_loop
async def test_a_transfer_resumed_after_a_restart_of_the_receiver_arrives_whole(tmp_path: Path) -> None:
    part = ""
    async with inbox(tmp_path) as box, box.sftp() as client:
        part = f"parts/{box.name().as_part()}"
        async with client.open(part, "xb") as file:
            await file.write(DATA[:300_000])
    async with inbox(tmp_path) as box, box.sftp() as client:
        async with client.open(part, "r+b") as file:
            await file.write(DATA[290_000:], 290_000)
        await client.rename(part, f"inbox/{box.name()}")
        assert box.delivered() == SHA


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([(300_000, DATA_BYTES), (0, 300_000)], id="second half first"),
        pytest.param([(0, 1000), (0, DATA_BYTES)], id="from the start again"),
        pytest.param([(0, DATA_BYTES), (5, 6)], id="one byte once more"),
        pytest.param([(0, DATA_BYTES - 1), (DATA_BYTES - 1, DATA_BYTES)], id="two pieces"),
    ],
)
@on_loop
async def test_in_whatever_order_the_pieces_come_all_of_them_arrive(
    tmp_path: Path, pieces: list[tuple[int, int]]
) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        part = f"parts/{box.name().as_part()}"
        async with client.open(part, "xb") as file:
            for start, end in pieces:
                await file.write(DATA[start:end], start)
        await client.rename(part, f"inbox/{box.name()}")
        assert (tmp_path / "homes/birch/inbox" / str(box.name())).read_bytes() == DATA


@on_loop
async def test_threat_13_a_file_with_a_hole_is_another_file(tmp_path: Path) -> None:
    """The hole reads as zeros, and the sha256 of what is claimed decides."""
    async with inbox(tmp_path) as box, box.sftp() as client:
        part = f"parts/{box.name().as_part()}"
        async with client.open(part, "xb") as file:
            await file.write(DATA[300_000:], 300_000)
        await client.rename(part, f"inbox/{box.name()}")
        assert box.delivered() == hashlib.sha256(bytes(300_000) + DATA[300_000:]).hexdigest() != SHA


@on_loop
async def test_threat_13_what_was_written_last_is_what_is_delivered(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        part = f"parts/{box.name().as_part()}"
        async with client.open(part, "xb") as file:
            await file.write(DATA)
            await file.write(b"other", 70_000)
        await client.rename(part, f"inbox/{box.name()}")
        assert box.delivered() == hashlib.sha256(DATA[:70_000] + b"other" + DATA[70_005:]).hexdigest() != SHA


@on_loop
async def test_a_newer_connection_takes_the_part_over(tmp_path: Path) -> None:
    """After a broken link the old connection may live on for a minute; its late packets must not write."""
    async with inbox(tmp_path) as box, box.sftp() as old, box.sftp() as new:
        part = f"parts/{box.name().as_part()}"
        stale = await old.open(part, "xb")
        await stale.write(DATA[:1000])
        async with new.open(part, "r+b") as file:
            await file.write(DATA[1000:], 1000)
            with pytest.raises(SFTPError):
                await stale.write(b"late", 0)
        await new.rename(part, f"inbox/{box.name()}")
        with pytest.raises(SFTPError):
            await stale.write(b"later", 0)
        assert box.delivered() == SHA


@on_loop
async def test_status_shows_what_arrives(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        async with client.open(f"parts/{box.name().as_part()}", "xb") as file:
            await file.write(DATA[:1234])
            (incoming,) = box.server.incoming(1)
            assert (incoming.bytes, incoming.total, incoming.name) == (1234, DATA_BYTES, box.name().as_part())
            assert incoming.rate_bytes_per_s > 0
            assert box.server.incoming(2) == []
        assert box.server.incoming(1) == []


@on_loop
async def test_a_manifest_that_is_held_open_is_no_checkpoint_that_arrives(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        part = f"parts/{box.name(kind=Kind.MANIFEST).as_part()}"
        await (await client.open(part, "xb")).write(b"x")
        assert len(box.server.home(BIRCH).writing()) == 1 and box.server.incoming(1) == []


@on_loop
async def test_receipts_are_read_but_not_written(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        path = f"receipts/{box.name(kind=Kind.RECEIPT)}"
        (tmp_path / "homes/birch" / path).write_bytes(b"a receipt")
        async with client.open(path, "rb") as file:
            assert await file.read() == b"a receipt"
        assert (await client.stat(path)).size == 9
        for attack in (client.open(path, "r+b"), client.open(path, "wb"), client.remove(path)):
            with pytest.raises(SFTPError):
                await attack
        assert (tmp_path / "homes/birch" / path).read_bytes() == b"a receipt"


# ---------------------------------------------------------------- disks


@on_loop
async def test_threat_23_a_failed_fsync_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    fatal: list[LocalStateError] = []
    monkeypatch.setattr(durable, "on_failure", fatal.append)
    async with inbox(tmp_path) as box, box.sftp() as client:
        async with client.open(f"parts/{box.name().as_part()}", "xb") as file:
            await file.write(DATA[:1000])
            monkeypatch.setattr("hsl_node.sync.inbox.home.os.fsync", broken)
            with pytest.raises(SFTPError):
                await file.fsync()
        (error,) = fatal
        assert error.exit_code == 15


@on_loop
async def test_threat_23_a_disk_that_fails_in_a_commit_ends_the_process_and_is_called_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fatal: list[LocalStateError] = []
    monkeypatch.setattr(durable, "on_failure", fatal.append)
    async with inbox(tmp_path) as box, box.sftp() as client:
        disk = FaultyDisk("rename", 1, errno.EIO)
        monkeypatch.setattr(durable, "disk", disk)
        with pytest.raises(SFTPError):
            await put(client, box.name(), DATA)
        assert disk.fired
        (error,) = fatal
        assert error.exit_code == 15
        assert "disk failed" in caplog.text and "bug in the inbox" not in caplog.text


@on_loop
async def test_threat_21_a_full_disk_is_reported_and_the_transfer_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, full = os.pwrite, [True]

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= 262_144 and full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:100_000], offset)  # and short writes, always

    monkeypatch.setattr("hsl_node.sync.inbox.part.os.pwrite", pwrite)
    async with inbox(tmp_path) as box, box.sftp() as client:
        part = f"parts/{box.name().as_part()}"
        with pytest.raises(SFTPError, match="No space"):
            async with client.open(part, "xb", block_size=131_072) as file:
                await file.write(DATA)
        with pytest.raises(SFTPError):
            await client.rename(part, f"inbox/{box.name()}")
        full[0] = False
        size = (await client.stat(part)).size or 0
        async with client.open(part, "r+b") as file:
            await file.write(DATA[size:], size)
        await client.rename(part, f"inbox/{box.name()}")
        assert (tmp_path / "homes/birch/inbox" / str(box.name())).read_bytes() == DATA


@on_loop
async def test_a_slow_disk_is_written_from_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsl_node.sync.inbox.home.SLOW_WRITE_S", -1.0)  # every write counts as slow
    async with inbox(tmp_path) as box, box.sftp() as client:
        async with client.open(f"parts/{box.name().as_part()}", "xb") as file:
            await file.write(DATA)
            assert all(f.slow for home in box.server._home.values() for f in home.writing())
        await client.rename(f"parts/{box.name().as_part()}", f"inbox/{box.name()}")
        assert box.delivered() == SHA
