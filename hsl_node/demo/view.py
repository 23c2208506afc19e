"""How the demo looks while it runs: a live table on a terminal, plain lines in a pipe."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from hsl_node.demo.processes import Snapshots
from hsl_node.errors import escaped
from hsl_node.federation.plan import Plan
from hsl_node.host.units import auc, size
from hsl_node.status.snapshot import Busy, Snapshot

BAR_CELLS = 16
EPOCHS_A_LINE = 4  # in a pipe, of training alone: enough to see that it goes on
_STYLE = {"training": "cyan", "fusing": "magenta", "sending": "blue", "finished": "green", "degraded": "red"}


class View(Protocol):
    """What a demo shows; every call replaces what the one before drew."""

    def say(self, text: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def nodes(self, snapshots: Snapshots) -> None: ...
    def evaluations(self, words: dict[str, str]) -> None: ...


@contextmanager
def view(plan: Plan) -> Iterator[View]:
    if not sys.stdout.isatty():
        yield Lines()
        return
    with Live(console=Console(highlight=False), auto_refresh=True, refresh_per_second=8, transient=True) as live:
        yield Screen(live, plan)


class Screen:
    """A rich Live table; what is said goes above it and stays."""

    def __init__(self, live: Live, plan: Plan) -> None:
        self._live = live
        self._plan = plan
        self._began = time.monotonic()
        self._spinner = Spinner("dots")
        self._moved: dict[tuple[str, str, str, int], int] = {}  # bytes of every exchange so far

    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False)

    def progress(self, what: str, done: int, total: int) -> None:
        line = Table.grid(padding=(0, 1))
        line.add_row(self._spinner, what, _bar(done / max(total, 1)), f"{done} of {total}")
        self._live.update(line)
        if done >= total:
            self._live.update(Text(""))

    def nodes(self, snapshots: Snapshots) -> None:
        table = Table(box=None, padding=(0, 1), header_style="dim")
        for column in ("hospital", "state", "round", "", "epoch", "AUC own", "AUC fused", "sent", "received"):
            table.add_column(column, justify="right" if column.startswith("AUC") else "left", no_wrap=True)
        for name, status in snapshots.items():
            table.add_row(name, *(["starting"] + [""] * 7 if status is None else self._cells(name, status)))
        seconds = time.monotonic() - self._began
        foot = Table.grid(padding=(0, 1))
        foot.add_row(self._spinner, Text(f"{seconds:.0f} s   Ctrl-C stops every process", style="dim"))
        warnings = [Text(f"! {name}: {w.text}", style="red") for name, s in snapshots.items() if s for w in s.warnings]
        self._live.update(Group(table, *warnings, foot))

    def _cells(self, name: str, status: Snapshot) -> list[RenderableType]:
        plan = self._plan
        round = min(status.round or 0, plan.rounds)
        epoch = status.epoch
        return [
            Text(status.state, style=_STYLE.get(status.state, "")),
            f"{round} of {plan.rounds}",
            _bar(_fraction(status, plan)),
            f"{epoch.epoch} of {epoch.of}" if epoch and epoch.epoch else _busy(status.busy),
            auc(_last(r.local for r in status.aucs)),
            auc(_last(r.fused for r in status.aucs)),
            self._bytes(name, status, "sent"),
            self._bytes(name, status, "received"),
        ]

    def _bytes(self, name: str, status: Snapshot, direction: str) -> str:
        """All exchanges together; a snapshot knows the present one only."""
        for peer in status.peers:
            moved = peer.sent if direction == "sent" else peer.received
            key = (name, peer.name, direction, moved.round)
            self._moved[key] = max(self._moved.get(key, 0), moved.bytes)
        total = sum(v for (n, _, d, _), v in self._moved.items() if (n, d) == (name, direction))
        return size(total) if total else "-"

    def evaluations(self, words: dict[str, str]) -> None:
        table = Table.grid(padding=(0, 2))
        for name, word in words.items():
            table.add_row(Text("✓", style="green") if word == "done" else self._spinner, name, Text(word, style="dim"))
        self._live.update(table)


class Lines:
    """One line per event, for pipes and logs."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def progress(self, what: str, done: int, total: int) -> None:
        if done == total:
            self._once(f"{what}: {total}")

    def nodes(self, snapshots: Snapshots) -> None:
        for name, status in snapshots.items():
            if status is None:
                continue
            for row in status.aucs:
                if row.local is not None:
                    self._once(f"{name}: round {row.round} trained, validation AUC {auc(row.local)}")
                if row.fused is not None:
                    self._once(f"{name}: round {row.round} fused, validation AUC {auc(row.fused)}")
            for warning in status.warnings:
                self._once(f"{name}: warning: {warning.text}")
            if status.state in ("agreeing", "finished"):
                when = f" after round {status.round - 1}" if status.round else ""
                self._once(f"{name}: {status.state}{when}")

    def evaluations(self, words: dict[str, str]) -> None:
        for name, word in words.items():
            what = word.partition(",")[0]
            epoch = re.fullmatch(r"epoch (\d+)( trained)?", what)
            if word == "done":
                self._once(f"{name}: evaluated")
            elif epoch is None and not what.startswith("("):
                self._once(f"{name}: {what}")
            elif epoch and int(epoch[1]) % EPOCHS_A_LINE == 0:
                self._once(f"{name}: alone, epoch {epoch[1]}")

    def _once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)


def _fraction(status: Snapshot, plan: Plan) -> float:
    """How much of the whole run this node has trained."""
    if status.state == "finished":
        return 1.0
    done = float(max(0, (status.round or 0) - 1))
    if status.phase in ("collect", "fuse"):
        done += 1
    elif (epoch := status.epoch) and epoch.epoch:
        done += (epoch.epoch - 1 + (epoch.batch or 0) / (epoch.batches or 1)) / plan.epochs_per_round
    return min(1.0, done / plan.rounds)


def _bar(fraction: float) -> ProgressBar:
    return ProgressBar(total=1.0, completed=fraction, width=BAR_CELLS)


def _last(aucs: Iterable[float | None]) -> float | None:
    known = [value for value in aucs if value is not None]
    return known[-1] if known else None


def _busy(busy: Busy | None) -> str:
    return f"{escaped(busy.what, 40)} {busy.done}/{busy.total}" if busy else ""
