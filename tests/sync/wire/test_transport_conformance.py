"""One suite for every way to reach a peer: clients asyncssh and paramiko, servers our own inbox and OpenSSH's sshd."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from every_transport import FINAL, ME, MEMBERS, PART, PEER, SIZE, Inbox, content, ignore, serve
from sshd import REQUESTS

from hsl_node.errors import KeyRefused, LocalStateError, TransportError
from hsl_node.federation.identity import Identity
from hsl_node.federation.strings import fingerprint
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.transport import BLOCK_BYTES, Client, OperationFailed, Transport


def test_a_file_that_is_not_there_has_no_size(over: Callable[..., None]) -> None:
    async def scenario(link: Transport, inbox: Inbox) -> None:
        assert await link.size(PART) is None
        assert await link.size(FINAL) is None

    over(scenario)


def test_a_file_arrives_byte_for_byte_and_progress_tells_how_far_it_is(
    over: Callable[..., None], tmp_path: Path
) -> None:
    async def scenario(link: Transport, inbox: Inbox) -> None:
        ends: list[int] = []
        (tmp_path / "data").write_bytes(content())
        await link.write(PART, tmp_path / "data", 0, create=True, progress=ends.append)
        assert (inbox.home / PART).read_bytes() == content()
        assert ends == sorted(set(ends)) and len(ends) >= 4 and ends[-1] == SIZE
        assert {BLOCK_BYTES, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES} < set(ends)  # no piece is of two blocks
        assert await link.size(PART) == SIZE

    over(scenario)


def test_a_document_in_memory_is_sent_like_a_file(over: Callable[..., None]) -> None:
    async def scenario(link: Transport, inbox: Inbox) -> None:
        await link.write(PART, b"a signed line\n", 0, create=True, progress=ignore)
        assert (inbox.home / PART).read_bytes() == b"a signed line\n"

    over(scenario)


def test_creating_is_exclusive(over: Callable[..., None]) -> None:
    async def scenario(link: Transport, inbox: Inbox) -> None:
        await link.write(PART, b"first", 0, create=True, progress=ignore)
        with pytest.raises(OperationFailed):
            await link.write(PART, b"other", 0, create=True, progress=ignore)
        assert (inbox.home / PART).read_bytes() == b"first"
        assert await link.size(PART) == 5  # the connection goes on

    over(scenario)


def test_writing_without_create_makes_no_file(over: Callable[..., None]) -> None:
    async def scenario(link: Transport, inbox: Inbox) -> None:
        with pytest.raises(OperationFailed):
            await link.write(PART, b"bytes", 0, create=False, progress=ignore)
        assert await link.size(PART) is None

    over(scenario)


def test_a_part_is_resumed_at_an_offset_and_what_lies_before_stays(over: Callable[..., None]) -> None:
    async def scenario(link: Transport, inbox: Inbox) -> None:
        (inbox.home / PART).write_bytes(content(seed=2)[: 2 * BLOCK_BYTES + 77])
        ends: list[int] = []
        await link.write(PART, content(), BLOCK_BYTES, create=False, progress=ends.append)
        assert (inbox.home / PART).read_bytes() == content(seed=2)[:BLOCK_BYTES] + content()[BLOCK_BYTES:]
        assert BLOCK_BYTES < ends[0] <= 2 * BLOCK_BYTES and 2 * BLOCK_BYTES in ends

    over(scenario)


def test_writing_does_not_truncate(over: Callable[..., None]) -> None:
    async def scenario(link: Transport, inbox: Inbox) -> None:
        (inbox.home / PART).write_bytes(content())
        await link.write(PART, b"short", 0, create=False, progress=ignore)
        assert (inbox.home / PART).read_bytes() == b"short" + content()[5:]

    over(scenario)


def test_rename_never_overwrites(over: Callable[..., None]) -> None:
    async def scenario(link: Transport, inbox: Inbox) -> None:
        await link.write(PART, content(), 0, create=True, progress=ignore)
        await link.rename(PART, FINAL)
        assert await link.size(PART) is None
        await link.write(PART, content(seed=2), 0, create=True, progress=ignore)
        with pytest.raises(OperationFailed):
            await link.rename(PART, FINAL)
        assert (inbox.home / FINAL).read_bytes() == content()
        assert await link.size(PART) == SIZE

    over(scenario)


def test_ranges_are_read_and_end_with_the_file(over: Callable[..., None]) -> None:
    async def scenario(link: Transport, inbox: Inbox) -> None:
        (inbox.home / PART).write_bytes(content())
        assert await link.read(PART, 0, 10) == content()[:10]
        assert await link.read(PART, 7, BLOCK_BYTES) == content()[7 : 7 + BLOCK_BYTES]
        assert await link.read(PART, SIZE - 5, 100) == content()[-5:]
        assert await link.read(PART, SIZE + 5, 100) == b""

    over(scenario)


def test_a_removed_part_is_gone_and_cannot_be_removed_again(over: Callable[..., None]) -> None:
    async def scenario(link: Transport, inbox: Inbox) -> None:
        await link.write(PART, b"bytes", 0, create=True, progress=ignore)
        await link.remove(PART)
        assert await link.size(PART) is None
        with pytest.raises(OperationFailed):
            await link.remove(PART)

    over(scenario)


def test_a_large_file_arrives_whole(over: Callable[..., None], tmp_path: Path) -> None:
    size = 24 * 1024 * 1024 + 3
    data = content(size)
    (tmp_path / "data").write_bytes(data)

    async def scenario(link: Transport, inbox: Inbox) -> None:
        await link.write(PART, tmp_path / "data", 0, create=True, progress=ignore)
        assert hashlib.sha256((inbox.home / PART).read_bytes()).digest() == hashlib.sha256(data).digest()

    over(scenario, size=size)


def test_a_server_without_fsync_is_good_enough(client: Client, tmp_path: Path) -> None:
    """As SFTPGo, or an older whitelist."""

    async def main() -> None:
        async with serve("sshd", tmp_path, requests=REQUESTS.replace(",fsync", "")) as inbox:
            async with connect(inbox.card, ME, inbox.identity, client=client) as link:
                await link.write(PART, content(), 0, create=True, progress=ignore)
            assert (inbox.home / PART).read_bytes() == content()

    asyncio.run(main())


def test_a_file_of_ours_that_cannot_be_read_is_our_error(client: Client, tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            serve("embedded", tmp_path, size=40 * BLOCK_BYTES) as inbox,
            connect(inbox.card, ME, inbox.identity, client=client) as link,
        ):
            with pytest.raises(LocalStateError, match="missing"):
                await link.write(PART, tmp_path / "missing", 0, create=True, progress=ignore)
            data = tmp_path / "data"
            data.write_bytes(content(40 * BLOCK_BYTES))
            with pytest.raises(LocalStateError, match="shorter"):
                await link.write(PART, data, 0, create=True, progress=lambda end: data.write_bytes(b""))

    asyncio.run(main())


# ---------------------------------------------------------------- keys and algorithms


def test_threat_16_another_host_key_is_refused_and_both_fingerprints_are_shown(
    client: Client, server: str, tmp_path: Path
) -> None:
    async def main() -> None:
        pinned = Identity(asyncssh.generate_private_key("ssh-ed25519")).public
        async with serve(server, tmp_path) as inbox:
            real = inbox.card.host_key or inbox.card.key
            card = inbox.card.model_copy(update={"host_key": pinned})
            with pytest.raises(KeyRefused) as caught:
                async with connect(card, ME, inbox.identity, client=client):
                    pass
            assert fingerprint(real) in caught.value.message
            assert fingerprint(pinned) in caught.value.message

    asyncio.run(main())


def test_a_key_that_the_peer_does_not_know_is_refused_and_named(client: Client, server: str, tmp_path: Path) -> None:
    async def main() -> None:
        stranger = Identity(asyncssh.generate_private_key("ssh-ed25519"))
        async with serve(server, tmp_path) as inbox:
            with pytest.raises(KeyRefused) as caught:
                async with connect(inbox.card, ME, stranger, client=client):
                    pass
            assert stranger.fingerprint in caught.value.message

    asyncio.run(main())


@pytest.mark.parametrize(
    "weak",
    [
        {"encryption_algs": ["aes256-ctr"]},
        {"encryption_algs": ["chacha20-poly1305@openssh.com"]},
        {"kex_algs": ["diffie-hellman-group14-sha1"]},
        {"kex_algs": ["ecdh-sha2-nistp256"]},
        {"server_host_keys": "rsa"},
    ],
    ids=["ctr", "chacha", "sha1", "nist", "rsa"],
)
def test_threat_15_a_server_with_other_algorithms_only_is_refused(client: Client, weak: dict[str, Any]) -> None:
    class AnyKey(asyncssh.SSHServer):
        def public_key_auth_supported(self) -> bool:
            return True

        def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
            return True

    async def main() -> None:
        key = MEMBERS.identities[PEER].key
        options = {"server_host_keys": [key], **weak}
        if weak.get("server_host_keys") == "rsa":
            options["server_host_keys"] = [asyncssh.generate_private_key("ssh-rsa", key_size=2048)]
        rogue = await asyncssh.listen("127.0.0.1", 0, server_factory=AnyKey, sftp_factory=True, config=None, **options)
        card = MEMBERS.federation.get(PEER).model_copy(update={"address": f"127.0.0.1:{rogue.get_port()}"})
        with pytest.raises(TransportError, match="logging in"):  # not even a key is shown to it
            async with connect(card, ME, MEMBERS.identities[ME], client=client):
                pass
        rogue.close()
        await rogue.wait_closed()

    asyncio.run(main())


def test_threat_15_neither_the_agent_nor_the_users_ssh_files_are_used(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = tmp_path / "user" / ".ssh"
    ssh.mkdir(parents=True)
    (ssh / "config").write_text("Host *\n  Port 1\n  User nobody\n  ProxyCommand false\n  Ciphers aes256-ctr\n")
    (ssh / "known_hosts").write_text("* ssh-ed25519 broken\n")
    (ssh / "id_ed25519").write_text("not a key")
    agent = socket.socket(socket.AF_UNIX)
    agent.bind(str(tmp_path / "agent"))
    agent.listen()
    agent.setblocking(False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))

    async def main() -> None:
        async with (
            serve("embedded", tmp_path) as inbox,
            connect(inbox.card, ME, inbox.identity, client=client) as link,
        ):
            assert await link.size(PART) is None

    asyncio.run(main())
    with agent, pytest.raises(BlockingIOError):
        agent.accept()  # nobody asked the agent
