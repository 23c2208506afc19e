"""Changing keys: cut a peer off, take its new key, change this node's own. Writes keyring.toml, then tells the daemon.

The file is durable before the daemon acts on it, and a daemon that is down reads it at its next start: nothing here
depends on whether it runs. A command that was killed between the two is given again: it changes nothing, says so, and
the daemon is told all the same.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from hsl_node.errors import NotRunning, UsageError
from hsl_node.federation import config, keyring, node_toml
from hsl_node.federation.config import Federation
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Peer
from hsl_node.federation.strings import fingerprint
from hsl_node.host import control, durable
from hsl_node.host.durable import Step
from hsl_node.host.files import write_new
from hsl_node.host.hints import command
from hsl_node.host.layout import Layout

HEAD = (
    "# Written by `hsl-node peer revoke`, `peer update` and `key rotate`; this node's own, never sent.\n"
    "# federation.toml stays as it is: the federation's hash names plan and members, not today's keys.\n"
)


@dataclass(frozen=True)
class Outcome:
    """What a change did."""

    keyring: Keyring
    live: bool  # the running daemon acts on it; else it does at its next start


def change(state: Path, made: Callable[[Keyring], Keyring]) -> Outcome:
    """Apply one change to this node's keyring, one at a time.

    Raises:
        HslError: of `made`; nothing was changed. Or of the daemon, which has the file but could not act on it.
    """
    federation, layout = config.load_federation(state), Layout(state)
    layout.make()
    with told_again(state), open(layout.keys_lock, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        after = made(keyring.load(state, federation))
        content = after.file.model_dump(mode="json")
        text = HEAD + tomli_w.dumps(content, multiline_strings=True)
        write_new(layout.keyring_toml, text, mode=0o600, replace=True, step=Step.KEYS_RING)
    return Outcome(after, tell(state))


@contextmanager
def told_again(state: Path) -> Iterator[None]:
    """Where it is as the operator wants it already: the call before may have ended before it told the daemon."""
    try:
        yield
    except UsageError:
        with suppress(FileNotFoundError):
            durable.accept(Layout(state).keyring_toml)  # or before the file was durable
        tell(state)
        raise


def tell(state: Path) -> bool:
    """Ask the daemon to read keys and keyring again. False: it does not run."""
    try:
        control.ask(state, "keys")
    except NotRunning:
        return False
    return True


def revoke(state: Path, name: str) -> Outcome:
    """Cut `name` off: its keys are refused from now on, its live sessions end.

    Raises:
        UsageError: no such peer, this node itself, or revoked already.
    """
    peer = _other(state, name)
    return change(state, lambda ring: ring.revoking(peer, time.strftime("%Y-%m-%dT%H:%M:%S%z")))


def pardon(state: Path, name: str, said: str | None) -> Outcome:
    """Take a revocation back, for the key whose fingerprint the operator gives.

    Raises:
        UsageError: no fingerprint, or not that of a revoked key of this peer.
    """
    peer = _other(state, name)
    return change(state, lambda ring: ring.pardoning(peer, said or ""))


def consequences(state: Path, peer: Peer, outcome: Outcome) -> list[str]:
    """What a revocation means, for the operator, in sentences."""
    node, federation = node_toml.load_node(state), outcome.keyring.federation
    when = "its sessions are cut" if outcome.live else "the daemon is not running: it holds from its next start on"
    lines = [
        f"{peer} is revoked on this node: {when}. It cannot log in, nothing of it is read, nothing is sent to it.",
        "",
        f"For the run: a round is fused from all peers, so this node waits from the next checkpoint of {peer} on,",
        "and so do the others once they revoke it too (tell them: each decides for itself). A checkpoint that was",
        "verified before stays in its round: every peer fuses the same set. To go on, agree on a new federation file",
        f"without {peer}, or with its new card: `hsl-node federation create`, then `federation join --replace`.",
        f"It was a mistake: {command(state)} peer revoke {peer} --undo --fingerprint "
        + " --fingerprint ".join(fingerprint(r.key) for r in outcome.keyring.file.revoked if r.peer == peer),
    ]
    if node.inbox.kind == "directory":
        lines += ["", *_at_the_server(federation, node.name, peer, str(node.inbox.directory))]
    return lines


def _at_the_server(federation: Federation, me: str, peer: Peer, homes: str) -> list[str]:
    login = federation.get(me).user.replace("{sender}", peer)
    return [
        f"The inbox is another server's, which still lets {peer} in until you, as root on that machine:",
        f"  hsl-node inbox provision --for openssh --homes {homes} > inbox.sh   (or --for sftpgo)",
        f"  sh inbox.sh    # takes the keys of the account {login} away, adds them to RevokedKeys, ends its sessions",
    ]


def _other(state: Path, name: str) -> Peer:
    federation, me = config.load_federation(state), node_toml.load_node(state).name
    if name == me:
        raise UsageError(f"{name} is this node", remedy="`hsl-node key rotate` changes its key")
    return Peer(federation.get(name).name)
