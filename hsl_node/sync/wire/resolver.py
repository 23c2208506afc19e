"""The addresses of a host name, from the system's resolver, which may take long and cannot be cancelled.

So each name has a thread of its own, and no more than one: a name server that does not answer holds up neither the work
that waits for asyncio's threads (scans, checks, fusions), nor another name, nor the end of this process.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import Future
from typing import Any

Addresses = list[tuple[Any, ...]]  # as of socket.getaddrinfo

_under_way: dict[tuple[str, int], Future[Addresses]] = {}  # of this process; as many as peers at most


async def addresses(host: str, port: int) -> Addresses:
    """Of a TCP server. Whoever asks while the name is being looked up gets the same answer.

    Raises:
        OSError: there is no such name, or its server does not answer.
    """
    return await asyncio.wrap_future(_under_way.get((host, port)) or _begin(host, port))


def _begin(host: str, port: int) -> Future[Addresses]:
    answer: Future[Addresses] = Future()
    answer.set_running_or_notify_cancel()  # who stops waiting for it does not cancel it for the others

    def look_up() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as exc:
            answer.set_exception(exc)

    # Not a ThreadPoolExecutor: the interpreter waits for its threads at the end.
    threading.Thread(target=look_up, name=f"name-{host}", daemon=True).start()
    _under_way[host, port] = answer
    answer.add_done_callback(lambda done: _under_way.pop((host, port)))
    return answer
