"""A hostile server at a peer's address: no lie ends a delivery but the truth, and none costs memory or another peer."""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from asyncssh.sftp import SFTPAttrs, SFTPFailure, SFTPNoSuchFile, SFTPPermissionDenied
from hostile import AnyKey, Folder, lying, until
from one_parcel import CLIENTS, ME, MEMBERS, PEER, Receiver, parcel_of, pushing
from proxy import Proxy

from hsl_node.errors import TransportError
from hsl_node.federation.names import Kind
from hsl_node.federation.strings import fingerprint
from hsl_node.host.pace import Pace
from hsl_node.sync.send import deliver as deliver_module
from hsl_node.sync.send import push as push_module
from hsl_node.sync.send.deliver import Transfer
from hsl_node.sync.wire import login as refused_module
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.transport import Client, Patience

KEY = MEMBERS.identities[PEER].key
DATA = random.Random(7).randbytes(600_000)
MUCH = 256 * 2**20  # what a server without shame would send
ENOUGH = 24 * 2**20  # what may leave it before the client has gone: packets of the protocols, and buffers of the kernel


class Liar(Folder):
    """Tells its lie while `telling`; then it is honest. Whoever lists its folder is counted: nobody should."""

    telling = True
    listed = 0

    def scandir(self, path: bytes) -> Any:
        type(self).listed += 1
        raise SFTPFailure("../x")


class NothingThere(Liar):
    def stat(self, path: bytes) -> Any:
        if not self.telling:
            return super().stat(path)
        self.lie()
        raise SFTPNoSuchFile("no such file")


class OtherSize(Liar):
    size: int | None = 0

    def stat(self, path: bytes) -> Any:
        found = super().stat(path)
        if not self.telling:
            return found
        self.lie()
        return SFTPAttrs(size=self.size, permissions=0o100600)


class Half(OtherSize):
    size = len(DATA) // 2


class Exabytes(OtherSize):
    size = 2**63


class NoSize(OtherSize):
    size = None


class AllThere(Liar):
    """Shows every file of the inbox, as large as the sender hopes."""

    def stat(self, path: bytes) -> Any:
        if not self.telling or b"inbox/" not in path:
            return super().stat(path)
        self.lie()
        return SFTPAttrs(size=len(DATA), permissions=0o100600)


class RenamesNothing(Liar):
    def rename(self, oldpath: bytes, newpath: bytes) -> Any:
        return self.lie() if self.telling else super().rename(oldpath, newpath)


class RenamesElsewhere(Liar):
    def rename(self, oldpath: bytes, newpath: bytes) -> Any:
        if self.telling:
            self.lie()
            newpath = b"inbox/elsewhere-%d" % random.getrandbits(60)
        return super().rename(oldpath, newpath)


class RefusesRename(Liar):
    def rename(self, oldpath: bytes, newpath: bytes) -> Any:
        if self.telling:
            self.lie()
            raise SFTPFailure("Failure")
        return super().rename(oldpath, newpath)


class FailsToClose(Liar):
    def close(self, file_obj: object) -> Any:
        super().close(file_obj)
        if self.telling:
            self.lie()
            raise SFTPFailure("Disk quota exceeded")


class TruncatesOnClose(Liar):
    def close(self, file_obj: Any) -> Any:
        if self.telling and file_obj.writable():
            self.lie()
            file_obj.truncate(1000)
        return super().close(file_obj)


class KeepsNothing(Liar):
    def write(self, file_obj: object, offset: int, data: bytes) -> Any:
        if self.telling:
            self.lie()
            return len(data)
        return super().write(file_obj, offset, data)


class FlipsBytes(Liar):
    def write(self, file_obj: object, offset: int, data: bytes) -> Any:
        if self.telling:
            self.lie()
            data = bytes([data[0] ^ 1]) + data[1:]
        return super().write(file_obj, offset, data)


class RefusesWrites(Liar):
    def write(self, file_obj: object, offset: int, data: bytes) -> Any:
        if self.telling:
            self.lie()
            raise SFTPFailure("No space left on device")
        return super().write(file_obj, offset, data)


