"""How a terminal looks, and what is printed on it. Imports nothing that is slow to load."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from hsl_node.host.units import figure


def print_json(value: Any) -> None:
    """ASCII only: a string from elsewhere may hold what a terminal obeys, U+009B as well as ESC."""
    print(json.dumps(value, indent=2, default=str), flush=True)


def wants_colour() -> bool:
    """https://no-color.org, and never into a pipe or a file."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def wants_unicode() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


def progress_bar(what: str) -> Callable[[int, int], None]:
    """A `(done, total)` callback that draws one line on a terminal, and nothing elsewhere."""

    def draw(done: int, total: int) -> None:
        if total and (done == total or done * 100 // total != (done - 1) * 100 // total):
            cells = 30 * done // total
            bar = ("█" * cells + "░" * (30 - cells)) if wants_unicode() else ("#" * cells + "." * (30 - cells))
            print(f"\r{what}  {bar}  {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return draw if sys.stderr.isatty() else lambda done, total: None


def progress_lines(score: str = "score") -> Callable[[dict[str, Any]], None]:
    """Hears a trainer's events and says on stderr how far it is: one line redrawn on a terminal, else a line each."""

    def say(event: dict[str, Any]) -> None:
        match event.get("event"):
            case "busy":
                text = f"{event['what']}, {event['done']} of {event['total']}"
            case "progress":
                text = f"epoch {event['epoch']}, batch {event['batch']} of {event['batches']}"
            case "epoch":
                text = f"epoch {event['epoch']} trained, validation {score} {figure(event['score'])}"
            case _:
                return
        print(f"\r{text:70}" if sys.stderr.isatty() else text, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)

    return say
