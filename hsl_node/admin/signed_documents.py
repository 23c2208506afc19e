"""`hsl-node verify --export`: each signed document that was checked, for others to check with stock `ssh-keygen`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hsl_node.admin.verify import Document
from hsl_node.federation.identity import MANIFEST_NAMESPACE, OFFER_NAMESPACE, RECEIPT_NAMESPACE
from hsl_node.federation.keyring import UPDATE_NAMESPACE, Keyring
from hsl_node.federation.names import Peer

CHECK = """\
#!/bin/sh
# Checks every document of this folder with stock ssh-keygen; needs nothing of hsl-node. Exit code 1: not all are good.
cd "$(dirname "$0")" || exit 2
wanted={count}
good=0
[ -r index ] && [ -r allowed_signers ] || {{ echo "BAD: index or allowed_signers is missing"; exit 1; }}
while read -r signer namespace file; do
    if ssh-keygen -Y verify -f allowed_signers -I "$signer" -n "$namespace" -s "$file.sig" <"$file" >/dev/null; then
        good=$((good + 1))
    else
        echo "BAD: $file of $signer"
    fi
done <index
seen=$(sort -u index | wc -l)
[ "$seen" -eq "$wanted" ] || echo "BAD: index lists $seen documents, exported were $wanted"
echo "$good of $wanted documents good"
[ "$good" -eq "$wanted" ] && [ "$seen" -eq "$wanted" ]
"""


@dataclass
class Export:
    """A new folder: each document as NAME (the signed line) and NAME.sig, `index`, `allowed_signers`, and a script."""

    folder: Path
    count: int = 0

    def add(self, document: Document) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        line, newline, signature = document.bytes.partition(b"\n")
        (self.folder / document.stem).write_bytes(line + newline)
        (self.folder / f"{document.stem}.sig").write_bytes(signature)
        with open(self.folder / "index", "a", encoding="ascii") as index:
            index.write(f"{document.signer} {document.namespace} {document.stem}\n")
        self.count += 1

    def finish(self, ring: Keyring) -> None:
        """After all that `verify.examine` told of: the key changes, and what it takes to check."""
        for peer in ring.federation.peers:
            for update, accepted in ring.updates_of(peer):
                stem = f"{peer}_{update.number}.update"
                self.add(Document(Peer(peer), UPDATE_NAMESPACE, stem, accepted.document.encode("ascii")))
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # where there was nothing to check
        (self.folder / "index").touch()
        spaces = ",".join((MANIFEST_NAMESPACE, RECEIPT_NAMESPACE, OFFER_NAMESPACE, UPDATE_NAMESPACE))
        signers = [f'{p} namespaces="{spaces}" {key}\n' for p in ring.federation.peers for key in ring.chain(p)]
        (self.folder / "allowed_signers").write_text("".join(signers), encoding="ascii")
        (self.folder / "check.sh").write_text(CHECK.format(count=self.count), encoding="ascii")
