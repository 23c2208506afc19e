"""An event loop whose clock jumps to the next timer, and processes in it that can be killed like real ones.

with VirtualLoop(rng) as loop:
    loop.run_until_complete(main())     # hours pass in milliseconds; nothing waits for ever: `Hang`

Whatever runs on behalf of a process carries it in OWNER: tasks, timers, threads' work. Of a dead one nothing runs any
more, no `finally` either, as after kill -9. Work for a thread is done in the loop, a while after it was asked for.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any

WALL_BEGIN_S = 1.7e9  # the same in every run
BEGIN_S = 1000.0
BUSY_MAX = 200_000  # callbacks without the clock moving: a loop that spins
THREAD_S = (0.0, 0.0, 0.0005, 0.002, 0.02, 0.3)  # how long after it was asked for a thread's work is done


class Process:
    """What a task, a timer or a thread belongs to."""

    def __init__(self) -> None:
        self.dead = False
        self.tasks: list[asyncio.Task[Any]] = []


class Killed(BaseException):
    """The process ends here. Nothing catches it; what unwinds meets a dead process."""


class Hang(AssertionError):
    """Nothing will ever happen again, or the clock stands still for too long."""


OWNER: contextvars.ContextVar[Process | None] = contextvars.ContextVar("OWNER", default=None)


def context_of(process: Process | None) -> contextvars.Context:
    context = contextvars.copy_context()
    context.run(OWNER.set, process)
    return context


class VirtualLoop(asyncio.BaseEventLoop):
    """`rng` decides how long threads take. While it is entered, `time.time` and `time.monotonic` are its clock."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.now = BEGIN_S
        self.steps = 0
        self._rng = rng
        self._busy = 0
        self._tasks: list[asyncio.Task[Any]] = []  # a task of a dead process that is forgotten would run its `finally`
        self.set_task_factory(self._task)  # type: ignore[arg-type]

    def __enter__(self) -> VirtualLoop:
        self._real = time.time, time.monotonic
        time.time = lambda: WALL_BEGIN_S + self.now - BEGIN_S
        time.monotonic = lambda: self.now
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        time.time, time.monotonic = self._real
        self.set_exception_handler(lambda loop, context: None)
        for task in self._tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                coroutine = task.get_coro()
                assert coroutine is not None
                with suppress(BaseException):
                    coroutine.close()
        self._tasks.clear()
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]
        self.close()

    # -------------------------------------------------------------- what asyncio asks of a loop

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except Killed:
                return
            except BaseException as exc:
                if not future.cancelled():
                    future.set_exception(exc)
            else:
                if not future.cancelled():
                    future.set_result(result)

        self.call_later(self._rng.choice(THREAD_S), work)  # a thread goes on, also when nobody waits for it any more
        return future

    def add_signal_handler(self, sig: int | signal.Signals, callback: Callable[..., Any], *args: Any) -> None:
        pass

    def call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        return self.call_soon(callback, *args, context=context)

    def _write_to_self(self) -> None:
        pass

    def _task(self, loop: Any, coroutine: Coroutine[Any, Any, Any], **more: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **more)
        self._tasks.append(task)
        return task

    def _run_once(self) -> None:
        ready: Any = self._ready  # type: ignore[attr-defined]
        timers: Any = self._scheduled  # type: ignore[attr-defined]
        while timers and (timers[0]._cancelled or _is_dead(timers[0])):
            heapq.heappop(timers)._scheduled = False
        if not ready:
            if not timers:
                raise Hang("nothing is left that could ever happen")
            if timers[0]._when > self.now:
                self.now, self._busy = timers[0]._when, 0
        while timers and timers[0]._when <= self.now:
            handle = heapq.heappop(timers)
            handle._scheduled = False
            ready.append(handle)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled or _is_dead(handle):
                continue
            self.steps += 1
            self._busy += 1
            handle._run()
        if self._busy > BUSY_MAX:
            raise Hang(f"{self._busy} steps and the clock has not moved")


def _is_dead(handle: Any) -> bool:
    owner = handle._context.get(OWNER)
    return owner is not None and owner.dead
