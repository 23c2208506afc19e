"""Manifest and receipt: what a checkpoint claims, and what became of it. Bytes in, checked values out. Pure.

Signature checks come first and live in `identity.verify`; what is parsed here was signed by a pinned key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hsl_node.errors import FederationMismatch, PeerDataError, escaped
from hsl_node.federation.canonical import signed_line
from hsl_node.federation.names import PEER_PATTERN, ROUND_MAX, Digest, FileName, Kind, Peer, Round
from hsl_node.sync.round import Claim

if TYPE_CHECKING:
    from hsl_node.federation.config import Federation
    from hsl_node.federation.plan import Plan

MANIFEST_MAX_BYTES = 32 * 1024  # 64 peers x 100 bytes of inputs, plus the signature, doubled twice
RECEIPT_MAX_BYTES = 4 * 1024
VERSION_MAX = 999_999
SCORE_MAX = 1e9  # of either sign: an AUC is at most 1, a loss with a minus before it may be anything
SAMPLES_MAX = 10**8  # more images than a hospital has. A false count drowns the others far below it: see poisoning.py

_Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, Field(pattern=rf"^{PEER_PATTERN}$")]
_Word = Annotated[str, Field(max_length=80)]
_SaidName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
_Code = Annotated[str, Field(pattern=r"^[a-z0-9]{1,20}$")]  # that of a PeerDataError; tables and alarms show it


class Signed(BaseModel):
    """What is signed as one line of canonical JSON (`signed_line(content())`), and parsed by `parse_signed`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def content(self) -> dict[str, object]:
        return self.model_dump(mode="json", by_alias=True)


class About(BaseModel):
    """Whose manifest it is, and of what: enough to answer it. These mean the same in every version of it."""

    federation: _Sha  # Federation.digest
    round: int = Field(ge=0, le=ROUND_MAX)
    peer: _Name
    sha256: _Sha  # of the checkpoint file

    def file_name(self) -> FileName:
        return FileName(self.federation[:8], self.round, Peer(self.peer), Digest(self.sha256), Kind.MANIFEST)


class Heading(About):
    """What can be read of a manifest of another version."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    version: int = Field(ge=0, le=VERSION_MAX)


class Manifest(About, Signed):
    """One peer's signed statement about one round.

    A *statement* (`bytes` = 0, `sha256` = `base`) carries no checkpoint. Round 0: the initial weights this peer will
    start from; the round after the last: the fused model it ended with; with `halted`: where it stopped. See AGREE and
    HALTED in `round.py`.
    """

    version: Literal[3] = 3  # how to change it: docs/decisions, 0015
    bytes: int = Field(ge=0, le=2**63)
    base: _Sha  # the fused model this round was trained from; rounds 0 and 1: the initial weights
    inputs: dict[_Name, _Sha]  # peer -> `digest` of its manifest of the round fused into `base`; rounds 0, 1: empty
    samples: int = Field(ge=1, le=SAMPLES_MAX)  # training images
    score: float | None = Field(ge=-SCORE_MAX, le=SCORE_MAX)  # own validation, more is better; None: undefined
    said: dict[_SaidName, float]  # the numbers that the method's card declares; a statement: none
    plateau: bool
    halted: bool  # a statement only: this peer stopped here, the run has not ended
    anchor: _Sha | None  # fingerprint of the anchor set
    schema_: _Sha = Field(alias="schema")  # digest of the checkpoint header: the model's architecture
    instance: _Word  # nonce of this installation; a cloned machine shows itself
    software: _Word  # hsl-node and torch versions, for the operator

    @property
    def statement(self) -> bool:
        return self.bytes == 0

    @property
    def digest(self) -> Digest:
        """Pins everything this manifest says: the checkpoint, and the numbers and flags it is fused with."""
        return content_digest(self.content())


class Receipt(Signed):
    """The receiver's signed answer to one manifest."""

    version: Literal[1] = 1
    federation: _Sha
    round: int = Field(ge=0, le=ROUND_MAX)
    peer: _Name  # whose checkpoint this is about
    sha256: _Sha
    receiver: _Name
    accepted: bool
    code: _Code  # "accepted", or why not: name, owner, federation, round, size, sha256, header, ...
    text: Annotated[str, Field(max_length=300)]  # for the operator at the sender

    @model_validator(mode="after")
    def _says_one_thing(self) -> Receipt:
        if self.accepted != (self.code == "accepted"):
            raise ValueError(f"accepted is {self.accepted}, the code {self.code!r}")
        return self


