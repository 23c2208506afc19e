"""What a node that lost its state believes of its peers' lists: whoever lies in one is named, and frames nobody.

The peers are the test, each behind a real SFTP server; of the daemon there is what asks.
Real daemons: test_recovery.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import asyncssh
import pytest
from claims import START
from federations import FederationOf, Members
from hostile import AnyKey
from ports import free_ports
from weights import weights

from hsl_node.errors import Equivocation, LocalStateError
from hsl_node.federation.identity import MANIFEST_NAMESPACE, OFFER_NAMESPACE, Identity
from hsl_node.federation.keyring import Accepted, Keyring, KeyringFile, sign_update
from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.host.durable import Step
from hsl_node.node.alarms import Alarms
from hsl_node.node.equivocation import Proofs
from hsl_node.node.heal import recovery as recovery_module
from hsl_node.node.heal.counting import Held
from hsl_node.node.heal.mark import Mark
from hsl_node.node.heal.recovery import LOOK_AGAIN, Recovery
from hsl_node.node.peers.links import Asking, HeldUp
from hsl_node.sync import evidence
from hsl_node.sync.manifest import Manifest
from hsl_node.sync.offer import Listed, Offer
from hsl_node.sync.round import Phase, State, to_json
from hsl_node.sync.send.deliver import Transfer
from hsl_node.sync.store.layout import Layout
from hsl_node.sync.store.store import Store
from hsl_node.sync.wire.login import RefusedKey
from hsl_node.weights.checkpoint_file import write_weights

ME, BIRCH, CEDAR = Peer("ash"), Peer("birch"), Peer("cedar")
CUT = b"cut the link here"


class Giver:
    """A peer's inbox, of which only offer/ is read: lists what it is told to, and gives it, or not."""

    def __init__(self, members: Members, name: Peer, round: int) -> None:
        self.members, self.name, self.round = members, name, round
        self.listed: list[Listed] = []
        self.documents: dict[str, bytes] = {}

    def list(self, manifest: Manifest, document: bytes, gives: bytes | None = b"") -> None:
        """`gives`: something else instead of the document; None: nothing."""
        sha256 = hashlib.sha256(document).hexdigest()
        self.listed.append(Listed(peer=manifest.peer, round=manifest.round, sha256=manifest.sha256, document=sha256))
        if gives is not None:
            self.documents[sha256] = gives or document

    def offer(self, nonce: str = "0" * 16) -> Offer:
        return Offer(
            federation=self.members.federation.digest, peer=self.name, asker=ME, nonce=nonce, recovering=False,
            round=self.round, phase="collect", twice=False, manifests=self.listed, files=[],
        )  # fmt: skip

    def read(self, name: str, connection: asyncssh.SSHServerConnection) -> bytes:
        if name.endswith(".state"):
            return self.members.identities[self.name].sign(self.offer(name[:16]).content(), OFFER_NAMESPACE)
        content = self.documents.get(name)
        if content is None:
            raise asyncssh.SFTPNoSuchFile("not on the list")
        if content == CUT:
            connection.abort()
        return content

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        giver = self

        class Files(asyncssh.SFTPServer):
            def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> object:
                return [giver.read(path.decode().rpartition("/")[2], self.channel.get_connection())]

            def read(self, file: Any, offset: int, size: int) -> bytes:
                return bytes(file[0][offset : offset + size])

            def close(self, file: object) -> None: ...

        port = int(self.members.federation.get(self.name).address.rpartition(":")[2])
        key = self.members.identities[self.name].key
        server = await asyncssh.listen(
            "127.0.0.1", port, server_factory=AnyKey, server_host_keys=[key], sftp_factory=Files, config=None
        )
        try:
            yield
        finally:
            server.close()
            await server.wait_closed()


