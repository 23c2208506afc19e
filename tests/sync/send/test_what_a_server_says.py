"""What a peer's server says of a push: a lie counts for nothing, and is not believed twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from hostile import until
from one_parcel import (
    ME,
    MEMBERS,
    PEER,
    SIZE,
    Looks,
    Receiver,
    content,
    in_vain,
    pushing,
    run,
)

from hsl_node.errors import LocalStateError, TransportError
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import Kind
from hsl_node.sync.send.deliver import Known, Parcel, Transfer, deliver
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.transport import BLOCK_BYTES, OperationFailed


@pytest.mark.parametrize(
    "lie",
    [
        {"signer": Identity(asyncssh.generate_private_key("ssh-ed25519"))},
        {"signer": MEMBERS.identities[ME]},
        {"federation": "f" * 64},
        {"round": 2},
        {"peer": "birch"},
        {"sha256": "e" * 64},
        {"receiver": "cedar"},
    ],
    ids=["stranger's key", "our own key", "federation", "round", "peer", "sha256", "receiver"],
)
def test_threat_18_a_receipt_that_is_not_the_peers_about_this_parcel_counts_for_nothing(
    lie: dict[str, Any], tmp_path: Path, looks: Looks
) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.verdict = lambda data: None
        receiver.put_receipt(**lie)
        task = pushing(receiver, parcel, transfer := Transfer(PEER))
        await until(lambda: task.done() or transfer.state == "waiting for receipt")
        await until(lambda: task.done() or len(looks) > 5)
        assert not task.done() and not any(looks)
        receiver.put_receipt()
        assert (await task).accepted

    run(tmp_path, scenario)


CLEARS_THE_SCREEN = "\x1b[2J\x1b[H\x1b]0;owned\x07accepted\nbirch is revoked"


@pytest.mark.parametrize(
    "lie",
    [{"code": CLEARS_THE_SCREEN}, {"code": "header"}, {"accepted": False}],
    ids=["a code that a terminal obeys", "accepted, with the code of a refusal", "refused, with the code accepted"],
)
def test_threat_20_a_receipt_whose_code_is_none_counts_for_nothing_and_status_says_so(
    lie: dict[str, Any], tmp_path: Path, looks: Looks
) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.verdict = lambda data: None
        receiver.put_receipt(**lie)
        task = pushing(receiver, parcel, transfer := Transfer(PEER))
        await until(lambda: task.done() or transfer.last_error)
        await in_vain(looks, 3)
        assert not task.done()
        assert transfer.last_error.startswith("receipt is malformed") and transfer.last_error.isprintable()
        receiver.put_receipt()
        assert (await task).accepted

    run(tmp_path, scenario)


def test_threat_18_a_huge_or_empty_receipt_counts_for_nothing(tmp_path: Path, looks: Looks) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.verdict = lambda data: None
        receiver.path("receipts", Kind.RECEIPT).write_bytes(b"{" * 50_000_000)
        task = pushing(receiver, parcel, transfer := Transfer(PEER))
        await until(lambda: transfer.state == "waiting for receipt")
        await in_vain(looks, 3)
        receiver.path("receipts", Kind.RECEIPT).write_bytes(b"")
        await in_vain(looks, 3)
        assert not task.done()
        receiver.put_receipt()
        assert (await task).accepted

    run(tmp_path, scenario)


class Wrapped:
    """A real connection whose server misbehaves in one way."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self.fired = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)


def test_a_rename_that_happened_but_was_reported_as_failure_is_a_success(tmp_path: Path) -> None:
    class LostAnswer(Wrapped):
        async def rename(self, old: str, new: str) -> None:
            await self._link.rename(old, new)
            self.fired += 1
            raise OperationFailed("Failure")

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.claims = False  # else the file may be gone before it is looked for
        card = receiver.card()
        async with connect(card, ME, MEMBERS.identities[ME]) as real:
            link = LostAnswer(real)
            task = asyncio.create_task(
                deliver(
                    link,
                    parcel,
                    card=card,
                    federation=MEMBERS.federation,
                    transfer=(transfer := Transfer(PEER)),
                    known=Known(),
                )
            )
            await until(lambda: transfer.state == "waiting for receipt" or task.done())
            assert link.fired == 2
            receiver.claims = True
            receiver.committed(ME)
            assert (await task).accepted

    run(tmp_path, scenario)


def test_threat_18_a_server_that_keeps_less_than_it_acknowledged_is_not_believed(tmp_path: Path) -> None:
    class ShortDisk(Wrapped):
        async def write(self, path: str, source: Any, offset: int, **options: Any) -> None:
            await self._link.write(path, content()[: 3 * BLOCK_BYTES], offset, **options)
            self.fired += 1

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        card = receiver.card()
        async with connect(card, ME, MEMBERS.identities[ME]) as real:
            link = ShortDisk(real)
            with pytest.raises(TransportError, match=f"kept {3 * BLOCK_BYTES} of the {SIZE} bytes"):
                await deliver(
                    link,
                    parcel,
                    card=card,
                    federation=MEMBERS.federation,
                    transfer=Transfer(PEER),
                    known=Known(),
                )
            assert link.fired == 1
        assert not receiver.path("inbox").exists()

    run(tmp_path, scenario)


def test_our_own_missing_checkpoint_is_our_error_and_not_retried(tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        assert parcel.data is not None
        parcel.data.unlink()
        with pytest.raises(LocalStateError):
            await pushing(receiver, parcel, transfer := Transfer(PEER))
        assert transfer.retries == 0

    run(tmp_path, scenario)
