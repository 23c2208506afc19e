"""Packets and requests that cost their sender nothing: asyncssh parses each. Strangers, members and servers.

The honest clients here are the real ones, with keepalives, new session keys and idle packets.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncssh
import paramiko
import pytest
from asyncssh.packet import Boolean, Byte, SSHPacketHandler, String, UInt32
from boxes import ASH, BIRCH, DATA, DATA_BYTES, SHA, Box, inbox, on_loop, put, until
from hostile import AnyKey, Folder, lying
from one_parcel import CLIENTS, ME, MEMBERS, PEER

from hsl_node.errors import TransportError
from hsl_node.sync.inbox.link import LOGIN_MAX_BYTES
from hsl_node.sync.inbox.requests import InboxHandler
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.toll import IN_A_ROW, PAYS_BYTES, Toll
from hsl_node.sync.wire.transport import Client

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
            count(box.admission.links[-1])
            writer.write(b"SSH-2.0-x\r\n")
            with pytest.raises(ConnectionError):
                while True:
                    writer.write(IGNORE * 64)
                    await writer.drain()
            writer.close()
            await until(lambda number=number: box.counted.flooded == number + 1)
        assert parsed <= 5 * LOGIN_MAX_BYTES / len(IGNORE)
        told = [r for r in caplog.records if r.getMessage() == "unauthenticated connection cut: it sends too much"]
        assert len(told) == 3 and told[0].__dict__["source"] == "127.0.0.1"
        await box.honest()


FLOODS: dict[str, Callable[[asyncssh.SSHClientConnection], None]] = {
    "ignore": lambda c: c.send_packet(2, String(b"x")),
    "unimplemented": lambda c: c.send_packet(3, UInt32(0)),
    "debug": lambda c: c.send_debug("\x1b[2J"),
    "global request": lambda c: c.send_packet(80, String(b"x@y"), Boolean(True)),
    "channel open": lambda c: c.send_packet(90, String(b"session"), UInt32(9), UInt32(2**20), UInt32(2**15)),
    "tunnel open": lambda c: c.send_packet(90, String(b"direct-tcpip"), UInt32(9), UInt32(2**20), UInt32(2**15),
                                           String(b"h"), UInt32(1), String(b"h"), UInt32(1)),
    "channel request": lambda c: c.send_packet(98, UInt32(0), String(b"break"), Boolean(False), UInt32(1)),
    "unknown": lambda c: c.send_packet(192, String(b"")),
    "key exchange": lambda c: exchange_keys(c),
    "no data": lambda c: c.send_packet(94, UInt32(0), String(b"")),
    "window": lambda c: c.send_packet(93, UInt32(0), UInt32(1)),
    "stat": lambda c: c.send_packet(94, UInt32(0), String(REQUESTS["stat"] * 100)),
    "rubbish": lambda c: c.send_packet(94, UInt32(0), String(REQUESTS["rubbish"] * 100)),
}  # fmt: skip
FLOOD_MAX = 5000  # packets; the budget is 200
REQUESTS = {
    "stat": String(Byte(17) + UInt32(1) + String(b"parts")),
    "rubbish": String(Byte(17) + UInt32(1)),  # what would be asked for is missing
}


def bare(connection: Any) -> None:
    """asyncssh sends an idle packet before each other one, which would be counted. An attacker does not."""
    send = connection.send_packet
    idle = (2, String(b""))
    connection.send_packet = lambda *packet, **options: None if packet == idle else send(*packet, **options)


def exchange_keys(connection: Any) -> None:
    """Begin it, and go on with packets that belong to none."""
    if not connection._kexinit_sent:
        connection._send_kexinit()
        connection._kexinit_sent = True
    connection.send_packet(49, UInt32(0))


@pytest.mark.parametrize("flood", FLOODS)
@on_loop
async def test_threat_05_a_member_that_sends_packets_without_end_is_cut_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, flood: str
) -> None:
    limits = {"packets_per_minute": 200, "requests_per_minute": 200, "log_lines_per_minute": 1000}
    async with inbox(tmp_path, **limits) as box:
        async with box.connect() as connection, connection.start_sftp_client() as client:
            await client.stat("parts")
            bare(connection)
            connection._transport.pause_reading()  # an answer that asyncssh did not ask for would end the flood
            for _ in range(FLOOD_MAX):
                FLOODS[flood](connection)
                await asyncio.sleep(0)
                if box.rejected("rate"):
                    break
            connection.abort()
        await until(lambda: not any(link.peer == BIRCH for link in box.admission.links))
        assert box.rejected("rate") == 1
        (told,) = [r for r in caplog.records if r.getMessage() == "request refused" and r.__dict__["code"] == "rate"]
        assert told.__dict__["peer"] == BIRCH and "200 packets" in told.__dict__["reason"]
        await box.honest()


async def flood(box: Box, kind: str) -> None:
    """With one connection, until it is cut."""
    with suppress(asyncssh.Error, OSError):
        async with box.connect() as connection:
            await connection.open_session(subsystem="sftp", encoding=None)
            bare(connection)
            for _ in range(FLOOD_MAX):
                FLOODS[kind](connection)
                await asyncio.sleep(0)
                if connection.is_closed():
                    break


@pytest.mark.parametrize("kind", ["debug", "ignore", "window"])
@on_loop
async def test_threat_05_a_member_has_one_budget_for_all_its_connections(tmp_path: Path, kind: str) -> None:
    """Two at a time, and one after the other."""
    async with inbox(tmp_path, packets_per_minute=200, requests_per_minute=200) as box:
        await asyncio.gather(flood(box, kind), flood(box, kind))
        await flood(box, kind)
        assert box.rejected("rate") == 3
        toll = box.admission.members[BIRCH].toll
        spent = toll.packets._taken if kind == "debug" else toll.requests._taken / PAYS_BYTES
        assert 199 < spent <= 200
        await box.honest()


@contextmanager
def turns() -> Iterator[list[int]]:
    """The last element is the number of turns that the loop's other callbacks have had."""
    loop, count = asyncio.get_running_loop(), [0]

    def turn() -> None:
        nonlocal handle
        count[0] += 1
        handle = loop.call_soon(turn)

    handle = loop.call_soon(turn)
    try:
        yield count
    finally:
        handle.cancel()


