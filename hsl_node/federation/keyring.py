"""Which keys speak for which peer at this moment: the federation's first keys, what replaced them, less the revoked.

federation.toml pins each peer's *first* key and never changes during a run, so the federation's digest, which every
manifest carries, means plan and members for good. What happens to keys afterwards stands beside it, in keyring.toml of
each node: a chain of updates, each signed by the key before it, and the keys that this node's operator has revoked.

    federation.toml: mercy = K1        update 1: K1 says K2 (overlap: K1 and K2)        finished: K2 alone

A revoked key stays revoked under every federation; an update counts in the federation that it names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from hsl_node.errors import FederationMismatch, KeyRefused, PeerDataError, UsageError
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.config import Federation, PeerCard
from hsl_node.federation.identity import Identity, verify
from hsl_node.federation.names import Peer
from hsl_node.federation.strings import (
    FINGERPRINT_FORMS,
    Frozen,
    PeerName,
    PublicKey,
    Sha256,
    Text,
    fingerprint,
    is_fingerprint_of,
    not_the_fingerprint,
)
from hsl_node.federation.toml_file import read_toml
from hsl_node.host.layout import Layout

UPDATE_NAMESPACE = "hsl-key-update@v1"
UPDATE_MAX_BYTES = 8 * 1024  # two keys, a name, a digest, a signature: under 1 KB
UPDATES_MAX = 4096  # of all peers; a key a week for a year, from 64 peers


class KeyUpdate(Frozen, strict=True):
    """What the old key signs: the new one takes its place."""

    version: Literal[1] = 1
    federation: Sha256
    peer: PeerName
    number: int = Field(ge=1, le=UPDATES_MAX)  # 1: signed by the key of the federation file; 2: by that one's successor
    old: PublicKey
    new: PublicKey


class Accepted(Frozen):
    """An update that this node took: the signed document, and whether the old key is out."""

    document: str = Field(max_length=UPDATE_MAX_BYTES)
    finished: bool = False


class Revoked(Frozen):
    peer: PeerName
    key: PublicKey
    at: Text = ""  # wall clock, for people


class KeyringFile(Frozen):
    """keyring.toml."""

    version: Literal[1] = 1
    revoked: tuple[Revoked, ...] = ()
    update: tuple[Accepted, ...] = Field((), max_length=UPDATES_MAX)


@dataclass(frozen=True)
class Keyring:
    """A value: every change gives another one. Make it with `of` or `load`, which check every signature."""

    federation: Federation
    file: KeyringFile

    @classmethod
    def of(cls, federation: Federation, file: KeyringFile = KeyringFile()) -> Keyring:
        """Raises: PeerDataError: an update in the file is not what its peer's key before it signed."""
        keyring = cls(federation, file)
        for position, accepted in enumerate(file.update):
            before = keyring._with(update=file.update[:position])
            if (update := parse_update(accepted.document)).federation == federation.digest:
                before.check(update, accepted.document)
        return keyring

    @cached_property
    def links(self) -> tuple[tuple[KeyUpdate, Accepted], ...]:
        """The updates of this federation, in their order, each with what was signed."""
        updates = ((parse_update(accepted.document), accepted) for accepted in self.file.update)
        digest = self.federation.digest
        return tuple((u, accepted) for u, accepted in updates if u.federation == digest)

    # -------------------------------------------------------------- who may

    def chain(self, peer: str) -> tuple[str, ...]:
        """Every key this peer ever had here, the newest first: what its old documents were signed with."""
        return (*(u.new for u, _ in reversed(self.updates_of(peer))), self.federation.get(peer).key)

    def keys(self, peer: str) -> tuple[str, ...]:
        """The keys that may log in and sign for this peer now, the newest first; empty: it is revoked."""
        valid = [self.federation.get(peer).key]
        for update, accepted in self.updates_of(peer):
            valid = [update.new] if accepted.finished else [update.new, *valid]
        return tuple(key for key in valid if not self.revokes(key))

    def revokes(self, key: str) -> bool:
        return any(r.key == key for r in self.file.revoked)

    def is_revoked(self, peer: str) -> bool:
        return not self.keys(peer)

    def newest(self, peer: str) -> str:
        return self.chain(peer)[0]

    def updates_of(self, peer: str) -> list[tuple[KeyUpdate, Accepted]]:
        return [(update, accepted) for update, accepted in self.links if update.peer == peer]

    def overlap(self, peer: str) -> KeyUpdate | None:
        """The update of this peer that is not finished."""
        return next((u for u, accepted in reversed(self.updates_of(peer)) if not accepted.finished), None)

    def host_keys(self, card: PeerCard) -> tuple[str, ...]:
        """What this peer's inbox may show. A server with a key of its own (OpenSSH) keeps that one."""
        if self.is_revoked(card.name):
            return ()
        return (card.host_key,) if card.host_key else self.keys(card.name)

    # -------------------------------------------------------------- changes

    def revoking(self, peer: str, at: str) -> Keyring:
        """Every key that speaks for this peer now is out.

        Raises:
            UsageError: there is none.
        """
        keys = self.keys(peer)
        if not keys:
            raise UsageError(
                f"{peer} is revoked already; nothing was changed", remedy="`hsl-node peer list` shows the keys"
            )
        added = tuple(Revoked(peer=peer, key=key, at=at) for key in keys)
        return self._with(revoked=(*self.file.revoked, *added))

    def pardoning(self, peer: str, said: str) -> Keyring:
        """The key with the fingerprint `said` counts again.

        Raises:
            UsageError: this node has revoked no such key of this peer.
        """
        theirs = [r for r in self.file.revoked if r.peer == peer and r.key in self.chain(peer)]
        found = [r for r in theirs if is_fingerprint_of(said, r.key)]
        if not found:
            if not theirs:
                raise UsageError(
                    f"no key of {peer} is revoked here; nothing was changed",
                    remedy="`hsl-node peer list` shows what counts here",
                )
            shown = ", ".join(fingerprint(r.key) for r in theirs)
            raise UsageError(
                f"{not_the_fingerprint(said, f'a revoked key of {peer}')}; revoked: {shown}",
                remedy=f"call {peer} and let them read theirs aloud (hsl-node card there), then give that one, either "
                f"{FINGERPRINT_FORMS}",
            )
        return self._with(revoked=tuple(r for r in self.file.revoked if r not in found))

    def updating(self, document: str) -> Keyring:
        """Take a checked update: from now on the old and the new key speak for that peer.

        Raises:
            PeerDataError, FederationMismatch, KeyRefused, UsageError: see `check`.
        """
        update = parse_update(document)
        self.check(update, document)
        if self.revokes(update.old) or self.revokes(update.new):
            raise KeyRefused(
                f"a key of {update.peer} in this update is revoked here: whoever stole it could have signed this",
                remedy="settle it by phone; `hsl-node peer revoke --undo` takes a revocation back",
            )
        return self._with(update=(*self.file.update, Accepted(document=document)))

    def finishing(self, peer: str) -> Keyring:
        """The overlap ends: the newest key alone.

        Raises:
            UsageError: there is no overlap.
        """
        if self.overlap(peer) is None:
            raise UsageError(
                f"{peer} has one key here; no change is under way", remedy="`hsl-node peer list` shows the keys"
            )
        theirs = [accepted for _, accepted in self.updates_of(peer)]
        done = (a.model_copy(update={"finished": True}) if a in theirs else a for a in self.file.update)
        return self._with(update=tuple(done))

    def check(self, update: KeyUpdate, document: str) -> None:
        """Is this the next link of its peer's chain, and signed by the key that counts now?

        Raises:
            FederationMismatch: made for another federation.
            UsageError: taken already, or not the next one.
            PeerDataError: the signature does not verify, or the new key belongs to somebody.
            KeyRefused: the old key or the new one is revoked here.
        """
        if update.federation != self.federation.digest:
            raise FederationMismatch(
                f"this key update was made for federation {update.federation[:8]}, ours is {self.federation.fed8}",
                remedy=f"ask {update.peer} for the update of this federation; under a new file its new card counts",
            )
        links = [known for known, _ in self.updates_of(update.peer)]
        if update.number <= len(links):
            same = update == links[update.number - 1]
            raise UsageError(
                f"update {update.number} of {update.peer} "
                + ("has been taken already; nothing was changed" if same else "is another one than the one taken here"),
                remedy="`hsl-node peer list` shows the keys" if same else f"call {update.peer}: one key signed two",
            )
        if update.number != len(links) + 1:
            raise UsageError(
                f"{update.peer} has changed its key {update.number} times, here {len(links)} are known",
                remedy=f"ask {update.peer} for its earlier update files (hsl-node key updates writes them again); "
                "take them in their order",
            )
        old = self.newest(update.peer)
        if update.old != old:
            raise PeerDataError(
                f"the update of {update.peer} replaces {fingerprint(update.old)}; its key here is {fingerprint(old)}",
                code="key",
                remedy=f"call {update.peer}",
            )
        verify(document.encode("ascii"), old, UPDATE_NAMESPACE)
        for peer in self.federation.peers:
            if update.new in self.chain(peer):
                raise PeerDataError(
                    f"the new key of {update.peer} is or was {peer}'s", code="key", remedy=f"call {update.peer}"
                )

    def _with(self, **changed: Any) -> Keyring:
        return Keyring(self.federation, self.file.model_copy(update=changed))


