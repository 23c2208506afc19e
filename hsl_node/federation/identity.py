"""The node's ed25519 key, and what it signs: manifests and receipts as SSHSIG, for stock `ssh-keygen -Y verify`.

A signed document is one line of canonical JSON followed by the armoured signature over that line (newline included):

    head -n1 FILE | ssh-keygen -Y verify -f allowed_signers -I PEER -n hsl-manifest@v1 -s <(tail -n+2 FILE)

One signature has one spelling. SSHSIG leaves several open (armour, line length, a certificate around the key); whoever
passes a document on could make a second one of it, and two documents are what proves that a peer lied.
"""

from __future__ import annotations

import base64
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import asyncssh

from hsl_node.errors import LocalStateError, NotInitialised, PeerDataError
from hsl_node.federation.canonical import signed_line
from hsl_node.federation.strings import fingerprint
from hsl_node.host import permissions
from hsl_node.host.durable import Step, replacing
from hsl_node.host.layout import Layout

MANIFEST_NAMESPACE = "hsl-manifest@v1"
RECEIPT_NAMESPACE = "hsl-receipt@v1"
OFFER_NAMESPACE = "hsl-offer@v1"
LIFE_NAMESPACE = "hsl-life@v1"


@dataclass(frozen=True)
class Identity:
    """The private key of this node. Never leaves the process; `public` is what the others pin."""

    key: asyncssh.SSHKey
    run: str = ""  # nonce of one process of the daemon, shown to peers on connecting: a clone shows itself

    @cached_property
    def public(self) -> str:
        """`ssh-ed25519 AAAA...` without a comment."""
        return " ".join(self.key.export_public_key("openssh").decode("ascii").split()[:2])

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.public)

    @property
    def client_version(self) -> str:
        """What this process says it is when it connects over SSH; part of what the key exchange signs."""
        return f"hsl1_{self.run}" if self.run else "hsl1"

    def sign(self, content: dict[str, Any], namespace: str) -> bytes:
        """A signed document: one JSON line and the signature over it."""
        line = signed_line(content)
        raw = asyncssh.create_sshsig(self.key, line, namespace=namespace, raw=True)
        return line + _armoured(raw)


def generate(path: Path) -> Identity:
    """Make a new key file (mode 0600, OpenSSH format). An existing file is never overwritten."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        # A whole key or none, also when the power fails; never over another one.
        with replacing(path, Step.INIT_KEY, mode=0o600, once=True) as file:
            file.write(key.export_private_key("openssh"))
    except FileExistsError as exc:
        raise LocalStateError(
            f"{path} exists already", remedy="keep it: peers have pinned it; or move it away first"
        ) from exc
    return Identity(key)


def load(path: Path) -> Identity:
    """Read the node's key.

    Raises:
        NotInitialised: no such file.
        LocalStateError: others may read it, or it is no unencrypted ed25519 key.
    """
    if not path.exists():
        raise NotInitialised(f"no node key at {path}", remedy=_without_key(path))
    if path.is_dir():
        raise LocalStateError(f"{path} is a folder, no key", remedy="name the key's own file")
    # systemd shows a credential as 0440: the group bits are the mask of an access list that names only our user.
    credential = str(path.parent) == os.environ.get("CREDENTIALS_DIRECTORY")
    if path.stat().st_mode & (0o007 if credential else 0o077):
        raise LocalStateError(f"{path} may be read by others", remedy=f"chmod 600 {path}")
    try:
        key = asyncssh.import_private_key(path.read_bytes())  # not by its path, whose bytes may be no text
    except PermissionError as exc:
        raise permissions.denied(path, path.parent.parent) from exc
    except (OSError, asyncssh.KeyImportError) as exc:
        raise LocalStateError(
            f"{path} cannot be used as node key: {exc}", remedy="restore it from your backup"
        ) from exc
    if key.get_algorithm() != "ssh-ed25519":
        raise LocalStateError(f"{path} is no ed25519 key", remedy="restore it from your backup")
    return Identity(key)


def _without_key(path: Path) -> str:
    """Where a node was initialised its peers have pinned the key: another one would be of no use."""
    state = path.parent.parent
    if not Layout(state).node_toml.exists():
        return "run `hsl-node init`"
    return (
        f"take it out of a backup of this node: tar -xf BACKUP -C {shlex.quote(str(state))} keys/{path.name}; all else "
        "of it: `hsl-node restore`, into an empty folder. Where systemd hands the key over: "
        "docs/administrator/service.md. Never make another one: the peers have pinned this one"
    )


def find_key(usual: Path) -> Path:
    """systemd hands the key over as a credential; elsewhere it lies in the state directory."""
    credential = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / "node.key"
    return credential if credential.exists() else usual


def verify(document: bytes, public_key: str | Sequence[str], namespace: str) -> bytes:
    """Check a signed document against the pinned key and give back its JSON line. Several keys: one of them signed it.

    Raises:
        PeerDataError: code `signature`; nothing of an unverified document is ever parsed.
    """
    line, newline, signature = document.partition(b"\n")
    line += newline
    keys = (public_key,) if isinstance(public_key, str) else tuple(public_key)
    if not keys:
        raise PeerDataError("every key of this peer is revoked here", code="revoked")
    if not any(signature == _spelling(signature, key, namespace) for key in keys):  # before anything parses it
        raise _bad_signature(keys, "another key, another namespace, or not spelt as hsl-node spells it")
    signers = "".join(f'signer namespaces="{namespace}" {key}\n' for key in keys).encode("ascii")
    try:
        valid = asyncssh.validate_sshsig(line, signature, "signer", signers)
    except (asyncssh.Error, ValueError, IndexError, OverflowError) as exc:
        raise _bad_signature(keys, str(exc)) from exc
    if not valid:
        raise _bad_signature(keys, "other bytes were signed")
    return line


def _armoured(raw: bytes) -> bytes:
    text = base64.b64encode(raw)
    lines = b"\n".join(text[i : i + 70] for i in range(0, len(text), 70))  # as ssh-keygen does
    return b"-----BEGIN SSH SIGNATURE-----\n" + lines + b"\n-----END SSH SIGNATURE-----\n"


def _spelling(signature: bytes, public_key: str, namespace: str) -> bytes | None:
    """How `Identity.sign` writes an ed25519 signature of this key; its 64 bytes are the last of `signature`."""
    try:
        raw = base64.b64decode(b"".join(signature.split(b"\n")[1:-2]), validate=True)
    except ValueError:
        return None
    head = b"SSHSIG" + (1).to_bytes(4, "big") + _string(base64.b64decode(public_key.split()[1]))
    head += _string(namespace.encode("ascii")) + _string(b"") + _string(b"sha512")
    return _armoured(head + _string(_string(b"ssh-ed25519") + _string(raw[-64:])))


def _string(content: bytes) -> bytes:
    """As SSH writes one (RFC 4251, section 5)."""
    return len(content).to_bytes(4, "big") + content


def _bad_signature(keys: Sequence[str], reason: str) -> PeerDataError:
    return PeerDataError(
        f"the signature does not verify with the pinned key {' or '.join(map(fingerprint, keys))}: {reason}",
        code="signature",
        remedy="the peer must use the key that the federation lists, or announce a new one (`hsl-node key rotate`)",
    )
