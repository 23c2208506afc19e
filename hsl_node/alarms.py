"""What a person should know now: raised when it becomes true, settled when it no longer is. Shown first by `status`."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alarm:
    code: str
    text: str
    fix: str
    since: float  # wall clock, for display


class Alarms:
    def __init__(self) -> None:
        self._raised: dict[str, Alarm] = {}

    def __contains__(self, code: str) -> bool:
        return code in self._raised

    def sound(self, code: str, text: str, fix: str) -> None:
        """Raise an alarm, or renew the text of one; logged only when it is new."""
        before = self._raised.get(code)
        self._raised[code] = Alarm(code, text, fix, before.since if before else time.time())
        if before is None:
            log.warning("warning", extra={"code": code, "text": text})

    def settle(self, code: str) -> None:
        if self._raised.pop(code, None) is not None:
            log.info("settled", extra={"code": code})

    def listing(self) -> list[dict[str, Any]]:
        return [asdict(a) for a in self._raised.values()]
