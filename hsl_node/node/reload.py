"""SIGHUP in mid-run: which settings of node.toml are taken then, and which wait for a restart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hsl_node.federation.node_toml import NodeConfig

IN_MID_RUN = ("client", "inbox.quota_mib")  # all else the trainer, the open port or the others rely on


def renewed(running: NodeConfig, found: NodeConfig) -> tuple[NodeConfig, list[str]]:
    """The settings that count from now on, and the changed ones that a restart would take."""
    inbox = running.inbox.model_copy(update={"quota_mib": found.inbox.quota_mib})
    before, after = _flat(running.model_dump()), _flat(found.model_dump())
    waiting = [name for name in after if after[name] != before.get(name) and name not in IN_MID_RUN]
    return running.model_copy(update={"client": found.client, "inbox": inbox}), waiting


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`inbox.quota_mib` and the like, as people name them."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat
