"""Floods, silence and garbage against the embedded inbox. The honest peer works after each attack."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from asyncssh.packet import Byte, String, UInt32, UInt64
from asyncssh.sftp import SFTPError, SFTPPermissionDenied
from boxes import BIRCH, CEDAR, DATA, DATA_BYTES, SHA, inbox, on_loop, put, until

from hsl_node.errors import LocalStateError
from hsl_node.federation.names import Kind
from hsl_node.host.log_limit import LOG_LINES_PER_MINUTE
from hsl_node.sync.inbox.link import UNSENT_MAX_BYTES


async def raw_sftp(connection: asyncssh.SSHClientConnection, **options: Any) -> Any:
    """(writer, reader) of an sftp session on which any bytes can be sent, after the version exchange."""
    writer, reader, _ = await connection.open_session(subsystem="sftp", encoding=None, **options)
    writer.write(packet(Byte(1) + UInt32(3)))
    await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
    return writer, reader


def packet(payload: bytes) -> bytes:
    return UInt32(len(payload)) + payload


@on_loop
async def test_threat_20_a_journal_that_cannot_be_read_does_not_turn_the_log_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(peer: str, name: str, twice: bool) -> bytes:
        raise LocalStateError("the journal cannot be read", remedy="check the disk")

    async with inbox(tmp_path) as box:
        box.admission.offer = unreadable
        async with box.sftp() as client:
            for _ in range(100):
                with pytest.raises(SFTPError):
                    await client.open(f"offer/{SHA}", "rb")
    told = [record for record in caplog.records if record.getMessage() == "disk failed"]
    assert 0 < len(told) <= LOG_LINES_PER_MINUTE
    assert {vars(record)["peer"] for record in told} == {BIRCH}


@on_loop
async def test_threat_04_copy_data_onto_itself_is_not_offered(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        assert not client.supports_remote_copy
        async with client.open(f"parts/{box.name().as_part()}", "x+b") as file:
            await file.write(DATA[:1000])
            handle = file._handle
            with pytest.raises(asyncssh.SFTPOpUnsupported):
                await client._handler._make_request(
                    b"copy-data", String(handle), UInt64(0), UInt64(0), String(handle), UInt64(1000)
                )
            assert (await file.stat()).size == 1000
        assert box.rejected("operation") == 1
        await box.honest()


@pytest.mark.parametrize(
    "request_type",
    [b"posix-rename@openssh.com", b"hardlink@openssh.com", b"lsetstat@openssh.com", b"statvfs@openssh.com",
     b"fstatvfs@openssh.com", b"ranges@asyncssh.com", b"unknown@example.org", 11, 14, 15, 19, 20, 21, 22, 99],
)  # fmt: skip
@on_loop
async def test_threat_04_requests_that_are_not_offered_reach_no_code(tmp_path: Path, request_type: bytes | int) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        with pytest.raises(asyncssh.SFTPOpUnsupported):
            await client._handler._make_request(request_type, String(b"parts"), String(b"inbox"))
        await box.honest()


@on_loop
async def test_threat_04_eight_handles_per_connection(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.connect() as connection:
        first, second = await connection.start_sftp_client(), await connection.start_sftp_client()
        files = [await first.open(f"parts/{box.name(sha256=f'{i:064x}').as_part()}", "xb") for i in range(5)]
        part = f"parts/{box.name(sha256=f'{0:064x}').as_part()}"
        files += [await second.open(part, "rb") for _ in range(3)]
        for client in (first, second):
            for mode in ("rb", "r+b"):
                with pytest.raises(SFTPError):
                    await client.open(part, mode)
        await files[-1].close()
        await second.open(part, "rb")
        assert box.rejected("handles") == 4
        await box.honest()


@on_loop
async def test_threat_04_failed_opens_use_no_handle_up(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.sftp() as client:
        for _ in range(20):
            with pytest.raises(asyncssh.SFTPNoSuchFile):
                await client.open(f"parts/{box.name().as_part()}", "rb")
        await put(client, box.name(), DATA)
        assert not box.rejected("handles")


@on_loop
async def test_threat_04_two_sessions_per_key(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.connect() as one, box.connect() as two:
        sessions = [await one.start_sftp_client(), await two.start_sftp_client()]
        for connection in (one, two) * 10:
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.start_sftp_client()
        await box.honest()
        sessions[0].exit()
        await sessions[0].wait_closed()
        await (await two.start_sftp_client()).stat("/")


@on_loop
async def test_threat_04_sessions_opened_and_closed_leave_nothing_behind(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.connect() as connection:
        (link,) = box.admission.links
        for _ in range(30):
            client = await connection.start_sftp_client()
            await client.stat("/")
            client.exit()
            await client.wait_closed()
            await until(lambda: link.sessions == 0)
        assert not link._filesystems and link.handles == 0


@on_loop
async def test_threat_04_a_third_connection_of_a_key_ends_its_first(tmp_path: Path) -> None:
    """The first is the one a broken network left behind; the newest is the one that is alive."""
    async with AsyncExitStack() as stack, inbox(tmp_path) as box:
        connections = [await stack.enter_async_context(box.connect()) for _ in range(6)]
        for dead in connections[:4]:
            await dead.wait_closed()
        assert not connections[-1].is_closed() and not connections[-2].is_closed()
        assert len(box.admission.links) == 2
        await box.honest()


@on_loop
async def test_threat_04_a_third_connection_does_not_end_the_one_that_is_at_work(tmp_path: Path) -> None:
    """A push of hours is the oldest; what the network has forgotten is the connection that was kept beside it."""
    async with inbox(tmp_path) as box, box.connect() as pushing:
        client = await pushing.start_sftp_client()
        async with box.connect() as forgotten:
            await client.stat("/")
            async with box.connect():
                await forgotten.wait_closed()
                await client.stat("/")


@on_loop
async def test_threat_04_unread_answers_do_not_fill_our_memory(tmp_path: Path) -> None:
    """birch asks for 64 MiB of reads and never takes an answer off the wire."""
    async with inbox(tmp_path) as box:
        async with box.sftp() as client, client.open(f"parts/{box.name().as_part()}", "xb") as file:
            await file.write(DATA)
        async with box.connect() as connection:
            writer, reader = await raw_sftp(connection, window=2**31 - 1)
            path = String(f"parts/{box.name().as_part()}".encode())
            writer.write(packet(Byte(3) + UInt32(1) + path + UInt32(1) + UInt32(0)))
            answer = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
            handle = answer[5:]
            connection._transport.pause_reading()
            for i in range(256):
                writer.write(packet(Byte(5) + UInt32(i) + handle + UInt64(0) + UInt32(2**18)))
            (link,) = box.admission.links
            sending = link.conn._transport
            # Its reading also pauses for a moment to give others their turn: what counts is that answers pile up.
            await until(lambda: not sending.is_reading() and sending.get_write_buffer_size() > 0)
            for _ in range(20):
                await asyncio.sleep(0.01)
                assert 0 < link.conn._transport.get_write_buffer_size() < UNSENT_MAX_BYTES + 2 * 2**18
            assert not link.conn._transport.is_reading()
            await box.honest()
            connection._transport.resume_reading()
            for _ in range(256):  # nothing was lost
                await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


@on_loop
async def test_threat_04_environment_variables_are_not_kept(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.connect() as connection:
        writer, *_ = await connection.open_session(
            subsystem="sftp", encoding=None, env={f"X{i}": "y" * 1000 for i in range(100)}
        )
        (link,) = box.admission.links
        assert all(not fs.channel.get_environment() for fs in link._filesystems) and link._filesystems
        writer.channel.send_signal("INT")
        writer.channel.change_terminal_size(1, 1)
        await box.honest()


@pytest.mark.parametrize(
    "garbage",
    [
        packet(Byte(3) + UInt32(1)), packet(Byte(6) + UInt32(1) + UInt32(2**31)), packet(Byte(200) + UInt32(7)),
        packet(b""), UInt32(2**32 - 1), UInt32(300 * 1024) + b"x" * 1000, packet(Byte(1) + UInt32(3)), b"\0" * 4096,
        packet(Byte(5) + UInt32(1) + String(b"none") + UInt64(0) + UInt32(9)),
        packet(Byte(4) + UInt32(1) + String(b"\0\0\0\7")),
    ],
    ids=range(10),
)  # fmt: skip
@on_loop
async def test_threat_04_garbage_in_a_session_disturbs_nobody(tmp_path: Path, garbage: bytes) -> None:
    async with inbox(tmp_path) as box, box.connect() as connection:
        writer, _ = await raw_sftp(connection)
        writer.write(garbage * 3)
        await box.honest()
        async with box.sftp() as client:
            await put(client, box.name(), DATA)


@pytest.mark.parametrize("length", [2**32 - 1, 300 * 1024])
@on_loop
async def test_threat_04_a_packet_too_large_to_be_honest_ends_its_session(tmp_path: Path, length: int) -> None:
    async with inbox(tmp_path) as box, box.connect() as connection:
        writer, reader = await raw_sftp(connection)
        writer.write(UInt32(length) + b"x")
        assert await reader.read() == b""  # the end, not an answer


@on_loop
async def test_threat_05_a_dripping_transfer_is_cut_and_can_be_resumed(tmp_path: Path) -> None:
    async with inbox(tmp_path, sweep_s=3600) as box:
        part = f"parts/{box.name().as_part()}"
        limits, now = box.admission.limits, time.monotonic()
        async with box.connect() as connection:
            client = await connection.start_sftp_client()
            file = await client.open(part, "xb")
            await file.write(DATA[:100])
            box.server.sweep(now)
            await file.write(DATA[100:200], 100)
            box.server.sweep(now + limits.progress_s - 1)
            assert not connection.is_closed()
            box.server.sweep(now + limits.progress_s + 1)
            await connection.wait_closed()
        async with box.sftp() as client:
            assert (await client.stat(part)).size == 200
            async with client.open(part, "r+b") as file:
                await file.write(DATA[200:], 200)
            await client.rename(part, f"inbox/{box.name()}")
        assert box.delivered() == SHA


@on_loop
async def test_threat_05_an_empty_write_at_the_end_finishes_nothing(tmp_path: Path) -> None:
    """It made a part of no bytes look complete, which owes no progress any more."""
    async with inbox(tmp_path, sweep_s=3600, idle_s=1e9) as box, box.connect() as connection:
        limits, now = box.admission.limits, time.monotonic()
        client = await connection.start_sftp_client()
        file = await client.open(f"parts/{box.name().as_part()}", "xb")
        await client._handler.write(file._handle, DATA_BYTES, b"")
        box.server.sweep(now)
        box.server.sweep(now + limits.progress_s + 1)
        await connection.wait_closed()
    assert (tmp_path / "homes" / "birch" / "parts" / str(box.name().as_part())).stat().st_size == 0


@on_loop
async def test_threat_05_a_slow_but_honest_transfer_is_left_alone(tmp_path: Path) -> None:
    """64 KiB every two minutes is enough; what is complete owes nothing more."""
    async with inbox(tmp_path, sweep_s=3600, idle_s=1e9) as box, box.sftp() as client:
        limits, now = box.admission.limits, time.monotonic()
        step = limits.progress_bytes
        async with client.open(f"parts/{box.name().as_part()}", "xb") as file:
            for i in range(0, DATA_BYTES, step):
                await file.write(DATA[i : i + step], i)
                box.server.sweep(now := now + limits.progress_s - 1)
            for _ in range(10):
                box.server.sweep(now := now + limits.progress_s + 1)
            await file.fsync()


@pytest.mark.parametrize("kind", [Kind.DATA, Kind.MANIFEST])
@on_loop
async def test_threat_05_what_writes_the_same_again_and_again_gets_nowhere(tmp_path: Path, kind: Kind) -> None:
    """A manifest of one byte was complete, and 64 KiB that had been there before were progress, for ever."""
    async with inbox(tmp_path, sweep_s=3600, idle_s=1e9) as box, box.connect() as connection:
        limits, now = box.admission.limits, time.monotonic()
        client = await connection.start_sftp_client()
        file = await client.open(f"parts/{box.name(kind=kind).as_part()}", "xb")
        block = DATA[: limits.progress_bytes] if kind is Kind.DATA else b"x"
        await file.write(block)
        box.server.sweep(now)
        await file.write(block, 0)
        box.server.sweep(now + limits.progress_s - 1)
        assert not connection.is_closed()
        await file.write(block, 0)
        box.server.sweep(now + limits.progress_s + 1)
        await connection.wait_closed()


@on_loop
async def test_threat_05_who_resumes_over_a_slow_line_may_send_again_what_lay_there(tmp_path: Path) -> None:
    """It goes back up to 767 KiB, which at 64 KiB in two minutes is no growth for long."""
    async with inbox(tmp_path, sweep_s=3600, idle_s=1e9) as box, box.sftp() as client:
        limits, now, part = box.admission.limits, time.monotonic(), f"parts/{box.name().as_part()}"
        step = limits.progress_bytes
        async with client.open(part, "xb") as file:
            await file.write(DATA[:-step])
        async with client.open(part, "r+b") as file:
            for i in range(0, DATA_BYTES, step):
                await file.write(DATA[i : i + step], i)
                box.server.sweep(now := now + limits.progress_s - 1)
            await file.fsync()


@on_loop
async def test_threat_05_a_member_reads_its_own_files_back_as_resuming_needs_and_is_named_beyond_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sixty bytes of a request would have our line carry 256 KiB, without end and without a word."""
    async with inbox(tmp_path, read_back_bytes_per_minute=3 * len(DATA)) as box, box.sftp() as client:
        part = f"parts/{box.name().as_part()}"
        async with client.open(part, "xb") as file:
            await file.write(DATA)
        async with client.open(part, "rb") as file:
            for _ in range(3):
                assert await file.read(len(DATA), 0) == DATA
            with pytest.raises(SFTPPermissionDenied, match="more than resuming needs"):
                await file.read(len(DATA), 0)
        async with client.open(part, "r+b") as file:
            await file.write(DATA)
            assert await file.read(len(DATA), 0) == DATA, "what it writes it may read once more"
        assert box.rejected("rate") >= 1, "one read of the client is several requests"
        told = [r.__dict__ for r in caplog.records if r.getMessage() == "request refused"]
        assert {(t["peer"], t["code"]) for t in told} == {(BIRCH, "rate")}
        await box.honest()


