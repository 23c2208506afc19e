"""What every command uses: where the state is, how a terminal looks, how JSON is printed, the panels of the help."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

# The help's panels, in the order of a node's life.
START_HERE = "Start here"
ENROL = "Enrol"
DATA = "Images"
RUN = "Run"
RESULTS = "Results"

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@dataclass(frozen=True)
class Context:
    """What the options before the command's name say."""

    state: Path


def state_of(context: typer.Context) -> Path:
    found: Context = context.obj
    return found.state


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Aligned columns for a terminal or a pipe; the columns in `right` end flush."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            f"{cell:>{w}}" if i in right else f"{cell:{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    )


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
