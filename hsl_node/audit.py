"""`hsl-node verify`: is everything that this node keeps still what was signed, and does it fit together?

    manifest   signature, canonical form, digests ── base ──► the fusion before ── inputs ──► everybody's manifests
    receipt    signature, about what was sent        files ──► their sha256       fusion ──► computed once more

Reads only, also while the daemon runs. A defect is said in a sentence; the checks go on behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hsl_node import config, evidence
from hsl_node.errors import HslError, PeerDataError
from hsl_node.identity import MANIFEST_NAMESPACE, OFFER_NAMESPACE, RECEIPT_NAMESPACE, verify
from hsl_node.scratch import scratch
from hsl_node.sync import keyring
from hsl_node.sync.fuse_files import fuse_files
from hsl_node.sync.journal import Journal
from hsl_node.sync.keyring import UPDATE_NAMESPACE, Keyring
from hsl_node.sync.manifest import Manifest, Receipt, parse_manifest, parse_receipt, parse_signed
from hsl_node.sync.names import Peer, Round
from hsl_node.sync.offer import Offer
from hsl_node.sync.store import Layout, paths_of
from hsl_node.sync.tensors import read_schema, sha256_of


@dataclass(frozen=True)
class Document:
    """One signed document as it lies in the journal."""

    round: Round
    signer: Peer
    namespace: str
    stem: str  # of the exported file
    bytes: bytes
    content: Manifest | Receipt | None  # None: a peer's list, or it does not verify, or is malformed


@dataclass
class RoundReport:
    """What one round rests on."""

    round: Round
    fused: str | None
    contributors: dict[str, dict[str, object]] = field(default_factory=dict)  # peer -> samples, auc, sha256
    files: int = 0  # checkpoints still here, hashed again
    recomputed: bool = False  # all inputs are still here, and the fusion gave the same bytes


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
    rounds: dict[Round, RoundReport] = field(default_factory=dict)
    documents: list[Document] = field(default_factory=list)
    proofs: list[ProofFound] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # documents that are not here any more: nothing speaks against them
    keyring: Keyring | None = None

    def as_json(self) -> dict[str, object]:
        return {
            "node": self.node,
            "federation": self.federation,
            "ok": not self.defects,
            "defects": self.defects,
            "lost": self.lost,
            "equivocations": [vars(p) for p in self.proofs],
            "documents": len(self.documents),
            "rounds": [vars(r) for _, r in sorted(self.rounds.items())],
        }


def examine(state: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Findings:
    """All checks. `progress`: rounds done, of how many.

    Raises:
        NotInitialised, ConfigError, LocalStateError: there is nothing that could be checked.
    """
    federation, layout = config.load_federation(state), Layout(state)
    me = Peer(config.load_node(state).name)
    journal = Journal.read_only(layout.journal)
    found = Findings(me, federation.digest, keyring=keyring.load(state, federation))
    try:
        fused = {r["round"]: r["sha256"] for r in journal.rows("fused")}  # before the manifests: the daemon may run
        if journal.meta("federation") not in (None, federation.digest):
            found.defects.append("the journal belongs to another federation than federation.toml")
        _documents(journal, me, found)
    finally:
        journal.close()
    manifests = {(d.round, d.signer): d for d in found.documents if isinstance(d.content, Manifest)}
    _proofs(layout.state / "evidence", found)
    for number in sorted({r for r, _ in manifests} | fused.keys()):
        found.rounds[number] = report = RoundReport(number, fused.get(number))
        for (round, peer), document in manifests.items():
            if round == number and isinstance(document.content, Manifest):
                m = document.content
                report.contributors[peer] = {"samples": m.samples, "auc": m.auc, "sha256": m.sha256, "bytes": m.bytes}
    found.defects += _chain(manifests, fused)
    found.lost += _lost(found.documents, fused, federation)
    for done, number in enumerate(sorted(found.rounds), 1):
        found.defects += _files(layout, me, found.rounds[number], manifests, federation)
        progress(done, len(found.rounds))
    return found


# ------------------------------------------------------------------ the signed documents


def _documents(journal: Journal, me: Peer, found: Findings) -> None:
    assert found.keyring is not None
    ring = found.keyring
    for row in journal.rows("manifests"):
        kept = journal.manifest(row["round"], row["peer"])
        if kept is None:
            continue
        what = f"round {row['round']}: manifest of {row['peer']}"
        manifest: Manifest | None = None
        try:
            manifest = parse_manifest(verify(kept["document"], ring.chain(row["peer"]), MANIFEST_NAMESPACE))
            says = (manifest.round, manifest.peer, manifest.sha256, manifest.content(), manifest.federation)
            if says != (row["round"], row["peer"], row["sha256"], kept["content"], found.federation):
                found.defects.append(f"{what}: the journal's columns are not what was signed")
        except HslError as exc:
            found.defects.append(f"{what}: {exc.message}")
        found.documents.append(
            Document(row["round"], Peer(row["peer"]), MANIFEST_NAMESPACE, f"r{row['round']:06d}_{row['peer']}.manifest",
                     kept["document"], manifest)
        )  # fmt: skip
    for row in journal.rows("signed"):
        signed, kept = journal.signed(row["round"]), journal.manifest(row["round"], me)
        if signed is None or kept is None or signed[1] != kept["document"]:
            found.defects.append(f"round {row['round']}: what this node signed is not the manifest that it keeps")
    for row in journal.rows("receipts"):
        document = journal.receipt(row["round"], row["receiver"])
        what, receipt = f"round {row['round']}: receipt of {row['receiver']}", None
        mine = journal.signed(row["round"])
        try:
            receipt = parse_receipt(verify(document, ring.chain(row["receiver"]), RECEIPT_NAMESPACE))
            about = (receipt.federation, receipt.round, receipt.peer, receipt.receiver, receipt.accepted)
            if about != (found.federation, row["round"], me, row["receiver"], bool(row["accepted"])):
                found.defects.append(f"{what}: the journal's columns are not what was signed")
            # The opening statement may be corrected, and signed anew, before the first round.
            if row["round"] > 0 and (mine is None or receipt.sha256 != mine[0]):
                found.defects.append(f"{what}: about another checkpoint than the one this node signed")
        except HslError as exc:
            found.defects.append(f"{what}: {exc.message}")
        stem = f"r{row['round']:06d}_{me}_at_{row['receiver']}.receipt"
        found.documents.append(
            Document(row["round"], Peer(row["receiver"]), RECEIPT_NAMESPACE, stem, document, receipt)
        )

    for peer, document in evidence.told(journal, ring.federation.peers).items():
        try:
            offer = parse_signed(verify(document, ring.chain(peer), OFFER_NAMESPACE), Offer)
            if (offer.federation, offer.peer, offer.asker) != (found.federation, peer, me):
                found.defects.append(f"what {peer} answered a recovery is about something else")
        except HslError as exc:
            found.defects.append(f"what {peer} answered a recovery: {exc.message}")
        found.documents.append(Document(Round(0), peer, OFFER_NAMESPACE, f"recovery_{peer}.offer", document, None))


def _proofs(folder: Path, found: Findings) -> None:
    """What is kept against peers that signed two things. Its documents join the others, for `export`."""
    assert found.keyring is not None
    for proof in evidence.kept(folder):
        try:
            both = evidence.require_proof(proof, found.keyring.chain(proof.peer), found.keyring.federation)
        except HslError as exc:
            found.defects.append(f"evidence/ against {proof.peer} in round {proof.round} proves nothing: {exc.message}")
            continue
        found.proofs.append(ProofFound(proof.round, proof.peer, (both[0].digest, both[1].digest)))
        for path, document, manifest in zip(proof.paths, proof.documents(), both, strict=True):
            stem = f"evidence_{path.name}"
            found.documents.append(Document(proof.round, proof.peer, MANIFEST_NAMESPACE, stem, document, manifest))


def _lost(documents: list[Document], fused: dict[Round, str], federation: config.Federation) -> Iterator[str]:
    """Manifests of fused rounds that are not kept: no peer could give them back after a loss. One that is kept and
    does not verify is a defect.
    """
    kept = {(d.round, d.signer) for d in documents if d.namespace == MANIFEST_NAMESPACE}
    for number in sorted(fused):
        missing = [p for p in federation.peers if (number, p) not in kept]
        if number > 0 and missing:
            yield (
                f"round {number}: the manifest of {', '.join(missing)} is not here any more. That it, with "
                "its number of images, went into the fused model can't be shown from here; another hospital can, with "
                "its own hsl-node verify --export"
            )


def _chain(manifests: dict[tuple[Round, Peer], Document], fused: dict[Round, str]) -> Iterator[str]:
    """Each manifest stands on the fusion before it and on everybody's manifests of that round."""
    for (round, peer), document in sorted(manifests.items()):
        manifest = document.content
        assert isinstance(manifest, Manifest)
        before = max(round - 1, 0)
        if before in fused and manifest.base != fused[before]:
            yield (
                f"round {round}: {peer} stands on {manifest.base[:12]}, "
                f"this node's model after round {before} is {fused[before][:12]}"
            )
        for other, named in sorted(manifest.inputs.items()):
            kept = manifests.get((Round(round - 1), Peer(other)))
            if kept is not None and isinstance(kept.content, Manifest) and named != kept.content.digest:
                yield f"round {round}: {peer} fused another input of {other} than the one kept here"