class RefusesToOpen(Liar):
    def open(self, path: bytes, pflags: int, attrs: SFTPAttrs) -> Any:
        if self.telling:
            self.lie()
            raise SFTPPermissionDenied("../../etc/passwd")
        return super().open(path, pflags, attrs)


class FailsToSync(Liar):
    def fsync(self, file_obj: object) -> Any:
        if self.telling:
            self.lie()
            raise SFTPFailure("Input/output error")
        return super().fsync(file_obj)


class ReceiptOfRubbish(Liar):
    """A receipt of random bytes, and as many of them as the sender will read."""

    def stat(self, path: bytes) -> Any:
        if self.telling and b"receipts/" in path:
            return SFTPAttrs(size=100, permissions=0o100600)
        return super().stat(path)

    def open(self, path: bytes, pflags: int, attrs: SFTPAttrs) -> Any:
        if self.telling and b"receipts/" in path:
            Path(self.root, "rubbish").touch()
            path = b"/rubbish"
        return super().open(path, pflags, attrs)

    def read(self, file_obj: Any, offset: int, size: int) -> Any:
        if self.telling:
            self.lie()
            return random.randbytes(200_000)
        return super().read(file_obj, offset, size)


class NeverAnswers(Liar):
    async def stat(self, path: bytes) -> Any:  # type: ignore[override]
        if self.telling:
            self.lie()
            await asyncio.sleep(3600)
        return super().stat(path)


class HangsUp(Liar):
    def write(self, file_obj: object, offset: int, data: bytes) -> Any:
        if self.telling:
            self.lie()
            self.channel.get_connection().abort()
        return super().write(file_obj, offset, data)


