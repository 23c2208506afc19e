"""`hsl-node verify`: is everything that this node keeps still what was signed, and does it fit together?

    manifest   signature, canonical form, digests ── base ──► the fusion before ── inputs ──► everybody's manifests
    receipt    signature, about what was sent        files ──► their sha256       fusion ──► computed once more

Reads only, also while the daemon runs. A defect is said in a sentence; the checks go on behind it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hsl_node.errors import Altered, HslError, PeerDataError
from hsl_node.federation import config, keyring, node_toml
from hsl_node.federation.fusion_rules import FUSION_RULES
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

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """One signed document, as signed_documents.py writes it."""

    signer: Peer
    namespace: str
    stem: str  # of the exported file
    bytes: bytes


@dataclass
class RoundReport:
    """What one round rests on."""

    round: Round
    fused: str | None
    contributors: dict[str, dict[str, object]] = field(default_factory=dict)  # peer -> samples, score, sha256
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
    """Defects are told round by round, after those of what belongs to no round."""

    node: Peer
    federation: str
    keyring: Keyring
    export: Callable[[Document], None]
    rounds: dict[Round, RoundReport] = field(default_factory=dict)
    documents: int = 0  # checked
    proofs: list[ProofFound] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # what is not here any more: nothing speaks against it

    def check(self, what: str, document: Document, parse: Callable[[bytes], T]) -> T | None:
        """What a document says, where its signer signed it; else a defect. It is exported either way."""
        self.documents += 1
        self.export(document)
        try:
            return parse(verify(document.bytes, self.keyring.chain(document.signer), document.namespace))
        except HslError as exc:
            self.defects.append(f"{what}: {exc.message}")
            return None

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


def examine(
    state: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    export: Callable[[Document], None] = lambda document: None,
) -> Findings:
    """All checks. Of a round's documents no more than its report and digests outlast it: 64 peers x 1,000 rounds are
    half a gigabyte. `progress`: rounds done, of how many. `export`: hears each signed document that is checked.

    Raises:
        NotInitialised, ConfigError, LocalStateError: there is nothing that could be checked.
    """
    federation, layout = config.load_federation(state), Layout(state)
    me = Peer(node_toml.load_node(state).name)
    found = Findings(me, federation.digest, keyring.load(state, federation), export)
    with Journal.read_only(layout.journal) as journal:
        fused = {r["round"]: r["sha256"] for r in journal.rows("fused")}  # before the manifests: the daemon may run
        if journal.meta("federation") not in (None, federation.digest):
            found.defects.append("the journal belongs to another federation than federation.toml")
        _told(journal, found)
        _proofs(layout.evidence, found)
        keeps = {model.round: model for model in models.models(journal) if model.kind != "own"}
        found.defects += _own(layout, journal)
        digests: dict[Round, dict[Peer, Digest]] = {}  # of the manifests of the round before
        numbers = sorted({*journal.signed_rounds(), *fused})
        for done, number in enumerate(numbers, 1):
            # What is about another document is read before that one: the daemon may write in between.
            receipts, mine, rows = journal.receipts_of(number), journal.signed(number), journal.manifests_of(number)
            manifests = _manifests(rows, found)
            if mine is not None and mine[1] not in [row["document"] for row in rows if row["peer"] == me]:
                found.defects.append(f"round {number}: what this node signed is not the manifest that it keeps")
            _receipts(receipts, mine, found)
            found.defects += _chain(number, manifests, digests.get(Round(number - 1), {}), fused)
            digests = {number: {peer: manifest.digest for peer, manifest in manifests.items()}}
            found.lost += _lost(number, {row["peer"] for row in rows}, fused, found.proofs, federation)
            if manifests or number in fused:
                found.rounds[number] = RoundReport(number, fused.get(number), _contributors(manifests))
                found.defects += _files(layout, me, found.rounds[number], manifests, federation, keeps.get(number))
            progress(done, len(numbers))
    for harm in models.harmed(layout, whole=False):
        if harm.model.round in found.rounds and harm.model.kind != "own":
            found.rounds[harm.model.round].lost = True
        found.lost.append(f"{harm.text(layout)}. What to do: {_fix(harm, layout)}")
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
    return {
        p: {"samples": m.samples, "score": m.score, "sha256": m.sha256, "bytes": m.bytes} for p, m in manifests.items()
    }


# ------------------------------------------------------------------ the signed documents


def _manifests(rows: list[dict[str, Any]], found: Findings) -> dict[Peer, Manifest]:
    """Of one round: those that verify."""
    manifests: dict[Peer, Manifest] = {}
    for row in rows:
        number, peer = row["round"], Peer(row["peer"])
        what = f"round {number}: manifest of {peer}"
        document = Document(peer, MANIFEST_NAMESPACE, f"r{number:06d}_{peer}.manifest", row["document"])
        manifest = found.check(what, document, parse_manifest)
        if manifest is None:
            continue
        manifests[peer] = manifest
        says = (manifest.round, manifest.peer, manifest.sha256, manifest.content(), manifest.federation)
        if says != (number, peer, row["sha256"], row["content"], found.federation):
            found.defects.append(f"{what}: the journal's columns are not what was signed")
    return manifests


def _receipts(rows: list[sqlite3.Row], mine: tuple[Digest, bytes] | None, found: Findings) -> None:
    for row in rows:
        number, receiver = row["round"], Peer(row["receiver"])
        what = f"round {number}: receipt of {receiver}"
        stem = f"r{number:06d}_{found.node}_at_{receiver}.receipt"
        receipt = found.check(what, Document(receiver, RECEIPT_NAMESPACE, stem, row["document"]), parse_receipt)
        if receipt is None:
            continue
        about = (receipt.federation, receipt.round, receipt.peer, receipt.receiver, receipt.accepted)
        if about != (found.federation, number, found.node, receiver, bool(row["accepted"])):
            found.defects.append(f"{what}: the journal's columns are not what was signed")
        # The opening statement may be corrected, and signed anew, before the first round.
        if number > 0 and (mine is None or receipt.sha256 != mine[0]):
            found.defects.append(f"{what}: about another checkpoint than the one this node signed")


def _told(journal: Journal, found: Findings) -> None:
    for peer, signed in evidence.told(journal, found.keyring.federation.peers).items():
        what, document = (
            f"what {peer} answered a recovery",
            Document(peer, OFFER_NAMESPACE, f"recovery_{peer}.offer", signed),
        )
        offer = found.check(what, document, lambda line: parse_signed(line, Offer))
        if offer and (offer.federation, offer.peer, offer.asker) != (found.federation, peer, found.node):
            found.defects.append(f"{what} is about something else")


def _proofs(folder: Path, found: Findings) -> None:
    """What is kept against peers that signed two things. Its documents join the others."""
    for proof in evidence.kept(folder):
        try:
            both = evidence.require_proof(proof, found.keyring.chain(proof.peer), found.keyring.federation)
        except HslError as exc:
            against = f"evidence/ against {proof.peer} in round {proof.round}"
            found.defects.append(f"{against} proves nothing: {exc.message}")
            continue
        found.proofs.append(ProofFound(proof.round, proof.peer, (both[0].digest, both[1].digest)))
        for path, signed in zip(proof.paths, proof.documents(), strict=True):
            found.documents += 1
            found.export(Document(proof.peer, MANIFEST_NAMESPACE, f"evidence_{path.name}", signed))


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
) -> Iterator[str]:
    """Each manifest stands on the fusion before it and on everybody's manifests of that round, the `inputs`."""
    before = Round(max(number - 1, 0))
    for peer, manifest in sorted(manifests.items()):
        if before in fused and manifest.base != fused[before]:
            text = f"{peer} stands on {manifest.base[:12]}, this node's model after round {before} is"
            yield f"round {number}: {text} {fused[before][:12]}"
        for other, named in sorted(manifest.inputs.items()):
            if named != inputs.get(Peer(other), named):
                yield f"round {number}: {peer} fused another input of {other} than the one kept here"


