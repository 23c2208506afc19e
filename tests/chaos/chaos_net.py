"""A network in memory, with real links and inboxes at the receiving end; the sending end is `chaos_link.py`.

Each connection runs the real `Link` and `InboxFS` of the receiving node, in that node's process; what lies between is
packets with a latency, a line that may be cut, held up, slowed or dead, and ends that die with or without a last word.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import asyncssh
from virtual_time import OWNER, Killed, Process, VirtualLoop, context_of

from hsl_node.errors import KeyRefused
from hsl_node.federation.config import PeerCard
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import Peer
from hsl_node.federation.strings import split_address
from hsl_node.sync.inbox.link import Link
from hsl_node.sync.inbox.requests import InboxFS
from hsl_node.sync.wire.transport import Login, Patience

REFUSED = (asyncssh.SFTPError, OSError)
DEAD_S = 60.0  # after which both ends give up a connection whose other end says nothing: `keepalive` of both
RESUME_S = 15.0  # after a hole TCP sends again when its next attempt is due, each connection at another time
LOGIN = 3  # round trips: versions, keys, and the one that brings the signature
HELLO_BYTES = 3000
ASK_BYTES = 100


@dataclass
class Way:
    """One direction between two peers."""

    latency_s: float
    bytes_per_s: float = 2e6
    held_until: float = 0.0  # nothing arrives before: a hole; TCP brings it afterwards, if the ends still want it
    refuses_until: float = 0.0  # who connects is turned away: a firewall with manners
    cut_after: int | None = None  # bytes from now; then the connection that carries them is reset, once
    cuts: int = 0

    def arrival(self, now: float, size: int) -> float:
        return now + self.latency_s + size / self.bytes_per_s


@dataclass
class Listener:
    """What `asyncssh.listen` gives back: an inbox that takes connections."""

    make: Callable[[], Link]
    key: asyncssh.SSHKey
    owner: Process
    context: contextvars.Context
    open: bool = True

    def close(self) -> None:
        self.open = False

    async def wait_closed(self) -> None:
        pass

    def get_port(self) -> int:
        return 0

    def update(self, *, server_host_keys: list[asyncssh.SSHKey]) -> None:
        (self.key,) = server_host_keys


class FakeConnection:
    """What a `Link` knows of the SSH connection below it."""

    def __init__(self, wire: Wire, run: str) -> None:
        self._wire, self._run = wire, run
        self._transport = self

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def data_received(self, data: bytes, datatype: int | None = None) -> None:
        raise AssertionError("a simulated line carries no bytes of SSH")

    def process_packet(self, kind: int, number: int, packet: object) -> bool:
        raise AssertionError("a simulated line carries no packets of SSH")

    def add_channel(self, channel: object) -> int:
        raise AssertionError("a simulated line carries no channels of SSH")

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        known = {"peername": (self._wire.me,), "username": str(self._wire.me), "client_version": f"SSH-2.0-{self._run}"}
        return known.get(name, default)

    def abort(self) -> None:
        self._wire.reset("the other end closed the connection")

    async def wait_closed(self) -> None:
        pass


@dataclass
class Net:
    """All lines and who listens at their ends. `fault`: told of what must never be."""

    loop: VirtualLoop
    rng: random.Random
    ways: dict[tuple[Peer, Peer], Way]
    fault: Callable[[str], None]
    listeners: dict[int, Listener] = field(default_factory=dict)
    wires: list[Wire] = field(default_factory=list)
    published: dict[tuple[Peer, int], set[str]] = field(default_factory=dict)  # what was sent as this round's manifest
    bytes: int = 0

    def __post_init__(self) -> None:
        self.nobody = context_of(None)

    async def listen(self, host: str, port: int, *, server_factory: Callable[[], Link], **options: Any) -> Listener:
        owner = OWNER.get()
        assert owner is not None
        before = self.listeners.get(port)
        assert before is None or before.owner.dead or not before.open, f"port {port} is in use"
        self.listeners[port] = Listener(server_factory, *options["server_host_keys"], owner, contextvars.copy_context())
        return self.listeners[port]

    def died(self, process: Process, *, silent: bool) -> None:
        """Its connections: the kernel resets them, or (power) nobody says anything any more."""
        for wire in list(self.wires):
            if process in (wire.client, wire.server):
                wire.end_died(process, silent)

    def later(self, at: float, call: Callable[..., None], *args: Any) -> None:
        self.loop.call_at(max(at, self.loop.now), call, *args, context=self.nobody)


class Wire:
    """One connection, from both ends."""

    def __init__(
        self, net: Net, me: Peer, card: PeerCard, identity: Identity, patience: Patience, login: Login
    ) -> None:
        self.net, self.me, self.login, self.patience = net, me, login, patience
        self._identity = identity
        self._up, self._down = net.ways[me, Peer(card.name)], net.ways[Peer(card.name), me]
        self._port = split_address(card.address)[1]
        self.client, self.server = OWNER.get(), None  # type: ignore[var-annotated]
        self.broken = ""
        self._waiting: dict[asyncio.Future[Any], str] = {}
        self._last = [0.0, 0.0]  # arrivals up and down: packets overtake nobody
        self._dark = (
            False  # the client's machine lost power: what it sent and nobody has received yet is not sent again
        )
        self._context: contextvars.Context | None = None
        self._link: Link | None = None
        self._fs: InboxFS | None = None
        net.wires.append(self)

    # -------------------------------------------------------------- the client's end

    async def ask(
        self, what: str, seconds: float, work: Callable[[InboxFS], Any], up: int = ASK_BYTES, down: int = ASK_BYTES
    ) -> Any:
        """Have `work` done at the other end and its result brought here. Errors of `REFUSED` are raised as they are."""
        if self.broken:
            raise self.login.lost(what, self.broken)
        reply: asyncio.Future[Any] = self.net.loop.create_future()
        self._waiting[reply] = what
        self.net.bytes += up
        cut = self._up.cut_after
        if cut is not None:
            self._up.cut_after = cut = cut - up
        if cut is not None and cut <= 0:
            self._up.cut_after, self._up.cuts = None, self._up.cuts + 1
            if self.net.rng.random() < 0.5:  # it arrives, and its answer doesn't
                self._send(0, up, self._arrived, work, None, 0)
            self.reset("connection reset")
        else:
            self._send(0, up, self._arrived, work, reply, down)
        try:
            async with asyncio.timeout(seconds):
                return await reply
        except TimeoutError as exc:
            self.leave()
            raise self.login.silent(what, seconds) from exc
        finally:
            self._waiting.pop(reply, None)

    async def connect(self) -> None:
        if self.net.loop.now < self._up.refuses_until:
            await asyncio.sleep(self._up.latency_s)
            raise self.login.lost("cannot be reached", "connection refused")
        try:
            async with asyncio.timeout(self.patience.connect_s) as limit:
                for _ in range(LOGIN - 1):
                    await self.ask("logging in", 2 * self.patience.connect_s, self._greet, HELLO_BYTES, HELLO_BYTES)
                key = await self.ask("logging in", 2 * self.patience.connect_s, self._accept)
        except TimeoutError as exc:
            assert limit.expired()
            raise self.login.silent("logging in", self.patience.connect_s) from exc
        if key not in self.login.host_keys:
            raise self.login.other_host_key(key)

    def leave(self) -> None:
        """The client closes; what it sent before is still brought."""
        if self in self.net.wires:
            self.net.wires.remove(self)
            self.broken = self.broken or "closed"
            self._send(0, ASK_BYTES, self._server_lost)

    # -------------------------------------------------------------- between

    def _send(self, direction: int, size: int, call: Callable[..., None], *args: Any) -> None:
        way, now = (self._down if direction else self._up), self.net.loop.now
        at = way.arrival(now, size)
        if way.held_until > at:
            if direction == 0 and way.held_until > now + DEAD_S:  # the kernel gives up (TCP_USER_TIMEOUT)
                self.net.later(now + DEAD_S, self._client_lost, "connection timed out")
                if call != self._server_lost:
                    return
            at = way.held_until + self.net.rng.uniform(0, RESUME_S)
        at = self._last[direction] = max(self._last[direction], at)
        self.net.later(at, call, *args)

    def reset(self, why: str) -> None:
        """Both ends lose it now; what is on its way still arrives."""
        self.leave()
        self.broken = why
        self.net.later(0, self._client_lost, why)

    def end_died(self, process: Process, silent: bool) -> None:
        self.net.wires.remove(self)
        self.broken = "connection reset by peer"
        if process is self.client and silent:
            self._dark = True
        if silent:
            lost: Callable[..., None] = self._server_lost if process is self.client else self._client_lost
            self.net.later(self.net.loop.now + DEAD_S, lost, self.broken)
        elif process is self.server:
            self._send(1, 0, self._client_lost, self.broken)
        else:
            self._send(0, 0, self._server_lost)

    def _client_lost(self, why: str) -> None:
        for reply, what in list(self._waiting.items()):
            if not reply.done():
                reply.set_exception(self.login.lost(what, why))

    # -------------------------------------------------------------- the server's end

    def _arrived(self, work: Callable[[InboxFS], Any], reply: asyncio.Future[Any] | None, down: int) -> None:
        if self._dark:
            return
        if self._context is None:
            found = self.net.listeners.get(self._port)
            if found is None or not found.open or found.owner.dead:
                self._client_lost("nobody listens there")
                return
            self.server, self._context = found.owner, found.context.copy()
            self._listener = found
        self.net.loop.create_task(self._serve(work, reply, down), context=self._context)

    async def _serve(self, work: Callable[[InboxFS], Any], reply: asyncio.Future[Any] | None, down: int) -> None:
        error: BaseException | None = None
        result = None
        try:
            if self._fs is None and work not in (self._greet, self._accept):
                return  # closed meanwhile
            if self._link is not None:
                self._link.asked()
            result = work(self._fs)  # type: ignore[arg-type]
            if isinstance(result, Awaitable):
                result = await result
        except (*REFUSED, KeyRefused) as exc:
            error = exc
        except (Killed, asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as exc:
            self.net.fault(f"bug in the inbox: {exc!r}")
            logging.getLogger("hsl_node.chaos").exception("bug in the inbox")
            error = asyncssh.SFTPFailure("internal error")
        if reply is not None:
            self._send(1, down, self._answer, reply, result, error)

    def _answer(self, reply: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        if reply.done():
            return
        if error is not None:
            reply.set_exception(error)
        else:
            reply.set_result(result)

    def _greet(self, nothing: object) -> None:
        pass

    def _accept(self, nothing: object) -> str:
        link = self._listener.make()
        link.connection_made(FakeConnection(self, self._identity.client_version))  # type: ignore[arg-type]
        if not link.validate_public_key(str(self.me), self._identity.key):
            raise self.login.our_key_refused(self._identity)
        link.auth_completed()
        link.sessions += 1
        self._link, self._fs = link, link.file_system(None)  # type: ignore[arg-type]
        return " ".join(self._listener.key.export_public_key("openssh").decode().split()[:2])

    def _server_lost(self, why: str = "") -> None:
        if self._context is not None and self._fs is not None:
            self.net.loop.create_task(self._forget(), context=self._context)

    async def _forget(self) -> None:
        link, fs, self._fs = self._link, self._fs, None
        if link is not None and fs is not None:
            await fs.exit()
            link.session_closed(fs)
            link.connection_lost(None)
