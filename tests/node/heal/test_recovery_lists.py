"""What a node that lost its state believes of its peers' lists: whoever lies in one is named, and frames nobody.

The peers are the test, each behind a real SFTP server; of the daemon there is what asks.
Real daemons: test_recovery.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import asyncssh
import pytest
from federations import Members
from recovering import BIRCH, CEDAR, CUT, ME, Long, Site, by, run
from weights import weights

from hsl_node.errors import Equivocation, LocalStateError
from hsl_node.federation.identity import OFFER_NAMESPACE
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.host.durable import Step
from hsl_node.host.pace import Pace
from hsl_node.node.equivocation import Equivocations
from hsl_node.node.heal import recovery as recovery_module
from hsl_node.node.heal.counting import Held
from hsl_node.node.peers.fetch import HeldUp, Slow
from hsl_node.sync import evidence
from hsl_node.sync.offer import Offer
from hsl_node.sync.round import Phase, State, to_json
from hsl_node.weights.checkpoint_file import write_weights


@pytest.fixture
def site(members: Members, tmp_path: Path) -> Site:
    return Site(members, tmp_path / "state", Keyring.of(members.federation))


@pytest.mark.parametrize(
    ("gives", "why"),
    [(None, "does not give it"), (CUT, "its list could not be read")],
    ids=["nothing", "a broken link"],
)
def test_threat_12_a_signature_of_ours_that_is_listed_and_not_given_holds_us_up_and_names_who(
    site: Site, gives: bytes | None, why: str
) -> None:
    async def story() -> None:
        mine = site.manifest(ME, 4)
        site.givers[CEDAR].list(mine, by(site.members.identities[ME], mine), gives)
        with pytest.raises(HeldUp, match=why) as held_up:
            await site.asked()
        assert held_up.value.peer == CEDAR
        site.givers[CEDAR].documents = {
            m.document: by(site.members.identities[ME], mine) for m in site.givers[CEDAR].listed
        }
        assert [h.manifest for h in (await site.asked()).values()] == [mine]

    run(story)


def test_threat_20_a_list_of_rubbish_is_one_line_in_the_log(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        for round in range(1, 9):
            theirs = site.manifest(CEDAR, round)
            document = by(site.members.identities[CEDAR], theirs)
            site.givers[CEDAR].list(theirs, document, b"rubbish" if round % 2 else None)
        assert not await site.asked()

    run(story)
    (told,) = [r for r in caplog.records if r.getMessage() == "not taken"]
    assert (told.__dict__["peer"], told.__dict__["count"]) == (CEDAR, 8)


def test_while_a_long_list_is_read_the_status_says_whose_it_is(site: Site) -> None:
    async def story() -> None:
        seen = []
        for round in range(1, 4):
            theirs = site.manifest(CEDAR, round)
            site.givers[CEDAR].list(theirs, by(site.members.identities[CEDAR], theirs))
        read = site.givers[CEDAR].read

        def watched(name: str, connection: asyncssh.SSHServerConnection) -> bytes:
            seen.append(site.recovery.waiting.peers.get(CEDAR, ""))
            assert any(CEDAR in a["text"] for a in site.alarms.listing())
            return read(name, connection)

        site.givers[CEDAR].read = watched  # type: ignore[method-assign]
        await site.asked()
        assert seen == [f"its list is being read: {n} of 3" for n in range(3)]
        assert not site.recovery.waiting.peers
        (alarm,) = site.alarms.listing()
        assert "Still to answer: nobody" in alarm["text"] and "being read" not in alarm["text"]
        assert "--without" not in alarm["fix"], "whoever leaves out a peer that has answered loses what it knows"

    run(story)


def test_threat_05_while_a_file_is_fetched_the_status_says_from_whom_and_leaves_nobody_out(site: Site) -> None:
    async def story() -> None:
        seen = []

        async def get(sha256: Digest, target: Path, offers: object, tell: Callable[[Peer, Digest, int], None]) -> bool:
            tell(BIRCH, Digest("abc"), 2**20)
            seen.append((site.recovery.waiting.peers, site.alarms.listing()[0]))
            return True

        site.fetch.get = get  # type: ignore[assignment]
        site.recovery.waiting._file_bytes = 3 * 2**20
        assert await site.recovery._get(Digest("a" * 64), site.evidence / "file", {})
        ((waiting, alarm),) = seen
        assert waiting == {BIRCH: "it gives abc: 1.0 of 3.0 MiB"}
        assert "Now fetching from: birch (it gives abc: 1.0 of 3.0 MiB)" in alarm["text"]
        assert "--without" not in alarm["fix"]
        assert not site.recovery.waiting.peers and "fetching" not in site.alarms.listing()[0]["text"]

    run(story)


def test_threat_25_a_line_that_is_too_slow_for_a_turn_does_not_begin_a_recovery_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All who may have the file have answered; what a turn brought is kept."""
    monkeypatch.setattr(recovery_module, "RETRY", Pace(0.01, 0.02))

    async def story() -> None:
        turns = iter([Slow("birch: it took longer than 60 s"), Slow("again"), None])

        async def get(*arguments: object) -> bool:
            if slow := next(turns):
                raise slow
            return True

        site.fetch.get = get  # type: ignore[assignment]
        assert await site.recovery._get(Digest("a" * 64), site.evidence / "file", {})
        assert not list(turns)

    run(story)


