"""What strangers and peers may take of the embedded inbox."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from hsl_node.federation.names import Peer
from hsl_node.host.log_limit import LOG_LINES_PER_MINUTE
from hsl_node.sync.store.room import Quota
from hsl_node.sync.wire.allowance import LOGIN_S, PACKETS_PER_MINUTE, REQUESTS_PER_MINUTE

SOURCES_PER_PEER = 4  # two gateways with two kinds of address


@dataclass(frozen=True)
class Limits:
    """What strangers and peers may take of us. Tests lower them; the defaults suit 64 peers and 4 Mbit/s links."""

    login_timeout_s: float = LOGIN_S
    login_attempts: int = 4
    strangers: int = 64  # unauthenticated connections in total, and as many from sources that peers logged in from
    strangers_per_source: int = 16  # per IPv4 address or IPv6 /64; hospitals may share one gateway
    connections_per_peer: int = 2  # the live one and one that the network has forgotten
    sessions_per_peer: int = 2
    handles_per_connection: int = 8
    idle_s: float = 600  # without any request
    progress_s: float = 120  # an unfinished transfer must get on by `progress_bytes` in this time, or the link is cut;
    progress_bytes: int = 64 * 1024  # 64 peers on one 4 Mbit/s line get fifteen times as much each
    sweep_s: float = 5
    offers_per_minute: int = 240  # lists of what is kept for a peer, 15 ms each; a node asks before each signature
    offer_files_per_hour: int = 160  # bytes of so many checkpoints: own, of 63 others for two rounds, and again
    # Of its own files, beside what it writes meanwhile: a resume compares one block of 1 MiB. Half of a 4 Mbit/s line.
    read_back_bytes_per_minute: int = 16 * 1024 * 1024
    packets_per_minute: int = PACKETS_PER_MINUTE
    requests_per_minute: int = REQUESTS_PER_MINUTE
    log_lines_per_minute: int = LOG_LINES_PER_MINUTE  # per peer, and for all strangers together
    quota: Quota = field(default_factory=Quota)


class Sources:
    """From where each peer logged in, the newest few: a hostile one can't fill the table."""

    def __init__(self) -> None:
        self._of: dict[Peer, list[str]] = {}

    def add(self, peer: Peer, source: str) -> None:
        before = [s for s in self._of.get(peer, ()) if s != source]
        self._of[peer] = [*before, source][-SOURCES_PER_PEER:]

    def __contains__(self, source: str) -> bool:
        return any(source in sources for sources in self._of.values())


def source_of(address: str) -> str:
    """Who opens connections, as far as an address tells: one IPv4 address, or one IPv6 /64."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped  # else all of IPv4 would be one source where we listen on "::"
    if parsed.version == 4:
        return str(parsed)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
