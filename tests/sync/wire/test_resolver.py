"""A name server that does not answer holds up nothing but the connections to the names that it owes."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hostile import until

from hsl_node.errors import TransportError
from hsl_node.federation.config import PEERS_MAX
from hsl_node.sync.wire.dial import reach
from hsl_node.sync.wire.transport import Login

LIMIT_S = 60.0  # what never comes runs into it


class NameServer:
    """In place of `socket.getaddrinfo`: a name that is silent gets its answer when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: Counter[str] = Counter()
        self.silent: Callable[[str], bool] = lambda host: True
        self.speaks = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", self.getaddrinfo)

    def getaddrinfo(self, host: str, port: int, *more: Any, **named: Any) -> list[Any]:
        self.asked[host] += 1
        if self.silent(host):
            self.speaks.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = NameServer(monkeypatch)
    yield server
    server.speaks.set()


def login(host: str, port: int) -> Login:
    return Login(host, host, port, "u", "", ())


async def open_socket(login: Login, seconds: float) -> socket.socket:
    async def opened(login: Login, sock: socket.socket) -> socket.socket:
        return sock

    return await reach(login, seconds, opened)


def run(names: NameServer, story: Callable[[int], Any]) -> None:
    """`story(port)`, with somebody who listens there and one thread for local work."""

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            try:
                async with asyncio.timeout(LIMIT_S):
                    await story(listener.getsockname()[1])
            finally:
                names.speaks.set()  # else a failure waits for its threads for ever

    asyncio.run(main())


def test_names_of_all_peers_that_get_no_answer_hold_up_neither_local_work_nor_another_name(names: NameServer) -> None:
    hosts = [f"p{n}.example.org" for n in range(PEERS_MAX - 1)]
    names.silent = lambda host: host in hosts

    async def story(port: int) -> None:
        waiting = [asyncio.create_task(open_socket(login(host, port), LIMIT_S)) for host in hosts]
        await until(lambda: bool(names.asked))
        assert await asyncio.to_thread(lambda: names.speaks.is_set()) is False, "local work is done meanwhile"
        (await open_socket(login("there.example.org", port), LIMIT_S)).close()
        assert not any(task.done() for task in waiting)
        names.speaks.set()
        for sock in await asyncio.gather(*waiting):
            sock.close()
        assert names.asked == {**dict.fromkeys(hosts, 1), "there.example.org": 1}

    run(names, story)


def test_a_name_is_looked_up_once_at_a_time_however_often_it_is_tried_and_anew_after_its_answer(
    names: NameServer,
) -> None:
    async def story(port: int) -> None:
        patient = asyncio.create_task(open_socket(login("p.example.org", port), LIMIT_S))
        await until(lambda: names.asked.total() == 1)
        for _ in range(20):
            with pytest.raises(TransportError, match="looking up its name: nothing moved"):
                await open_socket(login("p.example.org", port), 0.001)
        assert names.asked.total() == 1 and not patient.done()
        names.speaks.set()
        (await patient).close()
        (await open_socket(login("p.example.org", port), LIMIT_S)).close()
        assert names.asked.total() == 2, "an answer is not kept: addresses change"

    run(names, story)


def test_a_name_that_does_not_exist_is_told(names: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any, **more: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)

    async def story(port: int) -> None:
        for _ in range(2):
            with pytest.raises(TransportError, match=r"p\.example\.org.*Name or service not known"):
                await open_socket(login("p.example.org", port), LIMIT_S)

    run(names, story)


END = """
import asyncio, socket, threading
from hsl_node.sync.wire.dial import reach
from hsl_node.sync.wire.transport import Login

def silent(*arguments, **more):
    asked.set()
    threading.Event().wait()

async def main():
    task = asyncio.create_task(reach(Login("p", "p.example.org", 1, "u", "", ()), 60, None))
    while not asked.is_set():
        await asyncio.sleep(0.01)
    task.cancel()

asked = threading.Event()
socket.getaddrinfo = silent
asyncio.run(main())
print("left", flush=True)
"""


def test_a_process_ends_though_a_name_never_gets_an_answer() -> None:
    done = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")