def test_threat_12_our_own_manifest_in_another_spelling_is_no_second_signature(site: Site) -> None:
    async def story() -> None:
        mine = site.manifest(ME, 4)
        document = by(site.members.identities[ME], mine)
        line, _, armour = document.partition(b"\n")
        site.givers[BIRCH].list(mine, document)
        site.givers[CEDAR].list(mine, line + b"\n" + b"\n".join(armour.split(b"\n")) + b"\n\n")
        assert {h.manifest.digest for h in (await site.asked()).values()} == {mine.digest}
        assert not list(site.evidence.iterdir())

    run(story)


def test_threat_12_two_manifests_that_we_signed_are_found(site: Site) -> None:
    async def story() -> None:
        for giver, samples in ((BIRCH, 10), (CEDAR, 11)):
            mine = site.manifest(ME, 4, samples=samples)
            site.givers[giver].list(mine, by(site.members.identities[ME], mine))
        with pytest.raises(Equivocation):
            await site.asked()
        assert len(list(site.evidence.iterdir())) == 2

    run(story)


@pytest.mark.parametrize("shown", [True, False])
def test_threat_12_a_saved_state_is_gone_on_from_only_where_no_peer_shows_a_later_signature(
    site: Site, monkeypatch: pytest.MonkeyPatch, shown: bool
) -> None:
    """The saved one is whole: it is of before the set-back."""

    async def given(*_: object) -> bool:
        return True

    async def story() -> None:
        here, recovery = site.here, site.recovery
        monkeypatch.setattr(site.fetch, "get", given)
        base = write_weights(here.layout.fused(Round(2)), weights())
        saved = State(me=ME, peers=(ME, BIRCH, CEDAR), rounds=20, base=base, phase=Phase.TRAIN, round=Round(3))
        here.journal.save_state(to_json(saved))
        mine = site.manifest(ME, 4)
        if shown:
            site.givers[BIRCH].list(mine, by(site.members.identities[ME], mine))
        held = await site.asked()
        offers = {str(p): g.offer() for p, g in site.givers.items()}
        state, _ = await recovery._state(Digest("a" * 64), offers, held)
        assert (state.round, state.phase, state.base) == (
            (4, Phase.COLLECT, mine.base) if shown else (3, Phase.TRAIN, base)
        )

    run(story)


def test_threat_12_what_was_signed_from_other_initial_weights_is_not_gone_on_from(site: Site) -> None:
    async def story() -> None:
        mine = site.manifest(ME, 1)
        site.givers[BIRCH].list(mine, by(site.members.identities[ME], mine))
        with pytest.raises(
            LocalStateError, match="signed round 1 from weights bbbbbbbbbbbb, here they are aaaaaaaaaaaa"
        ):
            await site.recovery._state(Digest("a" * 64), {}, await site.asked())

    run(story)


