"""`hsl-node verify`: is everything that this node keeps still what was signed, and does it fit together?

    manifest   signature, canonical form, digests ── base ──► the fusion before ── inputs ──► everybody's manifests
    receipt    signature, about what was sent        files ──► their sha256       fusion ──► computed once more

Reads only, also while the daemon runs. A defect is said in a sentence; the checks go on behind it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, auto
from pathlib import Path
from typing import Any

from hsl_node.errors import HslError, PeerDataError
from hsl_node.federation import config, keyring, node_toml
from hsl_node.federation.identity import MANIFEST_NAMESPACE, OFFER_NAMESPACE, RECEIPT_NAMESPACE, verify
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.host.hints import addressed
from hsl_node.host.layout import Layout
from hsl_node.sync import evidence
from hsl_node.sync.manifest import Manifest, parse_manifest, parse_receipt, parse_signed
from hsl_node.sync.offer import Offer
from hsl_node.sync.store import models
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.checkpoint_file import read_schema
from hsl_node.weights.fuse_files import fuse_files
from hsl_node.weights.whole import sha256_of


@dataclass(frozen=True)
class Document:
    """One signed document, as signed_documents.py writes it."""

    signer: Peer
    namespace: str
    stem: str  # of the exported file
    bytes: bytes


class Section(IntEnum):
    """In this order defects are told; within a section in that in which the journal was written, else by rounds."""

    JOURNAL = auto()
    MANIFESTS = auto()
    SIGNED = auto()
    RECEIPTS = auto()
    TOLD = auto()
    PROOFS = auto()
    CHAIN = auto()
    FILES = auto()


Defect = tuple[Section, int, str]  # where it is told: section, and place in it


@dataclass
class RoundReport:
    """What one round rests on."""

    round: Round
    fused: str | None
    contributors: dict[str, dict[str, object]] = field(default_factory=dict)  # peer -> samples, auc, sha256
    files: int = 0  # checkpoints still here, hashed again
    recomputed: bool = False  # all inputs are still here, and the fusion gave the same bytes
    lost: bool = False  # the fused model, which is kept for people


@dataclass(frozen=True)
class ProofFound:
    """Two manifests of one round, both with this peer's signature, checked again."""

    round: Round
    peer: Peer
    manifests: tuple[str, str]  # their digests, as `inputs` name them


@dataclass
class Findings:
    node: str
    federation: str
    keyring: Keyring
    rounds: dict[Round, RoundReport] = field(default_factory=dict)
    documents: int = 0  # checked
    proofs: list[ProofFound] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # what is not here any more: nothing speaks against it
    evidence: list[Document] = field(default_factory=list)  # the two of each proof

    def as_json(self) -> dict[str, object]:
        return {
            "node": self.node,
            "federation": self.federation,
            "ok": not self.defects,
            "defects": self.defects,
            "lost": self.lost,
            "equivocations": [vars(p) for p in self.proofs],
            "documents": self.documents,
            "rounds": [vars(r) for _, r in sorted(self.rounds.items())],
        }


