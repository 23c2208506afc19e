"""Who may connect to the embedded inbox, what is served there and what is logged.

The honest peer works after each attack.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from asyncssh.sftp import SFTPError
from boxes import BIRCH, CEDAR, DATA, inbox, on_loop, put

from hsl_node.errors import LocalStateError
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Peer
from hsl_node.sync.inbox import link as link_module

# ---------------------------------------------------------------- who may come in (threats 14, 15, 17)


@pytest.mark.parametrize(
    ("key_of", "user"),
    [("birch", "cedar"), ("cedar", "birch"), ("birch", "ash"), ("ash", "ash"), ("birch", ""), ("birch", "root"),
     ("birch", "BIRCH"), ("stranger", "birch"), ("stranger", "stranger"), ("rsa", "birch"), ("ecdsa", "birch")],
)  # fmt: skip
@on_loop
async def test_threat_14_only_a_pinned_key_with_its_own_name_logs_in(tmp_path: Path, key_of: str, user: str) -> None:
    async with inbox(tmp_path) as box:
        made = {"stranger": "ssh-ed25519", "rsa": "ssh-rsa", "ecdsa": "ecdsa-sha2-nistp256"}
        key = (
            asyncssh.generate_private_key(made[key_of]) if key_of in made else box.members.identities[Peer(key_of)].key
        )
        with pytest.raises((asyncssh.PermissionDenied, asyncssh.IllegalUserName)):
            await box.connect(Peer(user), key)
        assert box.connects == []
        await box.honest()


@on_loop
async def test_threat_14_a_public_key_is_not_enough(tmp_path: Path) -> None:
    """birch offers cedar's public key, as everybody knows it, and signs with its own."""
    async with inbox(tmp_path) as box:
        forged = asyncssh.load_keypairs([box.members.identities[BIRCH].key])[0]
        forged.public_data = box.members.identities[CEDAR].key.public_data
        with pytest.raises(asyncssh.PermissionDenied):
            await box.connect(CEDAR, client_keys=[forged])
        with pytest.raises(asyncssh.PermissionDenied):
            await box.connect(BIRCH, client_keys=[forged, box.members.identities[CEDAR].key])
        assert box.connects == []
        await box.honest()