def test_threat_12_who_sees_another_process_with_our_key_has_not_answered(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other process signs next is on no list yet."""
    monkeypatch.setattr(recovery_module, "RETRY", Pace(0.01, 0.02))
    answers = [True, True, False]

    async def answer(peer: Peer) -> tuple[Offer, bytes]:
        return site.givers[peer].offer().model_copy(update={"twice": answers.pop(0)}), b""

    async def story() -> None:
        monkeypatch.setattr(site.parts.links, "signed_offer_of", answer)
        offer = await site.recovery._answer_of(BIRCH)
        assert not offer.twice and not answers

    run(story)


def test_a_recovered_node_keeps_its_instance_so_that_the_same_bytes_are_the_same_manifest(site: Site) -> None:
    async def story() -> None:
        mine = site.manifest(ME, 4)
        site.givers[BIRCH].list(mine, by(site.members.identities[ME], mine))
        assert recovery_module._instance_of((await site.asked()).values(), ME) == mine.instance

    run(story)


def test_a_recovery_reads_of_a_long_journal_what_matters_now_and_what_the_answers_name(site: Site) -> None:
    """Of 40 rounds the last two, and round 3, which cedar lists and gives nobody; beside the event loop."""

    async def story() -> None:
        long = Long(site)
        for peer in (ME, CEDAR):
            site.givers[CEDAR].list(*long.held[peer, 3], gives=None)
        read: list[str] = []
        long.journal._db.set_trace_callback(read.append)
        held = await site.asked()
        assert not [query for query in read if "manifests" in query], "not in the event loop"
        assert {(h.peer, h.manifest.round) for h in held.values()} == {
            *((p, n) for p in (ME, BIRCH, CEDAR) for n in (39, 40)), (ME, 3), (CEDAR, 3)
        }  # fmt: skip

    run(story)


def test_threat_12_a_recovery_reads_all_that_we_signed_and_is_not_noted_as_signed(site: Site) -> None:
    """As `recover --documents` leaves it: it is signed for good when the recovery ends."""

    async def story() -> None:
        long = Long(site)
        long.journal._db.execute("DELETE FROM signed WHERE round IN (5, 6)")
        mine = [h.manifest.round for h in (await site.asked()).values() if h.peer == ME]
        assert sorted(mine) == [5, 6, 39, 40]

    run(story)


def test_threat_12_a_second_signature_of_a_round_long_ago_is_found(site: Site) -> None:
    async def story() -> None:
        Long(site)
        second = site.manifest(ME, 3, samples=99)
        site.givers[CEDAR].list(second, by(site.members.identities[ME], second))
        with pytest.raises(Equivocation):
            await site.asked()
        assert len(list(site.evidence.iterdir())) == 2

    run(story)


def test_threat_12_who_left_out_our_signature_when_we_recovered_is_named_with_proof_against_us(site: Site) -> None:
    """birch listed round 3 of ours; cedar signed that it held none newer than round 2; somebody shows 3."""
    for peer, rounds in ((BIRCH, (2, 3)), (CEDAR, (1, 2))):
        for round in rounds:
            mine = site.manifest(ME, round)
            site.givers[peer].list(mine, by(site.members.identities[ME], mine))
    key = site.members.identities
    lists = {p: key[p].sign(g.offer().content(), OFFER_NAMESPACE) for p, g in site.givers.items()}
    with site.journal.transaction(Step.RECOVERY_STATE):
        evidence.keep_told(site.journal, lists)
    assert evidence.told(site.journal, (BIRCH, CEDAR)) == lists
    equivocations = Equivocations(*site.parts.all, cast(Any, None))
    equivocations._name(ME, 3)
    (alarm,) = site.alarms.listing()
    assert "held nothing of it for that round: cedar (its newest was round 2)" in alarm["text"]
    assert "birch" not in alarm["text"] and "verify --export" in alarm["fix"]
    equivocations._name(CEDAR, 3)
    assert "held nothing" not in site.alarms.listing()[1]["text"], "what cedar signed twice is no matter of our loss"


def test_threat_12_who_breaks_off_what_it_lists_is_named_until_it_is_over(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is told that nothing is to be done, nor that it waits for nobody."""

    async def story() -> None:
        recovery, seen = site.recovery, []
        monkeypatch.setattr(recovery_module, "RETRY", Pace(0, 0))
        breaks = iter([True] * 5)

        async def answer_of(peer: Peer) -> Offer:
            recovery.waiting.go_on(peer)
            seen.append((recovery.waiting.peers, site.alarms.listing()[0]))
            return site.givers[peer].offer()

        async def state_of(*arguments: object) -> tuple[object, bool]:
            if next(breaks, False):
                raise HeldUp(CEDAR, "the link broke while it gave abababababab, which it lists")
            return SimpleNamespace(round=4, phase="collect", base="b" * 64, have={}, early={}), False

        for name, stub in (("_answer_of", answer_of), ("_state", state_of)):
            monkeypatch.setattr(recovery, name, stub)
        monkeypatch.setattr(recovery, "_write", lambda *arguments: None)
        async with site.givers[BIRCH].serving(), site.givers[CEDAR].serving():
            await recovery.run(Digest("a" * 64))
        again = seen[2:]  # both are asked each time
        assert len(again) == 10
        for waiting, alarm in again:
            assert "link broke" in waiting[CEDAR]
            assert "Still to answer: cedar (the link broke" in alarm["text"] and "--without NAME" in alarm["fix"]
        assert not site.alarms.listing()

    run(story)


def test_threat_12_a_peers_checkpoint_that_is_listed_and_never_given_does_not_hold_up_a_recovery(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """It is left to the running node, which waits for that peer by name."""

    async def story() -> None:
        listed = site.manifest(CEDAR, 4)
        held = {"x": Held(listed, by(site.members.identities[CEDAR], listed))}
        state = SimpleNamespace(round=4, have={}, early={}, inputs={})
        asked = []

        async def get(sha256: Digest, target: Path, *more: object, **named: object) -> bool:
            asked.append(sha256)
            raise HeldUp(CEDAR, "the link broke")

        site.fetch.get = get  # type: ignore[assignment]
        await site.recovery._bring(cast(Any, state), {}, held)
        assert asked == [listed.sha256]
        (told,) = [r.__dict__ for r in caplog.records if r.getMessage() == "left for later"]
        assert (told["peer"], told["round"]) == (CEDAR, 4)

    run(story)
