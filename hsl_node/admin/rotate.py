"""This node's own key, replaced in the midst of a run without losing a round; and the other side of that.

    here                      rotate: new key, NAME_1.update signed by the old one; the old one goes on signing
    every other peer          peer update NAME_1.update: the old and the new key both speak for NAME
    here                      rotate --finish: asks every peer whether it lets the new key in, then uses it alone
    every other peer          peer update --finish NAME: the new key alone

Nothing is signed twice: what the old key has signed keeps that signature and counts while both keys do.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from hsl_node.admin import keys, ping
from hsl_node.admin.old_key import require_settled
from hsl_node.errors import KeyRefused, LocalStateError, NotInitialised, PeerDataError, UsageError
from hsl_node.federation import config, identity, keyring, node_toml, strings
from hsl_node.federation.identity import Identity
from hsl_node.federation.keyring import KeyUpdate
from hsl_node.federation.names import Peer
from hsl_node.federation.strings import fingerprint
from hsl_node.federation.toml_file import read_text
from hsl_node.host import durable, wrong_paths
from hsl_node.host.durable import Step
from hsl_node.host.files import write_new
from hsl_node.host.layout import Layout

# ------------------------------------------------------------------ this node's key


@dataclass(frozen=True)
class Begun:
    update: KeyUpdate
    file: Path  # for every other peer
    live: bool


def begin(state: Path, key: Path | None = None) -> Begun:
    """Make the new key and the update that announces it. Said again, it gives the same ones.

    Raises:
        NotInitialised: no key here; `key` says where it is.
        LocalStateError: the key that was announced is lost; another one cannot be announced.
        UsageError: the new key is in its place already.
    """
    node, federation = node_toml.load_node(state), config.load_federation(state)
    me, path = Peer(node.name), key or Layout(state).key
    current, ring = identity.load(path), keyring.load(state, federation)
    keyring.require_mine(ring, me, current.public)
    update = ring.overlap(me)
    if update is not None and current.public == update.new:
        raise UsageError(
            f"{path} holds the new key {current.fingerprint} already: a change was cut short",
            remedy="`hsl-node key rotate --finish` completes it",
        )
    new = _unannounced(path, ring.chain(me)) if update is None else _announced(path, update)

    def announced(ring: keyring.Keyring) -> keyring.Keyring:
        if ring.overlap(me) is not None:
            return ring
        return ring.updating(keyring.sign_update(ring, me, current, new.public))

    live = keys.change(state, announced).live
    return Begun(*updates(state)[-1], live)


def updates(state: Path) -> list[tuple[KeyUpdate, Path]]:
    """This node's updates in this federation, the first one first; each is written to its file again.

    A file for each: who missed one needs it before the next one.
    """
    me, written = Peer(node_toml.load_node(state).name), []
    for update, accepted in keyring.load(state, config.load_federation(state)).updates_of(me):
        file = Layout(state).update(me, update.number)
        write_new(file, accepted.document, replace=True)
        written.append((update, file))
    return written


def finish(state: Path, key: Path | None = None, *, force: bool = False) -> bool:
    """Use the new key alone. False: the daemon has to be started again to use it.

    Raises:
        UsageError: no change is under way.
        LocalStateError: the new key here is not the one that was announced; nothing was changed, also with `force`.
        KeyRefused: a peer does not let the new key in yet; nothing was changed, unless `force`.
    """
    node, federation = node_toml.load_node(state), config.load_federation(state)
    me, path = Peer(node.name), key or Layout(state).key
    update = keyring.load(state, federation).overlap(me)
    if update is None:
        with keys.told_again(state):
            raise UsageError("no key change is under way", remedy="`hsl-node key rotate` begins one")
    if identity.load(path).public != update.new:  # else: an earlier call was cut short after this
        new = _announced(path, update)
        if not force:
            _require_welcome(state, new)
        with durable.passing(Step.KEYS_SWITCH):
            durable.rename(_next(path), path)  # the old private key is gone with this
            durable.sync_folder(path.parent)
    else:
        durable.accept(path)
    card = config.card_text(federation.get(me).model_copy(update={"key": update.new}))
    write_new(Layout(state).card(me), card, replace=True)
    return keys.change(state, lambda ring: ring.finishing(me)).live  # last: until then this can be called again


def _require_welcome(state: Path, new: Identity) -> None:
    refused = [a for a in ping.ping(state, (), new) if a.exit_code]
    if refused:
        shown = "\n".join(f"  {a.peer}: {a.error}" for a in refused)
        raise KeyRefused(
            f"the new key {new.fingerprint} cannot log in everywhere yet; nothing was changed:\n{shown}",
            remedy="each of them runs hsl-node peer update with this node's update file; then call this again. "
            "--force leaves behind who is missing: it will refuse this node until it took the update",
        )


def _announced(path: Path, update: KeyUpdate) -> Identity:
    """The new key of this update.

    Raises:
        LocalStateError: it is not here. No peer would let another one in, and nobody can sign a second update.
    """
    waiting = _next(path)
    new = identity.load(waiting) if waiting.exists() else None
    if new is None or new.public != update.new:
        raise LocalStateError(
            f"{update.peer} announced the new key {fingerprint(update.new)}; {waiting} "
            + (f"holds another one, {new.fingerprint}" if new else "is not there")
            + "; nothing was changed",
            remedy="put it there, out of a backup made since `hsl-node key rotate` (keys/node_ed25519.next in it). "
            f"Lost for good: the old key {fingerprint(update.old)} goes on counting and the run ends with it; tell the "
            'others not to run peer update --finish. docs/administrator/keys.md, "The new key is lost", has the rest',
        )
    return new


def _unannounced(path: Path, used: tuple[str, ...]) -> Identity:
    """A key that nobody was told of yet: a new one, or that of a call that was cut short."""
    waiting = _next(path)
    if waiting.exists():
        new = identity.load(waiting)
        if new.public not in used:
            durable.accept(waiting)
            return new
        waiting.unlink()  # a copy of the key in use, out of a backup: it would be announced as its own successor
    return identity.generate(waiting)


def _next(path: Path) -> Path:
    return path.with_name(path.name + ".next")


# ------------------------------------------------------------------ another peer's


def read_update(state: Path, path: Path) -> KeyUpdate:
    """An update file, fully checked against this node's keyring; nothing is changed.

    Raises:
        HslError: see `Keyring.check`.
    """
    ring = keyring.load(state, config.load_federation(state))
    document = read_text(path)
    with keys.told_again(state):
        try:
            ring.updating(document)
        except PeerDataError as exc:
            raise PeerDataError(f"{path}: {exc.message}", code=exc.code, remedy=exc.remedy) from exc
    return keyring.parse_update(document)


def take(state: Path, path: Path, said: str | None) -> keys.Outcome:
    """From now on both keys speak for that peer, if `said` is the new key's fingerprint.

    Raises:
        UsageError: it is not.
        HslError: see `Keyring.check`.
    """
    update = read_update(state, path)
    if not strings.is_fingerprint_of(said or "", update.new):
        raise UsageError(
            f"nothing was changed: {strings.not_the_fingerprint(said, f'the new key of {update.peer}')}",
            # Not as a command to paste: it would take whatever key the file brings.
            remedy=f"call {update.peer} and let them read it aloud, then: `hsl-node peer update "
            f"{shlex.quote(str(path))} --fingerprint WHAT_THEY_READ_ALOUD`, either {strings.FINGERPRINT_FORMS}. If it "
            "is another one than shown above, this is not their file",
        )
    return keys.change(state, lambda ring: ring.updating(read_text(path)))


def end(state: Path, name: str) -> keys.Outcome:
    """The old key of this peer counts no more.

    Raises:
        UsageError: no change of its key is under way here.
        HslError: it has not changed over, or something of the old key may still be on its way: see `old_key.py`.
    """
    ring = keyring.load(state, config.load_federation(state))
    update = ring.overlap(name)
    if update is not None and (Layout(state).journal).exists():
        require_settled(state, Peer(name), update)
    return keys.change(state, lambda ring: ring.finishing(name))


def require_key(state: Path, key: Path | None) -> None:
    """Raises: UsageError: `key` is no file. NotInitialised: says where to look for the key under systemd."""
    if key is not None and not key.is_file():
        with wrong_paths.usage(key):
            key.open("rb").close()
    if key is None and not Layout(state).key.exists():
        raise NotInitialised(
            f"no node key at {Layout(state).key}",
            remedy="where systemd hands it over, put it back for the time of the change "
            "(docs/administrator/service.md); a key elsewhere that this user may replace is named with --key FILE",
        )
