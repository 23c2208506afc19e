"""One parcel is pushed: nothing is sent twice without need, and only the peer's signature ends it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hostile import until
from one_parcel import (
    CLIENTS,
    ME,
    PEER,
    SIZE,
    SOON,
    Looks,
    Receiver,
    attempt,
    content,
    in_vain,
    parcel_of,
    pushing,
    receiving,
    run,
)
from proxy import Proxy

from hsl_node.federation.names import Kind
from hsl_node.host.pace import Pace
from hsl_node.sync.send import deliver as deliver_module
from hsl_node.sync.send.deliver import Known, Parcel, Transfer
from hsl_node.sync.wire.transport import BLOCK_BYTES, Client


@pytest.mark.parametrize("client", CLIENTS)
def test_data_and_manifest_arrive_and_the_signed_receipt_ends_it(client: Client, tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        transfer = Transfer(PEER)
        receipt = await pushing(receiver, parcel, transfer, client=client)
        assert receipt.accepted
        assert receiver.took == [content()]
        assert (transfer.state, transfer.sent, transfer.total, transfer.round) == ("done", SIZE, SIZE, 1)
        assert (transfer.resent_bytes, transfer.retries, transfer.last_error) == (0, 0, "")

    run(tmp_path, scenario)


@pytest.mark.parametrize("client", CLIENTS)
def test_threat_18_a_part_with_other_bytes_before_the_resume_point_is_begun_anew(
    client: Client, tmp_path: Path
) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.path("parts").write_bytes(content(seed=2)[: 8 * BLOCK_BYTES])
        transfer = Transfer(PEER)
        receipt = await attempt(receiver, parcel, transfer, Known(), client=client)
        assert receipt.accepted
        assert receiver.took == [content()]  # the receiver never saw the wrong file
        assert transfer.resumed_from == 0

    run(tmp_path, scenario)


def test_threat_18_other_bytes_that_only_the_hash_can_find_cost_one_more_transfer(tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        torn = bytearray(content()[: 8 * BLOCK_BYTES])
        torn[17] ^= 1
        receiver.path("parts").write_bytes(torn)
        transfer = Transfer(PEER)
        receipt = await pushing(receiver, parcel, transfer)
        assert receipt.accepted
        assert [data == content() for data in receiver.took] == [False, True]
        assert transfer.retries == 0  # over the same connection

    run(tmp_path, scenario)


def test_a_file_that_arrives_torn_every_time_is_sent_anew_twice_and_then_given_back(tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.verdict = lambda data: (False, "sha256" if len(receiver.took) % 2 else "size")
        receipt = await pushing(receiver, parcel, transfer := Transfer(PEER))
        assert not receipt.accepted
        assert len(receiver.took) == 1 + deliver_module.ANEW_MAX
        assert transfer.state == "refused"

    run(tmp_path, scenario)


@pytest.mark.parametrize("code", ["header", "nonfinite", "federation", "signature"])
def test_a_refusal_that_sending_again_cannot_mend_is_given_back_at_once(code: str, tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.verdict = lambda data: (False, code)
        receipt = await pushing(receiver, parcel, Transfer(PEER))
        assert (receipt.accepted, receipt.code) == (False, code)
        assert len(receiver.took) == 1

    run(tmp_path, scenario)


def test_a_refusal_from_before_is_not_the_answer_to_a_new_delivery(tmp_path: Path) -> None:
    """The operator mended what was wrong and started the node again: the old receipt must not stop it."""

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.answer(False, "federation")
        receipt = await pushing(receiver, parcel, Transfer(PEER))
        assert receipt.accepted

    run(tmp_path, scenario)


def test_the_same_refusal_again_is_the_answer_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures are deterministic: the second refusal has the same bytes as the first."""
    monkeypatch.setattr(deliver_module, "OLD_REFUSAL_S", 0.3)

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.answer(False, "federation")
        receiver.verdict = lambda data: (False, "federation")
        receipt = await pushing(receiver, parcel, Transfer(PEER))
        assert not receipt.accepted
        assert len(receiver.took) == 1

    run(tmp_path, scenario)


def test_a_peer_that_is_a_round_behind_keeps_the_files_and_accepts_later(tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.claims = False
        async with Proxy(receiver.port) as net:
            task = pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port)
            await until(lambda: transfer.state == "waiting for receipt")
            waits = (manifest := receiver.path("inbox", Kind.MANIFEST)).read_bytes()
            receiver.answer(False, "round")
            manifest.write_bytes(waits)  # as earlier versions left it, which answered before the round was theirs
            await until(lambda: "not yet in round" in transfer.last_error)
            assert not task.done()
            receiver.claims = True
            receiver.committed(ME)
            assert (await task).accepted
            assert net.bytes_up < SIZE + SOON

    run(tmp_path, scenario)


def test_data_that_lies_in_the_inbox_is_not_sent_again(tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.path("inbox").write_bytes(content())
        async with Proxy(receiver.port) as net:
            receipt = await pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port)
            assert receipt.accepted
            assert net.bytes_up < 100_000
            assert transfer.resent_bytes == 0

    run(tmp_path, scenario)


