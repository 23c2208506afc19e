"""The daemon's heartbeat: systemd's watchdog, its status line, and an eye on the disk."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hsl_node.host import systemd
from hsl_node.host.units import size
from hsl_node.sync.round import Phase
from hsl_node.sync.store.holdings import held
from hsl_node.sync.store.room import reserve_of

if TYPE_CHECKING:
    from hsl_node.node.daemon import Node

PULSE_S = 5.0  # watchdog, systemd's status line
STARTING_S = 60.0  # what a start that is alive may take from each pulse on


class Pulse:
    """One for each daemon."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def beat(self) -> None:
        """Tell systemd that the loop lives, and what the node is doing."""
        while True:
            systemd.notify("WATCHDOG=1", f"STATUS={self._headline()}")
            if self._node.state is None:  # a first start decodes all images, however long that takes
                systemd.notify(systemd.extend(STARTING_S))
            self._watch_room()
            self._node.alarms.expire()
            await asyncio.sleep(min(PULSE_S, systemd.watchdog_interval_s() or PULSE_S))

    def _watch_room(self) -> None:
        """Below its reserve our inbox takes nothing any more; the peers only learn that it failed, so say it here."""
        node = self._node
        reserve = reserve_of(node.config.inbox.kind)
        found = node.store.room(node.schema.file_bytes if node.schema else 0, len(node.federation.peers), reserve)
        if found.free >= found.arrival:
            return node.alarms.settle("room")
        text = f"{size(found.free)} free: no checkpoint of a peer is taken in below {size(found.arrival)}"
        fix = "free some space; the node goes on by itself"
        if of := held(node.layout.homes):
            peer = max(sorted(of), key=lambda p: of[p])
            text += f"; most of what waits in the inbox is of {peer}, {size(of[peer])}"
            fix += f"; where that is more than two checkpoints, ask {peer} why"
        node.alarms.sound("room", text, fix)

    def _headline(self) -> str:
        """One line for `systemctl status`."""
        state = self._node.state
        if state is None:
            return "starting"
        trainer = self._node.trainer.status()["state"]
        trouble = f"degraded: the trainer is {trainer}; " if trainer in ("silent", "restarting") else ""
        training = 0 < state.round <= state.rounds and state.phase is not Phase.FINISHED
        waiting = f", waiting for {', '.join(state.missing)}" if state.me in state.have and state.missing else ""
        return trouble + str(state.phase) + (f", round {state.round} of {state.rounds}" if training else "") + waiting