class Site:
    """ash has lost its state; birch and cedar are in round 4."""

    def __init__(self, members: Members, folder: Path, keyring: Keyring) -> None:
        self.members = members
        self.givers = {p: Giver(members, p, 4) for p in (BIRCH, CEDAR)}
        layout = Layout(folder)
        layout.make()
        self.evidence = layout.state / "evidence"
        self.alarms = Alarms()
        store = Store(layout)
        node: Any = SimpleNamespace(
            me=ME, others=(BIRCH, CEDAR), federation=members.federation, identity=members.identities[ME],
            journal=store.journal, alarms=self.alarms, config=SimpleNamespace(client="asyncssh"),
            keyring=keyring, layout=layout, store=store,
            refused={p: RefusedKey(p, random.Random()) for p in (BIRCH, CEDAR)},
            delivery=SimpleNamespace(transfers={p: Transfer(p) for p in (BIRCH, CEDAR)}),
        )  # fmt: skip
        node.asking = Asking(node)
        self.recovery = Recovery(cast(Any, node))

    def manifest(self, peer: Peer, round: int, inputs: Mapping[str, str] = {}, samples: int = 10) -> Manifest:
        return Manifest(
            federation=self.members.federation.digest, round=round, peer=peer, sha256=f"{round:064}", bytes=1000,
            base="b" * 64, inputs=dict(inputs), samples=samples, auc=0.5, plateau=False, halted=False, anchor=None,
            schema="e" * 64, instance="f" * 16, software="test",
        )  # fmt: skip

    async def asked(self) -> Mapping[str, Any]:
        offers = {str(p): g.offer() for p, g in self.givers.items()}
        async with self.givers[BIRCH].serving(), self.givers[CEDAR].serving():
            return await self.recovery.manifests(offers)


@pytest.fixture
def members(federation_of: FederationOf) -> Members:
    ports = free_ports(2)
    return federation_of(3, addresses={p: f"127.0.0.1:{n}" for p, n in zip((BIRCH, CEDAR), ports, strict=True)})


@pytest.fixture
def site(members: Members, tmp_path: Path) -> Site:
    return Site(members, tmp_path / "state", Keyring.of(members.federation))


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(120):
            await story()

    asyncio.run(main())


def by(identity: Identity, manifest: Manifest) -> bytes:
    return identity.sign(manifest.content(), MANIFEST_NAMESPACE)


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
            seen.append(site.recovery.waiting.get(CEDAR, ""))
            assert any(CEDAR in a["text"] for a in site.alarms.listing())
            return read(name, connection)

        site.givers[CEDAR].read = watched  # type: ignore[method-assign]
        await site.asked()
        assert seen == [f"its list is being read: {n} of 3" for n in range(3)]
        assert not site.recovery.waiting
        (alarm,) = site.alarms.listing()
        assert "Still to answer: nobody" in alarm["text"] and "being read" not in alarm["text"]
        assert "--without" not in alarm["fix"], "whoever leaves out a peer that has answered loses what it knows"

    run(story)


def test_threat_05_while_a_file_is_fetched_the_status_says_from_whom_and_leaves_nobody_out(site: Site) -> None:
    async def story() -> None:
        seen = []

        async def get(sha256: Digest, target: Path, offers: object, tell: Callable[[Peer, str], None]) -> bool:
            tell(BIRCH, "it gives abc: 1.0 of 3.0 MiB")
            seen.append((site.recovery.waiting, site.alarms.listing()[0]))
            return True

        site.recovery._node.asking.get = get  # type: ignore[assignment]
        assert await site.recovery._get(Digest("a" * 64), site.evidence / "file", {})
        ((waiting, alarm),) = seen
        assert waiting == {BIRCH: "it gives abc: 1.0 of 3.0 MiB"}
        assert "Now fetching from: birch (it gives abc: 1.0 of 3.0 MiB)" in alarm["text"]
        assert "--without" not in alarm["fix"]
        assert not site.recovery.waiting and "fetching" not in site.alarms.listing()[0]["text"]

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
        node, recovery = site.recovery._node, site.recovery
        monkeypatch.setattr(node.asking, "get", given)
        base = write_weights(node.layout.fused(Round(2)), weights())
        saved = State(me=ME, peers=(ME, BIRCH, CEDAR), rounds=20, base=base, phase=Phase.TRAIN, round=Round(3))
        node.journal.save_state(to_json(saved))
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
    monkeypatch.setattr(recovery_module, "RETRY_S", (0.01, 0.02))
    answers = [True, True, False]

    async def answer(peer: Peer) -> tuple[Offer, bytes]:
        return site.givers[peer].offer().model_copy(update={"twice": answers.pop(0)}), b""

    async def story() -> None:
        node: Any = site.recovery._node
        node.delivery.awaited = lambda peer: asyncio.Event()
        monkeypatch.setattr(node.asking, "signed_offer_of", answer)
        offer = await site.recovery._answer_of(BIRCH)
        assert not offer.twice and not answers

    run(story)


