"""Which state directory is meant, and what our hints tell people to type for it. Loads fast."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from pathlib import Path

from hsl_node.host.bare_host import NO_HOME
from hsl_node.host.layout import Layout

SYSTEM_STATE = Path("/var/lib/hsl-node")  # StateDirectory= of systemd/hsl-node.service
STATE_VARIABLE = "HSL_NODE_STATE"

NOTHING_HERE = (
    "if there was one, see that its volume is mounted. After a loss: `hsl-node restore FILE` brings back what a backup "
    "holds; without one `hsl-node recover --from-peers`, with key and settings (docs/administrator/lost-disk.md). "
    "A node that never was: `hsl-node init`. Or point --state at the right folder"
)
IN_PAST = (
    "this is a run of an earlier federation that `federation join --replace` put aside, without key and settings. To "
    "look at it with `status`, `verify` or `export`: copy it elsewhere, and node.toml, keyring.toml and the anchor set "
    "from {node} into the copy; never `start` there"
)


def nothing_here(state: Path) -> str:
    """What to do where a state directory holds no node.toml."""
    node = Layout(state.parent.parent)
    return IN_PAST.format(node=node.state) if state.parent == node.past and node.node_toml.exists() else NOTHING_HERE


def state_directory(given: Path | None) -> Path:
    """What `--state` says, else the environment, else the usual place."""
    return Path(given or os.environ.get(STATE_VARIABLE) or default_state()).absolute()


def default_state() -> Path:
    """Where a service installed by the systemd unit keeps its state; for others a folder in their home, if any."""
    with contextlib.suppress(PermissionError):  # a mount that another user made, say
        if SYSTEM_STATE.is_dir() and os.geteuid() in (0, SYSTEM_STATE.stat().st_uid):
            return SYSTEM_STATE
    if states := os.environ.get("XDG_STATE_HOME"):
        return Path(states) / "hsl-node"
    home = os.path.expanduser("~")
    return SYSTEM_STATE if home in ("~", NO_HOME) else Path(home, ".local", "state", "hsl-node")


def command(state: Path) -> str:
    """How to call us for this state directory."""
    return "hsl-node" if state == state_directory(None) else f"hsl-node --state {shlex.quote(str(state))}"


def addressed(text: str, state: Path) -> str:
    """A hint whose `hsl-node ...` in backticks can be copied as it stands, wherever the state directory is.

    Hints are written in many files that don't know which one it is; they come through here on their way to a person.
    """
    return re.sub(r"`hsl-node (?!--)", lambda _: f"`{command(state)} ", text)
