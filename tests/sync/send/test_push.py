"""Pushing a checkpoint: nothing is sent twice without need, no fault stops it, only the peer's signature ends it."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from hostile import until
from hypothesis import given
from hypothesis import strategies as st
from one_parcel import (
    CLIENTS,
    ME,
    MEMBERS,
    PEER,
    SIZE,
    SOON,
    Looks,
    Patient,
    Receiver,
    attempt,
    content,
    in_vain,
    parcel_of,
    pushing,
    receiving,
    run,
)
from ports import free_ports
from proxy import Proxy
from sender import Impatient

from hsl_node.errors import LocalStateError, TransportError
from hsl_node.federation.identity import Identity
from hsl_node.federation.names import Kind
from hsl_node.sync.send import deliver as deliver_module
from hsl_node.sync.send.deliver import Known, Parcel, Transfer, deliver
from hsl_node.sync.send.push import backoff_s, wait_for_peer
from hsl_node.sync.send.receipts import Answer, Receipts
from hsl_node.sync.wire import login as refused_module
from hsl_node.sync.wire.connect import connect
from hsl_node.sync.wire.login import RefusedKey
from hsl_node.sync.wire.transport import BLOCK_BYTES, Client, OperationFailed, Patience


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """What each look for a receipt has found."""
    found: Looks = []
    find = Receipts.find

    async def noted(self: Receipts, *, other_than: bytes | None = None) -> Answer | None:
        found.append(await find(self, other_than=other_than))
        return found[-1]

    monkeypatch.setattr(Receipts, "find", noted)
    return found


# ---------------------------------------------------------------- one attempt


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
    monkeypatch.setattr(deliver_module, "RECEIPT_CAP_S", 0.05)

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
    monkeypatch.setattr(deliver_module, "RECEIPT_CAP_S", 0.05)

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


# ---------------------------------------------------------------- what the peer's server says


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
        await in_vain(looks, 3)
        assert not task.done()
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


# ---------------------------------------------------------------- broken links


@pytest.mark.parametrize("client", CLIENTS)
def test_threat_25_a_link_that_breaks_again_and_again_delays_but_does_not_stop_it(
    client: Client, tmp_path: Path
) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        async with Proxy(receiver.port) as net:
            net.cut_after = 3 * BLOCK_BYTES
            task = pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port, client=client)
            for cut in range(1, 4):
                await until(lambda n=cut: net.cuts == n)
                if cut < 3:
                    net.cut_after = net.bytes_up + 6 * BLOCK_BYTES
            assert (await task).accepted
            assert receiver.took == [content()]
            assert transfer.retries == net.cuts == 3
            assert transfer.resent_bytes < 3 * SOON

    run(tmp_path, scenario)


def test_threat_25_an_outage_is_waited_out_and_the_transfer_goes_on_where_it_was(tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        async with Proxy(receiver.port) as net:
            net.bits_per_s = 16e6
            task = pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port)
            await until(lambda: transfer.sent > 6 * BLOCK_BYTES)
            assert transfer.state == "sending"
            assert transfer.rate_bytes_per_s > 0
            await net.down()
            await until(lambda: transfer.retries >= 5)
            assert "cannot be reached" in transfer.last_error
            await net.up()
            assert (await task).accepted
            assert transfer.resumed_from > 2 * BLOCK_BYTES
            assert transfer.resent_bytes < SOON
        assert receiver.took == [content()]

    run(tmp_path, scenario)


def test_threat_25_a_black_hole_is_left_and_the_transfer_goes_on(tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        async with Proxy(receiver.port) as net:
            net.bits_per_s = 16e6
            patience = Patience(answer_s=1, slowest_bytes_per_s=1024**2)
            task = pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port, patience=patience)
            await until(lambda: transfer.sent > 4 * BLOCK_BYTES)
            before = transfer.retries  # a machine that is slow enough leaves by itself
            net.hole = True
            await until(lambda: transfer.retries > before)
            assert net.swallowed and "nothing moved" in transfer.last_error
            net.hole = False
            assert (await task).accepted
            assert transfer.resent_bytes < SOON * transfer.retries

    run(tmp_path, scenario)


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_threat_25_20_mb_at_4_mbit_per_s_with_the_link_gone_for_three_minutes(client: Client, tmp_path: Path) -> None:
    size = 20_000_000

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        async with Proxy(receiver.port) as net:
            net.bits_per_s = 4e6
            task = pushing(
                receiver, parcel, transfer := Transfer(PEER), port=net.port, client=client, rng=random.Random(1)
            )
            await until(lambda: transfer.sent > size // 2)
            net.hole = True
            await asyncio.sleep(180)
            net.hole = False
            assert (await task).accepted
            assert transfer.retries >= 1
            assert transfer.resent_bytes < SOON
        assert receiver.took == [content(size=size)]

    run(tmp_path, scenario, content(size=size))


# ---------------------------------------------------------------- when to try again


@given(st.integers(1, 10_000), st.integers(0, 2**32))
def test_the_wait_grows_to_a_minute_and_is_drawn_over_its_whole_range(failures: int, seed: int) -> None:
    wait = backoff_s(failures, random.Random(seed))
    assert 0 <= wait <= min(60, 2.0 ** min(failures - 1, 6))
    assert backoff_s(failures, Patient()) == min(60, 2.0 ** min(failures - 1, 6))


def test_a_peer_that_shows_itself_is_tried_at_once(tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        (port,) = free_ports(1)
        wake = asyncio.Event()
        task = pushing(receiver, parcel, transfer := Transfer(PEER), port=port, wake=wake, rng=Patient())
        for _ in range(4):  # 1 s, 2 s, 4 s, 8 s: each wait is cut short
            before, since = transfer.retries, time.monotonic()
            await until(lambda n=before: transfer.retries > n)
            wake.set()
        await until(lambda: transfer.retries >= 5)
        assert transfer.state == "waiting to retry"
        assert transfer.next_try is not None and transfer.next_try - since > 8  # of 16 s
        net = Proxy(receiver.port)
        net.port = port
        async with net:
            wake.set()
            assert (await task).accepted
            assert transfer.retries == 5

    run(tmp_path, scenario)


@pytest.mark.parametrize("client", CLIENTS)
def test_after_a_refused_key_it_waits_five_minutes_and_a_peer_that_calls_ends_that_once(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refused_module, "CALLED_WAIT_S", 0.01)

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        refused = RefusedKey(PEER, Impatient())
        stranger = Identity(asyncssh.generate_private_key("ssh-ed25519"))
        async with Proxy(receiver.port) as net:
            task = pushing(
                receiver,
                parcel,
                transfer := Transfer(PEER),
                port=net.port,
                refused=refused,
                client=client,
                identity=stranger,
            )
            for tries in (1, 2):
                since = time.monotonic()
                await until(lambda n=tries: (transfer.retries, transfer.state) == (n, "waiting to retry"))
                assert transfer.next_try is not None
                assert transfer.next_try - since > 300
                assert stranger.fingerprint in transfer.last_error
                refused.called()
            assert refused.left_s > 300, "the second call has changed nothing"
            assert net.connections == 2
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(tmp_path, scenario)


def test_a_peer_that_calls_does_not_shorten_a_wait_below_what_it_must_be() -> None:
    async def main() -> None:
        wake = asyncio.Event()
        wake.set()
        since = time.monotonic()
        await wait_for_peer(300, wake, at_least=0.1)
        assert time.monotonic() - since > 0.09

    asyncio.run(main())


class OnOurClock(RefusedKey):
    """The peer connects to us in every wait."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(PEER, rng, lambda: self.clock)
        self.clock = 0.0
        self.tries: list[float] = []

    async def over(self) -> None:
        self.tries.append(self.clock)
        self.called()
        self.clock += self.left_s


