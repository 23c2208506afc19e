"""What the demo says while it runs: one line per event, for a terminal, a pipe or a log."""

from __future__ import annotations

import re
import time

from hsl_node.demo.processes import Snapshots
from hsl_node.errors import escaped
from hsl_node.host.units import figure

EPOCHS_A_LINE = 4  # of training alone: enough to see that it goes on


class Lines:
    """Each event is said once, however often it is seen."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._began = time.monotonic()

    def progress(self, what: str, done: int, total: int) -> None:
        if done == total:
            self._once(f"{what}: {total}")

    def nodes(self, snapshots: Snapshots) -> None:
        for name, status in snapshots.items():
            if status is None:
                continue
            for row in status.scores:
                if row.own is not None:
                    self._once(f"{name}: round {row.round} trained, validation {status.score_name} {figure(row.own)}")
                if row.fused is not None:
                    self._once(f"{name}: round {row.round} fused, validation {status.score_name} {figure(row.fused)}")
            for warning in status.warnings:
                self._once(f"{name}: warning: {escaped(warning.text, 300)}")
            if status.state in ("agreeing", "finished"):
                when = f" after round {status.round - 1}" if status.round else ""
                self._once(f"{name}: {status.state}{when}")

    def evaluations(self, words: dict[str, str]) -> None:
        for name, word in words.items():
            what = word.partition(",")[0]
            epoch = re.fullmatch(r"epoch (\d+)( trained)?", what)
            if word == "done":
                self._once(f"{name}: evaluated")
            elif epoch is None and not what.startswith(("(", "validating")):
                self._once(f"{name}: {what}")
            elif epoch and int(epoch[1]) % EPOCHS_A_LINE == 0:
                self._once(f"{name}: alone, epoch {epoch[1]}")

    def _once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)
