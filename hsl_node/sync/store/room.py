"""What the disk has, what one peer may use of it, and what a round still needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hsl_node.host.layout import Layout

SMALL_FILES_BYTES = 64 * 1024  # a manifest, and its part
ROUNDS_HELD = 3


@dataclass(frozen=True)
class Quota:
    """What one sender may hold here at a time, in parts/ and inbox/ together."""

    files: int = 16  # a checkpoint and a manifest for two rounds, four times over
    bytes: int = 4096 * 1024 * 1024
    reserve_bytes: int = 256 * 1024 * 1024  # of the disk; no peer's write takes of it: the journal must go on


def quota_bytes(quota_mib: int | None, checkpoint_bytes: int) -> int:
    """What one sender may hold: what node.toml says, else what the plan's model needs, and 4 GiB at least."""
    if quota_mib is not None:
        return quota_mib * 2**20
    return max(Quota.bytes, ample_mib(checkpoint_bytes) * 2**20)


def ample_mib(checkpoint_bytes: int) -> int:
    """Of a quota: two rounds and what may be left of two more, with their small files."""
    return -(-4 * checkpoint_bytes // 2**20) + 1


def holds_one(quota_mib: int | None, checkpoint_bytes: int) -> bool:
    """Below that no checkpoint ever comes in."""
    return quota_bytes(quota_mib, checkpoint_bytes) >= checkpoint_bytes + SMALL_FILES_BYTES


@dataclass(frozen=True)
class Room:
    """Bytes of the disk: what is free, and below what free space this node does without something."""

    free: int
    arrival: int  # below it the inbox takes in no checkpoint of a peer
    round: int  # below it no round is started; at least `arrival`


def reserve_of(inbox: str) -> int:
    """Bytes of the disk that this kind of inbox never gives away: another program's server knows of none."""
    return Quota.reserve_bytes if inbox == "embedded" else 0


def room(layout: Layout, checkpoint_bytes: int, peers: int, reserve_bytes: int) -> Room:
    """What the disk has and what this node needs of it: what is stored already counts as room for a round. Of two
    rounds everybody's checkpoints, the fused models, and this node's own files, which may hold more than what it sends.

    The inbox never gives its reserve away, so what a round still has to store comes on top of that.
    """
    own = sorted(_sizes(layout.own_files().values()))
    held = _held(layout) + sum(own[-2:])
    missing = max(checkpoint_bytes, 2 * (peers + 1) * checkpoint_bytes + 2 * max(checkpoint_bytes, *own, 0) - held)
    free = shutil.disk_usage(layout.state).free
    return Room(free, reserve_bytes + checkpoint_bytes, reserve_bytes + missing)


def _held(layout: Layout) -> int:
    """Bytes of the checkpoints of the newest rounds: this one, that before, and what came early. Older ones that are
    kept are no room for a round. `prune` may be deleting some in another thread meanwhile."""
    inbox, outbox = (sorted(f.glob("r*"))[-ROUNDS_HELD:] for f in (layout.inbox_folder, layout.outbox_folder))
    return sum(_sizes([*outbox, *(path for folder in inbox for path in _checkpoints(folder))]))


def _checkpoints(folder: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError):
        yield from folder.glob("*.safetensors")


def _sizes(paths: Iterable[Path]) -> Iterator[int]:
    for path in paths:
        with suppress(FileNotFoundError):
            yield path.stat().st_size
