"""How much may be on its way at a time: what the line carries within some seconds. Pure.

Whatever comes after it, an answer or a sign of life, waits behind what is on its way. 2 MiB are nothing at 1 Gbit/s,
and nine minutes at 32 kbit/s. An answer tells how long all that was before it took; where that is some seconds more
than the line takes by itself, the line is full, and no longer.
"""

from __future__ import annotations

from collections.abc import Iterator

LEAST_BYTES = 24 * 1024  # 6 s at 32 kbit/s; about as much as TCP itself begins with
LEAST_PIECE_BYTES = 12 * 1024  # of one request; its headers and its answer take 2 % of that
MOST_PIECE_BYTES = 255 * 1024  # OpenSSH takes 256 KiB including the header, and no more
PIECES = 4
# 2 MiB: what OpenSSH's SSH window holds anyway, so more only costs memory (16 MiB: +35 MB a connection, not a byte a
# second more). At 50 ms round trip that still is 40 MB/s.
MOST_BYTES = 8 * MOST_PIECE_BYTES
QUEUE_S = 2.0  # of waiting behind ourselves; below that it may grow, above twice that it shrinks


class Flow:
    """Of one direction of one connection."""

    def __init__(self) -> None:
        self.most_bytes = LEAST_BYTES  # that may be on their way now
        self._line_s = float("inf")  # what an answer takes where nothing of ours is in its way

    @property
    def piece_bytes(self) -> int:
        """Of one request."""
        return min(MOST_PIECE_BYTES, max(LEAST_PIECE_BYTES, self.most_bytes // PIECES))

    def pieces(self, block: bytes) -> Iterator[tuple[int, bytes]]:
        """A block in pieces, each as large as is right when it is asked for, with where it begins."""
        at = 0
        while at < len(block):
            piece = block[at : at + self.piece_bytes]
            yield at, piece
            at += len(piece)

    def answered(self, count: int, seconds: float) -> None:
        """A request with `count` bytes of data had its answer after so long: doubled or halved within a round trip."""
        self._line_s = min(self._line_s, seconds)
        waited_s = seconds - self._line_s
        if waited_s < QUEUE_S:
            self.most_bytes = min(MOST_BYTES, self.most_bytes + count)
        elif waited_s > 2 * QUEUE_S:
            if self.most_bytes == LEAST_BYTES:  # so it is not we who are in the way: the line has become longer
                self._line_s = seconds
            self.most_bytes = max(LEAST_BYTES, self.most_bytes - count // 2)
