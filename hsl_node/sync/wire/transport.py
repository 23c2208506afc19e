"""One open connection to one peer's inbox: the interface of both clients, and how long each answer may take.

    async with connect(card, me, identity, client="asyncssh") as link:  # of `connect.py`
        await link.write("parts/NAME.part", source, 0, create=True, progress=print)
        await link.rename("parts/NAME.part", "inbox/NAME")

Both clients (`asyncssh_client.py`, `paramiko_client.py`) pass one conformance suite. Keys are pinned: there is no
trust on first use, no agent, no password, no file of the user's ~/.ssh is ever read.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from hsl_node.errors import Altered, KeyRefused, LocalStateError, TransportError, escaped
from hsl_node.federation.config import PeerCard
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import Peer
from hsl_node.federation.strings import fingerprint, split_address
from hsl_node.sync.wire.allowance import LOGIN_S
from hsl_node.sync.wire.flow import MOST_PIECE_BYTES

BLOCK_BYTES = MOST_PIECE_BYTES
READ_AHEAD_BLOCKS = 4  # one hop to a disk thread for 1 MiB: a hop for every block costs a tenth of the throughput


@dataclass(frozen=True)
class Patience:
    """How long a silence may last. Never a limit on a whole transfer: that takes as long as the link needs."""

    connect_s: float = LOGIN_S
    answer_s: float = 45  # any single answer, beside what its bytes need
    slowest_bytes_per_s: int = 8 * 1024  # of what one request asks for or brings, which `flow.py` makes small
    slowest_disk_bytes_per_s: int = 1024 * 1024  # of the peer, when it is asked to make the file durable
    keepalive_s: float = 15
    keepalives: int = 4

    def for_bytes(self, count: int) -> float:
        """Seconds after which `count` bytes must have arrived."""
        return self.answer_s + count / self.slowest_bytes_per_s

    def for_all(self, count: int) -> float:
        """The same for many requests in a row, each of which may bring a single byte in its own time."""
        return self.answer_s + 8 * count / self.slowest_bytes_per_s  # 1 KiB/s: a quarter of 32 kbit/s

    def for_disk(self, count: int) -> float:
        return self.answer_s + count / self.slowest_disk_bytes_per_s


class OperationFailed(TransportError):
    """The server answered "no" or "failure"; the link is fine. What it means is found out with `size`, not by code."""


class OtherHostKey(KeyRefused):
    """Whoever answers at this address is not the peer that is pinned."""


class Transport(Protocol):
    """Paths are relative to the folder that holds parts/, inbox/ and receipts/.

    Every method raises:
        OperationFailed: the server refused; the connection can be used further.
        TransportError: the link broke, or nothing moved for longer than `Patience` allows; connect anew.
    """

    patience: Patience  # of the next question

    def alive(self) -> bool:
        """Has nobody closed it yet, as far as is known here?"""

    async def size(self, path: str) -> int | None:
        """Bytes of a file; None: there is no such file."""

    async def write(
        self, path: str, source: Path | bytes, offset: int, *, create: bool, progress: Callable[[int], None]
    ) -> None:
        """Send `source` from `offset` to its end, make it durable where the server offers that, and close the file.

        After an error it stays open at the server for as long as the connection does.

        `create`: the file must not exist yet. Else it must exist and is neither truncated nor appended to.
        `progress(n)`: all bytes up to `n` are acknowledged.

        Raises:
            LocalStateError: `source` cannot be read, or became shorter.
        """

    async def read(self, path: str, offset: int, count: int) -> bytes:
        """At most `count` bytes (<= BLOCK_BYTES); fewer only at the end of the file."""

    async def rename(self, old: str, new: str) -> None:
        """Plain rename: fails where `new` exists."""

    async def remove(self, path: str) -> None: ...


Client = Literal["asyncssh", "paramiko"]


@dataclass(frozen=True)
class Login:
    """What a card says about logging in, filled in for us."""

    peer: str
    host: str
    port: int
    user: str
    root: str  # "" or ends with "/"
    host_keys: tuple[str, ...]
    address: str = ""  # of the host's, once one was chosen

    @classmethod
    def of(cls, card: PeerCard, me: Peer, host_keys: Sequence[str] | None = None) -> Login:
        host, port = split_address(card.address)
        # Not str.format: what stands in a card is data, not a template language.
        user, root = (text.replace("{sender}", me) for text in (card.user, card.root))
        root = root if not root or root.endswith("/") else root + "/"
        pinned = (card.host_key or card.key,) if host_keys is None else tuple(host_keys)
        return cls(card.name, host, port, user, root, pinned)

    @property
    def where(self) -> str:
        which = f" ({self.address})" if self.address not in ("", self.host) else ""
        return f"{self.peer} at {self.host}:{self.port}{which}"

    def other_host_key(self, offered: str) -> OtherHostKey:
        return OtherHostKey(
            f"{self.where} shows the host key {offered or '(none of type ed25519)'}, "
            f"pinned is {' or '.join(map(fingerprint, self.host_keys)) or 'none: it is revoked'}",
            remedy=f"call {self.peer}: after a planned key change take its update file (`hsl-node peer update`); "
            "otherwise somebody stands in between",
        )

    def our_key_refused(self, identity: Identity) -> KeyRefused:
        return KeyRefused(
            f"{self.where} does not accept our key {identity.fingerprint} for the user {self.user!r}",
            remedy="if this node was restored from a backup, its key was probably changed after that. Where "
            "keys/node_ed25519.next is there, the backup was made in the midst of that change: `hsl-node key rotate "
            "--finish` goes over to the new key at once. Else restore a newer one; there is none: "
            "docs/administrator/keys.md. "
            f"Else ask {self.peer} whether it runs the same federation file and has set up the account",
        )

    def lost(self, what: str, reason: object, remedy: str = "check network and peer") -> TransportError:
        text = escaped(str(reason)) or type(reason).__name__
        return TransportError(f"{self.where}: {what}: {text}", remedy=f"the daemon tries again by itself; {remedy}")

    def silent(self, what: str, seconds: float) -> TransportError:
        return self.lost(what, f"nothing moved for {seconds:.0f} s")

    def failed(self, what: str, reason: object) -> OperationFailed:
        return OperationFailed(
            f"{self.where}: {what} was refused: {escaped(str(reason)) or type(reason).__name__}",
            remedy="it is tried again; if it stays so, ask the peer for its log",
        )


class Source:
    """The bytes to send: a file, or a small document in memory. Blocking: call `read` in a thread."""

    def __init__(self, source: Path | bytes) -> None:
        """Raises: Altered: it is gone. LocalStateError: it cannot be opened."""
        self._name = "a document" if isinstance(source, bytes) else str(source)
        try:
            # Open until `close`.
            self._file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb", 0)  # noqa: SIM115
            self.size = self._file.seek(0, os.SEEK_END)
        except FileNotFoundError as exc:
            raise Altered(f"{source!s}, which is to be sent, is gone from this disk") from exc
        except OSError as exc:
            raise self._unreadable(exc) from exc

    def read(self, offset: int) -> Sequence[bytes]:
        """The next READ_AHEAD_BLOCKS blocks; fewer at the end.

        Raises:
            Altered: the file became shorter, or the disk does not give it any more.
            LocalStateError: it may not be read.
        """
        end = min(offset + READ_AHEAD_BLOCKS * BLOCK_BYTES, self.size)
        try:
            self._file.seek(offset)
            blocks = [self._file.read(min(BLOCK_BYTES, end - start)) for start in range(offset, end, BLOCK_BYTES)]
        except OSError as exc:
            raise self._unreadable(exc) from exc
        if sum(map(len, blocks)) < end - offset:
            raise Altered(f"{self._name} became shorter while it was sent")
        return blocks

    def close(self) -> None:
        self._file.close()

    def _unreadable(self, reason: OSError) -> LocalStateError:
        if reason.errno == errno.EIO:
            return Altered(f"{self._name}, which is to be sent, cannot be read any more from this disk")
        return LocalStateError(f"{self._name} cannot be read: {reason}", remedy="check the disk of the state directory")
