"""Packets that carry no data: asyncssh parses each, and their sender pays nothing for them. Strangers and members.

The honest clients here are the real ones, with keepalives, new session keys and idle packets.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncssh
import paramiko
import pytest
from asyncssh.packet import Boolean, String, UInt32
from boxes import ASH, BIRCH, DATA, DATA_BYTES, SHA, Box, inbox, on_loop, put, until

from hsl_node.sync.link import LOGIN_MAX_BYTES

IGNORE = bytes.fromhex("0000000c 06 02 00000000 000000000000")  # length, padding, type, an empty string: 16 bytes


@on_loop
async def test_threat_05_a_stranger_that_sends_more_than_a_login_takes_is_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sixteen of them, from one address, kept the event loop busy for seconds at a time."""
    async with inbox(tmp_path, login_timeout_s=1e6, log_lines_per_minute=3) as box:
        parsed = 0

        def count(link: Any) -> None:
            conn, process = link.conn, link.conn.process_packet

            def counted(*packet: Any) -> Any:
                nonlocal parsed
                parsed += 1
                return process(*packet)

            conn.process_packet = counted

        for number in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", box.port)
            await reader.readline()
            count(box.server._links[-1])
            writer.write(b"SSH-2.0-x\r\n")
            with pytest.raises(ConnectionError):
                while True:
                    writer.write(IGNORE * 64)
                    await writer.drain()
            writer.close()
            await until(lambda number=number: box.server.counters.flooded == number + 1)
        assert parsed <= 5 * LOGIN_MAX_BYTES / len(IGNORE)
        told = [r for r in caplog.records if r.getMessage() == "unauthenticated connection cut: it sends too much"]
        assert len(told) == 3 and told[0].__dict__["source"] == "127.0.0.1"
        await box.honest()


FLOODS: dict[str, Callable[[asyncssh.SSHClientConnection], None]] = {
    "ignore": lambda c: c.send_packet(2, String(b"")),
    "unimplemented": lambda c: c.send_packet(3, UInt32(0)),
    "debug": lambda c: c.send_debug("\x1b[2J"),
    "global request": lambda c: c.send_packet(80, String(b"x@y"), Boolean(True)),
    "channel open": lambda c: c.send_packet(90, String(b"session"), UInt32(9), UInt32(2**20), UInt32(2**15)),
    "tunnel open": lambda c: c.send_packet(90, String(b"direct-tcpip"), UInt32(9), UInt32(2**20), UInt32(2**15),
                                           String(b"h"), UInt32(1), String(b"h"), UInt32(1)),
    "channel request": lambda c: c.send_packet(98, UInt32(0), String(b"break"), Boolean(False), UInt32(1)),
    "unknown": lambda c: c.send_packet(192, String(b"")),
}  # fmt: skip


@pytest.mark.parametrize("flood", FLOODS)
@on_loop
async def test_threat_05_a_member_that_sends_packets_without_end_is_cut_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, flood: str
) -> None:
    async with inbox(tmp_path, packets_per_minute=200, log_lines_per_minute=1000) as box:
        async with box.connect() as connection, connection.start_sftp_client() as client:
            await client.stat("parts")
            connection._transport.pause_reading()  # an answer that asyncssh did not ask for would end the flood
            while not box.rejected("rate"):
                FLOODS[flood](connection)
                await asyncio.sleep(0)
            connection.abort()
        await until(lambda: not any(link.peer == BIRCH for link in box.server._links))
        assert box.rejected("rate") == 1
        (told,) = [r for r in caplog.records if r.getMessage() == "request refused" and r.__dict__["code"] == "rate"]
        assert told.__dict__["peer"] == BIRCH and "200 packets" in told.__dict__["reason"]
        await box.honest()


@on_loop
async def test_threat_05_a_member_gets_no_new_budget_with_a_new_connection(tmp_path: Path) -> None:
    async with inbox(tmp_path, packets_per_minute=200) as box:
        for _ in range(3):
            with pytest.raises((asyncssh.Error, OSError)):
                async with box.connect() as connection:
                    while True:
                        FLOODS["ignore"](connection)
                        await asyncio.sleep(0)
                        if connection.is_closed():
                            raise asyncssh.ConnectionLost("cut")
        assert sum(taken._taken for taken in box.server._packets.values()) == 200
        await box.honest()


# ---------------------------------------------------------------- honest clients