# ------------------------------------------------------------------ the files


def _files(
    layout: Layout,
    me: Peer,
    report: RoundReport,
    manifests: Mapping[Peer, Manifest],
    federation: config.Federation,
    model: models.Model | None,
) -> Iterator[str]:
    """Checkpoints and fused models that are still here. Old ones are pruned, which is no defect.

    `model`: the round's fused model, where it is one that is kept.
    """
    number = report.round
    paths = {p: layout.checkpoint(number, p, me) for p in federation.peers}
    samples: dict[Peer, int] = {}  # of those whose file is as signed
    for peer, path in paths.items():
        manifest, digest = manifests.get(peer), _sha256(path)
        if digest is None or manifest is None or manifest.statement:
            continue
        if digest != manifest.sha256:
            text = f"the file of {peer} has sha256 {digest[:12]}, signed was {manifest.sha256[:12]}"
            yield f"round {number}: {text}"
        else:
            report.files += 1
            samples[peer] = manifest.samples
    here = _sha256(layout.fused(number))
    if here is not None and report.fused is not None and here != report.fused:
        text = f"the fused model has sha256 {here[:12]}, the journal says {report.fused[:12]}"
        fix = f". What to do: {_fix(models.Harm(model, 'altered'), layout)}" if model else ""
        yield f"round {number}: {text}{fix}"
    if len(samples) == len(paths) and report.fused is not None and number > 0:
        said = {peer: manifests[peer].said for peer in samples}
        again = _fused_again(layout, number, paths, samples, said, federation)
        report.recomputed = again == report.fused
        if again is not None and again != report.fused:
            text = f"fusing the kept inputs gives {again[:12]}, the journal says {report.fused[:12]}"
            yield f"round {number}: {text}"


def _own(layout: Layout, journal: Journal) -> Iterator[str]:
    """This node's own models that are still here. A lost one is told with the fused ones."""
    digests = journal.own_digests()
    for round, path in sorted(layout.own_files().items()):
        known = digests.get(Round(round))
        if known is not None and (here := _sha256(path)) not in (None, known):
            model = models.Model("own", Round(round), known, "what this node sent")
            text = f"this node's own model has sha256 {here and here[:12]}, the journal says {known[:12]}"
            yield f"round {round}: {text}. What to do: {_fix(models.Harm(model, 'altered'), layout)}"


def _fix(harm: models.Harm, layout: Layout) -> str:
    return addressed(harm.fix(layout), layout.state)


def _fused_again(
    layout: Layout,
    number: Round,
    paths: Mapping[Peer, Path],
    samples: Mapping[Peer, int],
    said: Mapping[Peer, Mapping[str, float]],
    federation: config.Federation,
) -> str | None:
    """None: something was pruned meanwhile by the running daemon, or before: the model that the round began with."""
    plan, base = federation.plan, layout.fused(number - 1)
    if FUSION_RULES[plan.rule].needs_base and not base.exists():
        return None
    try:
        schema = read_schema(layout.fused(0))
        return fuse_files(plan.rule, paths, samples, schema, None, said=said, base=base, clip=plan.fusion_clip)
    except (Altered, FileNotFoundError):
        if all(path.exists() for path in (*paths.values(), layout.fused(0), base)):
            raise
        return None


def _sha256(path: Path) -> str | None:
    try:
        return sha256_of(path)
    except FileNotFoundError:
        return None
