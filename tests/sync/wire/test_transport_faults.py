"""Broken links, full disks and cancelled tasks, for both clients."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import asyncssh
import pytest
from every_transport import HURRIED, ME, MEMBERS, PART, PEER, content, ignore, serve
from hostile import until
from ports import free_ports
from proxy import Proxy

from hsl_node.errors import TransportError
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.transport import BLOCK_BYTES, Client, OperationFailed, Patience


def test_a_peer_that_does_not_listen_cannot_be_reached(client: Client) -> None:
    async def main() -> None:
        (port,) = free_ports(1)
        card = MEMBERS.federation.get(PEER).model_copy(update={"address": f"127.0.0.1:{port}"})
        with pytest.raises(TransportError, match="cannot be reached: connection refused") as caught:
            async with connect(card, ME, MEMBERS.identities[ME], client=client):
                pass
        assert "nothing listens there" in caught.value.remedy

    asyncio.run(main())


def test_threat_25_a_cut_connection_ends_the_transfer_at_once(client: Client, server: str, tmp_path: Path) -> None:
    async def main() -> None:
        size = 12 * BLOCK_BYTES
        async with serve(server, tmp_path, size=size) as inbox, Proxy(inbox.port) as net:
            with pytest.raises(TransportError) as caught:
                async with connect(inbox.via(net.port), ME, inbox.identity, client=client) as link:
                    net.cut_after = net.bytes_up + 5 * BLOCK_BYTES
                    await link.write(PART, content(size), 0, create=True, progress=ignore)
            assert not isinstance(caught.value, OperationFailed)
            assert net.cuts == 1
            present = (inbox.home / PART).read_bytes()
            assert present == content(size)[: len(present)]

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["hole", "deaf"])
def test_threat_25_a_connection_on_which_nothing_moves_is_given_up(
    client: Client, server: str, fault: str, tmp_path: Path
) -> None:
    async def main() -> None:
        size = 40 * BLOCK_BYTES
        async with serve(server, tmp_path, size=size) as inbox, Proxy(inbox.port) as net:

            def fail(end: int) -> None:
                setattr(net, fault, True)

            while not getattr(net, fault):  # a busy machine may be silent for a second before that
                with pytest.raises(TransportError, match="nothing moved"):
                    async with connect(
                        inbox.via(net.port), ME, inbox.identity, client=client, patience=HURRIED
                    ) as link:
                        await link.write(PART, content(size), 0, create=not (inbox.home / PART).exists(), progress=fail)
            assert net.swallowed

    asyncio.run(main())


def test_threat_25_a_server_that_never_greets_is_given_up(client: Client) -> None:
    async def main() -> None:
        async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        mute = await asyncio.start_server(silence, "127.0.0.1", 0)
        port = mute.sockets[0].getsockname()[1]
        card = MEMBERS.federation.get(PEER).model_copy(update={"address": f"127.0.0.1:{port}"})
        with pytest.raises(TransportError):
            async with connect(card, ME, MEMBERS.identities[ME], client=client, patience=Patience(connect_s=0.5)):
                pass
        mute.close()

    asyncio.run(main())


def test_a_slow_link_gets_the_time_it_needs(client: Client, tmp_path: Path) -> None:
    """The whole transfer takes longer than any single deadline: 4.2 s at 20 Mbit/s, 2.5 s for each of 40 blocks."""

    async def main() -> None:
        size = 40 * BLOCK_BYTES
        patience = Patience(answer_s=2, slowest_bytes_per_s=2 * BLOCK_BYTES)
        async with serve("embedded", tmp_path, size=size) as inbox, Proxy(inbox.port) as net:
            net.bits_per_s = 20e6
            card = inbox.via(net.port)
            async with connect(card, ME, inbox.identity, client=client, patience=patience) as link:
                began = asyncio.get_running_loop().time()
                await link.write(PART, content(size), 0, create=True, progress=ignore)
                assert asyncio.get_running_loop().time() - began > patience.for_bytes(BLOCK_BYTES)
            assert (inbox.home / PART).read_bytes() == content(size)

    asyncio.run(main())


def test_threat_21_a_full_disk_at_the_peer_is_noticed(client: Client) -> None:
    """Pipelined writes are answered later; none of the answers may get lost (paramiko#79)."""

    class Full(asyncssh.SFTPServer):
        stored = 0

        def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> object:
            return object()

        def write(self, file_obj: object, offset: int, data: bytes) -> int:
            if BLOCK_BYTES <= offset < 3 * BLOCK_BYTES:  # full for a moment only: the size will be right
                raise OSError(28, "No space left on device")
            return len(data)

        def fsync(self, file_obj: object) -> None:
            pass

        def close(self, file_obj: object) -> None:
            pass

    class AnyKey(asyncssh.SSHServer):
        def public_key_auth_supported(self) -> bool:
            return True

        def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
            return True

    async def main() -> None:
        listener = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_factory=AnyKey,
            sftp_factory=Full,
            config=None,
            server_host_keys=[MEMBERS.identities[PEER].key],
        )
        card = MEMBERS.federation.get(PEER).model_copy(update={"address": f"127.0.0.1:{listener.get_port()}"})
        async with connect(card, ME, MEMBERS.identities[ME], client=client) as link:
            with pytest.raises(OperationFailed, match=r"sending"):
                await link.write(PART, content(4 * BLOCK_BYTES), 0, create=True, progress=ignore)
        listener.close()
        await listener.wait_closed()

    asyncio.run(main())


@pytest.mark.parametrize("moment", ["logging in", "sending", "waiting"])
def test_a_cancelled_task_leaves_no_task_no_thread_and_no_connection(
    client: Client, moment: str, tmp_path: Path
) -> None:
    async def main() -> None:
        size = 40 * BLOCK_BYTES
        async with serve("embedded", tmp_path, size=size) as inbox, Proxy(inbox.port) as net:
            reached = asyncio.Event()

            async def work() -> None:
                async with connect(inbox.via(net.port), ME, inbox.identity, client=client) as link:
                    if moment == "waiting":
                        reached.set()
                        await asyncio.sleep(3600)
                    net.hole = True
                    await link.write(PART, content(size), 0, create=True, progress=ignore)

            net.hole = moment == "logging in"
            task = asyncio.create_task(work())
            await until(lambda: reached.is_set() if moment == "waiting" else net.swallowed)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            net.hole = False
            await until(lambda: not net.live)  # the proxy has seen the connection end
        await until(lambda: len(asyncio.all_tasks()) == 1)
        pool = ("asyncio_", "MainThread")  # the event loop's own threads live as long as the loop
        assert not [t for t in threading.enumerate() if not t.name.startswith(pool)]

    asyncio.run(main())
