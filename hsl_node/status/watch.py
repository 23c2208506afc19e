"""`hsl-node status --watch`: the status page, drawn again and again with bars, until Ctrl-C."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hsl_node.errors import WaitTimeout
from hsl_node.status.page import Look, fetch, render

EVERY_S = 1.0


def watch(state: Path, look: Look) -> None:
    """Draw until KeyboardInterrupt. A daemon that stops or hangs is shown as that, and again when it is back."""
    console = Console(highlight=False)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            page = _page(state, replace(look, width=console.width, bars=True), console.height)
            live.update(Text.from_ansi(page), refresh=True)
            time.sleep(EVERY_S)


def _page(state: Path, look: Look, height: int) -> str:
    now = time.time()
    try:
        page = render(fetch(state), now=now, look=look, height=height - 2)  # two for the line below
    except WaitTimeout as exc:
        page = str(exc)
    return f"{page}\n\n{look.paint(time.strftime('%H:%M:%S', time.localtime(now)) + '  Ctrl-C leaves', '2')}"