def content_digest(content: Mapping[str, object]) -> Digest:
    """sha256 of the line that is signed, not of the signature: `head -n1 FILE | sha256sum`."""
    return Digest(hashlib.sha256(signed_line(content)).hexdigest())


def parse_manifest(line: bytes) -> Manifest:
    """Raises: PeerDataError: code `manifest`."""
    return parse_signed(line, Manifest)


def find_heading(line: bytes) -> Heading | None:
    """Of a manifest of any version; None: it has none."""
    try:
        return Heading.model_validate(json.loads(line))
    except (ValueError, RecursionError):
        return None


def parse_receipt(line: bytes) -> Receipt:
    """Raises: PeerDataError: code `manifest`."""
    return parse_signed(line, Receipt)


def check(manifest: Manifest, name: FileName, federation: Federation, sender: Peer, current: Round) -> None:
    """Compare a verified manifest with its name, its sender and our round. The bytes of the data come after this.

    Raises:
        PeerDataError: code `name`, `owner`, `federation`, `round`, `manifest`, `said` or `halted`.
    """
    if manifest.peer != sender or name.peer != sender:
        raise PeerDataError(f"{sender!r} delivered a manifest of {manifest.peer!r}", code="owner")
    if manifest.federation != federation.digest:
        raise PeerDataError(
            f"manifest of federation {manifest.federation[:8]}, ours is {federation.fed8}", code="federation"
        )
    if manifest.file_name() != name.of(Kind.MANIFEST):
        raise PeerDataError("file name and manifest do not agree", code="name")
    if manifest.round not in (current, current + 1) or manifest.round > federation.plan.rounds + 1:
        raise PeerDataError(f"round {manifest.round}, accepted here: {current} and {current + 1}", code="round")
    if manifest.statement and manifest.sha256 != manifest.base:
        raise PeerDataError("a statement repeats the digest of its base", code="manifest")
    if manifest.round == 0 and not manifest.statement:
        raise PeerDataError("round 0 is a statement", code="manifest")
    if manifest.round <= 1 and manifest.inputs:
        raise PeerDataError(f"round {manifest.round} has no earlier inputs", code="manifest")
    if manifest.round > 1 and set(manifest.inputs) != set(federation.peers):
        raise PeerDataError("inputs do not name the full set", code="manifest")
    check_said(manifest, federation.plan)
    _check_halted(manifest, federation.plan)


def check_said(manifest: Manifest, plan: Plan) -> None:
    """A fusion may count by these numbers, and nobody can check them: so there are just these, within their bounds.

    Raises:
        PeerDataError: code `said`.
    """
    declared = {} if manifest.statement else {said.name: said for said in plan.card.says}
    if manifest.said.keys() != declared.keys():
        found, wanted = (escaped(", ".join(sorted(names)), 200) or "nothing" for names in (manifest.said, declared))
        what = "a statement" if manifest.statement else f"the method {plan.method}"
        raise PeerDataError(f"says {found} beside its checkpoint; {what} has {wanted}", code="said")
    for name, value in manifest.said.items():
        low, high = declared[name].low, declared[name].high
        if not low <= value <= high:
            raise PeerDataError(f"says {name} {value:g}; {plan.method} has it from {low:g} to {high:g}", code="said")


