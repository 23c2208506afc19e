"""SIGHUP in mid-run: which settings of node.toml are taken then, and which wait for a restart."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hsl_node.errors import HslError, escaped
from hsl_node.federation import node_toml
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.host import event_log
from hsl_node.node.alarms import Alarms
from hsl_node.node.checks import require_quota
from hsl_node.node.here import Here, Keys

log = logging.getLogger(__name__)

IN_MID_RUN = ("client", "inbox.quota_mib")  # all else the trainer, the open port or the others rely on


@dataclass(frozen=True)
class Reload:
    """Whoever moved the log file away, or changed settings or keys, wants them taken now."""

    here: Here
    keys: Keys
    alarms: Alarms
    checkpoint_bytes: Callable[[], int]  # 0 where that is not known yet
    taken: Callable[[], None]

    def __call__(self) -> None:
        event_log.reopen()
        try:
            found = node_toml.load_node(self.here.layout.state)
            require_quota(found, self.checkpoint_bytes())
            counts, waiting = renewed(self.here.config, found)
            self.keys.read_again()
        except (HslError, OSError) as exc:
            fix = "mend it, then `systemctl reload hsl-node`, or send SIGHUP again"
            why = exc.message if isinstance(exc, HslError) else str(exc)
            text = f"the changed settings were not taken: {escaped(why, 600)}"
            return self.alarms.sound("reload", text, fix)
        self.here.config = counts
        self.taken()
        log.info("reloaded", extra={"waiting_for_a_restart": ", ".join(waiting) or "nothing"})
        if not waiting:
            return self.alarms.settle("reload")
        text = f"node.toml has changed since the start; not taken before a restart: {', '.join(waiting)}"
        self.alarms.sound("reload", text, "`systemctl restart hsl-node`, or `hsl-node stop` and start it again")


def renewed(running: NodeConfig, found: NodeConfig) -> tuple[NodeConfig, list[str]]:
    """The settings that count from now on, and the changed ones that a restart would take."""
    inbox = found.inbox.model_copy(update={"kind": running.inbox.kind, "directory": running.inbox.directory})
    before, after = _flat(running.model_dump()), _flat(found.model_dump())
    waiting = [name for name in after if after[name] != before.get(name) and name not in IN_MID_RUN]
    return running.model_copy(update={"client": found.client, "inbox": inbox}), waiting


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`inbox.quota_mib` and the like, as people name them."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat
