"""For whom a recovering node waits, and why: one alarm, told anew with each change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hsl_node.federation.names import Digest, Peer
from hsl_node.node.alarms import Alarms


class Waiting:
    def __init__(self, alarms: Alarms, reason: str, asked: Iterable[Peer], file_bytes: int) -> None:
        """`reason`: of the recovery. `file_bytes`: of any file that is fetched."""
        self._alarms = alarms
        self._reason = reason
        self._file_bytes = file_bytes
        self._held_up = dict.fromkeys(asked, "not asked yet")  # by whom, and why
        self._fixes: dict[Peer, str] = {}  # of these, where a key is the reason: what to do about it
        self._begun_again: dict[Peer, str] = {}  # because of whom, and why: until it is over, or something else breaks
        self._fetching: dict[Peer, str] = {}  # who gives a file at this moment, and how far it is

    @property
    def peers(self) -> dict[Peer, str]:
        """For whom, and why."""
        return {**self._fetching, **self._begun_again, **self._held_up}

    def hold_up(self, peer: Peer, why: str, fix: str = "") -> None:
        self._held_up[peer] = why
        self._fixes[peer] = fix
        self.tell()

    def go_on(self, peer: Peer) -> None:
        """It holds nothing up for now."""
        self._held_up.pop(peer, None)
        self._fixes.pop(peer, None)
        self.tell()

    def begin_again(self, because: Mapping[Peer, str]) -> None:
        self._begun_again = dict(because)
        self.tell()

    def fetch(self, giver: Peer, sha256: Digest, at: int) -> None:
        """So many bytes of this file are here."""
        self._fetching = {giver: f"it gives {sha256[:12]}: {at / 2**20:.1f} of {self._file_bytes / 2**20:.1f} MiB"}
        self.tell()

    def fetched(self) -> None:
        self._fetching = {}
        self.tell()

    def tell(self) -> None:
        fixes = [fix for _, fix in sorted(self._fixes.items()) if fix]
        still = {**self._begun_again, **self._held_up}
        if not still:  # then nobody must be left out: what one gives slowly, another one may have
            fixes.append("nothing is to be done: from a peer that is slow it goes on to another one with the same file")
        elif any(not self._fixes.get(peer) for peer in still):  # who is left out signs rounds again; a key is mended
            fixes.append(
                "see that those hospitals' nodes run. For one that cannot answer, after a word with that hospital: "
                "`hsl-node stop`, then `hsl-node recover --from-peers --without NAME`"
            )
        text = (
            f"this node asks its peers what it has signed, since {self._reason}. It signs nothing before all have "
            f"answered. Still to answer: {_names(still)}"
        )
        if self._fetching:
            text += f". Now fetching from: {_names(self._fetching)}"
        self._alarms.sound("recovering", text, "; ".join(fixes))


def _names(peers: Mapping[Peer, str]) -> str:
    return "; ".join(f"{peer} ({why})" for peer, why in sorted(peers.items())) or "nobody"