def examine(state: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Findings:
    """All checks. Of a round's documents no more than its report and digests outlast it: 64 peers x 1,000 rounds are
    half a gigabyte. `progress`: rounds done, of how many.

    Raises:
        NotInitialised, ConfigError, LocalStateError: there is nothing that could be checked.
    """
    federation, layout = config.load_federation(state), Layout(state)
    me = Peer(node_toml.load_node(state).name)
    found = Findings(me, federation.digest, keyring.load(state, federation))
    defects: list[Defect] = []
    with Journal.read_only(layout.journal) as journal:
        fused = {r["round"]: r["sha256"] for r in journal.rows("fused")}  # before the manifests: the daemon may run
        if journal.meta("federation") not in (None, federation.digest):
            defects.append((Section.JOURNAL, 0, "the journal belongs to another federation than federation.toml"))
        defects += _told(journal, me, found)
        defects += _proofs(layout.evidence, found)
        keeps = {model.round: model for model in models.models(journal)}
        digests: dict[Round, dict[Peer, Digest]] = {}  # of the manifests of the round before
        numbers = sorted({*journal.signed_rounds(), *fused})
        for done, number in enumerate(numbers, 1):
            # What is about another document is read before that one: the daemon may write in between.
            receipts, mine, rows = journal.receipts_of(number), journal.signed(number), journal.manifests_of(number)
            manifests: dict[Peer, Manifest] = {}
            defects += _manifests(rows, found, manifests)
            defects += _signed(number, mine, rows, me)
            defects += _receipts(receipts, mine, me, found)
            defects += _chain(number, manifests, digests.get(Round(number - 1), {}), fused)
            digests = {number: {peer: manifest.digest for peer, manifest in manifests.items()}}
            found.lost += _lost(number, {row["peer"] for row in rows}, fused, found.proofs, federation)
            if manifests or number in fused:
                found.rounds[number] = RoundReport(number, fused.get(number), _contributors(manifests))
                defects += _files(layout, me, found.rounds[number], manifests, federation, keeps.get(number))
            progress(done, len(numbers))
    for harm in models.harmed(layout, whole=False):
        if harm.model.round in found.rounds:
            found.rounds[harm.model.round].lost = True
        found.lost.append(f"{harm.text(layout)}. What to do: {_fix(harm, layout)}")
    found.defects = [text for _, _, text in sorted(defects, key=lambda defect: defect[:2])]
    return found


def require_sound(found: Findings) -> None:
    """Raises: PeerDataError: exit code 14, where anything is wrong."""
    if found.defects:
        raise PeerDataError(
            f"{len(found.defects)} defect{'s' if len(found.defects) > 1 else ''} found, named above",
            code="verify",
            remedy="do not trust results that rest on these rounds; compare `hsl-node verify` at the other peers, "
            "restore from backup what changed here",
        )


def _contributors(manifests: Mapping[Peer, Manifest]) -> dict[str, dict[str, object]]:
    return {p: {"samples": m.samples, "auc": m.auc, "sha256": m.sha256, "bytes": m.bytes} for p, m in manifests.items()}


# ------------------------------------------------------------------ the signed documents


def _manifests(rows: list[dict[str, Any]], found: Findings, manifests: dict[Peer, Manifest]) -> Iterator[Defect]:
    """Of one round. Those that verify are put into `manifests`."""
    for row in rows:
        found.documents += 1
        what = f"round {row['round']}: manifest of {row['peer']}"
        try:
            keys = found.keyring.chain(row["peer"])
            manifest = parse_manifest(verify(row["document"], keys, MANIFEST_NAMESPACE))
            manifests[Peer(row["peer"])] = manifest
            says = (manifest.round, manifest.peer, manifest.sha256, manifest.content(), manifest.federation)
            if says != (row["round"], row["peer"], row["sha256"], row["content"], found.federation):
                yield Section.MANIFESTS, row["rowid"], f"{what}: the journal's columns are not what was signed"
        except HslError as exc:
            yield Section.MANIFESTS, row["rowid"], f"{what}: {exc.message}"


def _signed(number: Round, mine: tuple[Digest, bytes] | None, rows: list[dict[str, Any]], me: Peer) -> Iterator[Defect]:
    if mine is not None and mine[1] not in [row["document"] for row in rows if row["peer"] == me]:
        yield Section.SIGNED, 0, f"round {number}: what this node signed is not the manifest that it keeps"


def _receipts(
    rows: list[sqlite3.Row], mine: tuple[Digest, bytes] | None, me: Peer, found: Findings
) -> Iterator[Defect]:
    for row in rows:
        found.documents += 1
        what, place = f"round {row['round']}: receipt of {row['receiver']}", row["rowid"]
        try:
            keys = found.keyring.chain(row["receiver"])
            receipt = parse_receipt(verify(row["document"], keys, RECEIPT_NAMESPACE))
            about = (receipt.federation, receipt.round, receipt.peer, receipt.receiver, receipt.accepted)
            if about != (found.federation, row["round"], me, row["receiver"], bool(row["accepted"])):
                yield Section.RECEIPTS, place, f"{what}: the journal's columns are not what was signed"
            # The opening statement may be corrected, and signed anew, before the first round.
            if row["round"] > 0 and (mine is None or receipt.sha256 != mine[0]):
                yield Section.RECEIPTS, place, f"{what}: about another checkpoint than the one this node signed"
        except HslError as exc:
            yield Section.RECEIPTS, place, f"{what}: {exc.message}"


def _told(journal: Journal, me: Peer, found: Findings) -> Iterator[Defect]:
    for peer, document in evidence.told(journal, found.keyring.federation.peers).items():
        found.documents += 1
        try:
            offer = parse_signed(verify(document, found.keyring.chain(peer), OFFER_NAMESPACE), Offer)
            if (offer.federation, offer.peer, offer.asker) != (found.federation, peer, me):
                yield Section.TOLD, 0, f"what {peer} answered a recovery is about something else"
        except HslError as exc:
            yield Section.TOLD, 0, f"what {peer} answered a recovery: {exc.message}"


def _proofs(folder: Path, found: Findings) -> Iterator[Defect]:
    """What is kept against peers that signed two things. Its documents join the others."""
    for proof in evidence.kept(folder):
        against = f"evidence/ against {proof.peer} in round {proof.round}"
        try:
            both = evidence.require_proof(proof, found.keyring.chain(proof.peer), found.keyring.federation)
        except HslError as exc:
            yield Section.PROOFS, 0, f"{against} proves nothing: {exc.message}"
            continue
        found.proofs.append(ProofFound(proof.round, proof.peer, (both[0].digest, both[1].digest)))
        for path, document in zip(proof.paths, proof.documents(), strict=True):
            found.documents += 1
            found.evidence.append(Document(proof.peer, MANIFEST_NAMESPACE, f"evidence_{path.name}", document))


def _lost(
    number: Round, kept: set[str], fused: dict[Round, str], proofs: list[ProofFound], federation: config.Federation
) -> Iterator[str]:
    """Manifests of a fused round that are not kept: no peer could give them back after a loss. One that is kept and
    does not verify is a defect.
    """
    kept |= {p.peer for p in proofs if p.round == number}
    missing = [p for p in federation.peers if p not in kept]
    if number in fused and number > 0 and missing:
        yield (
            f"round {number}: the manifest of {', '.join(missing)} is not here any more. That it, with "
            "its number of images, went into the fused model can't be shown from here; another hospital can, with "
            "its own hsl-node verify --export"
        )


def _chain(
    number: Round, manifests: Mapping[Peer, Manifest], inputs: Mapping[Peer, Digest], fused: dict[Round, str]
) -> Iterator[Defect]:
    """Each manifest stands on the fusion before it and on everybody's manifests of that round, the `inputs`."""
    before = Round(max(number - 1, 0))
    for peer, manifest in sorted(manifests.items()):
        if before in fused and manifest.base != fused[before]:
            text = f"{peer} stands on {manifest.base[:12]}, this node's model after round {before} is"
            yield Section.CHAIN, 0, f"round {number}: {text} {fused[before][:12]}"
        for other, named in sorted(manifest.inputs.items()):
            if named != inputs.get(Peer(other), named):
                yield Section.CHAIN, 0, f"round {number}: {peer} fused another input of {other} than the one kept here"


# ------------------------------------------------------------------ the files


def _files(
    layout: Layout,
    me: Peer,
    report: RoundReport,
    manifests: Mapping[Peer, Manifest],
    federation: config.Federation,
    model: models.Model | None,
) -> Iterator[Defect]:
    """Checkpoints and fused models that are still here. Old ones are pruned, which is no defect.

    `model`: the round's fused model, where it is one that is kept.
    """
    number = report.round
    paths = {p: layout.checkpoint(number, p, me) for p in federation.peers}
    samples, sound = {}, True
    for peer, path in paths.items():
        manifest, digest = manifests.get(peer), _sha256(path)
        if digest is None or manifest is None or manifest.statement:
            sound = False
        elif digest != manifest.sha256:
            sound = False
            text = f"the file of {peer} has sha256 {digest[:12]}, signed was {manifest.sha256[:12]}"
            yield Section.FILES, 0, f"round {number}: {text}"
        else:
            report.files += 1
            samples[peer] = manifest.samples
    here = _sha256(layout.fused(number))
    if here is not None and report.fused is not None and here != report.fused:
        text = f"the fused model has sha256 {here[:12]}, the journal says {report.fused[:12]}"
        fix = f". What to do: {_fix(models.Harm(model, 'altered'), layout)}" if model else ""
        yield Section.FILES, 0, f"round {number}: {text}{fix}"
    if sound and report.fused is not None and number > 0:
        again = _fused_again(layout, paths, samples, federation)
        report.recomputed = again == report.fused
        if again is not None and again != report.fused:
            text = f"fusing the kept inputs gives {again[:12]}, the journal says {report.fused[:12]}"
            yield Section.FILES, 0, f"round {number}: {text}"


def _fix(harm: models.Harm, layout: Layout) -> str:
    return addressed(harm.fix(layout), layout.state)


def _fused_again(
    layout: Layout, paths: Mapping[Peer, Path], samples: dict[Peer, int], federation: config.Federation
) -> str | None:
    try:
        return fuse_files(federation.plan.fusion, paths, samples, read_schema(layout.fused(0)), None)
    except FileNotFoundError:  # pruned by the running daemon meanwhile
        return None


def _sha256(path: Path) -> str | None:
    try:
        return sha256_of(path)
    except FileNotFoundError:
        return None
