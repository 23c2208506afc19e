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


class Receipts:
    """Looks for the receipt about `name` (of the data) by the peer of `card`, signed with one of `keys`."""

    def __init__(
        self, link: Transport, name: FileName, card: PeerCard, federation: Federation, keys: Sequence[str]
    ) -> None:
        self._link = link
        self._name = name
        self._card = card
        self._federation = federation
        self._keys = keys
        self._path = f"{RECEIPTS}/{name.of(Kind.RECEIPT)}"
        self.problem = ""  # why the document that lies there does not count

    async def find(self, *, other_than: bytes | None = None) -> Answer | None:
        """The receipt, if one is there that verifies and is not `other_than`."""
        size = await self._link.size(self._path)
        if size is None:
            return None
        if not 0 < size <= RECEIPT_MAX_BYTES:
            self.problem = f"the server shows a receipt of {size} bytes"
            return None
        document = await self._link.read(self._path, 0, RECEIPT_MAX_BYTES)
        if document == other_than:
            return None
        try:
            return Answer(self._check(document), document)
        except PeerDataError as exc:
            self.problem = exc.message
            return None

    def _check(self, document: bytes) -> Receipt:
        """Raises: PeerDataError: not signed by this peer, or about something else."""
        receipt = parse_receipt(verify(document, self._keys, RECEIPT_NAMESPACE))
        says = (receipt.federation, receipt.round, receipt.peer, receipt.sha256, receipt.receiver)
        name = self._name
        if says != (self._federation.digest, name.round, name.peer, name.sha256, self._card.name):
            raise PeerDataError("the server shows a receipt for something else", code="receipt")
        return receipt
