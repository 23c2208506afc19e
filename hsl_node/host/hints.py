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
    if state.parent == node.past and node.node_toml.exists():
        return IN_PAST.format(node=node.state)
    elsewhere = next((place for place in _usual_places() if place != state and _holds_a_node(place)), None)
    return NOTHING_HERE if elsewhere is None else f"a node is at {elsewhere}: --state {elsewhere}. Else: {NOTHING_HERE}"


def state_directory(given: Path | None) -> Path:
    """What `--state` says, else the environment, else the usual place."""
    return Path(given or os.environ.get(STATE_VARIABLE) or default_state()).absolute()


def default_state() -> Path:
    """Where a node is: the service's directory if it is ours, else the one in our home. While none is: the same order.

    A node in the home stays the one that is meant when somebody makes the service's directory, until a node is there.
    """
    places = _usual_places()
    return next((place for place in places if _holds_a_node(place)), places[0])


def _usual_places() -> list[Path]:
    found = []
    with contextlib.suppress(PermissionError):  # a mount that another user made, say
        if SYSTEM_STATE.is_dir() and os.geteuid() in (0, SYSTEM_STATE.stat().st_uid):
            found.append(SYSTEM_STATE)
    home = os.path.expanduser("~")
    if states := os.environ.get("XDG_STATE_HOME"):
        found.append(Path(states) / "hsl-node")
    elif home not in ("~", NO_HOME):
        found.append(Path(home, ".local", "state", "hsl-node"))
    return found or [SYSTEM_STATE]


def _holds_a_node(state: Path) -> bool:
    return os.path.exists(Layout(state).node_toml)


def command(state: Path) -> str:
    """How to call us for this state directory."""
    return "hsl-node" if state == state_directory(None) else f"hsl-node --state {shlex.quote(str(state))}"


def addressed(text: str, state: Path) -> str:
    """A hint whose `hsl-node ...` in backticks can be copied as it stands, wherever the state directory is.

    Hints are written in many files that don't know which one it is; they come through here on their way to a person.
    """
    return re.sub(r"`hsl-node (?!--)", lambda _: f"`{command(state)} ", text)
