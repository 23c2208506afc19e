"""What a thousand hostile connections leave behind in a real daemon: nothing. Counted in /proc, after a warm-up."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import asyncssh
from asyncssh.packet import Byte, UInt32
from asyncssh.sftp import SFTPError
from cluster import Cluster
from hostile import Hostile
from siege import PLAN, TELL_ALL, Siege, open_files, rss

from hsl_node.federation.names import Kind

COUNT = 1000
WARM_UP = 300  # connections, until the allocator holds what it will hold
GROWTH_MAX = 1.1
AT_ONCE = 20


async def says_nothing(cedar: Hostile) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", cedar.port)
    writer.close()


async def says_rubbish(cedar: Hostile) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", cedar.port)
    writer.write(random.randbytes(5000))
    writer.close()


async def begins_a_key_exchange(cedar: Hostile) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", cedar.port)
    writer.write(b"SSH-2.0-x\r\n" + struct.pack(">I", 30_000) + bytes(20_000))
    await reader.readline()
    writer.transport.abort()


async def shows_a_wrong_key(cedar: Hostile) -> None:
    with suppress(asyncssh.PermissionDenied):
        await cedar.connect(key=STRANGER)


async def leaves_handles_open(cedar: Hostile) -> None:
    connection = await cedar.connect()
    client = await connection.start_sftp_client()
    name = cedar.manifest({"round": 1, "sha256": random.randbytes(32).hex()}).name.of(Kind.DATA).as_part()
    with suppress(SFTPError):
        file = await client.open(f"parts/{name}", "xb")
        await file.write(bytes(30_000))
        await client.remove(f"parts/{name}")
    connection.abort()


async def breaks_the_protocol(cedar: Hostile) -> None:
    async with cedar.connect() as connection:
        writer, reader, _ = await connection.open_session(subsystem="sftp", encoding=None)
        writer.write(UInt32(5) + Byte(1) + UInt32(3) + UInt32(2**32 - 1) + bytes(1000))
        await reader.read()


async def asks_for_nonsense(cedar: Hostile) -> None:
    async with cedar.sftp() as client:
        for i in range(5):
            with suppress(SFTPError):
                await client.stat(f"parts/../{i}{'x' * 1000}")


STRANGER = asyncssh.generate_private_key("ssh-ed25519")
VISITS: tuple[Callable[[Hostile], Awaitable[None]], ...] = (
    says_nothing, says_rubbish, begins_a_key_exchange, shows_a_wrong_key, leaves_handles_open, breaks_the_protocol,
    asks_for_nonsense,
)  # fmt: skip


async def visit(cedar: Hostile, count: int) -> None:
    """`count` hostile connections, some at a time. What the daemon cuts off meanwhile is no fault of the test."""
    busy = asyncio.Semaphore(AT_ONCE)

    async def one(story: Callable[[Hostile], Awaitable[None]]) -> None:
        async with busy:
            with suppress(asyncssh.Error, OSError):
                await story(cedar)

    await asyncio.gather(*(one(VISITS[i % len(VISITS)]) for i in range(count)))


def test_threat_04_memory_and_open_files_after_a_thousand_hostile_connections_are_those_before(tmp_path: Path) -> None:
    # An hour in one epoch: what is measured is the connections, not a round.
    trainer = ["--bytes", "60000", "--epoch-s", "3600"]
    with Cluster(tmp_path, ("ash", "birch", "cedar"), PLAN, trainer=trainer, prelude=TELL_ALL) as cluster:
        siege = Siege(cluster, until_round=1)
        cluster.kill("birch")  # it keeps a connection, which would take part in the count
        cluster.kill("cedar")  # and so would this one's own daemon
        asyncio.run(visit(siege.cedar, WARM_UP))
        memory, files = settled(siege)
        asyncio.run(visit(siege.cedar, COUNT))
        memory_after, files_after = settled(siege)
        told = [e for e in siege.log() if e["event"] in ("request refused", "login refused")]
        assert {e.get("peer") for e in told} >= {"cedar"} and len(told) > COUNT / 2 / len(VISITS)
        print(f"RSS {memory / 2**20:.1f} -> {memory_after / 2**20:.1f} MiB, files {files} -> {files_after}")
        assert memory_after < memory * GROWTH_MAX
        assert files_after <= files * GROWTH_MAX
        assert cluster.status("ash")["phase"] == "train"


def settled(siege: Siege) -> tuple[int, int]:
    """Memory and open files once nobody hostile is connected any more."""
    siege.cluster.wait_until("ash", lambda s: not connected(siege), "all hostile connections gone")
    return rss(siege.pid), open_files(siege.pid)


def connected(siege: Siege) -> int:
    """Established connections at the victim's port, by any state but listening and the kernel's own waiting."""
    port = f":{siege.cedar.port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[1].endswith(port) and line.split()[3] in ("01", "08") for line in lines)
