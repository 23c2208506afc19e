"""`hsl-node verify --export`: each signed document that was checked, for others to check with stock `ssh-keygen`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hsl_node.admin.verify import Document, Findings
from hsl_node.federation import keyring
from hsl_node.federation.identity import MANIFEST_NAMESPACE, OFFER_NAMESPACE, RECEIPT_NAMESPACE
from hsl_node.federation.keyring import UPDATE_NAMESPACE
from hsl_node.federation.names import Peer
from hsl_node.host.layout import Layout
from hsl_node.sync import evidence
from hsl_node.sync.store.journal import Journal

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


def write(state: Path, found: Findings, folder: Path) -> int:
    """Write each document as NAME (the signed line) and NAME.sig, `allowed_signers`, and a script; gives the count.

    Raises:
        FileExistsError: the folder is there already.
    """
    ring = found.keyring
    folder.mkdir(mode=0o700, parents=True)
    count = 0
    with (
        Journal.read_only(Layout(state).journal) as journal,
        open(folder / "index", "w", encoding="ascii") as index,
    ):
        for document in _documents(journal, found):
            line, newline, signature = document.bytes.partition(b"\n")
            (folder / document.stem).write_bytes(line + newline)
            (folder / f"{document.stem}.sig").write_bytes(signature)
            index.write(f"{document.signer} {document.namespace} {document.stem}\n")
            count += 1
    spaces = ",".join((MANIFEST_NAMESPACE, RECEIPT_NAMESPACE, OFFER_NAMESPACE, UPDATE_NAMESPACE))
    signers = [f'{p} namespaces="{spaces}" {key}\n' for p in ring.federation.peers for key in ring.chain(p)]
    (folder / "allowed_signers").write_text("".join(signers), encoding="ascii")
    (folder / "check.sh").write_text(CHECK, encoding="ascii")
    return count


def _documents(journal: Journal, found: Findings) -> Iterator[Document]:
    """All that was checked, read once more."""
    ring, me = found.keyring, found.node
    numbers = journal.signed_rounds()
    for number in numbers:
        for row in journal.manifests_of(number):
            stem = f"r{number:06d}_{row['peer']}.manifest"
            yield Document(Peer(row["peer"]), MANIFEST_NAMESPACE, stem, row["document"])
    for number in numbers:
        for receipt in journal.receipts_of(number):
            stem = f"r{number:06d}_{me}_at_{receipt['receiver']}.receipt"
            yield Document(Peer(receipt["receiver"]), RECEIPT_NAMESPACE, stem, receipt["document"])
    for peer, document in evidence.told(journal, ring.federation.peers).items():
        yield Document(peer, OFFER_NAMESPACE, f"recovery_{peer}.offer", document)
    yield from found.evidence
    for accepted in ring.file.update:
        update = keyring.parse_update(accepted.document)
        if update.federation == found.federation:
            stem = f"{update.peer}_{update.number}.update"
            yield Document(Peer(update.peer), UPDATE_NAMESPACE, stem, accepted.document.encode("ascii"))