def load(state: Path, federation: Federation) -> Keyring:
    """This node's keyring; without a file, the federation's keys.

    Raises:
        ConfigError: the file is not what we wrote.
        PeerDataError: an update in it does not verify.
    """
    path = Layout(state).keyring_toml
    return Keyring.of(federation, read_toml(path, KeyringFile) if path.exists() else KeyringFile())


def sign_update(keyring: Keyring, me: Peer, identity: Identity, new: str) -> str:
    """The document that hands over from `identity`, which speaks for `me` now, to the public key `new`."""
    number = 1 + len(keyring.updates_of(me))
    update = KeyUpdate(federation=keyring.federation.digest, peer=me, number=number, old=identity.public, new=new)
    return identity.sign(update.model_dump(mode="json"), UPDATE_NAMESPACE).decode("ascii")


@lru_cache(UPDATES_MAX)  # each change of a keyring reads all its updates again
def parse_update(document: str) -> KeyUpdate:
    """What the first line says; its signature is checked by `Keyring.check`, which needs to know the peer.

    Raises:
        PeerDataError: code `update`.
    """
    line = document.partition("\n")[0]
    try:
        if len(document) > UPDATE_MAX_BYTES or not document.isascii():
            raise ValueError("too long, or not ASCII")
        update = KeyUpdate.model_validate(json.loads(line))
        if canonical_json(update.model_dump(mode="json")).decode("ascii") != line:
            raise ValueError("not in canonical form")
    except (ValueError, ValidationError, RecursionError) as exc:
        raise PeerDataError(
            "this is not a key update as `hsl-node key rotate` writes it",
            code="update",
            remedy="give the file NAME_1.update, no peer card; if it is that, ask for it again: mail changed it",
        ) from exc
    return update