def _check_halted(manifest: Manifest, plan: Plan) -> None:
    if manifest.halted and (manifest.round == 0 or not manifest.statement):
        what = "with a checkpoint" if manifest.round else "before the first round"
        raise PeerDataError(f"says that its node halted, {what}", code="halted")
    # A plateau takes `plateau_rounds` rounds after a first one; the closing statement comes one round later.
    earliest_end = min(plan.rounds, plan.plateau_rounds + 1) + 1
    if manifest.statement and not manifest.halted and 0 < manifest.round < earliest_end:
        raise PeerDataError(
            f"says in round {manifest.round} that the run has ended, which this plan allows from {earliest_end} on",
            code="halted",
        )


def require_same_version(heading: Heading, me: Peer) -> None:
    """Raises: FederationMismatch: the rest of the manifest cannot be read here."""
    here = Manifest.model_fields["version"].default
    if heading.version != here:
        raise FederationMismatch(
            f"{heading.peer} runs another hsl-node version than {me}: manifest version {heading.version}, "
            f"at {me} {here}",
            remedy="install the same hsl-node version at both sites",
        )


def require_same_setup(manifest: Manifest, *, anchor: str | None, schema: str, software: str) -> None:
    """Anchor and architecture must be ours.

    Raises:
        FederationMismatch: says which of the two differs, with both software versions; or that the method comes from
            different packages.
    """
    theirs = escaped(manifest.software)
    if manifest.anchor != anchor:
        raise FederationMismatch(
            f"{manifest.peer} uses anchor set {str(manifest.anchor)[:12]}, this node {str(anchor)[:12]}",
            remedy="compare `hsl-node anchor verify` at both sites and copy the right file",
        )
    # After hsl-node and torch, which may differ, stands the package of a method that is none of hsl-node's own.
    packages = [escaped(", ".join(said.split(", ")[2:])) or "none" for said in (manifest.software, software)]
    if packages[0] != packages[1]:
        raise FederationMismatch(
            f"{manifest.peer} has the plan's method from package {packages[0]}, this node from {packages[1]}",
            remedy="install the same package, in the same version, at both sites",
        )
    if manifest.schema_ != schema:
        raise FederationMismatch(
            f"{manifest.peer} trains another architecture ({theirs}; here {software})",
            remedy="install the same hsl-node version at both sites",
        )


_Document = TypeVar("_Document", bound=Signed)


def parse_signed(line: bytes, model: type[_Document]) -> _Document:
    """Only the one spelling that `content` gives is taken. Raises: PeerDataError: code `manifest`."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise PeerDataError(f"{model.__name__.lower()} is malformed: {escaped(str(exc))}", code="manifest") from exc
    here = model.model_fields["version"].default
    if isinstance(content, dict) and content.get("version") != here:
        raise PeerDataError(
            f"{model.__name__.lower()} of version {escaped(repr(content.get('version')), 20)}, this node speaks {here}",
            code="manifest",
            remedy="install the same hsl-node version at all sites",
        )
    try:
        document = model.model_validate(content)
        canonical = signed_line(document.content())
    except (ValueError, ValidationError, RecursionError) as exc:
        raise PeerDataError(f"{model.__name__.lower()} is malformed: {escaped(str(exc))}", code="manifest") from exc
    if canonical != line:  # duplicate keys, odd spellings
        raise PeerDataError(f"{model.__name__.lower()} is not in canonical form", code="manifest")
    return document


def claim_of(manifest: Manifest) -> Claim:
    """The part of a manifest that the round machine needs."""
    return Claim(
        peer=Peer(manifest.peer),
        round=manifest.round,
        sha256=Digest(manifest.sha256),
        base=Digest(manifest.base),
        inputs={Peer(p): Digest(d) for p, d in manifest.inputs.items()},
        manifest=manifest.digest,
        samples=manifest.samples,
        plateau=manifest.plateau,
        statement=manifest.statement,
        halted=manifest.halted,
        software=manifest.software,
    )