@pytest.mark.parametrize("request_", REQUESTS)
@on_loop
async def test_threat_04_a_burst_of_requests_leaves_others_their_turn_and_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    """A window of them, 8 s of work, held the loop up from the first to the last; no `status`, no round went on."""
    handled: Counter[int] = Counter()  # turn -> requests
    process = InboxHandler._process_packet
    async with inbox(tmp_path, requests_per_minute=2000) as box:
        with turns() as turn:

            async def counted(self: InboxHandler, *packet: Any) -> None:
                handled[turn[0]] += 1
                await process(self, *packet)

            monkeypatch.setattr(InboxHandler, "_process_packet", counted)
            with suppress(asyncssh.Error, OSError):
                async with box.connect() as connection:
                    bare(connection)
                    writer, reader, _ = await connection.open_session(subsystem="sftp", encoding=None)
                    writer.write(String(Byte(1) + UInt32(3)))
                    writer.write(REQUESTS[request_] * (2**20 // len(REQUESTS[request_])))
                    while await reader.read(2**16):
                        pass
            assert box.rejected("rate") == 1
        assert 2000 <= handled.total() <= 2000 + 2**20 / PAYS_BYTES
        assert max(handled.values()) == 1
        await box.honest()


@on_loop
async def test_threat_05_what_one_read_brings_leaves_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four thousand packets come with one read of the socket."""
    handled: Counter[int] = Counter()
    process = SSHPacketHandler.process_packet
    async with inbox(tmp_path) as box:
        with turns() as turn:

            def counted(self: SSHPacketHandler, kind: int, *packet: Any) -> Any:
                if isinstance(self, asyncssh.SSHServerChannel) and kind == 93:
                    handled[turn[0]] += 1
                return process(self, kind, *packet)

            monkeypatch.setattr(SSHPacketHandler, "process_packet", counted)
            async with box.connect() as connection:
                await connection.open_session(subsystem="sftp", encoding=None)
                bare(connection)
                for _ in range(4000):
                    FLOODS["window"](connection)
                await until(lambda: handled.total() >= 4000)
        assert max(handled.values()) <= IN_A_ROW
        assert not box.rejected("rate")


# ---------------------------------------------------------------- servers


class Flooding(Folder):
    kind: str

    def __init__(self, channel: asyncssh.SSHServerChannel[bytes]) -> None:
        super().__init__(channel)
        connection: Any = channel.get_connection()
        connection.create_task(self.flood(connection))

    async def flood(self, connection: asyncssh.SSHClientConnection) -> None:
        self.lie()
        bare(connection)
        while not connection.is_closed():
            FLOODS[self.kind](connection)
            await asyncio.sleep(0)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("kind", ["ignore", "debug", "no data", "window"])
@on_loop
async def test_threat_18_a_server_that_sends_packets_without_end_is_left_and_named(
    tmp_path: Path, client: Client, kind: str
) -> None:
    """Also on the next connection: it gets no new budget with it."""
    toll = Toll(200, 200)
    async with lying(type("Flooding", (Flooding,), {"kind": kind}), MEMBERS.identities[PEER].key, tmp_path) as server:
        card = MEMBERS.federation.get(PEER).model_copy(update={"address": f"127.0.0.1:{server.port}"})
        for _ in range(2):
            with pytest.raises(TransportError, match=f"{PEER} at .* more than 200 packets"):
                async with connect(card, ME, MEMBERS.identities[ME], client=client, toll=toll) as link:
                    while True:
                        await link.size("inbox/x")
        assert server.fired > 0
        assert toll.packets._taken == 200 or 199 < toll.requests._taken / PAYS_BYTES <= 200


@on_loop
async def test_threat_18_a_server_that_sends_more_than_a_login_takes_is_left(tmp_path: Path) -> None:
    """Before it has let us in it may ask for as many signatures as it likes."""
    sent = 0

    class Asks(AnyKey):
        def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
            self.conn = conn

        def begin_auth(self, username: str) -> bool:
            self.conn.create_task(self.flood())
            return True

        async def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:  # type: ignore[override]
            return await asyncio.get_running_loop().create_future()

        async def flood(self) -> None:
            nonlocal sent
            while not self.conn.is_closed():
                self.conn.send_packet(2, String(bytes(1000)))
                sent += 1
                await asyncio.sleep(0)

    server = await asyncssh.listen(
        "127.0.0.1", 0, config=None, server_factory=Asks, server_host_keys=[MEMBERS.identities[PEER].key]
    )
    card = MEMBERS.federation.get(PEER).model_copy(update={"address": f"127.0.0.1:{server.get_port()}"})
    with pytest.raises(TransportError, match="before the login"):
        async with connect(card, ME, MEMBERS.identities[ME]):
            pass
    assert sent > 100
    server.close()


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
        admit = box.admission.admit
        box.admission.admit = lambda link: (links.append(link), admit(link))[1]  # type: ignore[method-assign,func-returns-value]
        await HONEST[client](box, tmp_path)
        assert box.delivered() == SHA
        assert not box.counted.rejected and not box.counted.flooded
        login_bytes = links[-1].turnstile.login_bytes
        assert 1000 < login_bytes < LOGIN_MAX_BYTES / 4
        toll = box.admission.members[BIRCH].toll
        assert 20 < toll.packets._taken < box.admission.limits.packets_per_minute / 10
        print(f"{client}: {login_bytes} bytes until the login, {toll.packets._taken} packets without data")


@on_loop
async def test_threat_05_data_pays_for_the_packets_and_requests_that_it_takes(tmp_path: Path) -> None:
    """In blocks of 4 KiB, an eighth of what any client uses; asyncssh sends an idle packet before each.

    Those were counted once: 3000 blocks in a minute, 100 MB in blocks of 32 KiB, and a sender was cut.
    """
    async with inbox(tmp_path, packets_per_minute=60, requests_per_minute=60) as box, box.sftp() as client:
        part = f"parts/{box.name().as_part()}"
        for way in ("xb", "r+b", "rb"):
            async with client.open(part, way, block_size=4096, max_requests=8) as file:
                if way == "rb":
                    assert await file.read() == DATA
                else:
                    await file.write(DATA)
        assert not box.counted.rejected
