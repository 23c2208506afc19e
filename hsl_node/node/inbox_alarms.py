"""What one peer may hold in the embedded inbox, and what is said at this site when its files find no room or vanish."""

from __future__ import annotations

from dataclasses import dataclass

from hsl_node.federation.names import Peer
from hsl_node.host.units import size
from hsl_node.node.alarms import Alarms
from hsl_node.node.here import Here
from hsl_node.sync.store.room import Quota, ample_mib, quota_bytes


@dataclass(frozen=True)
class InboxAlarms:
    here: Here
    alarms: Alarms
    checkpoint_bytes: int

    def quota(self) -> Quota:
        """As node.toml says now."""
        return Quota(bytes=quota_bytes(self.here.config.inbox.quota_set, self.checkpoint_bytes))

    def full(self, peer: Peer, why: str) -> None:
        """The inbox has refused a file of this peer for its quota."""
        fix = f"see whether its files are taken in (`hsl-node logs`), and ask {peer} what it sends"
        if self.quota().bytes < (ample := ample_mib(self.checkpoint_bytes)) * 2**20:
            fix = f"set inbox.quota_mib = {ample} in node.toml, or remove that line; then `systemctl reload hsl-node`"
        self.alarms.sound(f"quota {peer}", f"{peer} cannot deliver, this inbox has no room for it: {why}", fix)

    def gone(self, peer: Peer, count: int) -> None:
        """What a peer had written into the inbox is not there, and nobody at work here removed it."""
        text = f"{size(count)} that {peer} had delivered are gone from this node's disk, and not by this node"
        fix = f"see what works in {self.here.homes}: a virus scanner, a cleaning job. Leave that folder out of its work"
        self.alarms.sound(f"gone {peer}", text, fix)