@pytest.mark.parametrize("rng", [Impatient(), Patient()], ids=["shortest waits", "longest waits"])
def test_threat_30_a_refused_key_is_offered_at_most_twelve_times_an_hour_even_if_the_peer_calls_all_the_time(
    rng: random.Random, tmp_path: Path
) -> None:
    """Real logins that a real server refuses; only the waiting is done on a clock of our own."""

    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        refused = OnOurClock(rng)
        async with Proxy(receiver.port) as net:
            stranger = Identity(asyncssh.generate_private_key("ssh-ed25519"))
            task = pushing(receiver, parcel, Transfer(PEER), port=net.port, identity=stranger, refused=refused)
            await until(lambda: refused.clock > 3 * 3600)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert net.connections >= len(refused.tries)  # none of them was pretended
        waits = [b - a for a, b in itertools.pairwise(refused.tries)]
        assert waits[0] < 300  # woken, once
        assert min(waits[1:]) >= 300
        assert max(sum(start <= t < start + 3600 for t in refused.tries) for start in refused.tries) <= 12

    run(tmp_path, scenario)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("state", ["sending", "waiting for receipt", "waiting to retry"])
def test_a_cancelled_push_leaves_nothing_behind(client: Client, state: str, tmp_path: Path) -> None:
    async def scenario(receiver: Receiver, parcel: Parcel) -> None:
        receiver.verdict = lambda data: None
        async with Proxy(receiver.port) as net:
            net.bits_per_s = 8e6 if state == "sending" else None
            if state == "waiting to retry":
                await net.down()
            task = pushing(receiver, parcel, transfer := Transfer(PEER), port=net.port, client=client, rng=Patient())
            await until(lambda: transfer.state == state)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: net.live == 0)
            assert not [t for t in threading.enumerate() if not t.name.startswith(("asyncio_", "MainThread", "inbox"))]

    run(tmp_path, scenario)
