"""`hsl-node status` as it is printed once. Loads neither typer nor pydantic: see cli.py."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from hsl_node.errors import NotRunning
from hsl_node.host.terminal import print_json, wants_colour, wants_unicode
from hsl_node.status import page
from hsl_node.status.check import check as judge


def show(state: Path, *, json: bool = False, check: bool = False) -> int:
    """Print it; gives the exit code."""
    if check:
        code, line = judge(state)
        print(line, flush=True)
        return code
    snapshot = page.fetch(state)
    if json:
        print_json(snapshot.as_json())
    else:
        print(page.render(snapshot, now=time.time(), look=look()), flush=True)
    return NotRunning.exit_code if snapshot.state == "stopped" else 0


def look() -> page.Look:
    """How this terminal wants it; 80 columns where there is none."""
    width = shutil.get_terminal_size((page.WIDTH, 24)).columns
    return page.Look(width=min(max(width, 60), 110), colour=wants_colour(), unicode=wants_unicode())
