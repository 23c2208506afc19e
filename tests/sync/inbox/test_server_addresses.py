"""Where the inbox listens: "::" is every address, of IPv6 and of IPv4."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path
from typing import Any

import pytest
from boxes import inbox, on_loop
from ports import free_ports

from hsl_node.admin import enrol
from hsl_node.errors import LocalStateError
from hsl_node.federation.node_toml import load_node
from hsl_node.node.checks import require_port

with_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")


async def greeting(host: str, port: int) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    line = await reader.readline()
    writer.close()
    return line


@with_ipv6
@on_loop
async def test_an_inbox_that_listens_everywhere_is_found_by_both_kinds_of_address(tmp_path: Path) -> None:
    """Once "[::]" was IPv6 alone, and "0.0.0.0" is IPv4 alone."""
    async with inbox(tmp_path, host="::") as box:
        for host in ("127.0.0.1", "::1"):
            assert await greeting(host, box.port) == b"SSH-2.0-hsl1\r\n"
        async with box.connect():  # by way of IPv4
            assert "127.0.0.1" in box.admission._sources  # as the federation file writes it, not ::ffff:127.0.0.1
    async with inbox(tmp_path, host="0.0.0.0") as box:
        with pytest.raises(OSError):
            await greeting("::1", box.port)


@on_loop
async def test_a_machine_without_ipv6_listens_at_every_address_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, asked = socket.create_server, []

    def without(address: Any, *, family: int = socket.AF_INET, **more: Any) -> socket.socket:
        asked.append(family)
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return create(address, family=family, **more)

    monkeypatch.setattr(socket, "create_server", without)
    async with inbox(tmp_path, host="::") as box:
        assert await greeting("127.0.0.1", box.port) == b"SSH-2.0-hsl1\r\n"
    assert asked == [socket.AF_INET6, socket.AF_INET]


@pytest.mark.parametrize("taken", ["127.0.0.1", pytest.param("::1", marks=with_ipv6)])
def test_a_port_that_another_program_has_at_either_kind_of_address_is_not_free(taken: str) -> None:
    family = socket.AF_INET6 if ":" in taken else socket.AF_INET
    with socket.create_server((taken, 0), family=family) as other:
        port = other.getsockname()[1]
        with pytest.raises(LocalStateError, match=r"cannot listen there: Address already in use"):
            require_port(f"[::]:{port}")


@with_ipv6
@pytest.mark.parametrize("address", ["[::1]:{}", "127.0.0.1:{}"])
@on_loop
async def test_what_init_writes_listens_at_the_address_that_it_was_given(tmp_path: Path, address: str) -> None:
    (port,) = free_ports(1)
    given = address.format(port)
    enrol.init(tmp_path / "ash", name="ash", address=given, listen=None, data=None)
    assert load_node(tmp_path / "ash").listen == f"[::]:{port}"
    async with inbox(tmp_path, host="::") as box:
        host = given.rpartition(":")[0].strip("[]")
        assert await greeting(host, box.port) == b"SSH-2.0-hsl1\r\n"
