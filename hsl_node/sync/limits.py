"""What strangers and peers may take of the embedded inbox, and the counts of what they tried."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hsl_node.sync.names import Peer


@dataclass(frozen=True)
class Quota:
    """What one sender may hold here at a time, in parts/ and inbox/ together."""

    files: int = 16  # a checkpoint and a manifest for two rounds, four times over
    bytes: int = 4096 * 1024 * 1024
    reserve_bytes: int = 256 * 1024 * 1024  # of the disk, never given away: the journal must go on


@dataclass(frozen=True)
class Limits:
    """What strangers and peers may take of us. Tests lower them; the defaults suit 64 peers and 4 Mbit/s links."""

    login_timeout_s: float = 20
    login_attempts: int = 4
    strangers: int = 64  # unauthenticated connections in total
    strangers_per_source: int = 16  # per IPv4 address or IPv6 /64; hospitals may share one gateway
    connections_per_peer: int = 2  # the live one and one that the network has forgotten
    sessions_per_peer: int = 2
    handles_per_connection: int = 8
    idle_s: float = 600  # without any request
    progress_s: float = 120  # an unfinished transfer must bring `progress_bytes` in this time, or the link is cut;
    progress_bytes: int = 64 * 1024  # 64 peers on one 4 Mbit/s line get fifteen times as much each
    sweep_s: float = 5
    log_lines_per_minute: int = 60  # per peer or source; the counters count on
    quota: Quota = field(default_factory=Quota)


@dataclass
class Counters:
    """For metrics. Only ever grow, except `unauthenticated`."""

    rejected: Counter[tuple[Peer, str]] = field(default_factory=Counter)  # (peer, code) -> times
    auth_failures: int = 0
    evicted: int = 0  # unauthenticated connections closed to make room
    unauthenticated: int = 0  # now
