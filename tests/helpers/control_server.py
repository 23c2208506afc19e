"""A control server as the daemon has one: in a thread of this process, and as a process that goes on saving."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hsl_node.host import control
from hsl_node.host.layout import Layout


async def echo(op: str, request: dict[str, Any]) -> dict[str, Any]:
    return {"said": op}


@contextmanager
def serving(state: Path, handler: control.Handler = echo) -> Iterator[None]:
    """A control server in a loop of its own, as the daemon has one."""
    (state / "run").mkdir(parents=True, exist_ok=True)
    ready, leave = threading.Event(), threading.Event()

    async def main() -> None:
        async with control.serve(Layout(state).socket, handler):
            ready.set()
            await asyncio.to_thread(leave.wait)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert ready.wait(60)
        yield
    finally:
        leave.set()
        thread.join(60)


DAEMON = """
    import asyncio, sys, time
    from pathlib import Path
    from hsl_node.host import control

    async def main():
        leave = asyncio.Event()
        async def handler(op, request):
            leave.set()
            return {}
        async with control.serve(Path(sys.argv[1]), handler):
            print("ready", flush=True)
            await leave.wait()
        time.sleep(float(sys.argv[2]))  # the socket is gone, the process is not: it still saves

    asyncio.run(main())
"""


def daemon(state: Path, saves_for_s: float) -> subprocess.Popen[bytes]:
    (state / "run").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(DAEMON), str(Layout(state).socket), str(saves_for_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process
