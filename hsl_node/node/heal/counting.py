"""What somebody holds of what was signed, and what of it counts where a key has been replaced.

An old private key lies on scrapped disks and in backups, and whoever finds one can sign anything with it. But each
manifest names those that it follows by their digests, so what a key signed while it counted hangs on what came after:

    round 5, old key ◄──named by── round 6, old key ◄──named by── round 7, new key: counts
                                   round 6', old key: nothing that counts names it, whatever it says
                                   round 8, old key: a newer key has signed before it

Where no newer key has signed anything yet, the newest key that has is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hsl_node.errors import PeerDataError
from hsl_node.federation.identity import MANIFEST_NAMESPACE, verify
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.sync.manifest import Manifest


@dataclass(frozen=True)
class Held:
    """One verified manifest that somebody holds."""

    manifest: Manifest
    document: bytes
    age: int = 0  # how many keys of its peer came after the one that signed it
    replaced: bool = False  # signed with a key that counts no more
    certain: bool = False  # all the same: it came here while that key counted, or what counts names it

    @property
    def peer(self) -> Peer:
        return Peer(self.manifest.peer)

    @property
    def round(self) -> Round:
        return Round(self.manifest.round)

    @property
    def sha256(self) -> Digest:
        return Digest(self.manifest.sha256)

    @property
    def doubtful(self) -> bool:
        """Nobody but who has the replaced key says so."""
        return self.replaced and not self.certain


def held(manifest: Manifest, document: bytes, ring: Keyring, *, certain: bool = False) -> Held:
    """`certain`: it came here while its key counted.

    Raises:
        PeerDataError: no key that this peer ever had signed it.
    """
    chain, counts = ring.chain(manifest.peer), ring.keys(manifest.peer)
    for age, key in enumerate(chain):
        try:
            verify(document, key, MANIFEST_NAMESPACE)
        except PeerDataError:
            if age == len(chain) - 1:
                raise
        else:
            break
    return Held(manifest, document, age, key not in counts, certain)


def counting(
    found: Mapping[str, Held],
    ring: Keyring,
    me: Peer,
    known: Callable[[Round, Peer], Mapping[str, Any] | None] = lambda round, peer: None,
) -> dict[str, Held]:
    """What of it counts, as it was found and under the same names. `known`: manifests of the journal here.

    Without what a replaced key says and nothing that counts names: see above. What is named is `certain` from then on.
    """
    today = {(h.peer, h.round) for h in found.values() if not h.replaced or h.certain}
    newest: dict[Peer, int] = {}
    for one in found.values():
        newest[one.peer] = min(one.age, newest.get(one.peer, one.age))
    named: dict[tuple[Round, Peer], set[str]] = defaultdict(set)  # by what is certain: digests, of what it follows

    def alone(one: Held) -> bool:
        """It counts whoever names it."""
        if not one.doubtful:
            return True
        if (one.peer, one.round) in today:
            return False
        # Of an opening statement nothing hangs; it may have been corrected.
        return one.round == 0 or (one.age == newest[one.peer] and not ring.is_revoked(one.peer))

    counts: dict[str, Held] = {}
    for name, one in sorted(found.items(), key=lambda item: -item[1].round):
        of_it = {one.peer, me}
        by = named[one.round, one.peer] | {
            row["content"]["inputs"].get(one.peer) for p in of_it if (row := known(Round(one.round + 1), p))
        }
        if one.doubtful and one.manifest.digest in by:
            one = replace(one, certain=True)
        elif not alone(one):
            continue
        counts[name] = one
        for peer, digest in one.manifest.inputs.items():
            if one.peer in (peer, me) and not one.doubtful:  # else one forgery would vouch for another
                named[Round(one.round - 1), Peer(peer)].add(digest)
    return {name: counts[name] for name in found if name in counts}


def forged(found: Mapping[str, Held], counts: Mapping[str, Held]) -> Iterable[Held]:
    """What does not count, and contradicts what does: another manifest of its round, or one after a newer key's first.

    The rest of what does not count may only lack the one that names it.
    """
    theirs = {(h.peer, h.round): h.manifest.digest for h in counts.values()}
    first: dict[tuple[Peer, int], Round] = {}  # (whose, which key) -> the first round that it signed
    for one in counts.values():
        if one.round > 0:
            at = (one.peer, one.age)
            first[at] = min(one.round, first.get(at, one.round))
    for name, one in found.items():
        if name not in counts and one.round > 0:
            same = theirs.get((one.peer, one.round))
            later = (first.get((one.peer, age)) for age in range(one.age))
            if one.manifest.digest == same:
                continue  # signed again after the key was replaced
            if same is not None or any(r is not None and r <= one.round for r in later):
                yield one