# ------------------------------------------------------------------ the files


def _files(
    layout: Layout,
    me: Peer,
    report: RoundReport,
    manifests: dict[tuple[Round, Peer], Document],
    federation: config.Federation,
) -> Iterator[str]:
    """Checkpoints and fused models that are still here. Old ones are pruned, which is no defect."""
    number, paths = report.round, paths_of(layout, report.round, me, federation.peers)
    samples, sound = {}, True
    for peer, path in paths.items():
        document = manifests.get((number, peer))
        manifest = document.content if document else None
        digest = _sha256(path)
        if digest is None or not isinstance(manifest, Manifest) or manifest.statement:
            sound = False
        elif digest != manifest.sha256:
            sound = False
            yield f"round {number}: the file of {peer} has sha256 {digest[:12]}, signed was {manifest.sha256[:12]}"
        else:
            report.files += 1
            samples[peer] = manifest.samples
    kept = _sha256(layout.fused(number))
    if kept is not None and report.fused is not None and kept != report.fused:
        yield f"round {number}: the fused model has sha256 {kept[:12]}, the journal says {report.fused[:12]}"
    if sound and report.fused is not None and number > 0:
        again = _fused_again(layout, paths, samples, federation)
        report.recomputed = again == report.fused
        if again is not None and again != report.fused:
            yield f"round {number}: fusing the kept inputs gives {again[:12]}, the journal says {report.fused[:12]}"