def require_mine(keyring: Keyring, name: str, public_key: str) -> None:
    """Is the node's key one that speaks for it?

    Raises:
        FederationMismatch: our name is absent, or stands there with another key; the key was replaced, or may be a
            later one than is known here.
    """
    federation = keyring.federation
    holder = next((peer for peer in federation.peers if public_key in keyring.chain(peer)), None)
    if holder is None:
        there = f", which has {shown(keyring.chain(name))} for {name}" if name in federation.peers else ""
        raise FederationMismatch(
            f"this node's own key ({fingerprint(public_key)}) does not appear in federation {federation.name!r}{there}",
            remedy="if this node changed its key in this federation, what says so is missing here: put its "
            f"keyring.toml back, or give its own update files, {name}_1.update first: `hsl-node peer update "
            f"{name}_1.update --fingerprint SHA256:...` (each other hospital has got them). Otherwise send your "
            "peer card (`hsl-node card`) to whoever makes the file, and ask for a new one",
        )
    if holder != name:
        raise FederationMismatch(
            f"federation {federation.name!r} lists this node's key as {holder!r}, node.toml says {name!r}",
            remedy=f'if node.toml was edited: write name = "{holder}" there. If the private key is that of {holder}, '
            f"another hospital's: put this node's own back, out of a backup of {name}; never go on as {holder}",
        )
    if public_key not in keyring.keys(name) and public_key != keyring.newest(name):
        raise FederationMismatch(
            f"this node's key {fingerprint(public_key)} was replaced by {fingerprint(keyring.newest(name))}",
            remedy="put the new key in its place: an old backup, or a systemd credential that was not renewed?",
        )


def shown(keys: Sequence[str]) -> str:
    return " or ".join(fingerprint(key) for key in keys) or "none"


def warnings_of(ring: Keyring, peer: Peer, me: Peer) -> dict[str, tuple[str, str]]:
    """Alarm code -> (text, what to do), of one peer."""
    found: dict[str, tuple[str, str]] = {}
    if ring.is_revoked(peer):
        found[f"revoked {peer}"] = (
            f"{peer} is revoked on this node: it is kept out, and the next full set waits for it",
            f"agree on a new federation file without {peer} or with its new card, and join it with --replace; "
            f"a mistake: `hsl-node peer revoke {peer} --undo --fingerprint SHA256:...`",
        )
    elif (update := ring.overlap(peer)) is not None:
        keys = f"{fingerprint(update.old)} and {fingerprint(update.new)}"
        fix = "`hsl-node key rotate --finish`" if peer == me else f"`hsl-node peer update --finish {peer}`"
        whose = "this node announced a new key" if peer == me else f"{peer} changes its key"
        found[f"keys {peer}"] = (f"{whose}: {keys} both count until the change is finished", f"when all took it: {fix}")
    return found