def test_a_recovered_node_keeps_its_instance_so_that_the_same_bytes_are_the_same_manifest(site: Site) -> None:
    async def story() -> None:
        mine = site.manifest(ME, 4)
        site.givers[BIRCH].list(mine, by(site.members.identities[ME], mine))
        assert recovery_module._instance_of((await site.asked()).values(), ME) == mine.instance

    run(story)


class Long:
    """A journal of 40 rounds, as of a backup: what ash, birch and cedar signed."""

    def __init__(self, site: Site) -> None:
        self.journal, self.held = site.recovery._node.journal, {}
        for round in range(1, 41):
            for peer in (ME, BIRCH, CEDAR):
                before = {p: self.held[p, round - 1][0].digest for p in (ME, BIRCH, CEDAR)} if round > 1 else {}
                manifest = site.manifest(peer, round, before)
                self.held[peer, round] = manifest, by(site.members.identities[peer], manifest)
        with self.journal.transaction():
            for manifest, document in self.held.values():
                self.record(manifest, document)

    def record(self, manifest: Manifest, document: bytes) -> None:
        peer = Peer(manifest.peer)
        self.journal.record_manifest(manifest.round, peer, manifest.sha256, document, manifest.content())
        if peer == ME:
            self.journal.record_signed(manifest.round, Digest(manifest.sha256), document)


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
    node = cast(Any, site.recovery._node)
    for peer, rounds in ((BIRCH, (2, 3)), (CEDAR, (1, 2))):
        for round in rounds:
            mine = site.manifest(ME, round)
            site.givers[peer].list(mine, by(site.members.identities[ME], mine))
    key = site.members.identities
    lists = {p: key[p].sign(g.offer().content(), OFFER_NAMESPACE) for p, g in site.givers.items()}
    with node.journal.transaction(Step.RECOVERY_STATE):
        evidence.keep_told(node.journal, lists)
    assert evidence.told(node.journal, (BIRCH, CEDAR)) == lists
    Proofs(node)._name(ME, 3)
    (alarm,) = site.alarms.listing()
    assert "held nothing of it for that round: cedar (its newest was round 2)" in alarm["text"]
    assert "birch" not in alarm["text"] and "verify --export" in alarm["fix"]
    Proofs(node)._name(CEDAR, 3)
    assert "held nothing" not in site.alarms.listing()[1]["text"], "what cedar signed twice is no matter of our loss"


# ------------------------------------------------------------------ a key that was replaced, in the wrong hands


class Replaced:
    """ash has replaced its key, in round 3, and lost its disk later. cedar has found the old one."""

    def __init__(self, members: Members, folder: Path) -> None:
        self.old = members.identities[ME]
        self.new = Identity(asyncssh.generate_private_key("ssh-ed25519"))
        ring = Keyring.of(members.federation)
        update = sign_update(ring, ME, self.old, self.new.public)
        self.ring = Keyring.of(members.federation, KeyringFile(update=(Accepted(document=update, finished=True),)))
        self.site = Site(members, folder, self.ring)
        self.before = {p: self.site.manifest(p, 3) for p in (ME, BIRCH, CEDAR)}
        for peer in (BIRCH, CEDAR):
            self.site.givers[peer].list(self.before[peer], by(members.identities[peer], self.before[peer]))

    def inputs(self) -> dict[str, str]:
        return {p: m.digest for p, m in self.before.items()}


def old_keys(site: Site) -> list[dict[str, Any]]:
    return [a for a in site.alarms.listing() if a["code"].startswith("old key")]


@pytest.fixture
def replaced(members: Members, tmp_path: Path) -> Replaced:
    return Replaced(members, tmp_path / "state")


def test_threat_17_what_was_signed_before_the_key_was_replaced_still_counts(replaced: Replaced) -> None:
    async def story() -> None:
        mine = replaced.site.manifest(ME, 4, replaced.inputs())
        replaced.site.givers[BIRCH].list(mine, by(replaced.old, mine))
        assert mine in [h.manifest for h in (await replaced.site.asked()).values()]

    run(story)


