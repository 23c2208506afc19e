"""A hostile peer at a real daemon: whatever it does with its key, the honest round goes on and the log names it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import itertools
import json
import os
import struct
import sys
import termios
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeVar

import asyncssh
import paramiko
import pytest
import sample
from asyncssh.packet import Byte, String, UInt32
from asyncssh.sftp import SFTPAttrs, SFTPError
from cluster import Cluster
from hostile import Hostile, put, until
from siege import PLAN, TELL_ALL, TRAINER, Siege

from hsl_node.federation.names import Kind
from hsl_node.sync.manifest import SAMPLES_MAX


@pytest.fixture(scope="module")
def siege(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    with Cluster(
        tmp_path_factory.mktemp("siege"), ("ash", "birch", "cedar"), PLAN, trainer=TRAINER, prelude=TELL_ALL
    ) as cluster:
        yield Siege(cluster)


Result = TypeVar("Result")


def attack(story: Awaitable[Result]) -> Result:
    async def main() -> Result:
        return await asyncio.wait_for(story, 120)

    return asyncio.run(main())


async def refused(work: Awaitable[Any]) -> None:
    with pytest.raises((SFTPError, asyncssh.Error, OSError)):
        await work


# ---------------------------------------------------------------- files


def test_threat_01_a_daemon_serves_none_of_the_names_that_lead_elsewhere(siege: Siege) -> None:
    cedar = siege.cedar
    name = cedar.manifest(siege.genuine()[-1]).name.as_part()
    paths = [f"parts/../../../{n}" for n in ("journal.sqlite3", "keys/node.key", "federation.toml")]
    paths += [str(siege.cluster.layout("ash").key), f"parts/{name}\0", f"PARTS/{name}", f"inbox/../parts/{name}"]
    paths += [f"parts/{str(name).replace('cedar', 'birch')}", "parts/" + "a" * 3000, f"parts/{name}\n", "parts/\u202e"]

    async def story() -> None:
        async with cedar.sftp() as client:
            for path in paths:
                for work in (client.open(path, "rb"), client.open(path, "xb"), client.stat(path), client.remove(path)):
                    await refused(work)

    before = siege.cluster.layout("ash").key.read_bytes()
    with siege.endured("name", "owner"):
        attack(story())
    assert siege.cluster.layout("ash").key.read_bytes() == before


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "fifo", "folder"])
def test_threat_02_a_daemon_neither_follows_nor_waits_for_what_lies_in_its_inbox(siege: Siege, kind: str) -> None:
    """Planted by whoever shares the machine: an account of another SFTP server, say."""
    cedar = siege.cedar
    secret = siege.state.parent / f"secret-{kind}"
    with siege.endured("file"):
        genuine, data = siege.next_manifest(), siege.checkpoint()
        manifest = cedar.about(data, genuine, score=0.123)
        secret.write_bytes(data)
        path = siege.cluster.layout("ash").homes / "cedar/inbox" / str(manifest.name.of(Kind.DATA))
        match kind:
            case "symlink":
                path.symlink_to(secret)
            case "hardlink":
                path.hardlink_to(secret)
            case "fifo":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
        attack(cedar.deliver(manifest, None))
        receipt = attack(cedar.receipt(manifest, siege.victim_key))  # else cedar's own daemon might bring the data
        assert (receipt.accepted, receipt.code) == (False, "file")
        if kind == "folder":
            path.rmdir()
        assert secret.read_bytes() == data


def test_threat_03_a_daemon_makes_no_sparse_or_huge_file(siege: Siege) -> None:
    cedar = siege.cedar
    part = f"parts/{cedar.manifest(siege.genuine()[-1], sha256='1' * 64).name.of(Kind.DATA).as_part()}"

    async def story() -> None:
        async with cedar.sftp() as client:
            async with client.open(part, "xb") as file:
                for offset in (2**31, 2**40, 2**62, 2**63 - 1):
                    await refused(file.write(b"x", offset))
                await refused(file.setstat(SFTPAttrs(size=2**60)))
            await refused(client.truncate(part, 2**60))
            assert (await client.stat(part)).size == 0
            await client.remove(part)

    with siege.endured("size", "operation"):
        attack(story())


# ---------------------------------------------------------------- floods


async def many_handles(cedar: Hostile) -> None:
    """Where cedar's own daemon connects meanwhile, the attacker is thrown out, and comes again."""
    part, tries = "parts/" + str(part_of(cedar)), 0
    while tries < 300:
        with suppress(asyncssh.Error, OSError):
            async with cedar.sftp() as client:
                while tries < 300:
                    tries += 1
                    for mode in ("rb", "xb"):
                        await answered(client.open(part, mode))
                await answered(client.remove(part))


