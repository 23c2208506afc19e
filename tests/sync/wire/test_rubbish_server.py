"""Whoever answers at a peer's address, and whatever it says there: it costs one attempt, never the node."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import asyncssh
import pytest
from hostile import AnyKey

from hsl_node.errors import TransportError
from hsl_node.federation.config import PeerCard
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import Peer
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.transport import Client

CLIENTS: tuple[Client, ...] = ("asyncssh", "paramiko")
KEY = Identity(asyncssh.generate_private_key("ssh-ed25519"))
HOST = Identity(asyncssh.generate_private_key("ssh-ed25519"))


def card(port: int) -> PeerCard:
    return PeerCard(name="evil", address=f"127.0.0.1:{port}", key=HOST.public)


@contextmanager
def greeting(words: bytes) -> Iterator[int]:
    """A TCP server that says these words to everybody and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(words)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    "words",
    [b"SSH-2.0-\xff\xfe\r\n", b"\0" * 300, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n" + b"\xff" * 99],
)
def test_threat_18_a_server_that_greets_with_rubbish_is_a_transport_error(client: Client, words: bytes) -> None:
    async def story(port: int) -> None:
        async with connect(card(port), Peer("good"), KEY, client=client):
            raise AssertionError("logged in to rubbish")

    with greeting(words) as port, pytest.raises(TransportError):
        asyncio.run(story(port))


def status(number: int, text: bytes, more: bytes = b"") -> bytes:
    return b"\x65" + struct.pack(">II", number, 4) + struct.pack(">I", len(text)) + text + b"\0\0\0\0" + more


ANSWERS = {
    "bytes after the end": lambda number: status(number, b"no", b"more and more"),
    "text that is no text": lambda number: status(number, b"\xff\xfe\xfd"),
    "a handle where attributes belong": lambda number: b"\x66" + struct.pack(">II", number, 4) + b"hand",
    "nothing of the kind": lambda number: b"\xfa" + struct.pack(">I", number) + b"\xff" * 40,
}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("kind", ANSWERS)
def test_threat_18_a_server_that_answers_with_rubbish_is_a_transport_error(client: Client, kind: str) -> None:
    async def answer(process: asyncssh.SSHServerProcess[bytes]) -> None:
        async def packet() -> bytes:
            (size,) = struct.unpack(">I", await process.stdin.readexactly(4))
            return await process.stdin.readexactly(size)

        def say(body: bytes) -> None:
            process.stdout.write(struct.pack(">I", len(body)) + body)

        try:
            await packet()
            say(b"\x02" + struct.pack(">I", 3))
            while True:
                request = await packet()
                say(ANSWERS[kind](struct.unpack(">I", request[1:5])[0]))
        except (asyncio.IncompleteReadError, asyncssh.Error, OSError):
            process.exit(0)

    async def story() -> None:
        server = await asyncssh.listen(
            "127.0.0.1", 0, server_factory=AnyKey, server_host_keys=[HOST.key], process_factory=answer, encoding=None
        )
        try:
            async with connect(card(server.get_port()), Peer("good"), KEY, client=client) as link:
                await link.size("inbox/x")
        finally:
            server.close()

    with pytest.raises(TransportError):
        asyncio.run(asyncio.wait_for(story(), 120))