def test_threat_17_a_replaced_key_says_nothing_of_a_round_that_the_new_one_signed(replaced: Replaced) -> None:
    async def story() -> None:
        mine = replaced.site.manifest(ME, 4, replaced.inputs())
        forged = replaced.site.manifest(ME, 4, replaced.inputs(), samples=99)
        replaced.site.givers[BIRCH].list(mine, by(replaced.new, mine))
        replaced.site.givers[CEDAR].list(forged, by(replaced.old, forged))
        found = [h.manifest for h in (await replaced.site.asked()).values()]
        assert mine in found and forged not in found
        assert not list(replaced.site.evidence.iterdir())

    run(story)


def test_threat_17_a_replaced_keys_signature_of_long_ago_fits_what_the_journal_has_of_the_others(
    replaced: Replaced,
) -> None:
    """Nobody lists what the others signed before it: they list their last rounds."""

    async def story() -> None:
        site = replaced.site
        long = Long(site)
        mine, _ = long.held[ME, 21]
        document = by(replaced.old, mine)
        for table in ("manifests WHERE round = 21 AND peer = 'ash'", "signed WHERE round = 21"):
            long.journal._db.execute(f"DELETE FROM {table}")
        for giver in site.givers.values():
            giver.listed = []
        site.givers[BIRCH].list(mine, document)
        held = await site.asked()
        assert {h.manifest.round for h in held.values()} == {21, 39, 40}

    run(story)


def test_threat_17_a_round_forged_with_a_replaced_key_is_not_gone_on_from(replaced: Replaced) -> None:
    """It names manifests of a round before, as birch never signed them. Loud, with both names."""

    async def story() -> None:
        forged = replaced.site.manifest(ME, 6, {p: "9" * 64 for p in (ME, BIRCH, CEDAR)})
        replaced.site.givers[CEDAR].list(forged, by(replaced.old, forged))
        with pytest.raises(
            HeldUp, match="which cedar keeps and which was made with a key that has been replaced"
        ) as up:
            await replaced.site.asked()
        assert up.value.peer == BIRCH

    run(story)


def test_threat_17_a_round_to_come_is_not_gone_on_from_however_well_it_was_forged_with_a_replaced_key(
    replaced: Replaced,
) -> None:
    """Every member knows the digests that it has to name. But the new key has signed a round before it."""

    async def story() -> None:
        site = replaced.site
        now = {p: site.manifest(p, 4, replaced.inputs()) for p in (ME, BIRCH, CEDAR)}
        forged = site.manifest(ME, 5, {p: m.digest for p, m in now.items()})
        for peer, giver in site.givers.items():
            giver.list(now[peer], by(site.members.identities[peer], now[peer]))
            giver.list(now[ME], by(replaced.new, now[ME]))
        site.givers[CEDAR].list(forged, by(replaced.old, forged))
        found = [h.manifest for h in (await site.asked()).values()]
        assert now[ME] in found and forged not in found
        (alarm,) = old_keys(site)
        assert alarm["code"] == "old key ash" and alarm["text"].startswith("cedar keeps")

    run(story)


def test_threat_17_a_round_of_long_ago_that_a_replaced_key_signs_again_is_neither_taken_nor_proof_against_its_owner(
    replaced: Replaced,
) -> None:
    """Both are signed with the old key: the one counts that the round after it names, as far as the new key's."""

    async def story() -> None:
        site = replaced.site
        mine = {3: site.manifest(ME, 3, {ME: "1" * 64})}
        for round in (4, 5):
            mine[round] = site.manifest(ME, round, {ME: mine[round - 1].digest})
        forged = mine[3].model_copy(update={"samples": 77})
        for round, key in ((3, replaced.old), (4, replaced.old), (5, replaced.new)):
            site.givers[BIRCH].list(mine[round], by(key, mine[round]))
        site.givers[CEDAR].list(forged, by(replaced.old, forged))
        counts = [h.manifest for h in (await site.asked()).values() if h.peer == ME]
        assert sorted(m.round for m in counts) == [3, 4, 5] and forged not in counts
        assert not list(site.evidence.iterdir())
        assert [a["code"] for a in old_keys(site)] == ["old key ash"]

    run(story)


