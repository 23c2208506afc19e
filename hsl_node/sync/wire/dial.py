"""Reach a peer by any of its addresses: the next one after a moment, and each before the peer is called wrong.

A name may have two addresses of which one leads nowhere, or to another machine: a tunnel that was given up, an address
of IPv6 that nobody looks after. Then the other one is the peer.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any, TypeVar

from hsl_node.errors import KeyRefused, TransportError
from hsl_node.sync.wire.resolver import Addresses, addresses
from hsl_node.sync.wire.sockets import tune
from hsl_node.sync.wire.transport import Login, OtherHostKey

T = TypeVar("T")
Found = tuple[Any, ...]  # one of `Addresses`

NEXT_S = 0.25  # RFC 8305
ADDRESSES_MAX = 8  # of a name, which is the peer's: each takes up to a login's time here, and is called by 63 others
# This machine has no way to such addresses, which says nothing of the peer.
_NO_WAY = (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


async def reach(login: Login, seconds: float, log_in: Callable[[Login, socket.socket], Awaitable[T]]) -> T:
    """What `log_in` makes of the first socket at which the peer itself answers. The socket is then `log_in`'s to close.

    `seconds`: to look up the name and to connect.

    Raises:
        KeyRefused: the peer does not accept our key, or whoever can be reached at its addresses shows another key.
        TransportError: name unknown, nobody listens, no answer, or no login.
    """
    untried = await _look_up(login, seconds)
    failed: list[KeyRefused | TransportError] = []
    while untried:
        try:
            sock, found = await _first(login, untried, seconds)
        except TransportError as exc:
            failed.append(exc)
            break
        except OSError:  # no way to any of those that are left
            break
        untried.remove(found)
        try:
            return await log_in(replace(login, address=found[4][0]), sock)
        except (OtherHostKey, TransportError) as exc:
            failed.append(exc)
    if not failed:
        raise login.lost("cannot be reached", "this machine has no way to its addresses")
    raise _all_of(failed)


def _all_of(failed: Sequence[KeyRefused | TransportError]) -> KeyRefused | TransportError:
    """One error for all addresses: only where each of them is wrong the peer is."""
    if len(failed) == 1:
        return failed[0]
    message = "; ".join(error.message for error in failed)
    if all(isinstance(error, KeyRefused) for error in failed):
        return OtherHostKey(message, remedy=failed[0].remedy)
    remedy = "it is tried again; where one of the name's addresses is another machine's, the peer should remove it"
    return TransportError(message, remedy=remedy)


async def _look_up(login: Login, seconds: float) -> Addresses:
    """In the resolver's order, but for the kinds, which take turns. The first ADDRESSES_MAX."""
    try:
        async with asyncio.timeout(seconds):
            found = await addresses(login.host, login.port)
    except TimeoutError as exc:
        raise login.silent("looking up its name", seconds) from exc
    except OSError as exc:
        raise login.lost("cannot be reached", exc.strerror or exc) from exc
    if not found:
        raise login.lost("cannot be reached", "the name has no address")
    kinds = dict.fromkeys(each[0] for each in found)
    in_turn = zip_longest(*([each for each in found if each[0] == kind] for kind in kinds))
    return [each for each in chain.from_iterable(in_turn) if each][:ADDRESSES_MAX]


async def _first(login: Login, untried: Addresses, seconds: float) -> tuple[socket.socket, Found]:
    """A connected, non-blocking socket: each address gets NEXT_S before the next one is tried beside it.

    Raises:
        TransportError: none answers.
        OSError: this machine has no way to any of them.
    """
    waiting, under_way = list(untried), dict[asyncio.Task[socket.socket], Found]()
    errors: list[OSError] = []
    winner: socket.socket | None = None
    try:
        async with asyncio.timeout(seconds):
            while waiting or not all(task.done() for task in under_way):
                if waiting:
                    found = waiting.pop(0)
                    under_way[asyncio.create_task(_connect(found))] = found
                running = [task for task in under_way if not task.done()]
                wait_s = NEXT_S if waiting else None
                done, _ = await asyncio.wait(running, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (exc := task.exception()) is None:
                        winner = task.result()
                        return winner, under_way[task]
                    if not isinstance(exc, OSError):
                        raise exc
                    errors.append(exc)
    except TimeoutError as exc:
        raise login.silent("connecting", seconds) from exc
    finally:
        for task in under_way:
            task.cancel()
        for result in await asyncio.gather(*under_way, return_exceptions=True):
            if isinstance(result, socket.socket) and result is not winner:
                result.close()
    peers = [exc for exc in errors if exc.errno not in _NO_WAY]
    if not peers:
        raise errors[0]
    why = "; ".join(dict.fromkeys(os.strerror(exc.errno).lower() if exc.errno else str(exc) for exc in peers))
    if any(isinstance(exc, ConnectionRefusedError) for exc in peers):
        raise login.lost("cannot be reached", why, f"nothing listens there: is {login.peer} started, at this address?")
    raise login.lost("cannot be reached", why)


async def _connect(found: Found) -> socket.socket:
    family, kind, protocol, _, address = found
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        tune(sock)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock
