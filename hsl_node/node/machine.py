"""The round machine with its journal: the only writer of the round's state.

    machine.tell(Happened(event, (record, ...)))      the next state and the records durable in one transaction,
                                                      then what is to do now is started, and what is not is cancelled

What performs an action (training, fusing, signing, delivery) is given the action and returns what came of it: it holds
no machine. The machine tells itself in the same task, with no await between, so no cancellation falls between the two.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from hsl_node.host.durable import Step
from hsl_node.host.moment import Moment
from hsl_node.node.tasks import Tasks
from hsl_node.sync import round as machine
from hsl_node.sync.round import Arrived, Delivered, Event, Forgotten, Fused, Proven, State, Trained
from hsl_node.sync.store.journal import Journal

log = logging.getLogger(__name__)

_COMMITS = {
    Trained: Step.SENDER_SIGN,
    Arrived: Step.RECEIVER_RECORD,
    Proven: Step.RECEIVER_RECORD,
    Fused: Step.FUSION_RECORD,
    Delivered: Step.SENDER_DELIVERED,
    Forgotten: Step.SENDER_DELIVERED,
}


@dataclass(frozen=True)
class Happened:
    """An event of the round, and what is recorded in the transaction that saves the state after it."""

    event: Event
    records: tuple[Callable[[], None], ...] = ()


Perform = Callable[[], Coroutine[Any, Any, Happened | None]]
Wanted = Mapping[Hashable, Perform]  # what is to do now: its name, and how it is done


class Machine:
    def __init__(self, journal: Journal, state: State, tasks: Tasks, wanted: Callable[[State], Wanted]) -> None:
        """`wanted`: what the node wants done in a state; the same name twice is one piece of work."""
        self._journal = journal
        self._tasks = tasks
        self._wanted = wanted
        self._mine: set[Hashable] = set()  # names of what was started here
        self.state = state
        begun = {row["phase"]: row["started"] for row in journal.rows("phases", state.round)}
        self.entered = Moment(begun.get(str(state.phase)))  # this phase
        self.moved_on: list[Callable[[], None]] = []  # told of another phase, or round

    def tell(self, happened: Happened) -> None:
        before = self.state
        after, _ = machine.step(before, happened.event)
        with self._journal.transaction(_COMMITS[type(happened.event)]):
            for record in happened.records:
                record()
            self._journal.save_state(machine.to_json(after))
            self._journal.record_phase(after.round, after.phase)
        self.state = after
        if (after.phase, after.round) != (before.phase, before.round):
            self.entered = Moment()
            log.info("phase", extra={"phase": str(after.phase), "round": after.round, "base": after.base[:12]})
            for act in self.moved_on:
                act()
        if after.reason != before.reason:
            log.error("peers disagree", extra={"phase": str(after.phase), "reason": after.reason})
            self._journal.note("error", "disagreement", after.reason)
        self.reconcile()

    def reconcile(self, anew: Callable[[Hashable], bool] = lambda key: False) -> None:
        """Start what is to do and not under way; cancel what is under way and not to do any more, or to do `anew`."""
        wanted = self._wanted(self.state)
        for key, task in self._tasks.items():
            stays = task.done() or task.cancelling() or task is asyncio.current_task()
            if key in self._mine and (key not in wanted or anew(key)) and not stays:
                task.cancel()
        for key, perform in wanted.items():
            if key not in self._tasks:
                self._mine.add(key)
                self._tasks.spawn(key, self._do(perform), self.reconcile)  # cancelled, it may be wanted again by now
        self._mine = {key for key in self._mine if key in self._tasks}

    async def _do(self, perform: Perform) -> None:
        if (happened := await perform()) is not None:
            self.tell(happened)