async def answered(work: Awaitable[Any]) -> None:
    """With yes or no; a lost connection is neither."""
    try:
        await work
    except (asyncssh.SFTPNoConnection, asyncssh.SFTPConnectionLost):
        raise
    except SFTPError:
        pass


async def many_sessions(cedar: Hostile) -> None:
    async with cedar.connect() as connection:
        for _ in range(100):
            with suppress(asyncssh.Error):
                await connection.start_sftp_client()


async def many_connections(cedar: Hostile) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(100):
            await stack.enter_async_context(cedar.connect())


async def unread_answers(cedar: Hostile) -> None:
    """20,000 requests, 60 MiB of answers at least, and not one of them taken off the wire."""
    async with cedar.connect() as connection:
        writer, _, _ = await connection.open_session(subsystem="sftp", encoding=None, window=2**31 - 1)
        path = String(b"parts/" + b"x" * 3000)
        writer.write(packet(Byte(1) + UInt32(3)))
        connection._transport.pause_reading()
        for number in range(20_000):
            writer.write(packet(Byte(16) + UInt32(number) + path))  # realpath: refused in words that repeat the path
        with suppress(TimeoutError):
            async with asyncio.timeout(3):
                await writer.drain()
        await until(lambda: unread(connection) > 3000)  # one answer at least has come, however slow the daemon is
        connection.abort()


def unread(connection: Any) -> int:
    """Bytes that lie in our kernel."""
    count = fcntl.ioctl(connection._transport.get_extra_info("socket").fileno(), termios.FIONREAD, bytes(4))
    return int.from_bytes(count, sys.byteorder)


async def endless_packet(cedar: Hostile) -> None:
    async with cedar.connect() as connection:
        writer, reader, _ = await connection.open_session(subsystem="sftp", encoding=None)
        writer.write(packet(Byte(1) + UInt32(3)) + UInt32(2**32 - 1))
        with suppress(asyncssh.Error, OSError):
            for _ in range(1000):
                writer.write(bytes(100_000))
                await writer.drain()
        await reader.read()


def part_of(cedar: Hostile) -> object:
    genuine = {"round": 1, "sha256": "2" * 64}
    return cedar.manifest(genuine).name.of(Kind.DATA).as_part()


def packet(payload: bytes) -> bytes:
    return UInt32(len(payload)) + payload


