"""What a person should know now: raised when it becomes true, settled when it no longer is. Shown first by `status`.

What a peer can raise and settle as often as it likes is shown until it has been quiet for a while: else nothing is
left of it when somebody looks, and the log is full of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hsl_node.host.log_limit import LOG_LINES_PER_MINUTE, LogLimit
from hsl_node.host.moment import Moment

log = logging.getLogger(__name__)

QUIET_S = 300.0  # long enough that a person who was called finds it; short enough after it was mended
# Every kind that a component sounds (`status` has more: node/snapshot.py, status/recorded.py): its code is this, or
# this and the name of a peer, a round or a number. A new one is sounded where it becomes true and settled where it no
# longer is, gets its word here and its entry in docs/administrator/alarms.md.
KINDS = frozenset(
    {
        "altered", "data", "disk", "diverged", "equivocation", "fetched", "fused", "images", "influence", "keys",
        "log", "old key", "own", "ports", "recovering", "reload", "revoked", "room", "said", "share", "unvalidated",
        "validation",
    }
)  # fmt: skip
# Those that a peer can raise and settle as often as it likes.
BY_PEERS = frozenset(
    {
        "clock", "federation", "gone", "loses", "lost", "not shown", "peer paused", "quota", "refused", "refused by",
        "set back", "setup", "silent", "twice", "unproven", "wrong bytes",
    }
)  # fmt: skip


@dataclass
class _Alarm:
    code: str
    text: str
    fix: str
    since: Moment
    times: int = 1  # that it was raised
    settled: float | None = None  # when; monotonic
    held: bool = False  # shown though it is settled

    @property
    def shown(self) -> bool:
        return self.settled is None or self.held

    def listed(self) -> dict[str, Any]:
        """What `status` tells. First how often, as a long text is cut at its end."""
        told = [f"raised {self.times} times"] if self.times > 1 else []
        told += [f"over, shown until it was quiet for {QUIET_S / 60:.0f} minutes"] if self.settled is not None else []
        text = f"{', '.join(told)}: {self.text}" if told else self.text
        return {"code": self.code, "text": text, "fix": self.fix, "since": self.since.wall}


class Alarms:
    def __init__(self, clock: Callable[[], float] = lambda: time.monotonic()) -> None:
        self._clock = clock
        self._began = time.time()
        self._known: dict[str, _Alarm] = {}
        self._lines = LogLimit(LOG_LINES_PER_MINUTE, self._clock)

    def __contains__(self, code: str) -> bool:
        """Is it so now? It may be shown for longer."""
        return code in self._known and self._known[code].settled is None

    def sound(self, code: str, text: str, fix: str, since: float | None = None) -> None:
        """Raise an alarm, or renew the text of one; logged only when it is new.

        `since`: it has stood since then (wall clock), and an earlier process has told of it.
        """
        self.expire()
        known = self._known.get(code)
        if known is None:
            self._known[code] = _Alarm(code, text, fix, Moment(since))
            told = since is not None and since < self._began
            self._log(*(logging.INFO, "warning, still") if told else (logging.WARNING, "warning"), code, text=text)
            return
        known.text, known.fix = text, fix
        if since is not None:
            known.since = Moment(since)
        if not known.shown:
            self._log(logging.WARNING, "warning", code, text=text)
        if known.settled is not None:
            known.times += 1
            known.settled = None

    def sound_or_settle(self, code: str, said: tuple[str, str] | None, since: float | None = None) -> None:
        """Raise it with this text and what to do; None: settle it."""
        if said is None:
            self.settle(code)
        else:
            self.sound(code, *said, since=since)

    def settle(self, code: str, *, when_quiet: bool = False) -> None:
        """It is so no more. Shown on until it is not raised for `QUIET_S`, where a peer raised it again so soon.

        `when_quiet`: also where it was raised once only.
        """
        self.expire()
        known = self._known.get(code)
        if known is None or known.settled is not None:
            return
        known.settled = self._clock()
        by_a_peer = code in BY_PEERS or code.rpartition(" ")[0] in BY_PEERS
        known.held = when_quiet or (by_a_peer and known.times > 1)
        if not known.held:
            self._log(logging.INFO, "settled", code)
        if not by_a_peer:
            del self._known[code]

    def expire(self) -> None:
        """End what has been quiet for long enough. Call it now and then, for the log."""
        self._lines.flush()
        now = self._clock()
        for code, known in list(self._known.items()):
            if known.settled is not None and now - known.settled >= QUIET_S:
                del self._known[code]
                if known.held:
                    self._log(logging.INFO, "settled", code, times=known.times)

    def listing(self) -> list[dict[str, Any]]:
        self.expire()
        return [known.listed() for known in self._known.values() if known.shown]

    def _log(self, level: int, event: str, code: str, **fields: object) -> None:
        if self._lines.allows(f"alarm {code}"):
            log.log(level, event, extra={"code": code, **fields})
