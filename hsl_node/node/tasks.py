"""What runs in this process, each under a name and once. The first error that nobody handles is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any


class Tasks:
    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._running: dict[Hashable, asyncio.Task[None]] = {}
        self.ending = False

    def __contains__(self, key: Hashable) -> bool:
        return key in self._running

    def items(self) -> list[tuple[Hashable, asyncio.Task[None]]]:
        return list(self._running.items())

    def spawn(
        self, key: Hashable, work: Coroutine[Any, Any, None], cancelled: Callable[[], None] = lambda: None
    ) -> None:
        """`cancelled`: called soon after it was cancelled, unless all ends."""
        task = asyncio.get_running_loop().create_task(work, name=str(key))
        self._running[key] = task
        task.add_done_callback(lambda t: self._ended(key, t, cancelled))

    def _ended(self, key: Hashable, task: asyncio.Task[None], cancelled: Callable[[], None]) -> None:
        if self._running.get(key) is task:
            del self._running[key]
        if task.cancelled():
            if not self.ending:
                asyncio.get_running_loop().call_soon(cancelled)
        elif (error := task.exception()) is not None:
            self._failed(error)

    async def end(self) -> None:
        """No task stays behind."""
        self.ending = True
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