async def with_asyncssh(box: Box, folder: Path) -> None:
    options = {"rekey_bytes": 2**16, "keepalive_interval": 0.01, "keepalive_count_max": 10_000}
    async with box.connect(**options) as connection, connection.start_sftp_client() as client:
        for _ in range(20):
            connection.send_packet(2, String(b"idle"))
            connection.send_debug("still here")
        await put(client, box.name(), DATA)


async def with_paramiko(box: Box, folder: Path) -> None:
    async with box.sftp() as first, first.open(f"parts/{box.name().as_part()}", "xb"):
        pass  # in paramiko's words no file can be created for writing that must not be there

    def deliver() -> None:
        key = paramiko.Ed25519Key.from_private_key_file(str(private_key(box, folder)))
        transport = paramiko.Transport(("127.0.0.1", box.port))
        transport.packetizer.REKEY_BYTES = 2**16
        transport.connect(username=BIRCH, pkey=key)
        transport.set_keepalive(1)
        client = paramiko.SFTPClient.from_transport(transport)
        assert client is not None
        for _ in range(20):
            transport.global_request("keepalive@lag.net", wait=False)
        with client.open(f"parts/{box.name().as_part()}", "r+b") as file:
            file.set_pipelined(True)
            for start in range(0, DATA_BYTES, 2**15):
                file.write(DATA[start : start + 2**15])
        client.rename(f"parts/{box.name().as_part()}", f"inbox/{box.name()}")
        transport.close()

    await asyncio.to_thread(deliver)


async def with_openssh(box: Box, folder: Path) -> None:
    """It reads: the inbox creates nothing that may be there already, which sftp's `put` asks for."""
    part = f"parts/{box.name().as_part()}"
    async with box.sftp() as client, client.open(part, "xb") as file:
        await file.write(DATA)
    host_key = box.members.identities[ASH].key.export_public_key("openssh").decode()
    (folder / "known").write_text(f"[127.0.0.1]:{box.port} {host_key}")
    (folder / "commands").write_text(f"get {part} {folder}/back\n" * 3 + f"rename {part} inbox/{box.name()}\n")
    options = (
        "RekeyLimit=64K", "ServerAliveInterval=1", f"UserKnownHostsFile={folder}/known", "IdentityAgent=none",
        "IdentitiesOnly=yes", "UpdateHostKeys=yes", "GlobalKnownHostsFile=/dev/null",
    )  # fmt: skip
    command = ["sftp", "-F", "/dev/null", "-b", str(folder / "commands"), "-P", str(box.port)]
    command += ["-i", str(private_key(box, folder)), *(part for o in options for part in ("-o", o))]
    done = await asyncio.to_thread(subprocess.run, [*command, f"{BIRCH}@127.0.0.1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def private_key(box: Box, folder: Path) -> Path:
    path = folder / "key"
    path.touch(mode=0o600)
    path.write_bytes(box.members.identities[BIRCH].key.export_private_key("openssh"))
    return path


HONEST: dict[str, Callable[[Box, Path], Awaitable[None]]] = {
    "asyncssh": with_asyncssh, "paramiko": with_paramiko, "openssh": with_openssh,
}  # fmt: skip


@pytest.mark.parametrize("client", HONEST)
@on_loop
async def test_threat_05_an_honest_client_is_never_cut_for_its_packets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, client: str
) -> None:
    """New session keys every 64 KiB, eight thousand times as often as by default; keepalives; idle packets."""
    if client == "openssh" and shutil.which("sftp") is None:
        pytest.skip("OpenSSH's sftp is not installed")
    caplog.set_level(logging.INFO, "hsl_node")
    async with inbox(tmp_path) as box:
        links = []
        admit = box.server.admit
        box.server.admit = lambda link: (links.append(link), admit(link))[1]  # type: ignore[method-assign,func-returns-value]
        await HONEST[client](box, tmp_path)
        assert box.server.take_digest(BIRCH, str(box.name())) == SHA
        assert not box.server.counters.rejected and not box.server.counters.flooded
        assert 1000 < links[-1]._unknown_bytes < LOGIN_MAX_BYTES / 4
        (packets,) = box.server._packets.values()
        assert 20 < packets._taken < box.server.limits.packets_per_minute / 10
        print(f"{client}: {links[-1]._unknown_bytes} bytes until the login, {packets._taken} packets without data")
