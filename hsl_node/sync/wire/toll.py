"""What the other end makes us parse: packets and requests cost it next to nothing, so they are counted.

For both ends: `link.py` counts what a member sends to our inbox, the clients what its server sends back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import AnyStr

import asyncssh
from asyncssh.channel import SSHChannel
from asyncssh.connection import SSHConnection
from asyncssh.constants import MSG_CHANNEL_DATA, MSG_CHANNEL_WINDOW_ADJUST, MSG_IGNORE, MSG_KEXINIT
from asyncssh.packet import SSHPacket, SSHPacketHandler

from hsl_node.errors import PeerDataError
from hsl_node.sync.wire.allowance import PACKETS_PER_MINUTE, REQUESTS_PER_MINUTE, Allowance

# Of data, either way, for one packet or request. With blocks of 32 KiB rclone needs one for each 6 KiB.
PAYS_BYTES = 1024
IN_A_ROW = 64  # packets; then all else has its turn. One read of the socket may bring seven thousand
# asyncssh sends an empty one of the last kind before each packet, when it has nothing else to send.
_OF_TRANSFERS = (MSG_CHANNEL_DATA, MSG_CHANNEL_WINDOW_ADJUST, MSG_IGNORE)


class Toll:
    """What one peer may make us parse in a minute, over all connections with it, whoever opened them."""

    def __init__(self, packets_per_minute: int = PACKETS_PER_MINUTE, requests_per_minute: int = REQUESTS_PER_MINUTE):
        self._most = packets_per_minute, requests_per_minute
        self.packets = Allowance(packets_per_minute, 60)
        self.requests = Allowance(requests_per_minute * PAYS_BYTES, 60)

    def packet(self, kind: int, size: int) -> None:
        """One SSH packet with so many bytes of payload. Raises: PeerDataError: code `rate`."""
        if kind in _OF_TRANSFERS:
            self._spend(PAYS_BYTES - (size if kind == MSG_CHANNEL_DATA else 0))
        elif not self.packets.take(1, time.monotonic()):
            raise PeerDataError(f"more than {self._most[0]} packets without data in a minute", code="rate")

    def request(self) -> None:
        """One SFTP request. Raises: PeerDataError: code `rate`."""
        self._spend(PAYS_BYTES)

    def sent(self, count: int) -> None:
        """So many bytes of data went to the peer."""
        self.requests.take(-count, time.monotonic())

    def _spend(self, cost: int) -> None:
        if not self.requests.take(cost, time.monotonic()):
            text = f"more than {self._most[1]} packets and requests in a minute beside those that its data takes"
            raise PeerDataError(text, code="rate")


class Turnstile:
    """All that one connection of asyncssh receives comes through here, a few packets at a time."""

    def __init__(
        self,
        conn: SSHConnection,
        login_max_bytes: int,
        flooded: Callable[[], None],
        refused: Callable[[PeerDataError], None] = lambda error: None,
    ) -> None:
        """`flooded()`: it sends more than a login takes, cut it. `refused(error)`: the toll is spent, it is cut."""
        self.toll: Toll | None = None  # until it has logged in
        self.over: PeerDataError | None = None  # why it was cut
        self.login_bytes = 0
        self._login_max_bytes = login_max_bytes
        self._flooded, self._refused = flooded, refused
        self._conn = conn
        transport = conn._transport
        assert transport is not None
        self._transport = transport
        self._holds = 0  # reasons not to read
        self._in_a_row = 0
        self._parse, conn.data_received = conn.data_received, self._received  # type: ignore[method-assign]
        self._add, conn.add_channel = conn.add_channel, self._add_channel  # type: ignore[method-assign,assignment]
        self._count(conn)

    def request(self) -> None:
        """One SFTP request was read. Raises: PeerDataError: too many; cut the connection."""
        assert self.toll is not None
        self._pay(self.toll.request)

    def hold(self) -> None:
        """Read no more until `release` was called as often."""
        self._holds += 1
        self._transport.pause_reading()

    def release(self) -> None:
        self._holds -= 1
        if not self._holds:
            self._transport.resume_reading()

    # ------------------------------------------------------------ below

    def _received(self, data: bytes, datatype: int | None = None) -> None:
        """Whoever has no key may send packets that nobody need answer, as fast as the line goes, and we parse each."""
        # asyncssh counts its questions that have no answer yet; an answer waits behind all that is on its way, so
        # whatever comes is a sign of life.
        self._conn._keepalive_count = 0
        if self.toll is None:
            self.login_bytes += len(data)
            if self.login_bytes > self._login_max_bytes:
                return self._flooded()
        self._parse(data, datatype)

    def _add_channel(self, channel: SSHChannel[AnyStr]) -> int:
        self._count(channel)
        return self._add(channel)

    def _count(self, handler: SSHPacketHandler) -> None:
        process = handler.process_packet

        def counted(pkttype: int, pktid: int, packet: SSHPacket) -> bool | Awaitable[None]:
            if (toll := self.toll) is not None:
                try:
                    self._pay(lambda: toll.packet(pkttype, len(packet.get_full_payload())))
                except PeerDataError as exc:
                    # Raised, not `abort`: that would still parse the rest of what was read.
                    raise asyncssh.DisconnectError(asyncssh.DISC_PROTOCOL_ERROR, exc.message) from exc
            result = process(pkttype, pktid, packet)
            if pkttype == MSG_KEXINIT and isinstance(result, Awaitable):
                return self._begun(result)
            self._in_a_row += 1
            if result is True and self._in_a_row >= IN_A_ROW:
                self._in_a_row = 0
                self.hold()
                return self._others_turn()  # asyncssh parses on when this is done
            return result

        handler.process_packet = counted  # type: ignore[method-assign]

    async def _begun(self, key_exchange: Awaitable[None]) -> None:
        await key_exchange
        if self._conn._kex is not None:  # the packets of a key exchange go to an object of their own
            self._count(self._conn._kex)

    async def _others_turn(self) -> None:
        try:
            await asyncio.sleep(0)
        finally:
            self.release()

    def _pay(self, toll: Callable[[], None]) -> None:
        if self.over is not None:
            raise self.over
        try:
            toll()
        except PeerDataError as exc:
            self.over = exc
            self._refused(exc)
            raise