@on_loop
async def test_threat_05_a_connection_that_asks_nothing_is_closed(tmp_path: Path) -> None:
    async with inbox(tmp_path, sweep_s=3600) as box:
        connection, busy = await box.connect(), await box.connect(CEDAR)
        now = time.monotonic() + box.admission.limits.idle_s
        client = await busy.start_sftp_client()
        box.server.sweep(now - 60)
        (link,) = (link for link in box.admission.links if link.peer == CEDAR)
        link.last_request = now  # a request just came
        box.server.sweep(now + 1)
        await connection.wait_closed()
        await client.stat("parts")
        busy.close()
        await box.honest()


@on_loop
async def test_threat_04_hostile_connections_leave_no_open_files_behind(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box:
        await box.honest()
        await until(lambda: not box.admission.links)
        before = len(os.listdir("/proc/self/fd"))
        for i in range(30):
            connection = await box.connect()
            client = await connection.start_sftp_client()
            with suppress(SFTPError):
                await client.open(f"parts/{box.name(sha256=f'{i:064x}').as_part()}", "xb")
            if i % 2:
                connection.abort()
            else:
                connection._transport.abort()
            await connection.wait_closed()
        await until(lambda: not box.admission.links and not box.server.incoming(1))
        assert len(os.listdir("/proc/self/fd")) <= before


@on_loop
async def test_threat_20_a_peer_that_comes_and_goes_without_end_does_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hsl_node")
    async with inbox(tmp_path, log_lines_per_minute=10) as box:
        for _ in range(20):
            async with box.connect() as connection:
                pass
            await connection.wait_closed()
        assert len(box.connects) == 20
        about = [r for r in caplog.records if getattr(r, "peer", None) == BIRCH]
        assert len(about) == 10
        await box.honest()
        assert any(getattr(r, "peer", None) == CEDAR for r in caplog.records)