LIES = [
    NothingThere, Half, Exabytes, NoSize, AllThere, RenamesNothing, RenamesElsewhere, RefusesRename, FailsToClose,
    TruncatesOnClose, KeepsNothing, FlipsBytes, RefusesWrites, RefusesToOpen, FailsToSync, ReceiptOfRubbish,
    NeverAnswers, HangsUp,
]  # fmt: skip


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("liar", LIES)
def test_threat_18_a_lie_delays_a_delivery_and_never_ends_it(
    liar: type[Liar], client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it lies nothing counts as delivered; when it stops, the very bytes arrive."""
    monkeypatch.setattr(deliver_module, "SILENCE_MAX_S", 0.3)
    monkeypatch.setattr(deliver_module, "LOST", Pace(0.6, 1.8))
    monkeypatch.setattr(push_module, "LOST", Pace(0.01, 0.01))
    patience = Patience(answer_s=0.5) if liar is NeverAnswers else Patience()  # only there a silence is what ends it
    parcel, manifest = parcel_of(tmp_path, DATA)
    receiver = Receiver(tmp_path, manifest, parcel.name)
    for folder in ("parts", "inbox", "receipts"):
        (receiver.home / folder).mkdir(parents=True)

    async def takes(served: Any) -> None:
        while True:
            if not served.telling and all(receiver.path("inbox", k).exists() for k in (Kind.DATA, Kind.MANIFEST)):
                receiver.committed(ME)
            await asyncio.sleep(0.02)

    async def story() -> None:
        async with lying(liar, KEY, receiver.home) as served:
            receiver.port = served.port
            monkeypatch.setattr(served, "telling", True)
            task = pushing(receiver, parcel, transfer := Transfer(PEER), client=client, patience=patience)
            await until(lambda: served.fired > 0 and (transfer.retries > 0 or transfer.state == "waiting for receipt"))
            assert not task.done()
            monkeypatch.setattr(served, "telling", False)
            taking = asyncio.create_task(takes(served))
            assert (await task).accepted
            taking.cancel()
            assert hashlib.sha256(receiver.took[-1]).hexdigest() == manifest.sha256
            assert served.listed == 0, "names of a server's making were asked for"

    asyncio.run(asyncio.wait_for(story(), 120))


class Forgets(Liar):
    """Takes a checkpoint whole and loses it at the rename; every other time it hangs up at the second block."""

    opened = whole = 0
    blocks = 0

    def open(self, path: bytes, pflags: int, attrs: SFTPAttrs) -> Any:
        if self.telling and b"safetensors.part" in path:
            type(self).opened += 1
        return super().open(path, pflags, attrs)

    def write(self, file_obj: object, offset: int, data: bytes) -> Any:
        self.blocks += 1
        if self.telling and self.opened % 2 and self.blocks == 2:
            self.forget()
            self.channel.get_connection().abort()
        return super().write(file_obj, offset, data)

    def rename(self, oldpath: bytes, newpath: bytes) -> Any:
        if not self.telling:
            return super().rename(oldpath, newpath)
        type(self).whole += 1
        self.lie()
        self.forget()
        raise SFTPFailure("Failure")

    def forget(self) -> None:
        for part in (self.root / "parts").iterdir():
            part.unlink()


@pytest.mark.parametrize("client", CLIENTS)
def test_threat_18_a_server_that_takes_checkpoints_and_loses_them_is_sent_them_ever_more_rarely(
    client: Client, tmp_path: Path
) -> None:
    """A short attempt after a long one is no progress, and so no reason to begin the back-off anew."""
    parcel, manifest = parcel_of(tmp_path, DATA)
    receiver = Receiver(tmp_path, manifest, parcel.name)
    for folder in ("parts", "inbox", "receipts"):
        (receiver.home / folder).mkdir(parents=True)
    waits: list[tuple[int, float, float]] = []  # (whole checkpoints taken so far, pause, what a wake cannot shorten)
    told: list[int] = []

    async def story() -> None:
        async with lying(Forgets, KEY, receiver.home) as served:
            receiver.port = served.port
            monkeypatch = pytest.MonkeyPatch()
            enough = asyncio.Event()

            async def wait(seconds: float, wake: asyncio.Event, *, at_least: float) -> None:
                waits.append((served.whole, seconds, at_least))
                if served.whole == 5:
                    monkeypatch.setattr(served, "telling", False)
                    enough.set()

            transfer = Transfer(PEER)
            task = pushing(
                receiver, parcel, transfer, client=client, wait=wait, on_lost=lambda t: told.append(t.lost_bytes)
            )
            try:
                await enough.wait()
                await until(lambda: receiver.path("inbox", Kind.MANIFEST).exists())
                receiver.committed(ME)
                assert (await task).accepted
            finally:
                monkeypatch.undo()
            assert transfer.resent_bytes >= transfer.lost_bytes >= 4 * len(DATA)

    asyncio.run(asyncio.wait_for(story(), 120))
    assert hashlib.sha256(receiver.took[-1]).hexdigest() == manifest.sha256
    long = [seconds for _, seconds, at_least in waits if seconds == at_least >= 1200]
    assert long[0] == 1200 and long[-1] == 3600, "two checkpoints are lost: 20 minutes, then twice that, and so on"
    assert len([w for w in waits if w[0] >= 3]) == len([w for w in waits if w[0] >= 3 and w[1] >= 1200])
    assert told and told[0] >= 2 * len(DATA)


# ---------------------------------------------------------------- packets


def ssh_packet_without_end() -> bytes:
    return b"SSH-2.0-x\r\n" + struct.pack(">I", 2**31 + 4)  # a whole number of blocks


def greeting_without_end() -> bytes:
    return b"SSH-2.0-"


def many_greetings() -> bytes:
    return b"\r\n" * 2000 + b"x" * 100_000


@asynccontextmanager
async def pouring(start: bytes) -> AsyncIterator[tuple[int, list[int]]]:
    """A server that sends `start` and then zeros until the client leaves; the count of bytes is the last element."""
    sent = [0]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):
            writer.write(start)
            while sent[0] < MUCH:
                writer.write(b"x" * 65536)
                await writer.drain()
                sent[0] += 65536
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], sent
    finally:
        server.close()


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("start", [ssh_packet_without_end, greeting_without_end, many_greetings])
def test_threat_15_who_stands_in_between_cannot_fill_our_memory_before_the_keys_are_checked(
    start: Callable[[], bytes], client: Client
) -> None:
    async def story() -> None:
        async with pouring(start()) as (port, sent):
            card = MEMBERS.federation.get(PEER).model_copy(update={"address": f"127.0.0.1:{port}"})
            with pytest.raises(TransportError, match="logging in") as caught:
                async with connect(card, ME, MEMBERS.identities[ME], client=client, patience=Patience(connect_s=20)):
                    pass
            assert "nothing moved" not in caught.value.message, "it was the deadline that ended it"
            assert sent[0] < ENOUGH

    asyncio.run(asyncio.wait_for(story(), 120))


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("length", [2**32 - 1, 2**31, 17 * 2**20])
def test_threat_18_an_answer_without_end_ends_the_connection(length: int, client: Client) -> None:
    sent = 0

    async def answer(process: asyncssh.SSHServerProcess[bytes]) -> None:
        nonlocal sent
        with suppress(asyncio.IncompleteReadError, asyncssh.Error, OSError):
            (size,) = struct.unpack(">I", await process.stdin.readexactly(4))
            await process.stdin.readexactly(size)
            process.stdout.write(struct.pack(">IBI", 5, 2, 3))
            await process.stdin.readexactly(4)
            process.stdout.write(struct.pack(">I", length))
            while sent < MUCH and not process.is_closing():
                process.stdout.write(b"x" * 65536)
                await process.stdout.drain()
                sent += 65536

    async def story() -> None:
        options = {"server_factory": AnyKey, "server_host_keys": [KEY], "process_factory": answer, "encoding": None}
        server = await asyncssh.listen("127.0.0.1", 0, config=None, **options)
        card = MEMBERS.federation.get(PEER).model_copy(update={"address": f"127.0.0.1:{server.get_port()}"})
        with pytest.raises(TransportError) as caught:
            async with connect(card, ME, MEMBERS.identities[ME], client=client) as link:
                await link.size("inbox/x")
        assert "nothing moved" not in caught.value.message, "it was the deadline that ended it"
        server.close()
        assert sent < ENOUGH

    asyncio.run(asyncio.wait_for(story(), 120))


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("client", CLIENTS)
def test_threat_16_a_host_key_swapped_in_mid_run_stops_this_peer_only(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent to the new key, both fingerprints are shown, another peer is served, and the old key mends it."""
    monkeypatch.setattr(refused_module, "KEY_REFUSED_WAIT_S", 0.3)
    rogue_key = asyncssh.generate_private_key("ssh-ed25519")

    async def story() -> None:
        parcel, manifest = parcel_of(tmp_path, DATA)
        receivers = [Receiver(tmp_path / n, manifest, parcel.name) for n in ("swapped", "rogue", "other")]
        for receiver in receivers:
            for folder in ("parts", "inbox", "receipts"):
                (receiver.home / folder).mkdir(parents=True)
        swapped, rogue, other = receivers
        async with (
            lying(Folder, KEY, swapped.home) as right,
            lying(Folder, rogue_key, rogue.home) as wrong,
            lying(Folder, KEY, other.home) as elsewhere,
            Proxy(wrong.port) as net,
        ):
            other.port = elsewhere.port
            delayed = pushing(swapped, parcel, transfer := Transfer(PEER), port=net.port, client=client)
            await until(lambda: transfer.retries > 1)
            for key in (rogue_key, KEY):
                assert fingerprint(key.export_public_key("openssh").decode()) in transfer.last_error
            assert not any(p.is_file() for p in rogue.home.rglob("*"))
            await answered(pushing(other, parcel, Transfer(PEER), client=client), other)
            net.target_port = right.port
            await answered(delayed, swapped)

    asyncio.run(asyncio.wait_for(story(), 120))


async def answered(task: Awaitable[Any], receiver: Receiver) -> None:
    await until(receiver.path("inbox", Kind.MANIFEST).exists)
    receiver.committed(ME)
    assert (await task).accepted
    assert receiver.took == [DATA]
