"""What people agree on: federation.toml, peer cards. Frozen; unknown keys are refused.

How the files are read, and errors get their line: `toml_file.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, ValidationError, model_validator

from hsl_node.errors import ConfigError, NotInitialised, UsageError, escaped
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.methods import Need
from hsl_node.federation.names import Digest, Peer
from hsl_node.federation.plan import Plan, agreed, problem_at
from hsl_node.federation.plan_keys import flat
from hsl_node.federation.strings import (
    Address,
    Frozen,
    Name,
    PeerName,
    PublicKey,
    Sha256,
    Text,
    fingerprint,
    read_aloud,
)
from hsl_node.federation.toml_file import parse, read_text, read_toml, validate
from hsl_node.host.files import require_initialised
from hsl_node.host.layout import Layout

CARD_MAX_BYTES = 8 * 1024  # two keys and a few names: under 1 KB
PEERS_MAX = 64  # a full set costs peers² transfers a round; beyond this another topology is needed


class AnchorCard(Frozen):
    """Names the one anchor set of the federation; the images travel beside it, once, by any means."""

    name: Name
    fingerprint: Sha256  # sha256 of the anchor file
    images: int = Field(ge=4)
    image_size: int = Field(ge=16, le=1024)


class PeerCard(Frozen):
    """One hospital's node: what the others must know to reach and to recognise it."""

    name: PeerName
    address: Address  # where the others connect, host:port
    key: PublicKey  # the node's key: it logs in, signs, and is the host key of an embedded inbox
    # The next three only where the inbox is an existing SFTP server (see `hsl-node inbox provision`).
    host_key: PublicKey | None = None
    user: Text = Field("{sender}", max_length=64)  # login name on that server; {sender} = the sending peer
    root: str = Field("", max_length=200, pattern=r"^[A-Za-z0-9._/{}-]*$")  # holds parts/, inbox/, receipts/

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` shows it."""
        return fingerprint(self.key)


class Federation(Frozen):
    """The agreed list of peers, their keys, the plan and the anchor set. The same file for everybody."""

    version: Literal[2] = 2
    name: Name
    anchor: AnchorCard | None = None
    plan: Plan = Plan()
    peer: tuple[PeerCard, ...] = Field(min_length=2, max_length=PEERS_MAX)

    @model_validator(mode="before")
    @classmethod
    def _of_this_version(cls, raw: Any) -> Any:
        """An older file is told in one sentence, and not by each key that has moved since."""
        if isinstance(raw, dict) and raw.get("version") == 1:
            raise ValueError(
                "version: 1 is the form of an earlier hsl-node: finish that run with the version that began it, then "
                "`hsl-node federation create` makes a new file"
            )
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> Federation:
        found = [
            problem_at(("peer",), f"two peers have the same {what}: {', '.join(twice)}")
            for what in ("name", "key", "address")
            if (twice := sorted(v for v, count in Counter(getattr(p, what) for p in self.peer).items() if count > 1))
        ]
        plan, card = self.plan, self.plan.card
        if card.simulation_only:
            found.append(
                problem_at(("plan", "method"), f"no federation can agree on {card.name}: {card.simulation_only}")
            )
        if Need.ANCHOR in card.needs and self.anchor is None:
            found.append(problem_at(("anchor",), f"the method {card.name} needs an anchor set (hsl-node anchor build)"))
        if Need.ANCHOR in card.needs and self.anchor and self.anchor.image_size != plan.image_size:
            words = f"built at {self.anchor.image_size} px, the plan says {plan.image_size} px"
            found.append(problem_at(("anchor",), words))
        peers_min = FUSION_RULES[plan.rule].peers_min
        if len(self.peer) < peers_min:
            words = (
                f'"{plan.rule}" needs {peers_min} peers or more, here are {len(self.peer)}: with fewer it is the mean '
                'and protects from nothing; set fusion = "mean", or invite another peer'
            )
            found.append(problem_at(("plan", "fusion"), words))
        if found:
            raise ValidationError.from_exception_data("Federation", found)
        return self

    @property
    def peers(self) -> tuple[Peer, ...]:
        """All names, sorted: the order of every fusion."""
        return tuple(sorted(Peer(p.name) for p in self.peer))

    def get(self, name: str) -> PeerCard:
        for peer in self.peer:
            if peer.name == name:
                return peer
        raise UsageError(f"{name!r} is not a peer of {self.name!r}", remedy=f"peers: {', '.join(self.peers)}")

    @property
    def agreed_json(self) -> bytes:
        """The content that all hospitals agree on: comments, line ends and the order of the tables don't matter."""
        content = self.model_dump(mode="json")
        content["plan"] = agreed(self.plan)
        content["peer"] = sorted(content["peer"], key=lambda p: str(p["name"]))
        return canonical_json(content)

    @property
    def digest(self) -> Digest:
        return Digest(hashlib.sha256(self.agreed_json).hexdigest())

    @property
    def fed8(self) -> str:
        return self.digest[:8]


def load_federation(state: Path) -> Federation:
    path = Layout(state).federation_toml
    if not path.exists():
        require_initialised(state)
        raise NotInitialised(
            f"{state} holds no federation.toml",
            remedy="`hsl-node federation join FILE` with the federation.toml that everybody got",
        )
    return read_toml(path, Federation)


def read_federation(path: Path) -> Federation:
    """A federation file that somebody named."""
    try:
        return read_toml(path, Federation)
    except ConfigError as exc:
        text = read_text(path)
        if not text.startswith("# Federation ") or re.search(r"^version *= *1$", text, re.M):
            raise
        again = "it was cut or edited after it was made: ask whoever made it to send it again"
        raise ConfigError(exc.message, remedy=again) from exc


def require_unedited(path: Path, federation: Federation) -> None:
    """Raises: ConfigError: the hash that `federation_text` wrote into the first line is not that of the content."""
    first = read_text(path).partition("\n")[0]
    said = re.fullmatch(r"# Federation .*, hash ([0-9a-f]{8})\..*", first)
    if said is not None and said[1] != federation.fed8:
        raise ConfigError(
            f"{path}: its first line says hash {said[1]}, its content has {federation.fed8}: it was edited after it "
            "was made, or another version of hsl-node made it",
            remedy="ask whoever made it to send it again, and `hsl-node federation join` that. To change the "
            "federation: `hsl-node federation create` makes a new file, and everybody joins that",
        )


def load_card(path: Path) -> PeerCard:
    """A peer card: the peer's table, plus a fingerprint that must agree with the key."""
    text = read_text(path, CARD_MAX_BYTES)
    raw = parse(path, text)
    claimed = raw.pop("fingerprint", None)
    raw.pop("read_aloud", None)
    card = validate(path, text, raw, PeerCard)
    if claimed is not None and claimed != card.fingerprint:
        raise ConfigError(
            f"{path}: the fingerprint does not belong to the key: the card was changed on its way",
            remedy=f"ask {card.name} for the card again and compare the fingerprint by phone",
        )
    return card


def card_text(card: PeerCard) -> str:
    content = card.model_dump(mode="json", exclude_defaults=True)
    return (
        f"# Peer card of {card.name}: mail it, then compare the fingerprint by phone. It holds no secret.\n"
        + tomli_w.dumps({**content, "fingerprint": card.fingerprint, "read_aloud": read_aloud(card.key)})
    )


def federation_text(federation: Federation) -> str:
    content = federation.model_dump(mode="json", exclude_none=True)
    content["plan"] = {key: value for key, value in agreed(federation.plan).items() if value is not None}
    return (
        f"# Federation {federation.name!r}, hash {federation.fed8}. Identical at every peer: do not edit, make a\n"
        "# new one with `hsl-node federation create` and let everybody join it again.\n" + tomli_w.dumps(content)
    )


def differences(ours: Federation, theirs: Federation) -> list[str]:
    """Every setting in which two federation files differ, as `key: ours -> theirs`; empty when they agree."""
    mine, other = dict(flat(_comparable(ours))), dict(flat(_comparable(theirs)))
    return [
        escaped(f"{key}: {mine.get(key, 'absent')} -> {other.get(key, 'absent')}", 400)
        for key in sorted(mine.keys() | other.keys())
        if mine.get(key) != other.get(key)
    ]


def _comparable(federation: Federation) -> dict[str, Any]:
    content = federation.model_dump(mode="json")
    content["peer"] = {str(p["name"]): p for p in content["peer"]}
    return content
