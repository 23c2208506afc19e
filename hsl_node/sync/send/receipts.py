"""Find the receiver's answer to one parcel. What a server hands out counts only with the peer's pinned signature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hsl_node.errors import PeerDataError
from hsl_node.federation.config import Federation, PeerCard
from hsl_node.federation.identity import RECEIPT_NAMESPACE, verify
from hsl_node.federation.names import RECEIPTS, FileName, Kind
from hsl_node.sync.manifest import RECEIPT_MAX_BYTES, Receipt, parse_receipt
from hsl_node.sync.wire.transport import Transport


@dataclass(frozen=True)
class Answer:
    receipt: Receipt
    document: bytes  # as signed


@dataclass
class Receipts:
    """Looks for the receipt about `name` (of the data) by the peer of `card`, signed with one of `keys`."""

    link: Transport
    name: FileName
    card: PeerCard
    federation: Federation
    keys: Sequence[str]
    problem: str = ""  # why the document that lies there does not count

    async def find(self, *, other_than: bytes | None = None) -> Answer | None:
        """The receipt, if one is there that verifies and is not `other_than`."""
        path = f"{RECEIPTS}/{self.name.of(Kind.RECEIPT)}"
        size = await self.link.size(path)
        if size is None:
            return None
        if not 0 < size <= RECEIPT_MAX_BYTES:
            self.problem = f"the server shows a receipt of {size} bytes"
            return None
        document = await self.link.read(path, 0, RECEIPT_MAX_BYTES)
        if document == other_than:
            return None
        try:
            return Answer(self._check(document), document)
        except PeerDataError as exc:
            self.problem = exc.message
            return None

    def _check(self, document: bytes) -> Receipt:
        """Raises: PeerDataError: not signed by this peer, or about something else."""
        receipt = parse_receipt(verify(document, self.keys, RECEIPT_NAMESPACE))
        says = (receipt.federation, receipt.round, receipt.peer, receipt.sha256, receipt.receiver)
        name = self.name
        if says != (self.federation.digest, name.round, name.peer, name.sha256, self.card.name):
            raise PeerDataError("the server shows a receipt for something else", code="receipt")
        return receipt