FLOODS: dict[str, tuple[Callable[[Hostile], Awaitable[None]], tuple[str, ...]]] = {
    "handles": (many_handles, ("handles",)),
    "sessions": (many_sessions, ("sessions",)),
    "connections": (many_connections, ()),  # no fault, only the newest two stay: said in an event of its own
    "requests without reading": (unread_answers, ("name",)),
    "a packet without end": (endless_packet, ()),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_threat_04_a_flood_costs_a_daemon_neither_memory_nor_a_round(siege: Siege, flood: str) -> None:
    story, codes = FLOODS[flood]
    with siege.endured(*codes, still=False):
        attack(story(siege.cedar))


async def gets_in(cedar: Hostile) -> None:
    """As a peer does: again, where the lot fell on it before its login."""
    while True:
        with suppress(ConnectionError, asyncssh.ConnectionLost):
            async with cedar.sftp() as client:
                await client.stat("parts")
                return


async def silent(cedar: Hostile) -> None:
    await asyncio.gather(*(asyncio.open_connection("127.0.0.1", cedar.port) for _ in range(200)))
    await gets_in(cedar)


async def greeting_one_byte_at_a_time(cedar: Hostile) -> None:
    opened = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", cedar.port) for _ in range(60)))
    for letter in b"SSH-2.0-slow\r\n" + bytes(20):
        for _, writer in opened:
            with suppress(OSError):
                writer.write(bytes([letter]))
        await gets_in(cedar)


async def begun_key_exchanges(cedar: Hostile) -> None:
    """A version line and the header of a first packet that never comes."""
    opened = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", cedar.port) for _ in range(60)))
    for _, writer in opened:
        writer.write(b"SSH-2.0-x\r\n" + struct.pack(">I", 30_000) + bytes(1000))
    await gets_in(cedar)


async def packets_of_four_gigabytes(cedar: Hostile) -> None:
    opened = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", cedar.port) for _ in range(16)))
    for _, writer in opened:
        with suppress(OSError):
            writer.write(b"SSH-2.0-x\r\n" + struct.pack(">I", 2**32 - 1) + bytes(4 * 2**20))
            await writer.drain()
    await gets_in(cedar)


STRANGERS = [silent, greeting_one_byte_at_a_time, begun_key_exchanges, packets_of_four_gigabytes]


@pytest.mark.parametrize("story", STRANGERS, ids=lambda story: story.__name__.replace("_", " "))
def test_threat_05_strangers_who_never_log_in_keep_no_peer_out(
    siege: Siege, story: Callable[[Hostile], Awaitable[None]]
) -> None:
    with siege.endured(still=False):
        attack(story(siege.cedar))


# ---------------------------------------------------------------- checkpoints


def with_header(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The same number of bytes with another header, however little it fits."""
    length = int.from_bytes(data[:8], "little")
    text = change(json.loads(data[8 : 8 + length]))
    text = text if isinstance(text, bytes) else json.dumps(text, separators=(",", ":")).encode()
    header = text[:length].ljust(length) if len(text) <= length else text
    return (len(header).to_bytes(8, "little") + header).ljust(len(data), b"\0")[: len(data)]


def first(entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    name = next(iter(entries))
    return {**entries, name: {**entries[name], **changes}}


BOMBS: dict[str, Callable[[bytes], bytes]] = {
    "length of exabytes": lambda d: (2**63).to_bytes(8, "little") + d[8:],
    "length of the file": lambda d: (len(d) - 8).to_bytes(8, "little") + d[8:],
    "no length": lambda d: bytes(8) + d[8:],
    "nesting": lambda d: with_header(d, lambda e: b"[" * 20_000),
    "empty tensors": lambda d: with_header(
        d, lambda e: {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(900)}
    ),
    "metadata": lambda d: with_header(d, lambda e: {"__metadata__": {"a": "b" * 20_000}, **e}),
    "a dimension too many": lambda d: with_header(d, lambda e: first(e, shape=[2**31 - 1] * 8)),
    "a negative dimension": lambda d: with_header(d, lambda e: first(e, shape=[-1])),
    "a number of 20,000 digits": lambda d: with_header(d, lambda e: b'{"a":' + b"9" * 20_000),
    "offsets that overlap": lambda d: with_header(d, lambda e: first(e, data_offsets=[0, 10**15])),
    "an unknown dtype": lambda d: with_header(d, lambda e: first(e, dtype="F8")),
    "no text": lambda d: with_header(d, lambda e: os.urandom(500)),
}


def test_threat_06_each_bomb_is_refused_by_a_daemon_in_a_signed_receipt(siege: Siege) -> None:
    cedar = siege.cedar

    async def story(genuine: dict[str, Any], data: bytes) -> None:
        for bomb in BOMBS.values():
            bad = bomb(data)
            assert bad != data and len(bad) == len(data)
            manifest = cedar.about(bad, genuine)
            await cedar.deliver(manifest, bad)
            receipt = await cedar.receipt(manifest, siege.victim_key)
            assert (receipt.accepted, receipt.code) == (False, "header"), receipt

    with siege.endured("header"):
        attack(story(siege.next_manifest(), siege.checkpoint()))


def test_threat_07_a_value_that_is_no_number_never_reaches_a_fusion(siege: Siege) -> None:
    """In each tensor, as its last value."""
    cedar = siege.cedar

    async def story(genuine: dict[str, Any], data: bytes) -> None:
        start = 8 + int.from_bytes(data[:8], "little")
        floats = [e for e in json.loads(data[8:start]).values() if e["dtype"] == "F32"]
        for entry, value in itertools.product(floats, (float("nan"), float("inf"), float("-inf"))):
            at = start + entry["data_offsets"][1] - 4
            bad = data[:at] + struct.pack("<f", value) + data[at + 4 :]
            manifest = cedar.about(bad, genuine)
            await cedar.deliver(manifest, bad)
            assert (await cedar.receipt(manifest, siege.victim_key)).code == "nonfinite"

    with siege.endured("nonfinite"):
        attack(story(siege.next_manifest(), siege.checkpoint()))


# ---------------------------------------------------------------- manifests


def test_threat_09_a_signed_but_impossible_sample_count_moves_nothing(siege: Siege) -> None:
    cedar = siege.cedar

    async def story(genuine: dict[str, Any]) -> None:
        for number, samples in enumerate([0, -1, SAMPLES_MAX + 1, 2**63, 1.5, "10", True, None]):
            await cedar.deliver(cedar.manifest({**genuine, "sha256": f"{number:064x}"}, samples=samples), None)
        await until(lambda: sum(e.get("code") == "manifest" for e in siege.log(mark)) == 8)

    with siege.endured("manifest"):
        mark = siege.log_bytes
        attack(story(siege.next_manifest()))


def test_threat_10_every_past_file_again_changes_nothing(siege: Siege) -> None:
    cedar, past = siege.cedar, [m for m in siege.genuine() if m["round"] < siege.round - 1]
    data, inbox = siege.checkpoint(), siege.cluster.layout("ash").homes / "cedar/inbox"

    async def story() -> None:
        async with cedar.sftp() as client:
            for old in map(cedar.manifest, past):
                if old.content["bytes"]:
                    with suppress(SFTPError):  # sixteen files may wait here, and no more
                        await put(client, old.name.of(Kind.DATA), data)
                with suppress(SFTPError):
                    await put(client, old.name, old.document)
                await until(lambda name=old.name: not (inbox / str(name)).exists())  # answered, like the first time

    assert len(past) >= 2
    if not sample.ALL:  # how many there are is how long the tests before took
        past = past[:4] + past[4:][-4:]
    with siege.endured():
        before = siege.cluster.fused("ash")
        attack(story())
        assert siege.cluster.fused("ash") == before


def test_threat_10_a_manifest_of_another_federation_is_refused_by_name_and_by_content(siege: Siege) -> None:
    cedar = siege.cedar

    async def story(genuine: dict[str, Any]) -> None:
        elsewhere = cedar.manifest(genuine, federation="e" * 64)
        await cedar.deliver(elsewhere, None)
        renamed = f"parts/{elsewhere.name.as_part()}".replace(cedar.federation.fed8, "e" * 8)
        async with cedar.sftp() as client:
            await refused(client.open(renamed, "xb"))

    with siege.endured("federation"):
        attack(story(siege.next_manifest()))


def test_threat_14_cedar_cannot_speak_for_birch(siege: Siege) -> None:
    cedar, birch = siege.cedar, siege.holder_of("birch")  # type: ignore[arg-type]

    async def story(genuine: dict[str, Any]) -> None:
        for user, key in (("birch", cedar.identity.key), ("cedar", birch.identity.key), ("ash", cedar.identity.key)):
            await refused(cedar.connect(user, key))
        for forged in (
            cedar.manifest(genuine, peer="birch"),  # cedar's key under birch's name
            cedar.manifest({**genuine, "sha256": "3" * 64}, signer=birch.identity),  # birch's words in cedar's inbox
        ):
            await cedar.deliver(forged, None)
        async with cedar.sftp() as client:
            theirs = str(cedar.manifest(genuine).name.as_part()).replace("cedar", "birch")
            await refused(client.open(f"parts/{theirs}", "xb"))

    with siege.endured("owner", "signature"):
        attack(story(siege.next_manifest()))


def test_threat_20_what_a_peer_writes_stays_inside_one_line_of_the_log(siege: Siege) -> None:
    cedar, evil = siege.cedar, '\x1b[31mred\r\n{"level":"critical"}\u202e'

    def log_in() -> None:
        with contextlib.closing(paramiko.Transport(("127.0.0.1", cedar.port))) as connection:
            connection.start_client(timeout=30)
            text = cedar.identity.key.export_private_key("openssh").decode()
            with pytest.raises((paramiko.SSHException, EOFError)):
                connection.auth_publickey(evil, paramiko.Ed25519Key.from_private_key(io.StringIO(text)))

    async def story() -> None:
        await asyncio.to_thread(log_in)
        async with cedar.sftp() as client:
            for name in (evil, f"parts/{evil}", evil + "x" * 5000):
                await refused(client.stat(name.encode()))

    with siege.endured("name"):
        mark = siege.log_bytes
        attack(story())
        for entry in siege.log(mark):
            assert entry["level"] != "critical"
            assert all(v.isprintable() and len(v) <= 2000 for v in entry.values() if isinstance(v, str))
