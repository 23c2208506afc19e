"""The daemon's heartbeat: systemd's watchdog, its status line, and an eye on the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from hsl_node.host import event_log, systemd
from hsl_node.host.units import duration, size
from hsl_node.node.alarms import Alarms
from hsl_node.node.here import Here
from hsl_node.node.trainer import TROUBLED, Trainer
from hsl_node.sync.round import Phase, State
from hsl_node.sync.store.holdings import held

PULSE_S = 5.0  # watchdog, systemd's status line
STARTING_S = 60.0  # what a start that is alive may take from each pulse on


@dataclass(frozen=True)
class Pulse:
    here: Here
    alarms: Alarms
    trainer: Trainer
    state: Callable[[], State | None]  # None while this node starts, or recovers
    checkpoint_bytes: Callable[[], int]  # 0 where that is not known yet

    async def beat(self) -> None:
        """Tell systemd that the loop lives, and what the node is doing."""
        while True:
            systemd.notify("WATCHDOG=1", f"STATUS={self._headline()}")
            if self.state() is None:  # a first start decodes all images, however long that takes
                systemd.notify(systemd.extend(STARTING_S))
            self._watch_room()
            self._watch_log()
            self.alarms.expire()
            await asyncio.sleep(min(PULSE_S, systemd.watchdog_interval_s() or PULSE_S))

    def _watch_room(self) -> None:
        """Below its reserve our inbox takes nothing any more; the peers only learn that it failed, so say it here."""
        here = self.here
        found = here.store.room(self.checkpoint_bytes(), len(here.federation.peers), here.reserve_bytes)
        if found.free >= found.arrival:
            return self.alarms.settle("room")
        text = f"{size(found.free)} free: no checkpoint of a peer is taken in below {size(found.arrival)}"
        fix = "free some space; the node goes on by itself"
        if of := held(here.layout.homes):
            peer = max(sorted(of), key=lambda p: of[p])
            text += f"; most of what waits in the inbox is of {peer}, {size(of[peer])}"
            fix += f"; where that is more than two checkpoints, ask {peer} why"
        self.alarms.sound("room", text, fix)

    def _watch_log(self) -> None:
        """Nobody waits for a log that takes no lines, so this is the one place that tells."""
        blocked = event_log.blocked()
        if not blocked:
            return self.alarms.settle("log")
        text = " and ".join(
            f"{b.outlet} has taken no log line for {duration(b.for_s)}"
            + (f", {b.left_out:,} are left out so far" if b.left_out else "")
            for b in blocked
        )
        fix = "the run goes on; see to the disk of log/, or to whatever reads the daemon's stderr"
        self.alarms.sound("log", text, fix)

    def _headline(self) -> str:
        """One line for `systemctl status`."""
        state = self.state()
        if state is None:
            return "starting"
        trainer = self.trainer.status()["state"]
        trouble = f"degraded: the trainer is {trainer}; " if trainer in TROUBLED else ""
        training = 0 < state.round <= state.rounds and state.phase is not Phase.FINISHED
        waiting = f", waiting for {', '.join(state.missing)}" if state.me in state.have and state.missing else ""
        return trouble + str(state.phase) + (f", round {state.round} of {state.rounds}" if training else "") + waiting