def _fused_again(
    layout: Layout, paths: Mapping[Peer, Path], samples: dict[Peer, int], federation: config.Federation
) -> str | None:
    try:
        schema = read_schema(layout.fused(0))
        with scratch(layout.state / "run", "verify-") as folder:
            return fuse_files(federation.plan.fusion, paths, samples, schema, folder / "fused")
    except FileNotFoundError:  # pruned by the running daemon meanwhile
        return None


def _sha256(path: Path) -> str | None:
    try:
        return sha256_of(path)
    except FileNotFoundError:
        return None


# ------------------------------------------------------------------ for others to check


CHECK = """\
#!/bin/sh
# Checks every document of this folder with stock ssh-keygen; needs nothing of hsl-node. Silent where all is well.
cd "$(dirname "$0")" || exit 2
bad=0
while read -r signer namespace file; do
    ssh-keygen -Y verify -f allowed_signers -I "$signer" -n "$namespace" -s "$file.sig" <"$file" >/dev/null ||
        { echo "BAD: $file of $signer"; bad=1; }
done <index
exit $bad
"""


def export(found: Findings, folder: Path) -> int:
    """Write each document as NAME (the signed line) and NAME.sig, `allowed_signers`, and a script; gives the count.

    Raises:
        FileExistsError: the folder is there already.
    """
    ring = found.keyring
    assert ring is not None
    folder.mkdir(mode=0o700, parents=True)
    documents = [(d.signer, d.namespace, d.stem, d.bytes) for d in found.documents]
    documents += [
        (Peer(u.peer), UPDATE_NAMESPACE, f"{u.peer}_{u.number}.update", a.document.encode("ascii"))
        for a in ring.file.update
        for u in [keyring.parse_update(a.document)]
        if u.federation == found.federation
    ]
    for _, _, stem, document in documents:
        line, newline, signature = document.partition(b"\n")
        (folder / stem).write_bytes(line + newline)
        (folder / f"{stem}.sig").write_bytes(signature)
    spaces = ",".join((MANIFEST_NAMESPACE, RECEIPT_NAMESPACE, OFFER_NAMESPACE, UPDATE_NAMESPACE))
    signers = [f'{p} namespaces="{spaces}" {key}\n' for p in ring.federation.peers for key in ring.chain(p)]
    (folder / "allowed_signers").write_text("".join(signers), encoding="ascii")
    (folder / "index").write_text("".join(f"{s} {n} {stem}\n" for s, n, stem, _ in documents), encoding="ascii")
    (folder / "check.sh").write_text(CHECK, encoding="ascii")
    return len(documents)


def require_sound(found: Findings) -> None:
    """Raises: PeerDataError: exit code 14, where anything is wrong."""
    if found.defects:
        raise PeerDataError(
            f"{len(found.defects)} defect{'s' if len(found.defects) > 1 else ''} found, named above",
            code="verify",
            remedy="do not trust results that rest on these rounds; compare `hsl-node verify` at the other peers, "
            "restore from backup what changed here",
        )