def test_threat_17_two_of_the_last_round_that_a_replaced_key_signed_hold_up_by_name_and_prove_nothing(
    replaced: Replaced,
) -> None:
    """The key was changed after the end: nothing comes after it that could name the right one."""

    async def story() -> None:
        site = replaced.site
        genuine = site.manifest(ME, 4, replaced.inputs())
        forged = genuine.model_copy(update={"samples": 77})
        site.givers[BIRCH].list(genuine, by(replaced.old, genuine))
        site.givers[CEDAR].list(forged, by(replaced.old, forged))
        with pytest.raises(HeldUp, match="birch and cedar keep two different manifests of this node's round 4"):
            await site.asked()
        assert not list(site.evidence.iterdir())

    run(story)


def test_threat_17_what_only_a_replaced_key_says_makes_nothing_else_certain(replaced: Replaced) -> None:
    """Two chains of it, and no newer key has signed anything yet: nobody can tell which one is forged."""

    async def story() -> None:
        site = replaced.site
        for giver, samples in ((BIRCH, 10), (CEDAR, 77)):
            fourth = site.manifest(ME, 4, replaced.inputs(), samples=samples)
            fifth = site.manifest(ME, 5, {ME: fourth.digest}, samples=samples)
            for manifest in (fourth, fifth):
                site.givers[giver].list(manifest, by(replaced.old, manifest))
        with pytest.raises(HeldUp, match="birch and cedar keep two different manifests"):
            await site.asked()
        assert not list(site.evidence.iterdir())

    run(story)


def test_threat_17_the_same_round_signed_again_with_the_new_key_is_no_forgery(replaced: Replaced) -> None:
    """Only birch had it, and could not be asked: the round was trained again, to the same bytes."""

    async def story() -> None:
        site = replaced.site
        mine = site.manifest(ME, 4, replaced.inputs())
        site.givers[BIRCH].list(mine, by(replaced.old, mine))
        site.givers[CEDAR].list(mine, by(replaced.new, mine))
        assert mine in [h.manifest for h in (await site.asked()).values()]
        assert not old_keys(site)

    run(story)


@pytest.mark.parametrize("revoked", [False, True])
def test_threat_17_a_replaced_key_of_a_peer_rewrites_no_round_here_and_sends_nothing_in_its_name(
    members: Members, tmp_path: Path, revoked: bool
) -> None:
    """cedar has found birch's old key, and lists with it a round of long ago and one to come."""

    async def story() -> None:
        old, new = members.identities[BIRCH], Identity(asyncssh.generate_private_key("ssh-ed25519"))
        ring = Keyring.of(members.federation)
        file = KeyringFile(update=(Accepted(document=sign_update(ring, BIRCH, old, new.public), finished=True),))
        ring = Keyring.of(members.federation, file)
        if revoked:
            ring = ring.revoking(BIRCH, "")
        site = Site(members, tmp_path / "state", ring)
        theirs = {3: site.manifest(BIRCH, 3), 4: site.manifest(BIRCH, 4, {BIRCH: site.manifest(BIRCH, 3).digest})}
        mine = {4: site.manifest(ME, 4, {BIRCH: theirs[3].digest}), 5: site.manifest(ME, 5, {BIRCH: theirs[4].digest})}
        forged = [site.manifest(BIRCH, round, {BIRCH: theirs[4].digest}, samples=77) for round in (3, 6)]
        for round, manifest in mine.items():
            site.givers[CEDAR].list(manifest, by(members.identities[ME], manifest))
            site.givers[CEDAR].list(theirs[round - 1], by(old if round == 4 else new, theirs[round - 1]))
        for manifest in forged:
            site.givers[CEDAR].list(manifest, by(old, manifest))
        found = [h.manifest for h in (await site.asked()).values()]
        assert all(m in found for m in (*mine.values(), *theirs.values()))
        assert not any(m in found for m in forged)
        (alarm,) = old_keys(site)
        assert alarm["code"] == "old key birch" and alarm["text"].startswith("cedar keeps")
        assert alarm["fix"].endswith("call birch and cedar")

    run(story)


