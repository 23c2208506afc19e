"""What every command uses: where the state is, how a terminal looks, how JSON is printed, the panels of the help."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hsl_node.units import auc

# The help's panels, in the order of a node's life.
START_HERE = "Start here"
ENROL = "Enrol"
DATA = "Images"
RUN = "Run"
RESULTS = "Results"

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


SYSTEM_STATE = Path("/var/lib/hsl-node")  # StateDirectory= of systemd/hsl-node.service


@dataclass(frozen=True)
class Context:
    """What the options before the command's name say."""

    state: Path


def state_of(context: typer.Context) -> Path:
    found: Context = context.obj
    return found.state


def default_state() -> Path:
    """Where a service installed by the systemd unit keeps its state; for everybody else a folder of their own."""
    try:
        if SYSTEM_STATE.is_dir() and os.geteuid() in (0, SYSTEM_STATE.stat().st_uid):
            return SYSTEM_STATE
    except PermissionError:
        pass
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "hsl-node"


def command(state: Path) -> str:
    """How to call us for this state directory: what our hints tell people to type."""
    usual = Path(os.environ.get("HSL_NODE_STATE") or default_state()).absolute()
    return "hsl-node" if state == usual else f"hsl-node --state {state}"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def wants_colour() -> bool:
    """https://no-color.org, and never into a pipe or a file."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def wants_unicode() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")


def progress_bar(what: str) -> Callable[[int, int], None]:
    """A `(done, total)` callback that draws one line on a terminal, and nothing elsewhere."""

    def silent(done: int, total: int) -> None:
        pass

    def draw(done: int, total: int) -> None:
        if total and (done == total or done * 100 // total != (done - 1) * 100 // total):
            cells = 30 * done // total
            bar = ("█" * cells + "░" * (30 - cells)) if wants_unicode() else ("#" * cells + "." * (30 - cells))
            print(f"\r{what}  {bar}  {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return draw if sys.stderr.isatty() else silent


def progress_lines() -> Callable[[dict[str, Any]], None]:
    """Hears a trainer's events and says on stderr how far it is: one line redrawn on a terminal, else a line each."""

    def say(event: dict[str, Any]) -> None:
        match event.get("event"):
            case "busy":
                text = f"{event['what']}, {event['done']} of {event['total']}"
            case "progress":
                text = f"epoch {event['epoch']}, batch {event['batch']} of {event['batches']}"
            case "epoch":
                text = f"epoch {event['epoch']} trained, validation AUC {auc(event['auc'])}"
            case _:
                return
        print(f"\r{text:70}" if sys.stderr.isatty() else text, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)

    return say
