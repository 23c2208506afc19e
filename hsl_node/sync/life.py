"""The sign of life: what a node says of itself when it asks another, and, signed, when it is asked.

The asker reads `offer/<its own sign>.life`, so both learn of each other in one request. Where the inbox is another
program's, which answers nothing itself, the node lays its signed sign as a file beside the receipts of each peer.
Whatever a sign says is believed of the peer that gives it, and of nobody else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high, median_low
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hsl_node.errors import PeerDataError
from hsl_node.federation.identity import LIFE_NAMESPACE, verify
from hsl_node.federation.names import PEER_PATTERN, RECEIPTS, Peer
from hsl_node.federation.strings import Sha256
from hsl_node.host.units import duration
from hsl_node.sync.manifest import Signed, parse_signed
from hsl_node.sync.offer import OFFER

if TYPE_CHECKING:
    from hsl_node.sync.wire.transport import Transport

LIFE_MAX_BYTES = 4 * 1024
CLOCK_LIMIT_S = 60.0  # between two clocks; a slow line delays a sign by less, else no login succeeds
AT_MAX, PAUSED_MAX_S = 10**11 - 1, 10**9 - 1  # what a calendar shows, whatever a peer says: 3000 years, 31 years
_SIGN = re.compile(r"([0-9a-f]{8})(?:-([0-9]{1,11})(?:-paused-([0-9]{1,9}))?)?\.life", re.ASCII)


@dataclass(frozen=True)
class Sign:
    """What a peer says of itself: its federation, its wall clock, and for how long its operator has paused it."""

    fed8: str
    at: int | None  # None: a command asks, the node itself may be down
    paused_s: int | None = None

    def name(self) -> str:
        if self.at is None:
            return f"{self.fed8}.life"
        paused = "" if self.paused_s is None else f"-paused-{self.paused_s}"
        return f"{self.fed8}-{self.at}{paused}.life"


class Life(Signed):
    """The same as a signed document. No nonce: the connection says who gives it, or a file's `at` that it is new."""

    version: Literal[1] = 1
    federation: Sha256
    peer: Annotated[str, Field(pattern=rf"^{PEER_PATTERN}$")]
    at: int = Field(ge=0, le=AT_MAX)
    paused_s: int | None = Field(ge=0, le=PAUSED_MAX_S)

    def sign(self) -> Sign:
        return Sign(self.federation[:8], self.at, self.paused_s)


def asking_path(mine: Sign) -> str:
    return f"{OFFER}/{mine.name()}"


def file_name(peer: Peer) -> str:
    """Of the file that `peer` lays into its inbox, where another program serves that."""
    return f"hsl1_{peer}.life"


def file_path(peer: Peer) -> str:
    return f"{RECEIPTS}/{file_name(peer)}"


def find_sign(name: str) -> Sign | None:
    """What an asker says of itself in the name that it asks for below offer/; None: that is no sign of life."""
    found = _SIGN.fullmatch(name)
    return found and Sign(found[1], *(None if number is None else int(number) for number in found.groups()[1:]))


async def ask(link: Transport, path: str, peer: Peer, keys: Sequence[str]) -> Life:
    """What the peer at the other end says of itself, at `asking_path` or `file_path`.

    Raises:
        TransportError: the link broke; `OperationFailed`: nothing is there, or it is an earlier version.
        PeerDataError: see `parse_life`.
    """
    return parse_life(await link.read(path, 0, LIFE_MAX_BYTES), peer, keys)


def parse_life(document: bytes, peer: Peer, keys: Sequence[str]) -> Life:
    """Raises: PeerDataError: not signed by this peer, or not of it."""
    life = parse_signed(verify(document, keys, LIFE_NAMESPACE), Life)
    if life.peer != peer:
        raise PeerDataError(f"a sign of life of {life.peer}, shown by {peer}", code="owner")
    return life


# ------------------------------------------------------------------ what follows from it


def judged(
    silent_s: float | None, paused: bool, gives_signs: bool, patience_s: float
) -> Literal["alive", "down", "paused", "unknown"]:
    """Of a peer. `silent_s`: since it was heard last; None: never by this process. `gives_signs`: False: its inbox is
    another program's and nothing of the node itself is to be seen there, as of an earlier version."""
    if silent_s is None or silent_s > patience_s:
        return "down" if gives_signs else "unknown"
    return "paused" if paused else "alive"


def wrong_clocks(ahead_s: Mapping[Peer, float]) -> tuple[float, dict[Peer, float]]:
    """By how much this node's clock is ahead of most clocks, this one included, and whose is off by how much.

    `ahead_s`: by how much each peer's clock is ahead of ours. 0 and {}: they agree within `CLOCK_LIMIT_S`. Of two
    clocks nobody can tell which one is right: then it is the peer's that is named.
    """
    clocks = [0.0, *ahead_s.values()]
    most = min(median_low(clocks), median_high(clocks), key=abs) if len(ahead_s) > 1 else 0.0
    mine = -most if abs(most) > CLOCK_LIMIT_S else 0.0
    others = {peer: ahead + mine for peer, ahead in ahead_s.items()}
    return mine, {peer: ahead for peer, ahead in others.items() if abs(ahead) > CLOCK_LIMIT_S}


def off(ahead_s: float) -> str:
    """`3 min behind`, of a clock."""
    return f"{duration(abs(ahead_s))} {'ahead of' if ahead_s > 0 else 'behind'}"


def other_federation(peer: str, its: str, ours: str) -> tuple[str, str]:
    """What is said of a peer whose federation file is another one, and what to do. Both by their short hashes."""
    text = f"{peer} joined another federation file ({its}, ours is {ours}): nothing of it is taken here"
    fix = (
        f"compare yours with the file of {peer}: `hsl-node federation diff FILE`; the hospital with the wrong one "
        "stops, joins the right one with `federation join --replace`, and starts"
    )
    return text, fix