@on_loop
async def test_threat_14_the_right_key_after_wrong_ones_is_the_one_that_counts(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box:
        keys = [box.members.identities[p].key for p in (CEDAR, BIRCH)]
        async with box.connect(BIRCH, client_keys=keys) as connection, connection.start_sftp_client() as client:
            await put(client, box.name(BIRCH), DATA)
            with pytest.raises(SFTPError):
                await client.open(f"parts/{box.name(CEDAR).as_part()}", "xb")
        assert box.connects == [BIRCH] and box.counted.auth_failures == 1


@on_loop
async def test_threat_14_so_many_wrong_keys_and_no_more(tmp_path: Path) -> None:
    async with inbox(tmp_path, login_attempts=3) as box:
        keys = [asyncssh.generate_private_key("ssh-ed25519") for _ in range(8)]
        with pytest.raises(asyncssh.PermissionDenied):
            await box.connect(BIRCH, client_keys=keys)
        assert box.counted.auth_failures == 3
        await box.honest()


@pytest.mark.parametrize("method", ["password", "keyboard-interactive", "hostbased", "none", "gssapi-with-mic"])
@on_loop
async def test_threat_14_no_other_way_to_log_in(tmp_path: Path, method: str) -> None:
    async with inbox(tmp_path) as box:
        with pytest.raises(asyncssh.PermissionDenied):
            await box.connect(BIRCH, client_keys=None, password="x", preferred_auth=method)
        assert box.connects == []


@on_loop
async def test_threat_14_certificates_are_no_second_way_in(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box:
        key = asyncssh.generate_private_key("ssh-ed25519")
        authority = box.members.identities[BIRCH].key
        certificate = authority.generate_user_certificate(key, "birch", principals=["birch"])
        with pytest.raises(asyncssh.PermissionDenied):
            await box.connect(BIRCH, client_keys=[(key, certificate)])


@pytest.mark.parametrize(
    "options",
    [
        {"encryption_algs": ["aes256-ctr"]}, {"encryption_algs": ["aes256-cbc"]}, {"encryption_algs": ["3des-cbc"]},
        {"encryption_algs": ["chacha20-poly1305@openssh.com"]}, {"kex_algs": ["diffie-hellman-group14-sha1"]},
        {"kex_algs": ["diffie-hellman-group-exchange-sha256"]}, {"kex_algs": ["ecdh-sha2-nistp256"]},
        {"server_host_key_algs": ["rsa-sha2-512"], "known_hosts": None}, {"compression_algs": ["zlib@openssh.com"]},
    ],
    ids=str,
)  # fmt: skip
@on_loop
async def test_threat_15_weaker_algorithms_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    async with inbox(tmp_path) as box:
        with pytest.raises((asyncssh.KeyExchangeFailed, asyncssh.ConnectionLost)):
            await box.connect(BIRCH, **options)
        await box.honest()


@pytest.mark.parametrize("kex", ["mlkem768x25519-sha256", "curve25519-sha256", "curve25519-sha256@libssh.org"])
@on_loop
async def test_each_modern_key_exchange_works(tmp_path: Path, kex: str) -> None:
    async with inbox(tmp_path) as box, box.connect(BIRCH, kex_algs=[kex]) as connection:
        assert connection.get_extra_info("recv_cipher") == "aes128-gcm@openssh.com"


@on_loop
async def test_threat_17_a_revoked_key_is_cut_in_mid_transfer_and_stays_out(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box:
        connection = await box.connect()
        client = await connection.start_sftp_client()
        file = await client.open(f"parts/{box.name().as_part()}", "xb")
        await file.write(DATA[:1000])
        box.admission.trust(Keyring.of(box.members.federation).revoking(BIRCH, ""))
        await asyncio.wait_for(connection.wait_closed(), 60)
        with pytest.raises((SFTPError, OSError)):
            await file.write(DATA[1000:], 1000)
        with pytest.raises(asyncssh.PermissionDenied):
            await box.connect()
        await box.honest()


# ---------------------------------------------------------------- nothing but sftp


async def _forward(connection: asyncssh.SSHClientConnection) -> None:
    await connection.open_connection("127.0.0.1", 22)


SERVICES: dict[str, Callable[[asyncssh.SSHClientConnection], Awaitable[Any]]] = {
    "shell": lambda c: c.create_process(),
    "exec": lambda c: c.create_process("id > /tmp/owned"),
    "scp": lambda c: c.create_process("scp -t /tmp"),
    "pty": lambda c: c.create_process(term_type="xterm", subsystem="sftp"),
    "netconf": lambda c: c.create_process(subsystem="netconf"),
    "direct-tcpip": _forward,
    "direct-streamlocal": lambda c: c.open_unix_connection("/run/docker.sock"),
    "remote port": lambda c: c.forward_remote_port("", 0, "127.0.0.1", 9),
    "remote socket": lambda c: c.forward_remote_path("/tmp/x.sock", "/tmp/y.sock"),
    "tun": lambda c: c.create_tun(asyncssh.SSHTunTapSession),
}


@pytest.mark.parametrize("service", SERVICES)
@on_loop
async def test_threat_04_nothing_but_sftp_is_served(tmp_path: Path, service: str) -> None:
    async with inbox(tmp_path) as box, box.connect() as connection:
        if service == "pty":  # refused without ending the session: nothing is attached to it
            with suppress(asyncssh.ChannelOpenError):
                await SERVICES[service](connection)
            assert all(
                fs.channel.get_terminal_type() is None for link in box.admission.links for fs in link._filesystems
            )
        else:
            with pytest.raises((asyncssh.ChannelOpenError, asyncssh.ChannelListenError)):
                await SERVICES[service](connection)
        await box.honest()


@on_loop
async def test_threat_04_agent_forwarding_is_refused(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.connect(agent_forwarding=True) as connection:
        await connection.start_sftp_client()
        (link,) = box.admission.links
        assert link.conn.get_agent_path() is None


@on_loop
async def test_only_version_3_of_sftp_is_spoken(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box, box.connect() as connection:
        client = await connection.start_sftp_client(sftp_version=6)
        assert client.version == 3
        await put(client, box.name(), DATA)


# ---------------------------------------------------------------- logs and disk


@on_loop
async def test_threat_20_strings_of_peers_are_escaped_and_log_lines_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hsl_node")
    async with inbox(tmp_path, log_lines_per_minute=10) as box:
        with pytest.raises(asyncssh.PermissionDenied):
            await box.connect(Peer("root" * 100), asyncssh.generate_private_key("ssh-ed25519"))
        async with box.sftp() as client:
            for i in range(100):
                with pytest.raises(SFTPError):
                    await client.stat(b"parts/\x1b[31m\nforged line " + str(i).encode() * 300)
        assert box.rejected("name") == 100
    lines = [
        r for r in caplog.records if r.name == "hsl_node.sync.inbox.admission" and r.getMessage() == "request refused"
    ]
    assert len(lines) == 10
    for record in caplog.records:
        for value in vars(record).values():
            if isinstance(value, str) and record.name.startswith("hsl_node"):
                assert value.isprintable() and len(value) <= 300, value


@on_loop
async def test_a_port_in_use_is_named_and_tried_again_by_the_service(tmp_path: Path) -> None:
    async with inbox(tmp_path) as box:
        with pytest.raises(LocalStateError, match=str(box.port)):
            await box.server.start("127.0.0.1", box.port)


@on_loop
async def test_threat_12_a_login_that_nobody_lives_to_use_makes_no_second_process(tmp_path: Path) -> None:
    """The last packet of a killed node's login may come after its successor has logged in."""
    async with inbox(tmp_path) as box:
        told: list[bool] = []
        box.admission.on_twice = lambda peer, twice: told.append(twice)

        async def log_in(run: str, *, asks: bool = True) -> None:
            async with box.connect(BIRCH, client_version=f"hsl1_{run * 16}") as connection:
                if asks:
                    await connection.start_sftp_client()

        for run, asks in (("a", True), ("b", True), ("a", False), ("b", True)):
            await log_in(run, asks=asks)
        assert told == [False] * 3
        await log_in("a")
        assert told[3:] == [True], "it asks for something, so it lives"


@on_loop
async def test_a_peer_that_asks_again_after_a_silence_has_shown_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its connection, so no login tells."""
    async with inbox(tmp_path) as box, box.sftp(CEDAR) as client:
        await client.stat(b"inbox")
        assert box.connects == [CEDAR]
        monkeypatch.setattr(link_module, "AGAIN_S", 0.0)
        await client.stat(b"inbox")
        assert box.connects == [CEDAR, CEDAR]


@on_loop
async def test_two_processes_that_keep_their_connections_are_found_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone beside the original: it does not log in again, but asks after the other one did."""
    found: list[bool] = []
    monkeypatch.setattr(link_module, "LATER_S", 0.0)
    async with inbox(tmp_path) as box:
        box.admission.on_twice = lambda peer, twice: found.append(twice)

        async def use(client: asyncssh.SFTPClient) -> None:
            monkeypatch.setattr(link_module, "AGAIN_S", 0.0)
            await client.stat(b"inbox")
            monkeypatch.setattr(link_module, "AGAIN_S", 3600.0)
            await client.stat(b"inbox")

        async with (
            box.connect(client_version=f"hsl1_{1:016x}") as one,
            one.start_sftp_client() as original,
            box.connect(client_version=f"hsl1_{2:016x}") as two,
            two.start_sftp_client() as clone,
        ):
            await use(clone)
            assert found and not any(found), "the original may have ended"
            await use(original)
            assert found[-1] is True