def test_threat_17_what_was_brought_by_hand_and_does_not_count_is_forgotten(replaced: Replaced) -> None:
    """The mailed folder alone did not show it; what birch lists does."""

    async def story() -> None:
        site = replaced.site
        now, forged = site.manifest(ME, 4, replaced.inputs()), site.manifest(ME, 9, replaced.inputs())
        site.givers[BIRCH].list(now, by(replaced.new, now))
        journal = site.recovery._node.journal
        journal.record_manifest(9, ME, forged.sha256, by(replaced.old, forged), forged.content())
        held = await site.asked()
        assert now in [h.manifest for h in held.values()] and forged not in [h.manifest for h in held.values()]
        state = replace(START, me=ME, phase=Phase.COLLECT, round=4)
        site.recovery._write(state, Digest("a" * 64), held, Mark(""))
        assert journal.manifest(9, ME) is None and journal.last_signed() == 4

    run(story)


def test_threat_17_whose_one_replaced_key_signed_all_there_is_of_it_is_believed(replaced: Replaced) -> None:
    """ash has changed its key and signed nothing since; what it signed before is one chain."""

    async def story() -> None:
        site = replaced.site
        fourth = {p: site.manifest(p, 4, replaced.inputs()) for p in (ME, BIRCH, CEDAR)}
        mine = [fourth[ME], site.manifest(ME, 5, {p: m.digest for p, m in fourth.items()})]
        for manifest in mine:
            site.givers[BIRCH].list(manifest, by(replaced.old, manifest))
        for peer, giver in site.givers.items():
            giver.list(fourth[peer], by(site.members.identities[peer], fourth[peer]))
        found = [h.manifest for h in (await site.asked()).values()]
        assert all(m in found for m in mine) and not old_keys(site)

    run(story)


def test_threat_12_who_breaks_off_what_it_lists_is_named_until_it_is_over(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is told that nothing is to be done, nor that it waits for nobody."""

    async def story() -> None:
        recovery, seen = site.recovery, []
        monkeypatch.setattr("hsl_node.node.heal.recovery.LOOK_AGAIN_S", 0.0)
        breaks = iter([True] * 5)

        async def answer_of(peer: Peer) -> Offer:
            recovery._unanswered.pop(peer, None)
            seen.append((dict(recovery.waiting), site.alarms.listing()[0]))
            return site.givers[peer].offer()

        async def state_of(*arguments: object) -> tuple[object, bool]:
            return SimpleNamespace(round=4, phase="collect", base="b" * 64), False

        async def bring(*arguments: object) -> None:
            if next(breaks, False):
                raise HeldUp(CEDAR, "the link broke while it gave abababababab, which it lists")

        for name, stub in (("_answer_of", answer_of), ("_state", state_of), ("_bring", bring)):
            monkeypatch.setattr(recovery, name, stub)
        monkeypatch.setattr(recovery, "_write", lambda *arguments: None)
        async with site.givers[BIRCH].serving(), site.givers[CEDAR].serving():
            await recovery.run(Digest("a" * 64), Mark("its disk was lost"))
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

        site.recovery._node.asking.get = get  # type: ignore[assignment]
        for _ in range(LOOK_AGAIN - 1):
            with pytest.raises(HeldUp):
                await site.recovery._bring(cast(Any, state), {}, held)
        await site.recovery._bring(cast(Any, state), {}, held)
        assert asked == [listed.sha256] * LOOK_AGAIN
        (told,) = [r.__dict__ for r in caplog.records if r.getMessage() == "left for later"]
        assert (told["peer"], told["round"]) == (CEDAR, 4)

    run(story)


def test_threat_17_a_node_does_not_take_itself_for_set_back_by_its_replaced_key(replaced: Replaced) -> None:
    """The live daemon, that is: its journal knows a round signed with the new key."""

    async def story() -> None:
        site, now = replaced.site, replaced.site.manifest(ME, 4, replaced.inputs())
        journal = site.recovery._node.journal
        forged = site.manifest(ME, 6)
        site.givers[CEDAR].list(forged, by(replaced.old, forged))
        journal.record_signed(4, Digest(now.sha256), by(replaced.new, now))
        async with site.givers[BIRCH].serving(), site.givers[CEDAR].serving():
            await site.recovery._node.asking.check()
        assert not journal.meta("recover") and not site.alarms.listing()

    run(story)