def test_after_a_restart_a_receipt_that_is_there_already_ends_it(tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        await pushing(receiver, parcel, Transfer(PEER))
        async with Proxy(receiver.port) as net:
            receipt = await pushing(receiver, parcel, Transfer(PEER), port=net.port)
            assert receipt.accepted
            assert net.bytes_up < 100_000
        assert len(receiver.took) == 1

    run(tmp_path, scenario)


def test_a_receiver_that_took_the_data_and_still_checks_it_gets_nothing_again_after_our_restart(
    tmp_path: Path,
) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.verdict = lambda data: None  # still hashing
        first = pushing(receiver, parcel, transfer := Transfer(PEER))
        await until(lambda: receiver.took and transfer.state == "waiting for receipt")
        first.cancel()
        async with Proxy(receiver.port) as net:
            second = pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port)
            await until(lambda: transfer.state == "waiting for receipt")
            receiver.answer(True, "accepted")
            assert (await second).accepted
            assert net.bytes_up < 100_000
        assert len(receiver.took) == 1

    run(tmp_path, scenario)


@pytest.mark.parametrize("client", CLIENTS)
def test_an_answer_that_comes_after_the_connection_ended_is_found(client: Client, tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.verdict = lambda data: None
        async with Proxy(receiver.port) as net:
            task = pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port, client=client)
            await until(lambda: transfer.state == "waiting for receipt")
            await net.down()
            await until(lambda: transfer.retries >= 2)
            receiver.answer(True, "accepted")
            await net.up()
            assert (await task).accepted
            assert net.bytes_up < SIZE + SOON
        assert len(receiver.took) == 1

    run(tmp_path, scenario)


def test_a_peer_that_took_the_files_and_lost_them_gets_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliver_module, "SILENCE_MAX_S", 0.3)
    monkeypatch.setattr(deliver_module, "LOST", Pace(0.6, 1.8))

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.verdict = lambda data: None if len(receiver.took) == 1 else (True, "accepted")
        receipt = await pushing(receiver, parcel, transfer := Transfer(PEER))
        assert receipt.accepted
        assert len(receiver.took) == 2
        assert transfer.retries == 1

    run(tmp_path, scenario)


def test_a_peer_whose_receipt_was_lost_is_asked_with_the_manifest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliver_module, "SILENCE_MAX_S", 0.1)

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        asked = []

        def judge(data: bytes) -> tuple[bool, str] | None:
            asked.append(len(receiver.took))
            if len(asked) > 1:
                return True, "accepted"
            receiver.path("inbox", Kind.MANIFEST).unlink()  # answered, but the receipt is gone
            return None

        receiver.verdict = judge
        async with Proxy(receiver.port) as net:
            receipt = await pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port)
            assert receipt.accepted
            assert asked == [1, 1]
            assert net.bytes_up < SIZE + SOON
            assert (transfer.retries, transfer.resent_bytes) == (0, 0)

    run(tmp_path, scenario)


def test_a_peer_that_takes_everything_and_never_answers_gets_the_data_ever_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in silences of ten minutes: data again after 2, then 4, then every 6; the manifest in between."""
    monkeypatch.setattr(deliver_module, "SILENCE_MAX_S", 0.05)
    monkeypatch.setattr(deliver_module, "LOST", Pace(0.1, 0.3))
    monkeypatch.setattr(deliver_module, "RECEIPT", Pace(0.05, 0.05))

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        story = []

        def judge(data: bytes) -> None:
            story.append("data" if len(receiver.took) > story.count("data") else "manifest")
            receiver.path("inbox", Kind.MANIFEST).unlink()

        receiver.verdict = judge
        task = pushing(receiver, parcel, transfer := Transfer(PEER))
        await until(lambda: story.count("data") == 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        asked = [1, 3, 5, 5]
        assert story == [e for n in asked for e in ["data"] + n * ["manifest"]] + ["data"]
        assert (transfer.retries, transfer.resent_bytes) == (4, 4 * SIZE)

    run(tmp_path, scenario)


def test_files_that_nobody_takes_are_waited_for_and_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: Looks
) -> None:
    """Behind an OpenSSH account the peer's daemon may be down for a week-end."""
    monkeypatch.setattr(deliver_module, "SILENCE_MAX_S", 0.1)
    monkeypatch.setattr(deliver_module, "RECEIPT", Pace(0.05, 0.05))

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.claims = False
        async with Proxy(receiver.port) as net:
            task = pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port)
            await until(lambda: transfer.state == "waiting for receipt")
            await in_vain(looks, 20)  # at least six silences
            assert (transfer.retries, task.done()) == (0, False)
            receiver.claims = True
            receiver.committed(ME)
            assert (await task).accepted
            assert net.bytes_up < SIZE + SOON

    run(tmp_path, scenario)


def test_a_manifest_without_data_is_delivered_alone(tmp_path: Path) -> None:
    async def main() -> None:
        with_data, manifest = parcel_of(tmp_path, b"")
        parcel = Parcel(with_data.name, None, 0, with_data.manifest)
        async with receiving(tmp_path, parcel, manifest) as receiver:
            receipt = await pushing(receiver, parcel, Transfer(PEER))
            assert receipt.accepted
            assert receiver.took == []

    asyncio.run(main())
